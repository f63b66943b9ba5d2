"""What looks at a layer's tokens again, once it is known how many each KV head may keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from layers.compress.scorers import Observation
from layers.linear import Linear
from layers.options import check_range

_FIRST = 64  # values that are looked at at first, at least: fewer cost as much

_BLOCK, _BLOCK_OF_16_BITS = 1 << 18, 1 << 21
"""Numbers that are projected at once: 1 MiB of fp32 stays in a processor's cache; products of fewer bits, which pack
the weights anew every time, had better be few."""


class Refiner(Protocol):
    """Scores tokens anew, given each head's budget."""

    def __call__(self, score_BHS: Tensor, keep_BH: Tensor, seen: Observation) -> Tensor:
        """Score again.

        Args:
            score_BHS: fp32, >= 0, what the scorer said; infinite for tokens that are kept whatever their score.
            keep_BH: int, tokens that each head is going to keep.
            seen: what was scored.

        Returns:
            (B, H, S) fp32, infinite for tokens that are kept whatever their score; what it says of tokens that are not
            among a head's best `keep_BH` is only that they are not.

        Raises:
            ValueError: the observation lacks what this needs.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ProjectedValues:
    """The best tokens by score stay; the others are judged by score times what their value adds to the layer's output.

    Of the B_h tokens that a head keeps, the floor(alpha B_h) best by score are chosen first (protected ones are the
    best). The others have (score + epsilon) times the mean over the head's group of |V_j W_O|_1.

    To project every value takes as much arithmetic as the layer's output projection. So tokens are looked at in the
    order of a bound of their worth, at first as many as the largest budget has, until the next bound is below the worst
    token that would be kept. The others get 0, and the same tokens are kept as if all had been looked at (but for
    values whose squares fp32 cannot hold).

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
        check_range("alpha", self.alpha, 0, 1)

    def __call__(self, score_BHS: Tensor, keep_BH: Tensor, seen: Observation) -> Tensor:
        """Score again."""
        if seen.out is None:
            raise ValueError("criticalkv looks at the layers' output projections: give PromptPass `outputs`")
        (S, D), empty_BHS = seen.v_BHSD.shape[2:], seen.pos_BHS < 0
        order_BHS = score_BHS.masked_fill(empty_BHS, float("-inf")).argsort(dim=-1, descending=True, stable=True)
        first_BH1 = (self.alpha * keep_BH.double()).floor()[..., None]
        best_first_BHS = (torch.arange(S, device=keep_BH.device) < first_BH1).expand_as(order_BHS)
        chosen_BHS = torch.zeros_like(empty_BHS).scatter(-1, order_BHS, best_first_BHS)
        sure_BHS = (chosen_BHS | seen.protected_BHS) & ~empty_BHS

        worth_BHS = score_BHS + self.epsilon
        bound_BHS = (worth_BHS * norm_bounds(seen.v_BHSD, seen.out)).masked_fill(sure_BHS | empty_BHS, 0)
        bound_BHS, order_BHS = bound_BHS.sort(dim=-1, descending=True)
        refined_BHS = torch.zeros_like(score_BHS)
        most, looked = min(int(keep_BH.max()), S), 0  # here the host waits
        while True:
            place_BHC = order_BHS[..., looked : looked + max(looked, most, _FIRST)]  # each look doubles what was seen
            v_BHCD = seen.v_BHSD.gather(2, place_BHC[..., None].expand(-1, -1, -1, D))
            weighed_BHC = worth_BHS.gather(-1, place_BHC) * projected_norms(v_BHCD, seen.out)
            refined_BHS.scatter_(-1, place_BHC, weighed_BHC)
            refined_BHS.masked_fill_(empty_BHS, 0).masked_fill_(sure_BHS, float("inf"))
            last_BH1 = refined_BHS.topk(most).values.gather(-1, keep_BH.clamp(max=most)[..., None] - 1)
            looked += place_BHC.shape[-1]
            if not (bound_BHS[..., looked : looked + 1] > last_BH1).any():  # and here
                return refined_BHS


def norm_bounds(v_BHSD: Tensor, out: Linear) -> Tensor:
    """What `projected_norms` does not exceed, for a small part of its arithmetic.

    For E numbers, |x|_1 <= sqrt(E) |x|_2, and a mean is at most the root of the mean square: the squared lengths of a
    group's projections together are V_j M V_j^T with one matrix M of D x D numbers. Where projections look like noise,
    the bound is 1.25 times the norm.

    Args:
        v_BHSD: values.
        out: as for `projected_norms`.

    Returns:
        (B, H, S) fp32.

    Example:
        >>> out = Linear(4, 1)  # two query heads of two dimensions
        >>> out.weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0, -1.0, -4.0]]))
        >>> norm_bounds(torch.ones(1, 1, 1, 2), out).item()  # sqrt((1 + 25) / 2), and what rounding may take
        3.64...
    """
    H, D = v_BHSD.shape[1], v_BHSD.shape[3]
    E, group = len(out.weight), out.weight.shape[1] // (H * D)
    bound_BHS = torch.empty(v_BHSD.shape[:3], dtype=torch.float32, device=v_BHSD.device)
    for head in range(H):
        weights = [_weight(out, n, v_BHSD).float() for n in range(head * group, (head + 1) * group)]
        m_DD = torch.stack([w_ED.T @ w_ED for w_ED in weights]).mean(0)
        m_DD.diagonal().add_(m_DD.trace() * _LOST)
        v_BSD = v_BHSD[:, head].float().contiguous()
        bound_BHS[:, head] = (v_BSD @ m_DD).mul_(v_BSD).sum(-1)
    return bound_BHS.mul_(E).sqrt_().mul_(_ROUNDED)


_LOST, _ROUNDED = 1e-5, 1.01
"""More than fp32 loses in V M V^T, as a part of |V|^2 tr(M); and more than norms may gain by rounding to 16 bits."""


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
    norm_BHS = torch.zeros(B, H, S, dtype=torch.float32, device=v_BHSD.device)
    numbers = _BLOCK if v_BHSD.dtype is torch.float32 else _BLOCK_OF_16_BITS
    block = max(1, numbers // (B * len(out.weight)))
    for n in range(H * group):
        w_ED, head = _weight(out, n, v_BHSD), n // group
        for start in range(0, S, block):
            here = slice(start, start + block)
            norm_BHS[:, head, here] += (v_BHSD[:, head, here] @ w_ED.T).abs_().sum(-1)
    return norm_BHS / group


def _weight(out: Linear, n: int, v_BHSD: Tensor) -> Tensor:
    """What the values that query head n sees are projected by, (E, D)."""
    D = v_BHSD.shape[3]
    w_ED = out.weight.detach()[:, n * D : (n + 1) * D]
    return (w_ED if out.scale is None else w_ED * out.scale[:, None]).to(v_BHSD.dtype)
