// Sparse weights times tokens, with a C interface and no other headers than those of the language.
//
// Compiled several times for CPUs of one architecture; see hatch_build.py. What differs is the width of the vectors
// (GCC's and Clang's vector extensions), and which of the three kernels there are:
//
//   float32          one weight      multiply and add
//   bfloat16 pairs   1x2 block       vdpbf16ps (AVX512-BF16)
//   int8 quads       1x4 block       vpdpbusd  (AVX512-VNNI); inputs are rounded to 8 bits, one grid for each token
//
// All treat a block of 4 bytes as one *unit*, so a layer of in_features = 768 has 768, 384 or 192 columns of units.
//
// The weights lie in tiles of ROWS rows and PANEL columns, so that a panel of inputs stays in the first cache. The rows
// of a tile are sorted by how many units they have, most first: a loop over the units of a row then runs as often as
// that of the row before, which the CPU predicts. Sixteen such rows (LANES) are interleaved, unit k of each beside the
// others and padded by zeros to the longest (SELL-C-sigma; Kreutzer et al. 2014, arXiv:1307.6209):
//
//   values   4 bytes a unit        rows     1 byte a row and tile: which one it is
//   columns  1 byte, in the panel  counts   1 byte a row and tile: how many units it has
//   starts   8 bytes a tile (row blocks outer, panels inner): where its values and columns begin; one more for the end
//
// Many tokens are transposed to [columns][tokens], and a unit is multiplied with a vector of tokens; a few are not, and
// a vector of units is multiplied with what it looks up in the token.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif

extern "C" {

struct Weights {
  const uint32_t* values;
  const uint8_t* columns;
  const uint8_t* rows;
  const uint8_t* counts;
  const int64_t* starts;
  const float* bias;
  const float* scales;  // of rows, int8 only
  const int32_t* sums;  // of the codes of a row, int8 only
  int64_t out_features;
  int64_t in_features;
};
}

namespace {

constexpr int LANES = 16, ROWS = 256, PANEL = 96;
constexpr int FEW = WIDTH == 32 ? 2 : 4;     // so many tokens are looked up in, not transposed; measured
constexpr int MOST = WIDTH == 16 ? 32 : 64;  // tokens that one pass over a tile serves; all sums are in registers
constexpr int64_t CHUNK = 1024;              // tokens whose inputs are kept transposed at a time
constexpr int64_t SMALL = 1 << 16;           // with fewer units times 16 tokens, waiting for threads takes longer

constexpr int L = WIDTH / 4;
typedef uint32_t Units __attribute__((vector_size(WIDTH)));
typedef float Floats __attribute__((vector_size(WIDTH)));

template <class T>
inline T load(const void* from) {
  T found;
  std::memcpy(&found, from, sizeof(T));
  return found;
}

template <class T>
inline void store(void* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}

// Of `count` elements of 4 bytes; the others are zero.
template <class T>
inline T load_some(const void* from, int64_t count) {
  if (count >= L) return load<T>(from);
  T found{};
  std::memcpy(&found, from, 4 * count);
  return found;
}

inline void store_some(float* to, Floats value, int64_t count) {
  if (count >= L) return store(to, value);
  std::memcpy(to, &value, 4 * count);
}

#if defined(__AVX512BF16__)
inline void store_some(uint16_t* to, Floats value, int64_t count) {
  __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
  if (count >= L) return store(to, rounded);
  std::memcpy(to, &rounded, 2 * count);
}
#endif

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// ------------------------------------------------------------------------------------------------- transposing

template <int STEP, int... I>
inline void exchange(Units& first, Units& second, std::integer_sequence<int, I...>) {
  // of each square of 2x2 blocks of STEP elements, those off the diagonal change places
  Units low = __builtin_shufflevector(first, second, ((I & STEP) ? L + I - STEP : I)...);
  second = __builtin_shufflevector(first, second, ((I & STEP) ? L + I : I + STEP)...);
  first = low;
}

template <int STEP>
inline void exchange_all(Units* rows) {
  if constexpr (STEP < L) {
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (!(i & STEP)) exchange<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, L>());
    exchange_all<STEP * 2>(rows);
  }
}

