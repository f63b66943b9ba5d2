// One token per row through transformer blocks, without leaving C++ and with one start of the threads.
#pragma once

#include "linear.h"
#include "ragged_decode.h"

struct BlockWeights {
  std::vector<float> attention_norm, mlp_norm;
  std::vector<float> q_norm, k_norm;  // empty: none
  Matrix qkv, out, gate_up, down;
  float eps, qk_eps;
  int64_t window;  // 0: none
};

// Blocks of equal sizes; the arena's tables point at the first one's layer. x and y (B, E); cosine and sine (B, D / 2).
// A block whose qkv has rows for queries only stores nothing: it reads the region of another layer.
template <class T>
void decode_blocks(const std::vector<BlockWeights>& blocks, Arena<T> arena, const float* cosine, const float* sine,
                   const T* x, T* y);

// Heads (B, T, H, D) whose rows and tokens are so far apart.
template <class T>
struct Heads {
  const T* data;
  int64_t row_stride, token_stride;
};

// Store `tokens` keys and values per head of every active row in the slots that the table (B, L, H, T) says.
template <class T, class From>
void append(const Arena<T>& arena, int64_t tokens, const Heads<From>& k, const Heads<From>& v) {
  const int64_t D = arena.head_dim;
  for (int64_t row = 0; row < arena.batch; row++) {
    if (!arena.active[row]) continue;
    for (int64_t head = 0; head < arena.kv_heads; head++)
      for (int64_t token = 0; token < tokens; token++) {
        const int64_t at = row * arena.slots + arena.slot[row * arena.table_stride + head * tokens + token];
        const From* from_k = k.data + row * k.row_stride + token * k.token_stride + head * D;
        const From* from_v = v.data + row * v.row_stride + token * v.token_stride + head * D;
        for (int64_t d = 0; d < D; d++) {
          arena.k[at * D + d] = Element<T>::put(Element<From>::get(from_k[d]));
          arena.v[at * D + d] = Element<T>::put(Element<From>::get(from_v[d]));
        }
        arena.pos[at] = arena.position[row] + int32_t(token);
      }
  }
}
