// The operators as torch sees them. Their schemas and what they mean are in the Python files of the same names.
#include "decode_blocks.h"
#include "rows.h"
#include "tensors.h"

namespace {

std::vector<float> as_floats(const Maybe& tensor) {
  std::vector<float> floats(tensor ? tensor->numel() : 0);
  if (tensor)
    for_type(*tensor, [&](auto zero) {
      const auto* from = data<decltype(zero)>(*tensor);
      for (size_t i = 0; i < floats.size(); i++) floats[i] = Element<decltype(zero)>::get(from[i]);
    });
  return floats;
}

void check_row(const Maybe& row, int64_t size, ScalarType type, const char* what) {
  STD_TORCH_CHECK(!row || (row->dim() == 1 && row->size(0) == size && row->scalar_type() == type &&
                           row->is_contiguous()),
                  what, " must be contiguous, with one number per row of the weight and of the right dtype");
}

// A weight for inputs of `type`.
Matrix matrix(const Tensor& weight, const Maybe& bias, const Maybe& scale, int64_t in, ScalarType type) {
  const bool quantised = weight.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == in, "the input has ", in, " columns, the weight ", weight.size(1));
  STD_TORCH_CHECK(weight.is_contiguous() && (quantised ? scale.has_value() : weight.scalar_type() == type),
                  "the weight must be contiguous and of the input's dtype, or int8 with a scale");
  check_row(bias, weight.size(0), type, "the bias");
  check_row(scale, weight.size(0), ScalarType::Float, "the scale");
  Matrix made{weight.data_ptr(), scale ? data<float>(*scale) : nullptr, as_floats(bias), weight.size(0), weight.size(1)};
  if (quantised)
    use_type<int8_t>(made);
  else
    for_type(weight, [&](auto zero) { use_type<decltype(zero)>(made); });
  return made;
}

Tensor few_rows_linear(Tensor x, Tensor weight, Maybe bias, Maybe scale) {
  x = packed(x);
  const Matrix m = matrix(weight, bias, scale, x.size(-1), x.scalar_type());
  STD_TORCH_CHECK(m.in > 0, "the weight has no columns");
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

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  x = packed(x);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "rows must have at least 1 number");
  check_row(weight, x.size(-1), x.scalar_type(), "the norm's weight");
  Tensor y = allocated({x.sizes().begin(), x.sizes().end()}, x);
  for_type(x, [&](auto zero) {
    using T = decltype(zero);
    rms_norm_rows(data<T>(x), data<T>(weight), float(eps), x.numel() / weight.numel(), weight.numel(), data<T>(y));
  });
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  x = packed(x), residual = packed(residual);
  STD_TORCH_CHECK(x.dim() > 0 && x.size(-1) > 0, "rows must have at least 1 number");
  check_row(weight, x.size(-1), x.scalar_type(), "the norm's weight");
  STD_TORCH_CHECK(residual.numel() == x.numel() && residual.scalar_type() == x.scalar_type(),
                  "the residual must have x's shape and dtype");
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  Tensor y = allocated(shape, x), sum = allocated(shape, x);
  for_type(x, [&](auto zero) {
    using T = decltype(zero);
    add_rms_norm_rows(data<T>(x), data<T>(residual), data<T>(weight), float(eps), x.numel() / weight.numel(),
                      weight.numel(), data<T>(y), data<T>(sum));
  });
  return {y, sum};
}

Tensor silu_mul(Tensor gate_up) {
  gate_up = packed(gate_up);
  STD_TORCH_CHECK(gate_up.size(-1) > 1 && gate_up.size(-1) % 2 == 0, "gate and up must be equally wide");
  std::vector<int64_t> shape(gate_up.sizes().begin(), gate_up.sizes().end());
  const int64_t size = shape.back() /= 2;
  Tensor y = allocated(shape, gate_up);
  for_type(gate_up, [&](auto zero) {
    using T = decltype(zero);
    silu_mul_rows(data<T>(gate_up), y.numel() / size, size, data<T>(y));
  });
  return y;
}

