// What sampling computes over a whole row of logits: maxima, float64 exponentials and their sums, searches by
// threshold.
#pragma once

#include <algorithm>
#include <cmath>

#include "common.h"

namespace octavo {

#ifdef __AVX512F__
typedef __m512d Wide;
constexpr int kWide = 8;
// The masked forms, all lanes on, spare false warnings of the compiler.
OCTAVO_INLINE Wide wide(double x) { return _mm512_set1_pd(x); }
OCTAVO_INLINE Wide wide_load(const float* p) { return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)); }
OCTAVO_INLINE Wide wide_fma(Wide a, Wide b, Wide c) { return _mm512_fmadd_pd(a, b, c); }
// v where x > bound, else 0
OCTAVO_INLINE Wide wide_keep(Wide v, Wide x, Wide bound) {
  return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x, bound, _CMP_GT_OQ), v);
}
// sum + v where x > bound
OCTAVO_INLINE Wide wide_add_above(Wide sum, Wide v, Wide x, Wide bound) {
  return _mm512_mask_add_pd(sum, _mm512_cmp_pd_mask(x, bound, _CMP_GT_OQ), sum, v);
}
// v · 2^n, n given as the low bits of a double with a large exponent
OCTAVO_INLINE Wide wide_scale(Wide v, Wide n) {
  return _mm512_castsi512_pd(
      _mm512_add_epi64(_mm512_castpd_si512(v), _mm512_maskz_slli_epi64(0xff, _mm512_castpd_si512(n), 52)));
}
OCTAVO_INLINE uint32_t lanes_above(const float* p, float bound) {  // lanes i with p[i] >= bound
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(p), _mm512_set1_ps(bound), _CMP_GE_OQ);
}
OCTAVO_INLINE uint32_t lanes_within(const double* p, double low, double high) {  // lanes i with low < p[i] <= high
  const __m512d v = _mm512_loadu_pd(p);
  return _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(v, wide(low), _CMP_GT_OQ), v, wide(high), _CMP_LE_OQ);
}
#else
typedef __m256d Wide;
constexpr int kWide = 4;
OCTAVO_INLINE Wide wide(double x) { return _mm256_set1_pd(x); }
OCTAVO_INLINE Wide wide_load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
OCTAVO_INLINE Wide wide_fma(Wide a, Wide b, Wide c) { return _mm256_fmadd_pd(a, b, c); }
OCTAVO_INLINE Wide wide_keep(Wide v, Wide x, Wide bound) {
  return _mm256_and_pd(v, _mm256_cmp_pd(x, bound, _CMP_GT_OQ));
}
OCTAVO_INLINE Wide wide_add_above(Wide sum, Wide v, Wide x, Wide bound) { return sum + wide_keep(v, x, bound); }
OCTAVO_INLINE Wide wide_scale(Wide v, Wide n) {
  return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(v), _mm256_slli_epi64(_mm256_castpd_si256(n), 52)));
}
OCTAVO_INLINE uint32_t lanes_above(const float* p, float bound) {
  const __m256 b = _mm256_set1_ps(bound);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(p), b, _CMP_GE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(p + 8), b, _CMP_GE_OQ));
  return static_cast<uint32_t>(low | high << 8);
}
OCTAVO_INLINE uint32_t lanes_within(const double* p, double low, double high) {
  const __m256d v = _mm256_loadu_pd(p);
  const __m256d inside = _mm256_and_pd(_mm256_cmp_pd(v, wide(low), _CMP_GT_OQ), _mm256_cmp_pd(v, wide(high), _CMP_LE_OQ));
  return static_cast<uint32_t>(_mm256_movemask_pd(inside));
}
#endif

