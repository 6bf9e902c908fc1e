// Sampling of one token per row of logits, and log-probabilities. A row is one task; nothing passes between rows.
#include "operations.h"
#include "sampling_cut.h"
#include "sampling_math.h"

namespace octavo {
namespace {

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

void penalize(const SamplingRows& rows, int64_t row, int64_t size, float* z) {
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

// Where a row's exponentials are worked on.
struct Space {
  double* e;          // [size]: exp(z - top), 0 for tokens that are out
  double* sums;       // [chunks] of e
  Weighted* entries;  // [size]

  static int64_t chunks(int64_t size) { return num_tiles(size, kChunk); }
  static size_t bytes(int64_t size) { return static_cast<size_t>(size * 24 + chunks(size) * 8); }

  Space(char* memory, int64_t size) {
    e = reinterpret_cast<double*>(memory);
    sums = e + size;
    entries = reinterpret_cast<Weighted*>(sums + chunks(size));
  }
};

double sum_chunks(const Space& space, int64_t size) {
  double total = 0.0;
  for (int64_t chunk = 0; chunk * kChunk < size; ++chunk) {
    space.sums[chunk] = sum_chunk(space.e + chunk * kChunk, std::min(kChunk, size - chunk * kChunk));
    total += space.sums[chunk];
  }
  return total;
}

// Inverse CDF: chunk by chunk, then within the chunk.
int64_t draw(const Space& space, int64_t size, double u, double total) {
  const double target = u * total;
  double before = 0.0;
  int64_t last = 0;
  for (int64_t first = 0; first < size; first += kChunk) {
    const double weight = space.sums[first / kChunk];
    const int64_t stop = std::min(size, first + kChunk);
    if (weight <= 0.0) continue;
    double sum = before;
    for (int64_t i = first; i < stop && before + weight > target; ++i) {
      if (space.e[i] == 0.0) continue;
      sum += space.e[i];
      last = i;
      if (sum > target) return i;
    }
    before += weight;
  }
  // Rounding of the sums alone leads here: the last token that may be drawn.
  for (int64_t i = size; i-- > last;)
    if (space.e[i] > 0.0) return i;
  return last;
}

// How far below the top a token may lie that the shortest prefix of weight top_p · total holds: all tokens of less than
// (1 - top_p) / size of the whole together weigh less than what may be left out.
double depth_of(float top_p, double total, int64_t size) {
  const double least = (1.0 - static_cast<double>(top_p)) * total / static_cast<double>(size) * 0.999;
  return 1e-6 - std::log(std::min(least, 1.0));
}

constexpr double kDeepest = 709.0;  // exponentials are 0 beyond

int64_t sample_row(const SamplingRows& rows, int64_t row, float* z, int64_t size, const Space& space) {
  penalize(rows, row, size, z);
  const float highest = row_max(z, size), temperature = rows.temperature[row];
  if (highest == -INFINITY) return 0;
  const float top = highest / temperature;
  if (temperature <= 0.0f || !std::isfinite(top)) return argmax(z, size, highest);
  scale(z, size, temperature);
  exp_terms(z, size, top, space.e);
  const float top_p = std::max(rows.top_p[row], 0.0f), min_p = std::min(std::max(rows.min_p[row], 0.0f), 1.0f);
  const int32_t top_k = rows.top_k[row];
  if (top_k > 0 && top_k < size)
    apply_cut(find_cut<true>(z, space.e, size, kDeepest, top_k, space.entries), z, size, space.e);
  if (top_p < 1.0f) {
    const double total = sum_chunks(space, size), target = std::max(static_cast<double>(top_p) * total, 1e-300);
    apply_cut(find_cut<false>(z, space.e, size, depth_of(top_p, total, size), target, space.entries), z, size, space.e);
  }
  if (min_p > 0.0f)
    for (int64_t i = 0; i < size; ++i) space.e[i] = space.e[i] >= static_cast<double>(min_p) ? space.e[i] : 0.0;
  const double total = sum_chunks(space, size);
  return draw(space, size, uniform(rows.seed[row], rows.position[row]), total);
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

void sample_rows(Pool* pool, float* logits, int64_t* ids, int64_t num_rows, int64_t size, const SamplingRows& rows) {
  parallel_for(pool, num_rows, [&](int64_t row, int thread) {
    const Space space(pool->scratch(thread, Space::bytes(size)), size);
    ids[row] = sample_row(rows, row, logits + row * size, size, space);
  });
}

}  // namespace octavo

using namespace octavo;

// logits [B, V], changed in place -> ids [B]. The rest as in SamplingRows.
OCTAVO_API void octavo_sample(Pool* pool, float* logits, int64_t* ids, int64_t num_rows, int64_t size,
                              const float* temperature, const float* top_p, const int32_t* top_k, const float* min_p,
                              const int64_t* seed, const int64_t* position, const float* repetition,
                              const float* frequency, const float* presence, const int32_t* seen_start,
                              const int32_t* seen_ids, const int32_t* seen_counts, const int32_t* bias_start,
                              const int32_t* bias_ids, const float* bias_values) {
  sample_rows(pool, logits, ids, num_rows, size,
              {temperature, top_p, top_k, min_p, seed, position, repetition, frequency, presence, seen_start, seen_ids, seen_counts,
               bias_start, bias_ids, bias_values});
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
