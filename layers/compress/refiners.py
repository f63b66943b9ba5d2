"""What looks at a layer's tokens again, once it is known how many each KV head may keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from layers.compress.scorers import Observation
from layers.linear import Linear

_BLOCK, _BLOCK_OF_16_BITS = 1 << 18, 1 << 21
"""Numbers that are projected at once: 1 MiB of fp32 stays in a processor's cache; products of fewer bits, which pack
the weights anew every time, had better be few."""


class Refiner(Protocol):
    """Scores tokens anew, given each head's budget."""

    def __call__(self, score_BHS: Tensor, keep_BH: Tensor, seen: Observation) -> Tensor:
        """Score again.

        Args:
            score_BHS: fp32, what the scorer said; infinite for tokens that are kept whatever their score.
            keep_BH: int, tokens that each head is going to keep.
            seen: what was scored.

        Returns:
            (B, H, S) fp32, infinite for tokens that are kept whatever their score.

        Raises:
            ValueError: the observation lacks what this needs.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ProjectedValues:
    """The best tokens by score stay; the others are judged by score times what their value adds to the layer's output.

    Of the B_h tokens that a head keeps, the floor(alpha B_h) best by score are chosen first (protected ones are the
    best). The others have (score + epsilon) times the mean over the head's group of |V_j W_O|_1.

    Args:
        alpha: share of the budget that is filled by score alone, 0 to 1; 1 leaves the method as it is.
        epsilon: lets large values win over tokens without any attention.

    Raises:
        ValueError: alpha is not between 0 and 1.

    Source:
        Feng et al., CriticalKV, 2025, algorithm 1.

    Example:
        >>> v, pos = torch.tensor([1.0, 1.0, 9.0]).view(1, 1, 3, 1), torch.arange(3, dtype=torch.int32).view(1, 1, 3)
        >>> out = Linear(1, 1)
        >>> out.weight = torch.nn.Parameter(torch.ones(1, 1))
        >>> tokens = {"k_BHSD": v, "v_BHSD": v, "pos_BHS": pos, "protected_BHS": pos < 0, "sliding": None, "layer": 0}
        >>> seen = Observation(q_BTND=v.transpose(1, 2), position_BT=pos[0], out=out, **tokens)
        >>> score, keep = torch.tensor([[[0.5, 0.3, 0.2]]]), torch.tensor([[2]])
        >>> ProjectedValues(alpha=0.5)(score, keep, seen).argsort(descending=True).tolist()
        [[[0, 2, 1]]]
    """

    alpha: float
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")

    def __call__(self, score_BHS: Tensor, keep_BH: Tensor, seen: Observation) -> Tensor:
        """Score again."""
        if seen.out is None:
            raise ValueError("criticalkv looks at the layers' output projections: give PromptPass `outputs`")
        empty_BHS = seen.pos_BHS < 0
        order_BHS = score_BHS.masked_fill(empty_BHS, float("-inf")).argsort(dim=-1, descending=True, stable=True)
        first_BH1 = (self.alpha * keep_BH.double()).floor()[..., None]
        best_first_BHS = (torch.arange(score_BHS.shape[-1], device=keep_BH.device) < first_BH1).expand_as(order_BHS)
        chosen_BHS = torch.zeros_like(empty_BHS).scatter(-1, order_BHS, best_first_BHS)
        refined_BHS = (score_BHS + self.epsilon) * projected_norms(seen.v_BHSD, seen.out)
        return refined_BHS.masked_fill(empty_BHS, 0).masked_fill(chosen_BHS | seen.protected_BHS, float("inf"))


def projected_norms(v_BHSD: Tensor, out: Linear) -> Tensor:
    """How much each value adds to a layer's output: the mean of |V_j W_O|_1 over the query heads that share it.

    That is as much arithmetic as the layer's output projection of all tokens; memory is bounded by a block of them.
    Every query head's norm is rounded to the values' dtype.

    Args:
        v_BHSD: values.
        out: projection of (..., N D) to (..., E); its bias, if any, is no token's doing.

    Returns:
        (B, H, S) fp32.

    Example:
        >>> out = Linear(4, 1)  # two query heads of two dimensions
        >>> out.weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0, -1.0, -4.0]]))
        >>> projected_norms(torch.ones(1, 1, 1, 2), out).item()
        3.0
    """
    B, H, S, D = v_BHSD.shape
    group = out.weight.shape[1] // (H * D)
    norm_BHS = torch.empty(B, H, S, dtype=torch.float32, device=v_BHSD.device)
    rows = 1 if v_BHSD.stride(0) == 0 else B  # a prompt that is replayed in many rows is one row in memory
    numbers = _BLOCK if v_BHSD.dtype is torch.float32 else _BLOCK_OF_16_BITS
    block = max(1, numbers // (rows * group * len(out.weight)))
    for head in range(H):
        w_EX = out.weight.detach()[:, head * group * D : (head + 1) * group * D]
        if out.scale is not None:
            w_EX = w_EX * out.scale[:, None]
        w_DX = w_EX.unflatten(1, (group, D)).flatten(0, 1).T.to(v_BHSD.dtype).contiguous()
        for start in range(0, S, block):
            here = slice(start, start + block)
            added_BSGE = (v_BHSD[:rows, head, here] @ w_DX).abs_().unflatten(-1, (group, -1))
            norm_BHS[:, head, here] = added_BSGE.sum(-1).mean(-1, dtype=torch.float32)
    return norm_BHS
