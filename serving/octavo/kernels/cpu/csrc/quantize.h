// Quantises one row of floats into the bytes that the int8 product reads: u = q + 128, padded with 128 to a multiple of 64.
// A two-limb row is two byte rows, hi and lo. Every kernel that ends in a quantisation ends here.
#pragma once

#include <cfloat>

#include "gemm.h"

namespace octavo {

constexpr float kOneLimb = 127.0f;
constexpr float kTwoLimbs = 32512.0f;

struct Format {
  int64_t limbs;       // 0: float32
  float static_scale;  // 0: one scale a row
  int64_t zero_point;
};

OCTAVO_INLINE float row_absmax(const float* x, int64_t width) {
  f32x16 best = {};
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) best = max(abs(load(x + k)), best);
  if (whole < width) best = max(abs(load_part(x + whole, width - whole)), best);
  return max_lanes(best);
}

// range / absmax, finite, and 0 for a row of zeros.
OCTAVO_INLINE float inverse_scale(float absmax, float range) {
  if (absmax == 0.0f) return 0.0f;
  const float inverse = range / absmax;
  return inverse > FLT_MAX ? FLT_MAX : inverse;
}

OCTAVO_INLINE void store_bytes(uint8_t* p, i32x16 v) {
#ifdef __AVX512F__
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#else
  __m256i halves[2];
  std::memcpy(halves, &v, sizeof(v));
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(halves[0], halves[1]), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
#endif
}

// rint(x · inverse) held in [low, high].
OCTAVO_INLINE i32x16 rounded(f32x16 x, float inverse, float low, float high) {
  return rint_int(min(max(x * inverse, splat(low)), splat(high)));
}

// f(k, lanes) -> void for every 16 inputs of a padded row; x is zero beyond the width.
template <typename F>
OCTAVO_INLINE void for_lanes(const float* x, int64_t width, F&& f) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) f(k, load(x + k));
  if (whole < width) f(whole, load_part(x + whole, width - whole));
}

OCTAVO_INLINE void quantize_one_limb(const float* x, int64_t width, float inverse, uint8_t* out) {
  for_lanes(x, width, [&](int64_t k, f32x16 v) { store_bytes(out + k, rounded(v, inverse, -kOneLimb, kOneLimb) + 128); });
}

OCTAVO_INLINE void quantize_two_limbs(const float* x, int64_t width, float inverse, uint8_t* out, int64_t stride) {
  for_lanes(x, width, [&](int64_t k, f32x16 v) {
    const i32x16 q = rounded(v, inverse, -kTwoLimbs, kTwoLimbs);
    const i32x16 high = (q + 128) >> 8;
    store_bytes(out + k, high + 128);
    store_bytes(out + stride + k, q - high * 256 + 128);
  });
}

OCTAVO_INLINE void quantize_static(const float* x, int64_t width, const Format& format, uint8_t* out) {
  const float inverse = 1.0f / format.static_scale;
  const int32_t zero_point = static_cast<int32_t>(format.zero_point);
  for_lanes(x, width, [&](int64_t k, f32x16 v) {
    i32x16 q = rounded(v, inverse, -65536.0f, 65536.0f) + zero_point;
    q = q < -128 ? splat(-128) : q;
    q = q > 127 ? splat(127) : q;
    store_bytes(out + k, q + 128);
  });
}

// Row `x` to out (its first byte row) and scale. `absmax` is used by dynamic formats alone.
OCTAVO_INLINE void quantize_row(const float* x, int64_t width, const Format& format, float absmax, uint8_t* out, float* scale) {
  const int64_t stride = row_stride(width);
  if (format.static_scale != 0.0f) {
    quantize_static(x, width, format, out);
    *scale = format.static_scale;
  } else if (format.limbs == 1) {
    quantize_one_limb(x, width, inverse_scale(absmax, kOneLimb), out);
    *scale = absmax / kOneLimb;
  } else {
    quantize_two_limbs(x, width, inverse_scale(absmax, kTwoLimbs), out, stride);
    *scale = absmax / kTwoLimbs;
  }
  for (int64_t limb = 0; limb < format.limbs; ++limb) std::memset(out + limb * stride + width, 128, stride - width);
}

}  // namespace octavo