Tensor rope(Tensor x_BTHD, Tensor cos_BTd, Tensor sin_BTd) {
  const int64_t T = x_BTHD.size(1), H = x_BTHD.size(2), D = x_BTHD.size(3);
  const bool even_rows = x_BTHD.stride(3) == 1 && x_BTHD.stride(2) == D && x_BTHD.stride(0) == T * x_BTHD.stride(1);
  if (!even_rows) x_BTHD = packed(x_BTHD);
  cos_BTd = packed(cos_BTd), sin_BTd = packed(sin_BTd);
  for (const Tensor& table : {cos_BTd, sin_BTd})
    STD_TORCH_CHECK(2 * table.numel() * H == x_BTHD.numel() && table.scalar_type() == x_BTHD.scalar_type(),
                    "cosine and sine must be (B, T, D / 2) in x's dtype");
  Tensor y = allocated({x_BTHD.sizes().begin(), x_BTHD.sizes().end()}, x_BTHD);
  for_type(x_BTHD, [&](auto zero) {
    using E = decltype(zero);
    rope_rows(data<E>(x_BTHD), x_BTHD.stride(1), data<E>(cos_BTd), data<E>(sin_BTd), x_BTHD.size(0) * T, H, D,
              data<E>(y));
  });
  return y;
}

template <class T>
Arena<T> arena_of(const Tensor& k_arena, const Tensor& v_arena, const Tensor& pos, const Tensor& table,
                  const Tensor& position_B, ScalarType type) {
  const int64_t B = table.size(0), slots = k_arena.size(1), D = k_arena.size(2);
  check_table(k_arena, {B, slots, D}, type, "k_arena");
  check_table(v_arena, {B, slots, D}, type, "v_arena");
  check_table(pos, {B, slots}, ScalarType::Int, "pos");
  check_table(position_B, {B}, ScalarType::Int, "position_B");
  Arena<T> arena{};
  arena.k = data<T>(k_arena), arena.v = data<T>(v_arena), arena.pos = data<int32_t>(pos);
  arena.slots = slots, arena.head_dim = D;
  arena.batch = B, arena.kv_heads = table.size(2), arena.table_stride = table.stride(0);
  arena.position = data<int32_t>(position_B);
  return arena;
}

const int32_t* at_layer(const Tensor& table, const Tensor& like, const Tensor& layer_1) {
  check_table(table, {like.sizes().begin(), like.sizes().end()}, ScalarType::Int, "a table of slots or lengths");
  check_table(layer_1, {1}, ScalarType::Long, "layer_1");
  const int64_t layer = *data<int64_t>(layer_1);
  STD_TORCH_CHECK(layer >= 0 && layer < table.size(1), "there is no layer ", layer);
  return data<int32_t>(table) + layer * table.stride(1);
}

// What is written and read lies inside the arena, from the tables' layer on for so many layers.
template <class T>
void check_slots(const Arena<T>& arena, int64_t layers, int64_t tokens) {
  for (int64_t row = 0; row < arena.batch; row++)
    for (int64_t i = 0; i < layers * arena.kv_heads * tokens && arena.active[row]; i++) {
      const int64_t slot = arena.slot[row * arena.table_stride + i];
      STD_TORCH_CHECK(slot >= 0 && slot < arena.slots, "slot ", slot, " is outside the arena of ", arena.slots, " slots");
    }
}

template <class T>
void check_regions(const Arena<T>& arena, int64_t layers) {
  for (int64_t row = 0; row < arena.batch; row++)
    for (int64_t i = 0; i < layers * arena.kv_heads; i++) {
      const int64_t first = arena.offset[row * arena.table_stride + i];
      const int64_t length = arena.length[row * arena.table_stride + i];
      STD_TORCH_CHECK(length == 0 || (length > 0 && first >= 0 && first + length <= arena.slots), "a region of ", length,
                      " slots from ", first, " on is outside the arena of ", arena.slots, " slots");
    }
}

