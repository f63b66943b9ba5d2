"""How much each stored token matters to each KV head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kernels.window_scores import window_scores


class Scorer(Protocol):
    """Gives every stored token of every KV head a number; higher is kept.

    Attributes:
        window: how many of the last queries it looks at; 0 if none.
    """

    @property
    def window(self) -> int:
        """Queries that it needs."""
        ...

    def __call__(
        self,
        q_BWND: Tensor,
        k_BHSD: Tensor,
        pos_BHS: Tensor,
        position_BW: Tensor,
        protected_BHS: Tensor,
        sliding: int | None,
    ) -> Tensor:
        """Score.

        Args:
            q_BWND: the last queries, after RoPE.
            k_BHSD: stored keys, after RoPE, in order of position.
            pos_BHS: int32 absolute positions, -1 where empty.
            position_BW: int32 absolute positions of the queries, -1 where there is none.
            protected_BHS: tokens that are kept anyway, whose scores must not spread to their neighbours.
            sliding: the model's sliding window in tokens, or None.

        Returns:
            (B, H, S) fp32.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class WindowAttention:
    """Attention from the observation window, spread over neighbours by max-pooling.

    A token's score is the largest found from `ahead` tokens before it to `behind` tokens after it: a hot token protects
    `ahead` tokens that follow it. A centred kernel of 7 is ahead = behind = 3.

    Args:
        window: queries that observe, >= 1.
        rows: "mean" or "max" over the observing queries.
        group: "mean" or "max" over the query heads that share a KV head.
        ahead: tokens after a hot one that share its score, >= 0.
        behind: tokens before a hot one that share its score, >= 0.

    Source:
        Li et al., SnapKV, 2024, section 4.

    Example:
        >>> import torch
        >>> scorer = WindowAttention(window=1, ahead=1, behind=0)
        >>> k, pos = torch.tensor([9.0, 0, 0, 0]).view(1, 1, 4, 1), torch.arange(4, dtype=torch.int32).view(1, 1, 4)
        >>> score = scorer(torch.ones(1, 1, 1, 1), k, pos, pos[0, :, 3:], pos >= 3, None)
        >>> (score > 0.9).tolist()
        [[[True, True, False, False]]]
    """

    window: int
    rows: Literal["mean", "max"] = "mean"
    group: Literal["mean", "max"] = "mean"
    ahead: int = 3
    behind: int = 3

    def __call__(
        self,
        q_BWND: Tensor,
        k_BHSD: Tensor,
        pos_BHS: Tensor,
        position_BW: Tensor,
        protected_BHS: Tensor,
        sliding: int | None,
    ) -> Tensor:
        """Score by attention."""
        return window_scores(
            q_BWND,
            k_BHSD,
            pos_BHS,
            position_BW,
            rows=self.rows,
            group=self.group,
            ahead=self.ahead,
            behind=self.behind,
            protected_BHS=protected_BHS,
            window=sliding,
        )


@dataclass(frozen=True)
class Position:
    """The later, the better.

    Source:
        Xiao et al., StreamingLLM, 2023: with protected sinks, only recency decides.

    Example:
        >>> import torch
        >>> pos = torch.tensor([[[0, 1, 2]]])
        >>> Position()(torch.empty(1, 0, 1, 1), torch.empty(1, 1, 3, 1), pos, torch.empty(1, 0), pos < 0, None).tolist()
        [[[0.0, 1.0, 2.0]]]
    """

    window: int = 0

    def __call__(
        self,
        q_BWND: Tensor,
        k_BHSD: Tensor,
        pos_BHS: Tensor,
        position_BW: Tensor,
        protected_BHS: Tensor,
        sliding: int | None,
    ) -> Tensor:
        """Score by position."""
        return pos_BHS.float()


@dataclass(frozen=True)
class KeyDifference:
    """The less a key resembles the others of its head, the better.

    The score is minus the cosine between a key and the anchor, the mean of the head's normalised keys. It looks at no
    query. Keys are those that are stored, after RoPE, protected ones included.

    Source:
        Park et al., KeyDiff, 2025.

    Example:
        >>> import torch
        >>> k = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]).view(1, 1, 3, 2)
        >>> pos = torch.arange(3, dtype=torch.int32).view(1, 1, 3)
        >>> KeyDifference()(torch.empty(1, 0, 1, 2), k, pos, torch.empty(1, 0), pos < 0, None).argmax().item()
        2
    """

    window: int = 0

    def __call__(
        self,
        q_BWND: Tensor,
        k_BHSD: Tensor,
        pos_BHS: Tensor,
        position_BW: Tensor,
        protected_BHS: Tensor,
        sliding: int | None,
    ) -> Tensor:
        """Score by difference."""
        # Anything may be in an empty place, NaN included.
        k_BHSD = k_BHSD.masked_fill((pos_BHS < 0)[..., None], 0)
        unit_BHSD = torch.nn.functional.normalize(k_BHSD.float(), dim=-1)
        # The cosine does not care whether the anchor is a mean or a sum.
        anchor_BHD = torch.nn.functional.normalize(unit_BHSD.sum(2), dim=-1)
        return -(unit_BHSD @ anchor_BHD[..., None]).squeeze(-1)
