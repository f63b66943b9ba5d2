"""Root-mean-square normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import check, check_rows
from kernels.language import jit, tl, triton
from kernels.registry import Arguments, Case, Workload, register, serve
from kernels.testing import random


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale every row to unit root mean square, in fp32, then by a learned weight.

    Args:
        x: (..., E), any float dtype.
        weight: (E,).
        eps: added to the mean square, > 0.

    Returns:
        (..., E) in x's dtype.

    Raises:
        ValueError: the dtype of x, **or** the weight's shape, dtype or device does not fit.

    Source:
        Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 1e-6)
        tensor([0.8485, 1.1314])
    """
    check_rows("x", x)
    check("weight", weight, shape=x.shape[-1:], dtype=[x.dtype], like=x)
    if serve():
        y: Tensor = torch.ops.headkv.rms_norm(x, weight, eps)
        return y
    return reference(x, weight, eps)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` computes."""
    x_fp32 = x.float()
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return weight * (x_fp32 * scale).to(x.dtype)


@jit
def _kernel(x, weight, y, stride, size, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per row, which is held in registers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    x_fp32 = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_fp32 * x_fp32) / size + eps)
    scaled = (x_fp32 * scale).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * size + at, scaled * tl.load(weight + at, mask=inside).to(tl.float32), mask=inside)


def launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The Triton form of `reference`."""
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        block = triton.next_power_of_2(rows.shape[1])
        warps = min(max(block // 1024, 1), 8)
        _kernel[(len(rows),)](
            rows, weight.contiguous(), y, rows.stride(0), rows.shape[1], eps, BLOCK=block, num_warps=warps
        )
    return y


def fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """An empty result."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def cases() -> Iterator[Case]:
    """Rows of awkward sizes, in the ways that they can lie in memory."""
    for size in (1, 63, 64, 65, 1000):
        yield Case(name=f"E={size}", make=partial(_arguments, 3, size))
    yield Case(name="no rows", make=partial(_arguments, 0, 64))
    yield Case(
        name="strided rows",
        make=lambda dtype: (random(4, 3, 80, dtype=dtype)[:, 1, 8:72], random(64, dtype=dtype), 1e-6),
    )


def _arguments(rows: int, size: int, dtype: torch.dtype) -> Arguments:
    return random(rows, size, dtype=dtype), random(size, seed=1, dtype=dtype), 1e-6


def bytes_moved(x: Tensor, weight: Tensor, eps: float) -> int:
    """Rows in and out, and the weight."""
    return 2 * x.nbytes + weight.nbytes


def flops(x: Tensor, weight: Tensor, eps: float) -> int:
    """A square, a sum, and two products per number."""
    return 4 * x.numel()


def sized(work: Workload) -> Arguments:
    """One decode step's rows."""
    x = torch.empty(work.batch, work.hidden, dtype=work.dtype, device="meta")
    return x, torch.empty_like(x[0]), 1e-5


KERNEL = register(__name__, "(Tensor x, Tensor weight, float eps) -> Tensor")
