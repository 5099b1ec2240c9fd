// The inner loops of files and masks, with a C interface and no other headers than those of the language.
//
// Compiled into the same libraries as kernels.cpp, for the same CPUs; the compiler makes vectors of the loops. The
// contract in sparsehooks (components.py) says what they compute, and its reference gives the same bits. Lengths are
// checked by the caller (routines.py); positions that index memory are checked here. Nothing needs to be aligned.
//
// Positions of bits come from a table: eight for each byte, of which as many count as it has ones, so that the loop has
// no branches.

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bits are counted from the lowest byte on");

namespace {

constexpr int64_t BLOCK = 3840;  // elements that have a byte at a time, in the first cache; a multiple of 64, 3 and 5
constexpr int TESTED = 32;       // scores that are compared before any of them is looked at

typedef uint16_t Eight __attribute__((vector_size(16)));

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
  uint16_t places[256][8];  // of the ones in a byte
  uint8_t ones[256];        // how many it has
};

constexpr Tables make_tables() {
  Tables made{};
  for (int byte = 0; byte < 256; ++byte)
    for (int bit = 0; bit < 8; ++bit)
      if (byte >> bit & 1) made.places[byte][made.ones[byte]++] = uint16_t(bit);
  return made;
}

constexpr Tables TABLES = make_tables();

// The bits of eight bytes that are 0 or 1.
inline uint8_t gather(uint64_t bytes) {
  bytes = (bytes | bytes >> 7) & 0x0003000300030003;
  bytes = (bytes | bytes >> 14) & 0x0000000F0000000F;
  return uint8_t(bytes | bytes >> 28);
}

inline void gather(const uint8_t* bytes, int64_t count, uint8_t* bits) {
  for (int64_t i = 0; i < count; ++i) bits[i] = gather(load((const uint64_t*)bytes, i));
}

int64_t count_ones(const uint8_t* bits, int64_t bytes) {
  int64_t ones = 0, i = 0;
  for (; i + 8 <= bytes; i += 8) ones += __builtin_popcountll(load<uint64_t>(bits + i));
  for (; i < bytes; ++i) ones += TABLES.ones[bits[i]];
  return ones;
}

// The places of the ones in a block of bits, of which there are as many as is returned; eight more may be written.
inline int64_t unpack_block(const uint8_t* bits, int64_t bytes, uint16_t* near) {
  int64_t found = 0;
  for (int64_t i = 0; i < bytes; ++i) {
    const Eight places = load<Eight>(TABLES.places[bits[i]]) + uint16_t(8 * i);
    std::memcpy(near + found, &places, sizeof(places));
    found += TABLES.ones[bits[i]];
  }
  return found;
}

template <class T>
int64_t flag(const T* values, int64_t count, int shift, uint8_t* bits) {
  alignas(64) uint8_t flags[BLOCK];
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t size = count - start < BLOCK ? count - start : BLOCK, bytes = (size + 7) / 8;
    for (int64_t i = 0; i < size; ++i) flags[i] = T(load(values, start + i) << shift) != 0;
    std::memset(flags + size, 0, 8 * bytes - size);
    gather(flags, bytes, bits + start / 8);
  }
  return count_ones(bits, (count + 7) / 8);
}

// A matrix of 8x8 bits, a row a byte (Warren 2012, "Hacker's Delight", 7-3).
inline uint64_t transpose(uint64_t rows) {
  uint64_t odd = (rows ^ rows >> 7) & 0x00AA00AA00AA00AA;
  rows ^= odd ^ odd << 7;
  odd = (rows ^ rows >> 14) & 0x0000CCCC0000CCCC;
  rows ^= odd ^ odd << 14;
  odd = (rows ^ rows >> 28) & 0x00000000F0F0F0F0;
  return rows ^ odd ^ odd << 28;
}

