// Work on the rows of a prompt, one pass over memory each, rounded between the steps as PyTorch rounds.
#pragma once

#include "simd.h"

// y = weight * round(x / rms(x)), rows of `size`.
template <class T>
void rms_norm_rows(const T* x, const T* weight, float eps, int64_t rows, int64_t size, T* y);

// sum = x + residual, y as above from the rounded sum.
template <class T>
void add_rms_norm_rows(const T* x, const T* residual, const T* weight, float eps, int64_t rows, int64_t size, T* y,
                       T* sum);

// y = round(silu(gate)) * up, rows of gate and up, `size` each, one after the other.
template <class T>
void silu_mul_rows(const T* gate_up, int64_t rows, int64_t size, T* y);

// y (rows, heads, D) from x, whose rows are `x_stride` apart; cosine and sine (rows, D / 2) in x's type.
template <class T>
void rope_rows(const T* x, int64_t x_stride, const T* cosine, const T* sine, int64_t rows, int64_t heads, int64_t D,
               T* y);
