// y = x Wᵀ for a few rows of x: every weight is read once, from memory at its full speed.
#pragma once

#include <vector>

#include "simd.h"

// A weight matrix (out, in), row by row, whose elements have the type that `product` was made for.
struct Matrix {
  const void* weight;
  const float* scale;  // per row, or null
  std::vector<float> bias;
  int64_t out, in;
  void (*arrange_rows)(const float* x, int64_t rows, int64_t in, std::vector<float>& arranged);
  void (*product)(const Matrix&, const float* arranged, int64_t rows, float* y);
};

constexpr int64_t kWorthThreads = 65536;  // weights below which starting threads costs more than it gains

// The two functions above for weights of type W. `product` shares its work among the threads of the parallel region that
// all of them call it in.
template <class W>
void use_type(Matrix& matrix);
