// SPDX-License-Identifier: MIT
// Norms, and softmax attention of heads of E channels, for the C++ that is built on the user's
// machine by fpt_model/native.py: of a few rows to keys and values as they are, and of blocks of
// ROWS to packed ones.

#pragma once

#include "products.h"

namespace {

constexpr float EPS = 1e-6f;  // of all norms

// RMS norm of x [w] times scale [w]; out may be x.
template <class To>
inline void normalise(const float* x, const float* scale, int64_t w, To* out) {
  V squares{};
  for (int64_t i = 0; i < w; i += LANES) squares += load(x + i) * load(x + i);
  const float factor = 1 / std::sqrt(sum(squares) / w + EPS);
  for (int64_t i = 0; i < w; i += LANES) put(out + i, load(x + i) * factor * load(scale + i));
}

// Queries or keys x [E] get the length sqrt(|scale|) and are turned; see layers.rotated_cosine.
template <class To>
inline void rotate(const float* x, float scale, const float* cos, const float* sin, To* out) {
  V squares{};
  for (int64_t i = 0; i < E; i += LANES) squares += load(x + i) * load(x + i);
  const float factor = std::sqrt(std::fabs(scale) + EPS) / std::sqrt(sum(squares) + EPS);
  for (int64_t i = 0; i < E / 2; i += LANES) {
    const V a = load(x + i) * factor, b = load(x + i + E / 2) * factor;
    const V c = load(cos + i), s = load(sin + i);
    put(out + i, a * c - b * s);
    put(out + i + E / 2, b * c + a * s);
  }
}

// q [R, E] (apart by stride) to n keys and values [n, E], and, where own is given, to the row's own
// key and value. logits: room for R (n + LANES). Writes out [R, E], apart by stride.
template <int R>
inline void attend(const float* q, const T* k, const T* v, int64_t n, const float* own_k,
                   const float* own_v, int64_t stride, float* logits, float* out) {
  constexpr int PARTS = E / LANES;
  const int64_t apart = (n + LANES) / LANES * LANES;  // of two rows' logits
  V query[R][PARTS];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < PARTS; ++p) query[r][p] = load(q + r * stride + p * LANES);
  for (int64_t i = 0; i < n; ++i) {
    V key[PARTS];
    for (int p = 0; p < PARTS; ++p) key[p] = load(k + i * E + p * LANES);
    for (int r = 0; r < R; ++r) {
      V products = query[r][0] * key[0];
      for (int p = 1; p < PARTS; ++p) products += query[r][p] * key[p];
      logits[r * apart + i] = sum(products);
    }
  }
  float total[R];
  V sums[R][PARTS] = {};
  for (int r = 0; r < R; ++r) {
    float* own = logits + r * apart;
    int64_t end = n;
    if (own_k) {
      V products{};
      for (int p = 0; p < PARTS; ++p)
        products += query[r][p] * load(own_k + r * stride + p * LANES);
      own[end++] = sum(products);
    }
    for (; end < apart; ++end) own[end] = -std::numeric_limits<float>::infinity();
    const float most = largest(own, apart);
    V weights{};
    for (int64_t i = 0; i < apart; i += LANES) {
      const V x = exp_of_negative(load(own + i) - most);
      weights += x;
      store(own + i, x);
    }
    total[r] = sum(weights);
    if (own_k)
      for (int p = 0; p < PARTS; ++p) sums[r][p] += own[n] * load(own_v + r * stride + p * LANES);
  }
  for (int64_t i = 0; i < n; ++i) {
    V value[PARTS];
    for (int p = 0; p < PARTS; ++p) value[p] = load(v + i * E + p * LANES);
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < PARTS; ++p) sums[r][p] += logits[r * apart + i] * value[p];
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < PARTS; ++p) store(out + r * stride + p * LANES, sums[r][p] / total[r]);
}

// The same for any number of rows; four at a time share the reading of keys and values.
inline void attend(int64_t rows, const float* q, const T* k, const T* v, int64_t n,
                   const float* own_k, const float* own_v, int64_t stride, float* logits,
                   float* out) {
  auto some = [&](auto count, int64_t r) {
    constexpr int R = decltype(count)::value;
    const int64_t at = r * stride;
    attend<R>(q + at, k, v, n, own_k ? own_k + at : nullptr, own_v ? own_v + at : nullptr, stride,
              logits, out + at);
  };
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) some(std::integral_constant<int, 4>{}, r);
  for (; r + 2 <= rows; r += 2) some(std::integral_constant<int, 2>{}, r);
  for (; r < rows; ++r) some(std::integral_constant<int, 1>{}, r);
}

// Room for the logits and weights of a block of ROWS.
struct Room {
  std::vector<float> logits;
  std::vector<C> weights;
  explicit Room(int64_t keys) : logits(ROWS * round_up(keys, WIDE)), weights(logits.size()) {}
};

// q [ROWS, E] (apart by stride) to n packed keys [E, round_up(n, WIDE)] and values
// [round_up(n, WIDE), E]: out(r, j, values [COLUMNS]) as of a product.
template <class Out>
inline void attend_packed(const C* q, int64_t stride, const C* keys, const C* values, int64_t n,
                          float scale, Room& room, Out out) {
  const int64_t wide = round_up(n, WIDE);
  float* logits = room.logits.data();
  C* weights = room.weights.data();
  multiply(q, ROWS, stride, keys, E, wide, [&](int64_t r, int64_t j, const V* x) {
    for (int c = 0; c < COLUMNS; ++c) store(logits + r * wide + j + c * LANES, x[c] * scale);
  });
  float part[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    float* row = logits + r * wide;
    std::fill(row + n, row + wide, -std::numeric_limits<float>::infinity());
    const float top = largest(row, wide);
    V sums{};
    for (int64_t i = 0; i < wide; i += LANES) {
      const V logit = load(row + i) - top;
      const V x = HALVES ? exp_of_negative_roughly(logit) : exp_of_negative(logit);
      sums += x;
      put(weights + r * wide + i, x);
    }
    part[r] = 1 / sum(sums);
  }
  multiply(weights, ROWS, wide, values, wide, E, [&](int64_t r, int64_t j, const V* x) {
    V scaled[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) scaled[c] = x[c] * part[r];
    out(r, j, scaled);
  });
}

}  // namespace
