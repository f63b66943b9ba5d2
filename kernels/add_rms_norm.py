"""Addition to the residual stream and root-mean-square normalisation of the sum."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels import rms_norm
from kernels.checks import check, check_rows
from kernels.language import jit, tl, triton
from kernels.registry import Arguments, Case, Workload, register, serve
from kernels.testing import random


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, and normalise the sum as `rms_norm` does, in one pass over memory.

    Args:
        x: (..., E), any float dtype; what a sublayer adds.
        residual: of x's shape and dtype; the residual stream.
        weight: (E,).
        eps: added to the mean square, > 0.

    Returns:
        The normalised sum, and the sum itself, rounded to x's dtype before it is normalised.

    Raises:
        ValueError: the shape, dtype or device of the residual or the weight does not fit.

    Source:
        Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.

    Example:
        >>> add_rms_norm(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 3.0]), torch.ones(2), 1e-6)
        (tensor([0.8485, 1.1314]), tensor([3., 4.]))
    """
    check_rows("x", x)
    check("residual", residual, shape=x.shape, dtype=[x.dtype], like=x)
    check("weight", weight, shape=x.shape[-1:], dtype=[x.dtype], like=x)
    if serve():
        normed: Tensor
        total: Tensor
        normed, total = torch.ops.headkv.add_rms_norm(x, residual, weight, eps)
        return normed, total
    return reference(x, residual, weight, eps)


def reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What `add_rms_norm` computes."""
    total = x + residual
    return rms_norm.reference(total, weight, eps), total


@jit
def _kernel(  # type: ignore[no-untyped-def]
    x, residual, weight, y, total, stride, residual_stride, size, eps, BLOCK: tl.constexpr
):
    """One program per row, which is held in registers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    a = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0).to(tl.float32)
    rounded = (a + b).to(total.dtype.element_ty)
    tl.store(total + row * size + at, rounded, mask=inside)
    sum_fp32 = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(sum_fp32 * sum_fp32) / size + eps)
    scaled = (sum_fp32 * scale).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * size + at, scaled * tl.load(weight + at, mask=inside).to(tl.float32), mask=inside)


def launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The Triton form of `reference`."""
    parts = (part.reshape(-1, x.shape[-1]) for part in (x, residual))
    rows, residual_rows = (part if part.stride(1) == 1 else part.contiguous() for part in parts)
    y, total = fake(x, residual, weight, eps)
    if y.numel():
        block = triton.next_power_of_2(rows.shape[1])
        _kernel[(len(rows),)](
            rows,
            residual_rows,
            weight.contiguous(),
            y,
            total,
            rows.stride(0),
            residual_rows.stride(0),
            rows.shape[1],
            eps,
            BLOCK=block,
            num_warps=min(max(block // 1024, 1), 8),
        )
    return y, total


def fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Empty results."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y)


def cases() -> Iterator[Case]:
    """Rows of awkward sizes, in the ways that they can lie in memory."""
    for size in (1, 63, 64, 65, 1000):
        yield Case(name=f"E={size}", make=partial(_arguments, 3, size))
    yield Case(name="small numbers", make=_small)
    yield Case(name="no rows", make=partial(_arguments, 0, 64))
    yield Case(name="strided rows", make=_strided)


def _arguments(rows: int, size: int, dtype: torch.dtype) -> Arguments:
    x, residual = random(2, rows, size, dtype=dtype)
    return x, residual, random(size, seed=1, dtype=dtype), 1e-6


def _small(dtype: torch.dtype) -> Arguments:
    """So small that epsilon is most of the mean square."""
    x, residual, weight, eps = _arguments(3, 64, dtype)
    return x / 1024, residual / 1024, weight, eps


def _strided(dtype: torch.dtype) -> Arguments:
    x, residual = random(4, 3, 80, dtype=dtype), random(4, 128, seed=2, dtype=dtype)
    return x[:, 1, 8:72], residual[:, ::2], random(64, seed=1, dtype=dtype), 1e-6


def bytes_moved(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> int:
    """Two rows in and two out, and the weight."""
    return 4 * x.nbytes + weight.nbytes


def flops(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> int:
    """Two sums, a square and two products per number."""
    return 5 * x.numel()


def sized(work: Workload) -> Arguments:
    """One decode step's rows."""
    x = torch.empty(work.batch, work.hidden, dtype=work.dtype, device="meta")
    return x, torch.empty_like(x), torch.empty_like(x[0]), 1e-5


KERNEL = register(__name__, "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)")
