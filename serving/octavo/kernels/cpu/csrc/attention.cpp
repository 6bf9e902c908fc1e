// Attention over the paged cache. Work is cut into units (a sequence, some kv heads, up to 64 or 128 query rows: tokens times
// heads); if there are too few units for the threads, a unit is cut into runs of whole segments whose partials are folded
// afterwards in order. Every row meets the same tiles and segments in the same order either way, so the cut never changes a
// bit. A unit takes its heads through a tile one after the other, as they lie in memory: the processor fetches long runs
// by itself, and an int8 cache is fetched ahead in four of them (attention_fetch.h).
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "attention_float.h"
#include "attention_tiles.h"

namespace octavo {
namespace {

struct Call {
  const float* q;
  float* out;
  const int32_t* query_start;
  const int32_t* block_tables;
  const int32_t* positions;
  int64_t max_blocks;
  int64_t num_sequences;
  int64_t num_heads;
  int64_t window;  // 0: none
  float scale;
  CacheView cache;

  int64_t group() const { return num_heads / cache.kv_heads; }
};

// Query rows [row, row + num_rows) of the step, all heads of kv heads [kv_head, kv_head + kv_heads), and the segments
// [first, last) one of them sees. Its rows are numbered kv head by kv head, in each token by token.
struct Unit {
  int64_t sequence;
  int64_t kv_head;
  int64_t kv_heads;
  int64_t row;
  int64_t num_rows;
  int64_t first_segment;
  int64_t last_segment;
  int64_t partials;  // index of its first partial, -1 if it is not cut

  int64_t rows(int64_t group) const { return kv_heads * num_rows * group; }
};

struct Part {
  int64_t unit;
  int64_t first_segment;
  int64_t last_segment;
  int64_t cost;
};

// Partials of cut units: [unit rows][segments] sums and outputs.
struct Partials {
  std::unique_ptr<Sum[]> sums;
  std::unique_ptr<float[]> out;
};

constexpr int64_t kSegment = kTile * kTilesPerSegment;
constexpr int64_t kTargetUnits = 4;   // per thread: fewer kv heads a unit before there are fewer units

// `target`: rows of a unit, enough that reading a tile costs nothing and few enough for the cache.
std::vector<Unit> make_units(const Call& call, int num_threads, int64_t target) {
  std::vector<Unit> units;
  const int64_t step = std::max<int64_t>(1, target / call.group()), kv_heads = call.cache.kv_heads;
  const int64_t spare = std::max<int64_t>(1, call.num_sequences * kv_heads / (kTargetUnits * num_threads));
  for (int64_t sequence = 0; sequence < call.num_sequences; ++sequence) {
    const int64_t stop = call.query_start[sequence + 1];
    for (int64_t row = call.query_start[sequence]; row < stop; row += step) {
      const int64_t num_rows = std::min(step, stop - row);
      const int64_t lowest = call.window == 0 ? 0 : std::max<int64_t>(0, call.positions[row] - call.window + 1);
      const int64_t last = call.positions[row + num_rows - 1] / kSegment + 1;
      const int64_t heads = std::max<int64_t>(1, std::min(spare, target / (num_rows * call.group())));
      for (int64_t head = 0; head < kv_heads; head += heads)
        units.push_back({sequence, head, std::min(heads, kv_heads - head), row, num_rows, lowest / kSegment, last, -1});
    }
  }
  return units;
}

// Cuts units that are too large for a fair share, longest parts first. Returns the number of partials needed.
int64_t make_parts(const Call& call, int num_threads, std::vector<Unit>& units, std::vector<Part>& parts) {
  int64_t total = 0, num_partials = 0;
  const auto weight = [&](const Unit& unit) { return unit.kv_heads * (unit.num_rows * call.group() + 8); };  // 8: reading
  for (const Unit& unit : units) total += weight(unit) * (unit.last_segment - unit.first_segment);
  const int64_t share = num_threads == 1 ? total : std::max<int64_t>(1, total / (4 * num_threads));
  for (size_t i = 0; i < units.size(); ++i) {
    Unit& unit = units[i];
    const int64_t segments = unit.last_segment - unit.first_segment;
    const int64_t cuts = std::min(segments, num_tiles(weight(unit) * segments, share));
    if (cuts > 1) {
      unit.partials = num_partials;
      num_partials += unit.rows(call.group()) * segments;
    }
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t first = unit.first_segment + segments * cut / cuts,
                    last = unit.first_segment + segments * (cut + 1) / cuts;
      parts.push_back({static_cast<int64_t>(i), first, last, weight(unit) * (last - first)});
    }
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.cost > b.cost; });
  return num_partials;
}

// One kv head's part of a tile of a unit; `head` counts within the unit.
struct Place {
  const Unit* unit;
  int64_t tile;
  int64_t head;
};

int64_t last_position(const Call& call, const Unit& unit) { return call.positions[unit.row + unit.num_rows - 1]; }

