// Products with float weights [N, K], read where they lie. Lane j of an output adds the inputs k = j mod 16 in ascending order with
// fused multiply-adds, then the lanes are added in a fixed tree: neither the number of rows nor a tile's shape changes a bit.
#include <algorithm>

#include "common.h"

namespace octavo {
namespace {

struct Float32 {
  using Element = float;
  static OCTAVO_INLINE f32x16 load16(const float* p) { return load(p); }
};

#ifdef __AVX512F__
OCTAVO_INLINE f32x16 from_halves(__m256i raw) { return reinterpret_cast<f32x16>(_mm512_cvtph_ps(raw)); }
OCTAVO_INLINE i32x16 widen(__m256i raw) { return reinterpret_cast<i32x16>(_mm512_cvtepu16_epi32(raw)); }
#else
OCTAVO_INLINE f32x16 from_halves(__m256i raw) {
  const __m256 parts[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(raw)), _mm256_cvtph_ps(_mm256_extracti128_si256(raw, 1))};
  f32x16 v;
  std::memcpy(&v, parts, sizeof(v));
  return v;
}
OCTAVO_INLINE i32x16 widen(__m256i raw) {
  const __m256i parts[2] = {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(raw)),
                            _mm256_cvtepu16_epi32(_mm256_extracti128_si256(raw, 1))};
  i32x16 v;
  std::memcpy(&v, parts, sizeof(v));
  return v;
}
#endif

struct Float16 {
  using Element = uint16_t;
  static OCTAVO_INLINE f32x16 load16(const uint16_t* p) {
    return from_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};

struct BFloat16 {
  using Element = uint16_t;
  static OCTAVO_INLINE f32x16 load16(const uint16_t* p) {
    return reinterpret_cast<f32x16>(widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
  }
};

template <typename W>
OCTAVO_INLINE f32x16 load_tail(const typename W::Element* p, int64_t count) {
  typename W::Element padded[kLanes] = {};
  std::memcpy(padded, p, sizeof(padded[0]) * static_cast<size_t>(count));
  return W::load16(padded);
}

struct FloatProduct {
  const float* x;  // [rows][inputs]
  const void* w;   // [outputs][inputs]
  const float* bias;
  const float* residual;
  float* y;  // [rows][outputs]
  int64_t rows, inputs, outputs;
};

// Rows and outputs of a tile: as many accumulators as the registers hold.
#ifdef __AVX512F__
constexpr int kRows = 4, kOutputs = 6;
#else
constexpr int kRows = 2, kOutputs = 2;
#endif

// Outputs of a task, a multiple of kOutputs.
constexpr int64_t kTask = 48;

template <int R, int N>
OCTAVO_INLINE void finish(const FloatProduct& p, int64_t row, int64_t output, const f32x16 (&acc)[R][N]) {
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) {
      const int64_t at = (row + r) * p.outputs + output + n;
      float y = sum_lanes(acc[r][n]);
      if (p.bias != nullptr) y = y + p.bias[output + n];
      if (p.residual != nullptr) y = y + p.residual[at];
      p.y[at] = y;
    }
}

// Fetch: read ahead the weights of the next tile, on the first pass over these.
template <typename W, int R, int N, bool Fetch>
void float_tile(const FloatProduct& p, int64_t row, int64_t output) {
  const float* x = p.x + row * p.inputs;
  const auto* w = static_cast<const typename W::Element*>(p.w) + output * p.inputs;
  f32x16 acc[R][N] = {};
  const int64_t whole = p.inputs / kLanes * kLanes, rest = p.inputs - whole;
  for (int64_t k = 0; k < whole; k += kLanes) {
    f32x16 a[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) a[r] = load(x + r * p.inputs + k);
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
      const f32x16 b = W::load16(w + n * p.inputs + k);
      if constexpr (Fetch) __builtin_prefetch(w + (N + n) * p.inputs + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r][n] = fma(a[r], b, acc[r][n]);
    }
  }
  for (int n = 0; n < N && rest > 0; ++n) {
    const f32x16 b = load_tail<W>(w + n * p.inputs + whole, rest);
    for (int r = 0; r < R; ++r) acc[r][n] = fma(load_part(x + r * p.inputs + whole, rest), b, acc[r][n]);
  }
  finish(p, row, output, acc);
}

// Rows [first, last) times N outputs.
template <typename W, int N>
void float_rows(const FloatProduct& p, int64_t first, int64_t last, int64_t output) {
  for (int64_t row = first; row < last; row += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, last - row);
    if (rows == 1) float_tile<W, 1, N, true>(p, row, output);
    else if (rows == 2) float_tile<W, 2, N, true>(p, row, output);
    else if (rows == 3) float_tile<W, 3, N, true>(p, row, output);
    else if (row == first) float_tile<W, 4, N, true>(p, row, output);
    else float_tile<W, 4, N, false>(p, row, output);
  }
}

template <typename W>
void float_product(Pool* pool, const FloatProduct& p) {
  const int64_t columns = num_tiles(p.outputs, kTask);
  const int64_t fits = std::max<int64_t>(16, (1 << 17) / p.inputs);  // half a megabyte of rows
  parallel_for(pool, columns * num_tiles(p.rows, fits), [&](int64_t task, int) {
    const int64_t first = task / columns * fits, last = std::min(p.rows, first + fits);
    const int64_t end = std::min(p.outputs, task % columns * kTask + kTask);
    int64_t output = task % columns * kTask;
    for (; output + kOutputs <= end; output += kOutputs) float_rows<W, kOutputs>(p, first, last, output);
    for (; output < end; ++output) float_rows<W, 1>(p, first, last, output);
  });
}

}  // namespace
}  // namespace octavo

// y [rows, outputs] = x · Wᵀ (+ bias) (+ residual). type 0: float32 weights, 1: float16, 2: bfloat16.
OCTAVO_API void octavo_linear_float(octavo::Pool* pool, const float* x, const void* w, int64_t type, int64_t rows, int64_t inputs,
                                    int64_t outputs, const float* bias, const float* residual, float* y) {
  using namespace octavo;
  const FloatProduct p{x, w, bias, residual, y, rows, inputs, outputs};
  if (type == 0) float_product<Float32>(pool, p);
  else if (type == 1) float_product<Float16>(pool, p);
  else float_product<BFloat16>(pool, p);
}
