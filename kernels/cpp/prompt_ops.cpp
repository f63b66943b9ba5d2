// The operators of a prompt as torch sees them. Their schemas and what they mean are in the Python files of the same names.
#include <algorithm>

#include "prompt.h"
#include "tensors.h"

namespace {

template <class T>
Places<const T> places(const Tensor& tensor, int64_t first, int64_t second, int64_t third) {
  return {data<const T>(tensor), {tensor.stride(first), tensor.stride(second), tensor.stride(third)}};
}

void check_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes, ScalarType type, const char* what) {
  STD_TORCH_CHECK(std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end()) == sizes &&
                      tensor.scalar_type() == type,
                  what, " has the wrong shape or dtype");
}

Tensor side_by_side(const Tensor& tensor) { return tensor.stride(3) == 1 ? tensor : packed(tensor); }

Tensor window_scores_op(Tensor q_BWND, Tensor k_BHSD, Tensor pos_BHS, Tensor position_BW, Tensor protected_BHS,
                        int64_t rows, bool group_max, int64_t ahead, int64_t behind, int64_t window, Maybe lse_BWN) {
  const int64_t B = q_BWND.size(0), W = q_BWND.size(1), N = q_BWND.size(2), D = q_BWND.size(3);
  const int64_t H = k_BHSD.size(1), S = k_BHSD.size(2);
  check_sizes(k_BHSD, {B, H, S, D}, q_BWND.scalar_type(), "k");
  check_sizes(pos_BHS, {B, H, S}, ScalarType::Int, "pos");
  check_sizes(position_BW, {B, W}, ScalarType::Int, "position");
  check_sizes(protected_BHS, {B, H, S}, ScalarType::Bool, "protected");
  STD_TORCH_CHECK(H > 0 && N % H == 0, "q must have a multiple of k's heads");
  STD_TORCH_CHECK(rows >= 0 && rows <= int64_t(Rows::kEntropy), "rows must be from 0 to 3");
  if (lse_BWN) check_sizes(*lse_BWN, {B, W, N}, ScalarType::Float, "lse");
  STD_TORCH_CHECK(ahead >= 0 && behind >= 0 && window >= 0, "ahead, behind and window must not be negative");
  q_BWND = side_by_side(q_BWND), k_BHSD = side_by_side(k_BHSD), position_BW = packed(position_BW);
  const Observation observation{B, H, N / H, W, S, D, Rows(rows), group_max, ahead, behind,
                                std::min<int64_t>(window, INT32_MAX)};
  Tensor score = allocated({B, H, S}, aoti_torch_dtype_float32());
  for_type(q_BWND, [&](auto zero) {
    using T = decltype(zero);
    window_scores<T>(observation, places<T>(q_BWND, 0, 2, 1), places<T>(k_BHSD, 0, 1, 2),
                     places<int32_t>(pos_BHS, 0, 1, 2), data<int32_t>(position_BW),
                     places<bool>(protected_BHS, 0, 1, 2),
                     lse_BWN ? places<float>(*lse_BWN, 0, 2, 1) : Places<const float>{}, data<float>(score));
  });
  return score;
}

int64_t integer(const Tensor& table, int64_t row, int64_t head) {
  const int64_t at = row * table.stride(0) + head * table.stride(1);
  if (table.scalar_type() == ScalarType::Long) return data<int64_t>(table)[at];
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int, "offset and keep must be int32 or int64");
  return data<int32_t>(table)[at];
}

Tensor ragged_compact_op(Tensor k_arena, Tensor v_arena, Tensor pos, Tensor offset_BH, Tensor keep_BH,
                         int64_t max_keep, Tensor k_BHSD, Tensor v_BHSD, Tensor pos_BHS, Tensor score_BHS) {
  const int64_t B = k_BHSD.size(0), H = k_BHSD.size(1), S = k_BHSD.size(2), D = k_BHSD.size(3);
  const int64_t slots = k_arena.size(1);
  const ScalarType type = k_arena.scalar_type();
  check_table(k_arena, {B, slots, D}, type, "k_arena");
  check_table(v_arena, {B, slots, D}, type, "v_arena");
  check_table(pos, {B, slots}, ScalarType::Int, "pos");
  for (const Tensor& x : {k_BHSD, v_BHSD}) check_sizes(x, {B, H, S, D}, type, "what is to be kept");
  check_sizes(pos_BHS, {B, H, S}, ScalarType::Int, "pos_BHS");
  check_sizes(score_BHS, {B, H, S}, ScalarType::Float, "score");
  for (const Tensor& x : {offset_BH, keep_BH}) check_sizes(x, {B, H}, x.scalar_type(), "a table");
  k_BHSD = side_by_side(k_BHSD), v_BHSD = side_by_side(v_BHSD);
  Tensor kept = allocated({B, H}, pos);
  std::vector<int64_t> offset, keep;
  for (int64_t row = 0; row < B; row++)
    for (int64_t head = 0; head < H; head++) {
      offset.push_back(integer(offset_BH, row, head));
      keep.push_back(std::clamp<int64_t>(integer(keep_BH, row, head), 0, max_keep));
      STD_TORCH_CHECK(offset.back() >= 0 && offset.back() + std::min(keep.back(), S) <= slots,
                      "a region lies outside the arena");
    }
  const auto place = places<int32_t>(pos_BHS, 0, 1, 2);
  const auto score = places<float>(score_BHS, 0, 1, 2);
  for_type(k_arena, [&](auto zero) {
    using T = decltype(zero);
    const auto k = places<T>(k_BHSD, 0, 1, 2), v = places<T>(v_BHSD, 0, 1, 2);
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t i = 0; i < B * H; i++) {
      const int64_t row = i / H, head = i % H;
      int64_t slot = row * slots + offset[i];
      const std::vector<int32_t> best = best_places(place, score, row, head, S, keep[i]);
      data<int32_t>(kept)[i] = int32_t(best.size());
      for (int32_t at : best) {
        std::memcpy(data<T>(k_arena) + slot * D, k.at(row, head, at), D * sizeof(T));
        std::memcpy(data<T>(v_arena) + slot * D, v.at(row, head, at), D * sizeof(T));
        data<int32_t>(pos)[slot++] = *place.at(row, head, at);
      }
    }
  });
  return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headkv, CPU, library) {
  library.impl("window_scores", TORCH_BOX(&window_scores_op));
  library.impl("ragged_compact", TORCH_BOX(&ragged_compact_op));
}
