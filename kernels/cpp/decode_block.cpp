#include "decode_block.h"

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
void decode_block(const BlockWeights& weights, Arena<T>& arena, const float* cosine, const float* sine, const T* x,
                  T* y) {
  const int64_t B = arena.batch, H = arena.kv_heads, N = H * arena.group, D = arena.head_dim;
  const int64_t E = weights.out.out, F = weights.down.in, qkv_width = weights.qkv.out;
  std::vector<float> residual(B * E), normed(B * E), qkv(B * qkv_width), q(B * N * D), attended(B * N * D);
  std::vector<float> projected(B * E), gate_up(B * 2 * F), gated(B * F), arranged;
  auto norm_into = [&](const std::vector<float>& weight, const Matrix& next) {
    for (int64_t row = 0; row < B; row++) rms_norm(&residual[row * E], weight, weights.eps, &normed[row * E]);
    next.arrange_rows(normed.data(), B, E, arranged);
  };
  auto heads_of = [&](int64_t row) {  // rotate q and k, q apart from the rest
    for (int64_t head = 0; head < N + H; head++) {
      float* at = &qkv[row * qkv_width + head * D];
      const std::vector<float>& norm = head < N ? weights.q_norm : weights.k_norm;
      if (!norm.empty()) rms_norm(at, norm, weights.qk_eps, at);
      rope(at, D, cosine + row * (D / 2), sine + row * (D / 2));
    }
    std::memcpy(&q[row * N * D], &qkv[row * qkv_width], N * D * sizeof(float));
  };

  for (int64_t i = 0; i < B * E; i++) residual[i] = Element<T>::get(x[i]);
  norm_into(weights.attention_norm, weights.qkv);
  RaggedDecode<T> attention(arena);
#pragma omp parallel
  {
    weights.qkv.product(weights.qkv, arranged.data(), B, qkv.data());
#pragma omp single
    {
      for (int64_t row = 0; row < B; row++) heads_of(row);
      append(arena, &qkv[N * D], &qkv[(N + H) * D], qkv_width, qkv_width);
      attention.set_queries(q.data());
    }
    attention.attend(attended.data());
#pragma omp single
    weights.out.arrange_rows(attended.data(), B, N * D, arranged);
    weights.out.product(weights.out, arranged.data(), B, projected.data());
#pragma omp single
    {
      for (int64_t i = 0; i < B * E; i++) residual[i] += projected[i];
      norm_into(weights.mlp_norm, weights.gate_up);
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
  for (int64_t i = 0; i < B * E; i++) y[i] = Element<T>::put(residual[i] + projected[i]);
}

#define INSTANTIATE(T) \
  template void decode_block(const BlockWeights&, Arena<T>&, const float*, const float*, const T*, T*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(_Float16)
