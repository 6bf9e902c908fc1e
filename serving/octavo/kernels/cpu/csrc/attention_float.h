// One tile of attention over a float cache, for a few query rows at once: float32 sums in ascending head_dim and
// ascending tokens.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention_state.h"

namespace octavo {

#ifdef __AVX512F__
constexpr int kFloatRegisters = 4;  // of a row: with 4 rows 16 sums
#else
constexpr int kFloatRegisters = 2;
#endif

template <typename T>
struct FloatTile {
  using State = RowState;
  using Registers = NoRegisters;
  static constexpr int64_t kTargetRows = 64;
  static constexpr int kRows = 4;
  static constexpr int64_t kKeysAhead = 1;

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

  template <typename F>
  static void run_heads(RowState& state, const CacheView& cache, int64_t num_heads, F&& tile_of) {
    for (int64_t head = 0; head < num_heads; ++head) {
      const HeadTile of = tile_of(head);
      for_row_blocks<kRows>(of, [&](int64_t row, auto count) { run<decltype(count)::value>(state, row, of.view, cache); });
    }
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

  // acc[r][v] += Σ_i a[r · a_stride + i] · b[i · b_stride + v · kFloats], in ascending i.
  template <int R, int V>
  OCTAVO_INLINE static void accumulate(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t count,
                                       Floats (&acc)[R][V]) {
    for (int64_t i = 0; i < count; ++i, b += b_stride) {
      Floats column[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) column[v] = widen(b + v * kFloats);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[r][v] = fused(Floats{} + a[r * a_stride + i], column[v], acc[r][v]);
    }
  }

  template <int R, int V>
  OCTAVO_INLINE static void store_rows(const Floats (&acc)[R][V], float* out, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) std::memcpy(out + r * stride + v * kFloats, &acc[r][v], sizeof(Floats));
  }

  template <int R>
  static void score(const float* q, const TileView& tile, Span span, int64_t head_dim, float* s) {
    constexpr int kStep = kFloatRegisters * kFloats;
    for (int n = span.low / kStep * kStep; n < span.high; n += kStep) {
      const T* k = reinterpret_cast<const T*>(tile.k[n / kBlock]) + n % kBlock;
      Floats acc[R][kFloatRegisters] = {};
      accumulate<R, kFloatRegisters>(q, head_dim, k, kBlock, head_dim, acc);
      store_rows<R, kFloatRegisters>(acc, s + n, kTile);
    }
  }

  template <int R>
  static void gather(RowState& state, int64_t first, const TileView& tile, Span span, int64_t width, const float* e,
                     const Sum* sums) {
    alignas(64) float out[R * kMaxHeadDim];
    for (int64_t n = 0; n < width; n += kFloatRegisters * kFloats)
      with_constant<kFloatRegisters>(std::min<int64_t>(kFloatRegisters, (width - n) / kFloats), [&](auto count) {
        gather_columns<R, decltype(count)::value>(tile, span, width, n, e, out);
      });
    for (int r = 0; r < R; ++r)
      combine(state.segment[first + r], state.segment_out + (first + r) * width, sums[r], out + r * width, width);
  }

  template <int R, int V>
  static void gather_columns(const TileView& tile, Span span, int64_t width, int64_t n, const float* e, float* out) {
    Floats acc[R][V] = {};
    for (int block = span.low / kBlock; block * kBlock < span.high; ++block) {
      const int low = std::max(span.low, block * kBlock), high = std::min(span.high, (block + 1) * kBlock);
      const T* v = reinterpret_cast<const T*>(tile.v[block]) + (low - block * kBlock) * width + n;
      accumulate<R, V>(e + low, kTile, v, width, high - low, acc);
    }
    store_rows<R, V>(acc, out + n, width);
  }
};

}  // namespace octavo
