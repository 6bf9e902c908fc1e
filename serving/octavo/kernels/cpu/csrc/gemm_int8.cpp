// The int8 product: exact integer tiles, then the epilogue of the contract in float32, each operation rounded on its own.
// A task is a block of columns times a block of rows; neither cut changes a bit, because every output is made by one tile
// over all of K with exact sums.
#include <algorithm>
#include <memory>

#include "gemm_tiles.h"
#include "product_int8.h"

namespace octavo {
namespace {

// Where a tile lies: byte rows and panels.
struct Place {
  int64_t row, panel;
  Ahead ahead;
};

template <int R, int C, int L, bool kOnce>
OCTAVO_INLINE void one_group(const Product& p, const Place& at, const Element* x, const int8_t* w) {
  alignas(64) int32_t sums[R * C * kPanel];
  const int64_t quads = quads_of(p.w->in_features);
  int8_tile<R, C, kOnce>(x, p.x_stride, w, quads, 0, quads, at.ahead, sums);
  for (int r = 0; r < R; r += L)
    for (int c = 0; c < C; ++c) {
      const int64_t column = (at.panel + c) * kPanel;
      const f32x16 u = scaled<L>(p, sums + (r * C + c) * kPanel, C * kPanel, at.row + r, column, 0);
      finish(p, u, (at.row + r) / L, column);
    }
}

template <int R, int C, int L, bool kOnce>
OCTAVO_INLINE void many_groups(const Product& p, const Place& at, const Element* x, const int8_t* w) {
  alignas(64) int32_t sums[R * C * kPanel];
  f32x16 total[R / L][C] = {};
  const int64_t quads = quads_of(p.w->in_features), each = quads / p.w->num_groups;
  for (int64_t group = 0; group < p.w->num_groups; ++group) {
    int8_tile<R, C, kOnce>(x, p.x_stride, w, quads, group * each, (group + 1) * each, at.ahead, sums);
    for (int r = 0; r < R; r += L)
      for (int c = 0; c < C; ++c) {
        const int64_t column = (at.panel + c) * kPanel;
        const int32_t* mine = sums + (r * C + c) * kPanel;
        total[r / L][c] = total[r / L][c] + scaled<L>(p, mine, C * kPanel, at.row + r, column, group);
      }
  }
  for (int r = 0; r < R; r += L)
    for (int c = 0; c < C; ++c) finish(p, total[r / L][c], (at.row + r) / L, (at.panel + c) * kPanel);
}

template <int R, int C, int L, bool kOnce>
void tile(const Product& p, const Place& at) {
  const Element* x = p.x + at.row * p.x_stride;
  const int8_t* w = p.w->packed + at.panel * quads_of(p.w->in_features) * kPanel * kQuad;
  if (p.w->num_groups == 1) one_group<R, C, L, kOnce>(p, at, x, w);
  else many_groups<R, C, L, kOnce>(p, at, x, w);
}

// Tokens are L byte rows. kOnce: no other tile reads these weights.
template <int C, bool kOnce>
void tile_of(const Product& p, const Place& at, int64_t rows) {
  const bool two = p.w->limbs == 2;
  if constexpr (kOnce) {
    switch (rows) {
      case 1: return tile<1, C, 1, kOnce>(p, at);
      case 2: return two ? tile<2, C, 2, kOnce>(p, at) : tile<2, C, 1, kOnce>(p, at);
      case 3: return tile<3, C, 1, kOnce>(p, at);
      default: break;
    }
  }
  if (rows == 4) return two ? tile<4, C, 2, kOnce>(p, at) : tile<4, C, 1, kOnce>(p, at);
  if constexpr (C == 2) {
    switch (rows) {
      case 5: return tile<5, C, 1, kOnce>(p, at);
      case 6: return two ? tile<6, C, 2, kOnce>(p, at) : tile<6, C, 1, kOnce>(p, at);
      case 7: return tile<7, C, 1, kOnce>(p, at);
      case 8: return two ? tile<8, C, 2, kOnce>(p, at) : tile<8, C, 1, kOnce>(p, at);
      default: break;
    }
  }
}

constexpr int64_t kFewestTileRows = 5;  // below, reading the weights takes longer than any products of them

// Rows [begin, end) of a block, all its panels. kOnce: no other rows read these weights.
template <bool kOnce>
void multiply_rows(const Product& p, const Block& block, int64_t begin, int64_t end, const Ahead& ahead) {
  const Place at = {begin, block.panel, ahead};
  if constexpr (kOnce)
    if (block.panels == 4) return tile_of<4, kOnce>(p, at, end - begin);
  tile_of<2, kOnce>(p, at, end - begin);
}

// In row tiles as equal as they get: several have four rows at least.
void multiply_block(const Product& p, const Block& block) {
  const int64_t count = block.num_parts(p, kMaxRows);
  if (count == 1) return multiply_rows<true>(p, block, block.first, block.last, {block.next, 0});
  for (int64_t index = 0; index < count; ++index)
    multiply_rows<false>(p, block, block.part(p, index, count), block.part(p, index + 1, count), block.ahead(p, index, count));
}

// Panels of a task. Few rows are read-bound: four, so four streams of weights. More rows are bound by arithmetic: 8 x 2 registers. In
// tiles eight, so that most epilogues run beside products, if there are enough tasks then.
int64_t task_width(const Pool& pool, const Product& p, int64_t panels) {
  constexpr int64_t kTasks = 8;  // a thread
  const int64_t narrow = p.rows <= (p.tiles ? kTileRows : 4) ? 4 : 2;
  return p.tiles && panels >= 8 * kTasks * pool.num_threads() ? 8 : narrow;
}

void multiply(Pool* pool, const Product& p) {
  const int64_t panels = p.gates > 0 ? p.gates : panels_of(p.w->out_features);
  const int64_t width = p.gates > 0 ? task_width(*pool, p, 2 * panels) / 2 : task_width(*pool, p, panels);
  const int64_t columns = num_tiles(panels, width);
  // A block of rows stays in the cache while all columns pass it: about a megabyte.
  const int64_t fits = std::max<int64_t>(64, (5 << 18) / p.x_stride);
  const int64_t row_blocks = num_tiles(p.rows, fits);
  const int64_t tokens = p.rows / p.w->limbs;
  const int64_t panel_bytes = quads_of(p.w->in_features) * kPanel * kQuad;
  parallel_for(pool, row_blocks * columns, [&](int64_t task, int) {
    const int64_t row_block = task / columns, panel = task % columns * width;
    const int64_t first = tokens * row_block / row_blocks * p.w->limbs;
    const int64_t last = tokens * (row_block + 1) / row_blocks * p.w->limbs;
    const int64_t next = std::min(panel + width, panels - width);
    const Block block = {first, last, panel, std::min(width, panels - panel), p.w->packed + std::max<int64_t>(next, 0) * panel_bytes};
    if (p.tiles) multiply_in_tiles(p, block);
    else multiply_block(p, block);
  });
}

// Whether the two halves of a product's outputs can meet in its epilogue.
bool can_gate(const Pool& pool, const Int8Weights& w, int64_t rows) {
  return pool.has_tiles() && rows >= kFewestTileRows && w.num_groups == 1 && w.zero_point == nullptr && w.out_features % (2 * kPanel) == 0;
}

// Sums of q - zero point over each group of each byte row.
std::unique_ptr<int32_t[]> sum_rows(Pool* pool, const Product& p, int32_t x_zero_point) {
  const int64_t groups = p.w->num_groups, size = p.w->in_features / groups;
  std::unique_ptr<int32_t[]> sums(new int32_t[p.rows * groups]);
  parallel_for(pool, p.rows, [&](int64_t row, int) {
    for (int64_t group = 0; group < groups; ++group) {
      const Element* x = p.x + row * p.x_stride + group * size;
      int32_t sum = 0;
      for (int64_t k = 0; k < size; ++k) sum += x[k];
      sums[row * groups + group] = sum - static_cast<int32_t>(size) * (128 + x_zero_point);
    }
  });
  return sums;
}

#ifdef __AVX512VNNI__
const Element* widened(Pool*, const uint8_t* x, int64_t, std::unique_ptr<Element[]>*) { return x; }
#else
const Element* widened(Pool* pool, const uint8_t* x, int64_t bytes, std::unique_ptr<Element[]>* memory) {
  constexpr int64_t kEach = 1 << 14;
  memory->reset(new Element[bytes]);
  Element* to = memory->get();
  parallel_for(pool, num_tiles(bytes, kEach), [&](int64_t task, int) {
    for (int64_t k = task * kEach; k < std::min(bytes, (task + 1) * kEach); ++k) to[k] = x[k];
  });
  return to;
}
#endif

}  // namespace
}  // namespace octavo

