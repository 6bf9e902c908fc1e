// One tile of attention over an int8 cache, for a few query rows at once.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention_fetch.h"

namespace octavo {

constexpr float kTwoLimbs = 32512.0f;
typedef int16_t i16x16 __attribute__((vector_size(32)));

// The low half of each lane, |v| < 32768.
OCTAVO_INLINE i16x16 to_int16(i32x16 v) {
#ifdef __AVX512F__
  return __builtin_convertvector(v, i16x16);
#else
  __m256i halves[2];
  std::memcpy(halves, &v, sizeof(v));
  return reinterpret_cast<i16x16>(_mm256_permute4x64_epi64(_mm256_packs_epi32(halves[0], halves[1]), 0xd8));
#endif
}

struct Int8Tile {
  using State = RowState;
  using Registers = NoRegisters;
  static constexpr int64_t kTargetRows = 64;
  static constexpr int kRows = kDotRows;
  static constexpr int64_t kKeysAhead = 1;  // heads; values are fetched one ahead

  // Row `x` [head_dim] → q15 and its scale.
  static void prepare(RowState& state, int64_t row, const float* x, int64_t head_dim, float scale) {
    f32x16 top = {};
    for (int64_t d = 0; d < head_dim; d += kLanes) top = max(top, abs(load_part(x + d, lanes_left(head_dim - d))));
    const float a = max_lanes(top);
    const float inverse = inverse_of(a, kTwoLimbs);
    int16_t* q = queries(state) + row * head_dim;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int64_t lanes = lanes_left(head_dim - d);
      const i16x16 part = to_int16(rint_int(load_part(x + d, lanes) * inverse));
      std::memcpy(q + d, &part, sizeof(int16_t) * static_cast<size_t>(lanes));
    }
    state.query_scale[row] = (a / kTwoLimbs) * scale;
  }

  // Rows [first, first + R): each row's tile partial goes to its segment if that is empty, else is combined with it.
  template <int R>
  static void run(RowState& state, int64_t first, const TileView& tile, const CacheView& cache, CacheFetch& ahead, int64_t every) {
    alignas(64) int32_t scores[R * kTile];
    alignas(64) int16_t weights[R * kTile];
    float weight_scale[R];
    Sum sums[R];
    const Span all = all_spans(state, first, first + R);
    const auto aside = [&] { ahead.tick(every); };
    score<R>(queries(state) + first * cache.head_dim, tile, all, cache, scores, aside);
    for (int r = 0; r < R; ++r)
      sums[r] = weigh(scores + r * kTile, state.query_scale[first + r], tile, state.span[first + r],
                      weights + r * kTile, &weight_scale[r]);
    gather<R>(state, first, tile, all, cache, weights, weight_scale, sums, aside);
  }

  template <typename F>
  static void run_heads(RowState& state, const CacheView& cache, int64_t num_heads, F&& tile_of) {
    for (int64_t head = 0; head < num_heads; ++head) {
      const HeadTile of = tile_of(head);
      const int64_t quads = num_quads(all_spans(state, of.first, of.last), cache) * num_tiles(of.last - of.first, kRows);
      const int64_t every = std::max<int64_t>(1, quads / (cache.width() * kBlock / 64));
      CacheFetch ahead(of.view, cache, quads / every);
      for_row_blocks<kRows>(of, [&](int64_t row, auto count) {
        run<decltype(count)::value>(state, row, of.view, cache, ahead, every);
      });
      ahead.finish();  // rows that see less than all of them together took fewer steps
    }
  }

  static const int8_t* bytes(const char* p) { return reinterpret_cast<const int8_t*>(p); }
  static int16_t* queries(RowState& state) { return reinterpret_cast<int16_t*>(state.query); }

  // What rows [first, last) see of a tile together.
  static Span all_spans(const RowState& state, int64_t first, int64_t last) {
    Span all = state.span[first];
    for (int64_t row = first + 1; row < last; ++row) {
      all.low = std::min(all.low, state.span[row].low);
      all.high = std::max(all.high, state.span[row].high);
    }
    return all;
  }

 private:
  // Quads that a pass of some rows takes through both products.
  static int64_t num_quads(Span all, const CacheView& cache) {
    constexpr int64_t kColumns = kDotVectors * kDotLanes;
    int64_t quads = 0;
    for (int block = all.low / kBlock; block * kBlock < all.high; ++block) {
      const int64_t low = std::max(all.low - block * kBlock, 0), high = std::min(all.high - block * kBlock, kBlock);
      quads += num_tiles(high, kColumns) * (cache.head_dim / kQuad);
      quads += (num_tiles(high, kQuad) - low / kQuad) * num_tiles(cache.width(), kColumns);
    }
    return quads;
  }

