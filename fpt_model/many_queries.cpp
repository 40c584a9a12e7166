// SPDX-License-Identifier: MIT
// Softmax attention of many queries, in one call.
//
// The logits of a few queries at a time stay in the first caches from the product with the keys to
// that with the values. Products are of bfloat16, with sums in float, where arrays are of it and
// the processor has them; else of float. Built on the user's machine by fpt_model/native.py.

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
constexpr int ROWS = 6, COLUMNS = 4;
#else
constexpr int ROWS = 4, COLUMNS = 1;
#endif
constexpr int64_t WIDE = COLUMNS * LANES;

// Apart are elements between two rows of E channels, two heads, two batches.
struct Array {
  int64_t batch, head, row;
};
struct Shape {
  int64_t batch, heads, queries, keys, threads;
  Array q, k, v;
};

// sums + one [PAIR] times many [LANES, PAIR]
inline V add_products(V sums, const C* one, const C* many) {
#if defined(__AVX512BF16__)
  if constexpr (HALVES) {
    int32_t pair;
    std::memcpy(&pair, one, sizeof pair);
    const __m512bh a = (__m512bh)_mm512_set1_epi32(pair), b = (__m512bh)_mm512_loadu_si512(many);
    return (V)_mm512_dpbf16_ps((__m512)sums, a, b);
  } else
#endif
    return sums + get(*one) * load(reinterpret_cast<const float*>(many));
}

template <class To>
inline void put(To* p, V v) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<To, bfloat16>) {
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &halves, sizeof halves);
  } else
#endif
    for (int i = 0; i < LANES; ++i) put(p + i, v[i]);
}

// out(r, j, sums) for the rows r and columns j.. of a [R, n] (rows apart by a_row) times b
// [n / PAIR, columns, PAIR], columns a multiple of B * LANES.
template <int R, int B, class Out>
inline void product(const C* a, int64_t a_row, const C* b, int64_t n, int64_t columns, Out out) {
  for (int64_t j = 0; j < columns; j += B * LANES) {
    V sums[R][B] = {};
    const C* step = b + j * PAIR;
    for (int64_t i = 0; i < n; i += PAIR, step += columns * PAIR)
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < B; ++c)
          sums[r][c] = add_products(sums[r][c], a + r * a_row + i, step + c * LANES * PAIR);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < B; ++c) out(r, j + c * LANES, sums[r][c]);
  }
}

inline void copy(float* to, float x) { *to = x; }
inline void copy(float* to, bfloat16 x) { *to = get(x); }
inline void copy(bfloat16* to, bfloat16 x) { *to = x; }

// Keys [WIDE, E] of which the first few are there, the others zeros, to [E / PAIR, n, PAIR].
void pack_keys(const T* k, int64_t row, int64_t few, int64_t n, C* out) {
  C all[WIDE][E] = {};
  for (int64_t i = 0; i < few; ++i)
    for (int64_t e = 0; e < E; ++e) copy(&all[i][e], k[i * row + e]);
  typedef std::conditional_t<HALVES, uint32_t, float> Unit;  // a pair, or one
  static_assert(sizeof(Unit) == PAIR * sizeof(C));
  for (int64_t e = 0; e < E; e += PAIR) {
    Unit column[WIDE];
    for (int64_t i = 0; i < WIDE; ++i) std::memcpy(column + i, &all[i][e], sizeof(Unit));
    std::memcpy(out + e * n, column, sizeof column);
  }
}

// Values [WIDE, E], the first few there, to [WIDE / PAIR, E, PAIR].
void pack_values(const T* v, int64_t row, int64_t few, C* out) {
  for (int64_t i = 0; i < WIDE; i += PAIR, out += E * PAIR) {
    C pair[PAIR][E] = {};
    for (int64_t j = 0; j < PAIR && i + j < few; ++j)
      for (int64_t e = 0; e < E; ++e) copy(&pair[j][e], v[(i + j) * row + e]);
    for (int64_t e = 0; e < E; ++e)
      for (int64_t j = 0; j < PAIR; ++j) out[e * PAIR + j] = pair[j][e];
  }
}

}  // namespace

// softmax(scale q k^T) v of q [B, H, Q, E] and k, v [B, H, N, E] to out [B, Q, H, E].
extern "C" void attend(const Shape* shape, const T* q, const T* k, const T* v, float scale,
                       T* out) {
  const Shape& s = *shape;
  const int64_t maps = s.batch * s.heads, chunks = (s.keys + WIDE - 1) / WIDE, n = chunks * WIDE;
  const int64_t blocks = (s.queries + ROWS - 1) / ROWS;
  constexpr int VALUES = E / LANES % COLUMNS == 0 ? COLUMNS : 2;  // vectors of a block of columns
  static_assert(E % (VALUES * LANES) == 0);
  // not initialised: who writes a page first has it near
  std::unique_ptr<C[]> keys(new C[maps * E * n]), values(new C[maps * n * E]);

#pragma omp parallel num_threads(s.threads)
  {
    auto at = [&](const Array& array, int64_t map) {
      return map / s.heads * array.batch + map % s.heads * array.head;
    };
#pragma omp for schedule(static)
    for (int64_t job = 0; job < maps * chunks; ++job) {
      const int64_t map = job / chunks, first = job % chunks * WIDE;
      const int64_t few = std::min(WIDE, s.keys - first);
      pack_keys(k + at(s.k, map) + first * s.k.row, s.k.row, few, n,
                keys.get() + map * E * n + first * PAIR);
      pack_values(v + at(s.v, map) + first * s.v.row, s.v.row, few,
                  values.get() + (map * n + first) * E);
    }

    std::vector<float> logits(ROWS * n);
    std::vector<C> weights(ROWS * n), own(ROWS * E);
#pragma omp for schedule(static)
    for (int64_t job = 0; job < maps * blocks; ++job) {
      const int64_t map = job / blocks, first = job % blocks * ROWS;
      const int64_t rows = std::min<int64_t>(ROWS, s.queries - first);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t e = 0; e < E; ++e)
          copy(&own[r * E + e], q[at(s.q, map) + (first + r) * s.q.row + e]);
      product<ROWS, COLUMNS>(own.data(), E, keys.get() + map * E * n, E, n,
                             [&](int r, int64_t j, V x) { store(&logits[r * n + j], x * scale); });
      float total[ROWS];
      for (int64_t r = 0; r < rows; ++r) {
        float* row = &logits[r * n];
        std::fill(row + s.keys, row + n, -std::numeric_limits<float>::infinity());
        const float top = largest(row, n);
        V sums{};
        for (int64_t i = 0; i < n; i += LANES) {
          const V x = exp_of_negative(load(row + i) - top);
          sums += x;
          put(&weights[r * n + i], x);
        }
        total[r] = sum(sums);
      }
      T* to = out + (map / s.heads * s.queries + first) * s.heads * E + map % s.heads * E;
      product<ROWS, VALUES>(weights.data(), n, values.get() + map * n * E, n, E,
                            [&](int r, int64_t j, V x) {
                              if (r < rows) put(to + r * s.heads * E + j, x / total[r]);
                            });
    }
  }
}
