#include "prompt.h"

#include <algorithm>

namespace {

constexpr int64_t kTogether = 8;  // queries whose products with sixteen keys are summed in registers

// The larger one; NaN if either is.
inline float larger(float a, float b) { return a > b || a != a ? a : b; }
inline Floats larger(Floats a, Floats b) { return (a > b) | (a != a) ? a : b; }

// Sixteen keys, transposed: D vectors with one number of each key. Those beyond `count` are zero.
template <class T>
void transposed(const Places<const T>& k, int64_t row, int64_t head, int64_t place, int64_t count, int64_t D, float* to) {
  if (count < kLanes) std::fill(to, to + D * kLanes, 0.0f);
  const T* key[kLanes];
  for (int64_t lane = 0; lane < count; lane++) key[lane] = k.at(row, head, place + lane);
  for (int64_t d = 0; d < D; d++)
    for (int64_t lane = 0; lane < count; lane++) to[d * kLanes + lane] = Element<T>::get(key[lane][d]);
}

// Products of `Queries` queries with sixteen transposed keys.
template <int Queries>
void products(const float* q, const float* keys, int64_t D, Floats* out) {
  Floats total[Queries] = {};
  for (int64_t d = 0; d < D; d++) {
    const Floats key = *reinterpret_cast<const Floats*>(keys + d * kLanes);
    for (int i = 0; i < Queries; i++) total[i] += q[i * D + d] * key;
  }
  for (int i = 0; i < Queries; i++) out[i] = total[i];
}

// One KV head: the weights of all queries of its group on all places, `stride` floats per query, and their reduction.
template <class T>
class Head {
 public:
  Head(const Observation& o, const int32_t* position)
      : o_(o), position_(position), stride_((o.places + kLanes - 1) / kLanes * kLanes), all_(o.group * o.queries) {
    q_.resize(all_ * o.head_dim), weight_.resize(all_ * stride_), share_.resize(all_);
    hot_.resize(o.ahead + stride_ + o.behind + kLanes);  // what is not a place stays 0, and scores are not negative
    for (int64_t w = 0; w < o.queries; w++) {
      exist_ += position[w] >= 0;
      earliest_ = std::min(earliest_, position[w]), latest_ = std::max(latest_, position[w]);
    }
  }

  void run(const Places<const T>& q, const Places<const T>& k, const Places<const int32_t>& pos,
           const Places<const bool>& is_protected, int64_t row, int64_t head, float* score) {
    const int64_t D = o_.head_dim, groups = stride_ / kLanes;
    const float scale = 1.0f / std::sqrt(float(D));
    for (int64_t i = 0; i < all_; i++) {
      const T* from = q.at(row, head * o_.group + i / o_.queries, i % o_.queries);
      for (int64_t d = 0; d < D; d++) q_[i * D + d] = Element<T>::get(from[d]) * scale;
    }
#pragma omp parallel
    {
      std::vector<float> keys(D * kLanes);
#pragma omp for schedule(static)
      for (int64_t group = 0; group < groups; group++) logits(k, pos, row, head, group * kLanes, keys.data());
#pragma omp for schedule(static)
      for (int64_t i = 0; i < all_; i++) softmax(i);
#pragma omp for schedule(static)
      for (int64_t group = 0; group < groups; group++) reduce(is_protected, row, head, group * kLanes);
    }
    for (int64_t place = 0; place < o_.places; place += kLanes) {
      Floats most = {};
      for (int64_t near = place; near <= place + o_.ahead + o_.behind; near++)
        most = larger(*reinterpret_cast<Floats*>(&hot_[near]), most);
      std::memcpy(score + place, &most, std::min<int64_t>(kLanes, o_.places - place) * sizeof(float));
    }
  }

 private:
  const Observation& o_;
  const int32_t* position_;
  const int64_t stride_, all_;
  int64_t exist_ = 0;  // queries
  int32_t earliest_ = INT32_MAX, latest_ = -1;  // of the queries' positions
  std::vector<float> q_, weight_, share_, hot_;

