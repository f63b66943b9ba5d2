"""Where the next generated token goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layers.options import check_range


@dataclass(frozen=True, kw_only=True)
class ReplaceWorst:
    """A region holds its budget and one slot more; once it is full, each new token replaces the worst one.

    A step appends, attends to all that is there, scores what is there by the weights of that attention, and chooses the
    slot of the next token: the one with the lowest score (of equals, the oldest token). So at every step the tokens
    are those of a loop that appends, attends and then evicts one; the evicted one only stays until it is written over.

    Args:
        accumulate: a token's score is the sum of its weights over all queries since it came; otherwise the last query's
            weight.
        heads: "group": every KV head by the mean weight of its query heads. "layer": all KV heads of a layer by the
            mean of all query heads, so that they keep the same tokens, which takes equal budgets.
        recent: last tokens, the newest included, that may not go; 0 lets even the newest one go.
        recent_share: the same as a share of a region's budget, 0 to 1; the larger number counts.

    Raises:
        ValueError: a number is out of range, **or** heads is neither.

    Example:
        >>> ReplaceWorst(accumulate=True, heads="group", recent_share=0.5).protected(torch.tensor([8, 3])).tolist()
        [4, 1]
    """

    accumulate: bool
    heads: Literal["group", "layer"]
    recent: int = 0
    recent_share: float = 0.0

    def __post_init__(self) -> None:
        if self.heads not in ("group", "layer"):
            raise ValueError(f'heads must be "group" or "layer", not {self.heads!r}')
        check_range("recent", self.recent, 0)
        check_range("recent_share", self.recent_share, 0, 1)

    def protected(self, budget: Tensor) -> Tensor:
        """How many of the last tokens may not go, of regions with such budgets in tokens; int32."""
        share = (budget.double() * self.recent_share).floor()
        return share.clamp(min=self.recent).int()


def worst_slot(
    offset_BLH: Tensor, kept_BLH: Tensor, capacity_BLH: Tensor, generated_B: Tensor, worst_BLH: Tensor
) -> Tensor:
    """Append into free slots, and once a region is full replace its worst token.

    Args:
        offset_BLH: first slot of each region.
        kept_BLH: prompt tokens in each region.
        capacity_BLH: slots of each region.
        generated_B: tokens generated since the prompt.
        worst_BLH: slot of the arena with each region's worst token; read where a region is full.

    Returns:
        (B, L, H): slot of the arena.

    Example:
        >>> one = torch.ones(1, 1, 1, dtype=torch.int32)
        >>> [int(worst_slot(10 * one, 2 * one, 4 * one, torch.tensor([n]), 11 * one)) for n in range(4)]
        [12, 13, 11, 11]
    """
    held_BLH = kept_BLH + generated_B[:, None, None]
    return torch.where(held_BLH < capacity_BLH, offset_BLH + held_BLH, worst_BLH)


def ring_slot(start_BLH: Tensor, kept_BLH: Tensor, capacity_BLH: Tensor, generated_B: Tensor) -> Tensor:
    """Append into free slots, and once a region is full replace its oldest token that may go.

    Slots from `start` to the end of a region form a ring: prompt tokens kept beyond `start` come first, then generated
    ones, so the cursor runs from the first free slot to the region's end and goes on at `start`.

    Args:
        start_BLH: first slot, within its region, that may ever be replaced.
        kept_BLH: prompt tokens in each region, at least `start`.
        capacity_BLH: slots of each region, more than `start`.
        generated_B: tokens generated since the prompt.

    Returns:
        (B, L, H): slot within the region.

    Source:
        Xiao et al., StreamingLLM, 2023 (a ring behind protected sinks).

    Example:
        >>> one = torch.ones(1, 1, 1, dtype=torch.int32)
        >>> [int(ring_slot(one, 2 * one, 4 * one, torch.tensor([n]))) for n in range(5)]
        [2, 3, 1, 2, 3]
    """
    return start_BLH + (kept_BLH - start_BLH + generated_B[:, None, None]) % (capacity_BLH - start_BLH)
