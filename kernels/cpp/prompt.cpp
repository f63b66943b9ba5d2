#include "prompt.h"

#include <algorithm>

namespace {

constexpr int64_t kTogether = 8;  // queries whose products with a few keys are summed in registers
constexpr int64_t kRows = 16;     // queries that share a look at some keys
#ifdef __AVX512F__
constexpr int kGroups = 2;  // times sixteen keys: as many sums as the processor has registers for
#else
constexpr int kGroups = 1;
#endif
constexpr int64_t kParts = 16;    // sums of a head's queries at most, so that threads share the work and sums do not vary

// The larger one; NaN if either is.
inline float larger(float a, float b) { return a > b || a != a ? a : b; }
inline Floats larger(Floats a, Floats b) { return (a > b) | (a != a) ? a : b; }

// Products of `Queries` queries with `Groups` times sixteen keys, transposed: D vectors with one number of each key.
template <int Queries, int Groups>
inline void products(const float* q, const float* keys, int64_t D, Floats* out, int64_t stride) {
  Floats total[Queries][Groups] = {};
  for (int64_t d = 0; d < D; d++)
    for (int j = 0; j < Groups; j++) {
      const Floats key = *reinterpret_cast<const Floats*>(keys + (j * D + d) * kLanes);
      for (int i = 0; i < Queries; i++) total[i][j] += q[i * D + d] * key;
    }
  for (int i = 0; i < Queries; i++)
    for (int j = 0; j < Groups; j++) out[i * stride + j] = total[i][j];
}

// One KV head: every query's weights on all places that it sees, reduced as soon as they are there.
template <class T>
class Head {
 public:
  Head(const Observation& o, const int32_t* position)
      : o_(o), position_(position), groups_((o.places + kLanes - 1) / kLanes), stride_(groups_ * kLanes),
        row_((groups_ | 1) * kLanes) {
    part_ = std::max<int64_t>(1, (o.queries + kParts * kRows - 1) / (kParts * kRows)) * kRows;
    parts_ = (o.queries + part_ - 1) / part_;
    q_.resize(o.group * o.queries * o.head_dim), keys_.resize(stride_ * o.head_dim);
    at_.resize(stride_), oldest_.resize(groups_), newest_.resize(groups_), full_.resize(groups_);
    sum_.resize(o.group * parts_ * stride_);
    if (o.rows == Rows::kVariance) squares_.resize(sum_.size());
    lse_.resize(o.group * o.queries);
    hot_.resize(o.ahead + stride_ + o.behind + kLanes);  // what is not a place stays 0, and scores are not negative
    for (int64_t w = 0; w < o.queries; w++) exist_ += position[w] >= 0;
  }