void ragged_append(Tensor k_arena, Tensor v_arena, Tensor pos, Tensor slot_BLHT, Tensor layer_1, Tensor k_BTHD,
                   Tensor v_BTHD, Tensor position_B, Tensor active_B) {
  STD_TORCH_CHECK(slot_BLHT.dim() == 4, "slot must be (B, L, H, T)");
  check_table(active_B, {slot_BLHT.size(0)}, ScalarType::Bool, "active_B");
  const int64_t tokens = slot_BLHT.size(3);
  for_type(k_arena, [&](auto zero) {
    using T = decltype(zero);
    Arena<T> arena = arena_of<T>(k_arena, v_arena, pos, slot_BLHT, position_B, k_arena.scalar_type());
    arena.slot = at_layer(slot_BLHT, slot_BLHT, layer_1), arena.active = data<bool>(active_B);
    const int64_t D = arena.head_dim;
    auto heads_packed = [&](const Tensor& x) { return x.stride(3) == 1 && x.stride(2) == D ? x : packed(x); };
    for (const Tensor& x : {k_BTHD, v_BTHD})
      STD_TORCH_CHECK(x.scalar_type() == k_arena.scalar_type() && x.size(0) == arena.batch && x.size(1) == tokens &&
                          x.size(2) == arena.kv_heads && x.size(3) == D,
                      "k and v must be (B, T, H, D) in the arena's dtype");
    const Tensor k = heads_packed(k_BTHD), v = heads_packed(v_BTHD);
    check_slots(arena, 1, tokens);
    append<T, T>(arena, tokens, {data<T>(k), k.stride(0), k.stride(1)}, {data<T>(v), v.stride(0), v.stride(1)});
  });
}

// Attention over an arena whose tables are at the layer.
template <class T, class Q>
void attend(Arena<T>& arena, const Q* q, const std::vector<int64_t>& sizes, int64_t most, Q* out, float* lse) {
  for (int64_t row = 0; row < arena.batch; row++)
    for (int64_t head = 0; head < arena.kv_heads; head++) {
      const int64_t length = arena.length[row * arena.table_stride + head];
      STD_TORCH_CHECK(length <= most, "a head has ", length, " filled slots, most is ", most);
    }
  STD_TORCH_CHECK(sizes[0] == arena.batch && sizes[1] % arena.kv_heads == 0 && sizes[2] == arena.head_dim,
                  "q must be (B, N, D) with N a multiple of the arena's heads");
  arena.group = sizes[1] / arena.kv_heads;
  const int64_t count = sizes[0] * sizes[1] * sizes[2];
  std::vector<float> queries(count), attended(count);
  for (int64_t i = 0; i < count; i++) queries[i] = Element<Q>::get(q[i]);
  RaggedDecode<T> attention(arena);
  attention.set_queries(queries.data());
#pragma omp parallel if (attention.tiles() > 1)
  attention.attend(attended.data(), lse);
  for (int64_t i = 0; i < count; i++) out[i] = Element<Q>::put(attended[i]);
}

// The filled slots of one layer in fp32, from codes: heads of a row behind each other, under tables of their own.
class Dequantised {
 public:
  Dequantised(const Arena<uint8_t>& codes, int64_t head_dim, const float* k_scale, const float* v_scale) {
    const int64_t heads = codes.kv_heads;
    int64_t longest = 0;
    for (int64_t row = 0; row < codes.batch; row++) {
      int64_t filled = 0;
      for (int64_t head = 0; head < heads; head++) {
        offset_.push_back(filled);
        length_.push_back(codes.length[row * codes.table_stride + head]);
        filled += length_.back();
      }
      longest = std::max(longest, filled);
    }
    k_.resize(codes.batch * longest * head_dim), v_.resize(k_.size());
    pos_.resize(codes.batch * longest), bias_.resize(codes.bias ? pos_.size() : 0);
    for (int64_t i = 0; i < codes.batch * heads; i++) {
      const int64_t row = i / heads, from = row * codes.slots + codes.offset[row * codes.table_stride + i % heads];
      for (int64_t slot = 0, to = row * longest + offset_[i]; slot < length_[i]; slot++, to++) {
        unpack(codes.k, k_scale, from + slot, codes.head_dim, head_dim, &k_[to * head_dim]);
        unpack(codes.v, v_scale, from + slot, codes.head_dim, head_dim, &v_[to * head_dim]);
        pos_[to] = codes.pos[from + slot];
        if (codes.bias) bias_[to] = codes.bias[from + slot];
      }
    }
    arena.k = k_.data(), arena.v = v_.data(), arena.pos = pos_.data();
    arena.offset = offset_.data(), arena.length = length_.data(), arena.position = codes.position;
    arena.bias = codes.bias ? bias_.data() : nullptr, arena.window = codes.window;
    arena.batch = codes.batch, arena.kv_heads = arena.table_stride = heads, arena.slots = longest;
    arena.head_dim = head_dim;
  }
  Arena<float> arena{};

