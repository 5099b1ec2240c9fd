// The inner loops of files and masks, with a C interface and no other headers than those of the language.
//
// Compiled into the same libraries as kernels.cpp, for the same CPUs; the compiler makes vectors of the loops. What each
// of them computes is said by the contract in sparsehooks (components.py), whose reference gives the same bits. Lengths
// are checked by the caller (routines.py); positions that index memory are checked here. What is read needs no alignment.
//
// Positions of bits come from a table: eight for each byte, of which as many count as it has ones, so that a loop over
// bytes has no branches. It writes up to PADDING positions beyond the last.

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bits are counted from the lowest byte on");

namespace {

constexpr int64_t PADDING = 8;
constexpr int64_t BLOCK = 4096;  // elements that are flagged at a time, in the first cache
constexpr int TESTED = 32;       // scores that are compared before any of them is looked at

typedef uint8_t Bytes __attribute__((vector_size(8)));
typedef uint16_t Shorts __attribute__((vector_size(16)));
typedef int64_t Longs __attribute__((vector_size(64)));

template <class T>
inline T load(const void* from) {
  T found;
  std::memcpy(&found, from, sizeof(T));
  return found;
}

template <class T>
inline T load(const T* from, int64_t place) {
  return load<T>(from + place);
}

template <class T>
inline void store(T* to, int64_t place, T value) {
  std::memcpy(to + place, &value, sizeof(T));
}

// What takes an element, for elements of 1, 2, 4 or 8 bytes.
template <class F>
inline auto sized(int64_t itemsize, F run) {
  switch (itemsize) {
    case 1: return run(uint8_t());
    case 2: return run(uint16_t());
    case 4: return run(uint32_t());
    default: return run(uint64_t());
  }
}

// ---------------------------------------------------------------------------------------------------------- bits

struct Tables {
  uint8_t places[256][8];  // of the ones in a byte
  uint8_t ones[256];       // how many it has
  uint64_t spread[256];    // a byte for each bit
};

constexpr Tables make_tables() {
  Tables made{};
  for (int byte = 0; byte < 256; ++byte)
    for (int bit = 0; bit < 8; ++bit)
      if (byte >> bit & 1) {
        made.places[byte][made.ones[byte]++] = uint8_t(bit);
        made.spread[byte] |= uint64_t(1) << 8 * bit;
      }
  return made;
}

constexpr Tables TABLES = make_tables();

// The lowest bit of each of eight bytes.
inline uint8_t gather(uint64_t bytes) {
  return uint8_t((bytes & 0x0101010101010101) * 0x0102040810204080 >> 56);
}

template <class T>
int64_t flag(const T* values, int64_t count, int shift, uint8_t* bits) {
  int64_t ones = 0;
  uint8_t flags[BLOCK];
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t size = count - start < BLOCK ? count - start : BLOCK;
    for (int64_t i = 0; i < size; ++i) flags[i] = T(load(values, start + i) << shift) != 0;
    for (int64_t i = size; i % 8; ++i) flags[i] = 0;
    for (int64_t i = 0; i < size; i += 8) {
      const uint8_t byte = gather(load<uint64_t>(flags + i));
      bits[(start + i) / 8] = byte;
      ones += TABLES.ones[byte];
    }
  }
  return ones;
}

template <class T>
void pack_planes(const T* numbers, int64_t count, int width, uint8_t* planes) {
  const int64_t bytes = (count + 7) / 8;
  for (int64_t i = 0; i < bytes; ++i) {
    T eight[8] = {};
    std::memcpy(eight, numbers + 8 * i, sizeof(T) * (count - 8 * i < 8 ? count - 8 * i : 8));
    uint64_t low = 0, high = 0;
    for (int j = 0; j < 8; ++j) {
      low |= uint64_t(uint8_t(eight[j])) << 8 * j;
      if (sizeof(T) > 1) high |= uint64_t(uint16_t(eight[j]) >> 8) << 8 * j;
    }
    for (int plane = 0; plane < width; ++plane)
      planes[plane * bytes + i] = gather(plane < 8 ? low >> plane : high >> (plane - 8));
  }
}

// ---------------------------------------------------------------------------------------------------------- gaps

