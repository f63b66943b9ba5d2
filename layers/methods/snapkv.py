"""SnapKV: the prompt's last tokens vote on what to keep."""

from __future__ import annotations

from layers.compress.allocators import uniform
from layers.compress.scoring import Scoring, presets, published
from layers.methods.base import Allocate, Method, observing

PRESETS = presets(published(window=32))


def build(*, allocator: Allocate = uniform, scoring: Scoring = PRESETS["published"]) -> Method:
    """Keep the C best-scored tokens of every KV head.

    Scores are a_j = mean over the window's rows i of softmax(q_i k_j / sqrt(D)), averaged over the query heads of a
    group, then s = maxpool_7(a). The published code scores and stores per query head; here a group shares one set,
    which stores G times less.

    Args:
        allocator: budgets.
        scoring: window, pooling and protection.

    Source:
        Li et al., SnapKV: LLM Knows What You Are Looking for Before Generation, NeurIPS 2024.

    Example:
        >>> build().least
        32
    """
    return observing(
        name="snapkv",
        paper="SnapKV, arXiv 2404.14469",
        summary="what the end of the prompt attends to; equal budgets",
        scoring=scoring,
        allocator=allocator,
    )
