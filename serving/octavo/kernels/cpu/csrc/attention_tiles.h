// One tile of attention over an int8 cache in tile registers. The cache's panels are what a tile wants of its columns. A row of q15
// or p15 is two rows of signed bytes, v = 256 · high + low, so both products are exact sums of products of bytes. Up to sixteen
// rows, a group, go through the softmax together. Every float operation is that of Int8Tile on the same numbers, and so are the
// bits.
#pragma once

#include <optional>

#include "attention_int8.h"
#include "attention_rows.h"
#include "tiles.h"

namespace octavo {

#ifdef OCTAVO_TILES

constexpr int kGroupRows = 16;
constexpr int kTileGroup = kTileRows / 2;  // rows of a group in one tile

// A group's rows of int16 as rows of their high bytes, each followed by one of its low bytes.
struct LimbRows {
  const int8_t* data;
  int64_t stride;
};

// Exact sums of a group, 256 · high + low.
struct LimbSums {
  int32_t* data;
  int64_t stride;

  OCTAVO_INLINE i32x16 at(int64_t row, int64_t column) const {
    const int32_t* high = data + 2 * row * stride + column;
    return (load(high) << 8) + load(high + stride);
  }
};

// Sums of a group and the panels [first, last), two at a time, over the stretches [begin, end) of 64 bytes. T: tiles of the group's
// rows. `load_columns(to, panel, stretch)` loads a tile of columns, `aside()` is called after it.
template <int T, typename Load, typename Aside>
OCTAVO_INLINE void multiply_limbs(const LimbRows& rows, int64_t first, int64_t last, int64_t begin, int64_t end, const LimbSums& sums,
                                  Load&& load_columns, Aside&& aside) {
  const int64_t stride = sums.stride * static_cast<int64_t>(sizeof(int32_t));
  for (int64_t panel = first; panel < last; panel += 2) {
    zero_tile<0>(), zero_tile<1>();
    if constexpr (T == 2) zero_tile<2>(), zero_tile<3>();
    for (int64_t k = begin; k < end; ++k) {
      if (panel == first || end - begin > 1) {
        load_tile<4>(rows.data + k * kTileBytes, rows.stride);
        if constexpr (T == 2) load_tile<5>(rows.data + kTileRows * rows.stride + k * kTileBytes, rows.stride);
      }
      load_columns(std::integral_constant<int, 6>{}, panel, k);
      dot_signed_tiles<0, 4, 6>();
      if constexpr (T == 2) dot_signed_tiles<2, 5, 6>();
      aside();
      load_columns(std::integral_constant<int, 7>{}, panel + 1, k);
      dot_signed_tiles<1, 4, 7>();
      if constexpr (T == 2) dot_signed_tiles<3, 5, 7>();
      aside();
    }
    int32_t* to = sums.data + panel * kLanes;
    store_tile<0>(to, stride), store_tile<1>(to + kLanes, stride);
    to += kTileRows * sums.stride;
    if constexpr (T == 2) store_tile<2>(to, stride), store_tile<3>(to + kLanes, stride);
  }
}

// p of 64 tokens, 0 to 32512, as high and low bytes.
OCTAVO_INLINE void store_weights(const f32x16* s, float inverse, int8_t* high, int8_t* low) {
  __m512i p[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) p[i] = _mm512_maskz_cvtps_epi32(0xffff, reinterpret_cast<__m512>(s[i] * inverse));
  const __m512i a = _mm512_packus_epi32(p[0], p[1]), b = _mm512_packus_epi32(p[2], p[3]);
  const __m512i byte = _mm512_set1_epi16(255), half = _mm512_set1_epi16(128);
  // packing takes the four vectors' quads in turn
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto pack = [&](__m512i x, __m512i y) { return _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_packus_epi16(x, y)); };
  const auto upper = [&](__m512i x) { return _mm512_srli_epi16(_mm512_add_epi16(x, half), 8); };
  _mm512_store_si512(high, pack(upper(a), upper(b)));
  _mm512_store_si512(low, pack(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte)));
}