template <class T>
void join_gaps(const T* gaps, int64_t count, const int64_t* ends, int low, int64_t* positions) {
  int64_t sum = -1;
  for (int64_t i = 0; i < count; ++i) {
    sum += int64_t(load(gaps, i)) + 1;
    positions[i] = sum;
  }
  if (ends != nullptr)
    for (int64_t i = 0; i < count; ++i) positions[i] += (load(ends, i) - i) << low;
}

template <class T>
void split_gaps(const int64_t* positions, int64_t count, int low, T* lowest, int64_t* ends) {
  int64_t before = -1, end = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = load(positions, i), gap = position - before - 1;
    before = position;
    lowest[i] = T(gap & ((int64_t(1) << low) - 1));
    ends[i] = end += (gap >> low) + 1;
  }
}

template <class T>
int scatter(T* dense, int64_t size, const int64_t* positions, const T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = load(positions, i);
    if (uint64_t(position) >= uint64_t(size)) return 0;
    store(dense, position, load(values, i));
  }
  return 1;
}

// --------------------------------------------------------------------------------------------------------- scores

// Floating-point numbers as integers of the same order; T is signed, of their width.
template <class T>
inline T ordered(T bits) {
  return T(bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<T>::max()));
}

// Blocks of a length that the compiler knows, and the rest.
template <class F>
inline void blockwise(int64_t count, F run) {
  int64_t start = 0;
  for (; start + TESTED <= count; start += TESTED) run(start, start + TESTED);
  if (start < count) run(start, count);
}

// What compares as equal to a number: both zeros are.
template <class T>
struct Range {
  T low, high;

  explicit Range(T bits) : low(ordered(bits)), high(low) {
    if (T(uint64_t(bits) << 1) == 0) low = -1, high = 0;
  }
};

template <class T>
int64_t between(const T* values, int64_t count, const T* bounds, T* inside, int64_t* above) {
  const T low = Range<T>(load(bounds, 0)).low, high = Range<T>(load(bounds, 1)).high;
  const T infinity = ordered(load(bounds, 2));
  int64_t found = 0;
  *above = 0;
  blockwise(count, [&](int64_t start, int64_t end) {
    T some = 0, more = 0;
    for (int64_t i = start; i < end; ++i) {
      const T key = ordered(load(values, i));
      some |= T(key >= low) & T(key <= high);
      more += T(key > high) & T(key <= infinity);
    }
    *above += more;
    for (int64_t i = start; some && i < end; ++i) {
      const T value = load(values, i), key = ordered(value);
      store(inside, found, value);
      found += (key >= low) & (key <= high);
    }
  });
  return found;
}

template <class T>
void largest(const T* values, int64_t count, const T* bounds, int64_t ties, uint8_t* mask) {
  const Range<T> cut(load(bounds, 0));
  const T infinity = ordered(load(bounds, 1));
  blockwise(count, [&](int64_t start, int64_t end) {
    T equal = 0;
    for (int64_t i = start; i < end; ++i) {
      const T key = ordered(load(values, i));
      mask[i] = uint8_t(key > cut.high) & uint8_t(key <= infinity);
      equal |= T(key >= cut.low) & T(key <= cut.high);
    }
    for (int64_t i = start; equal && ties > 0 && i < end; ++i) {
      const T key = ordered(load(values, i));
      if (key >= cut.low && key <= cut.high) mask[i] = 1, --ties;
    }
  });
}

}  // namespace

extern "C" {

// What the Python code has to agree with: the version of this interface, PADDING.
int64_t sparsehooks_routines[2] = {1, PADDING};

// How many of the values have bits below the highest `shift`; bits: (count + 7) / 8 bytes.
int64_t sparsehooks_flag(const void* values, int64_t itemsize, int64_t count, int shift, uint8_t* bits) {
  return sized(itemsize, [=](auto one) { return flag((const decltype(one)*)values, count, shift, bits); });
}

int64_t sparsehooks_count(const uint8_t* bits, int64_t bytes) {
  int64_t ones = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) ones += __builtin_popcountll(load<uint64_t>(bits + i));
  for (; i < bytes; ++i) ones += TABLES.ones[bits[i]];
  return ones;
}

