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
  int64_t half;     // bytes from the first half of the panels to the second

  int64_t panel_bytes() const { return quads * kPanel * kQuad; }

  // Where panel c of C lies, from the first on.
  template <int C>
  OCTAVO_INLINE int64_t offset(int c) const {
    return c / (C / 2) * half + c % (C / 2) * panel_bytes();
  }
};

// Rows of the first of two tiles: half of them, and no token cut.
OCTAVO_INLINE int64_t upper_rows(int64_t rows) { return (rows + 3) / 4 * 2; }

// Registers made for a number of rows: sums 0 to 3, rows 4 and 5, columns 6 and 7. Making them takes as long as several products.
class RowTiles {
 public:
  explicit RowTiles(int64_t rows) {
    TileConfig config;
    const int64_t upper = rows <= kTileRows ? rows : upper_rows(rows), lower = rows <= kTileRows ? rows : rows - upper;
    config.rows[0] = config.rows[1] = config.rows[4] = static_cast<uint8_t>(upper);
    config.rows[2] = config.rows[3] = config.rows[5] = static_cast<uint8_t>(lower);
    configure_tiles(config);
  }
  ~RowTiles() { release_tiles(); }
};

// A block's byte rows in parts of one size, so that one making of the registers serves all. Where they do not come out even, the last
// part begins with rows of the one before, which nobody writes.
struct Parts {
  int64_t first, last, count, size;

  Parts(const Product& p, const Block& block)
      : first(block.first), last(block.last), count(block.num_parts(p, 2 * kTileRows)),
        size(num_tiles((last - first) / p.w->limbs, count) * p.w->limbs) {}

  int64_t begin(int64_t index) const { return std::min(first + index * size, last - size); }
  int64_t repeated() const { return count * size - (last - first); }
};

// One step of 16 quads: T row tiles times C panels, 1 x 4, 1 x 2 or 2 x 2. `panel`: bytes from a panel to the next, `half`: to the
// second half of them. `aside(part)` is called T · C times, before every product.
template <int T, int C, typename Aside>
OCTAVO_INLINE void dot_step(const TileBlock& block, const uint8_t* x, const int8_t* w, int64_t panel, int64_t half, Aside&& aside) {
  load_tile<6>(w, kTileBytes);
  load_tile<4>(x, block.x_stride);
  aside(0);
  dot_tiles<0, 4, 6>();
  load_tile<7>(w + (C == 4 ? panel : half), kTileBytes);
  aside(1);
  dot_tiles<1, 4, 7>();
  if constexpr (T == 2) {
    load_tile<5>(x + upper_rows(block.rows) * block.x_stride, block.x_stride);
    aside(2);
    dot_tiles<2, 5, 6>();
    aside(3);
    dot_tiles<3, 5, 7>();
  } else if constexpr (C == 4) {
    load_tile<6>(w + half, kTileBytes);
    aside(2);
    dot_tiles<2, 4, 6>();
    load_tile<7>(w + half + panel, kTileBytes);
    aside(3);
    dot_tiles<3, 4, 7>();
  }
}

// Fetching of weights into the second cache, a few lines at a time: more at once than the core can wait for would hold up the tiles
// too. Many streams take turns, since the processor reads ahead by itself in every page of 4 kB that it sees in use.
template <int T, int C>
class WeightFetch {
 public:
  // `next`: the panels that come next. `steps`: how many the current ones take.
  WeightFetch(const int8_t* next, int64_t half, int64_t half_bytes, int64_t steps)
      : next_(next), far_(next), half_(half), stride_(half_bytes / kStreams / kLine * kLine),
        left_(num_tiles(half_bytes / kStreams, kLine)), each_(left_), steps_(steps) {}

  // A part of what is fetched at a step. One row tile reads weights alone, in two or four streams, and has those of its next step
  // fetched; else what comes next is fetched all through the current panels.
  OCTAVO_INLINE void operator()(const TileBlock& block, int64_t quad, int part) {
    if constexpr (T == 1) near(block, quad + kTileQuads, part);
    else if (part == 0) far();
  }

 private:
  static constexpr int kLine = kPanel * kQuad, kParts = T * C;
  static constexpr int kStreams = 4;  // of each half

