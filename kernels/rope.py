"""Rotary position embedding: the rotation itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import check
from kernels.language import jit, tl, triton
from kernels.registry import Arguments, Case, Workload, register, serve
from kernels.testing import random


def apply_rope(x_BTHD: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """Rotate the two halves of every head vector against each other.

    Args:
        x_BTHD: queries or keys, any float dtype; D is even.
        cos_BTd: cosine of each angle, d = D / 2, as `layers.rope.RotaryEmbedding` makes them; rounded to x's dtype.
        sin_BTd: sine of each angle.

    Returns:
        (B, T, H, D) in x's dtype.

    Raises:
        ValueError: D is odd, **or** a shape, dtype or device does not fit.

    Source:
        Su et al., RoFormer, 2021, equation 34, in the half-rotation order of the published checkpoints.

    Example:
        >>> quarter_turn = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
        >>> apply_rope(torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), *quarter_turn).flatten()
        tensor([-2.,  1.])
    """
    check("x_BTHD", x_BTHD, shape=(None, None, None, None))
    B, T, _, D = x_BTHD.shape
    if D % 2:
        raise ValueError(f"x_BTHD has a head dim of {D}, it must be even")
    check("cos_BTd", cos_BTd, shape=(B, T, D // 2), like=x_BTHD)
    check("sin_BTd", sin_BTd, shape=(B, T, D // 2), like=x_BTHD)
    if serve():
        if not x_BTHD.is_cuda:  # Triton rounds as it reads
            cos_BTd, sin_BTd = cos_BTd.to(x_BTHD.dtype), sin_BTd.to(x_BTHD.dtype)
        y_BTHD: Tensor = torch.ops.headkv.rope(x_BTHD, cos_BTd, sin_BTd)
        return y_BTHD
    return reference(x_BTHD, cos_BTd, sin_BTd)


def reference(x_BTHD: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """What `apply_rope` computes."""
    cos, sin = cos_BTd[:, :, None].to(x_BTHD.dtype), sin_BTd[:, :, None].to(x_BTHD.dtype)
    first, second = x_BTHD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@jit
def _kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, y, tokens, heads, row, token, head, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per BLOCK heads of a token."""
    which = tl.program_id(0).to(tl.int64)
    heads_here = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    at = tl.arange(0, BLOCK_HALF)
    inside = (heads_here < heads)[:, None] & (at < HALF)
    start = x + which // tokens * row + which % tokens * token + (heads_here * head)[:, None] + at
    first = tl.load(start, mask=inside).to(tl.float32)
    second = tl.load(start + HALF, mask=inside).to(tl.float32)
    c = tl.load(cos + which * HALF + at, mask=at < HALF).to(x.dtype.element_ty).to(tl.float32)
    s = tl.load(sin + which * HALF + at, mask=at < HALF).to(x.dtype.element_ty).to(tl.float32)
    target = y + ((which * heads + heads_here) * 2 * HALF)[:, None] + at
    tl.store(target, first * c - second * s, mask=inside)
    tl.store(target + HALF, second * c + first * s, mask=inside)


def launch(x_BTHD: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """The Triton form of `reference`."""
    B, T, H, D = x_BTHD.shape
    y_BTHD = torch.empty_like(x_BTHD, memory_format=torch.contiguous_format)
    if y_BTHD.numel():
        x_BTHD = x_BTHD if x_BTHD.stride(3) == 1 else x_BTHD.contiguous()
        block_half = triton.next_power_of_2(D // 2)
        block = min(triton.next_power_of_2(H), max(1024 // block_half, 1))
        _kernel[(B * T, triton.cdiv(H, block))](
            x_BTHD,
            cos_BTd.contiguous(),
            sin_BTd.contiguous(),
            y_BTHD,
            T,
            H,
            *x_BTHD.stride()[:3],
            HALF=D // 2,
            BLOCK_HALF=block_half,
            BLOCK=block,
            num_warps=min(max(block * block_half // 256, 1), 4),
        )
    return y_BTHD


def fake(x_BTHD: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """An empty result."""
    return torch.empty_like(x_BTHD, memory_format=torch.contiguous_format)


def cases() -> Iterator[Case]:
    """Heads of all sizes, some of them parts of a wider product."""
    yield Case(name="D=2", make=partial(_arguments, 1, 7, 1, 2))
    yield Case(name="D=64", make=partial(_arguments, 3, 1, 8, 64))
    yield Case(name="D=80", make=partial(_arguments, 1, 5, 3, 80))
    yield Case(name="D=96", make=partial(_arguments, 3, 2, 4, 96))
    yield Case(name="D=128, more heads than a block", make=partial(_arguments, 1, 3, 33, 128))
    yield Case(name="D=256", make=partial(_arguments, 1, 5, 2, 256))
    yield Case(name="no token", make=lambda dtype: (random(1, 0, 2, 8, dtype=dtype), *random(2, 1, 0, 4, dtype=dtype)))


def _arguments(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> Arguments:
    angle_BTd = 9 * random(B, T, D // 2, seed=1)
    return random(B, T, H + 2, D, dtype=dtype)[:, :, :H], angle_BTd.cos().to(dtype), angle_BTd.sin().to(dtype)


def bytes_moved(x_BTHD: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> int:
    """Heads in and out, and the angles."""
    return 2 * x_BTHD.nbytes + cos_BTd.nbytes + sin_BTd.nbytes


def flops(x_BTHD: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> int:
    """Two products and a sum per number."""
    return 3 * x_BTHD.numel()


def sized(work: Workload) -> Arguments:
    """One decode step's queries, which lie beside the keys and values."""
    heads = work.heads + 2 * work.kv_heads
    x_BTHD = torch.empty(work.batch, 1, heads, work.head_dim, dtype=work.dtype, device="meta")
    cos_BTd = torch.empty(work.batch, 1, work.head_dim // 2, device="meta")
    return x_BTHD[:, :, : work.heads], cos_BTd, cos_BTd


KERNEL = register(__name__, "(Tensor x_BTHD, Tensor cos_BTd, Tensor sin_BTd) -> Tensor")
