// Sixteen-lane vectors and the few functions of them that every kernel needs. The same source makes the AVX2 library (two
// registers a vector) and the AVX-512 library (one); lanes, orders and roundings are equal, so both give equal bits.
// Compiled without contraction: a multiplication and an addition fuse only where `fma` says so.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "threads.h"

#define OCTAVO_API extern "C" __attribute__((visibility("default")))
#define OCTAVO_INLINE inline __attribute__((always_inline))

namespace octavo {

constexpr int kLanes = 16;

// Columns of int8 lie in panels of 16 whose quads of the summed axis are rows of 64 bytes, [16 columns][4]: what one instruction
// multiplies with four inputs; sixteen rows are a tile. AVX2 has the columns of its weights in halves of 8.
constexpr int kPanel = 16;
constexpr int kQuad = 4;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));

OCTAVO_INLINE f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

OCTAVO_INLINE i32x16 load(const int32_t* p) {
  i32x16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

OCTAVO_INLINE void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof(v)); }
OCTAVO_INLINE void store(int32_t* p, i32x16 v) { std::memcpy(p, &v, sizeof(v)); }

// The first `count` (0 to 16) lanes; the others are zero.
OCTAVO_INLINE f32x16 load_part(const float* p, int64_t count) {
#ifdef __AVX512F__
  return reinterpret_cast<f32x16>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
#else
  f32x16 v = {};
  if (count == kLanes) return load(p);  // a copy of a size that is not known is a call
  std::memcpy(&v, p, sizeof(float) * static_cast<size_t>(count));
  return v;
#endif
}

OCTAVO_INLINE void store_part(float* p, f32x16 v, int64_t count) {
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
#else
  if (count == kLanes) return store(p, v);
  std::memcpy(p, &v, sizeof(float) * static_cast<size_t>(count));
#endif
}

OCTAVO_INLINE f32x16 splat(float x) { return f32x16{} + x; }
OCTAVO_INLINE i32x16 splat(int32_t x) { return i32x16{} + x; }

OCTAVO_INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }

// a > b ? a : b and a < b ? a : b. Spelled out because the compiler takes 64-byte comparisons apart into scalars for AVX2 and
// into a comparison and a choice for AVX-512. The masked form, all lanes on, spares false warnings of the compiler.
#ifdef __AVX512F__
OCTAVO_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return reinterpret_cast<f32x16>(_mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
OCTAVO_INLINE f32x16 min(f32x16 a, f32x16 b) {
  return reinterpret_cast<f32x16>(_mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}
#else
template <typename F>
OCTAVO_INLINE f32x16 by_halves(f32x16 a, f32x16 b, F&& f) {
  __m256 x[2], y[2];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  const __m256 r[2] = {f(x[0], y[0]), f(x[1], y[1])};
  f32x16 out;
  std::memcpy(&out, r, 64);
  return out;
}
OCTAVO_INLINE f32x16 max(f32x16 a, f32x16 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); });
}
OCTAVO_INLINE f32x16 min(f32x16 a, f32x16 b) {
  return by_halves(a, b, [](__m256 x, __m256 y) { return _mm256_min_ps(x, y); });
}
#endif

OCTAVO_INLINE f32x16 abs(f32x16 v) {
  i32x16 bits = reinterpret_cast<i32x16>(v) & 0x7fffffff;
  return reinterpret_cast<f32x16>(bits);
}

// Halves of a vector as the register type that both instruction sets have.
struct Halves {
  __m256 low, high;
};

OCTAVO_INLINE Halves halves(f32x16 v) {
  Halves h;
  std::memcpy(&h, &v, sizeof(h));
  return h;
}

// a · b + c with one rounding.
OCTAVO_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#ifdef __AVX512F__
  return reinterpret_cast<f32x16>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#else
  const Halves x = halves(a), y = halves(b), z = halves(c);
  const Halves r = {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
  f32x16 out;
  std::memcpy(&out, &r, 64);
  return out;
#endif
}

// Round half to even, |v| < 2^22.
OCTAVO_INLINE f32x16 rint_small(f32x16 v) { return (v + 12582912.0f) - 12582912.0f; }

// The same as int32.
OCTAVO_INLINE i32x16 rint_int(f32x16 v) { return reinterpret_cast<i32x16>(v + 12582912.0f) - 0x4b400000; }

// Sum of the lanes in a fixed order: halves, quarters, pairs, always lane i and lane i + width.
OCTAVO_INLINE float sum_lanes(f32x16 v) {
  const Halves h = halves(v);
  const __m256 eight = _mm256_add_ps(h.low, h.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

OCTAVO_INLINE float max_lanes(f32x16 v) {
  const Halves h = halves(v);
  const __m256 eight = _mm256_max_ps(h.low, h.high);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// e^x for x in [-110, 90], at most 2 ulp off.
OCTAVO_INLINE f32x16 exp_inside(f32x16 x) {
  const f32x16 n = rint_small(x * 1.44269504088896341f);
  f32x16 r = fma(n, splat(-0.693145751953125f), x);   // ln 2 in two parts: n times the first is exact
  r = fma(n, splat(-1.42860682030941723212e-6f), r);  // r in [-0.3466, 0.3466]
  f32x16 p = splat(1.0f / 5040.0f);
  p = fma(p, r, splat(1.0f / 720.0f));
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  p = fma(p * r, r, r) + 1.0f;
#ifdef __AVX512F__
  // Rounds once, as the two factors below do.
  return reinterpret_cast<f32x16>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  const i32x16 whole = rint_int(n);
  const i32x16 half = whole >> 1;  // two factors, since 2^n alone leaves the range of normal numbers
  const f32x16 low = reinterpret_cast<f32x16>((half + 127) << 23);
  const f32x16 high = reinterpret_cast<f32x16>((whole - half + 127) << 23);
  return (p * low) * high;
#endif
}

// e^x. Underflows through denormals to 0 (also for -inf) and overflows to inf.
OCTAVO_INLINE f32x16 exp(f32x16 x) { return exp_inside(min(max(x, splat(-110.0f)), splat(90.0f))); }

// The same for x ≤ 0.
OCTAVO_INLINE f32x16 exp_below(f32x16 x) { return exp_inside(max(x, splat(-110.0f))); }

OCTAVO_INLINE f32x16 silu(f32x16 v) { return v / (exp(-v) + 1.0f); }

// Splits [0, total) into tiles of `tile`; the last may be shorter.
OCTAVO_INLINE int64_t num_tiles(int64_t total, int64_t tile) { return (total + tile - 1) / tile; }

}  // namespace octavo
