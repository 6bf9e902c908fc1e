// One tile of attention over an int8 cache in tile registers, for many query rows: prompts. q15 and p15 are two limbs each,
// v = 256 · high + low with a signed high byte and an unsigned low one, so both products are exact sums of products of bytes;
// sixteen rows go through the softmax together. Every float operation is that of Int8Tile on the same numbers, and so are
// the bits.
#pragma once

#include "attention_int8.h"
#include "attention_rows.h"
#include "tiles.h"

namespace octavo {

#ifdef OCTAVO_TILES

// Two planes of bytes, a row of both for each row of 16 bits.
struct LimbRows {
  const uint8_t* high;
  const uint8_t* low;
  int64_t stride;
};

// Exact sums of 16 rows: 256 · high + low.
struct LimbSums {
  int32_t* high;
  int32_t* low;
  int64_t stride;

  OCTAVO_INLINE i32x16 at(int64_t row, int64_t column) const {
    return (load(high + row * stride + column) << 8) + load(low + row * stride + column);
  }
};

// Columns as a tile wants them: panels of 16, in each the quads of the summed axis.
struct Panels {
  const int8_t* data;
  int64_t panel_bytes;
};

// Sums of 16 rows and the panels [first, last), two at a time, over the stretches [begin, end) of 64 bytes.
inline void multiply_limbs(const LimbRows& rows, const Panels& panels, int64_t first, int64_t last, int64_t begin, int64_t end,
                           const LimbSums& sums) {
  const int64_t stride = sums.stride * static_cast<int64_t>(sizeof(int32_t));
  for (int64_t panel = first; panel < last; panel += 2) {
    const int8_t* columns = panels.data + panel * panels.panel_bytes;
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (int64_t k = begin * kTileBytes; k < end * kTileBytes; k += kTileBytes) {
      if (panel == first || end - begin > 1) load_tile<4>(rows.high + k, rows.stride), load_tile<5>(rows.low + k, rows.stride);
      load_tile<6>(columns + k * kTileRows, kTileBytes);
      dot_signed_tiles<0, 4, 6>();
      load_tile<7>(columns + panels.panel_bytes + k * kTileRows, kTileBytes);
      dot_signed_tiles<1, 4, 7>();
      dot_tiles<2, 5, 6>();
      dot_tiles<3, 5, 7>();
    }
    store_tile<0>(sums.high + panel * kLanes, stride), store_tile<1>(sums.high + (panel + 1) * kLanes, stride);
    store_tile<2>(sums.low + panel * kLanes, stride), store_tile<3>(sums.low + (panel + 1) * kLanes, stride);
  }
}

// The cache's pairs [num_quads · 2][columns][2] to panels; `place(quad)` says where a quad goes. Fetches `ahead`, of the same
// shape.
template <typename Place>
OCTAVO_INLINE void pack_panels(const int8_t* pairs, const int8_t* ahead, int64_t columns, int64_t num_quads, int64_t panel_bytes,
                               int8_t* to, Place&& place) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
                                       3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int64_t row = columns * 2;
  for (int64_t quad = 0; quad < num_quads; ++quad) {
    int8_t* out = to + place(quad) * kTileBytes;
    for (int64_t n = 0; n < row; n += kTileBytes, out += 2 * panel_bytes) {
      const int64_t at = quad * 2 * row + n;
      const __m512i a = _mm512_loadu_si512(pairs + at), b = _mm512_loadu_si512(pairs + at + row);
      __builtin_prefetch(ahead + at), __builtin_prefetch(ahead + at + row);
      _mm512_store_si512(out, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(out + panel_bytes, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// Where quad q of 64 tokens lies in what `store_weights` writes: it takes four vectors of 16 tokens side by side.
OCTAVO_INLINE int64_t weight_quad(int64_t quad) { return quad % 4 * 4 + quad / 4; }

// p of 64 tokens, 0 to 32512, as high and low bytes.
OCTAVO_INLINE void store_weights(const f32x16* s, float inverse, uint8_t* high, uint8_t* low) {
  __m512i p[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) p[i] = _mm512_maskz_cvtps_epi32(0xffff, reinterpret_cast<__m512>(s[i] * inverse));
  const __m512i a = _mm512_packus_epi32(p[0], p[1]), b = _mm512_packus_epi32(p[2], p[3]), byte = _mm512_set1_epi16(255);
  _mm512_store_si512(high, _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8)));
  _mm512_store_si512(low, _mm512_packus_epi16(_mm512_and_si512(a, byte), _mm512_and_si512(b, byte)));
}

// Tile registers of full size while it lives.
class FullTiles {
 public:
  FullTiles() { configure_tiles(TileConfig{}); }
  ~FullTiles() { release_tiles(); }
};

// What a task has beside the state of its rows.
struct TiledState : RowState {
  alignas(64) uint8_t query[2][kUnitRows * kMaxHeadDim];  // high and low bytes of q15 [rows][head_dim]
  alignas(64) int8_t k[kTile * kMaxHeadDim];              // the tile's panels
  alignas(64) int8_t v[kTile * kMaxHeadDim];
  alignas(64) int32_t scores[2][kTileRows * kTile];  // of a block of rows, high and low
  alignas(64) int32_t out[2][kTileRows * kMaxHeadDim];
  alignas(64) f32x16 s[kTileRows][kTile / kLanes];
  alignas(64) uint8_t weights[2][kTileRows * kTile];
};

// Of sixteen rows: the softmax's m and l, and the scale of p15.
struct Weighed {
  f32x16 m, l, scale;
};

// Rows [first, last) and a tile, all of which they see together; sixteen rows, a block, at a time.
class TileOfRows {
 public:
  static constexpr int kVectors = kTile / kLanes;
  static constexpr int kBlockVectors = kBlock / kLanes;
  static constexpr int64_t kQuad = 4;  // summed neighbours

  TileOfRows(TiledState& state, const TileView& tile, const CacheView& cache, int64_t first, int64_t last)
      : state_(state), tile_(tile), head_dim_(cache.head_dim), width_(cache.width()), first_(first), last_(last),
        all_(Int8Tile::all_spans(state, first, last)) {}

  void pack_keys() const {
    const int64_t quads = head_dim_ / kQuad;
    for (int block = 0; block < 2; ++block)
      pack_panels(Int8Tile::bytes(tile_.k[block]), Int8Tile::bytes(tile_.next_k[block]), kBlock, quads, quads * kTileBytes,
                  state_.k + block * kBlock * head_dim_, [](int64_t quad) { return quad; });
  }

  void pack_values() const {
    for (int block = 0; block < 2; ++block)
      pack_panels(Int8Tile::bytes(tile_.v[block]), Int8Tile::bytes(tile_.next_v[block]), width_, kBlock / kQuad, kTile * kLanes,
                  state_.v + block * kBlock * kLanes, weight_quad);
  }

  // q15 · K of a block of rows.
  void score(int64_t block) const {
    const int64_t at = block * kTileRows * head_dim_;
    multiply_limbs({state_.query[0] + at, state_.query[1] + at, head_dim_}, {state_.k, head_dim_ * kLanes}, all_.low / 32 * 2,
                   num_tiles(all_.high, 32) * 2, 0, head_dim_ / kTileBytes, scores());
  }

  // p15 · V of the rows that were weighed last.
  void gather() const {
    multiply_limbs({state_.weights[0], state_.weights[1], kTile}, {state_.v, kTile * kLanes}, 0, width_ / kLanes, all_.low / kBlock,
                   num_tiles(all_.high, kBlock), out());
  }

  // Scores of a block → floats, and the largest of each row.
  f32x16 scale(int64_t block) const {
    Rows tops;
    for_rows(block, [&](int r, int64_t row) { tops[r] = scale_scores(r, row); });
    return max_rows(tops.v);
  }

  // Those → p15.
  Weighed weigh(int64_t block, f32x16 m) const {
    Rows tops, totals;
    for_rows(block, [&](int r, int64_t row) { tops[r] = exponentials(r, row, m[r], totals[r]); });
    const f32x16 top = max_rows(tops.v), inverse = top == 0.0f ? f32x16{} : min(kTwoLimbs / top, splat(FLT_MAX));
    for_rows(block, [&](int r, int64_t) {
      for (int half = 0, at = r * kTile; half < 2; ++half, at += kBlock)
        store_weights(state_.s[r] + half * kBlockVectors, inverse[r], state_.weights[0] + at, state_.weights[1] + at);
    });
    return {m, sum_rows(totals.v), top / kTwoLimbs};
  }

  // p15 · V and the sums of a block's rows into their segments, as `combine` does.
  void fold(int64_t block, const Weighed& of) const {
    f32x16 before = of.m;
    for_rows(block, [&](int r, int64_t row) { before[r] = is_empty(state_.segment[row]) ? of.m[r] : state_.segment[row].m; });
    const f32x16 m = before > of.m ? before : of.m, f1 = exp_below(before - m), f2 = exp_below(of.m - m);
    for_rows(block, [&](int r, int64_t row) {
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
  // A vector for each row of a block; of those that nobody wants it is left as it is.
  struct Rows {
    f32x16 v[kTileRows];
    f32x16& operator[](int r) { return v[r]; }
  };

  LimbSums scores() const { return {state_.scores[0], state_.scores[1], kTile}; }
  LimbSums out() const { return {state_.out[0], state_.out[1], width_}; }

  OCTAVO_INLINE static f32x16 vector_of(const float* const* scales, int i) {
    return load(scales[i / kBlockVectors] + i % kBlockVectors * kLanes);
  }

  // f(r, row) for the rows of a block that are wanted; the others are multiplied and dropped.
  template <typename F>
  OCTAVO_INLINE void for_rows(int64_t block, F&& f) const {
    const int64_t start = block * kTileRows, end = std::min(last_ - start, static_cast<int64_t>(kTileRows));
    for (int64_t r = std::max<int64_t>(first_ - start, 0); r < end; ++r) f(static_cast<int>(r), start + r);
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
  const TileView& tile_;
  int64_t head_dim_, width_, first_, last_;
  Span all_;
};

struct TiledInt8 {
  using State = TiledState;
  static constexpr int64_t kTargetRows = 128;
  static constexpr int64_t kFewestRows = 20;  // below, the tile's way into panels costs more than the products save

  static void prepare(State& state, int64_t row, const float* x, int64_t head_dim, float scale) {
    Int8Tile::prepare(state, row, x, head_dim, scale);
    const int16_t* q = Int8Tile::queries(state) + row * head_dim;
    for (int64_t d = row * head_dim; d < (row + 1) * head_dim; d += 32, q += 32) {
      const __m512i v = _mm512_loadu_si512(q);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(state.query[0] + d), _mm512_cvtepi16_epi8(_mm512_srai_epi16(v, 8)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(state.query[1] + d), _mm512_cvtepi16_epi8(v));
    }
  }

  // Rows [first, last): each row's tile partial goes to its segment. Every product is a block of rows ahead of or behind the vector
  // work on its numbers, so that neither waits for the other.
  static void run_rows(State& state, int64_t first, int64_t last, const TileView& tile, const CacheView& cache) {
    if (last - first < kFewestRows) return Int8Tile::run_rows(state, first, last, tile, cache);
    const TileOfRows rows(state, tile, cache, first, last);
    const int64_t begin = first / kTileRows, end = num_tiles(last, kTileRows);
    const FullTiles registers;
    rows.pack_keys();
    rows.score(begin);
    rows.pack_values();
    Weighed weighed;
    for (int64_t block = begin; block < end; ++block) {
      const f32x16 m = rows.scale(block);
      if (block > begin) rows.fold(block - 1, weighed);
      if (block + 1 < end) rows.score(block + 1);
      weighed = rows.weigh(block, m);
      rows.gather();
    }
    rows.fold(end - 1, weighed);
  }
};

#else

using TiledInt8 = Int8Tile;

#endif

}  // namespace octavo