// The planes of the bits of numbers from `shift` on, at most eight of them.
template <class T>
void pack_planes(const T* numbers, int64_t count, int shift, int width, uint8_t* planes) {
  const int64_t length = (count + 7) / 8;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t size = count - start < BLOCK ? count - start : BLOCK, words = (size + 7) / 8;
    alignas(64) uint8_t bytes[BLOCK];
    alignas(64) uint64_t rows[BLOCK / 8];
    for (int64_t i = 0; i < size; ++i) bytes[i] = uint8_t(load(numbers, start + i) >> shift);
    std::memset(bytes + size, 0, 8 * words - size);
    for (int64_t i = 0; i < words; ++i) rows[i] = transpose(load<uint64_t>(bytes + 8 * i));
    for (int plane = 0; plane < width; ++plane)
      for (int64_t i = 0; i < words; ++i) planes[plane * length + start / 8 + i] = uint8_t(rows[i] >> 8 * plane);
  }
}

// Sets the bits of numbers from `shift` on, which are zero.
template <class T>
void unpack_planes(const uint8_t* planes, int64_t count, int shift, int width, T* numbers) {
  const int64_t length = (count + 7) / 8;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t size = count - start < BLOCK ? count - start : BLOCK, words = (size + 7) / 8;
    alignas(64) uint8_t bytes[BLOCK];
    alignas(64) uint64_t rows[BLOCK / 8] = {};
    for (int plane = 0; plane < width; ++plane)
      for (int64_t i = 0; i < words; ++i) rows[i] |= uint64_t(planes[plane * length + start / 8 + i]) << 8 * plane;
    for (int64_t i = 0; i < words; ++i) store((uint64_t*)bytes, i, transpose(rows[i]));
    for (int64_t i = 0; i < size; ++i) numbers[start + i] |= T(bytes[i] << shift);
  }
}

// ---------------------------------------------------------------------------------------------------------- gaps

template <class T>
void join_gaps(const T* gaps, int64_t count, const int64_t* ones, int low, int64_t* positions) {
  int64_t sum = 0, i = 0;
  for (; i + 4 <= count; i += 4) {  // one addition waits for the one before, not four
    const int64_t one = load(gaps, i), two = one + load(gaps, i + 1), third = load(gaps, i + 2);
    positions[i] = i + sum + one;
    positions[i + 1] = i + 1 + sum + two;
    positions[i + 2] = i + 2 + sum + two + third;
    sum += two + (third + int64_t(load(gaps, i + 3)));
    positions[i + 3] = i + 3 + sum;
  }
  for (; i < count; ++i) positions[i] = i + (sum += load(gaps, i));
  if (ones != nullptr)
    for (i = 0; i < count; ++i) positions[i] += (load(ones, i) - i) << low;
}

template <class T>
void split_gaps(const int64_t* positions, int64_t count, int low, T* lowest, int64_t* ones) {
  // a one lies behind the ones before it and the high parts, which are what is left of a position without all low bits
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t gap = load(positions, i) - (i ? load(positions, i - 1) : -1) - 1;
    lowest[i] = T(gap & ((int64_t(1) << low) - 1));
  }
  for (int64_t i = 0; i < count; ++i) ones[i] = ((load(positions, i) - i - (sum += lowest[i])) >> low) + i;
}

// ------------------------------------------------------------------------------------------------------ exponents

template <class T>
int64_t split_exponents(const T* values, int64_t count, int shift, const uint8_t* frequent, int base, int size,
                        uint8_t* codes, uint8_t* bits, uint8_t* rest) {
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t some = count - start < BLOCK ? count - start : BLOCK;
    alignas(64) uint8_t exponents[BLOCK], digits[BLOCK + 8], flags[BLOCK];
    for (int64_t i = 0; i < some; ++i) {
      const uint16_t upper = uint16_t(load(values, start + i) >> (8 * sizeof(T) - 16));
      const uint16_t rotated = uint16_t(upper << 1 | upper >> 15);
      exponents[i] = uint8_t(rotated >> shift);
      rest[start + i] = uint8_t(rotated);
    }
    std::memset(digits, base, sizeof(digits));
    for (int digit = 0; digit < base; ++digit) {
      const uint8_t exponent = frequent[digit];
      for (int64_t i = 0; i < some; ++i) digits[i] = exponents[i] == exponent ? uint8_t(digit) : digits[i];
    }
    std::memset(flags, 0, sizeof(flags));
    for (int64_t i = 0; i < some; ++i) flags[i] = digits[i] == base;
    gather(flags, (some + 7) / 8, bits + start / 8);
    for (int64_t i = 0; i < BLOCK + 8; ++i) digits[i] = digits[i] == base ? 0 : digits[i];
    for (int64_t i = 0; i < some; i += size) {
      int code = 0;
      for (int place = size; place-- > 0;) code = code * base + digits[i + place];
      *codes++ = uint8_t(code);
    }
  }
  return count_ones(bits, (count + 7) / 8);
}

