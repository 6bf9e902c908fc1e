// Routing of tokens to experts and the weighted sum of what they return. Rows are independent; all sums run in a
// written order.
#include <algorithm>

#include "common.h"

namespace octavo {
namespace {

constexpr int64_t kRowsPerTile = 16;

// e[i] = exp(z[i] − max z) and the float32 rounding of their float64 sum in ascending order.
float softmax_terms(const float* z, int64_t num_experts, float* e) {
  f32x16 top = splat(-__builtin_inff());
  for (int64_t i = 0; i < num_experts; ++i) top[0] = std::max(top[0], z[i]);
  const float m = top[0];
  for (int64_t i = 0; i < num_experts; i += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, num_experts - i);
    store_part(e + i, exp(load_part(z + i, lanes) - m), lanes);
  }
  double total = 0.0;
  for (int64_t i = 0; i < num_experts; ++i) total += static_cast<double>(e[i]);
  return static_cast<float>(total);
}

// The top_k experts in descending logit; of equals the lower id comes first, since a later one must be larger to pass.
void select(const float* z, int64_t num_experts, int64_t top_k, int64_t* ids) {
  int64_t count = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    if (count == top_k && !(z[expert] > z[ids[count - 1]])) continue;
    int64_t place = count < top_k ? count++ : count - 1;
    for (; place > 0 && z[expert] > z[ids[place - 1]]; --place) ids[place] = ids[place - 1];
    ids[place] = expert;
  }
}

void route_row(const float* z, int64_t num_experts, int64_t top_k, bool renormalize, float* e, int64_t* ids,
               float* weights) {
  const float total = softmax_terms(z, num_experts, e);
  select(z, num_experts, top_k, ids);
  for (int64_t i = 0; i < top_k; ++i) weights[i] = e[ids[i]] / total;
  if (!renormalize) return;
  float sum = weights[0];
  for (int64_t i = 1; i < top_k; ++i) sum += weights[i];
  for (int64_t i = 0; i < top_k; ++i) weights[i] = weights[i] / sum;
}

void combine_row(const float* y, const float* weights, int64_t top_k, int64_t hidden, float* out) {
  for (int64_t h = 0; h < hidden; h += kLanes) {
    const int64_t lanes = std::min<int64_t>(kLanes, hidden - h);
    f32x16 sum = load_part(y + h, lanes) * weights[0];
    for (int64_t k = 1; k < top_k; ++k) sum = sum + load_part(y + k * hidden + h, lanes) * weights[k];
    store_part(out + h, sum, lanes);
  }
}

template <typename F>
void for_rows(Pool* pool, int64_t num_rows, F&& f) {
  parallel_for(pool, num_tiles(num_rows, kRowsPerTile), [&](int64_t tile, int thread) {
    const int64_t stop = std::min(num_rows, (tile + 1) * kRowsPerTile);
    for (int64_t row = tile * kRowsPerTile; row < stop; ++row) f(row, thread);
  });
}

}  // namespace
}  // namespace octavo

using namespace octavo;

// logits [M, E] -> ids, weights [M, top_k]; 1 ≤ top_k ≤ E.
OCTAVO_API void octavo_moe_route(Pool* pool, const float* logits, int64_t* ids, float* weights, int64_t num_rows,
                                 int64_t num_experts, int64_t top_k, int64_t renormalize) {
  for_rows(pool, num_rows, [&](int64_t row, int thread) {
    float* e = reinterpret_cast<float*>(pool->scratch(thread, sizeof(float) * static_cast<size_t>(num_experts)));
    route_row(logits + row * num_experts, num_experts, top_k, renormalize != 0, e, ids + row * top_k,
              weights + row * top_k);
  });
}

// expert_out [M, top_k, H], weights [M, top_k] -> out [M, H].
OCTAVO_API void octavo_moe_combine(Pool* pool, const float* expert_out, const float* weights, float* out,
                                   int64_t num_rows, int64_t top_k, int64_t hidden) {
  for_rows(pool, num_rows, [&](int64_t row, int) {
    combine_row(expert_out + row * top_k * hidden, weights + row * top_k, top_k, hidden, out + row * hidden);
  });
}