  void run(const Places<const T>& q, const Places<const T>& k, const Places<const int32_t>& pos,
           const Places<const bool>& is_protected, const Places<const float>& lse, int64_t row, int64_t head,
           float* score) {
    const int64_t D = o_.head_dim;
    const float scale = 1.0f / std::sqrt(float(D));
    std::fill(sum_.begin(), sum_.end(), 0.0f);
    std::fill(squares_.begin(), squares_.end(), 0.0f);
#pragma omp parallel
    {
      std::vector<float> logit(kRows * row_);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < o_.group * o_.queries; i++) {
        const T* from = q.at(row, head * o_.group + i / o_.queries, i % o_.queries);
        for (int64_t d = 0; d < D; d++) q_[i * D + d] = Element<T>::get(from[d]) * scale;
        if (lse.base) {
          const float given = *lse.at(row, head * o_.group + i / o_.queries, i % o_.queries);
          lse_[i] = position_[i % o_.queries] < 0 || given == -INFINITY ? 0.0f : given;  // it sees nothing
        }
      }
#pragma omp for schedule(static)
      for (int64_t group = 0; group < groups_; group++) look(k, pos, row, head, group);
#pragma omp for schedule(dynamic, 1)
      for (int64_t part = o_.group * parts_ - 1; part >= 0; part--) {  // later queries see more
        const int64_t member = part / parts_, first = part % parts_ * part_;
        for (int64_t w = first; w < std::min(first + part_, o_.queries); w += kRows)
          add(member, w, std::min(kRows, o_.queries - w), !lse.base, logit.data(), part * stride_);
      }
#pragma omp for schedule(static)
      for (int64_t group = 0; group < groups_; group++) reduce(is_protected, row, head, group * kLanes);
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
  const int64_t groups_, stride_;  // sixteens of places, and places in them
  const int64_t row_;              // floats from one query's logits to the next: an odd number of cache lines
  int64_t part_, parts_;           // queries of a part, and parts of a query head
  int64_t exist_ = 0;              // queries
  std::vector<float> q_, keys_, lse_, sum_, squares_, hot_;
  std::vector<int32_t> at_, oldest_, newest_;  // positions, and the range of each sixteen of them
  std::vector<char> full_;                     // no empty place among sixteen

  // Sixteen keys, transposed, and where they are; those beyond the last place are zero.
  void look(const Places<const T>& k, const Places<const int32_t>& pos, int64_t row, int64_t head, int64_t group) {
    const int64_t D = o_.head_dim, place = group * kLanes, count = std::min<int64_t>(kLanes, o_.places - place);
    float* to = &keys_[place * D];
    for (int64_t lane = 0; lane < count; lane++) {
      const T* key = k.at(row, head, place + lane);
      for (int64_t d = 0; d < D; d++) to[d * kLanes + lane] = Element<T>::get(key[d]);
    }
    int32_t oldest = INT32_MAX, newest = -1;
    full_[group] = count == kLanes;
    for (int64_t lane = 0; lane < kLanes; lane++) {
      const int32_t at = lane < count ? *pos.at(row, head, place + lane) : -1;
      at_[place + lane] = at;
      newest = std::max(newest, at);
      if (at >= 0)
        oldest = std::min(oldest, at);
      else
        full_[group] = 0;
    }
    oldest_[group] = oldest, newest_[group] = newest;
  }

  // What turns a query's logits into weights: e^(logit - top) share. One logarithm for both would be less exact.
  struct Scale {
    float top, share, log_mass;
  };

  // Add the weights of some neighbouring queries of a query head to what a part has, from place `at` on.
  void add(int64_t member, int64_t first, int64_t count, bool needs_lse, float* logit, int64_t at) {
    int32_t earliest = INT32_MAX, latest = -1;
    for (int64_t w = first; w < first + count; w++)
      if (position_[w] >= 0) earliest = std::min(earliest, position_[w]), latest = std::max(latest, position_[w]);
    const bool all_exist = *std::min_element(position_ + first, position_ + first + count) >= 0;
    const int64_t oldest = o_.window ? int64_t(earliest) - o_.window : -1;
    auto is_seen = [&](int64_t group) { return oldest_[group] <= latest && newest_[group] > oldest; };
    int64_t begin = 0, end = groups_;
    while (begin < end && !is_seen(begin)) begin++;
    while (begin < end && !is_seen(end - 1)) end--;
    const float* q = &q_[(member * o_.queries + first) * o_.head_dim];
    Scale scale[kRows];
    for (int64_t j = 0; j < count; j++) scale[j] = {lse_[member * o_.queries + first + j], 1.0f, 0.0f};
    Floats most[kRows];
    for (int64_t j = 0; j < count; j++) most[j] = Floats{} - INFINITY;
    for (int64_t group = begin; group < end;) {
      const int64_t some = group + kGroups <= end ? kGroups : 1;
      float* tile = needs_lse ? logit + (group - begin) * kLanes : logit;  // the first-level cache holds one tile
      multiply(q, count, &keys_[group * kLanes * o_.head_dim], some, tile);
      for (int64_t i = 0; i < some; i++) {
        const int64_t one = group + i;
        const bool of_all = all_exist && full_[one] && newest_[one] <= earliest &&
                            (!o_.window || int64_t(oldest_[one]) > int64_t(latest) - o_.window);
        if (!of_all) hide(first, count, one, tile + i * kLanes);
        for (int64_t j = 0; needs_lse && j < count; j++) {
          const Floats logits = *reinterpret_cast<Floats*>(tile + j * row_ + i * kLanes);
          most[j] = logits < most[j] ? most[j] : logits;  // a NaN is found by the mass, unless all are
        }
      }
      if (!needs_lse) add_weights(tile, scale, count, some, at + group * kLanes);
      group += some;
    }
    if (!needs_lse) return;
    for (int64_t j = 0; j < count; j++)
      if ((scale[j].top = largest(most[j])) == -INFINITY) {  // sees nothing: any finite numbers give weights of 0
        scale[j].top = 0.0f;
      } else {
        const float mass = mass_of(logit + j * row_, end - begin, scale[j].top);
        scale[j].share = 1.0f / mass, scale[j].log_mass = std::log(mass);
      }
    add_weights(logit, scale, count, end - begin, at + begin * kLanes);
  }

  // Logits of queries and a few sixteens of keys.
  void multiply(const float* q, int64_t count, const float* keys, int64_t groups, float* logit) {
    const int64_t D = o_.head_dim, row = row_ / kLanes;
    Floats* out = reinterpret_cast<Floats*>(logit);
    int64_t j = 0;
    for (; j + kTogether <= count; j += kTogether)
      if (groups == kGroups)
        products<kTogether, kGroups>(q + j * D, keys, D, out + j * row, row);
      else
        products<kTogether, 1>(q + j * D, keys, D, out + j * row, row);
    for (; j < count; j++)
      for (int64_t i = 0; i < groups; i++) products<1, 1>(q + j * D, keys + i * D * kLanes, D, out + j * row + i, 0);
  }

  void add_weights(const float* logit, const Scale* scale, int64_t count, int64_t groups, int64_t at) {
    switch (o_.rows) {
      case Rows::kMean: return add_weights<Rows::kMean>(logit, scale, count, groups, at);
      case Rows::kMax: return add_weights<Rows::kMax>(logit, scale, count, groups, at);
      case Rows::kVariance: return add_weights<Rows::kVariance>(logit, scale, count, groups, at);
      case Rows::kEntropy: return add_weights<Rows::kEntropy>(logit, scale, count, groups, at);
    }
  }

  template <Rows R>
  void add_weights(const float* logit, const Scale* scale, int64_t count, int64_t groups, int64_t at) {
    for (int64_t i = 0; i < groups * kLanes; i += kLanes) {
      Floats& sum = *reinterpret_cast<Floats*>(&sum_[at + i]);
      Floats total = sum, square = {};
      for (int64_t j = 0; j < count; j++) {
        const Floats below = *reinterpret_cast<const Floats*>(logit + j * row_ + i) - scale[j].top;
        const Floats one = exp_negative(below) * scale[j].share;
        if constexpr (R == Rows::kMax)
          total = larger(one, total);
        else if constexpr (R == Rows::kEntropy)
          total -= one > 0.0f ? one * (below - scale[j].log_mass) : one;  // 0 ln 0 is 0
        else
          total += one;
        if constexpr (R == Rows::kVariance) square += one * one;
      }
      sum = total;
      if constexpr (R == Rows::kVariance) *reinterpret_cast<Floats*>(&squares_[at + i]) += square;
    }
  }

  void hide(int64_t first, int64_t count, int64_t group, float* logit) {
    const Ints at = *reinterpret_cast<const Ints*>(&at_[group * kLanes]);
    for (int64_t j = 0; j < count; j++) {
      const int32_t here = position_[first + j];
      Ints seen = (at >= 0) & (at <= here);
      if (o_.window) seen &= at > int32_t(here - o_.window);
      Floats& logits = *reinterpret_cast<Floats*>(logit + j * row_);
      logits = seen ? logits : Floats{} - INFINITY;
    }
  }

  static float largest(Floats lanes) {
    float most = lanes[0];
    for (int lane = 1; lane < kLanes; lane++) most = larger(most, lanes[lane]);
    return most;
  }

  static float mass_of(const float* logit, int64_t groups, float top) {
    Floats total = {};
    for (int64_t i = 0; i < groups * kLanes; i += kLanes)
      total += exp_negative(*reinterpret_cast<const Floats*>(logit + i) - top);
    return sum(total);
  }

  void reduce(const Places<const bool>& is_protected, int64_t row, int64_t head, int64_t place) {
    Floats of_group = {};
    for (int64_t member = 0; member < o_.group; member++) {
      Floats of_head = {}, squares = {};
      for (int64_t part = member * parts_; part < (member + 1) * parts_; part++) {
        const Floats one = *reinterpret_cast<Floats*>(&sum_[part * stride_ + place]);
        of_head = o_.rows == Rows::kMax ? larger(one, of_head) : of_head + one;
        if (o_.rows == Rows::kVariance) squares += *reinterpret_cast<Floats*>(&squares_[part * stride_ + place]);
      }
      const float queries = float(std::max<int64_t>(exist_, 1));
      if (o_.rows == Rows::kMean) of_head /= queries;
      if (o_.rows == Rows::kVariance)
        of_head = larger(squares - of_head * of_head / queries, Floats{}) / std::max(queries - 1.0f, 1.0f);
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
                   const Places<const float>& lse, float* score) {
  for (int64_t row = 0; row < o.batch; row++) {
    Head<T> one(o, position + row * o.queries);
    for (int64_t head = 0; head < o.kv_heads; head++)
      one.run(q, k, pos, is_protected, lse, row, head, score + (row * o.kv_heads + head) * o.places);
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
                              const Places<const int32_t>&, const int32_t*, const Places<const bool>&,                \
                              const Places<const float>&, float*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(_Float16)
