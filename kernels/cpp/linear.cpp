#include "linear.h"

namespace {

constexpr int64_t kFewRows = 4;  // rows whose sums fit in registers together

// Products of `Rows` arranged rows of x with two neighbouring rows of the weight.
template <int Rows, class W>
void dot_pair(const float* x, int64_t x_stride, const W* first, const W* second, int64_t K, float* sums) {
  constexpr int parts = Element<W>::parts;
  Floats total[2][Rows] = {};
  auto add = [&](const float* x_at, const Floats* a, const Floats* b) {
    for (int row = 0; row < Rows; row++)
      for (int part = 0; part < parts; part++) {
        Floats x_part = *reinterpret_cast<const Floats*>(x_at + row * x_stride + part * kLanes);
        total[0][row] += x_part * a[part];
        total[1][row] += x_part * b[part];
      }
  };
  Floats a[parts], b[parts];
  int64_t k = 0;
  for (; k + kStep<W> <= K; k += kStep<W>) {
    __builtin_prefetch(reinterpret_cast<const char*>(first + k) + kPrefetch);
    __builtin_prefetch(reinterpret_cast<const char*>(second + k) + kPrefetch);
    Element<W>::load(first + k, a);
    Element<W>::load(second + k, b);
    add(x + k, a, b);
  }
  if (k < K) {
    load_tail(first + k, K - k, a);
    load_tail(second + k, K - k, b);
    add(x + k, a, b);
  }
  for (int row = 0; row < Rows; row++) {
    sums[2 * row] = sum(total[0][row]);
    sums[2 * row + 1] = sum(total[1][row]);
  }
}

template <class W>
void product(const Matrix& matrix, const float* x, int64_t rows, float* y) {
  const int64_t N = matrix.out, K = matrix.in, x_stride = padded<W>(K), pairs = (N + 1) / 2;
  const float *scale = matrix.scale, *bias = matrix.bias.empty() ? nullptr : matrix.bias.data();
#pragma omp for schedule(static)
  for (int64_t pair = 0; pair < pairs; pair++) {
    const int64_t n = 2 * pair, width = n + 1 < N ? 2 : 1;
    const W *first = static_cast<const W*>(matrix.weight) + n * K, *second = first + (width - 1) * K;
    for (int64_t row = 0; row < rows; row += kFewRows) {
      const float* x_at = x + row * x_stride;
      const int64_t some = rows - row < kFewRows ? rows - row : kFewRows;
      float sums[2 * kFewRows];
      switch (some) {
        case 1: dot_pair<1>(x_at, x_stride, first, second, K, sums); break;
        case 2: dot_pair<2>(x_at, x_stride, first, second, K, sums); break;
        case 3: dot_pair<3>(x_at, x_stride, first, second, K, sums); break;
        default: dot_pair<4>(x_at, x_stride, first, second, K, sums);
      }
      for (int64_t i = 0; i < some; i++)
        for (int64_t j = 0; j < width; j++)
          y[(row + i) * N + n + j] = sums[2 * i + j] * (scale ? scale[n + j] : 1.0f) + (bias ? bias[n + j] : 0.0f);
    }
  }
}

template <class W>
void arrange_rows(const float* x, int64_t rows, int64_t in, std::vector<float>& arranged) {
  arranged.resize(rows * padded<W>(in));
  for (int64_t row = 0; row < rows; row++) arrange<W>(x + row * in, in, 1.0f, &arranged[row * padded<W>(in)]);
}

}  // namespace

template <class W>
void use_type(Matrix& matrix) {
  matrix.arrange_rows = arrange_rows<W>;
  matrix.product = product<W>;
}

template void use_type<float>(Matrix&);
template void use_type<BFloat16>(Matrix&);
template void use_type<_Float16>(Matrix&);
template void use_type<int8_t>(Matrix&);
