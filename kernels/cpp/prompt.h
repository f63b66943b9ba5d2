// What a prompt leaves behind: how much each token matters to the last ones, and the best tokens in the arena.
#pragma once

#include <vector>

#include "simd.h"

// Numbers at base[row * strides[0] + head * strides[1] + place * strides[2]], those of a vector side by side.
template <class T>
struct Places {
  T* base;
  int64_t strides[3];
  T* at(int64_t row, int64_t head, int64_t place) const {
    return base + row * strides[0] + head * strides[1] + place * strides[2];
  }
};

enum class Rows : int64_t { kMean, kMax, kVariance, kEntropy };  // of a token's weights, over queries

struct Observation {
  int64_t batch, kv_heads, group, queries, places, head_dim;
  Rows rows;
  bool group_max;
  int64_t ahead, behind, window;  // window 0: none
};

// The places of q and lse are (row, query head, query), those of k, pos and is_protected (row, KV head, place);
// position (B, W), score (B, H, S). Without a base, lse is computed.
template <class T>
void window_scores(const Observation& observation, const Places<const T>& q, const Places<const T>& k,
                   const Places<const int32_t>& pos, const int32_t* position, const Places<const bool>& is_protected,
                   const Places<const float>& lse, float* score);

// The places to keep of one head, in their order: the best `keep` of those that are not empty, the earlier of equals.
std::vector<int32_t> best_places(const Places<const int32_t>& pos, const Places<const float>& score, int64_t row,
                                 int64_t head, int64_t places, int64_t keep);
