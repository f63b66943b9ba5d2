"""The product of a few rows with a weight matrix, as decoding needs it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check, check_rows
from kernels.registry import Arguments, Case, Workload, register
from kernels.testing import random

MOST_ROWS = 8


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Multiply up to 8 rows by a weight matrix, reading every weight once.

    BLAS libraries are made for many rows: with one row they read bf16 weights at a third of the memory's speed. On a
    CPU this is C++ (`kernels/cpp/linear.cpp`), which sums in fp32 and gives a row the same bits alone and among others.

    Args:
        x: (..., K); with many more rows than 8 BLAS is faster.
        weight: (N, K) in x's dtype, **or** int8 with a scale.
        bias: (N,) in x's dtype, or None.
        scale: (N,) fp32, what one unit of each row of an int8 weight is worth, or None.

    Returns:
        (..., N) in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, **or** a parameter is not contiguous, **or** the weight is
            int8 without a scale or has one and is not int8.

    Example:
        >>> few_rows_linear(torch.tensor([[3.0, 4.0]]), torch.ones(1, 2))
        tensor([[7.]])
    """
    check_rows("x", x)
    dtype = x.dtype if scale is None else torch.int8
    check("weight", weight, shape=(None, *x.shape[-1:]), dtype=[dtype], like=x, contiguous=True)
    if bias is not None:
        check("bias", bias, shape=weight.shape[:1], dtype=[x.dtype], like=x, contiguous=True)
    if scale is not None:
        check("scale", scale, shape=weight.shape[:1], dtype=[torch.float32], like=x, contiguous=True)
    y: Tensor = torch.ops.headkv.few_rows_linear(x, weight, bias, scale)
    return y


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """What `few_rows_linear` computes, for any number of rows."""
    if scale is not None:
        weight = (weight * scale[:, None]).to(x.dtype)
    return F.linear(x, weight, bias)


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """An empty result."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def cases() -> Iterator[Case]:
    """Rows and columns of awkward sizes, with and without a bias and int8 weights."""
    yield Case(name="one number", make=partial(_arguments, 1, 1, 1))
    yield Case(name="8 rows, K=65, bias", make=partial(_arguments, 8, 65, 63, bias=True))
    yield Case(name="K=1000, N=64", make=partial(_arguments, 1, 1000, 64))
    yield Case(name="int8", make=partial(_arguments, 3, 64, 65, int8=True))
    yield Case(name="int8, bias", make=partial(_arguments, 3, 63, 1000, int8=True, bias=True))


def _arguments(rows: int, K: int, N: int, dtype: torch.dtype, *, bias: bool = False, int8: bool = False) -> Arguments:
    weight, scale = random(N, K, seed=1, dtype=dtype) / K**0.5, None
    if int8:
        weight, scale = (50 * random(N, K, seed=1)).clamp(-127, 127).to(torch.int8), random(N, seed=2).abs() / 400
    return random(rows, K, dtype=dtype), weight, random(N, seed=3, dtype=dtype) if bias else None, scale


def bytes_moved(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> int:
    """Rows in and out, and the weight with what belongs to it."""
    result = x.numel() // weight.shape[1] * weight.shape[0] * x.element_size()
    return x.nbytes + result + sum(part.nbytes for part in (weight, bias, scale) if part is not None)


def flops(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> int:
    """A product and a sum for every weight and row."""
    return 2 * x.numel() * weight.shape[0]


def sized(work: Workload) -> Arguments:
    """One decode step's gate and up."""
    x = torch.empty(work.batch, work.hidden, dtype=work.dtype, device="meta")
    return x, x.new_empty(2 * work.intermediate, work.hidden), None, None


KERNEL = register(__name__, "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale) -> Tensor")