// L rows of L elements, in place.
inline void transpose(Units* rows) { exchange_all<1>(rows); }

// ------------------------------------------------------------------------------------------- the three kernels

// How the inputs of one token were rounded.
struct Grid {
  float scale;
  int32_t zero;
};

struct Float32 {
  typedef float Number;                      // of inputs and outputs
  static constexpr int features = 1;         // of a unit
  static constexpr bool as_they_are = true;  // whether a token and its units have the same bits

  static Units multiply(Units sum, Units input, Units weight) {
    return (Units)((Floats)sum + (Floats)input * (Floats)weight);
  }
  static Units add(Units a, Units b) { return (Units)((Floats)a + (Floats)b); }
  static void add(uint32_t* to, uint32_t unit) { store(to, load<float>(to) + load<float>(&unit)); }

  // A token as units; those after its end are zero already.
  static void encode(const float* input, int64_t count, uint32_t* units, Grid&) {
    std::memcpy(units, input, 4 * count);
  }

  // What is needed of rows that lie beside each other, for the outputs of any token.
  struct Rows {
    Floats bias;
    Rows(const Weights& weights, int64_t row, int64_t count) : bias(load_some<Floats>(weights.bias + row, count)) {}
  };

  static Floats decode(Units sum, const Rows& rows, const Grid&) { return (Floats)sum + rows.bias; }
};

#if defined(__AVX512BF16__)
struct BFloat16Pairs : Float32 {
  static constexpr int features = 2;
  static constexpr bool as_they_are = false;

  static Units multiply(Units sum, Units input, Units weight) {
    return (Units)_mm512_dpbf16_ps((__m512)sum, (__m512bh)input, (__m512bh)weight);
  }

  static void encode(const float* input, int64_t count, uint32_t* units, Grid&) {
    for (int64_t i = 0; i < count; i += 16) {
      __mmask16 some = count - i >= 16 ? 0xffff : (1 << (count - i)) - 1;
      __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, input + i));
      std::memcpy(units + i / 2, &rounded, 4 * divide_up(std::min<int64_t>(16, count - i), 2));
    }
  }
};

// The same between layers that are in bfloat16 themselves.
struct BFloat16Throughout : BFloat16Pairs {
  typedef uint16_t Number;
  static constexpr bool as_they_are = true;

  static void encode(const uint16_t* input, int64_t count, uint32_t* units, Grid&) {
    std::memcpy(units, input, 2 * count);
  }
};
#endif

#if defined(__AVX512VNNI__)
struct Int8Quads {
  typedef float Number;
  static constexpr int features = 4;
  static constexpr bool as_they_are = false;

