// Exact products of int16 rows with int8 columns: acc[r][n] += Σ_p a[r][2p] · b[p][n][0] + a[r][2p + 1] · b[p][n][1].
// Both products of attention are this one: q15 · K over pairs of head_dim, and p15 · V over pairs of tokens.
#pragma once

#include <type_traits>
#include <utility>

#include "common.h"

namespace octavo {

#ifdef __AVX512F__
constexpr int kDotRows = 6;  // 24 accumulators, 4 columns vectors, 1 broadcast: 29 of 32 registers
constexpr int kDotVectors = 4;
#else
constexpr int kDotRows = 4;  // 8 accumulators, 2 halves of a column vector: 12 of 16 registers with temporaries
constexpr int kDotVectors = 1;
#endif

OCTAVO_INLINE int32_t load_pair(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return pair;
}

#ifdef __AVX512F__
typedef __m512i DotVector;
constexpr int kDotParts = 1;  // registers of a column vector
typedef i32x16 DotInts;
typedef f32x16 DotFloats;
#else
typedef __m256i DotVector;
constexpr int kDotParts = 2;
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef i32x8 DotInts;
typedef f32x8 DotFloats;
#endif
constexpr int kDotLanes = kLanes / kDotParts;

OCTAVO_INLINE DotVector load_columns(const int8_t* p) {
#ifdef __AVX512F__
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}

OCTAVO_INLINE DotVector splat_pair(int32_t pair) {
#ifdef __AVX512F__
  return _mm512_set1_epi32(pair);
#else
  return _mm256_set1_epi32(pair);
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

// One stretch of the summed axis: `pairs` pairs of int16 in each row of a, and as many rows of columns in b. `ahead` is
// fetched into the cache in the shape of b: what will be read next, or b itself.
struct Stretch {
  const int16_t* a;
  const int8_t* b;
  const int8_t* ahead;
  int64_t pairs;
};

// `dots` with the registers spelled out: Sum counts the sums, Column the registers of a row.
template <int V, typename F, int... Sum, int... Column>
OCTAVO_INLINE void dots_of(const Stretch* stretches, int num_stretches, int64_t row_stride, int64_t b_stride, F&& f,
                           std::integer_sequence<int, Sum...>, std::integer_sequence<int, Column...>) {
  constexpr int kColumns = V * kDotParts;
  DotInts sums[] = {(static_cast<void>(Sum), DotInts{})...};
  for (int i = 0; i < num_stretches; ++i) {
    const int16_t* a = stretches[i].a;
    const int8_t *b = stretches[i].b, *ahead = stretches[i].ahead;
    for (int64_t p = stretches[i].pairs; p > 0; --p, a += 2, b += b_stride, ahead += b_stride) {
      __builtin_prefetch(ahead);
      if constexpr (kDotVectors > 2)
        if (b_stride > 64) __builtin_prefetch(ahead + 64);
      const DotVector columns[] = {load_columns(b + Column * static_cast<int>(sizeof(DotVector) / 2))...};
      ((sums[Sum] =
            dot_pairs(sums[Sum], splat_pair(load_pair(a + Sum / kColumns * row_stride)), columns[Sum % kColumns])),
       ...);
    }
  }
  (f(Sum / kColumns, Sum % kColumns, sums[Sum]), ...);
}

// Sums over all stretches for R rows, `row_stride` int16 apart, and V · 16 columns, `b_stride` bytes from pair to pair;
// then f(r, n, sums of row r in columns n · kDotLanes and on).
template <int R, int V, typename F>
OCTAVO_INLINE void dots(const Stretch* stretches, int num_stretches, int64_t row_stride, int64_t b_stride, F&& f) {
  dots_of<V>(stretches, num_stretches, row_stride, b_stride, static_cast<F&&>(f),
             std::make_integer_sequence<int, R * V * kDotParts>{}, std::make_integer_sequence<int, V * kDotParts>{});
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