// e^x for x ≤ 0 to about 1 ulp; 0 below -708.
OCTAVO_INLINE Wide exp_down(Wide x) {
  const Wide shift = wide(6755399441055744.0);  // 1.5 · 2^52: adding it rounds to an integer in the low bits
  const Wide shifted = wide_fma(x, wide(1.4426950408889634074), shift);
  const Wide n = shifted - shift;
  Wide r = wide_fma(n, wide(-6.93147180369123816490e-01), x);
  r = wide_fma(n, wide(-1.90821492927058770002e-10), r);
  Wide p = wide(1.0 / 6227020800.0);
  p = wide_fma(p, r, wide(1.0 / 479001600.0));
  p = wide_fma(p, r, wide(1.0 / 39916800.0));
  p = wide_fma(p, r, wide(1.0 / 3628800.0));
  p = wide_fma(p, r, wide(1.0 / 362880.0));
  p = wide_fma(p, r, wide(1.0 / 40320.0));
  p = wide_fma(p, r, wide(1.0 / 5040.0));
  p = wide_fma(p, r, wide(1.0 / 720.0));
  p = wide_fma(p, r, wide(1.0 / 120.0));
  p = wide_fma(p, r, wide(1.0 / 24.0));
  p = wide_fma(p, r, wide(1.0 / 6.0));
  p = wide_fma(p, r, wide(0.5));
  p = wide_fma(p * r, r, r) + wide(1.0);
  return wide_keep(wide_scale(p, shifted), x, wide(-708.0));
}

// e[i] = exp(z[i] − top), in float64; z need not be padded.
inline void exp_terms(const float* z, int64_t count, float top, double* e) {
  const Wide base = wide(static_cast<double>(top));
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    const Wide v = exp_down(wide_load(z + i) - base);
    std::memcpy(e + i, &v, sizeof(v));
  }
  if (i == count) return;
  float rest[kWide] = {};
  std::memcpy(rest, z + i, sizeof(float) * static_cast<size_t>(count - i));
  const Wide v = exp_down(wide_load(rest) - base);
  std::memcpy(e + i, &v, sizeof(double) * static_cast<size_t>(count - i));
}

constexpr int64_t kChunk = 512;  // terms that are summed together

// Σ e of one chunk, in four vectors of lanes, always the same way.
inline double sum_chunk(const double* e, int64_t count) {
  double padded[kChunk];
  if (count < kChunk) {
    std::fill_n(std::copy_n(e, count, padded), kChunk - count, 0.0);
    e = padded;
  }
  Wide sums[4] = {wide(0.0), wide(0.0), wide(0.0), wide(0.0)};
  for (int64_t i = 0; i < kChunk; i += 4 * kWide) {
    for (int j = 0; j < 4; ++j) {
      Wide v;
      std::memcpy(&v, e + i + j * kWide, sizeof(v));
      sums[j] = sums[j] + v;
    }
  }
  double lanes[kWide], total = 0.0;
  const Wide sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  std::memcpy(lanes, &sum, sizeof(sum));
  for (double lane : lanes) total += lane;
  return total;
}

// Σ exp(z − top) of one chunk.
inline double exp_sum_chunk(const float* z, int64_t count, float top) {
  double e[kChunk];
  exp_terms(z, count, top, e);
  return sum_chunk(e, count);
}

inline double exp_sum(const float* z, int64_t count, float top) {
  double total = 0.0;
  for (int64_t i = 0; i < count; i += kChunk) total += exp_sum_chunk(z + i, std::min(kChunk, count - i), top);
  return total;
}

// The largest logit; NaN is passed over; -inf if there is none.
inline float row_max(const float* z, int64_t count) {
  f32x16 tops[4] = {splat(-INFINITY), splat(-INFINITY), splat(-INFINITY), splat(-INFINITY)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) tops[j] = max(load(z + i + j * kLanes), tops[j]);
  float top = max_lanes(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
  for (; i < count; ++i) top = z[i] > top ? z[i] : top;
  return top;
}

// Calls f(i) for every z[i] >= bound in ascending order; f returns false to stop.
template <typename F>
OCTAVO_INLINE void for_above(const float* z, int64_t count, float bound, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (uint32_t lanes = lanes_above(z + i, bound); lanes != 0; lanes &= lanes - 1)
      if (!f(i + __builtin_ctz(lanes))) return;
  }
  for (; i < count; ++i)
    if (z[i] >= bound && !f(i)) return;
}

}  // namespace octavo