  static Units multiply(Units sum, Units input, Units weight) {
    return (Units)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)input, (__m512i)weight);
  }
  static Units add(Units a, Units b) { return a + b; }
  static void add(uint32_t* to, uint32_t unit) { *to += unit; }

  // As sparsehooks.Steps(8, symmetric=False) does: scales have 16 significant bits, and zero is one of the codes.
  static void encode(const float* input, int64_t count, uint32_t* units, Grid& grid) {
    __m512 low = _mm512_setzero_ps(), high = low;
    __mmask16 finite = 0xffff;
    auto some = [&](int64_t i) -> __mmask16 { return count - i >= 16 ? 0xffff : (1 << (count - i)) - 1; };
    for (int64_t i = 0; i < count; i += 16) {
      __m512 values = _mm512_maskz_loadu_ps(some(i), input + i);
      low = _mm512_min_ps(low, values);
      high = _mm512_max_ps(high, values);
      finite &= _mm512_cmp_ps_mask(_mm512_abs_ps(values), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
    }
    float least = _mm512_reduce_min_ps(low), most = _mm512_reduce_max_ps(high);
    float step = std::min(std::max((most - least) / 255, 0x1p-126f), 0x1.01p120f);
    uint32_t bits = load<uint32_t>(&step);
    bits = (bits + 127 + (bits >> 8 & 1)) & ~255u;
    grid.scale = most == least ? 1 : load<float>(&bits);
    grid.zero = std::min(255, std::max(0, (int)std::nearbyint(-least / grid.scale)));
    if (finite != 0xffff) grid.scale = NAN;  // and so are the outputs
    __m512 inverse = _mm512_set1_ps(1 / grid.scale);
    for (int64_t i = 0; i < count; i += 16) {
      __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(some(i), input + i), inverse));
      codes = _mm512_max_epi32(_mm512_add_epi32(codes, _mm512_set1_epi32(grid.zero)), _mm512_setzero_si512());
      _mm_mask_storeu_epi8((uint8_t*)units + i, some(i), _mm512_cvtusepi32_epi8(codes));
    }
  }

  struct Rows : Float32::Rows {
    Units sums;
    Floats scales;
    Rows(const Weights& weights, int64_t row, int64_t count)
        : Float32::Rows(weights, row, count),
          sums(load_some<Units>(weights.sums + row, count)),
          scales(load_some<Floats>(weights.scales + row, count)) {}
  };

  static Floats decode(Units sum, const Rows& rows, const Grid& grid) {
    __m512 whole = _mm512_cvtepi32_ps((__m512i)(sum - grid.zero * rows.sums));  // as inputs were codes - zero
    return (Floats)whole * (rows.scales * grid.scale) + rows.bias;
  }
};
#endif

// -------------------------------------------------------------------------------------------- one tile of weights

struct Tile {
  const uint32_t* values;
  const uint8_t* columns;
  const uint8_t* rows;
  const uint8_t* counts;
};

inline Tile tile_of(const Weights& weights, int64_t index) {
  int64_t start = weights.starts[index];
  return {weights.values + start, weights.columns + start, weights.rows + index * ROWS, weights.counts + index * ROWS};
}

// inputs [PANEL][TOKENS] to sums [ROWS][TOKENS], which are overwritten (first) or added to.
template <class Kernel, int TOKENS>
void multiply_many(Tile tile, const uint32_t* inputs, uint32_t* sums, bool first) {
  constexpr int N = TOKENS / L;      // vectors of a row
  constexpr int U = N == 1 ? 2 : 1;  // sums of each, as a single one would wait for the product before
  for (int slice = 0; slice < ROWS; slice += LANES) {
    int longest = tile.counts[slice];
    if (!longest && !first) return;  // all others are empty
    for (int lane = 0; lane < LANES; lane++) {
      uint32_t* to = sums + (int64_t)tile.rows[slice + lane] * TOKENS;
      Units sum[U][N]{};
      if (!first)
        for (int n = 0; n < N; n++) sum[0][n] = load<Units>(to + n * L);
      // of the next sixteen rows, and of the next panel
      __builtin_prefetch(tile.values + (longest + 2 * lane) * LANES);
      __builtin_prefetch(tile.values + (longest + 2 * lane + 1) * LANES);
      __builtin_prefetch(tile.columns + (longest + 2 * lane) * LANES);
      __builtin_prefetch(inputs + PANEL * TOKENS + (slice + lane) * (PANEL * TOKENS / ROWS), 0, 2);
      const uint32_t* value = tile.values + lane;
      const uint8_t* column = tile.columns + lane;
      const uint32_t* end = value + tile.counts[slice + lane] * LANES;
      for (; value + (U - 1) * LANES < end; value += U * LANES, column += U * LANES)
#pragma GCC unroll 2
        for (int u = 0; u < U; u++) {
          const uint32_t* from = inputs + (uint32_t)column[u * LANES] * TOKENS;
          Units weight = Units{} + value[u * LANES];
#pragma GCC unroll 16
          for (int n = 0; n < N; n++) sum[u][n] = Kernel::multiply(sum[u][n], load<Units>(from + n * L), weight);
        }
      if (U > 1 && value < end) {  // a last one
        const uint32_t* from = inputs + (uint32_t)*column * TOKENS;
        Units weight = Units{} + *value;
        for (int n = 0; n < N; n++) sum[1][n] = Kernel::multiply(sum[1][n], load<Units>(from + n * L), weight);
      }
#pragma GCC unroll 16
      for (int n = 0; n < N; n++) store(to + n * L, U > 1 ? Kernel::add(sum[0][n], sum[1][n]) : sum[0][n]);
    }
    tile.values += longest * LANES;
    tile.columns += longest * LANES;
  }
}

