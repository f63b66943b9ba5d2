// Attention of one query per row over KV heads of different lengths: tiles of fixed size, then their merge.
#pragma once

#include <vector>

#include "simd.h"

// The arena and its tables. Tables are (B, L, H); their pointers are already at the layer, `table_stride` is one row.
template <class T>
struct Arena {
  T *k, *v;
  int32_t* pos;
  const int32_t *slot, *offset, *length, *position;
  const bool* active;
  int64_t table_stride, slots;
  int64_t batch, kv_heads, group, head_dim;
  int64_t window;     // 0: none
  const float* bias;  // (B, slots), of a slot's scores; null: all 0
};

// One call for all rows and heads. Lay it out on one thread; then every thread of a parallel region calls `attend`.
template <class T>
class RaggedDecode {
 public:
  explicit RaggedDecode(const Arena<T>& arena);

  // q (B, N, D), before the scale of 1 / sqrt(D).
  void set_queries(const float* q);

  // out (B, N, D), whole at the end for every thread; lse (B, N), the log of the sum of exponentials, may be null.
  void attend(float* out, float* lse = nullptr);

  int64_t tiles() const { return tiles_.size(); }

 private:
  struct Tile {
    int64_t row, head, first, count;
  };
  const Arena<T>& arena_;
  const int64_t stride_, per_query_, per_tile_;  // floats: a query, its partial result, and all those of a tile
  std::vector<Tile> tiles_;
  std::vector<int64_t> first_tile_;  // of each (row, head), and the end
  std::vector<float> query_, partial_;

  void attend_tile(const Tile& tile, float* score, float* out) const;
  template <int Queries>
  void attend_tile(const Tile& tile, int64_t first_query, float* score, float* out) const;
  void merge(int64_t row_and_head, float* out, float* lse) const;
};