// ------------------------------------------------------------------------------------------------------ checksums

#if defined(__x86_64__)

// CRC-32 of zlib: a polynomial modulo P, of which the lowest bit of the first byte has the highest power. Blocks of 16
// bytes are carried to those behind them, where powers of x are replaced by what they are modulo P (Gopal et al. 2009,
// "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction").

constexpr uint32_t POLYNOMIAL = 0xEDB88320;

struct Remainders {
  uint32_t of_byte[256];
};

constexpr Remainders make_remainders() {
  Remainders made{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t rest = byte;
    for (int bit = 0; bit < 8; ++bit) rest = rest >> 1 ^ (rest & 1 ? POLYNOMIAL : 0);
    made.of_byte[byte] = rest;
  }
  return made;
}

constexpr Remainders REMAINDERS = make_remainders();

// x to a power modulo P, as one of 64 bits.
constexpr int64_t power(int exponent) {
  uint32_t rest = 0x80000000;
  for (; exponent > 0; --exponent) rest = rest >> 1 ^ (rest & 1 ? POLYNOMIAL : 0);
  return int64_t(uint64_t(rest) << 32);
}

// What 16 bytes are so many bits later; a product of reversed bits has one power more than the polynomials.
template <int DISTANCE>
__attribute__((target("pclmul"))) inline __m128i carry(__m128i block) {
  const __m128i powers = _mm_set_epi64x(power(DISTANCE - 1), power(DISTANCE + 63));
  return _mm_clmulepi64_si128(block, powers, 0x00) ^ _mm_clmulepi64_si128(block, powers, 0x11);
}

__attribute__((target("pclmul"))) uint32_t checksum(const uint8_t* data, int64_t size, uint32_t start) {
  uint32_t rest = ~start;
  if (size >= 64) {
    __m128i first = load<__m128i>(data) ^ _mm_cvtsi32_si128(int(rest)), second = load<__m128i>(data + 16);
    __m128i third = load<__m128i>(data + 32), fourth = load<__m128i>(data + 48);
    for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
      first = carry<512>(first) ^ load<__m128i>(data);
      second = carry<512>(second) ^ load<__m128i>(data + 16);
      third = carry<512>(third) ^ load<__m128i>(data + 32);
      fourth = carry<512>(fourth) ^ load<__m128i>(data + 48);
    }
    first = carry<128>(carry<128>(carry<128>(first) ^ second) ^ third) ^ fourth;
    for (; size >= 16; data += 16, size -= 16) first = carry<128>(first) ^ load<__m128i>(data);
    uint8_t bytes[16];
    std::memcpy(bytes, &first, sizeof(bytes));
    rest = 0;
    for (uint8_t byte : bytes) rest = rest >> 8 ^ REMAINDERS.of_byte[(rest ^ byte) & 255];
  }
  for (; size > 0; ++data, --size) rest = rest >> 8 ^ REMAINDERS.of_byte[(rest ^ *data) & 255];
  return ~rest;
}

#endif

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
  alignas(64) uint8_t flags[BLOCK];
  uint8_t bits[BLOCK / 8];
  uint16_t near[BLOCK + 8];
  int64_t found = 0;
  *above = 0;
  for (int64_t start = 0; start < count; start += BLOCK) {
    const int64_t size = count - start < BLOCK ? count - start : BLOCK, bytes = (size + 7) / 8;
    T more = 0;
    for (int64_t i = 0; i < size; ++i) {
      const T key = ordered(load(values, start + i));
      flags[i] = uint8_t(key >= low) & uint8_t(key <= high);
      more += T(key > high) & T(key <= infinity);
    }
    *above += more;
    std::memset(flags + size, 0, 8 * bytes - size);
    gather(flags, bytes, bits);
    const int64_t some = unpack_block(bits, bytes, near);
    for (int64_t i = 0; i < some; ++i) store(inside, found + i, load(values, start + near[i]));
    found += some;
  }
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