// inputs [PANEL] of one token to sums [ROWS], which are added to.
template <class Kernel>
void multiply_one(Tile tile, const uint32_t* inputs, uint32_t* sums) {
#if WIDTH == 64
  __m512i known[PANEL / L];
  for (int i = 0; i < PANEL / L; i++) known[i] = load<__m512i>(inputs + i * L);
#endif
  for (int slice = 0; slice < ROWS; slice += LANES) {
    int longest = tile.counts[slice];
    if (!longest) break;
    constexpr int N = LANES / L;
    Units sum[N]{};
    for (int k = 0; k < longest * LANES; k += LANES) {
#if WIDTH == 64
      __m512i column = _mm512_cvtepu8_epi32(load<__m128i>(tile.columns + k));
      __m512i input = _mm512_permutex2var_epi32(known[0], column, known[1]);
#pragma GCC unroll 8
      for (int i = 2; i < PANEL / L; i += 2)
        input = _mm512_mask_blend_epi32(_mm512_cmpge_epu32_mask(column, _mm512_set1_epi32(i * L)), input,
                                        _mm512_permutex2var_epi32(known[i], column, known[i + 1]));
      sum[0] = Kernel::multiply(sum[0], (Units)input, load<Units>(tile.values + k));
#else
      uint32_t input[LANES];
      for (int lane = 0; lane < LANES; lane++) input[lane] = inputs[tile.columns[k + lane]];
      for (int n = 0; n < N; n++)
        sum[n] = Kernel::multiply(sum[n], load<Units>(input + n * L), load<Units>(tile.values + k + n * L));
#endif
    }
    uint32_t found[LANES];
    std::memcpy(found, sum, sizeof(found));
    for (int lane = 0; lane < LANES; lane++) Kernel::add(sums + tile.rows[slice + lane], found[lane]);
    tile.values += longest * LANES;
    tile.columns += longest * LANES;
  }
}

// ------------------------------------------------------------------------------------------------ a whole layer

// Tokens that go through the weights together.
struct Block {
  int64_t token;
  int count;         // of tokens
  int width;         // a transposed block has so many; 0 where they are few and lie as they came
  uint32_t* inputs;  // [columns][width], or [count][columns]
};

inline Block block_of(int64_t token, int64_t left) {
  int width = left > 32 + FEW ? MOST : left > 16 ? 32 : left > FEW ? 16 : 0;
  return {token, (int)std::min<int64_t>(left, width ? width : FEW), width, nullptr};
}

template <class Kernel>
struct Product {
  typedef typename Kernel::Number Number;

  const Weights& weights;
  const Number* inputs;
  Number* outputs;
  int64_t tokens;
  int64_t panels = divide_up(divide_up(weights.in_features, Kernel::features), PANEL);
  int64_t row_blocks = divide_up(weights.out_features, ROWS);
  int64_t columns = panels * PANEL;

