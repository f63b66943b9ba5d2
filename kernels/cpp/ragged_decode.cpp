#include "ragged_decode.h"

#include <algorithm>

constexpr int64_t kTile = 256;  // slots; fixed, so that a row gives the same bits whatever else is in the batch
constexpr int64_t kTogether = 4;  // queries whose sums fit in registers together

template <class T>
RaggedDecode<T>::RaggedDecode(const Arena<T>& arena)
    : arena_(arena),
      stride_(padded<T>(arena.head_dim)),
      per_query_(stride_ + 2),
      per_tile_(arena.group * per_query_),
      query_(arena.batch * arena.kv_heads * arena.group * stride_) {
  for (int64_t row = 0; row < arena.batch; row++)
    for (int64_t head = 0; head < arena.kv_heads; head++) {
      const int64_t at = row * arena.table_stride + head, length = arena.length[at];
      first_tile_.push_back(tiles_.size());
      for (int64_t slot = 0; slot < length; slot += kTile)
        tiles_.push_back(
            {row, head, row * arena.slots + arena.offset[at] + slot, std::min<int64_t>(kTile, length - slot)});
    }
  first_tile_.push_back(tiles_.size());
  partial_.resize(tiles_.size() * per_tile_);
}

template <class T>
void RaggedDecode<T>::set_queries(const float* q) {
  const int64_t D = arena_.head_dim, queries = arena_.batch * arena_.kv_heads * arena_.group;
  for (int64_t i = 0; i < queries; i++)
    arrange<T>(q + i * D, D, 1.0f / std::sqrt(float(D)), query_.data() + i * stride_);
}

template <class T>
void RaggedDecode<T>::attend(float* out, float* lse) {
  const int64_t tiles = tiles_.size(), heads = arena_.batch * arena_.kv_heads, group = arena_.group;
  std::vector<float> score(kTogether * kTile);
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < tiles; i++) attend_tile(tiles_[i], score.data(), partial_.data() + i * per_tile_);
#pragma omp for schedule(static)
  for (int64_t head = 0; head < heads; head++)
    merge(head, out + head * group * arena_.head_dim, lse ? lse + head * group : nullptr);
}

// Per query of the head's group, `out` takes the largest score, the sum of weights and D weighted sums.
template <class T>
void RaggedDecode<T>::attend_tile(const Tile& tile, float* score, float* out) const {
  for (int64_t g = 0; g < arena_.group; g += kTogether) switch (std::min(kTogether, arena_.group - g)) {
      case 1: attend_tile<1>(tile, g, score, out + g * per_query_); break;
      case 2: attend_tile<2>(tile, g, score, out + g * per_query_); break;
      case 3: attend_tile<3>(tile, g, score, out + g * per_query_); break;
      default: attend_tile<kTogether>(tile, g, score, out + g * per_query_);
    }
}

