#include "decode_blocks.h"

#include <optional>

namespace {

void rms_norm(const float* x, const std::vector<float>& weight, float eps, float* y) {
  const int64_t size = weight.size();
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / float(size) + eps);
  for (int64_t i = 0; i < size; i++) y[i] = x[i] * scale * weight[i];
}

void rope(float* head, int64_t D, const float* cosine, const float* sine) {
  for (int64_t i = 0; i < D / 2; i++) {
    const float first = head[i], second = head[i + D / 2];
    head[i] = first * cosine[i] - second * sine[i];
    head[i + D / 2] = second * cosine[i] + first * sine[i];
  }
}

void silu_mul(const float* gate, const float* up, int64_t count, float* y) {
  Floats some_gate = {}, some_up = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t bytes = (count - i < kLanes ? count - i : kLanes) * sizeof(float);
    std::memcpy(&some_gate, gate + i, bytes);
    std::memcpy(&some_up, up + i, bytes);
    some_gate = silu(some_gate) * some_up;
    std::memcpy(y + i, &some_gate, bytes);
  }
}

}  // namespace

template <class T>
void decode_blocks(const std::vector<BlockWeights>& blocks, Arena<T> arena, const float* cosine, const float* sine,
                   const T* x, T* y) {
  const int64_t B = arena.batch, H = arena.kv_heads, N = H * arena.group, D = arena.head_dim;
  const int64_t E = blocks[0].out.out;
  std::vector<float> residual(B * E), normed(B * E), qkv(B * (N + 2 * H) * D), q(B * N * D), attended(B * N * D);
  std::vector<float> projected(B * E), gate_up, gated, arranged;
  std::optional<RaggedDecode<T>> attention;
  auto norm_into = [&](const std::vector<float>& weight, float eps, const Matrix& next) {
    for (int64_t row = 0; row < B; row++) rms_norm(&residual[row * E], weight, eps, &normed[row * E]);
    next.arrange_rows(normed.data(), B, E, arranged);
  };
  auto add_projected = [&] {
    for (int64_t i = 0; i < B * E; i++) residual[i] += projected[i];
  };
  auto heads_of = [&](const BlockWeights& weights, int64_t row) {  // rotate q and k, q apart from the rest
    const int64_t width = weights.qkv.out, heads = width > N * D ? N + H : N;
    for (int64_t head = 0; head < heads; head++) {
      float* at = &qkv[row * width + head * D];
      const std::vector<float>& norm = head < N ? weights.q_norm : weights.k_norm;
      if (!norm.empty()) rms_norm(at, norm, weights.qk_eps, at);
      rope(at, D, cosine + row * (D / 2), sine + row * (D / 2));
    }
    std::memcpy(&q[row * N * D], &qkv[row * width], N * D * sizeof(float));
  };

  for (int64_t i = 0; i < B * E; i++) residual[i] = Element<T>::get(x[i]);
#pragma omp parallel
  for (const BlockWeights& weights : blocks) {
    const int64_t F = weights.down.in;
#pragma omp single
    {
      if (&weights != &blocks[0]) {
        add_projected();
        arena.slot += H, arena.offset += H, arena.length += H;  // the next layer's
      }
      arena.window = weights.window;
      attention.emplace(arena);
      norm_into(weights.attention_norm, weights.eps, weights.qkv);
    }
    weights.qkv.product(weights.qkv, arranged.data(), B, qkv.data());
#pragma omp single
    {
      for (int64_t row = 0; row < B; row++) heads_of(weights, row);
      if (const int64_t width = weights.qkv.out; width > N * D)
        append<T, float>(arena, 1, {&qkv[N * D], width, 0}, {&qkv[(N + H) * D], width, 0});
      attention->set_queries(q.data());
    }
    attention->attend(attended.data());
#pragma omp single
    weights.out.arrange_rows(attended.data(), B, N * D, arranged);
    weights.out.product(weights.out, arranged.data(), B, projected.data());
#pragma omp single
    {
      add_projected();
      norm_into(weights.mlp_norm, weights.eps, weights.gate_up);
      gate_up.resize(B * 2 * F), gated.resize(B * F);
    }
    weights.gate_up.product(weights.gate_up, arranged.data(), B, gate_up.data());
#pragma omp single
    {
      for (int64_t row = 0; row < B; row++)
        silu_mul(&gate_up[row * 2 * F], &gate_up[row * 2 * F + F], F, &gated[row * F]);
      weights.down.arrange_rows(gated.data(), B, F, arranged);
    }
    weights.down.product(weights.down, arranged.data(), B, projected.data());
  }
  add_projected();
  for (int64_t i = 0; i < B * E; i++) y[i] = Element<T>::put(residual[i]);
}

#define INSTANTIATE(T)                                                                                            \
  template void decode_blocks(const std::vector<BlockWeights>&, Arena<T>, const float*, const float*, const T*, T*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(_Float16)
