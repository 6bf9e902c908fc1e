// Exact products of int16 rows with panels of int8 columns: Σ_k a[r][k] · b[k][n]. Both products of attention are this one:
// q15 · K summed over head_dim, and p15 · V summed over tokens.
#pragma once

#include <type_traits>
#include <utility>

#include "common.h"

namespace octavo {

// A register of columns holds a quad of each, as int16; its sums are two a column, which meet at the end.
#ifdef __AVX512F__
typedef __m512i DotVector;
typedef i32x16 DotInts;
typedef f32x16 DotFloats;
constexpr int kDotRows = 6;  // 24 accumulators, 4 registers of columns, 1 of a row: 29 of 32
constexpr int kDotVectors = 2;
#else
typedef __m256i DotVector;
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef i32x8 DotInts;
typedef f32x8 DotFloats;
constexpr int kDotRows = 4;  // 8 accumulators, 2 registers of columns, 1 of a row: 11 of 16
constexpr int kDotVectors = 1;
#endif
constexpr int kDotLanes = static_cast<int>(sizeof(DotInts) / sizeof(int32_t));  // columns of two registers
constexpr int64_t kDotBytes = sizeof(DotVector) / 2;                            // of a register's columns

OCTAVO_INLINE DotVector load_columns(const int8_t* p) {
#ifdef __AVX512F__
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}

OCTAVO_INLINE DotVector splat_four(const int16_t* p) {
  int64_t quad;
  std::memcpy(&quad, p, sizeof(quad));
#ifdef __AVX512F__
  return _mm512_set1_epi64(quad);
#else
  return _mm256_set1_epi64x(quad);
#endif
}

// The sums have the element type of the instruction: as __m512i the compiler would copy them to and fro around each
// product.
OCTAVO_INLINE DotInts dot_pairs(DotInts sum, DotVector a, DotVector b) {
#ifdef __AVX512F__
  return reinterpret_cast<DotInts>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), a, b));
#else
  return sum + reinterpret_cast<DotInts>(_mm256_madd_epi16(a, b));
#endif
}

// The columns of a, then those of b: each is the sum of two neighbours.
OCTAVO_INLINE DotInts join_pairs(DotInts a, DotInts b) {
#ifdef __AVX512F__
  return __builtin_shuffle(a, b, DotInts{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +
         __builtin_shuffle(a, b, DotInts{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
#else
  const __m256i sums = _mm256_hadd_epi32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return reinterpret_cast<DotInts>(_mm256_permute4x64_epi64(sums, 0xd8));
#endif
}

// Bytes from a panel of columns to the next, and from a quad of the summed axis to the next.
struct Steps {
  int64_t panel;
  int64_t quad;

  // Where the columns from `column`, a multiple of kDotLanes, lie.
  OCTAVO_INLINE int64_t offset(int64_t column) const { return column / kPanel * panel + column % kPanel * kQuad; }
};

// One stretch of the summed axis: `quads` quads of int16 in each row of a, and of columns in b.
struct Stretch {
  const int16_t* a;
  const int8_t* b;
  int64_t quads;
};

// `dots` with the registers spelled out: Sum counts the sums, Column the registers of a quad, Result the results.
template <int V, typename Aside, typename F, int... Sum, int... Column, int... Result>
OCTAVO_INLINE void dots_of(const Stretch* stretches, int num_stretches, int64_t row_stride, Steps steps, Aside&& aside, F&& f,
                           std::integer_sequence<int, Sum...>, std::integer_sequence<int, Column...>,
                           std::integer_sequence<int, Result...>) {
  constexpr int kColumns = 2 * V;
  DotInts sums[] = {(static_cast<void>(Sum), DotInts{})...};
  for (int i = 0; i < num_stretches; ++i) {
    const int16_t* a = stretches[i].a;
    const int8_t* b = stretches[i].b;
    for (int64_t quad = stretches[i].quads; quad > 0; --quad, a += kQuad, b += steps.quad) {
      aside();
      const DotVector columns[] = {load_columns(b + Column / 2 * steps.panel + Column % 2 * kDotBytes)...};
      ((sums[Sum] = dot_pairs(sums[Sum], splat_four(a + Sum / kColumns * row_stride), columns[Sum % kColumns])), ...);
    }
  }
  (f(Result / V, Result % V, join_pairs(sums[2 * Result], sums[2 * Result + 1])), ...);
}

// Sums over all stretches for R rows, `row_stride` int16 apart, and V · kDotLanes columns (on AVX-512 V panels, on AVX2 half a
// panel); then f(r, v, sums of row r in columns v · kDotLanes and on). `aside()` is called at every quad.
template <int R, int V, typename Aside, typename F>
OCTAVO_INLINE void dots(const Stretch* stretches, int num_stretches, int64_t row_stride, Steps steps, Aside&& aside, F&& f) {
  dots_of<V>(stretches, num_stretches, row_stride, steps, aside, static_cast<F&&>(f), std::make_integer_sequence<int, R * V * 2>{},
             std::make_integer_sequence<int, V * 2>{}, std::make_integer_sequence<int, R * V>{});
}

// Calls f(std::integral_constant<int, n>) for the run-time n in [1, Max].
template <int Max, typename F>
OCTAVO_INLINE void with_constant(int64_t n, F&& f) {
  if constexpr (Max > 1) {
    if (n < Max) return with_constant<Max - 1>(n, static_cast<F&&>(f));
  }
  f(std::integral_constant<int, Max>{});
}

}  // namespace octavo
