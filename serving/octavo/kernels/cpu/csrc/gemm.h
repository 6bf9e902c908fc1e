// Integer weights as the product reads them, and the innermost tile of the product in both instruction sets.
//
// Packed weights are panels of 16 outputs, quads of 4 inputs in the order of `packed_offset`, N padded to 32 and K to 4 with
// zeros. Activations are rows of bytes u = q + 128 at a stride that is a multiple of 64, padded with 128. The tile computes
// S = sum of u · w exactly; the epilogue takes the 128 and the zero points out with sums of columns and rows.
#pragma once

#include <algorithm>

#include "common.h"

namespace octavo {

constexpr int kMaxRows = 8;  // byte rows of a tile; a two-limb token is two neighbouring rows, hi and lo

// One weight matrix, filled by products.py (Int8Weights there has the same fields).
struct Int8Weights {
  const int8_t* packed;       // [num_panels][num_quads · 64]
  const float* scale;         // [num_groups][num_panels · 16]
  const int32_t* correction;  // [num_groups][num_panels · 16]: (128 + activation zero point) · sum of the group's w
  const int32_t* zero_point;  // of the weights, like scale, or null
  const float* bias;          // [num_panels · 16], or null
  int64_t out_features;
  int64_t in_features;
  int64_t num_groups;
  int64_t limbs;
};

// Panels come in pairs, so that a tile is never narrower than two.
OCTAVO_INLINE int64_t panels_of(int64_t outputs) { return num_tiles(outputs, 2 * kPanel) * 2; }
OCTAVO_INLINE int64_t quads_of(int64_t inputs) { return num_tiles(inputs, kQuad); }
OCTAVO_INLINE int64_t row_stride(int64_t inputs) { return num_tiles(inputs, 64) * 64; }

// What a thread reads from memory after this tile. A tile whose weights pass once fetches `next`, the panels of the thread's next
// task, at its end; one of several tiles over the same weights fetches its share of them, `step` bytes a quad from `next` on.
struct Ahead {
  const int8_t* next;
  int64_t step;
};

#ifdef __AVX512VNNI__

// Activations as the tile reads them: the bytes themselves.
using Element = uint8_t;

// Where the four weights of one output and quad lie in a panel of `quads` quads.
OCTAVO_INLINE int64_t packed_offset(int64_t lane, int64_t quad, int64_t) { return (quad * kPanel + lane) * kQuad; }

OCTAVO_INLINE __m512i splat_quad(const uint8_t* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof(v));
  return _mm512_set1_epi32(v);
}

// S of R rows and C panels over the quads [first, last), to out[R][C · 16].
template <int R, int C, bool kOnce>
OCTAVO_INLINE void int8_tile(const uint8_t* x, int64_t x_stride, const int8_t* w, int64_t quads, int64_t first, int64_t last,
                             const Ahead& ahead, int32_t* out) {
  constexpr int64_t kQuadBytes = kPanel * kQuad;
  // Quads, measured. A row or two leave time for nothing but reading: they fetch twice, from further on into the second cache, but
  // for the beginning of a panel.
  constexpr bool kTwice = kOnce && R <= 2;
  constexpr int64_t kNear = (kTwice ? 1024 : C == 2 ? 4096 : 2048) / kQuadBytes, kFar = 4096 / kQuadBytes;
  i32x16 acc[R][C] = {};  // not __m512i: g++ would copy every sum to another register and back
  const int64_t turn = kOnce ? std::max(first, std::min(last, quads - kNear)) : last;
  for (int64_t quad = first; quad < last;) {
    // Weights that pass once are fetched a little ahead, at the end of a panel from the next one; others long ahead. More than
    // two rows leave the first cache time for little but the rows: then into the second.
    const int64_t stop = quad < turn ? turn : last;
    const int8_t* fetch = kOnce ? (quad < turn ? w + (quad + kNear) * kQuadBytes : ahead.next + (quad + kNear - quads) * kQuadBytes)
                                : ahead.next + quad * ahead.step;
    for (; quad < stop; ++quad) {
      __m512i b[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        b[c] = _mm512_load_si512(w + (c * quads + quad) * kQuadBytes);
        if constexpr (kOnce) __builtin_prefetch(fetch + c * quads * kQuadBytes, 0, kTwice ? 3 : 2);
        if constexpr (kTwice) __builtin_prefetch(fetch + (c * quads + kFar - kNear) * kQuadBytes, 0, 2);
      }
      if constexpr (!kOnce) __builtin_prefetch(fetch, 0, 2);
      fetch += kOnce ? kQuadBytes : ahead.step;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i a = splat_quad(x + r * x_stride + quad * kQuad);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c)
          acc[r][c] = reinterpret_cast<i32x16>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc[r][c]), a, b[c]));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(out + (r * C + c) * kPanel, acc[r][c]);
}

#else

// Without VNNI the bytes are widened to 16 bits first: vpmaddubsw would saturate.
using Element = int16_t;

// Half panels of 8 outputs, so that the registers of a tile read whole cache lines.
OCTAVO_INLINE int64_t packed_offset(int64_t lane, int64_t quad, int64_t quads) {
  return ((lane / 8 * quads + quad) * 8 + lane % 8) * kQuad;
}

OCTAVO_INLINE __m256i load_weights(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}

OCTAVO_INLINE __m256i splat_quad(const int16_t* p) {
  int64_t v;
  std::memcpy(&v, p, sizeof(v));
  return _mm256_set1_epi64x(v);
}

// R rows of half a panel. A register holds four outputs with two partial sums each.
template <int R>
OCTAVO_INLINE void int8_half(const int16_t* x, int64_t x_stride, const int8_t* w, int64_t first, int64_t last, int32_t* out,
                             int64_t out_stride) {
  __m256i acc[R][2];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  for (int64_t quad = first; quad < last; ++quad) {
    const __m256i b0 = load_weights(w + quad * 32), b1 = load_weights(w + quad * 32 + 16);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256i a = splat_quad(x + r * x_stride + quad * kQuad);
      acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(a, b0));
      acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(a, b1));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const __m256i pairs = _mm256_hadd_epi32(acc[r][0], acc[r][1]);  // outputs 0 1 4 5 | 2 3 6 7
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * out_stride), _mm256_permute4x64_epi64(pairs, 0xd8));
  }
}

template <int R, int C, bool kOnce>
OCTAVO_INLINE void int8_tile(const int16_t* x, int64_t x_stride, const int8_t* w, int64_t quads, int64_t first, int64_t last,
                             const Ahead&, int32_t* out) {
  constexpr int kFirst = R < 4 ? R : 4;
  for (int half = 0; half < 2 * C; ++half) {
    const int8_t* part = w + half * quads * 32;
    int32_t* to = out + half * 8;
    int8_half<kFirst>(x, x_stride, part, first, last, to, C * kPanel);
    if constexpr (R > kFirst)
      int8_half<R - kFirst>(x + kFirst * x_stride, x_stride, part, first, last, to + kFirst * C * kPanel, C * kPanel);
  }
}

#endif

}  // namespace octavo
