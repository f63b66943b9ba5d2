"""The gate of a gated MLP."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_rows
from kernels.language import jit, tl, triton
from kernels.registry import Arguments, Case, Workload, register, serve
from kernels.testing import random

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """Multiply SiLU of the first half of the last dimension by the second half.

    Args:
        gate_up: (..., 2F), gate first, any float dtype.

    Returns:
        (..., F).

    Raises:
        ValueError: the last dimension is odd or empty, **or** the dtype does not fit.

    Source:
        Shazeer, GLU Variants Improve Transformer, 2020, equation 6 (SwiGLU).

    Example:
        >>> silu_mul(torch.tensor([0.0, 2.0]))
        tensor([0.])
    """
    check_rows("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}, its last size must be even")
    if serve():
        y: Tensor = torch.ops.headkv.silu_mul(gate_up)
        return y
    return reference(gate_up)


def reference(gate_up: Tensor) -> Tensor:
    """What `silu_mul` computes."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@jit
def _kernel(gate_up, y, stride, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per BLOCK of a row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + at, gate * tl.sigmoid(gate) * up, mask=inside)


def launch(gate_up: Tensor) -> Tensor:
    """The Triton form of `reference`."""
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    size = rows.shape[1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], size)
    if y.numel():
        _kernel[(len(rows), triton.cdiv(size, _BLOCK))](rows, y, rows.stride(0), size, BLOCK=_BLOCK, num_warps=4)
    return y


def fake(gate_up: Tensor) -> Tensor:
    """An empty result."""
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def cases() -> Iterator[Case]:
    """Rows of awkward sizes, in the ways that they can lie in memory."""
    for size in (1, 63, 64, 65, 1000, 1025):
        yield Case(name=f"F={size}", make=partial(_arguments, size))
    yield Case(name="no rows", make=lambda dtype: (random(0, 64, dtype=dtype),))
    yield Case(name="strided rows", make=lambda dtype: (random(4, 3, 80, dtype=dtype)[:, 1, 8:72],))
    yield Case(name="numbers apart", make=lambda dtype: (random(3, 64, dtype=dtype)[:, ::2],))


def _arguments(size: int, dtype: torch.dtype) -> Arguments:
    return (3 * random(3, 2 * size, dtype=dtype),)


def bytes_moved(gate_up: Tensor) -> int:
    """Gate and up in, their product out."""
    return gate_up.nbytes * 3 // 2


def flops(gate_up: Tensor) -> int:
    """An exponential, a sum, a quotient and two products per result."""
    return 5 * gate_up.numel() // 2


def sized(work: Workload) -> Arguments:
    """One decode step's rows."""
    return (torch.empty(work.batch, 2 * work.intermediate, dtype=work.dtype, device="meta"),)


KERNEL = register(__name__, "(Tensor gate_up) -> Tensor")
