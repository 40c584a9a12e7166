// SPDX-License-Identifier: MIT
// Softmax attention of many queries, in one call.
//
// The logits of a few queries at a time stay in the first caches from the product with the keys to
// that with the values. Built on the user's machine by fpt_model/native.py.

#include "attention.h"

namespace {

// Apart are elements between two rows of E channels, two heads, two batches.
struct Array {
  int64_t batch, head, row;
};
struct Shape {
  int64_t batch, heads, queries, keys, threads;
  Array q, k, v;
};

}  // namespace

// softmax(scale q k^T) v of q [B, H, Q, E] and k, v [B, H, N, E] to out [B, Q, H, E].
extern "C" void attend(const Shape* shape, const T* q, const T* k, const T* v, float scale,
                       T* out) {
  const Shape& s = *shape;
  const int64_t maps = s.batch * s.heads, wide = round_up(s.keys, WIDE);
  const int64_t panels = wide / WIDE, blocks = (s.queries + ROWS - 1) / ROWS;
  const Packed keys = packed(maps * E * wide), values = packed(maps * wide * E);

#pragma omp parallel num_threads(s.threads)
  {
    auto at = [&](const Array& array, int64_t map) {
      return map / s.heads * array.batch + map % s.heads * array.head;
    };
#pragma omp for schedule(static)
    for (int64_t job = 0; job < maps * (panels + 1); ++job) {
      const int64_t map = job / (panels + 1), panel = job % (panels + 1), first = panel * WIDE;
      if (panel == panels)
        pack_rows(v + at(s.v, map), s.v.row, s.keys, wide, E, values.get() + map * wide * E);
      else
        pack_columns(k + at(s.k, map) + first * s.k.row, s.k.row, std::min(WIDE, s.keys - first),
                     E, keys.get() + (map * wide + first) * E);
    }

    Room room(s.keys);
    std::vector<C> own(ROWS * E);
#pragma omp for schedule(static)
    for (int64_t job = 0; job < maps * blocks; ++job) {
      const int64_t map = job / blocks, first = job % blocks * ROWS;
      const int64_t rows = std::min<int64_t>(ROWS, s.queries - first);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t e = 0; e < E; ++e)
          copy(&own[r * E + e], q[at(s.q, map) + (first + r) * s.q.row + e]);
      T* to = out + (map / s.heads * s.queries + first) * s.heads * E + map % s.heads * E;
      attend_packed(own.data(), E, keys.get() + map * E * wide, values.get() + map * wide * E,
                    s.keys, scale, room, [&](int64_t r, int64_t j, const V* x) {
                      for (int c = 0; c < COLUMNS && r < rows; ++c)
                        put(to + r * s.heads * E + j + c * LANES, x[c]);
                    });
    }
  }
}
