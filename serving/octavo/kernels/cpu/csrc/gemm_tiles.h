// The int8 product in tile registers, for more rows than keep memory waiting. A panel is already what a tile wants of its columns:
// 16 quads of 16 outputs are 1024 bytes in a row. Exact sums and the common epilogue: the bits are those of the other kernels.
#pragma once

#include "product_int8.h"
#include "tiles.h"

#ifdef OCTAVO_TILES

namespace octavo {

constexpr int64_t kTileQuads = kTileBytes / kQuad;

// Byte rows, at most two tiles of them, and panels.
struct TileBlock {
  const uint8_t* x;  // the first byte row
  int64_t x_stride;
  int64_t rows;
  const int8_t* w;  // the first panel
  int64_t quads;    // of a panel
  Ahead ahead;

  int64_t panel_bytes() const { return quads * kPanel * kQuad; }
};

// Rows of the first of two tiles: half of them, and no token cut.
OCTAVO_INLINE int64_t upper_rows(int64_t rows) { return (rows + 3) / 4 * 2; }

// Registers made for a number of rows: sums 0 to 3, rows 4 and 5, columns 6 and 7. Made anew only if that number changes: it takes
// as long as several products.
class RowTiles {
 public:
  ~RowTiles() {
    if (rows_ > 0) release_tiles();
  }

  void make(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    TileConfig config;
    const int64_t upper = rows <= kTileRows ? rows : upper_rows(rows), lower = rows <= kTileRows ? rows : rows - upper;
    config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(upper);
    config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(lower);
    configure_tiles(config);
  }

