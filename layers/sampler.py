"""Choose the next token without leaving the device."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def sample(
    logits_BV: Tensor,
    seed_B: Tensor,
    position_B: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Sample one token per row; every row has a random stream of its own.

    The random numbers are a hash of (seed, position, token), so a row's choice does not depend on the batch around it
    and a seed repeats a text. Filters apply in the order temperature, top-k, top-p, min-p. Nothing waits for the
    device.

    Args:
        logits_BV: scores of the next token.
        seed_B: int64, one seed per row.
        position_B: int, position of the token to be chosen.
        temperature: >= 0; 0, or less than fp32 tells from 0, takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches p, in (0, 1].
        min_p: keep tokens at least this fraction as likely as the best, in [0, 1].

    Returns:
        (B,) int64.

    Raises:
        ValueError: temperature, top_k, top_p or min_p is out of range.

    Source:
        Sampling by exponential races (Gumbel-max); min-p: Nguyen et al., 2024; the hash is splitmix64's finaliser.

    Example:
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0]), torch.tensor([5]))
        tensor([1])
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if temperature < torch.finfo(torch.float32).tiny:
        return logits_BV.max(-1).indices  # the first of equals, as argmax, in half its time
    logits_BV = logits_BV.float()
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))
    p_BV = logits_BV.softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        p_BV = p_BV.masked_fill(torch.zeros_like(outside_BV).scatter(-1, order_BV, outside_BV), 0.0)
    if min_p > 0:
        p_BV = p_BV.masked_fill(p_BV < min_p * p_BV.amax(-1, keepdim=True), 0.0)
    return (p_BV / exponential(seed_B, position_B, p_BV.shape[-1])).argmax(-1)


def check_sampling(*, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Refuse settings that `sample` does not take; see there for their meaning.

    Args:
        temperature: as for `sample`.
        top_k: as for `sample`.
        top_p: as for `sample`.
        min_p: as for `sample`.

    Raises:
        ValueError: one is out of range.

    Example:
        >>> check_sampling(temperature=0.7, top_k=0, top_p=0.9, min_p=0.0)
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0 and finite, not {temperature}")
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(f"top_k must be >= 0, top_p in (0, 1], min_p in [0, 1]; not {top_k}, {top_p}, {min_p}")


def exponential(seed_B: Tensor, position_B: Tensor, count: int) -> Tensor:
    """Exponentially distributed numbers that depend on nothing but seed, position and index.

    Args:
        seed_B: int64.
        position_B: int.
        count: numbers per row, V.

    Returns:
        (B, V) fp32, > 0.

    Source:
        Steele et al., Fast Splittable Pseudorandom Number Generators, 2014 (splitmix64).

    Example:
        >>> noise = exponential(torch.tensor([1, 1]), torch.tensor([9, 9]), 4)
        >>> bool((noise[0] == noise[1]).all())
        True
    """
    stream_B1 = _mix(_mix(seed_B.long()) + position_B.long())[:, None]
    bits_BV = _mix(stream_B1 + torch.arange(count, device=seed_B.device)) >> 41 & 0x7FFFFF
    return -torch.log((bits_BV.float() + 0.5) / 2**23)


def _mix(x: Tensor) -> Tensor:
    """Scramble 64-bit integers; products wrap around, shifts are logical."""
    x = x * _GOLDEN + _GOLDEN
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ (x >> 31 & 0x1FFFFFFFF)
