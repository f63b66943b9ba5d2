// The operators as torch sees them. Their schemas and what they mean are in the Python files of the same names.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "decode_block.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

namespace {

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <class F>
void for_type(const Tensor& tensor, F&& run) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::BFloat16: return run(BFloat16{});
    case ScalarType::Half: return run(_Float16{});
    default: STD_TORCH_CHECK(false, "the dtype must be float32, bfloat16 or float16");
  }
}

// torch::stable's own functions go through the dispatcher once more, which costs as much as a small product.
Tensor allocated(const std::vector<int64_t>& sizes, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
  int32_t dtype;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

std::vector<float> as_floats(const Maybe& tensor) {
  std::vector<float> floats(tensor ? tensor->numel() : 0);
  if (tensor)
    for_type(*tensor, [&](auto zero) {
      const auto* from = data<decltype(zero)>(*tensor);
      for (size_t i = 0; i < floats.size(); i++) floats[i] = Element<decltype(zero)>::get(from[i]);
    });
  return floats;
}

Matrix matrix(const Tensor& weight, const Maybe& bias, const Maybe& scale) {
  Matrix made{weight.data_ptr(), scale ? data<float>(*scale) : nullptr, as_floats(bias), weight.size(0), weight.size(1)};
  if (weight.scalar_type() == ScalarType::Char)
    use_type<int8_t>(made);
  else
    for_type(weight, [&](auto zero) { use_type<decltype(zero)>(made); });
  return made;
}

Tensor few_rows_linear(Tensor x, Tensor weight, Maybe bias, Maybe scale) {
  x = packed(x);
  const Matrix m = matrix(weight, bias, scale);
  const int64_t rows = x.numel() / m.in;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = m.out;
  Tensor y = allocated(shape, x);
  std::vector<float> arranged, sums(rows * m.out);
  m.arrange_rows(as_floats(x).data(), rows, m.in, arranged);
#pragma omp parallel if (m.out * m.in >= kWorthThreads)
  m.product(m, arranged.data(), rows, sums.data());
  for_type(x, [&](auto zero) {
    auto* to = data<decltype(zero)>(y);
    for (size_t i = 0; i < sums.size(); i++) to[i] = Element<decltype(zero)>::put(sums[i]);
  });
  return y;
}

template <class T>
Arena<T> arena_of(const Tensor& k_arena, const Tensor& v_arena, const Tensor& pos, const Tensor& table,
                  const Tensor& layer_1, const Tensor& position_B) {
  Arena<T> arena{};
  arena.k = data<T>(k_arena), arena.v = data<T>(v_arena), arena.pos = data<int32_t>(pos);
  arena.slots = k_arena.size(1), arena.head_dim = k_arena.size(2);
  arena.batch = table.size(0), arena.kv_heads = table.size(2), arena.table_stride = table.stride(0);
  arena.position = data<int32_t>(position_B);
  return arena;
}

const int32_t* at_layer(const Tensor& table, const Tensor& layer_1) {
  return data<int32_t>(table) + *data<int64_t>(layer_1) * table.size(2);
}

void ragged_append(Tensor k_arena, Tensor v_arena, Tensor pos, Tensor slot_BLH, Tensor layer_1, Tensor k_BHD,
                   Tensor v_BHD, Tensor position_B, Tensor active_B) {
  for_type(k_arena, [&](auto zero) {
    using T = decltype(zero);
    Arena<T> arena = arena_of<T>(k_arena, v_arena, pos, slot_BLH, layer_1, position_B);
    arena.slot = at_layer(slot_BLH, layer_1), arena.active = data<bool>(active_B);
    const int64_t D = arena.head_dim;
    auto heads_packed = [&](const Tensor& x) { return x.stride(2) == 1 && x.stride(1) == D ? x : packed(x); };
    const Tensor k = heads_packed(k_BHD), v = heads_packed(v_BHD);
    append(arena, data<T>(k), data<T>(v), k.stride(0), v.stride(0));
  });
}

Tensor ragged_decode(Tensor q_BND, Tensor k_arena, Tensor v_arena, Tensor pos, Tensor offset_BLH, Tensor length_BLH,
                     Tensor layer_1, Tensor position_B, int64_t window) {
  Tensor out = allocated({q_BND.sizes().begin(), q_BND.sizes().end()}, q_BND);
  for_type(q_BND, [&](auto zero) {
    using T = decltype(zero);
    Arena<T> arena = arena_of<T>(k_arena, v_arena, pos, offset_BLH, layer_1, position_B);
    arena.offset = at_layer(offset_BLH, layer_1), arena.length = at_layer(length_BLH, layer_1);
    arena.group = q_BND.size(1) / arena.kv_heads, arena.window = window;
    RaggedDecode<T> attention(arena);
    attention.set_queries(as_floats(packed(q_BND)).data());
    std::vector<float> attended(q_BND.numel());
#pragma omp parallel if (attention.tiles() > 1)
    attention.attend(attended.data());
    auto* to = data<T>(out);
    for (size_t i = 0; i < attended.size(); i++) to[i] = Element<T>::put(attended[i]);
  });
  return out;
}

Tensor decode_block_op(Tensor x_BTE, Tensor cos_BTd, Tensor sin_BTd, Tensor attention_norm, Tensor qkv, Maybe qkv_bias,
                    Maybe qkv_scale, Maybe q_norm, Maybe k_norm, Tensor out, Maybe out_bias, Maybe out_scale,
                    Tensor mlp_norm, Tensor gate_up, Maybe gate_up_bias, Maybe gate_up_scale, Tensor down,
                    Maybe down_bias, Maybe down_scale, double eps, double qk_eps, int64_t window, Tensor k_arena,
                    Tensor v_arena, Tensor pos, Tensor slot_BLH, Tensor offset_BLH, Tensor length_BLH, Tensor layer_1,
                    Tensor position_B, Tensor active_B) {
  x_BTE = packed(x_BTE);
  const BlockWeights weights{as_floats(attention_norm),
                             as_floats(mlp_norm),
                             as_floats(q_norm),
                             as_floats(k_norm),
                             matrix(qkv, qkv_bias, qkv_scale),
                             matrix(out, out_bias, out_scale),
                             matrix(gate_up, gate_up_bias, gate_up_scale),
                             matrix(down, down_bias, down_scale),
                             float(eps),
                             float(qk_eps)};
  Tensor y = allocated({x_BTE.sizes().begin(), x_BTE.sizes().end()}, x_BTE);
  for_type(x_BTE, [&](auto zero) {
    using T = decltype(zero);
    Arena<T> arena = arena_of<T>(k_arena, v_arena, pos, slot_BLH, layer_1, position_B);
    arena.slot = at_layer(slot_BLH, layer_1), arena.active = data<bool>(active_B);
    arena.offset = at_layer(offset_BLH, layer_1), arena.length = at_layer(length_BLH, layer_1);
    arena.group = weights.out.in / arena.head_dim / arena.kv_heads, arena.window = window;
    decode_block(weights, arena, as_floats(packed(cos_BTd)).data(), as_floats(packed(sin_BTd)).data(), data<T>(x_BTE),
                 data<T>(y));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headkv, CPU, library) {
  library.impl("few_rows_linear", TORCH_BOX(&few_rows_linear));
  library.impl("ragged_append", TORCH_BOX(&ragged_append));
  library.impl("ragged_decode", TORCH_BOX(&ragged_decode));
  library.impl("decode_block", TORCH_BOX(&decode_block_op));
}