  OCTAVO_INLINE void near(const TileBlock& block, int64_t quad, int part) {
    const int8_t* from = quad < block.quads ? block.w + quad * kLine : next_ + (quad - block.quads) * kLine;
#pragma GCC unroll 8
    for (int line = part * kTileQuads / kParts; line < (part + 1) * kTileQuads / kParts; ++line)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) __builtin_prefetch(from + block.offset<C>(c) + line * kLine, 0, 2);
  }

  OCTAVO_INLINE void far() {
    for (due_ += each_; due_ >= steps_ && left_ > 0; due_ -= steps_, --left_, far_ += kLine)
#pragma GCC unroll 4
      for (int stream = 0; stream < kStreams; ++stream) {
        __builtin_prefetch(far_ + stream * stride_, 0, 2);
        __builtin_prefetch(far_ + stream * stride_ + half_, 0, 2);
      }
  }

  const int8_t *next_, *far_;
  int64_t half_, stride_, left_, each_, steps_, due_ = 0;
};

// The last quads [quad, last), fewer than a step: the columns are copied beside zeros.
template <int T, int C>
void dot_rest(const TileBlock& block, int64_t quad, int64_t last) {
  alignas(64) int8_t columns[C][kTileRows * kTileBytes] = {};
  const int64_t bytes = (last - quad) * kPanel * kQuad;
  for (int c = 0; c < C; ++c)
    std::memcpy(columns[c], block.w + block.offset<C>(c) + quad * kPanel * kQuad, static_cast<size_t>(bytes));
  dot_step<T, C>(block, block.x + quad * kQuad, columns[0], sizeof(columns[0]), C / 2 * sizeof(columns[0]), [](int) {});
}

// S of the block over the quads [first, last), to sums[rows][C · 16]. `aside(quad, part)`: see `dot_step`.
template <int T, int C, typename Aside>
OCTAVO_INLINE void sum_tiles(const TileBlock& block, int64_t first, int64_t last, int32_t* sums, Aside&& aside) {
  constexpr int64_t kStride = C * kPanel * sizeof(int32_t);
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  int64_t quad = first;
  for (; quad + kTileQuads <= last; quad += kTileQuads) {
    dot_step<T, C>(block, block.x + quad * kQuad, block.w + quad * kPanel * kQuad, block.panel_bytes(), block.half,
                   [&](int part) { aside(quad, part); });
  }
  if (quad < last) dot_rest<T, C>(block, quad, last);
  store_tile<0>(sums, kStride), store_tile<1>(sums + kPanel, kStride);
  if constexpr (T * C == 4) {
    int32_t* rest = T == 2 ? sums + upper_rows(block.rows) * C * kPanel : sums + 2 * kPanel;
    store_tile<2>(rest, kStride), store_tile<3>(rest + kPanel, kStride);
  }
}

// Sums of some rows and C panels that wait for their epilogue. It goes on a few tokens at a time between the products that come
// next, which leave the vector units idle. L byte rows a token. kGated: the second half of the panels are the gates' partners.
template <int C, int L, bool kGated>
class Epilogue {
 public:
  explicit Epilogue(const Product& p) : p_(p) {}

  // Byte rows [row, end) of `sums` [..][C · 16] are next, after what is left of those before.
  void begin(const int32_t* sums, int64_t row, int64_t end, int64_t panel) {
    finish();
    sums_ = sums, row_ = row, end_ = end, panel_ = panel;
  }

  void advance(int64_t rows) {
    const int64_t stop = std::min(end_, row_ + rows);
    if constexpr (kGated) gated(stop);
    else if (p_.w->zero_point == nullptr && (panel_ + C) * kPanel <= p_.w->out_features) whole(stop);
    else others(stop);
  }

  void finish() { advance(end_ - row_); }

 private:
  // What is the same for every row of C neighbouring panels whose zero points are 0: it waits in registers.
  struct Columns {
    i32x16 correction[C];
    f32x16 scale[C];

    OCTAVO_INLINE void read(const Int8Weights& w, int64_t column, int c) {
      correction[c] = load(w.correction + column), scale[c] = load(w.scale + column);
    }

    // t · sw · sx of a token
    OCTAVO_INLINE f32x16 value(const int32_t* sums, int c, float x_scale) const {
      f32x16 t = to_float(load(sums + c * kPanel) - correction[c]);
      if constexpr (L == 2) t = t * 256.0f + to_float(load(sums + (C + c) * kPanel) - correction[c]);
      return t * scale[c] * x_scale;
    }
  };