// Where a part begins to see something.
Place first_place(const Call& call, const Unit& unit, const Part& part) {
  const int64_t lowest = call.window == 0 ? 0 : std::max<int64_t>(0, call.positions[unit.row] - call.window + 1);
  return {&unit, std::max(part.first_segment * kTilesPerSegment, lowest / kTile), 0};
}

int64_t block_of(const Call& call, const Place& at, int half) {
  // past the table: nothing there is visible
  const int64_t index = std::min<int64_t>(at.tile * 2 + half, call.max_blocks - 1);
  return call.block_tables[at.unit->sequence * call.max_blocks + index];
}

int64_t tokens_seen(const Call& call, const Place& at) {
  return std::clamp<int64_t>(last_position(call, *at.unit) + 1 - at.tile * kTile, 0, kTile);
}

// The places whose keys and values are fetched while `at` is worked on. Scales of the values' place are fetched here.
TileView view_tile(const Call& call, const Place& at, const Place& next_k, const Place& next_v) {
  TileView view;
  view.next_k_tokens = tokens_seen(call, next_k), view.next_v_tokens = tokens_seen(call, next_v);
  for (int half = 0; half < 2; ++half) {
    const int64_t block = block_of(call, at, half), head = at.unit->kv_head + at.head;
    view.k[half] = call.cache.k_block(block, head);
    view.v[half] = call.cache.v_block(block, head);
    view.k_scale[half] = call.cache.k_scale(block, head);
    view.v_scale[half] = call.cache.v_scale(block, head);
    const int64_t next_block = block_of(call, next_v, half), next_head = next_v.unit->kv_head + next_v.head;
    view.next_k[half] = call.cache.k_block(block_of(call, next_k, half), next_k.unit->kv_head + next_k.head);
    view.next_v[half] = call.cache.v_block(next_block, next_head);
    if (call.cache.type != kInt8) continue;
    for (int token = 0; token < kBlock; token += kLanes) {
      __builtin_prefetch(call.cache.k_scale(next_block, next_head) + token);
      __builtin_prefetch(call.cache.v_scale(next_block, next_head) + token);
    }
  }
  return view;
}

const float* row_query(const Call& call, const Unit& unit, int64_t row) {
  const int64_t each = unit.num_rows * call.group(), in_head = row % each;
  const int64_t head = (unit.kv_head + row / each) * call.group() + in_head % call.group();
  return call.q + ((unit.row + in_head / call.group()) * call.num_heads + head) * call.cache.head_dim;
}

float* row_out(const Call& call, const Unit& unit, int64_t row) {
  return call.out + (row_query(call, unit, row) - call.q);
}

// The rows of a kv head that see something of the tile are neighbours, since positions ascend: [first, last), and their spans.
void find_spans(const Call& call, const Unit& unit, int64_t tile, RowState& state, int64_t* first, int64_t* last) {
  *first = *last = 0;
  for (int64_t row = 0; row < unit.num_rows * call.group(); ++row) {
    const int64_t low = call.window == 0 ? 0 : state.position[row] - call.window + 1 - tile * kTile;
    const int64_t high = state.position[row] + 1 - tile * kTile;
    if (high <= 0 || low >= kTile) {
      if (*last == 0) *first = row + 1;
      continue;
    }
    state.span[row] = {static_cast<int>(std::max<int64_t>(low, 0)), static_cast<int>(std::min<int64_t>(high, kTile))};
    *last = row + 1;
  }
}

// All kv heads of the unit; the next tile's first one comes after the last.
template <typename Tile>
void run_heads(const Call& call, const Unit& unit, int64_t tile, const Place& after, typename Tile::State& state) {
  int64_t first, last;  // of the first head; the others see the same
  find_spans(call, unit, tile, state, &first, &last);
  if (first >= last) return;
  const auto place = [&](int64_t head) {
    if (head < unit.kv_heads) return Place{&unit, tile, head};
    return Place{after.unit, after.tile, std::min(after.head + head - unit.kv_heads, after.unit->kv_heads - 1)};
  };
  const int64_t keys_ahead = std::min(Tile::kKeysAhead, unit.kv_heads);
  Tile::run_heads(state, call.cache, unit.kv_heads, [&](int64_t head) {
    const int64_t begin = head * unit.num_rows * call.group();
    if (begin > 0) std::copy(state.span + first, state.span + last, state.span + begin + first);
    return HeadTile{begin + first, begin + last, view_tile(call, place(head), place(head + keys_ahead), place(head + 1))};
  });
}