 private:
  std::vector<float> k_, v_, bias_;
  std::vector<int32_t> pos_, offset_, length_;

  static void unpack(const uint8_t* codes, const float* scale, int64_t slot, int64_t bytes, int64_t D, float* to) {
    const float step = scale[2 * slot], least = scale[2 * slot + 1];
    codes += slot * bytes;
    if (bytes == D)
      for (int64_t d = 0; d < D; d++) to[d] = least + step * codes[d];
    else
      for (int64_t d = 0; d < bytes; d++) {
        to[d] = least + step * (codes[d] & 15);
        to[bytes + d] = least + step * (codes[d] >> 4);
      }
  }
};

std::tuple<Tensor, Tensor> ragged_decode(Tensor q_BND, Tensor k_arena, Tensor v_arena, Tensor pos, Tensor offset_BLH,
                                         Tensor length_BLH, Tensor layer_1, Tensor position_B, int64_t window,
                                         int64_t most, Maybe bias, Maybe k_scale, Maybe v_scale) {
  const std::vector<int64_t> sizes(q_BND.sizes().begin(), q_BND.sizes().end());
  const int64_t B = offset_BLH.size(0), slots = k_arena.size(1);
  STD_TORCH_CHECK(sizes.size() == 3, "q must be (B, N, D)");
  Tensor out = allocated(sizes, q_BND), lse = allocated({sizes[0], sizes[1]}, aoti_torch_dtype_float32());
  if (bias) check_table(*bias, {B, slots}, ScalarType::Float, "bias");
  STD_TORCH_CHECK(k_scale.has_value() == v_scale.has_value(), "k_scale and v_scale go together");
  q_BND = packed(q_BND);
  auto arena_at_layer = [&](auto zero, ScalarType type) {
    using T = decltype(zero);
    Arena<T> arena = arena_of<T>(k_arena, v_arena, pos, offset_BLH, position_B, type);
    arena.offset = at_layer(offset_BLH, offset_BLH, layer_1);
    arena.length = at_layer(length_BLH, offset_BLH, layer_1);
    arena.window = window, arena.bias = bias ? data<float>(*bias) : nullptr;
    check_regions(arena, 1);
    return arena;
  };
  for_type(q_BND, [&](auto zero) {
    using Q = decltype(zero);
    if (k_scale) {
      for (const Maybe& scale : {k_scale, v_scale}) check_table(*scale, {B, slots, 2}, ScalarType::Float, "a scale");
      STD_TORCH_CHECK(sizes[2] == k_arena.size(2) || sizes[2] == 2 * k_arena.size(2),
                      "rows of codes must be as long as q's, or half as long");
      const Arena<uint8_t> codes = arena_at_layer(uint8_t{}, ScalarType::Byte);
      Dequantised whole(codes, sizes[2], data<float>(*k_scale), data<float>(*v_scale));
      attend(whole.arena, data<Q>(q_BND), sizes, most, data<Q>(out), data<float>(lse));
    } else {
      Arena<Q> arena = arena_at_layer(Q{}, q_BND.scalar_type());
      attend(arena, data<Q>(q_BND), sizes, most, data<Q>(out), data<float>(lse));
    }
  });
  return {out, lse};
}

constexpr int64_t kPerBlock = 16;  // tensors, in the order of kernels/decode_blocks.py

// One block's weights for hidden states of width E and heads of width D.
BlockWeights block_weights(const Maybe* given, int64_t E, int64_t D, int64_t kv_heads, ScalarType type) {
  for (int64_t i : {0, 1, 6, 9, 10, 13}) STD_TORCH_CHECK(given[i], "a block needs norms and matrices");
  const Tensor &qkv = *given[1], &out = *given[6], &gate_up = *given[10], &down = *given[13];
  check_row(given[0], E, type, "attention_norm");
  check_row(given[4], D, type, "q_norm");
  check_row(given[5], D, type, "k_norm");
  check_row(given[9], E, type, "mlp_norm");
  STD_TORCH_CHECK(out.size(0) == E && down.size(0) == E && gate_up.size(0) == 2 * down.size(1) &&
                      out.size(1) % (D * kv_heads) == 0 &&
                      (qkv.size(0) == out.size(1) + 2 * D * kv_heads || qkv.size(0) == out.size(1)),
                  "the shapes of weights, arena and x do not belong together");
  BlockWeights weights{};
  weights.attention_norm = as_floats(given[0]), weights.mlp_norm = as_floats(given[9]);
  weights.q_norm = as_floats(given[4]), weights.k_norm = as_floats(given[5]);
  weights.qkv = matrix(qkv, given[2], given[3], E, type);
  weights.out = matrix(out, given[7], given[8], out.size(1), type);
  weights.gate_up = matrix(gate_up, given[11], given[12], E, type);
  weights.down = matrix(down, given[14], given[15], down.size(1), type);
  return weights;
}

