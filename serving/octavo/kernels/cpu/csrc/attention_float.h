// One tile of attention over a float cache, for a few query rows at once: float32 sums in ascending head_dim and ascending tokens.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention_dots.h"
#include "attention_state.h"

namespace octavo {

template <typename T>
struct FloatTile {
  static constexpr int kRows = 4;

  static void prepare(RowState& state, int64_t row, const float* x, int64_t head_dim, float scale) {
    std::memcpy(state.query + row * head_dim, x, sizeof(float) * static_cast<size_t>(head_dim));
    state.query_scale[row] = scale;
  }

  // See Int8Tile::run. Rows that do not see the whole tile go one by one, so that no hidden value is ever multiplied.
  template <int R>
  static void run(RowState& state, int64_t first, const TileView& tile, const CacheView& cache) {
    bool whole = true;
    for (int r = 0; r < R; ++r) whole = whole && is_whole(state.span[first + r]);
    if (whole || R == 1) return run_alike<R>(state, first, tile, cache);
    for (int r = 0; r < R; ++r) run_alike<1>(state, first + r, tile, cache);
  }

 private:
  // Rows with one span.
  template <int R>
  static void run_alike(RowState& state, int64_t first, const TileView& tile, const CacheView& cache) {
    alignas(64) float e[R * kTile];
    Sum sums[R];
    const Span span = state.span[first];
    score<R>(state.query + first * cache.head_dim, tile, span, cache.head_dim, e);
    for (int r = 0; r < R; ++r) {
      f32x16 s[kTile / kLanes];
      for (int i = 0; i < kTile / kLanes; ++i)
        s[i] = keep_inside(load(e + r * kTile + i * kLanes) * state.query_scale[first + r], span, i, -INFINITY);
      sums[r] = softmax_tile(s);
      for (int i = 0; i < kTile / kLanes; ++i) store(e + r * kTile + i * kLanes, s[i]);
    }
    gather<R>(state, first, tile, span, cache.width(), e, sums);
  }

  template <int R>
  static void score(const float* q, const TileView& tile, Span span, int64_t head_dim, float* s) {
    constexpr int kVectors = 2;
    for (int n = span.low / (kVectors * kLanes) * (kVectors * kLanes); n < span.high; n += kVectors * kLanes) {
      f32x16 acc[R][kVectors] = {};
      const T* k = reinterpret_cast<const T*>(tile.k[n / kBlock]) + n % kBlock;
      for (int64_t d = 0; d < head_dim; ++d, k += kBlock) {
        f32x16 column[kVectors];
        for (int v = 0; v < kVectors; ++v) column[v] = widen(k + v * kLanes);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < kVectors; ++v) acc[r][v] = fma(splat(q[r * head_dim + d]), column[v], acc[r][v]);
      }
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < kVectors; ++v) store(s + r * kTile + n + v * kLanes, acc[r][v]);
    }
  }

  template <int R>
  static void gather(RowState& state, int64_t first, const TileView& tile, Span span, int64_t width, const float* e, const Sum* sums) {
    alignas(64) float out[R * kMaxHeadDim];
    for (int64_t n = 0; n < width; n += kLanes) {
      f32x16 acc[R] = {};
      for (int t = span.low; t < span.high; ++t) {
        const f32x16 column = widen(reinterpret_cast<const T*>(tile.v[t / kBlock]) + t % kBlock * width + n);
        for (int r = 0; r < R; ++r) acc[r] = fma(splat(e[r * kTile + t]), column, acc[r]);
      }
      for (int r = 0; r < R; ++r) store(out + r * width + n, acc[r]);
    }
    for (int r = 0; r < R; ++r)
      combine(state.segment[first + r], state.segment_out + (first + r) * width, sums[r], out + r * width, width);
  }
};

}  // namespace octavo
