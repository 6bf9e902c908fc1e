// Where a cached value lies. A block holds 64 tokens of every kv head; per head, K and V each are one run of memory:
//   int8   quads of the summed axis, those of 16 columns side by side, so that what is seen of a block is its beginning:
//          K [64 / 16][head_dim / 4][16 tokens][4]   V [64 / 4][width][4]
//   float  K [head_dim][64 tokens]                   V [64 tokens][width]
// width is head_dim rounded up to 16. Scales are planes [block][kv head][64] float32 of their own (int8 only).
#pragma once

#include "common.h"

namespace octavo {

constexpr int kBlock = 64;
constexpr int kTile = 128;
constexpr int kTilesPerSegment = 2;
constexpr int kMaxHeadDim = 256;

enum CacheType : int64_t { kInt8 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct CacheView {
  char* k;
  char* v;
  float* k_scales;
  float* v_scales;
  int64_t kv_heads;
  int64_t head_dim;
  CacheType type;

  int64_t width() const { return (head_dim + kLanes - 1) / kLanes * kLanes; }
  int64_t item() const { return type == kInt8 ? 1 : type == kFloat32 ? 4 : 2; }
  // int8: bytes from a panel of 16 columns to the next, and from a quad to the next.
  int64_t k_panel() const { return kPanel * head_dim; }
  int64_t v_quad() const { return width() * kQuad; }
  static constexpr int64_t kVPanel = kPanel * kQuad, kKQuad = kPanel * kQuad;

  char* k_block(int64_t block, int64_t head) const {
    return k + (block * kv_heads + head) * kBlock * head_dim * item();
  }
  char* v_block(int64_t block, int64_t head) const { return v + (block * kv_heads + head) * kBlock * width() * item(); }
  float* k_scale(int64_t block, int64_t head) const { return k_scales + (block * kv_heads + head) * kBlock; }
  float* v_scale(int64_t block, int64_t head) const { return v_scales + (block * kv_heads + head) * kBlock; }
};

// bfloat16 and float16 as stored, and their conversions (round to nearest even).
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

OCTAVO_INLINE float narrow(float x, float*) { return x; }

OCTAVO_INLINE BFloat16 narrow(float x, BFloat16*) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

OCTAVO_INLINE Float16 narrow(float x, Float16*) {
  return {static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0))};
}

// One register of floats: inner loops use it, since the compiler would move a pair of them through memory.
#ifdef __AVX512F__
typedef f32x16 Floats;
OCTAVO_INLINE Floats fused(Floats a, Floats b, Floats c) { return fma(a, b, c); }
OCTAVO_INLINE Floats widen(const Float16* p) {
  return reinterpret_cast<Floats>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
OCTAVO_INLINE Floats widen(const BFloat16* p) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Floats>(_mm512_maskz_slli_epi32(0xffff, wide, 16));
}
#else
typedef f32x8 Floats;
OCTAVO_INLINE Floats fused(Floats a, Floats b, Floats c) {
  return reinterpret_cast<Floats>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
}
OCTAVO_INLINE Floats widen(const Float16* p) {
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
OCTAVO_INLINE Floats widen(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Floats>(_mm256_slli_epi32(wide, 16));
}
#endif

constexpr int kFloats = static_cast<int>(sizeof(Floats) / sizeof(float));

OCTAVO_INLINE Floats widen(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

}  // namespace octavo
