// Norm and rotation of q and k heads, and the one writer of the cache. Rows are independent; two rows never share a
// slot.
#include <cmath>

#include "attention_state.h"

namespace octavo {
namespace {

struct Call {
  const float* qkv;
  float* q_out;
  const float* cos_sin;
  const int32_t* positions;
  const int32_t* slots;
  int64_t num_heads;
  int64_t rotary_dim;
  const float* q_norm;
  const float* k_norm;
  double eps;
  const float* k_inverse;  // [kv_heads], 1 / static scale, or null: dynamic
  const float* v_inverse;
  CacheView cache;
};

// x [head_dim] → out: (x · f32(1 / sqrt(Σx² / D + eps))) · weight; Σ in eight float64 lanes folded left to right.
void normalize(const float* x, const float* weight, double eps, int64_t head_dim, float* out) {
  double lanes[8] = {};
  for (int64_t d = 0; d < head_dim; d += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += static_cast<double>(x[d + j]) * static_cast<double>(x[d + j]);
  double total = lanes[0];
  for (int j = 1; j < 8; ++j) total += lanes[j];
  const float inverse = static_cast<float>(1.0 / std::sqrt(total / static_cast<double>(head_dim) + eps));
  for (int64_t d = 0; d < head_dim; ++d) out[d] = (x[d] * inverse) * weight[d];
}

// x and out [head_dim]; pairs are (i, i + rotary_dim / 2).
void rotate(const float* x, const float* cos_sin, int64_t rotary_dim, int64_t head_dim, float* __restrict out) {
  const int64_t half = rotary_dim / 2;
  const float *cos = cos_sin, *sin = cos_sin + half;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = x[i] * cos[i] - x[i + half] * sin[i];
    out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
  }
  for (int64_t i = rotary_dim; i < head_dim; ++i) out[i] = x[i];
}

// x, readable to a multiple of 16 and zero there → int8 values and the scale of the row.
float quantize(const float* x, const float* static_inverse, int64_t head_dim, int8_t* q) {
  typedef int8_t i8x16 __attribute__((vector_size(16)));
  f32x16 top = {};
  float inverse = static_inverse == nullptr ? 0.0f : *static_inverse, scale = 0.0f;
  if (static_inverse == nullptr) {
    for (int64_t d = 0; d < head_dim; d += kLanes) top = max(top, abs(load(x + d)));
    const float a = max_lanes(top);
    inverse = inverse_of(a, 127.0f);
    scale = a / 127.0f;
  }
  for (int64_t d = 0; d < head_dim; d += kLanes) {
    const f32x16 scaled = min(max(load(x + d) * inverse, splat(-128.0f)), splat(127.0f));
    const i8x16 part = __builtin_convertvector(rint_int(scaled), i8x16);
    std::memcpy(q + d, &part, sizeof(part));
  }
  return scale;
}

// A token's first quad in K, and in V the quads that it is in.
char* k_at(const CacheView& cache, int64_t block, int64_t head, int64_t token) {
  return cache.k_block(block, head) + token / kPanel * cache.k_panel() + token % kPanel * kQuad;
}

char* v_at(const CacheView& cache, int64_t block, int64_t head, int64_t token) {
  return cache.v_block(block, head) + token / kQuad * cache.v_quad();
}

void write_int8(const Call& call, int64_t slot, int64_t head, const float* k, const float* v) {
  const CacheView& cache = call.cache;
  const int64_t block = slot / kBlock, token = slot % kBlock;
  alignas(64) int8_t q[kMaxHeadDim];
  int8_t* k_row = reinterpret_cast<int8_t*>(k_at(cache, block, head, token));
  const float k_scale = quantize(k, call.k_inverse == nullptr ? nullptr : call.k_inverse + head, cache.head_dim, q);
  for (int64_t d = 0; d < cache.head_dim; d += kQuad) std::memcpy(k_row + d * kPanel, q + d, kQuad);
  if (call.k_inverse == nullptr) cache.k_scale(block, head)[token] = k_scale;
  int8_t* v_row = reinterpret_cast<int8_t*>(v_at(cache, block, head, token)) + token % kQuad;
  const float v_scale = quantize(v, call.v_inverse == nullptr ? nullptr : call.v_inverse + head, cache.head_dim, q);
  for (int64_t d = 0; d < cache.head_dim; ++d) v_row[d * kQuad] = q[d];
  if (call.v_inverse == nullptr) cache.v_scale(block, head)[token] = v_scale;
}

template <typename T>
void write_float(const Call& call, int64_t slot, int64_t head, const float* k, const float* v) {
  const CacheView& cache = call.cache;
  const int64_t block = slot / kBlock, token = slot % kBlock;
  T* k_block = reinterpret_cast<T*>(cache.k_block(block, head)) + token;
  T* v_block = reinterpret_cast<T*>(cache.v_block(block, head)) + token * cache.width();
  for (int64_t d = 0; d < cache.head_dim; ++d) {
    k_block[d * kBlock] = narrow(k[d], static_cast<T*>(nullptr));
    v_block[d] = narrow(v[d], static_cast<T*>(nullptr));
  }
}

void write(const Call& call, int64_t slot, int64_t head, const float* k, const float* v) {
  switch (call.cache.type) {
    case kInt8:
      return write_int8(call, slot, head, k, v);
    case kFloat32:
      return write_float<float>(call, slot, head, k, v);
    case kBFloat16:
      return write_float<BFloat16>(call, slot, head, k, v);
    case kFloat16:
      return write_float<Float16>(call, slot, head, k, v);
  }
}

// The lines that an int8 row will be written to are asked for while its queries are rotated: one per quad of K, per 16 dimensions of V.
void fetch_slot(const Call& call, int64_t slot) {
  const CacheView& cache = call.cache;
  const int64_t block = slot / kBlock, token = slot % kBlock;
  for (int64_t head = 0; head < cache.kv_heads; ++head) {
    const char *k = k_at(cache, block, head, token), *v = v_at(cache, block, head, token);
    for (int64_t d = 0; d < cache.head_dim; d += kQuad) __builtin_prefetch(k + d * kPanel, 1);
    for (int64_t d = 0; d < cache.head_dim; d += kPanel) __builtin_prefetch(v + d * kQuad, 1);
  }
}

void run_row(const Call& call, int64_t row) {
  if (call.cache.type == kInt8) fetch_slot(call, call.slots[row]);
  const int64_t head_dim = call.cache.head_dim, kv_heads = call.cache.kv_heads;
  alignas(64) float normed[kMaxHeadDim], k[kMaxHeadDim + kLanes] = {}, v[kMaxHeadDim + kLanes] = {};
  const float* angles = call.cos_sin + call.positions[row] * call.rotary_dim;
  const float* x = call.qkv + row * (call.num_heads + 2 * kv_heads) * head_dim;
  float* q_out = call.q_out + row * call.num_heads * head_dim;
  for (int64_t head = 0; head < call.num_heads; ++head, x += head_dim, q_out += head_dim) {
    if (call.q_norm != nullptr) normalize(x, call.q_norm, call.eps, head_dim, normed);
    rotate(call.q_norm != nullptr ? normed : x, angles, call.rotary_dim, head_dim, q_out);
  }
  for (int64_t head = 0; head < kv_heads; ++head, x += head_dim) {
    if (call.k_norm != nullptr) normalize(x, call.k_norm, call.eps, head_dim, normed);
    rotate(call.k_norm != nullptr ? normed : x, angles, call.rotary_dim, head_dim, k);
    std::memcpy(v, x + kv_heads * head_dim, sizeof(float) * static_cast<size_t>(head_dim));
    write(call, call.slots[row], head, k, v);
  }
}

}  // namespace
}  // namespace octavo