// y [tokens, N] = x · Wᵀ with the epilogue of the contract. x is [tokens · limbs][K padded to 64] bytes.
OCTAVO_API void octavo_linear_int8(octavo::Pool* pool, const octavo::Int8Weights* weights, const uint8_t* x, const float* x_scale,
                                   int64_t tokens, int64_t x_zero_point, const float* residual, float* y) {
  using namespace octavo;
  const int64_t stride = row_stride(weights->in_features), rows = tokens * weights->limbs;
  std::unique_ptr<Element[]> memory;
  const bool tiles = pool->has_tiles() && rows >= kFewestTileRows;
  Product p{weights, widened(pool, x, rows * stride, &memory), stride, rows, x_scale, nullptr, residual, y, tiles};
  std::unique_ptr<int32_t[]> sums;
  if (weights->zero_point != nullptr) {
    sums = sum_rows(pool, p, static_cast<int32_t>(x_zero_point));
    p.row_sum = sums.get();
  }
  multiply(pool, p);
}

// The same with silu(gate) · up for y [tokens, N / 2], if both halves of the outputs can meet in the epilogue. False: not here.
OCTAVO_API bool octavo_gated_int8(octavo::Pool* pool, const octavo::Int8Weights* weights, const uint8_t* x, const float* x_scale,
                                  int64_t tokens, float* y) {
  using namespace octavo;
#ifdef __AVX512VNNI__
  const int64_t rows = tokens * weights->limbs;
  if (!can_gate(*pool, *weights, rows)) return false;
  multiply(pool, {weights, x, row_stride(weights->in_features), rows, x_scale, nullptr, nullptr, y, true, weights->out_features / (2 * kPanel)});
  return true;
#else
  return false;
#endif
}
