// SPDX-License-Identifier: MIT
// Products of many rows with matrices that are packed for them, for the C++ that is built on the
// user's machine by fpt_model/native.py.
//
// A matrix [k, columns] lies in panels of WIDE columns, each [k / PAIR, WIDE, PAIR], so that a
// panel stays in the first cache while rows go by, ROWS at a time. Products are of bfloat16, with
// sums in float, where arrays are of it and the processor has them; else of float.

#pragma once

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512BF16__)
constexpr bool HALVES = std::is_same_v<T, bfloat16>;
#else
constexpr bool HALVES = false;
#endif
using C = std::conditional_t<HALVES, bfloat16, float>;  // what is multiplied
constexpr int PAIR = HALVES ? 2 : 1;  // products that one lane adds up in one step

// As many sums, with a step of a matrix beside them, are registers.
#if defined(__AVX512F__)
constexpr int ROWS = 12, COLUMNS = 2;
#else
constexpr int ROWS = 4, COLUMNS = 1;
#endif
constexpr int64_t WIDE = COLUMNS * LANES;
static_assert(E % WIDE == 0);

struct Free {
  void operator()(C* p) const { std::free(p); }
};
using Packed = std::unique_ptr<C[], Free>;

// Not initialised: who writes a page first has it near. Vectors do not cross cache lines.
inline Packed packed(int64_t n) {
  return Packed(static_cast<C*>(std::aligned_alloc(64, (n * sizeof(C) + 63) / 64 * 64)));
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// sums + one [PAIR] times many [LANES, PAIR]
inline V add_products(V sums, const C* one, const C* many) {
#if defined(__AVX512BF16__)
  if constexpr (HALVES) {
    int32_t pair;
    std::memcpy(&pair, one, sizeof pair);
    const __m512bh a = (__m512bh)_mm512_set1_epi32(pair), b = (__m512bh)_mm512_loadu_si512(many);
    return (V)_mm512_dpbf16_ps((__m512)sums, b, a);
  } else
#endif
    return sums + get(*one) * load(reinterpret_cast<const float*>(many));
}

template <class To>
inline void put(To* p, V v) {
  if constexpr (std::is_same_v<To, float>) {
    store(p, v);
    return;
  }
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<To, bfloat16>) {
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &halves, sizeof halves);
    return;
  }
#endif
  for (int i = 0; i < LANES; ++i) put(p + i, v[i]);
}

inline void copy(float* to, float x) { *to = x; }
inline void copy(float* to, bfloat16 x) { *to = get(x); }
inline void copy(bfloat16* to, bfloat16 x) { *to = x; }

// out(r, j, sums [COLUMNS]) for all rows r and each WIDE columns from j of a [rows, k] (rows apart
// by a_row) times the packed b [k, columns]. Rows are a multiple of ROWS, columns of WIDE.
template <class Out>
inline void multiply(const C* a, int64_t rows, int64_t a_row, const C* b, int64_t k,
                     int64_t columns, Out out) {
  for (int64_t j = 0; j < columns; j += WIDE, b += k * WIDE)
    for (int64_t first = 0; first < rows; first += ROWS) {
      V sums[ROWS][COLUMNS] = {};
      const C *one = a + first * a_row, *step = b;
      for (int64_t i = 0; i < k; i += PAIR, one += PAIR, step += WIDE * PAIR)
        for (int r = 0; r < ROWS; ++r)
          for (int c = 0; c < COLUMNS; ++c)
            sums[r][c] = add_products(sums[r][c], one + r * a_row, step + c * LANES * PAIR);
      for (int r = 0; r < ROWS; ++r) out(first + r, j, sums[r]);
    }
}

// A panel of the transposed w [columns, k] (rows apart by row), of which the first few columns are
// there, the others zeros; k is a multiple of PAIR.
inline void pack_columns(const T* w, int64_t row, int64_t few, int64_t k, C* out) {
  for (int64_t i = 0; i < k; i += PAIR, out += WIDE * PAIR)
    for (int64_t j = 0; j < WIDE; ++j)
      for (int64_t p = 0; p < PAIR; ++p) {
        if (j < few) copy(out + j * PAIR + p, w[j * row + i + p]);
        else out[j * PAIR + p] = C{};
      }
}

// All panels of v [k, columns] (rows apart by row), of which few rows are there, the others zeros;
// k is a multiple of PAIR.
inline void pack_rows(const T* v, int64_t row, int64_t few, int64_t k, int64_t columns, C* out) {
  for (int64_t first = 0; first < columns; first += WIDE)
    for (int64_t i = 0; i < k; i += PAIR, out += WIDE * PAIR)
      for (int64_t p = 0; p < PAIR; ++p)
        for (int64_t j = 0; j < WIDE; ++j) {
          if (i + p < few) copy(out + j * PAIR + p, v[(i + p) * row + first + j]);
          else out[j * PAIR + p] = C{};
        }
}

}  // namespace
