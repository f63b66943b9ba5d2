#include "rows.h"

namespace {

template <class T>
float rounded(float x) {
  return Element<T>::get(Element<T>::put(x));
}

template <class T>
void rms_norm_row(const T* x, const T* weight, float eps, int64_t size, T* y) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < size; i++) squares += Element<T>::get(x[i]) * Element<T>::get(x[i]);
  const float scale = 1.0f / std::sqrt(squares / float(size) + eps);
  for (int64_t i = 0; i < size; i++)
    y[i] = Element<T>::put(Element<T>::get(weight[i]) * rounded<T>(Element<T>::get(x[i]) * scale));
}

}  // namespace

template <class T>
void rms_norm_rows(const T* x, const T* weight, float eps, int64_t rows, int64_t size, T* y) {
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t row = 0; row < rows; row++) rms_norm_row(x + row * size, weight, eps, size, y + row * size);
}

template <class T>
void add_rms_norm_rows(const T* x, const T* residual, const T* weight, float eps, int64_t rows, int64_t size, T* y,
                       T* sum) {
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t row = 0; row < rows; row++) {
    const int64_t start = row * size;
    for (int64_t i = start; i < start + size; i++)
      sum[i] = Element<T>::put(Element<T>::get(x[i]) + Element<T>::get(residual[i]));
    rms_norm_row(sum + start, weight, eps, size, y + start);
  }
}

template <class T>
void silu_mul_rows(const T* gate_up, int64_t rows, int64_t size, T* y) {
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t row = 0; row < rows; row++) {
    const T *gate = gate_up + row * 2 * size, *up = gate + size;
    auto group = [](const T* gates, const T* ups, T* to) {
      T activated[kLanes];
      narrow(silu(widen(gates)), activated);
      narrow(widen(activated) * widen(ups), to);
    };
    int64_t start = 0;
    for (; start + kLanes <= size; start += kLanes) group(gate + start, up + start, y + row * size + start);
    if (start < size) {
      const int64_t bytes = (size - start) * sizeof(T);
      T gates[kLanes] = {}, ups[kLanes] = {}, to[kLanes];
      std::memcpy(gates, gate + start, bytes);
      std::memcpy(ups, up + start, bytes);
      group(gates, ups, to);
      std::memcpy(y + row * size + start, to, bytes);
    }
  }
}

template <class T>
void rope_rows(const T* x, int64_t x_stride, const T* cosine, const T* sine, int64_t rows, int64_t heads, int64_t D,
               T* y) {
  const int64_t half = D / 2;
  auto product = [](T a, T b) { return rounded<T>(Element<T>::get(a) * Element<T>::get(b)); };
#pragma omp parallel for schedule(static) if (rows > 1)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t head = 0; head < heads; head++) {
      const T *first = x + row * x_stride + head * D, *second = first + half;
      const T *c = cosine + row * half, *s = sine + row * half;
      T* to = y + (row * heads + head) * D;
      for (int64_t i = 0; i < half; i++) {
        to[i] = Element<T>::put(product(first[i], c[i]) - product(second[i], s[i]));
        to[i + half] = Element<T>::put(product(second[i], c[i]) + product(first[i], s[i]));
      }
    }
}

#define INSTANTIATE(T)                                                                             \
  template void rms_norm_rows(const T*, const T*, float, int64_t, int64_t, T*);                    \
  template void add_rms_norm_rows(const T*, const T*, const T*, float, int64_t, int64_t, T*, T*);  \
  template void silu_mul_rows(const T*, int64_t, int64_t, T*);                                     \
  template void rope_rows(const T*, int64_t, const T*, const T*, int64_t, int64_t, int64_t, T*);
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(_Float16)
