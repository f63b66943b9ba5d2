"""HeadKV: heads that retrieve get the budget."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from layers.compress.allocators import HeadImportance
from layers.compress.scoring import Scoring, presets, published
from layers.methods.base import Allocate, Method, calibrated, observing

PRESETS = presets(published(window=8))


def allocate(
    *, least: int, importance: Mapping[str, Tensor], scores: str = "r2", beta: float = 3.0, compat: bool = False
) -> HeadImportance:
    """Budgets by head importance.

    With b = C - least, KV head h of layer l keeps b (1 - 1/beta) + S_lh (b/beta) L H tokens, and `least` on top;
    S is the importance of its query heads, averaged over the group and normalised over the model.

    Args:
        least: tokens that every head gets, whatever it deserves.
        importance: (L, N) query-head scores by kind.
        scores: which kind: "r" (retrieval) or "r2" (retrieval and reasoning).
        beta: >= 1; larger shares less. The paper picks it per model and budget among 1.005 … 10.
        compat: the published code's rounding instead of exact, water-filled totals.

    Raises:
        ValueError: no importance of that kind is given, **or** it is not one of heads.

    Example:
        >>> import torch
        >>> allocate(least=8, importance={"r2": torch.rand(2, 4)}).beta
        3.0
    """
    importance_LN = calibrated("headkv", importance, scores)
    if importance_LN.ndim != 2:
        raise ValueError(
            f"headkv shares budgets out by heads, and {scores!r} tells layers apart: choose r, r2 or semantic"
        )
    return HeadImportance(importance_LN=importance_LN, beta=beta, least=least, compat=compat)


def build(*, allocator: Allocate = allocate, scoring: Scoring = PRESETS["tuned"]) -> Method:
    """Budgets by head importance, tokens by the attention of the prompt's end, as SnapKV scores them.

    Args:
        allocator: budgets.
        scoring: window, pooling and protection.

    Source:
        Fu et al., Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and
        Reasoning, ICLR 2025.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> build(allocator=partial(allocate, importance={"r2": torch.rand(2, 4)})).name
        'headkv'
    """
    return observing(
        name="headkv",
        paper="HeadKV, arXiv 2410.19258",
        summary="as snapkv, with more budget for the heads that retrieve",
        scoring=scoring,
        allocator=allocator,
    )
