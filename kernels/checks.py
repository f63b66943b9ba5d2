"""What an operator refuses, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32,)
MOST_SLOTS = 2**31 - 1  # of a row: tables and positions are int32


def check(
    name: str,
    x: Tensor,
    *,
    shape: Sequence[int | None] | None = None,
    dtype: Sequence[torch.dtype] = FLOATS,
    like: Tensor | None = None,
    contiguous: bool = False,
) -> None:
    """Refuse a tensor that a kernel would read wrongly.

    Args:
        name: of the argument.
        x: the tensor.
        shape: its sizes; None where any will do.
        dtype: what it may hold.
        like: a tensor on the device where it must be.
        contiguous: it must be.

    Raises:
        ValueError: anything else; the argument, what was given and what is allowed are named.

    Example:
        >>> check("weight", torch.ones(3), shape=(4,))
        Traceback (most recent call last):
        ValueError: weight has shape (3), it must be (4)
    """
    if shape is not None and not _fits(x.shape, shape):
        raise ValueError(f"{name} has shape {_sizes(x.shape)}, it must be {_sizes(shape)}")
    if x.dtype not in dtype:
        raise ValueError(f"{name} is {_short(x.dtype)}, it must be {' or '.join(map(_short, dtype))}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, it must be on {like.device}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name} has strides {_sizes(x.stride())}, it must be contiguous: call .contiguous()")


def check_arena(k_arena: Tensor, v_arena: Tensor, pos: Tensor, dtype: Sequence[torch.dtype] = FLOATS) -> None:
    """Refuse an arena that is not two contiguous (B, slots, D) tensors of one dtype, and their positions.

    Args:
        k_arena: keys.
        v_arena: values.
        pos: (B, slots) int32.
        dtype: what the arena may hold.

    Raises:
        ValueError: anything else, or more slots than int32 counts.

    Example:
        >>> check_arena(torch.ones(1, 3, 4), torch.ones(1, 3, 4), torch.zeros(1, 2, dtype=torch.int32))
        Traceback (most recent call last):
        ValueError: pos has shape (1, 2), it must be (1, 3)
    """
    check("k_arena", k_arena, shape=(None, None, None), dtype=dtype, contiguous=True)
    if k_arena.shape[1] > MOST_SLOTS:
        raise ValueError(f"k_arena has {k_arena.shape[1]} slots per row, it may have {MOST_SLOTS}")
    check("v_arena", v_arena, shape=k_arena.shape, dtype=[k_arena.dtype], like=k_arena, contiguous=True)
    check("pos", pos, shape=k_arena.shape[:2], dtype=INTEGERS, like=k_arena, contiguous=True)


def check_rows(name: str, x: Tensor, dtype: Sequence[torch.dtype] = FLOATS) -> None:
    """Refuse a tensor that does not consist of rows.

    Args:
        name: of the argument.
        x: the tensor.
        dtype: what it may hold.

    Raises:
        ValueError: it has no dimensions, **or** the last one is empty, **or** the dtype does not fit.

    Example:
        >>> check_rows("x", torch.ones(3, 0))
        Traceback (most recent call last):
        ValueError: x has shape (3, 0), its rows must have at least 1 number
    """
    check(name, x, dtype=dtype)
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"{name} has shape {_sizes(x.shape)}, its rows must have at least 1 number")


def check_groups(name: str, heads: int, kv_name: str, kv_heads: int) -> None:
    """Refuse query heads that cannot share KV heads evenly.

    Args:
        name: of the queries.
        heads: N.
        kv_name: of what has the KV heads.
        kv_heads: H.

    Raises:
        ValueError: there is none of either, **or** N is no multiple of H.

    Example:
        >>> check_groups("q_BND", 3, "k_BHSD", 2)
        Traceback (most recent call last):
        ValueError: q_BND has 3 heads, it must have a multiple of k_BHSD's 2, and neither may be 0
    """
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{name} has {heads} heads, it must have a multiple of {kv_name}'s {kv_heads}, and neither may be 0"
        )


def check_inside(first: Tensor, count: Tensor | int, slots: int) -> None:
    """On a CPU, refuse slots outside the arena, which PyTorch would take from its other end.

    Args:
        first: first slots, of any shape.
        count: how many from there on; where it is 0, the first one does not matter.
        slots: of the arena.

    Raises:
        IndexError: there is one outside.

    Example:
        >>> check_inside(torch.tensor([-1]), 1, 4)
        Traceback (most recent call last):
        IndexError: slots from -1 on are outside the arena of 4 slots
    """
    if first.device.type == "cpu":
        count = torch.as_tensor(count)
        outside = ((first < 0) | (first + count > slots)) & (count != 0) | (count < 0)
        if bool(outside.any()):
            raise IndexError(f"slots from {int(first[outside][0])} on are outside the arena of {slots} slots")


def _fits(sizes: Sequence[int], allowed: Sequence[int | None]) -> bool:
    if len(sizes) != len(allowed):
        return False
    for size, right in zip(sizes, allowed, strict=True):  # noqa: SIM110 - all() of a generator takes longer
        if right is not None and size != right:
            return False
    return True


def _sizes(sizes: Sequence[int | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in sizes)})"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