  OCTAVO_INLINE void whole(int64_t stop) {
    const int64_t outputs = p_.w->out_features, column = panel_ * kPanel;
    const float *bias = p_.w->bias, *residual = p_.residual;
    int64_t at = row_ / L * outputs + column;
    Columns columns;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) columns.read(*p_.w, column + c * kPanel, c);
    for (; row_ < stop; row_ += L, sums_ += L * C * kPanel, at += outputs)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        f32x16 y = columns.value(sums_, c, p_.x_scale[row_ / L]);
        if (bias != nullptr) y = y + load(bias + column + c * kPanel);
        if (residual != nullptr) y = y + load(residual + at + c * kPanel);
        store(p_.y + at + c * kPanel, y);
      }
  }

  // silu(gate) · up
  OCTAVO_INLINE void gated(int64_t stop) {
    constexpr int kHalf = C / 2;
    const int64_t width = p_.gates * kPanel, column = panel_ * kPanel;
    const float* bias = p_.w->bias;
    Columns columns;
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) columns.read(*p_.w, c / kHalf * width + column + c % kHalf * kPanel, c);
    for (; row_ < stop; row_ += L, sums_ += L * C * kPanel)
#pragma GCC unroll 2
      for (int c = 0; c < kHalf; ++c) {
        const int64_t gate_column = column + c * kPanel;
        const float x_scale = p_.x_scale[row_ / L];
        f32x16 gate = columns.value(sums_, c, x_scale), up = columns.value(sums_, kHalf + c, x_scale);
        if (bias != nullptr) gate = gate + load(bias + gate_column), up = up + load(bias + width + gate_column);
        store(p_.y + row_ / L * width + gate_column, silu(gate) * up);
      }
  }

  OCTAVO_INLINE void others(int64_t stop) {
    for (; row_ < stop; row_ += L, sums_ += L * C * kPanel)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const int64_t column = (panel_ + c) * kPanel;
        octavo::finish(p_, scaled<L>(p_, sums_ + c * kPanel, C * kPanel, row_, column, 0), row_ / L, column);
      }
  }

  const Product& p_;
  const int32_t* sums_ = nullptr;
  int64_t row_ = 0, end_ = 0, panel_ = 0;
};

OCTAVO_INLINE int64_t panel_size(const Product& p) { return quads_of(p.w->in_features) * kPanel * kQuad; }

OCTAVO_INLINE const int8_t* panel_of(const Product& p, int64_t panel) { return p.w->packed + panel * panel_size(p); }

// Bytes from the first half of C panels to the second, which are neighbours or the gates' partners.
template <int C>
OCTAVO_INLINE int64_t half_of(const Product& p) {
  return (p.gates > 0 ? p.gates : C / 2) * panel_size(p);
}

template <int C>
OCTAVO_INLINE TileBlock tile_block(const Product& p, int64_t row, int64_t rows, int64_t panel) {
  return {p.x + row * p.x_stride, p.x_stride, rows, panel_of(p, panel), quads_of(p.w->in_features), half_of<C>(p)};
}

// A block, C panels (gated: C / 2 and their partners) and a part of the rows at a time.
template <int T, int C, int L, bool kGated>
void multiply_columns(const Product& p, const Block& block) {
  constexpr int64_t kStep = kGated ? C / 2 : C;
  alignas(64) int32_t sums[2][T * kTileRows * C * kPanel];
  const Parts parts(p, block);
  const int64_t quads = quads_of(p.w->in_features), steps = std::max<int64_t>(1, quads / kTileQuads);
  const int64_t each = num_tiles(parts.size / L, steps) * L, end = block.panel + block.panels;
  Epilogue<C, L, kGated> epilogue(p);
  const RowTiles registers(parts.size);
  int turn = 0;
  for (int64_t panel = block.panel; panel < end; panel += kStep) {
    const int8_t* next = panel + kStep < end ? panel_of(p, panel + kStep) : block.next;
    WeightFetch<T, C> fetch(next, half_of<C>(p), C / 2 * panel_size(p), parts.count * steps);
    for (int64_t index = 0; index < parts.count; ++index, turn ^= 1) {
      const int64_t begin = parts.begin(index);
      const TileBlock part = tile_block<C>(p, begin, parts.size, panel);
      sum_tiles<T, C>(part, 0, quads, sums[turn], [&](int64_t quad, int aside) {
        fetch(part, quad, aside);
        if (aside == T * C - 1) epilogue.advance(each);
      });
      const int64_t repeated = index + 1 == parts.count ? parts.repeated() : 0;
      epilogue.begin(sums[turn] + repeated * C * kPanel, begin + repeated, begin + parts.size, panel);
    }
  }
  epilogue.finish();
}

