// One int8 product as all its kernels see it, and the epilogue of the contract: each operation in float32, rounded on its own.
#pragma once

#include <algorithm>

#include "gemm.h"

namespace octavo {

struct Product {
  const Int8Weights* w;
  const Element* x;  // [rows][x_stride]
  int64_t x_stride;
  int64_t rows;            // tokens · limbs
  const float* x_scale;    // [tokens]
  const int32_t* row_sum;  // [rows][num_groups]: sum of q - zero point, or null
  const float* residual;   // [tokens][N], or null
  float* y;                // [tokens][N], gated [tokens][N / 2]
  bool tiles;              // in tile registers
  int64_t gates = 0;       // panels of gates, whose partners follow: y is silu(gate) · up; 0: none. Tiles alone
};

// A task: rows [first, last) times `panels` panels. `next`: panels that this thread will probably read after them. Its rows are cut
// into parts as equal as they get, no token cut.
struct Block {
  int64_t first, last, panel, panels;
  const int8_t* next;

  int64_t num_parts(const Product& p, int64_t most_rows) const { return num_tiles((last - first) / p.w->limbs, most_rows / p.w->limbs); }

  // The first row of a part.
  int64_t part(const Product& p, int64_t index, int64_t count) const {
    return first + (last - first) / p.w->limbs * index / count * p.w->limbs;
  }

  // A part's share of fetching what comes next.
  Ahead ahead(const Product& p, int64_t index, int64_t count) const {
    const int64_t quads = quads_of(p.w->in_features), bytes = panels * quads * kPanel * kQuad;
    return {next + bytes * index / count, bytes / count / quads};
  }
};

// The exact sums of one byte row and panel, zero points taken out.
OCTAVO_INLINE i32x16 exact_sum(const Product& p, const int32_t* sums, int64_t row, int64_t column, int64_t group) {
  const int64_t at = group * panels_of(p.w->out_features) * kPanel + column;
  i32x16 sum = load(sums) - load(p.w->correction + at);
  if (p.w->zero_point != nullptr) sum -= load(p.w->zero_point + at) * p.row_sum[row * p.w->num_groups + group];
  return sum;
}

// t · sw of the contract for one token and panel. `sums` is the token's first byte row; `step` leads to its second.
template <int L>
OCTAVO_INLINE f32x16 scaled(const Product& p, const int32_t* sums, int64_t step, int64_t row, int64_t column, int64_t group) {
  f32x16 t = to_float(exact_sum(p, sums, row, column, group));
  if constexpr (L == 2) t = t * 256.0f + to_float(exact_sum(p, sums + step, row + 1, column, group));
  return t * load(p.w->scale + group * panels_of(p.w->out_features) * kPanel + column);
}

// u · sx + b + residual to y; only the columns that exist.
OCTAVO_INLINE void finish(const Product& p, f32x16 u, int64_t token, int64_t column) {
  const int64_t outputs = p.w->out_features;
  const int64_t count = std::min<int64_t>(kPanel, outputs - column);
  if (count <= 0) return;
  const int64_t at = token * outputs + column;
  f32x16 y = u * p.x_scale[token];
  if (p.w->bias != nullptr) y = y + load(p.w->bias + column);
  if (count == kPanel) {
    if (p.residual != nullptr) y = y + load(p.residual + at);
    store(p.y + at, y);
  } else {
    if (p.residual != nullptr) y = y + load_part(p.residual + at, count);
    store_part(p.y + at, y, count);
  }
}

}  // namespace octavo