Tensor decode_blocks_op(Tensor x_BTE, Tensor cos_BTd, Tensor sin_BTd, std::vector<Maybe> weights, double eps,
                        double qk_eps, std::vector<int64_t> windows, Tensor k_arena, Tensor v_arena, Tensor pos,
                        Tensor slot_BLH, Tensor offset_BLH, Tensor length_BLH, Tensor layer_1, Tensor position_B,
                        Tensor active_B) {
  x_BTE = packed(x_BTE);
  const ScalarType type = x_BTE.scalar_type();
  STD_TORCH_CHECK(x_BTE.dim() == 3 && x_BTE.size(1) == 1 && slot_BLH.dim() == 3, "x must be (B, 1, E)");
  const int64_t B = x_BTE.size(0), E = x_BTE.size(2), D = k_arena.size(2), H = slot_BLH.size(2);
  const int64_t count = windows.size();
  STD_TORCH_CHECK(D > 0 && H > 0, "there must be heads, and numbers in them");
  check_table(active_B, {slot_BLH.size(0)}, ScalarType::Bool, "active_B");
  check_table(layer_1, {1}, ScalarType::Long, "layer_1");
  for (const Tensor& table : {cos_BTd, sin_BTd})
    STD_TORCH_CHECK(table.dim() == 3 && table.size(0) == B && table.size(1) == 1 && 2 * table.size(2) == D,
                    "cosine and sine must be (B, 1, D / 2)");
  STD_TORCH_CHECK(slot_BLH.size(0) == B && count > 0 && int64_t(weights.size()) == count * kPerBlock &&
                      *data<int64_t>(layer_1) + count <= slot_BLH.size(1),
                  "there must be ", kPerBlock, " weights per block, and a layer of the arena for each");
  std::vector<BlockWeights> blocks;
  for (int64_t i = 0; i < count; i++) {
    blocks.push_back(block_weights(&weights[i * kPerBlock], E, D, H, type));
    blocks[i].eps = float(eps), blocks[i].qk_eps = float(qk_eps), blocks[i].window = windows[i];
    STD_TORCH_CHECK(blocks[i].out.in == blocks[0].out.in, "all blocks must have as many heads");
  }
  Tensor y = allocated({x_BTE.sizes().begin(), x_BTE.sizes().end()}, x_BTE);
  for_type(x_BTE, [&](auto zero) {
    using T = decltype(zero);
    Arena<T> arena = arena_of<T>(k_arena, v_arena, pos, slot_BLH, position_B, type);
    arena.slot = at_layer(slot_BLH, slot_BLH, layer_1), arena.active = data<bool>(active_B);
    arena.offset = at_layer(offset_BLH, slot_BLH, layer_1);
    arena.length = at_layer(length_BLH, slot_BLH, layer_1);
    check_slots(arena, count, 1);
    check_regions(arena, count);
    arena.group = blocks[0].out.in / D / H;
    decode_blocks<T>(blocks, arena, as_floats(packed(cos_BTd)).data(), as_floats(packed(sin_BTd)).data(),
                     data<T>(x_BTE), data<T>(y));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(headkv, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  library.impl("silu_mul", TORCH_BOX(&silu_mul));
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("few_rows_linear", TORCH_BOX(&few_rows_linear));
  library.impl("ragged_append", TORCH_BOX(&ragged_append));
  library.impl("ragged_decode", TORCH_BOX(&ragged_decode));
  library.impl("decode_blocks", TORCH_BOX(&decode_blocks_op));
}