// What the Python code has to agree with: the version of this interface.
int64_t sparsehooks_routines[1] = {1};

// How many of the values have bits below the highest `shift`; bits: (count + 7) / 8 bytes.
int64_t sparsehooks_flag(const void* values, int64_t itemsize, int64_t count, int shift, uint8_t* bits) {
  return sized(itemsize, [=](auto one) { return flag((const decltype(one)*)values, count, shift, bits); });
}

int64_t sparsehooks_count(const uint8_t* bits, int64_t bytes) { return count_ones(bits, bytes); }

// positions: of as many ones as were counted. How many there are: others if somebody has changed the bits since.
int64_t sparsehooks_unpack_bits(const uint8_t* bits, int64_t bytes, int64_t* positions, int64_t counted) {
  uint16_t near[BLOCK + 8];
  int64_t total = 0;
  for (int64_t start = 0; start < bytes; start += BLOCK / 8) {
    const int64_t found = unpack_block(bits + start, bytes - start < BLOCK / 8 ? bytes - start : BLOCK / 8, near);
    for (int64_t i = 0; i < found && total + i < counted; ++i) positions[total + i] = 8 * start + near[i];
    total += found;
  }
  return total;
}

// bits: (size + 7) / 8 bytes. Zero if one lies outside, or before an earlier block.
int sparsehooks_pack_bits(const int64_t* positions, int64_t count, int64_t size, uint8_t* bits) {
  alignas(64) uint8_t flags[BLOCK];
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
    gather(flags, (end - start + 7) / 8, bits + start / 8);
  }
  return next == count;
}

// numbers: of 1 or 2 bytes; planes: width times (count + 7) / 8 bytes.
void sparsehooks_pack_planes(const void* numbers, int64_t itemsize, int64_t count, int width, uint8_t* planes) {
  sized(itemsize, [=](auto one) {
    for (int shift = 0; shift < width; shift += 8)
      pack_planes((const decltype(one)*)numbers, count, shift, width - shift < 8 ? width - shift : 8,
                  planes + shift * ((count + 7) / 8));
  });
}

// numbers: zeros of 1 or 2 bytes.
void sparsehooks_unpack_planes(const uint8_t* planes, int width, int64_t count, int64_t itemsize, void* numbers) {
  sized(itemsize, [=](auto one) {
    for (int shift = 0; shift < width; shift += 8)
      unpack_planes(planes + shift * ((count + 7) / 8), count, shift, width - shift < 8 ? width - shift : 8,
                    (decltype(one)*)numbers);
  });
}

// ones may be null.
void sparsehooks_join_gaps(const void* gaps, int64_t itemsize, int64_t count, const int64_t* ones, int low,
                           int64_t* positions) {
  sized(itemsize, [=](auto one) { join_gaps((const decltype(one)*)gaps, count, ones, low, positions); });
}

// lowest: of 1 byte, or of 2 where there are more than 8 low bits.
void sparsehooks_split_gaps(const int64_t* positions, int64_t count, int low, void* lowest, int64_t* ones) {
  if (low <= 8) return split_gaps(positions, count, low, (uint8_t*)lowest, ones);
  split_gaps(positions, count, low, (uint16_t*)lowest, ones);
}

// values: of 2 or 4 bytes; codes: a byte for `size` values; bits: of those without a digit. How many these are.
int64_t sparsehooks_split_exponents(const void* values, int64_t itemsize, int64_t count, int shift,
                                    const uint8_t* frequent, int base, int size, uint8_t* codes, uint8_t* bits,
                                    uint8_t* rest) {
  auto split = [=](const auto* given) {
    return split_exponents(given, count, shift, frequent, base, size, codes, bits, rest);
  };
  return itemsize == 2 ? split((const uint16_t*)values) : split((const uint32_t*)values);
}

// start: the checksum of what comes before. -1 if the CPU has no instructions for it.
int64_t sparsehooks_checksum([[maybe_unused]] const uint8_t* data, [[maybe_unused]] int64_t size,
                             [[maybe_unused]] int64_t start) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("pclmul")) return checksum(data, size, uint32_t(start));
#endif
  return -1;
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