// positions: as many as there are ones, and PADDING.
void sparsehooks_unpack_bits(const uint8_t* bits, int64_t bytes, int64_t* positions) {
  for (int64_t i = 0; i < bytes; ++i) {
    const Longs found = __builtin_convertvector(load<Bytes>(TABLES.places[bits[i]]), Longs) + 8 * i;
    std::memcpy(positions, &found, sizeof(found));
    positions += TABLES.ones[bits[i]];
  }
}

// bits: (size + 7) / 8 bytes. Zero if the positions do not ascend below size.
int sparsehooks_pack_bits(const int64_t* positions, int64_t count, int64_t size, uint8_t* bits) {
  uint8_t flags[BLOCK];
  int64_t next = 0;
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t end = size - start < BLOCK ? size : start + BLOCK;
    std::memset(flags, 0, sizeof(flags));
    for (; next < count; ++next) {
      const int64_t position = load(positions, next);
      if (position >= end) break;
      if (position < start) return 0;
      flags[position - start] = 1;
    }
    for (int64_t i = start; i < end; i += 8) bits[i / 8] = gather(load<uint64_t>(flags + i - start));
  }
  return next == count;
}

// numbers: of 1 or 2 bytes; planes: width times (count + 7) / 8 bytes.
void sparsehooks_pack_planes(const void* numbers, int64_t itemsize, int64_t count, int width, uint8_t* planes) {
  sized(itemsize, [=](auto one) { pack_planes((const decltype(one)*)numbers, count, width, planes); });
}

// numbers: of 1 byte, or of 2 where the width is more than 8.
void sparsehooks_unpack_planes(const uint8_t* planes, int width, int64_t count, uint8_t* numbers) {
  const int64_t bytes = (count + 7) / 8;
  const int itemsize = width > 8 ? 2 : 1;
  for (int64_t i = 0; i < bytes; ++i) {
    uint64_t low = 0, high = 0;
    for (int plane = 0; plane < width && plane < 8; ++plane) low |= TABLES.spread[planes[plane * bytes + i]] << plane;
    for (int plane = 8; plane < width; ++plane) high |= TABLES.spread[planes[plane * bytes + i]] << (plane - 8);
    const Shorts wide = __builtin_convertvector(load<Bytes>(&low), Shorts) |
                        __builtin_convertvector(load<Bytes>(&high), Shorts) << 8;
    const void* eight = itemsize == 1 ? (const void*)&low : (const void*)&wide;
    std::memcpy(numbers + 8 * itemsize * i, eight, itemsize * (count - 8 * i < 8 ? count - 8 * i : 8));
  }
}

// ends may be null.
void sparsehooks_join_gaps(const void* gaps, int64_t itemsize, int64_t count, const int64_t* ends, int low,
                           int64_t* positions) {
  sized(itemsize, [=](auto one) { join_gaps((const decltype(one)*)gaps, count, ends, low, positions); });
}

// lowest: of 1 byte, or of 2 where there are more than 8 low bits.
void sparsehooks_split_gaps(const int64_t* positions, int64_t count, int low, void* lowest, int64_t* ends) {
  if (low <= 8) return split_gaps(positions, count, low, (uint8_t*)lowest, ends);
  split_gaps(positions, count, low, (uint16_t*)lowest, ends);
}

// Zero if a position lies outside; values before it are written.
int sparsehooks_scatter(void* dense, int64_t itemsize, int64_t size, const int64_t* positions, const void* values,
                        int64_t count) {
  return sized(itemsize, [=](auto one) {
    typedef decltype(one) T;
    return scatter((T*)dense, size, positions, (const T*)values, count);
  });
}

// bounds: low, high and infinity; inside: room for all values. How many lie inside.
int64_t sparsehooks_between(const void* values, int64_t itemsize, int64_t count, const void* bounds, void* inside,
                            int64_t* above) {
  return sized(itemsize, [=](auto one) {
    typedef std::make_signed_t<decltype(one)> T;
    return between((const T*)values, count, (const T*)bounds, (T*)inside, above);
  });
}

// bounds: the cut and infinity; mask: a byte for each value.
void sparsehooks_largest(const void* values, int64_t itemsize, int64_t count, const void* bounds, int64_t ties,
                         uint8_t* mask) {
  sized(itemsize, [=](auto one) {
    typedef std::make_signed_t<decltype(one)> T;
    largest((const T*)values, count, (const T*)bounds, ties, mask);
  });
}
}
