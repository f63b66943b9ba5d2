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
template <class T>
void decode_blocks(const std::vector<BlockWeights>& blocks, Arena<T> arena, const float* cosine, const float* sine,
                   const T* x, T* y);

// Store k and v (B, H, D), row by row at the given strides, in the slots that the tables say.
template <class T, class From>
void append(const Arena<T>& arena, const From* k, const From* v, int64_t k_stride, int64_t v_stride) {
  const int64_t D = arena.head_dim;
  for (int64_t row = 0; row < arena.batch; row++) {
    if (!arena.active[row]) continue;
    for (int64_t head = 0; head < arena.kv_heads; head++) {
      const int64_t at = row * arena.slots + arena.slot[row * arena.table_stride + head];
      for (int64_t d = 0; d < D; d++) {
        arena.k[at * D + d] = Element<T>::put(Element<From>::get(k[row * k_stride + head * D + d]));
        arena.v[at * D + d] = Element<T>::put(Element<From>::get(v[row * v_stride + head * D + d]));
      }
      arena.pos[at] = arena.position[row];
    }
  }
}
