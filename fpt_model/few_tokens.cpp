// SPDX-License-Identifier: MIT
// All layers of a prepared FlowPokeTransformer for a few tokens, in one call.
//
// A pass of one query, or of one step of joint sampling, does little with each weight: what takes
// the time is reading them, and a hundred calls between. So each thread streams its rows of every
// matrix once, for all tokens, and what lies between stays in its caches. Built on the user's
// machine by fpt_model/native.py; the layers themselves are explained in fpt_model/model.py.
//
// B rows, t tokens each (P pokes, then queries), R = B t <= MOST_TOKENS, W width, H heads, E = W /
// H (HEAD_DIM), N image tokens. Arrays are contiguous; weights, keys and values have the type T
// (WEIGHT, float or bfloat16), all else is float.

#include "attention.h"

namespace {

constexpr int64_t AHEAD = 4096 / sizeof(T);

struct Layer {
  const float *self_norm, *cross_norm, *ffn_norm;  // [2, W]
  const float *self_scale, *cross_scale;           // [H]
  const T *self_qkv, *self_out, *cross_q;          // [3 W, W], [W, W], [W, W]
  const T *ffn_up, *ffn_down;                      // [2 hidden, W], [W, hidden]
  const T *memory_k, *memory_v;                    // [H, N, E]
  T *poke_k, *poke_v;                              // [B, H, room, E]
};

struct Shape {
  int64_t layers, batch, tokens, pokes, known, room, heads, image_tokens, hidden, threads;
  int64_t width() const { return heads * E; }
  int64_t rows() const { return batch * tokens; }
};

// A step of a product takes this many elements of a matrix's row, as two vectors: the two halves of
// floats, and of bfloat16 the even ones and the odd ones, which takes the fewest instructions.
constexpr int STEP = 2 * LANES;
inline void load_step(const float* p, V& a, V& b) {
  a = load(p);
  b = load(p + LANES);
}
inline void load_step(const bfloat16* p, V& a, V& b) {
  typedef uint32_t Um __attribute__((vector_size(64), aligned(2), may_alias));
  const Bits pairs = *reinterpret_cast<const Um*>(p);
  a = reinterpret_cast<V>(pairs << 16);
  b = reinterpret_cast<V>(pairs & 0xffff0000u);
}

// x [n] in the order of load_step, in room for n where that is another.
inline const float* in_steps(const float* x, int64_t, float*, const float*) { return x; }
inline const float* in_steps(const float* x, int64_t n, float* room, const bfloat16*) {
  for (int64_t i = 0; i < n; i += STEP)
    for (int j = 0; j < LANES; ++j) {
      room[i + j] = x[i + 2 * j];
      room[i + LANES + j] = x[i + 2 * j + 1];
    }
  return room;
}

// out(r, o, x[r] . w[o]) for the rows o in [begin, end) of a matrix, each read from memory once;
// for R rows of x, which are in_steps, or several times four.
template <int R, class Out>
inline void product(const T* w, const float* x, int64_t k, int64_t begin, int64_t end, Out out) {
  constexpr int GROUP = R < 4 ? R : 4;  // sums of so many, with four of the matrix, are registers
  static_assert(R % GROUP == 0);
  int64_t o = begin;
  auto some = [&](auto count) {
    constexpr int OUTPUTS = decltype(count)::value;
    for (int64_t first_row = 0; first_row < R; first_row += GROUP) {
      const float* input = x + first_row * k;
      V sums[OUTPUTS][GROUP] = {};
      for (int64_t i = 0; i < k; i += STEP) {
        V first[OUTPUTS], second[OUTPUTS];
        for (int c = 0; c < OUTPUTS; ++c) {
          const T* row = w + (o + c) * k + i;
          if (first_row == 0) __builtin_prefetch(row + AHEAD);
          load_step(row, first[c], second[c]);
        }
        for (int r = 0; r < GROUP; ++r) {
          const V a = load(input + r * k + i), b = load(input + r * k + i + LANES);
          for (int c = 0; c < OUTPUTS; ++c) {
            sums[c][r] += first[c] * a;
            sums[c][r] += second[c] * b;
          }
        }
      }
      for (int c = 0; c < OUTPUTS; ++c)
        for (int r = 0; r < GROUP; ++r) out(first_row + r, o + c, sum(sums[c][r]));
    }
    o += OUTPUTS;
  };
  while (o + 4 <= end) some(std::integral_constant<int, 4>{});
  while (o < end) some(std::integral_constant<int, 1>{});
}

// R is the number of rows, or more: those beyond are zeros.
template <int R>
void run(const Shape& s, const Layer* layers, const float* cos, const float* sin,
         const int64_t* camera_static, float* x) {
  const int64_t w = s.width(), rows = s.rows(), queries = s.tokens - s.pokes;
  const int64_t seen = s.known + s.pokes;
  std::vector<float> qkv(R * 3 * w), attended(R * w), gated(R * s.hidden);

#pragma omp parallel num_threads(s.threads)
  {
    const int64_t longest = std::max(seen, s.image_tokens);
    std::vector<float> normed(R * w), room(R * std::max(w, s.hidden)),
        logits(4 * (longest + 2 * LANES));

    // of x + more, where more is given
    auto norm = [&](const float* scales, const float* more) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* in = x + r * w;
        float* out = normed.data() + r * w;
        if (more) {
          for (int64_t i = 0; i < w; i += LANES)
            store(out + i, load(in + i) + load(more + r * w + i));
          in = out;
        }
        normalise(in, scales + camera_static[r / s.tokens] * w, w, out);
      }
    };
    auto stepped = [&](const std::vector<float>& rows_of_x) {
      return in_steps(rows_of_x.data(), rows_of_x.size(), room.data(), static_cast<T*>(nullptr));
    };
    // parts of the rows of a matrix; whole groups of four
    auto share = [&](int64_t n, auto body) {
#pragma omp for schedule(static)
      for (int64_t part = 0; part < s.threads; ++part) {
        const int64_t groups = n / 4;
        const int64_t end = part + 1 == s.threads ? n : 4 * (groups * (part + 1) / s.threads);
        body(4 * (groups * part / s.threads), end);
      }
    };

