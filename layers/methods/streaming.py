"""StreamingLLM: attention sinks and recent tokens."""

from __future__ import annotations

from layers.compress.allocators import uniform
from layers.compress.scorers import Position
from layers.methods.base import Allocate, Method


def build(*, allocator: Allocate = uniform, sinks: int = 4) -> Method:
    """Keep the first `sinks` tokens and the most recent ones; a token j is kept iff j < sinks or j >= n - (C - sinks).

    Positions are absolute here: the published code re-numbers kept tokens so that it can run past the trained context.

    Args:
        allocator: budgets.
        sinks: first tokens kept, >= 0; 4 as published.

    Source:
        Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024.

    Example:
        >>> build().sinks
        4
    """
    return Method(
        name="streaming",
        paper="StreamingLLM, arXiv 2309.17453",
        summary="first tokens and recent tokens",
        scorer=Position(),
        allocator=allocator(protected=sinks + 1),
        sinks=sinks,
        ring_over_prompt=True,
    )
