// SPDX-License-Identifier: MIT
// Vectors of floats and of bfloat16, for the C++ that is built on the user's machine by
// fpt_model/native.py: for heads of HEAD_DIM channels, and arrays of WEIGHT, float or bfloat16.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

namespace {

struct bfloat16 {
  uint16_t bits;
};

using T = WEIGHT;
constexpr int64_t E = HEAD_DIM;
constexpr int LANES = 16;
static_assert(E % (2 * LANES) == 0);

// The widest vectors; the compiler splits them where the processor's are narrower.
typedef float V __attribute__((vector_size(64)));
typedef float Vm __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float V8 __attribute__((vector_size(32)));
typedef float V4 __attribute__((vector_size(16)));

inline V load(const float* p) { return *reinterpret_cast<const Vm*>(p); }
inline V load(const bfloat16* p) {
  return reinterpret_cast<V>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits)
                             << 16);
}
inline void store(float* p, V v) { *reinterpret_cast<Vm*>(p) = v; }

inline float get(float x) { return x; }
inline float get(bfloat16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bfloat16* p, float x) {  // to the nearest, ties to even
  uint32_t u;
  std::memcpy(&u, &x, 4);
  p->bits = static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline float sum(V v) {
  V8 half[2];
  std::memcpy(half, &v, sizeof v);
  const V8 eight = half[0] + half[1];
  V4 quarter[2];
  std::memcpy(quarter, &eight, sizeof eight);
  const V4 four = quarter[0] + quarter[1];
  return (four[0] + four[1]) + (four[2] + four[3]);
}

// Of n floats, n a multiple of LANES.
inline float largest(const float* x, int64_t n) {
  V most = load(x);
  for (int64_t i = LANES; i < n; i += LANES) {
    const V other = load(x + i);
    most = other > most ? other : most;
  }
  float found = most[0];
  for (int i = 1; i < LANES; ++i) found = std::max(found, most[i]);
  return found;
}

// exp of x <= 0, relative error below 2e-7: 2^n times a polynomial of the rest in [-1/2, 1/2] bits.
inline V exp_of_negative(V x) {
  const V low = V{} - 87.0f;
  x = x > low ? x : low;
  const V y = x * 1.44269504f - 0.5f;
  const Ints n = __builtin_convertvector(y, Ints);  // towards zero, so the nearest whole number
  const V whole = __builtin_convertvector(n, V);
  // ln 2 in two parts, so that the rest is exact
  const V r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * reinterpret_cast<V>((n + 127) << 23);
}

// The same with a relative error below 8e-5, a 25th of bfloat16's rounding.
inline V exp_of_negative_roughly(V x) {
  const V low = V{} - 87.0f;
  const V y = (x > low ? x : low) * 1.44269504f;
  const Ints n = __builtin_convertvector(y - 0.5f, Ints);
  const V r = y - __builtin_convertvector(n, V);
  V p = r * 0.0551716694f + 0.242611131f;
  p = p * r + 0.693260986f;
  p = p * r + 0.999928073f;
  return p * reinterpret_cast<V>((n + 127) << 23);
}

}  // namespace