// `after`: what the thread reads once it is done.
template <typename Tile>
void run_part(const Call& call, const Unit& unit, const Part& part, const Place& after, const Partials& partials,
              typename Tile::State& state) {
  const int64_t rows = unit.rows(call.group()), width = call.cache.width(), head_dim = call.cache.head_dim;
  const int64_t segments = unit.last_segment - unit.first_segment;
  const int64_t last_seen = last_position(call, unit) / kTile;
  const int64_t last_tile = std::min(part.last_segment * kTilesPerSegment - 1, last_seen);
  [[maybe_unused]] const typename Tile::Registers registers(state, unit.num_rows * call.group());
  for (int64_t row = 0; row < rows; ++row) {
    state.position[row] = call.positions[unit.row + row / call.group() % unit.num_rows];
    state.segment[row] = state.total[row] = kNothing;
    Tile::prepare(state, row, row_query(call, unit, row), head_dim, call.scale);
  }
  for (int64_t segment = part.first_segment; segment < part.last_segment; ++segment) {
    for (int64_t tile = segment * kTilesPerSegment; tile < (segment + 1) * kTilesPerSegment; ++tile)
      if (tile <= last_seen) run_heads<Tile>(call, unit, tile, tile < last_tile ? Place{&unit, tile + 1, 0} : after, state);
    for (int64_t row = 0; row < rows; ++row) {
      float* out = state.segment_out + row * width;
      if (unit.partials >= 0) {
        const int64_t index = unit.partials + row * segments + segment - unit.first_segment;
        partials.sums[index] = state.segment[row];
        if (!is_empty(state.segment[row]))
          std::memcpy(&partials.out[index * width], out, sizeof(float) * static_cast<size_t>(width));
      } else if (!is_empty(state.segment[row])) {
        combine(state.total[row], state.total_out + row * width, state.segment[row], out, width);
      }
      state.segment[row] = kNothing;
    }
  }
}

void finish_row(const Sum& sum, const float* o, float* out, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const int64_t lanes = lanes_left(head_dim - d);
    store_part(out + d, load(o + d) / sum.l, lanes);
  }
}

// Folds the partials of a cut unit.
void fold_unit(const Call& call, const Unit& unit, const Partials& partials) {
  alignas(64) float out[kMaxHeadDim];
  const int64_t segments = unit.last_segment - unit.first_segment, width = call.cache.width();
  for (int64_t row = 0; row < unit.rows(call.group()); ++row) {
    Sum total = kNothing;
    for (int64_t i = unit.partials + row * segments; i < unit.partials + (row + 1) * segments; ++i)
      if (!is_empty(partials.sums[i])) combine(total, out, partials.sums[i], &partials.out[i * width], width);
    finish_row(total, out, row_out(call, unit, row), call.cache.head_dim);
  }
}

template <typename Tile>
void attend(Pool* pool, const Call& call) {
  std::vector<Unit> units = make_units(call, pool->num_threads(), Tile::kTargetRows);
  std::vector<Part> parts;
  const int64_t num_partials = make_parts(call, pool->num_threads(), units, parts);
  Partials partials;
  if (num_partials > 0) {
    partials.sums.reset(new Sum[num_partials]);
    partials.out.reset(new float[num_partials * call.cache.width()]);
  }
  const int64_t num_parts = static_cast<int64_t>(parts.size());
  parallel_for(pool, num_parts, [&](int64_t i, int thread) {
    using State = typename Tile::State;
    State& state = *reinterpret_cast<State*>(pool->scratch(thread, sizeof(State)));
    const Unit& unit = units[parts[i].unit];
    const Part& after = parts[std::min(i + 1, num_parts - 1)];
    run_part<Tile>(call, unit, parts[i], first_place(call, units[after.unit], after), partials, state);
    if (unit.partials >= 0) return;
    for (int64_t row = 0; row < unit.rows(call.group()); ++row)
      finish_row(state.total[row], state.total_out + row * call.cache.width(), row_out(call, unit, row), call.cache.head_dim);
  });
  if (num_partials == 0) return;
  parallel_for(pool, static_cast<int64_t>(units.size()), [&](int64_t i, int) {
    if (units[i].partials >= 0) fold_unit(call, units[i], partials);
  });
}

}  // namespace
}  // namespace octavo

using namespace octavo;

// q, out [M, num_heads · head_dim]; query_start [B + 1]; block_tables [B, max_blocks]; positions [M]. num_heads /
// kv_heads ≤ 128.
OCTAVO_API void octavo_attention(Pool* pool, const float* q, float* out, const int32_t* query_start,
                                 const int32_t* block_tables, const int32_t* positions, int64_t num_sequences,
                                 int64_t max_blocks, int64_t num_heads, int64_t window, float scale, char* k, char* v,
                                 float* k_scales, float* v_scales, int64_t kv_heads, int64_t head_dim, int64_t type) {
  const Call call = {q,
                     out,
                     query_start,
                     block_tables,
                     positions,
                     max_blocks,
                     num_sequences,
                     num_heads,
                     window,
                     scale,
                     {k, v, k_scales, v_scales, kv_heads, head_dim, static_cast<CacheType>(type)}};
  switch (type) {
    case kInt8:
      return pool->has_tiles() && head_dim % kTileBytes == 0 ? attend<TiledInt8>(pool, call) : attend<Int8Tile>(pool, call);
    case kFloat32:
      return attend<FloatTile<float>>(pool, call);
    case kBFloat16:
      return attend<FloatTile<BFloat16>>(pool, call);
    case kFloat16:
      return attend<FloatTile<Float16>>(pool, call);
  }
}