    for (int64_t l = 0; l < s.layers; ++l) {
      const Layer& layer = layers[l];

      norm(layer.self_norm, nullptr);
      share(3 * w, [&](int64_t begin, int64_t end) {
        product<R>(layer.self_qkv, stepped(normed), w, begin, end,
                   [&](int64_t r, int64_t o, float y) { qkv[r * 3 * w + o] = y; });
      });

#pragma omp for schedule(static)
      for (int64_t job = 0; job < s.batch * s.heads; ++job) {
        const int64_t b = job / s.heads, h = job % s.heads, first = b * s.tokens;
        float* q = qkv.data() + first * 3 * w + h * E;
        float *k = q + w, *v = q + 2 * w;
        T* poke_k = layer.poke_k + job * s.room * E;
        T* poke_v = layer.poke_v + job * s.room * E;
        for (int64_t t = 0; t < s.tokens; ++t) {
          const int64_t at = t * 3 * w, angle = ((b * s.heads + h) * s.tokens + t) * (E / 2);
          rotate(q + at, layer.self_scale[h], cos + angle, sin + angle, q + at);
          rotate(k + at, layer.self_scale[h], cos + angle, sin + angle, k + at);
          if (t < s.pokes)
            for (int64_t i = 0; i < E; ++i) {
              put(poke_k + (s.known + t) * E + i, k[at + i]);
              put(poke_v + (s.known + t) * E + i, v[at + i]);
            }
        }
        // in place of the queries: each row's is read before its result is written
        for (int64_t t = 0; t < s.pokes; ++t)
          attend(1, q + t * 3 * w, poke_k, poke_v, s.known + t + 1, nullptr, nullptr, 3 * w,
                 logits.data(), q + t * 3 * w);
        const int64_t at = s.pokes * 3 * w;
        if (queries)
          attend(queries, q + at, poke_k, poke_v, seen, k + at, v + at, 3 * w, logits.data(),
                 q + at);
        for (int64_t t = 0; t < s.tokens; ++t)
          std::copy_n(q + t * 3 * w, E, attended.data() + (first + t) * w + h * E);
      }

      share(w, [&](int64_t begin, int64_t end) {
        product<R>(layer.self_out, stepped(attended), w, begin, end,
                   [&](int64_t r, int64_t o, float y) {
                     if (r < rows) x[r * w + o] += y;
                   });
      });

      norm(layer.cross_norm, nullptr);
      const float* cross_input = stepped(normed);
#pragma omp for schedule(static)
      for (int64_t h = 0; h < s.heads; ++h) {
        float* q = attended.data() + h * E;
        product<R>(layer.cross_q, cross_input, w, h * E, (h + 1) * E,
                   [&](int64_t r, int64_t o, float y) { attended[r * w + o] = y; });
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t angle = ((r / s.tokens * s.heads + h) * s.tokens + r % s.tokens) * (E / 2);
          rotate(q + r * w, layer.cross_scale[h], cos + angle, sin + angle, q + r * w);
        }
        const int64_t image = h * s.image_tokens * E;
        attend(rows, q, layer.memory_k + image, layer.memory_v + image, s.image_tokens, nullptr,
               nullptr, w, logits.data(), q);
      }

      norm(layer.ffn_norm, attended.data());
      share(s.hidden, [&](int64_t begin, int64_t end) {
        const float* input = stepped(normed);
        product<R>(layer.ffn_up, input, w, begin, end,
                   [&](int64_t r, int64_t o, float y) { gated[r * s.hidden + o] = y; });
        product<R>(layer.ffn_up, input, w, s.hidden + begin, s.hidden + end,
                   [&](int64_t r, int64_t o, float y) {
                     gated[r * s.hidden + o - s.hidden] *= y / (1 + std::exp(-y));
                   });
      });
      share(w, [&](int64_t begin, int64_t end) {
        product<R>(layer.ffn_down, stepped(gated), s.hidden, begin, end,
                   [&](int64_t r, int64_t o, float y) {
                     if (r < rows) x[r * w + o] += attended[r * w + o] + y;
                   });
      });
    }
  }
}

}  // namespace

// x [R, W] is changed in place, and the new pokes' keys and values are written. cos, sin
// [B, H, t, E / 2]; camera_static [B].
extern "C" void run_layers(const Shape* shape, const Layer* layers, const float* cos,
                           const float* sin, const int64_t* camera_static, float* x) {
  const Shape& s = *shape;
  const int64_t rows = s.rows();
  if (rows <= 1) run<1>(s, layers, cos, sin, camera_static, x);
  else if (rows <= 2) run<2>(s, layers, cos, sin, camera_static, x);
  else if (rows <= 4) run<4>(s, layers, cos, sin, camera_static, x);
  else if (rows <= 8) run<8>(s, layers, cos, sin, camera_static, x);
  else run<MOST_TOKENS>(s, layers, cos, sin, camera_static, x);
}
