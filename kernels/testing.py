"""What every form of an operator must meet: the specification's numbers, with nothing read that was never written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.registry import Arguments, Kernel


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same for the same size and seed.

    Args:
        *size: of the tensor.
        seed: another one gives other numbers.
        dtype: they are rounded to it.

    Example:
        >>> torch.equal(random(2, 3), random(2, 3))
        True
    """
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True, kw_only=True)
class RaggedArena:
    """Filled regions of an arena, as operators take them; layer 1 of 2 is the one in use.

    Args:
        k: (B, slots, D) keys.
        v: (B, slots, D) values.
        pos: (B, slots) int32, absolute position of each slot, in no order within a region.
        offset: (B, L, H) int32, first slot of each region.
        length: (B, L, H) int32, filled slots of each region.
        layer: (1,) int64.
        position: (B,) int32, the next token's position in each row, beyond all that are stored.
    """

    k: Tensor
    v: Tensor
    pos: Tensor
    offset: Tensor
    length: Tensor
    layer: Tensor
    position: Tensor


def ragged_arena(lengths_BH: Sequence[Sequence[int]], D: int, *, dtype: torch.dtype, seed: int = 0) -> RaggedArena:
    """Regions of given lengths, out of order, each with a free slot behind it and gaps between.

    Keys and values outside the regions are NaN, and positions there are newer than any query's, so that no window hides
    them. The tables' other layer points to such a slot.

    Args:
        lengths_BH: filled slots of each KV head's region.
        D: head dim.
        dtype: of keys and values.
        seed: another one gives other numbers.

    Example:
        >>> arena = ragged_arena([[2, 0]], 4, dtype=torch.float32)
        >>> int(arena.k.isfinite().all(-1).sum())
        2
    """
    lengths = torch.tensor(lengths_BH, dtype=torch.int32)
    B, H = lengths.shape
    longest, slots = int(lengths.max()), int((lengths + 3).sum(1).max()) + 3
    order = torch.Generator().manual_seed(seed)
    k, v = (torch.full((B, slots, D), float("nan"), dtype=dtype) for _ in range(2))
    pos = torch.full((B, slots), torch.iinfo(torch.int32).max, dtype=torch.int32)
    offset, length = torch.zeros(B, 2, H, dtype=torch.int32), torch.ones(B, 2, H, dtype=torch.int32)
    length[:, 1] = lengths
    for row in range(B):
        first = 1
        for head in torch.randperm(H, generator=order).tolist():
            count = int(lengths[row, head])
            here = slice(first, first + count)
            k[row, here] = random(count, D, seed=seed + 2 * (row * H + head), dtype=dtype)
            v[row, here] = random(count, D, seed=seed + 2 * (row * H + head) + 1, dtype=dtype)
            pos[row, here] = torch.randperm(longest, generator=order)[:count].int()
            offset[row, 1, head] = first
            first += count + 3
    position = longest + torch.arange(B, dtype=torch.int32)
    return RaggedArena(k=k, v=v, pos=pos, offset=offset, length=length, layer=torch.tensor([1]), position=position)


def check(kernel: Kernel, arguments: Arguments, form: Callable[..., Any]) -> None:
    """Hold one form of an operator against its reference, in results and in what it writes to its arguments.

    The exact numbers are the reference's with every float argument in fp32. The form may be off by twice what the
    reference is in the arguments' own dtype, and by one rounding of the largest number. Integers must be equal, and so
    must infinities and NaN. Memory that the form allocates holds NaN before it writes to it.

    Args:
        kernel: the operator.
        arguments: of the operator, left as they are.
        form: computes it, with the reference's arguments and results.

    Raises:
        AssertionError: the form is not the operator.
    """
    exact = _run(kernel.reference, each_tensor(_to_fp32, arguments))
    low = _run(kernel.reference, arguments)
    with poisoned():
        out = _run(form, arguments)
    assert len(out) == len(low) == len(exact), f"{kernel.name} returns {len(out)} tensors, not {len(low)}"
    for index, (a, b, c) in enumerate(zip(out, low, exact, strict=True)):
        label = f"{kernel.name}, tensor {index}"
        assert a.shape == b.shape and a.dtype == b.dtype, f"{label}: {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        if not a.is_floating_point():
            assert torch.equal(a, b), f"{label}: integers differ"
            continue
        same_ends = torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
        assert same_ends, f"{label}: what is not finite differs"
        a, b, c = (x.double().where(a.isfinite(), 0.0) for x in (a, b, c))
        if a.numel():
            error, error_low = ((x - c).abs().max().item() for x in (a, b))
            allowed = 2 * error_low + (torch.finfo(low[index].dtype).eps + 1e-6) * c.abs().max().item()
            assert error <= allowed, f"{label}: off by {error:.3g}, {allowed:.3g} allowed"


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, and integers with their largest value, until it is written."""
    switches: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        switches.fill_uninitialized_memory = before[1]


def each_tensor(change: Callable[[Tensor], Tensor], arguments: Any) -> Any:
    """Arguments with every tensor changed, also those in lists.

    Args:
        change: gives a tensor for a tensor.
        arguments: of an operator.

    Example:
        >>> each_tensor(lambda x: x + 1, (torch.zeros(1), [torch.ones(1), None], 5))
        (tensor([1.]), [tensor([2.]), None], 5)
    """
    if isinstance(arguments, (tuple, list)):
        return type(arguments)(each_tensor(change, x) for x in arguments)
    return change(arguments) if isinstance(arguments, Tensor) else arguments


def _to_fp32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _run(function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """What a function returns, and its tensor arguments afterwards."""
    copies = each_tensor(lambda x: x.clone(memory_format=torch.preserve_format), arguments)
    result = function(*copies)
    results = [result] if isinstance(result, Tensor) else list(result or ())
    return [*results, *(x for x in copies if isinstance(x, Tensor))]
