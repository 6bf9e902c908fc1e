// Row operations: embedding, absolute maximum, quantisation, RMS norm, SiLU. Tasks are rows; a row is always one task's alone.
#include <algorithm>
#include <cmath>

#include "quantize.h"

namespace octavo {
namespace {

// Where rows go: floats, or bytes and scales.
struct Output {
  Format format;
  float* y;        // [rows][width], limbs 0
  uint8_t* bytes;  // [rows · limbs][stride], limbs 1 or 2
  float* scale;    // [rows]
};

template <typename F>
void for_rows(Pool* pool, int64_t rows, int64_t width, F&& body) {
  const int64_t each = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, width));  // rows of a task
  parallel_for(pool, num_tiles(rows, each), [&](int64_t task, int thread) {
    for (int64_t row = task * each; row < std::min(rows, (task + 1) * each); ++row) body(row, thread);
  });
}

// A place for a finished float row: its own if the output is float, else scratch that `emit` quantises.
OCTAVO_INLINE float* staging(Pool* pool, const Output& out, int64_t row, int64_t width, int thread) {
  if (out.format.limbs == 0) return out.y + row * width;
  return reinterpret_cast<float*>(pool->scratch(thread, static_cast<size_t>(width + kLanes) * sizeof(float)));
}

OCTAVO_INLINE void emit(const Output& out, const float* x, int64_t row, int64_t width, const float* absmax) {
  if (out.format.limbs == 0) return;
  float largest = 0.0f;
  if (out.format.static_scale == 0.0f) largest = absmax != nullptr ? absmax[row] : row_absmax(x, width);
  quantize_row(x, width, out.format, largest, out.bytes + row * out.format.limbs * row_stride(width), out.scale + row);
}

// Sum of squares in float64: sixteen lanes, then a fixed tree.
OCTAVO_INLINE double sum_of_squares(const float* x, int64_t width) {
  f64x8 low = {}, high = {};
  for_lanes(x, width, [&](int64_t, f32x16 v) {
    f32x8 halves[2];
    std::memcpy(halves, &v, sizeof(v));
    const f64x8 a = __builtin_convertvector(halves[0], f64x8), b = __builtin_convertvector(halves[1], f64x8);
    low += a * a;
    high += b * b;
  });
  double lanes[8];
  low += high;
  std::memcpy(lanes, &low, sizeof(lanes));
  for (int step = 4; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// y = (r · inverse) · weight
OCTAVO_INLINE void scale_row(const float* r, const float* weight, float inverse, int64_t width, float* y) {
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) store(y + k, (load(r + k) * inverse) * load(weight + k));
  for (int64_t k = whole; k < width; ++k) y[k] = (r[k] * inverse) * weight[k];
}

OCTAVO_INLINE void add_row(float* r, const float* add, int64_t width) {
  for (int64_t k = 0; k < width; ++k) r[k] = r[k] + add[k];
}

OCTAVO_INLINE void silu_mul_row(const float* gate, int64_t width, float* y) {
  const float* up = gate + width;
  const int64_t whole = width / kLanes * kLanes, rest = width - whole;
  for (int64_t k = 0; k < whole; k += kLanes) store(y + k, silu(load(gate + k)) * load(up + k));
  if (rest > 0) store_part(y + whole, silu(load_part(gate + whole, rest)) * load_part(up + whole, rest), rest);
}

OCTAVO_INLINE float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }

OCTAVO_INLINE float bfloat_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float v;
  std::memcpy(&v, &wide, sizeof(v));
  return v;
}

}  // namespace
}  // namespace octavo

// ids [rows] -> y [rows, width]. type 0: a float32 table, 1: float16, 2: bfloat16. Ids were checked.
OCTAVO_API void octavo_embedding(octavo::Pool* pool, const int64_t* ids, const void* table, int64_t type, int64_t rows, int64_t width,
                                 float* y) {
  using namespace octavo;
  for_rows(pool, rows, width, [&](int64_t row, int) {
    const int64_t from = ids[row] * width;
    float* to = y + row * width;
    const auto* halves = static_cast<const uint16_t*>(table) + from;
    if (type == 0) std::memcpy(to, static_cast<const float*>(table) + from, sizeof(float) * static_cast<size_t>(width));
    else if (type == 1) for (int64_t k = 0; k < width; ++k) to[k] = half_to_float(halves[k]);
    else for (int64_t k = 0; k < width; ++k) to[k] = bfloat_to_float(halves[k]);
  });
}

OCTAVO_API void octavo_absmax(octavo::Pool* pool, const float* x, int64_t rows, int64_t width, float* y) {
  using namespace octavo;
  for_rows(pool, rows, width, [&](int64_t row, int) { y[row] = row_absmax(x + row * width, width); });
}

// absmax [rows] or null: each row's own.
OCTAVO_API void octavo_quantize(octavo::Pool* pool, const float* x, int64_t rows, int64_t width, const float* absmax, int64_t limbs,
                                float static_scale, int64_t zero_point, uint8_t* bytes, float* scale) {
  using namespace octavo;
  const Output out{{limbs, static_scale, zero_point}, nullptr, bytes, scale};
  for_rows(pool, rows, width, [&](int64_t row, int) { emit(out, x + row * width, row, width, absmax); });
}

// r [rows, width] += add, if there is one; then the norm of r to y or to bytes and scale.
OCTAVO_API void octavo_rms_norm(octavo::Pool* pool, float* r, const float* add, const float* weight, double eps, int64_t rows,
                                int64_t width, int64_t limbs, float static_scale, int64_t zero_point, float* y, uint8_t* bytes,
                                float* scale) {
  using namespace octavo;
  const Output out{{limbs, static_scale, zero_point}, y, bytes, scale};
  for_rows(pool, rows, width, [&](int64_t row, int thread) {
    float* x = r + row * width;
    if (add != nullptr) add_row(x, add + row * width, width);
    const double mean = sum_of_squares(x, width) / static_cast<double>(width);
    float* to = staging(pool, out, row, width, thread);
    scale_row(x, weight, static_cast<float>(1.0 / std::sqrt(mean + eps)), width, to);
    emit(out, to, row, width, nullptr);
  });
}

// gate_up [rows, 2 · width] -> silu(gate) · up to y or to bytes and scale.
OCTAVO_API void octavo_silu_mul(octavo::Pool* pool, const float* gate_up, int64_t rows, int64_t width, int64_t limbs,
                                float static_scale, int64_t zero_point, float* y, uint8_t* bytes, float* scale) {
  using namespace octavo;
  const Output out{{limbs, static_scale, zero_point}, y, bytes, scale};
  for_rows(pool, rows, width, [&](int64_t row, int thread) {
    float* to = staging(pool, out, row, width, thread);
    silu_mul_row(gate_up + row * 2 * width, width, to);
    emit(out, to, row, width, nullptr);
  });
}