  // Columns beyond the span are left as they are.
  template <int R, typename Aside>
  static void score(const int16_t* q, const TileView& tile, Span all, const CacheView& cache, int32_t* scores, Aside&& aside) {
    const int64_t head_dim = cache.head_dim;
    const Steps steps = {cache.k_panel(), CacheView::kKQuad};
    for (int block = all.low / kBlock; block * kBlock < all.high; ++block) {
      const int columns = std::min(kBlock, all.high - block * kBlock);
      for (int n = 0; n < columns; n += kDotVectors * kDotLanes) {
        const int64_t skip = steps.offset(n);
        const Stretch stretch = {q, bytes(tile.k[block]) + skip, head_dim / kQuad};
        const int64_t vectors = std::min<int64_t>(kDotVectors, num_tiles(columns - n, kDotLanes));
        with_constant<kDotVectors>(vectors, [&](auto count) {
          dots<R, decltype(count)::value>(&stretch, 1, head_dim, steps, aside, [&](int r, int v, DotInts sums) {
            std::memcpy(scores + r * kTile + block * kBlock + n + v * kDotLanes, &sums, sizeof(sums));
          });
        });
      }
    }
  }

  // Integer scores of a row → p15 [128] and its scale. Tokens outside the span count nothing, whatever their memory
  // holds; vectors that hold no other are left out.
  static Sum weigh(const int32_t* scores, float query_scale, const TileView& tile, Span span, int16_t* weights,
                   float* weight_scale) {
    constexpr int kVectors = kTile / kLanes;
    if (is_whole(span)) return weigh_vectors<true>(scores, query_scale, tile, span, 0, kVectors, weights, weight_scale);
    std::memset(weights, 0, sizeof(int16_t) * kTile);
    const int first = span.low / kLanes, last = static_cast<int>(num_tiles(span.high, kLanes));
    return weigh_vectors<false>(scores, query_scale, tile, span, first, last, weights, weight_scale);
  }

  template <bool kWhole>
  OCTAVO_INLINE static Sum weigh_vectors(const int32_t* scores, float query_scale, const TileView& tile, Span span, int first,
                                         int last, int16_t* weights, float* weight_scale) {
    f32x16 s[kTile / kLanes];
    for (int i = first; i < last; ++i) {
      const f32x16 scale = load(tile.k_scale[i / 4] + i % 4 * kLanes) * query_scale;
      s[i] = to_float(load(scores + i * kLanes)) * scale;
      if (!kWhole) s[i] = keep_inside(s[i], span, i, -INFINITY);
    }
    const Sum sum = softmax_vectors(s, first, last);
    f32x16 top = {};
    for (int i = first; i < last; ++i) {
      s[i] = s[i] * load(tile.v_scale[i / 4] + i % 4 * kLanes);
      if (!kWhole) s[i] = keep_inside(s[i], span, i, 0.0f);
      top = max(top, s[i]);
    }
    const float a = max_lanes(top);
    const float inverse = inverse_of(a, kTwoLimbs);
    *weight_scale = a / kTwoLimbs;
    for (int i = first; i < last; ++i) {
      const i16x16 p = to_int16(rint_int(s[i] * inverse));
      std::memcpy(weights + i * kLanes, &p, sizeof(p));
    }
    return sum;
  }

  // p15 · V of the rows, into their segments.
  template <int R, typename Aside>
  static void gather(RowState& state, int64_t first, const TileView& tile, Span all, const CacheView& cache, const int16_t* weights,
                     const float* weight_scale, const Sum* sums, Aside&& aside) {
    const int64_t width = cache.width();
    alignas(64) float spare[R * kMaxHeadDim];
    float* out[R];
    for (int r = 0; r < R; ++r)
      out[r] = is_empty(state.segment[first + r]) ? state.segment_out + (first + r) * width : spare + r * width;
    const Steps steps = {CacheView::kVPanel, cache.v_quad()};
    for (int64_t n = 0; n < width; n += kDotVectors * kDotLanes) {
      const int64_t vectors = std::min<int64_t>(kDotVectors, (width - n) / kDotLanes);
      with_constant<kDotVectors>(vectors, [&](auto count) {
        gather_columns<R, decltype(count)::value>(tile, all, steps, n, weights, weight_scale, out, aside);
      });
    }
    for (int r = 0; r < R; ++r) {
      Sum& segment = state.segment[first + r];
      if (is_empty(segment)) segment = sums[r];
      else combine(segment, state.segment_out + (first + r) * width, sums[r], out[r], width);
    }
  }

  template <int R, int V, typename Aside>
  static void gather_columns(const TileView& tile, Span all, Steps steps, int64_t n, const int16_t* weights,
                             const float* weight_scale, float* const* out, Aside&& aside) {
    Stretch stretches[2];
    int count = 0;
    for (int block = all.low / kBlock; block * kBlock < all.high; ++block) {
      const int low = std::max(all.low - block * kBlock, 0) / kQuad;
      const int64_t high = num_tiles(std::min(all.high - block * kBlock, kBlock), kQuad);
      const int64_t skip = steps.offset(n) + low * steps.quad;
      stretches[count++] = {weights + block * kBlock + low * kQuad, bytes(tile.v[block]) + skip, high - low};
    }
    dots<R, V>(stretches, count, kTile, steps, aside, [&](int r, int v, DotInts sums) {
      const DotFloats values = __builtin_convertvector(sums, DotFloats) * weight_scale[r];
      std::memcpy(out[r] + n + v * kDotLanes, &values, sizeof(values));
    });
  }
};

}  // namespace octavo
