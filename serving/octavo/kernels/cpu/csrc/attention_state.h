// What attention keeps per query row while it walks over tiles: the open segment's partial and the fold of the closed
// ones. A partial is (maximum m, sum l, output o); `combine` is the only way two of them meet, so split and unsplit
// walks give equal bits.
#pragma once

#include <algorithm>
#include <cfloat>

#include "attention_dots.h"
#include "attention_layout.h"

namespace octavo {

struct Sum {
  float m;
  float l;  // negative: no token seen yet
};

constexpr Sum kNothing = {0.0f, -1.0f};

OCTAVO_INLINE bool is_empty(const Sum& sum) { return sum.l < 0.0f; }

// (a, oa) joined with the later (b, ob), into a.
OCTAVO_INLINE void combine(Sum& a, float* oa, const Sum& b, const float* ob, int64_t width) {
  if (is_empty(a)) {
    a = b;
    std::memcpy(oa, ob, sizeof(float) * static_cast<size_t>(width));
    return;
  }
  const float m = a.m > b.m ? a.m : b.m;
  f32x16 gaps = {};
  gaps[0] = a.m - m;
  gaps[1] = b.m - m;
  const f32x16 factors = exp_below(gaps);
  const float f1 = factors[0], f2 = factors[1];
  a = {m, a.l * f1 + b.l * f2};
  for (int64_t d = 0; d < width; d += kLanes) store(oa + d, load(oa + d) * f1 + load(ob + d) * f2);
}

// The tokens of one tile as its one or two blocks, and what is to be fetched meanwhile: keys and values that come later, and how
// many of their tokens somebody sees.
struct TileView {
  const char* k[2];
  const char* v[2];
  const char* next_k[2];
  const char* next_v[2];
  int64_t next_k_tokens;
  int64_t next_v_tokens;
  const float* k_scale[2];
  const float* v_scale[2];
};

// A query row's visible tokens within a tile: [low, high).
struct Span {
  int low;
  int high;
};

// The query rows [first, last) of one kv head, and the tile that all of them see something of.
struct HeadTile {
  int64_t first;
  int64_t last;
  TileView view;
};

constexpr int kUnitRows =
    128;  // most query rows (tokens times heads of a kv head) that one task takes through the cache

// Memory of one task; lives in the thread's scratch.
struct RowState {
  int64_t position[kUnitRows];
  Span span[kUnitRows];
  Sum segment[kUnitRows];
  Sum total[kUnitRows];
  alignas(64) float segment_out[kUnitRows * kMaxHeadDim];  // [rows][width]
  alignas(64) float total_out[kUnitRows * kMaxHeadDim];
  alignas(64) float query[kUnitRows * kMaxHeadDim];  // [rows][head_dim] float32, or int16 q15 in the first half
  float query_scale[kUnitRows];                      // int8 cache: qs · softmax scale; float cache: softmax scale
};

// For tiles that need no registers of their own.
struct NoRegisters {
  template <typename State>
  NoRegisters(State&, int64_t) {}
};

// f(row, std::integral_constant<int, count>) for the rows of `of`, as many at once as kRows.
template <int kRows, typename F>
void for_row_blocks(const HeadTile& of, F&& f) {
  for (int64_t row = of.first; row < of.last; row += kRows)
    with_constant<kRows>(std::min<int64_t>(kRows, of.last - row), [&](auto count) { f(row, count); });
}

// e, l and m of the scores s[first, last) of a tile's eight vectors (already -inf where hidden). Σ e runs in 16 lanes over
// the vectors, then over the lanes; vectors that are left out would add zeros.
OCTAVO_INLINE Sum softmax_vectors(f32x16* s, int first, int last) {
  f32x16 top = s[first];
  for (int i = first + 1; i < last; ++i) top = max(top, s[i]);
  const float m = max_lanes(top);
  f32x16 total = {};
  for (int i = first; i < last; ++i) {
    s[i] = exp_below(s[i] - m);
    total = i == first ? s[i] : total + s[i];
  }
  return {m, sum_lanes(total)};
}

OCTAVO_INLINE Sum softmax_tile(f32x16 (&s)[kTile / kLanes]) { return softmax_vectors(s, 0, kTile / kLanes); }

// Vector i of a tile with `other` in the lanes outside the span.
OCTAVO_INLINE f32x16 keep_inside(f32x16 v, Span span, int i, float other) {
  const int low = span.low - i * kLanes, high = span.high - i * kLanes;
#ifdef __AVX512F__
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __mmask16 mask =
      _mm512_cmpge_epi32_mask(lane, _mm512_set1_epi32(low)) & _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(high));
  return reinterpret_cast<f32x16>(_mm512_mask_blend_ps(mask, _mm512_set1_ps(other), reinterpret_cast<__m512>(v)));
#else
  __m256 halves[2];
  std::memcpy(halves, &v, sizeof(v));
  for (int half = 0; half < 2; ++half) {
    const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(half * 8));
    const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low), lane),
                                            _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(high - 1)));
    halves[half] = _mm256_blendv_ps(halves[half], _mm256_set1_ps(other), _mm256_castsi256_ps(outside));
  }
  std::memcpy(&v, halves, sizeof(v));
  return v;
#endif
}

// limit / a for quantising, finite, and 0 for a vector of zeros.
OCTAVO_INLINE float inverse_of(float a, float limit) { return a == 0.0f ? 0.0f : std::min(limit / a, FLT_MAX); }

OCTAVO_INLINE int64_t lanes_left(int64_t count) { return std::min<int64_t>(kLanes, count); }

OCTAVO_INLINE bool is_whole(Span span) { return span.low == 0 && span.high == kTile; }

}  // namespace octavo