template <class T>
template <int Queries>
void RaggedDecode<T>::attend_tile(const Tile& tile, int64_t first_query, float* score, float* out) const {
  constexpr int parts = Element<T>::parts;
  const int64_t D = arena_.head_dim, count = tile.count, stride = stride_;
  const float* q = query_.data() + ((tile.row * arena_.kv_heads + tile.head) * arena_.group + first_query) * stride;
  const T *k = arena_.k + tile.first * D, *v = arena_.v + tile.first * D;
  auto load = [&](const T* row, int64_t d, Floats* loaded) {
    __builtin_prefetch(reinterpret_cast<const char*>(row + d) + kPrefetch);
    if (d + kStep<T> <= D)
      Element<T>::load(row + d, loaded);
    else
      load_tail(row + d, D - d, loaded);
  };

  for (int64_t slot = 0; slot < count; slot++) {
    Floats total[Queries] = {}, key[parts];
    for (int64_t d = 0; d < D; d += kStep<T>) {
      load(k + slot * D, d, key);
      for (int g = 0; g < Queries; g++)
        for (int part = 0; part < parts; part++)
          total[g] += *reinterpret_cast<const Floats*>(q + g * stride + d + part * kLanes) * key[part];
    }
    for (int g = 0; g < Queries; g++) score[g * kTile + slot] = sum(total[g]);
  }
  const int64_t oldest = arena_.position[tile.row] - arena_.window;
  const float* bias = arena_.bias ? arena_.bias + tile.first : nullptr;
  const bool any_hidden = arena_.window || bias;
  auto hidden = [&](int64_t slot) {
    return (arena_.window && arena_.pos[tile.first + slot] <= oldest) || (bias && bias[slot] == -INFINITY);
  };
  for (int64_t slot = 0; slot < count && any_hidden; slot++)
    if (hidden(slot))
      for (int g = 0; g < Queries; g++) score[g * kTile + slot] = -INFINITY;
    else if (bias)
      for (int g = 0; g < Queries; g++) score[g * kTile + slot] += bias[slot];

  for (int g = 0; g < Queries; g++) {
    float *weight = score + g * kTile, *result = out + g * per_query_;
    const float largest = *std::max_element(weight, weight + count);
    std::fill(weight + count, weight + (count + kLanes - 1) / kLanes * kLanes, -INFINITY);
    const float top = largest == -INFINITY ? 0.0f : largest;  // of what is all hidden, nothing; NaN stays
    Floats mass = {};
    for (int64_t slot = 0; slot < count; slot += kLanes) {
      Floats& some = *reinterpret_cast<Floats*>(weight + slot);
      some = exp_negative(some - top);
      mass += some;
    }
    result[0] = largest;
    result[1] = sum(mass);
  }

  constexpr int vectors = 4;  // of the output at a time, for all queries in registers
  for (int64_t start = 0; start < stride; start += vectors * kLanes) {
    Floats total[Queries][vectors] = {}, value[vectors] = {};
    const bool whole = start + vectors * kLanes <= D;
    for (int64_t slot = 0; slot < count; slot++) {
      if (any_hidden && hidden(slot)) continue;
      for (int vector = 0; vector < vectors; vector += parts)
        if (whole || start + vector * kLanes < stride) load(v + slot * D, start + vector * kLanes, value + vector);
      for (int g = 0; g < Queries; g++)
        for (int vector = 0; vector < vectors; vector++) total[g][vector] += value[vector] * score[g * kTile + slot];
    }
    const int64_t floats = std::min<int64_t>(vectors * kLanes, stride - start);
    for (int g = 0; g < Queries; g++)
      std::memcpy(out + g * per_query_ + 2 + start, total[g], floats * sizeof(float));
  }
}

template <class T>
void RaggedDecode<T>::merge(int64_t row_and_head, float* out, float* lse) const {
  const int64_t begin = first_tile_[row_and_head], end = first_tile_[row_and_head + 1], D = arena_.head_dim;
  std::vector<float> mixed(stride_);
  for (int64_t g = 0; g < arena_.group; g++) {
    auto part = [&](int64_t tile) { return partial_.data() + tile * per_tile_ + g * per_query_; };
    float largest = -INFINITY, mass = 0.0f;
    for (int64_t tile = begin; tile < end; tile++) largest = std::max(largest, part(tile)[0]);
    std::fill(mixed.begin(), mixed.end(), 0.0f);
    for (int64_t tile = begin; tile < end; tile++) {
      if (part(tile)[1] == 0) continue;
      const float share = std::exp(part(tile)[0] - largest);
      mass += share * part(tile)[1];
      for (int64_t d = 0; d < stride_; d++) mixed[d] += share * part(tile)[2 + d];
    }
    for (int64_t d = 0; d < D; d++) out[g * D + d] = mass == 0 ? 0.0f : mixed[arranged_index<T>(d)] / mass;
    if (lse) lse[g] = largest + std::log(mass);
  }
}

template class RaggedDecode<float>;
template class RaggedDecode<BFloat16>;
template class RaggedDecode<_Float16>;
