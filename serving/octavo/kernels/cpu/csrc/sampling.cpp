// Sampling of one token per row of logits, and log-probabilities. A row is one task; nothing passes between rows.
#include "sampling_cut.h"
#include "sampling_math.h"

namespace octavo {
namespace {

struct Rows {
  const float *temperature, *top_p;
  const int32_t* top_k;
  const float* min_p;
  const int64_t *seed, *position;
  const float *repetition, *frequency, *presence;
  const int32_t *seen_start, *seen_ids, *seen_counts;
  const int32_t *bias_start, *bias_ids;
  const float* bias_values;
};

uint64_t splitmix64(uint64_t x) {
  uint64_t z = x + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

double uniform(int64_t seed, int64_t position) {
  const uint64_t mixed = splitmix64(static_cast<uint64_t>(seed) + splitmix64(static_cast<uint64_t>(position)));
  return static_cast<double>(mixed >> 11) * 0x1p-53;
}

void penalize(const Rows& rows, int64_t row, int64_t size, float* z) {
  const float repetition = rows.repetition[row], frequency = rows.frequency[row], presence = rows.presence[row];
  for (int32_t i = rows.seen_start[row]; i < rows.seen_start[row + 1]; ++i) {
    const int64_t id = rows.seen_ids[i];
    if (id < 0 || id >= size) continue;
    const float count = static_cast<float>(rows.seen_counts[i]);
    float x = z[id] > 0.0f ? z[id] / repetition : z[id] * repetition;
    x -= frequency * count;
    z[id] = count > 0.0f ? x - presence : x;
  }
  for (int32_t i = rows.bias_start[row]; i < rows.bias_start[row + 1]; ++i) {
    const int64_t id = rows.bias_ids[i];
    if (id >= 0 && id < size) z[id] += rows.bias_values[i];
  }
}

int64_t argmax(const float* z, int64_t size, float top) {
  int64_t best = 0;
  for_above(z, size, top, [&](int64_t id) {
    best = id;
    return false;
  });
  return best;
}

// z / temperature in place; NaN becomes -inf.
void scale(float* z, int64_t size, float temperature) {
  for (int64_t i = 0; i < size; ++i) {
    const float x = z[i] / temperature;
    z[i] = x == x ? x : -INFINITY;
  }
}

// Inverse CDF over the whole row: chunk by chunk, then within the chunk.
int64_t draw_from_all(const float* z, int64_t size, float top, double u, double* sums) {
  double total = 0.0;
  for (int64_t chunk = 0; chunk * kChunk < size; ++chunk) {
    sums[chunk] = exp_sum_chunk(z + chunk * kChunk, std::min(kChunk, size - chunk * kChunk), top);
    total += sums[chunk];
  }
  const double target = u * total;
  double before = 0.0, e[kChunk];
  int64_t last = 0;
  for (int64_t chunk = 0; chunk * kChunk < size; ++chunk) {
    if (sums[chunk] <= 0.0) continue;
    const int64_t first = chunk * kChunk, count = std::min(kChunk, size - first);
    if (before + sums[chunk] > target || first + count == size) {
      exp_terms(z + first, count, top, e);
      double sum = before;
      for (int64_t i = 0; i < count; ++i) {
        if (e[i] == 0.0) continue;
        last = first + i;
        sum += e[i];
        if (sum > target) return last;
      }
    } else {
      last = first;
    }
    before += sums[chunk];
  }
  return last;
}

// Tokens that may still be drawn, ascending ids.
struct Kept {
  int32_t* ids;
  float* z;
  double* e;
  int64_t count;
};

void gather(const float* z, int64_t size, float bound, int64_t ties, Kept& kept) {
  kept.count = 0;
  for_above(z, size, bound, [&](int64_t id) {
    if (z[id] == bound && ties-- <= 0) return true;
    kept.ids[kept.count] = static_cast<int32_t>(id);
    kept.z[kept.count++] = z[id];
    return true;
  });
}

// A bound that no token needed by `row` lies below: (1 − top_p) of the whole shared by all tokens is the least that
// counts.
float lowest_needed(int64_t size, float top, float top_p, float min_p, double total) {
  double least = 0.0;
  if (top_p < 1.0f) least = (1.0 - static_cast<double>(top_p)) * total / static_cast<double>(size);
  least = std::max(least, static_cast<double>(min_p)) * 0.999;
  const double bound = static_cast<double>(top) + std::log(std::min(least, 1.0)) - 1e-6;
  return std::nextafterf(static_cast<float>(bound), -INFINITY);
}

void keep_prefix(Kept& kept, float top, double target, const CutSpace& space) {
  const Cut cut = find_cut(kept.z, kept.e, kept.count, top, target, space);
  int64_t count = 0, ties = cut.ties;
  for (int64_t i = 0; i < kept.count; ++i) {
    if (kept.z[i] < cut.z || (kept.z[i] == cut.z && ties-- <= 0)) continue;
    kept.ids[count] = kept.ids[i];
    kept.e[count++] = kept.e[i];
  }
  kept.count = count;
}

int64_t draw(const Kept& kept, double min_e, double u) {
  double total = 0.0, sum = 0.0;
  int64_t last = kept.ids[0];
  for (int64_t i = 0; i < kept.count; ++i)
    if (kept.e[i] >= min_e) total += kept.e[i];
  for (int64_t i = 0; i < kept.count; ++i) {
    if (!(kept.e[i] >= min_e) || kept.e[i] == 0.0) continue;
    sum += kept.e[i];
    last = kept.ids[i];
    if (sum > u * total) break;
  }
  return last;
}

struct Space {
  Kept kept;
  CutSpace cut;

  static size_t bytes(int64_t size) { return static_cast<size_t>(kBuckets * 8 + size * (16 + 8 + 4 + 4) + 4096); }

  Space(char* memory, int64_t size) {
    cut.sums = reinterpret_cast<double*>(memory);
    cut.entries = reinterpret_cast<Weighted*>(cut.sums + kBuckets);
    kept.e = reinterpret_cast<double*>(cut.entries + size);
    kept.z = reinterpret_cast<float*>(kept.e + size);
    kept.ids = reinterpret_cast<int32_t*>(kept.z + size);
    kept.count = 0;
  }
};

int64_t sample_row(const Rows& rows, int64_t row, float* z, int64_t size, Space space) {
  penalize(rows, row, size, z);
  const float highest = row_max(z, size), temperature = rows.temperature[row];
  if (highest == -INFINITY) return 0;
  const float top = highest / temperature;
  if (temperature <= 0.0f || !std::isfinite(top)) return argmax(z, size, highest);
  scale(z, size, temperature);
  const double u = uniform(rows.seed[row], rows.position[row]);
  const float top_p = std::max(rows.top_p[row], 0.0f), min_p = std::min(std::max(rows.min_p[row], 0.0f), 1.0f);
  const bool few = rows.top_k[row] > 0 && rows.top_k[row] < size;
  if (!few && top_p >= 1.0f && min_p <= 0.0f) return draw_from_all(z, size, top, u, space.kept.e);
  double total = 0.0;
  Kept& kept = space.kept;
  if (few) {
    const Cut cut = find_cut(z, nullptr, size, top, static_cast<double>(rows.top_k[row]), space.cut);
    gather(z, size, cut.z, cut.ties, kept);
  } else {
    if (top_p < 1.0f) total = exp_sum(z, size, top);
    gather(z, size, lowest_needed(size, top, top_p, min_p, total), size, kept);
  }
  exp_terms(kept.z, kept.count, top, kept.e);
  for (int64_t i = 0; few && i < kept.count; ++i) total += kept.e[i];
  if (top_p < 1.0f) keep_prefix(kept, top, std::max(static_cast<double>(top_p) * total, 1e-300), space.cut);
  return draw(kept, static_cast<double>(min_p), u);
}

// The num_top largest, ties by lower id: a later one must be larger to enter.
void find_top(const float* z, int64_t size, int64_t num_top, int64_t* ids) {
  int64_t count = 0;
  const auto insert = [&](int64_t id) {
    int64_t place = count < num_top ? count++ : count - 1;
    for (; place > 0 && z[id] > z[ids[place - 1]]; --place) ids[place] = ids[place - 1];
    ids[place] = id;
  };
  for (int64_t id = 0; id < num_top; ++id) insert(id);
  int64_t id = num_top;
  for (; num_top > 0 && id < size; ++id) {
    if (id % kLanes == 0)
      while (id + kLanes <= size && lanes_above(z + id, z[ids[count - 1]]) == 0) id += kLanes;
    if (id < size && z[id] > z[ids[count - 1]]) insert(id);
  }
}

int64_t find_rank(const float* z, int64_t size, int64_t token) {
  int64_t rank = 1;
  for (int64_t id = 0; id < size; ++id) rank += z[id] > z[token] || (z[id] == z[token] && id < token);
  return rank;
}

}  // namespace
}  // namespace octavo

using namespace octavo;

// logits [B, V], changed in place -> ids [B]. The rest as in SamplingRows.
OCTAVO_API void octavo_sample(Pool* pool, float* logits, int64_t* ids, int64_t num_rows, int64_t size,
                              const float* temperature, const float* top_p, const int32_t* top_k, const float* min_p,
                              const int64_t* seed, const int64_t* position, const float* repetition,
                              const float* frequency, const float* presence, const int32_t* seen_start,
                              const int32_t* seen_ids, const int32_t* seen_counts, const int32_t* bias_start,
                              const int32_t* bias_ids, const float* bias_values) {
  const Rows rows = {temperature, top_p,      top_k,    min_p,       seed,       position, repetition, frequency,
                     presence,    seen_start, seen_ids, seen_counts, bias_start, bias_ids, bias_values};
  parallel_for(pool, num_rows, [&](int64_t row, int thread) {
    const Space space(pool->scratch(thread, Space::bytes(size)), size);
    ids[row] = sample_row(rows, row, logits + row * size, size, space);
  });
}

// logits [R, V], tokens [R] -> logprobs [R], ranks [R], top_ids and top_logprobs [R, num_top].
OCTAVO_API void octavo_logprobs(Pool* pool, const float* logits, const int64_t* tokens, float* logprobs, int64_t* ranks,
                                int64_t* top_ids, float* top_logprobs, int64_t num_rows, int64_t size,
                                int64_t num_top) {
  parallel_for(pool, num_rows, [&](int64_t row, int) {
    const float* z = logits + row * size;
    const float top = row_max(z, size);
    const double log_sum = std::log(exp_sum(z, size, top));
    const auto logprob = [&](int64_t id) {
      return static_cast<float>((static_cast<double>(z[id]) - static_cast<double>(top)) - log_sum);
    };
    logprobs[row] = logprob(tokens[row]);
    ranks[row] = find_rank(z, size, tokens[row]);
    find_top(z, size, num_top, top_ids + row * num_top);
    for (int64_t i = 0; i < num_top; ++i) top_logprobs[row * num_top + i] = logprob(top_ids[row * num_top + i]);
  });
}
