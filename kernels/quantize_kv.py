"""Keys and values in 8 or 4 bits per number."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import check_rows
from kernels.language import jit, tl, triton
from kernels.registry import Arguments, Case, Workload, register
from kernels.testing import random

_ROWS = 16
"""Rows per program."""


def quantize_kv(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round every row to 2**bits equally spaced numbers between its least and its largest.

    A row is what one token has in one head. Its numbers become `least + step * code`. Two codes of 4 bits share a byte:
    byte d holds code d in its low half and code d + D/2 in its high half, so that both halves of a row are read in
    order, without shuffles.

    Args:
        x: (..., D), any float dtype; D is even if bits is 4.
        bits: 8 or 4.

    Returns:
        Codes, (..., D * bits / 8) uint8, and (..., 2) fp32: each row's step and least number. Both are NaN for a row
        that is not finite.

    Raises:
        ValueError: bits is neither 8 nor 4, **or** D is odd and bits is 4, **or** x is not of a float dtype.

    Source:
        Liu et al., KIVI, ICML 2024, equation 1 (asymmetric rounding, here per token and head for keys too).

    Example:
        >>> quantize_kv(torch.tensor([0.0, 1.0, 2.0, 15.0]), 4)
        (tensor([ 32, 241], dtype=torch.uint8), tensor([1., 0.]))
    """
    check_rows("x", x)
    if bits not in (8, 4):
        raise ValueError(f"bits is {bits}, it must be 8 or 4")
    if bits == 4 and x.shape[-1] % 2:
        raise ValueError(f"x has rows of {x.shape[-1]} numbers, with 4 bits it must be an even number")
    codes: tuple[Tensor, Tensor] = torch.ops.headkv.quantize_kv(x, bits)
    return codes


def reference(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """What `quantize_kv` computes."""
    x_fp32 = x.float()
    spoiled = (x_fp32 * 0).sum(-1, keepdim=True)
    least = x_fp32.amin(-1, keepdim=True) + spoiled
    step = (x_fp32.amax(-1, keepdim=True) - least) / (2**bits - 1)
    code = torch.where(step > 0, ((x_fp32 - least) / step + 0.5).floor(), 0.0).to(torch.uint8)
    if bits == 4:
        low, high = code.chunk(2, -1)
        code = low | high << 4
    return code, torch.cat((step, least), -1)


def dequantize_kv(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The numbers that codes stand for, in fp32.

    Args:
        codes: (..., D * bits / 8) uint8, from `quantize_kv`.
        scale: (..., 2) fp32, likewise.
        bits: 8 or 4, likewise.

    Returns:
        (..., D) fp32.

    Example:
        >>> dequantize_kv(*quantize_kv(torch.tensor([0.0, 1.0, 2.0, 15.0]), 4), 4)
        tensor([ 0.,  1.,  2., 15.])
    """
    code = torch.cat((codes & 15, codes >> 4), -1) if bits == 4 else codes
    return scale[..., 1:] + scale[..., :1] * code


@jit
def _kernel(x, codes, scale, stride, rows, D: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    """Some rows per program; with 4 bits each as two halves, which meet in the bytes of codes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, WIDTH)
    BYTES: tl.constexpr = D * BITS // 8
    inside = (row < rows)[:, None] & (at < BYTES)[None, :]
    from_low = x + row[:, None] * stride + at[None, :]
    low = tl.load(from_low, mask=inside, other=0.0).to(tl.float32)
    least = tl.min(tl.where(inside, low, float("inf")), 1)
    most = tl.max(tl.where(inside, low, -float("inf")), 1)
    spoiled = tl.sum(low * 0, 1)
    if BITS == 4:
        high = tl.load(from_low + BYTES, mask=inside, other=0.0).to(tl.float32)
        least = tl.minimum(least, tl.min(tl.where(inside, high, float("inf")), 1))
        most = tl.maximum(most, tl.max(tl.where(inside, high, -float("inf")), 1))
        spoiled += tl.sum(high * 0, 1)
    least += spoiled
    step = tl.div_rn(most - least, tl.full((ROWS,), 2**BITS - 1, tl.float32))
    code = _code(low, least, step)
    if BITS == 4:
        code |= _code(high, least, step) << 4
    tl.store(codes + row[:, None] * BYTES + at[None, :], code.to(tl.uint8), mask=inside)
    tl.store(scale + row * 2, step, mask=row < rows)
    tl.store(scale + row * 2 + 1, least, mask=row < rows)


@jit
def _code(x, least, step):  # type: ignore[no-untyped-def]
    """Divisions round as PyTorch's do: another rounding is another code."""
    divisor = tl.where(step > 0, step, 1.0)[:, None] + tl.zeros_like(x)
    code = tl.floor(tl.div_rn(x - least[:, None], divisor) + 0.5)
    return tl.where((step > 0)[:, None], code, 0.0).to(tl.int32)


def launch(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The Triton form of `reference`."""
    codes, scale = fake(x, bits)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if rows.numel():
        D = rows.shape[1]
        width = triton.next_power_of_2(D * bits // 8)
        grid = (triton.cdiv(len(rows), _ROWS),)
        _kernel[grid](rows, codes, scale, rows.stride(0), len(rows), D=D, BITS=bits, ROWS=_ROWS, WIDTH=width)
    return codes, scale


def fake(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Empty codes and scales."""
    *batch, D = x.shape
    codes = torch.empty((*batch, D * bits // 8), dtype=torch.uint8, device=x.device)
    return codes, torch.empty((*batch, 2), dtype=torch.float32, device=x.device)


def cases() -> Iterator[Case]:
    """Rows of every head dim, equal numbers, no rows, and rows that lie apart or are not finite."""
    for bits in (8, 4):
        for D in (64, 80, 96, 128, 256):
            yield Case(name=f"{bits} bits, D={D}", make=partial(_arguments, 7, D, bits))
        yield Case(name=f"{bits} bits, no rows", make=partial(_arguments, 0, 64, bits))
        yield Case(name=f"{bits} bits, equal numbers", make=partial(_equal, bits))
        yield Case(name=f"{bits} bits, not finite", make=partial(_spoiled, bits))
        yield Case(name=f"{bits} bits, strided rows", make=partial(_strided, bits))


def _arguments(rows: int, D: int, bits: int, dtype: torch.dtype) -> Arguments:
    return random(rows, 3, D, dtype=dtype), bits


def _equal(bits: int, dtype: torch.dtype) -> Arguments:
    return torch.full((2, 64), -3.0, dtype=dtype), bits


def _spoiled(bits: int, dtype: torch.dtype) -> Arguments:
    x = random(4, 64, dtype=dtype)
    x[0, 1], x[1, 63], x[2, 33] = float("nan"), float("inf"), -float("inf")
    return x, bits


def _strided(bits: int, dtype: torch.dtype) -> Arguments:
    return random(2, 3, 5, 80, dtype=dtype)[:, :, 1:3, 8:72], bits


def bytes_moved(x: Tensor, bits: int) -> int:
    """Rows in, codes and scales out."""
    return x.nbytes + x.numel() * bits // 8 + 8 * (x.numel() // max(1, x.shape[-1]))


def flops(x: Tensor, bits: int) -> int:
    """Two comparisons, a difference, a division and a sum per number."""
    return 5 * x.numel()


def sized(work: Workload) -> Arguments:
    """The keys of 1024 tokens of a layer, in 8 bits."""
    return torch.empty(work.batch, work.kv_heads, 1024, work.head_dim, dtype=work.dtype, device="meta"), 8


KERNEL = register(__name__, "(Tensor x, int bits) -> (Tensor, Tensor)")