// What a task has beside the state of its rows.
struct TiledState : RowState {
  int64_t group;  // rows that go through the registers together
  // q15 [rows][high, low][head_dim]; a group may begin with the last row
  alignas(64) int8_t query[(kUnitRows + kGroupRows) * 2 * kMaxHeadDim];
  alignas(64) int32_t scores[2 * kGroupRows * kTile];  // of a group
  alignas(64) int32_t out[2 * kGroupRows * kMaxHeadDim];
  alignas(64) f32x16 s[kGroupRows][kTile / kLanes];
  alignas(64) int8_t weights[2 * kGroupRows * kTile];
};

// Registers for groups of the rows of one kv head, while it lives.
class GroupTiles {
 public:
  GroupTiles(TiledState& state, int64_t rows) {
    state.group = std::min<int64_t>(rows, kGroupRows);
    TileConfig config;
    const int64_t upper = std::min<int64_t>(state.group, kTileGroup), lower = std::max<int64_t>(state.group - upper, 1);
    config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(2 * upper);
    config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(2 * lower);
    configure_tiles(config);
  }
  ~GroupTiles() { release_tiles(); }
};

// Of a group of rows: the softmax's m and l, and the scale of p15.
struct Weighed {
  f32x16 m, l, scale;
};

// Rows [first, last) and a tile, all of which they see together, group by group.
class TileOfRows {
 public:
  static constexpr int kVectors = kTile / kLanes;
  static constexpr int kBlockVectors = kBlock / kLanes;
  static constexpr int kTileTurns = 3, kRowTurns = 2;  // of CacheFetch beside a tile of columns, beside half of a row's softmax

  TileOfRows(TiledState& state, const CacheView& cache, const HeadTile& of)
      : state_(state), tile_(of.view), head_dim_(cache.head_dim), width_(cache.width()), k_panel_(cache.k_panel()),
        v_quad_(cache.v_quad()), first_(of.first), last_(of.last),
        num_groups_(num_tiles(last_ - first_, state.group)), all_(Int8Tile::all_spans(state, of.first, of.last)),
        ahead_(tile_, cache, num_groups_ * turns()) {}

  TileOfRows(const TileOfRows&) = delete;

  int64_t num_groups() const { return num_groups_; }

  // q15 · K of a group.
  void score(int64_t group) {
    const int8_t* q = state_.query + (first_ + group * state_.group) * 2 * head_dim_;
    multiply({q, head_dim_}, all_.low / 32 * 2, num_tiles(all_.high, 32) * 2, 0, head_dim_ / kTileBytes, scores(),
             [&](auto to, int64_t panel, int64_t stretch) {
      const char* block = tile_.k[panel / kBlockVectors] + panel % kBlockVectors * k_panel_;
      load_tile<decltype(to)::value>(block + stretch * kTileRows * kTileBytes, kTileBytes);
    });
  }

  // p15 · V of the rows that were weighed last.
  void gather() {
    multiply({state_.weights, kTile}, 0, width_ / kLanes, all_.low / kBlock, num_tiles(all_.high, kBlock), out(),
             [&](auto to, int64_t panel, int64_t block) {
      load_tile<decltype(to)::value>(tile_.v[block] + panel * CacheView::kVPanel, v_quad_);
    });
  }

  // Scores of a group → floats, and the largest of each row.
  f32x16 scale(int64_t group) {
    Rows tops(*this, group);
    for_rows(group, [&](int r, int64_t row) {
      tops[r] = scale_scores(r, row);
      ahead_.step<kRowTurns>();
    });
    return max_rows(tops.v, state_.group);
  }

