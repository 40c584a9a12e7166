// SPDX-License-Identifier: MIT
// All layers of a prepared FlowPokeTransformer for many queries, in one call.
//
// Queries do not see each other, so a tile of them goes through all layers by itself: what lies
// between the products stays in its thread's second cache, and the weights of a small model in the
// third. Built on the user's machine by fpt_model/native.py; the layers themselves are explained
// in fpt_model/model.py.
//
// B rows of t queries each, which see `seen` pokes; W width, H heads, E = W / H (HEAD_DIM), N image
// tokens. Arrays are contiguous; keys and values have the type T (WEIGHT, float or bfloat16),
// packed matrices C, all else is float.

#include "attention.h"

namespace {

constexpr int64_t TILE = 8 * ROWS;
static_assert(COLUMNS == 2);  // a panel of ffn_up is of values and gates

struct Layer {
  const float *self_norm, *cross_norm, *ffn_norm;  // [2, W]
  const float *self_scale, *cross_scale;           // [H]
  // packed: [W, 3 W], [W, W], [W, W], [W, W], [hidden, W]; self_alone is the product of the values'
  // and the output's matrix, and value and gate take turns in ffn_up [W, 2 hidden], LANES each
  const C *self_qkv, *self_out, *self_alone, *cross_q, *ffn_down, *ffn_up;
  const T *memory_k, *memory_v;  // [H, N, E]
  const T *poke_k, *poke_v;      // [B, H, room, E]
};

struct Shape {
  int64_t layers, batch, tokens, new_pokes, seen, room, heads, image_tokens, hidden, threads;
};  // new_pokes is 0: the layout is that of few_tokens.cpp

inline V silu(V x) {
  const V e = exp_of_negative(x < 0 ? x : -x);
  return x * (x < 0 ? e : V{} + 1) / (1 + e);
}

// One thread's: x [rows, W] of a tile, and what becomes of it. Its rows are queries, counted on from
// one row of the batch to the next.
struct Tile {
  const Shape& s;
  int64_t w, first = 0, rows = 0;
  std::vector<float> qkv, logits;
  std::vector<C> normed, attended, gated;
  Room room;

  explicit Tile(const Shape& shape)
      : s(shape), w(s.heads * E), qkv(TILE * 3 * w), logits(4 * (s.seen + 2 * LANES)),
        normed(TILE * w), attended(TILE * w), gated(TILE * s.hidden), room(s.image_tokens) {}

  // of blocks of ROWS; what is beyond the rows is computed and thrown away
  int64_t whole() const { return round_up(rows, ROWS); }

  // body(b, t, r, n): from the tile's row r on n rows are the queries from t of the batch's row b
  template <class Body>
  void each(Body body) const {
    int64_t b = first / s.tokens, t = first % s.tokens;
    for (int64_t r = 0, n; r < rows; r += n, ++b, t = 0) {
      n = std::min(rows - r, s.tokens - t);
      body(b, t, r, n);
    }
  }

  // body(r, angle): for each row, and where its cosines and sines for a head are
  template <class Body>
  void each_angle(int64_t h, Body body) const {
    each([&](int64_t b, int64_t t, int64_t r, int64_t n) {
      for (int64_t i = 0; i < n; ++i)
        body(r + i, ((b * s.heads + h) * s.tokens + t + i) * (E / 2));
    });
  }

  void norm(const float* x, const float* scales, const int64_t* camera_static) {
    each([&](int64_t b, int64_t, int64_t r, int64_t n) {
      for (const int64_t end = r + n; r < end; ++r)
        normalise(x + r * w, scales + camera_static[b] * w, w, &normed[r * w]);
    });
  }

  // x + a times a packed matrix [k, W]
  void add(float* x, const std::vector<C>& a, const C* matrix, int64_t k) {
    multiply(a.data(), whole(), k, matrix, k, w, [&](int64_t r, int64_t j, const V* v) {
      float* to = x + r * w + j;
      for (int c = 0; c < COLUMNS && r < rows; ++c)
        store(to + c * LANES, load(to + c * LANES) + v[c]);
    });
  }

