"""The product of a few rows with a weight matrix, as decoding needs it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 8


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Multiply up to 8 rows by a weight matrix, reading every weight once.

    BLAS libraries are made for many rows: with one row they read bf16 weights at a third of the memory's speed. On a
    CPU this is C++ (`kernels/cpp/linear.cpp`), which sums in fp32 and gives a row the same bits alone and among others.

    Args:
        x: (..., K), with 1 to 8 rows in all.
        weight: (N, K) in x's dtype, **or** int8 with a scale.
        bias: (N,) in x's dtype, or None.
        scale: (N,) fp32, what one unit of each row of an int8 weight is worth, or None.

    Returns:
        (..., N) in x's dtype.

    Example:
        >>> few_rows_linear(torch.tensor([[3.0, 4.0]]), torch.ones(1, 2))
        tensor([[7.]])
    """
    y: Tensor = torch.ops.headkv.few_rows_linear(x, weight, bias, scale)
    return y


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """What `few_rows_linear` computes, for any number of rows."""
    if scale is not None:
        weight = (weight * scale[:, None]).to(x.dtype)
    return F.linear(x, weight, bias)


torch.library.define("headkv::few_rows_linear", "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale) -> Tensor")


torch.library.impl("headkv::few_rows_linear", "CompositeExplicitAutograd")(reference)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


torch.library.register_fake("headkv::few_rows_linear", _fake)
