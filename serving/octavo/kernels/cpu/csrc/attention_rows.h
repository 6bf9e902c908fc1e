// Reductions of sixteen rows at once, in the lanes' order of `sum_lanes` and `max_lanes`: the same bits for a fifth of the
// shuffles, and no row waits for its own. AVX-512 alone.
#pragma once

#include "common.h"

#ifdef __AVX512F__

namespace octavo {

// Lanes of a and b side by side: per 128 bits (kBits 32) or whole quarters (kBits 128), chosen by the shuffle's constant.
template <int kBits, int kChoice>
OCTAVO_INLINE f32x16 choose_lanes(f32x16 a, f32x16 b) {
  const __m512 x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  if constexpr (kBits == 128) return reinterpret_cast<f32x16>(_mm512_maskz_shuffle_f32x4(0xffff, x, y, kChoice));
  else return reinterpret_cast<f32x16>(_mm512_maskz_shuffle_ps(0xffff, x, y, kChoice));
}

// Each quarter: op over the quarters of v, always lane i and lane i + width.
template <typename Op>
OCTAVO_INLINE f32x16 reduce_quarters(f32x16 v, Op&& op) {
  const f32x16 half = op(v, choose_lanes<128, 0x4e>(v, v));
  return op(half, choose_lanes<128, 0xb1>(half, half));
}

// How many rows a reduction of `count` reads.
OCTAVO_INLINE int64_t reduced_rows(int64_t count) { return count <= 4 ? 4 : kLanes; }

// Lane r: op over the lanes of row r, in the same order; of the first `count` rows, at least.
template <typename Op>
OCTAVO_INLINE f32x16 reduce_rows(const f32x16 (&rows)[kLanes], int64_t count, Op&& op) {
  f32x16 v[4];
  if (reduced_rows(count) == 4) {
#pragma GCC unroll 4
    for (int pos = 0; pos < 4; ++pos) v[pos] = reduce_quarters(rows[pos], op);
  } else {
#pragma GCC unroll 4
    for (int pos = 0; pos < 4; ++pos) {  // rows pos, pos + 4, pos + 8 and pos + 12 end in the four quarters
      const f32x16* r = rows + pos;
      const f32x16 a = op(choose_lanes<128, 0x44>(r[0], r[4]), choose_lanes<128, 0xee>(r[0], r[4]));
      const f32x16 b = op(choose_lanes<128, 0x44>(r[8], r[12]), choose_lanes<128, 0xee>(r[8], r[12]));
      v[pos] = op(choose_lanes<128, 0x88>(a, b), choose_lanes<128, 0xdd>(a, b));
    }
  }
  const f32x16 a = op(choose_lanes<32, 0x44>(v[0], v[1]), choose_lanes<32, 0xee>(v[0], v[1]));
  const f32x16 b = op(choose_lanes<32, 0x44>(v[2], v[3]), choose_lanes<32, 0xee>(v[2], v[3]));
  return op(choose_lanes<32, 0x88>(a, b), choose_lanes<32, 0xdd>(a, b));
}

OCTAVO_INLINE f32x16 max_rows(const f32x16 (&rows)[kLanes], int64_t count) {
  return reduce_rows(rows, count, [](f32x16 a, f32x16 b) { return max(a, b); });
}

OCTAVO_INLINE f32x16 sum_rows(const f32x16 (&rows)[kLanes], int64_t count) {
  return reduce_rows(rows, count, [](f32x16 a, f32x16 b) { return a + b; });
}

}  // namespace octavo

#endif