using namespace octavo;

// qkv [M, (num_heads + 2 · kv_heads) · head_dim]; q_out [M, num_heads · head_dim]; positions, slots [M].
OCTAVO_API void octavo_rope_write(Pool* pool, const float* qkv, float* q_out, const float* cos_sin,
                                  const int32_t* positions, const int32_t* slots, int64_t num_rows, int64_t num_heads,
                                  int64_t rotary_dim, const float* q_norm, const float* k_norm, double eps,
                                  const float* k_inverse, const float* v_inverse, char* k, char* v, float* k_scales,
                                  float* v_scales, int64_t kv_heads, int64_t head_dim, int64_t type) {
  const Call call = {qkv,
                     q_out,
                     cos_sin,
                     positions,
                     slots,
                     num_heads,
                     rotary_dim,
                     q_norm,
                     k_norm,
                     eps,
                     k_inverse,
                     v_inverse,
                     {k, v, k_scales, v_scales, kv_heads, head_dim, static_cast<CacheType>(type)}};
  const int64_t step = num_rows >= 64 ? 16 : 1;  // neighbours in a prompt share cache lines: keep them on one thread
  parallel_for(pool, num_tiles(num_rows, step), [&](int64_t tile, int) {
    for (int64_t row = tile * step; row < std::min(num_rows, (tile + 1) * step); ++row) run_row(call, row);
  });
}