  // A part of the inputs of a block: tokens from `first`, at most LANES.
  void prepare(const Block& block, int first, uint32_t* scratch, Grid* grids) const {
    int count = std::clamp(block.count - first, 0, LANES);
    int64_t token = block.token + first, done = 0;
    if (Kernel::as_they_are && count == LANES && block.width) {
      done = weights.in_features / Kernel::features / L * L;
      const char* rows = (const char*)(inputs + token * weights.in_features);
      turn(rows, weights.in_features * sizeof(Number), 0, done, block, first);
    }
    if (done == columns) return;
    uint32_t* rows = block.width ? scratch : block.inputs;
    for (int i = 0; i < count; i++) {
      std::memset(rows + (i + 1) * columns - PANEL, 0, 4 * PANEL);
      const Number* from = inputs + (token + i) * weights.in_features;
      Kernel::encode(from, weights.in_features, rows + i * columns, grids[token + i]);
    }
    if (!block.width) return;
    for (int i = count; i < LANES; i++) std::memset(rows + i * columns, 0, 4 * columns);
    turn((const char*)rows, 4 * columns, done, columns, block, first);
  }

  // LANES rows, so many bytes apart, become columns of a block, beside `first` others: units from `start` to `end`.
  static void turn(const char* rows, int64_t bytes, int64_t start, int64_t end, const Block& block, int first) {
    for (int64_t column = start; column < end; column += L)
      for (int i = 0; i < LANES; i += L) {
        Units square[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; j++) square[j] = load<Units>(rows + (i + j) * bytes + 4 * column);
        transpose(square);
#pragma GCC unroll 16
        for (int j = 0; j < L; j++) store(block.inputs + (column + j) * block.width + first + i, square[j]);
      }
  }

  // The outputs of a block of tokens and a block of rows.
  void multiply(const Block& block, int64_t row_block, uint32_t* sums, const Grid* grids) const {
    int64_t row = row_block * ROWS, count = std::min<int64_t>(ROWS, weights.out_features - row);
    if (!block.width) std::memset(sums, 0, 4 * ROWS * block.count);
    for (int64_t panel = 0; panel < panels; panel++) {
      Tile tile = tile_of(weights, row_block * panels + panel);
      const uint32_t* from = block.inputs + panel * PANEL * std::max(1, block.width);
      switch (block.width) {
        case 0:
          for (int i = 0; i < block.count; i++) multiply_one<Kernel>(tile, from + i * columns, sums + i * ROWS);
          break;
        case 16: multiply_many<Kernel, 16>(tile, from, sums, !panel); break;
        case 32: multiply_many<Kernel, 32>(tile, from, sums, !panel); break;
        default: multiply_many<Kernel, MOST>(tile, from, sums, !panel);
      }
    }
    finish(block, row, count, sums, grids);
  }

  // Outputs of rows from `row` on.
  void finish(const Block& block, int64_t row, int64_t count, const uint32_t* sums, const Grid* grids) const {
    typedef typename Kernel::Rows Rows;
    Number* to = outputs + block.token * weights.out_features + row;
    grids += block.token;
    if (!block.width) {
      for (int i = 0; i < block.count; i++, to += weights.out_features)
        for (int64_t at = 0; at < count; at += L) {
          Rows rows(weights, row + at, count - at);
          store_some(to + at, Kernel::decode(load<Units>(sums + i * ROWS + at), rows, grids[i]), count - at);
        }
      return;
    }
    for (int i = 0; i < block.count; i += L) {
      alignas(64) Number found[L][ROWS];  // so that what belongs to a token is written at once
      for (int64_t at = 0; at < count; at += L) {
        Rows rows(weights, row + at, count - at);
        Units square[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; j++) square[j] = load<Units>(sums + (at + j) * block.width + i);
        transpose(square);
#pragma GCC unroll 16
        for (int j = 0; j < L; j++) {
          const Grid& grid = grids[std::min(i + j, block.count - 1)];
          store_some(found[j] + at, Kernel::decode(square[j], rows, grid), L);
        }
      }
      for (int j = 0; j < std::min(L, block.count - i); j++, to += weights.out_features)
        std::memcpy(to, found[j], sizeof(Number) * count);
    }
  }