// u of a group, added to those before it in `total`; after the last group y.
template <int C, int L>
OCTAVO_INLINE void finish_group(const Product& p, int64_t row, int64_t rows, int64_t panel, int64_t group, const int32_t* sums,
                                float* total) {
  const int64_t groups = p.w->num_groups;
  for (int64_t r = 0; r < rows; r += L)
    for (int c = 0; c < C; ++c) {
      float* so_far = total + (r / L * C + c) * kPanel;
      f32x16 u = scaled<L>(p, sums + (r * C + c) * kPanel, C * kPanel, row + r, (panel + c) * kPanel, group);
      u = (group > 0 ? load(so_far) : f32x16{}) + u;
      if (group + 1 < groups) store(so_far, u);
      else finish(p, u, (row + r) / L, (panel + c) * kPanel);
    }
}

// The same with weights in groups, each of which has an epilogue of its own.
template <int T, int C, int L>
void multiply_groups(const Product& p, const Block& block) {
  alignas(64) int32_t sums[T * kTileRows * C * kPanel];
  alignas(64) float total[T * kTileRows / L * C * kPanel];
  const Parts parts(p, block);
  const int64_t groups = p.w->num_groups, quads = quads_of(p.w->in_features), each = quads / groups, end = block.panel + block.panels;
  const RowTiles registers(parts.size);
  for (int64_t panel = block.panel; panel < end; panel += C) {
    const int8_t* next = panel + C < end ? panel_of(p, panel + C) : block.next;
    const int64_t steps = parts.count * std::max<int64_t>(1, each / kTileQuads) * groups;
    WeightFetch<T, C> fetch(next, half_of<C>(p), C / 2 * panel_size(p), steps);
    for (int64_t index = 0; index < parts.count; ++index) {
      const int64_t begin = parts.begin(index), repeated = index + 1 == parts.count ? parts.repeated() : 0;
      const TileBlock part = tile_block<C>(p, begin, parts.size, panel);
      for (int64_t group = 0; group < groups; ++group) {
        sum_tiles<T, C>(part, group * each, (group + 1) * each, sums, [&](int64_t quad, int aside) { fetch(part, quad, aside); });
        finish_group<C, L>(p, begin + repeated, parts.size - repeated, panel, group, sums + repeated * C * kPanel, total);
      }
    }
  }
}

template <int T, int C>
void multiply_panels(const Product& p, const Block& block) {
  const bool two = p.w->limbs == 2;
  if (p.gates > 0) return (two ? multiply_columns<T, C, 2, true> : multiply_columns<T, C, 1, true>)(p, block);
  if (p.w->num_groups > 1) return (two ? multiply_groups<T, C, 2> : multiply_groups<T, C, 1>)(p, block);
  return (two ? multiply_columns<T, C, 2, false> : multiply_columns<T, C, 1, false>)(p, block);
}

// A block in tile registers. More than one tile of rows takes two panels at a time, fewer take four as long as there are four.
inline void multiply_in_tiles(const Product& p, const Block& block) {
  if (block.last - block.first > kTileRows) return multiply_panels<2, 2>(p, block);
  const int64_t four = p.gates > 0 ? 2 : 4, fours = block.panels / four * four;
  if (fours == block.panels) return multiply_panels<1, 4>(p, block);
  const int64_t rest = block.panel + fours;
  if (fours > 0) multiply_panels<1, 4>(p, {block.first, block.last, block.panel, fours, panel_of(p, rest)});
  multiply_panels<1, 2>(p, {block.first, block.last, rest, block.panels - fours, block.next});
}

}  // namespace octavo

#else

namespace octavo {
inline void multiply_in_tiles(const Product&, const Block&) {}  // no pool has tiles here
}  // namespace octavo

#endif
