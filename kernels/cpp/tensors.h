// What every operator needs to take torch's tensors apart and to make new ones.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "simd.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

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
inline Tensor allocated(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor allocated(const std::vector<int64_t>& sizes, const Tensor& like) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return allocated(sizes, dtype);
}

inline Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

inline void check_table(const Tensor& table, const std::vector<int64_t>& sizes, ScalarType type, const char* what) {
  STD_TORCH_CHECK(std::vector<int64_t>(table.sizes().begin(), table.sizes().end()) == sizes && table.is_contiguous() &&
                      table.scalar_type() == type,
                  what, " has the wrong shape or dtype, or is not contiguous");
}