  // False if there is no memory.
  bool run(int threads) const {
    if (weights.starts[row_blocks * panels] * divide_up(tokens, 16) < SMALL) threads = 1;
    int64_t chunk = std::min(tokens, CHUNK), scratch = std::max<int64_t>(LANES * columns, MOST * ROWS);
    int64_t padded = divide_up(chunk, MOST) * MOST;
    int64_t bytes = 4 * (padded * columns + threads * scratch);
    std::unique_ptr<uint32_t, decltype(&std::free)> memory((uint32_t*)std::aligned_alloc(64, bytes), std::free);
    std::unique_ptr<Grid[]> grids(new (std::nothrow) Grid[tokens]);
    if (!memory || !grids) return false;
    for (int64_t start = 0; start < tokens; start += chunk) {
      Block blocks[CHUNK / MOST + 1];
      int64_t count = 0, end = std::min(tokens, start + chunk);
      uint32_t* next = memory.get() + threads * scratch;
      for (int64_t token = start; token < end; token += blocks[count++].count) {
        Block block = block_of(token, end - token);
        block.inputs = next;
        next += columns * (block.width ? block.width : block.count);
        blocks[count] = block;
      }
      bool evenly = count % threads == 0 && blocks[count - 1].width == blocks[0].width;
#pragma omp parallel num_threads(threads) if (threads > 1)
      {
        uint32_t* own = memory.get();
#ifdef _OPENMP
        own += omp_get_thread_num() * scratch;
#endif
        constexpr int PARTS = MOST / LANES;
        auto prepare_part = [&](int64_t i) {
          const Block& block = blocks[i / PARTS];
          int first = i % PARTS * LANES;
          if (first < std::max(block.width, 1)) prepare(block, first, own, grids.get());
        };
        auto multiply_part = [&](int64_t i) { multiply(blocks[i / row_blocks], i % row_blocks, own, grids.get()); };
        if (evenly) {  // so that no thread waits for another, nor reads what another has just written
#pragma omp for schedule(static) nowait
          for (int64_t block = 0; block < count; block++) {
            for (int64_t i = 0; i < PARTS; i++) prepare_part(block * PARTS + i);
            for (int64_t i = 0; i < row_blocks; i++) multiply_part(block * row_blocks + i);
          }
        } else {
#pragma omp for schedule(dynamic)
          for (int64_t i = 0; i < count * PARTS; i++) prepare_part(i);
          // rows may hold very different numbers of weights, so who is done takes the next ones
#pragma omp for schedule(dynamic) nowait
          for (int64_t i = 0; i < count * row_blocks; i++) multiply_part(i);
        }
      }
    }
    return true;
  }
};

template <class Kernel>
int run(const Weights* weights, const void* inputs, void* outputs, int64_t tokens, int threads) {
  typedef typename Kernel::Number Number;
  return Product<Kernel>{*weights, (const Number*)inputs, (Number*)outputs, tokens}.run(threads);
}

}  // namespace

extern "C" {

// What the Python code has to agree with: the version of this interface, ROWS, PANEL, LANES.
int64_t sparsehooks_layout[4] = {1, ROWS, PANEL, LANES};

// inputs (tokens, in_features) to outputs (tokens, out_features), both contiguous; 0 if there is no memory. The name
// says what is multiplied, and of which dtype inputs and outputs are.
#define DEFINE(NAME, KERNEL)                                                                                          \
  int sparsehooks_##NAME(const Weights* weights, const void* inputs, void* outputs, int64_t tokens, int threads) {    \
    return run<KERNEL>(weights, inputs, outputs, tokens, threads);                                                    \
  }

DEFINE(float32_float32, Float32)
#if defined(__AVX512BF16__)
DEFINE(bfloat16_float32, BFloat16Pairs)
DEFINE(bfloat16_bfloat16, BFloat16Throughout)
#endif
#if defined(__AVX512VNNI__)
DEFINE(int8_float32, Int8Quads)
#endif
}
