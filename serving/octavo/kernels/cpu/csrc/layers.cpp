// Whole decoder layers, or a whole step to the sampled tokens, in one call: the same operations in the same order as one by one, on
// one workspace, so that a step neither returns to the interpreter (whose code and data no cache holds after all weights have passed)
// nor allocates between them. The structures are filled by layers.py, which has the same fields.
#include <algorithm>

#include "operations.h"

namespace octavo {
namespace {

// An int8 product and how its input is written.
struct Linear {
  const Int8Weights* weights;
  int64_t limbs;
  int64_t zero_point;
  float static_scale;  // 0: one scale a row
};

struct Layer {
  const float* attention_norm;
  const float* mlp_norm;
  const float* q_norm;  // or null
  const float* k_norm;
  Linear qkv, out, gate_up, down;
  double eps;
  int64_t num_heads, kv_heads, head_dim, window;
  float scale;
  const float* k_inverse;  // static cache scales, or null
  const float* v_inverse;
  char* k;
  char* v;
  float* k_scales;
  float* v_scales;
  int64_t cache_type;
};

struct Stack {
  const Layer* layers;
  int64_t num_layers;
  int64_t hidden;
  const float* cos_sin;
  int64_t rotary_dim;
};

// One step. Rows of `wanted` go on after the last layer's attention, to y.
struct Step {
  float* x;  // [rows][hidden]
  int64_t rows;
  const int32_t* query_start;
  const int32_t* block_tables;
  const int32_t* positions;
  const int32_t* slots;
  int64_t num_sequences;
  int64_t max_blocks;
  const int64_t* wanted;
  int64_t num_wanted;
  float* y;  // [num_wanted][hidden]
};

// Memory for one operation's input and output at a time. mlp_rows: rows of the MLP that it holds.
struct Workspace {
  uint8_t* bytes;
  float* row_scale;
  float* wide;
  float* q;
  float* heads;
  float* logits;
  int64_t mlp_rows;
};

// What follows the layers. `linear` has no weights where those are floats.
struct Head {
  const float* norm;
  Linear linear;
  const void* float_weights;
  int64_t float_type;
  const float* float_bias;
  double eps;
  int64_t vocabulary;
};

struct Sampling {
  int64_t* ids;
  SamplingRows rows;
};

struct Run {
  Pool* pool;
  const Stack& stack;
  const Step& step;
  const Workspace& memory;

  void norm(float* x, const float* weight, int64_t rows, double eps, const Linear& to) const {
    octavo_rms_norm(pool, x, nullptr, weight, eps, rows, stack.hidden, to.limbs, to.static_scale, to.zero_point, nullptr, memory.bytes,
                    memory.row_scale);
  }

  void multiply(const Linear& linear, int64_t rows, const float* residual, float* y) const {
    octavo_linear_int8(pool, linear.weights, memory.bytes, memory.row_scale, rows, linear.zero_point, residual, y);
  }

  // Keys and values of the step into the cache; queries to memory.q.
  void fill(const Layer& layer) const {
    norm(step.x, layer.attention_norm, step.rows, layer.eps, layer.qkv);
    multiply(layer.qkv, step.rows, nullptr, memory.wide);
    octavo_rope_write(pool, memory.wide, memory.q, stack.cos_sin, step.positions, step.slots, step.rows, layer.num_heads,
                      stack.rotary_dim, layer.q_norm, layer.k_norm, layer.eps, layer.k_inverse, layer.v_inverse, layer.k, layer.v,
                      layer.k_scales, layer.v_scales, layer.kv_heads, layer.head_dim, layer.cache_type);
  }

  void attend(const Layer& layer) const {
    octavo_attention(pool, memory.q, memory.heads, step.query_start, step.block_tables, step.positions, step.num_sequences,
                     step.max_blocks, layer.num_heads, layer.window, layer.scale, layer.k, layer.v, layer.k_scales, layer.v_scales,
                     layer.kv_heads, layer.head_dim, layer.cache_type);
  }

  // x += out(heads); x += mlp(x)
  void finish(const Layer& layer, const float* heads, float* x, int64_t rows) const {
    const Linear& out = layer.out;
    octavo_quantize(pool, heads, rows, out.weights->in_features, nullptr, out.limbs, out.static_scale, out.zero_point, memory.bytes,
                    memory.row_scale);
    multiply(out, rows, x, x);
    for (int64_t row = 0; row < rows; row += memory.mlp_rows)
      mlp(layer, x + row * stack.hidden, std::min(memory.mlp_rows, rows - row));
  }

  void mlp(const Layer& layer, float* x, int64_t rows) const {
    norm(x, layer.mlp_norm, rows, layer.eps, layer.gate_up);
    const Linear &down = layer.down;
    const int64_t width = down.weights->in_features;
    if (octavo_gated_int8(pool, layer.gate_up.weights, memory.bytes, memory.row_scale, rows, memory.wide)) {
      octavo_quantize(pool, memory.wide, rows, width, nullptr, down.limbs, down.static_scale, down.zero_point, memory.bytes, memory.row_scale);
    } else {
      multiply(layer.gate_up, rows, nullptr, memory.wide);
      octavo_silu_mul(pool, memory.wide, rows, width, down.limbs, down.static_scale, down.zero_point, nullptr, memory.bytes, memory.row_scale);
    }
    multiply(down, rows, x, x);
  }

  // Logits of step.y to memory.logits.
  void project(const Head& head) const {
    if (head.linear.weights != nullptr) {
      norm(step.y, head.norm, step.num_wanted, head.eps, head.linear);
      return multiply(head.linear, step.num_wanted, nullptr, memory.logits);
    }
    octavo_rms_norm(pool, step.y, nullptr, head.norm, head.eps, step.num_wanted, stack.hidden, 0, 0.0f, 0, memory.wide, nullptr, nullptr);
    octavo_linear_float(pool, memory.wide, head.float_weights, head.float_type, step.num_wanted, stack.hidden, head.vocabulary,
                        head.float_bias, nullptr, memory.logits);
  }

  // Wanted rows of `from` [..][width] to `to`.
  void gather(const float* from, int64_t width, float* to) const {
    for (int64_t i = 0; i < step.num_wanted; ++i)
      std::memcpy(to + i * width, from + step.wanted[i] * width, sizeof(float) * static_cast<size_t>(width));
  }

  void layers() const {
    for (int64_t index = 0; index < stack.num_layers; ++index) {
      const Layer& layer = stack.layers[index];
      const bool last = index + 1 == stack.num_layers;
      fill(layer);
      if (last && step.num_wanted == 0) return;
      attend(layer);
      if (!last) {
        finish(layer, memory.heads, step.x, step.rows);
        continue;
      }
      gather(step.x, stack.hidden, step.y);
      gather(memory.heads, layer.out.weights->in_features, memory.q);
      finish(layer, memory.q, step.y, step.num_wanted);
    }
  }
};

}  // namespace
}  // namespace octavo

using namespace octavo;

OCTAVO_API void octavo_run_layers(Pool* pool, const Stack* stack, const Step* step, const Workspace* memory) {
  Run{pool, *stack, *step, *memory}.layers();
}

// The layers, the head, and a token for each wanted row.
OCTAVO_API void octavo_run_step(Pool* pool, const Stack* stack, const Step* step, const Workspace* memory, const Head* head,
                                const Sampling* sampling) {
  const Run run{pool, *stack, *step, *memory};
  run.layers();
  run.project(*head);
  sample_rows(pool, memory->logits, sampling->ids, step->num_wanted, head->vocabulary, sampling->rows);
}