  void self(const Layer& layer, float* x, const float* cos, const float* sin) {
    if (!s.seen) {  // each query has only itself to attend to
      add(x, normed, layer.self_alone, w);
      return;
    }
    multiply(normed.data(), whole(), w, layer.self_qkv, w, 3 * w,
             [&](int64_t r, int64_t j, const V* v) {
               for (int c = 0; c < COLUMNS; ++c) store(&qkv[r * 3 * w + j + c * LANES], v[c]);
             });
    for (int64_t h = 0; h < s.heads; ++h) {
      float* of_head = qkv.data() + h * E;
      each_angle(h, [&](int64_t r, int64_t at) {
        for (float* x : {of_head + r * 3 * w, of_head + r * 3 * w + w})
          rotate(x, layer.self_scale[h], cos + at, sin + at, x);
      });
      // in place of the queries: each is read before its result is there
      each([&](int64_t b, int64_t, int64_t r, int64_t n) {
        const int64_t map = (b * s.heads + h) * s.room * E;
        float* q = of_head + r * 3 * w;
        attend(n, q, layer.poke_k + map, layer.poke_v + map, s.seen, q + w, q + 2 * w, 3 * w,
               logits.data(), q);
      });
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < w; i += LANES) put(&attended[r * w + i], load(&qkv[r * 3 * w + i]));
    add(x, attended, layer.self_out, w);
  }

  void cross(const Layer& layer, float* x, const float* cos, const float* sin, const C* keys,
             const C* values) {
    multiply(normed.data(), whole(), w, layer.cross_q, w, w,
             [&](int64_t r, int64_t j, const V* v) {
               for (int c = 0; c < COLUMNS; ++c) store(&qkv[r * w + j + c * LANES], v[c]);
             });
    const int64_t packed = round_up(s.image_tokens, WIDE) * E;
    for (int64_t h = 0; h < s.heads; ++h) {
      each_angle(h, [&](int64_t r, int64_t at) {
        rotate(&qkv[r * w + h * E], layer.cross_scale[h], cos + at, sin + at,
               &attended[r * w + h * E]);
      });
      for (int64_t block = 0; block < rows; block += ROWS)
        attend_packed(&attended[block * w + h * E], w, keys + h * packed, values + h * packed,
                      s.image_tokens, 1.0f, room, [&](int64_t r, int64_t j, const V* v) {
                        float* to = x + (block + r) * w + h * E + j;
                        for (int c = 0; c < COLUMNS && block + r < rows; ++c)
                          store(to + c * LANES, load(to + c * LANES) + v[c]);
                      });
    }
  }

  void feed_forward(const Layer& layer, float* x) {
    multiply(normed.data(), whole(), w, layer.ffn_up, w, 2 * s.hidden,
             [&](int64_t r, int64_t j, const V* v) {
               put(&gated[r * s.hidden + j / 2], v[0] * silu(v[1]));
             });
    add(x, gated, layer.ffn_down, s.hidden);
  }
};

}  // namespace

// How many rows and columns a panel pairs, for who packs the matrices: [PAIR, WIDE].
extern "C" void packing(int64_t* pair_and_wide) {
  pair_and_wide[0] = PAIR;
  pair_and_wide[1] = WIDE;
}

// x [B, t, W] is changed in place. cos, sin [B, H, t, E / 2]; camera_static [B].
extern "C" void run_layers(const Shape* shape, const Layer* layers, const float* cos,
                           const float* sin, const int64_t* camera_static, float* x) {
  const Shape& s = *shape;
  const int64_t w = s.heads * E, rows = s.batch * s.tokens;
  const int64_t wide = round_up(s.image_tokens, WIDE), maps = s.layers * s.heads;
  // as large as may be, and as many for each thread
  const int64_t tile = std::min(TILE, round_up((rows + s.threads - 1) / s.threads, ROWS));
  const Packed keys = packed(maps * E * wide), values = packed(maps * wide * E);

#pragma omp parallel num_threads(s.threads)
  {
#pragma omp for schedule(static)
    for (int64_t map = 0; map < maps; ++map) {
      const Layer& layer = layers[map / s.heads];
      const int64_t at = map % s.heads * s.image_tokens * E;
      for (int64_t first = 0; first < wide; first += WIDE)
        pack_columns(layer.memory_k + at + first * E, E, std::min(WIDE, s.image_tokens - first), E,
                     keys.get() + (map * wide + first) * E);
      pack_rows(layer.memory_v + at, E, s.image_tokens, wide, E, values.get() + map * wide * E);
    }

    Tile own(s);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < rows; first += tile) {
      own.first = first;
      own.rows = std::min(tile, rows - first);
      float* of_tile = x + first * w;
      for (int64_t l = 0; l < s.layers; ++l) {
        const Layer& layer = layers[l];
        const int64_t map = l * s.heads * E * wide;
        own.norm(of_tile, layer.self_norm, camera_static);
        own.self(layer, of_tile, cos, sin);
        own.norm(of_tile, layer.cross_norm, camera_static);
        own.cross(layer, of_tile, cos, sin, keys.get() + map, values.get() + map);
        own.norm(of_tile, layer.ffn_norm, camera_static);
        own.feed_forward(layer, of_tile);
      }
    }
  }
}
