"""PyramidKV: lower layers keep more."""

from __future__ import annotations

from layers.compress.allocators import Pyramid
from layers.compress.scoring import Scoring, presets, published
from layers.methods.base import Allocate, Method, observing

PRESETS = presets(published(window=8))


def allocate(*, least: int, beta: float = 20.0, compat: bool = False) -> Pyramid:
    """Budgets that fall from layer to layer in equal steps, on top of what every head gets.

    With b = C - least and n tokens, the last of L layers keeps b / beta per head and the first 2b - b / beta. If
    the first would keep more than there is, it keeps n - least and the last 2b - (n - least).

    Args:
        least: tokens that every head gets, whatever it deserves.
        beta: steepness, >= 1; 20 as published.
        compat: the published code: b // beta, a step rounded down to whole tokens, so that the total is up to
            (L - 2) / 2 tokens per head too large, and equal budgets where n < 2b.

    Example:
        >>> allocate(least=8).beta
        20.0
    """
    return Pyramid(beta=beta, least=least, compat=compat)


def build(*, allocator: Allocate = allocate, scoring: Scoring = PRESETS["published"]) -> Method:
    """Keep the best-scored tokens of every KV head, more of them in lower layers.

    Attention of lower layers is spread over the prompt, that of upper ones is on few tokens. Scores are those of
    SnapKV, with a window of 8 tokens.

    Args:
        allocator: budgets.
        scoring: window, pooling and protection.

    Source:
        Cai et al., PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, 2024.

    Example:
        >>> build().least
        8
    """
    return observing(
        name="pyramidkv",
        paper="PyramidKV, arXiv 2406.02069",
        summary="as snapkv, with more budget for the lower layers",
        scoring=scoring,
        allocator=allocator,
    )