  void logits(const Places<const T>& k, const Places<const int32_t>& pos, int64_t row, int64_t head, int64_t place,
              float* keys) {
    const int64_t D = o_.head_dim, count = std::min<int64_t>(kLanes, o_.places - place);
    transposed(k, row, head, place, count, D, keys);
    Ints at = Ints{} - 1;
    for (int64_t lane = 0; lane < count; lane++) at[lane] = *pos.at(row, head, place + lane);
    bool all_seen = earliest_ >= 0;
    for (int64_t lane = 0; lane < kLanes; lane++)
      all_seen &= at[lane] >= 0 && at[lane] <= earliest_ && (!o_.window || at[lane] > latest_ - o_.window);
    Floats out[kTogether];
    for (int64_t i = 0; i < all_; i += kTogether) {
      const int64_t some = std::min(kTogether, all_ - i);
      if (some == kTogether)
        products<kTogether>(&q_[i * D], keys, D, out);
      else
        for (int64_t j = 0; j < some; j++) products<1>(&q_[(i + j) * D], keys, D, out + j);
      for (int64_t j = 0; j < some; j++) {
        if (!all_seen) {
          const int32_t here = position_[(i + j) % o_.queries];
          Ints seen = (at >= 0) & (at <= here);
          if (o_.window) seen &= at > int32_t(here - o_.window);
          out[j] = seen ? out[j] : Floats{} - INFINITY;
        }
        *reinterpret_cast<Floats*>(&weight_[(i + j) * stride_ + place]) = out[j];
      }
    }
  }

  // Numerators of the weights in place, and what they are to be multiplied with.
  void softmax(int64_t i) {
    float* weight = &weight_[i * stride_];
    Floats most = Floats{} - INFINITY, mass = {};
    for (int64_t place = 0; place < stride_; place += kLanes) {
      const Floats some = *reinterpret_cast<Floats*>(weight + place);
      most = larger(some, most);
    }
    float top = most[0];
    for (int lane = 1; lane < kLanes; lane++) top = larger(top, most[lane]);
    if (top == -INFINITY) {  // sees nothing
      std::fill(weight, weight + stride_, 0.0f);
      share_[i] = 0.0f;
      return;
    }
    for (int64_t place = 0; place < stride_; place += kLanes) {
      Floats& some = *reinterpret_cast<Floats*>(weight + place);
      some = exp_negative(some - top);
      mass += some;
    }
    share_[i] = 1.0f / sum(mass);
  }

  void reduce(const Places<const bool>& is_protected, int64_t row, int64_t head, int64_t place) {
    Floats of_group = {};
    for (int64_t g = 0; g < o_.group; g++) {
      Floats of_head = {};
      for (int64_t i = g * o_.queries; i < (g + 1) * o_.queries; i++) {
        const Floats weight = *reinterpret_cast<Floats*>(&weight_[i * stride_ + place]) * share_[i];
        of_head = o_.rows_max ? larger(weight, of_head) : of_head + weight;
      }
      if (!o_.rows_max) of_head /= float(std::max<int64_t>(exist_, 1));
      of_group = o_.group_max ? larger(of_head, of_group) : of_group + of_head;
    }
    if (!o_.group_max) of_group /= float(o_.group);
    for (int64_t lane = 0; lane < kLanes && place + lane < o_.places; lane++)
      hot_[o_.ahead + place + lane] = *is_protected.at(row, head, place + lane) ? 0.0f : of_group[lane];
  }
};

// Unsigned integers in the order of the numbers; NaN above all, as PyTorch sorts it.
uint32_t ordered(float x) {
  if (x != x) return ~uint32_t(0);
  if (x == 0.0f) x = 0.0f;  // no negative zero
  x = std::max(x, -3.4028234663852886e38f);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace

template <class T>
void window_scores(const Observation& o, const Places<const T>& q, const Places<const T>& k,
                   const Places<const int32_t>& pos, const int32_t* position, const Places<const bool>& is_protected,
                   float* score) {
  for (int64_t row = 0; row < o.batch; row++) {
    Head<T> one(o, position + row * o.queries);
    for (int64_t head = 0; head < o.kv_heads; head++)
      one.run(q, k, pos, is_protected, row, head, score + (row * o.kv_heads + head) * o.places);
  }
}

std::vector<int32_t> best_places(const Places<const int32_t>& pos, const Places<const float>& score, int64_t row,
                                 int64_t head, int64_t places, int64_t keep) {
  std::vector<uint64_t> worst_last;  // the complement of the score above the place
  for (int64_t place = 0; place < places; place++)
    if (*pos.at(row, head, place) >= 0)
      worst_last.push_back(uint64_t(~ordered(*score.at(row, head, place))) << 32 | uint64_t(place));
  if (keep < int64_t(worst_last.size())) {
    std::nth_element(worst_last.begin(), worst_last.begin() + keep, worst_last.end());
    worst_last.resize(keep);
  }
  std::vector<int32_t> best;
  for (uint64_t one : worst_last) best.push_back(int32_t(one & 0xffffffffu));
  std::sort(best.begin(), best.end());
  return best;
}

#define INSTANTIATE(T)                                                                                                \
  template void window_scores(const Observation&, const Places<const T>&, const Places<const T>&,                     \
                              const Places<const int32_t>&, const int32_t*, const Places<const bool>&, float*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(_Float16)
