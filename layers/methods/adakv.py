"""Ada-KV: the heads of a layer compete for its budget."""

from __future__ import annotations

from layers.compress.allocators import LayerTopK
from layers.compress.scoring import Scoring, presets, published
from layers.methods.base import Allocate, Method, observing

PRESETS = presets(published(window=32))


def allocate(*, least: int, alpha: float = 0.2, compat: bool = False) -> LayerTopK:
    """Every layer keeps C tokens per KV head; which head keeps them is up to their scores.

    With b = C - least and H heads, each head is given its best floor(alpha b) tokens (the safeguard), then the
    best of all other tokens of the layer follow until it has H b; protected tokens are on top.

    Args:
        least: tokens that every head gets, whatever it deserves.
        alpha: share of the budget that no head can lose; 0.2 as published for models with grouped queries.
        compat: the published code: the layer's best H b tokens are counted per head, and a head with c of them keeps
            round((1 - alpha) c + floor(alpha b)) tokens, so that a layer's total may be off by half a token per head.

    Example:
        >>> allocate(least=4).alpha
        0.2
    """
    return LayerTopK(alpha=alpha, least=least, compat=compat)


def build(*, allocator: Allocate = allocate, scoring: Scoring = PRESETS["published"]) -> Method:
    """Keep the best-scored tokens of every layer, whichever heads they are in.

    For weights A of attention, the loss of a layer's output is bounded by a multiple of the sum over heads of
    1 - sum_{j kept} A_hj, which is least if the layer keeps the largest A_hj of all heads together. Scores are those of
    SnapKV; the published code averages over a group's query heads too.

    Args:
        allocator: budgets.
        scoring: window, pooling and protection.

    Source:
        Feng et al., Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference,
        NeurIPS 2025.

    Example:
        >>> build().sharing.alpha
        0.2
    """
    return observing(
        name="adakv",
        paper="Ada-KV, arXiv 2407.11550",
        summary="as snapkv, but a layer's heads compete for its budget",
        scoring=scoring,
        allocator=allocator,
    )
