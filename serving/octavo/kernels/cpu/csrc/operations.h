// The operations that layers.cpp strings together; each is described where it is defined.
#pragma once

#include "gemm.h"

namespace octavo {

// How rows of logits are sampled: the fields of SamplingRows in kernels/interface.py, in the order of sampling.py.
struct SamplingRows {
  const float *temperature, *top_p;
  const int32_t* top_k;
  const float* min_p;
  const int64_t *seed, *position;
  const float *repetition, *frequency, *presence;
  const int32_t *seen_start, *seen_ids, *seen_counts;
  const int32_t *bias_start, *bias_ids;
  const float* bias_values;
};

// logits [num_rows][size], changed in place -> ids [num_rows].
void sample_rows(Pool* pool, float* logits, int64_t* ids, int64_t num_rows, int64_t size, const SamplingRows& rows);

}  // namespace octavo

OCTAVO_API void octavo_rms_norm(octavo::Pool* pool, float* r, const float* add, const float* weight, double eps, int64_t rows,
                                int64_t width, int64_t limbs, float static_scale, int64_t zero_point, float* y, uint8_t* bytes,
                                float* scale);
OCTAVO_API void octavo_quantize(octavo::Pool* pool, const float* x, int64_t rows, int64_t width, const float* absmax, int64_t limbs,
                                float static_scale, int64_t zero_point, uint8_t* bytes, float* scale);
OCTAVO_API void octavo_silu_mul(octavo::Pool* pool, const float* gate_up, int64_t rows, int64_t width, int64_t limbs,
                                float static_scale, int64_t zero_point, float* y, uint8_t* bytes, float* scale);
OCTAVO_API void octavo_linear_int8(octavo::Pool* pool, const octavo::Int8Weights* weights, const uint8_t* x, const float* x_scale,
                                   int64_t tokens, int64_t x_zero_point, const float* residual, float* y);
OCTAVO_API bool octavo_gated_int8(octavo::Pool* pool, const octavo::Int8Weights* weights, const uint8_t* x, const float* x_scale,
                                  int64_t tokens, float* y);
OCTAVO_API void octavo_linear_float(octavo::Pool* pool, const float* x, const void* w, int64_t type, int64_t rows, int64_t inputs,
                                    int64_t outputs, const float* bias, const float* residual, float* y);
OCTAVO_API void octavo_rope_write(octavo::Pool* pool, const float* qkv, float* q_out, const float* cos_sin, const int32_t* positions,
                                  const int32_t* slots, int64_t num_rows, int64_t num_heads, int64_t rotary_dim, const float* q_norm,
                                  const float* k_norm, double eps, const float* k_inverse, const float* v_inverse, char* k, char* v,
                                  float* k_scales, float* v_scales, int64_t kv_heads, int64_t head_dim, int64_t type);
OCTAVO_API void octavo_attention(octavo::Pool* pool, const float* q, float* out, const int32_t* query_start,
                                 const int32_t* block_tables, const int32_t* positions, int64_t num_sequences, int64_t max_blocks,
                                 int64_t num_heads, int64_t window, float scale, char* k, char* v, float* k_scales, float* v_scales,
                                 int64_t kv_heads, int64_t head_dim, int64_t type);