 private:
  int64_t rows_ = 0;
};

// One step of 16 quads: T row tiles times C panels, `panel_bytes` apart, 1 x 4, 1 x 2 or 2 x 2.
template <int T, int C>
OCTAVO_INLINE void dot_step(const TileBlock& block, const uint8_t* x, const int8_t* w, int64_t panel_bytes) {
  load_tile<6>(w, kTileBytes);
  load_tile<4>(x, block.x_stride);
  dot_tiles<0, 4, 6>();
  load_tile<7>(w + panel_bytes, kTileBytes);
  dot_tiles<1, 4, 7>();
  if constexpr (T == 2) {
    load_tile<5>(x + upper_rows(block.rows) * block.x_stride, block.x_stride);
    dot_tiles<2, 5, 6>();
    dot_tiles<3, 5, 7>();
  } else if constexpr (C == 4) {
    load_tile<6>(w + 2 * panel_bytes, kTileBytes);
    dot_tiles<2, 4, 6>();
    load_tile<7>(w + 3 * panel_bytes, kTileBytes);
    dot_tiles<3, 4, 7>();
  }
}

// Fetches what a later step reads: of these weights if they pass once, else a share of those that come next.
template <int C, bool kOnce>
OCTAVO_INLINE void fetch_step(const TileBlock& block, int64_t quad) {
  constexpr int64_t kQuadBytes = kPanel * kQuad, kNear = 3 * kTileQuads;
  if constexpr (kOnce) {
    const int64_t at = quad + kNear;
    const int8_t* from = at < block.quads ? block.w + at * kQuadBytes : block.ahead.next + (at - block.quads) * kQuadBytes;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 16
      for (int line = 0; line < kTileQuads; ++line) __builtin_prefetch(from + (c * block.quads + line) * kQuadBytes, 0, 3);
  } else {
    const int8_t* from = block.ahead.next + quad * block.ahead.step;
    for (int64_t at = 0; at < kTileQuads * block.ahead.step; at += 64) __builtin_prefetch(from + at, 0, 2);
  }
}

// The last quads [quad, last), fewer than a step: the columns are copied beside zeros.
template <int T, int C>
void dot_rest(const TileBlock& block, int64_t quad, int64_t last) {
  alignas(64) int8_t columns[C][kTileRows * kTileBytes] = {};
  const int64_t bytes = (last - quad) * kPanel * kQuad;
  for (int c = 0; c < C; ++c)
    std::memcpy(columns[c], block.w + c * block.panel_bytes() + quad * kPanel * kQuad, static_cast<size_t>(bytes));
  dot_step<T, C>(block, block.x + quad * kQuad, columns[0], sizeof(columns[0]));
}

// S of the block over the quads [first, last), to sums[rows][C · 16].
template <int T, int C, bool kOnce>
OCTAVO_INLINE void sum_tiles(const TileBlock& block, int64_t first, int64_t last, int32_t* sums) {
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  int64_t quad = first;
  for (; quad + kTileQuads <= last; quad += kTileQuads) {
    fetch_step<C, kOnce>(block, quad);
    dot_step<T, C>(block, block.x + quad * kQuad, block.w + quad * kPanel * kQuad, block.panel_bytes());
  }
  if (quad < last) dot_rest<T, C>(block, quad, last);
  constexpr int64_t kStride = C * kPanel * sizeof(int32_t);
  store_tile<0>(sums, kStride);
  store_tile<1>(sums + kPanel, kStride);
  if constexpr (T * C == 4) {
    int32_t* rest = T == 2 ? sums + upper_rows(block.rows) * C * kPanel : sums + 2 * kPanel;
    store_tile<2>(rest, kStride);
    store_tile<3>(rest + kPanel, kStride);
  }
}

// Where a block's outputs are: its first byte row and panel.
struct Outputs {
  int64_t row, panel;
};

// u of a group, added to those before it in `total`; after the last group y.
template <int C, int L>
OCTAVO_INLINE void finish_group(const Product& p, const Outputs& at, int64_t rows, int64_t group, const int32_t* sums, float* total) {
  const int64_t groups = p.w->num_groups;
  for (int64_t r = 0; r < rows; r += L)
    for (int c = 0; c < C; ++c) {
      float* so_far = total + (r / L * C + c) * kPanel;
      f32x16 u = scaled<L>(p, sums + (r * C + c) * kPanel, C * kPanel, at.row + r, (at.panel + c) * kPanel, group);
      if (groups > 1) u = (group > 0 ? load(so_far) : f32x16{}) + u;
      if (group + 1 < groups) store(so_far, u);
      else finish(p, u, (at.row + r) / L, (at.panel + c) * kPanel);
    }
}

// y of C panels and the block's rows; L byte rows a token.
template <int T, int C, int L, bool kOnce>
void multiply_tiles(const Product& p, const TileBlock& block, const Outputs& at) {
  alignas(64) int32_t sums[T * kTileRows * C * kPanel];
  alignas(64) float total[T * kTileRows / L * C * kPanel];
  const int64_t each = block.quads / p.w->num_groups;
  for (int64_t group = 0; group < p.w->num_groups; ++group) {
    sum_tiles<T, C, kOnce>(block, group * each, (group + 1) * each, sums);
    finish_group<C, L>(p, at, block.rows, group, sums, total);
  }
}

// The same with the run-time numbers of limbs and panels. More than one tile of rows takes two panels.
template <bool kOnce>
void multiply_tiles(const Product& p, const TileBlock& block, const Outputs& at, int64_t panels) {
  const bool two = p.w->limbs == 2;
  if (block.rows > kTileRows) return (two ? multiply_tiles<2, 2, 2, kOnce> : multiply_tiles<2, 2, 1, kOnce>)(p, block, at);
  if (panels == 4) return (two ? multiply_tiles<1, 4, 2, kOnce> : multiply_tiles<1, 4, 1, kOnce>)(p, block, at);
  return (two ? multiply_tiles<1, 2, 2, kOnce> : multiply_tiles<1, 2, 1, kOnce>)(p, block, at);
}

// A part of a block's rows.
OCTAVO_INLINE TileBlock tile_block(const Product& p, const Block& block, int64_t index, int64_t count) {
  const int64_t begin = block.part(p, index, count), end = block.part(p, index + 1, count), quads = quads_of(p.w->in_features);
  const int8_t* w = p.w->packed + block.panel * quads * kPanel * kQuad;
  return {p.x + begin * p.x_stride, p.x_stride, end - begin, w, quads, count == 1 ? Ahead{block.next, 0} : block.ahead(p, index, count)};
}

// A block in tile registers.
inline void multiply_in_tiles(const Product& p, const Block& block) {
  const int64_t count = block.num_parts(p, 2 * kTileRows);
  RowTiles registers;
  for (int64_t index = 0; index < count; ++index) {
    const TileBlock part = tile_block(p, block, index, count);
    const Outputs at = {block.part(p, index, count), block.panel};
    registers.make(part.rows);
    if (count == 1) multiply_tiles<true>(p, part, at, block.panels);
    else multiply_tiles<false>(p, part, at, block.panels);
  }
}

}  // namespace octavo

#else

namespace octavo {
inline void multiply_in_tiles(const Product&, const Block&) {}  // no pool has tiles here
}  // namespace octavo

#endif
