"""What a compression method consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from layers.compress.allocators import Allocator, SharingAllocator
from layers.compress.scorers import Observation, Scorer

Allocate = Callable[..., Allocator]
"""Makes an allocator, given `protected`: the tokens of every head that the method keeps whatever their score."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A scorer, an allocator, and what is protected.

    Args:
        name: as users write it.
        paper: citation.
        summary: one line for a list of methods.
        scorer: how much each token matters.
        allocator: how many tokens each KV head keeps.
        sinks: first tokens of the sequence that every head keeps.
        recent: last tokens of the prompt that every head keeps.
        ring_over_prompt: once the decode room is full, new tokens replace the oldest token that is not a sink, prompt
            included; otherwise they replace the oldest generated one.
        default_budget: tokens per KV head when the user names none; None for a method that keeps everything.
    """

    name: str
    paper: str
    summary: str
    scorer: Scorer
    allocator: Allocator
    sinks: int = 0
    recent: int = 1
    ring_over_prompt: bool = False
    default_budget: int | None = 128

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(
                f"{self.name}: sinks must be at least 0 and recent at least 1, not {self.sinks}, {self.recent}"
            )

    @property
    def protected(self) -> int:
        """Tokens that every head keeps whatever their score: the smallest budget that makes sense."""
        return self.sinks + self.recent

    @property
    def sharing(self) -> SharingAllocator | None:
        """The allocator, if it shares layers out once their scores are known."""
        return self.allocator if isinstance(self.allocator, SharingAllocator) else None

    def protects(self, pos_BHS: Tensor, seen_B: Tensor) -> Tensor:
        """Which tokens are kept whatever their score.

        Args:
            pos_BHS: int32 absolute positions, -1 where empty.
            seen_B: int, tokens seen so far.

        Returns:
            (B, H, S) bool; what it says of empty places does not matter.

        Example:
            >>> import torch
            >>> from layers.methods import build_method
            >>> build_method("streaming:sinks=1").protects(torch.arange(4).view(1, 1, 4), torch.tensor([4])).tolist()
            [[[True, False, False, True]]]
        """
        return (pos_BHS < self.sinks) | (pos_BHS >= seen_B[:, None, None] - self.recent)

    def scores(self, seen: Observation) -> Tensor:
        """The scorer's numbers (B, H, S), infinite for tokens that are kept whatever their score."""
        return self.scorer(seen).masked_fill(seen.protected_BHS, float("inf"))

    def most(self, keep: Tensor, prompt: int) -> Tensor:
        """The most tokens that any head may come to keep, known before any score is.

        Args:
            keep: (..., L, H) int on the host, what the allocator gave.
            prompt: tokens that there are at most.

        Returns:
            (...) int.

        Example:
            >>> import torch
            >>> from layers.methods import build_method
            >>> keep = torch.full((2, 3), 8)
            >>> build_method("snapkv").most(keep, 100), build_method("adakv").most(keep, 100)
            (tensor(8), tensor(24))
        """
        return keep.amax((-2, -1)) if self.sharing is None else keep.sum(-1).amax(-1).clamp(max=prompt)
