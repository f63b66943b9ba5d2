"""How many tokens each KV head may keep of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Allocator(Protocol):
    """Turns a mean budget into one integer per (layer, KV head), on the host, before scores are known."""

    def __call__(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """Share the budget out.

        Args:
            budget: mean tokens per KV head, protected ones included.
            prompt: tokens that there are to keep.
            num_layers: L.
            num_kv_heads: H.

        Returns:
            (L, H) int64, each between 1 and `prompt`, `min(budget, prompt) * L * H` in total.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """The same for every head.

    Example:
        >>> Uniform()(budget=8, prompt=100, num_layers=1, num_kv_heads=2).tolist()
        [[8, 8]]
    """

    def __call__(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """Give every head the budget, or the prompt if that is shorter."""
        return torch.full((num_layers, num_kv_heads), min(budget, prompt))


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadImportance:
    """HeadKV's allocation: a floor for every head and a common pool shared out by importance.

    With b = budget - protected, every head has the floor b (1 - 1/beta); the pool of b/beta per head goes to head h in
    proportion to its score. A larger beta means a *smaller* pool. No head gets more than the prompt: what it cannot use
    flows to the others in proportion to their scores. Totals are exact (largest remainder).

    Args:
        importance_LN: score of each query head, >= 0; a KV head has its group's mean; all zero means uniform.
        beta: >= 1.
        protected: tokens of every head that are kept whatever their score (sinks and recent ones).
        compat: the published code's arithmetic: pool of b // beta, no redistribution, totals only up to rounding.

    Raises:
        ValueError: beta is below 1.

    Source:
        Fu et al., Not All Heads Matter (HeadKV), ICLR 2025, equation 4.

    Example:
        >>> share = HeadImportance(importance_LN=torch.tensor([[3.0, 1.0]]), beta=2.0, protected=2)
        >>> share(budget=10, prompt=100, num_layers=1, num_kv_heads=2).tolist()
        [[12, 8]]
    """

    importance_LN: Tensor
    beta: float
    protected: int
    compat: bool = False

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise ValueError(f"beta must be at least 1, not {self.beta}: larger values share less")

    def __call__(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """Share the budget out; the scores must be those of a model with as many layers and a multiple of its KV heads.

        Raises:
            ValueError: they are not.
        """
        layers, heads = self.importance_LN.shape
        if layers != num_layers or heads % num_kv_heads:
            raise ValueError(
                f"importance scores are for {layers} layers of {heads} query heads, "
                f"the model has {num_layers} layers of {num_kv_heads} KV heads"
            )
        if prompt <= budget:
            return torch.full((num_layers, num_kv_heads), prompt)
        score = self.importance_LN.double().unflatten(1, (num_kv_heads, -1)).mean(-1).flatten()
        score = score / score.sum() if score.sum() > 0 else torch.full_like(score, 1 / len(score))
        free = budget - self.protected
        if self.compat:
            donated = free // self.beta
            extra = (score * (donated * len(score)) + (free - donated)).round().long()
            return (extra.clamp(max=prompt - self.protected) + self.protected).view(num_layers, num_kv_heads)
        floor = free * (1 - 1 / self.beta)
        wanted = water_fill(floor + score * (free / self.beta * len(score)), score, prompt - self.protected)
        return (largest_remainder(wanted, free * len(score)) + self.protected).view(num_layers, num_kv_heads)


def water_fill(wanted: Tensor, weight: Tensor, ceiling: float) -> Tensor:
    """Cap shares at a ceiling and hand the excess to the rest in proportion to their weights.

    When every weight left is zero the excess is shared equally.

    Args:
        wanted: (n,) float64 shares, >= 0.
        weight: (n,) float64, >= 0.
        ceiling: largest share; the total must fit: wanted.sum() <= n * ceiling.

    Returns:
        (n,) float64 with the same sum, none above the ceiling.

    Example:
        >>> water_fill(torch.tensor([9.0, 2.0, 1.0]), torch.tensor([3.0, 2.0, 1.0]), 6.0).tolist()
        [6.0, 4.0, 2.0]
    """
    share = wanted.clone()
    while (excess := (share - ceiling).clamp(min=0).sum()) > 1e-9:
        share = share.clamp(max=ceiling)
        is_open = share < ceiling
        open_weight = weight * is_open if (weight * is_open).sum() > 0 else is_open.double()
        share = share + excess * open_weight / open_weight.sum()
    return share


def largest_remainder(share: Tensor, total: int) -> Tensor:
    """Round shares to integers with an exact total; equal remainders favour the earlier share.

    Args:
        share: (n,) float64, >= 0, whose sum is `total` up to rounding error.
        total: what the integers add up to.

    Returns:
        (n,) int64, each the floor or the ceiling of its share.

    Example:
        >>> largest_remainder(torch.tensor([1.5, 1.25, 1.25], dtype=torch.float64), 4).tolist()
        [2, 1, 1]
    """
    share = (share * 2**20).round() / 2**20
    whole = share.floor()
    missing = total - int(whole.sum())
    first = (share - whole).argsort(descending=True, stable=True)[:missing]
    whole[first] += 1
    return whole.long()