  // Those → p15.
  Weighed weigh(int64_t group, f32x16 m) {
    Rows tops(*this, group), totals(*this, group);
    for_rows(group, [&](int r, int64_t row) {
      tops[r] = exponentials(r, row, m[r], totals[r]);
    });
    const f32x16 top = max_rows(tops.v, state_.group), inverse = top == 0.0f ? f32x16{} : min(kTwoLimbs / top, splat(FLT_MAX));
    for_rows(group, [&](int r, int64_t) {
      for (int half = 0, at = 2 * r * kTile; half < 2; ++half, at += kBlock)
        store_weights(state_.s[r] + half * kBlockVectors, inverse[r], state_.weights + at, state_.weights + kTile + at);
      ahead_.step<kRowTurns>();
    });
    return {m, sum_rows(totals.v, state_.group), top / kTwoLimbs};
  }

  void fold_last(const Weighed& of) const { fold(num_groups() - 1, of); }

  // p15 · V and the sums of a group's rows into their segments, as `combine` does.
  void fold(int64_t group, const Weighed& of) const {
    f32x16 before = of.m;
    for_rows(group, [&](int r, int64_t row) { before[r] = is_empty(state_.segment[row]) ? of.m[r] : state_.segment[row].m; });
    const f32x16 m = before > of.m ? before : of.m, f1 = exp_below(before - m), f2 = exp_below(of.m - m);
    for_rows(group, [&](int r, int64_t row) {
      Sum& sum = state_.segment[row];
      float* o = state_.segment_out + row * width_;
      if (is_empty(sum)) {
        sum = {of.m[r], of.l[r]};
        for (int64_t d = 0; d < width_; d += kLanes) store(o + d, to_float(out().at(r, d)) * of.scale[r]);
      } else {
        sum = {m[r], sum.l * f1[r] + of.l[r] * f2[r]};
        for (int64_t d = 0; d < width_; d += kLanes) store(o + d, load(o + d) * f1[r] + to_float(out().at(r, d)) * of.scale[r] * f2[r]);
      }
    });
  }

 private:
  // A vector for each row of a group, and zeros for what else a reduction takes.
  struct Rows {
    f32x16 v[kGroupRows];
    Rows(const TileOfRows& of, int64_t group) {
      for (int64_t r = of.size(group); r < reduced_rows(of.state_.group); ++r) v[r] = f32x16{};
    }
    f32x16& operator[](int r) { return v[r]; }
  };

  LimbSums scores() const { return {state_.scores, kTile}; }
  LimbSums out() const { return {state_.out, width_}; }

  template <typename Load>
  OCTAVO_INLINE void multiply(const LimbRows& rows, int64_t first, int64_t last, int64_t begin, int64_t end, const LimbSums& sums,
                              Load&& load_columns) {
    const auto aside = [&] { ahead_.step<kTileTurns>(); };
    if (state_.group > kTileGroup) multiply_limbs<2>(rows, first, last, begin, end, sums, load_columns, aside);
    else multiply_limbs<1>(rows, first, last, begin, end, sums, load_columns, aside);
  }

  OCTAVO_INLINE static f32x16 vector_of(const float* const* scales, int i) {
    return load(scales[i / kBlockVectors] + i % kBlockVectors * kLanes);
  }

  int64_t size(int64_t group) const { return std::min(state_.group, last_ - first_ - group * state_.group); }

  // Turns of CacheFetch beside the work on a group.
  int64_t turns() const {
    const int64_t vectors = num_tiles(all_.high, kLanes) - all_.low / kLanes, blocks = num_tiles(all_.high, kBlock) - all_.low / kBlock;
    return (vectors * (head_dim_ / kTileBytes) + blocks * (width_ / kLanes)) * kTileTurns + 2 * kRowTurns * size(0);
  }

  // f(r, row) for the rows of a group.
  template <typename F>
  OCTAVO_INLINE void for_rows(int64_t group, F&& f) const {
    const int64_t count = size(group), start = first_ + group * state_.group;
    for (int64_t r = 0; r < count; ++r) f(static_cast<int>(r), start + r);
  }

  // Row r's scores as floats to state.s; their largest by lanes.
  OCTAVO_INLINE f32x16 scale_scores(int r, int64_t row) const {
    f32x16 top;
    const float query_scale = state_.query_scale[row];
    with_span(state_.span[row], [&](auto whole, int first, int last) {
      f32x16* s = state_.s[r];
#pragma GCC unroll 8
      for (int i = first; i < last; ++i) {
        s[i] = to_float(scores().at(r, i * kLanes)) * (vector_of(tile_.k_scale, i) * query_scale);
        if (!whole) s[i] = keep_inside(s[i], state_.span[row], i, -INFINITY);
        top = i == first ? s[i] : max(top, s[i]);
      }
    });
    return top;
  }

  // e of a row's scores to their lanes' sums, and e · the scales of V in their place; the largest of those by lanes.
  OCTAVO_INLINE f32x16 exponentials(int r, int64_t row, float m, f32x16& total) const {
    f32x16 top = {};
    with_span(state_.span[row], [&](auto whole, int first, int last) {
      f32x16* s = state_.s[r];
      if (!whole) {
        std::fill(s, s + first, f32x16{});
        std::fill(s + last, s + kVectors, f32x16{});
      }
#pragma GCC unroll 8
      for (int i = first; i < last; ++i) {
        const f32x16 e = exp_below(s[i] - m);
        total = i == first ? e : total + e;
        s[i] = e * vector_of(tile_.v_scale, i);
        if (!whole) s[i] = keep_inside(s[i], state_.span[row], i, 0.0f);
        top = max(top, s[i]);
      }
    });
    return top;
  }

  // f(whether the row sees the whole tile, first and last vector that it sees of it)
  template <typename F>
  OCTAVO_INLINE static void with_span(Span span, F&& f) {
    if (is_whole(span)) f(std::true_type{}, 0, kVectors);
    else f(std::false_type{}, span.low / kLanes, static_cast<int>(num_tiles(span.high, kLanes)));
  }

  TiledState& state_;
  const TileView tile_;
  int64_t head_dim_, width_, k_panel_, v_quad_, first_, last_, num_groups_;
  Span all_;
  CacheFetch ahead_;
};

struct TiledInt8 {
  using State = TiledState;
  using Registers = GroupTiles;
  static constexpr int64_t kTargetRows = 128;
  static constexpr int64_t kKeysAhead = 2;  // those one ahead are multiplied with this head's softmax

  static void prepare(State& state, int64_t row, const float* x, int64_t head_dim, float scale) {
    Int8Tile::prepare(state, row, x, head_dim, scale);
    const int16_t* q = Int8Tile::queries(state) + row * head_dim;
    int8_t* limbs = state.query + row * 2 * head_dim;
    for (int64_t d = 0; d < head_dim; d += 32) {
      const __m512i v = _mm512_loadu_si512(q + d), high = _mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(128)), 8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(limbs + d), _mm512_cvtepi16_epi8(high));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(limbs + head_dim + d), _mm512_cvtepi16_epi8(v));
    }
  }

  // Each row's tile partial goes to its segment. Every product is a group ahead of or behind the vector work on its numbers, across
  // heads, so that neither waits for the other.
  template <typename F>
  static void run_heads(State& state, const CacheView& cache, int64_t num_heads, F&& tile_of) {
    std::optional<TileOfRows> of[2];  // this head's and its neighbour's
    const auto begin = [&](int64_t head) { of[head % 2].emplace(state, cache, tile_of(head)).score(0); };
    begin(0);
    Weighed weighed;
    for (int64_t head = 0; head < num_heads; ++head) {
      TileOfRows& rows = *of[head % 2];
      for (int64_t group = 0; group < rows.num_groups(); ++group) {
        const f32x16 m = rows.scale(group);
        if (group > 0) rows.fold(group - 1, weighed);
        else if (head > 0) of[1 - head % 2]->fold_last(weighed);
        if (group + 1 < rows.num_groups()) rows.score(group + 1);
        else if (head + 1 < num_heads) begin(head + 1);
        weighed = rows.weigh(group, m);
        rows.gather();
      }
    }
    of[1 - num_heads % 2]->fold_last(weighed);
  }
};

#else

using TiledInt8 = Int8Tile;

#endif

}  // namespace octavo
