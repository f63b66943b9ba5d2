"""StreamingLLM: attention sinks and recent tokens."""

from __future__ import annotations

from layers.compress.allocators import uniform
from layers.compress.scorers import Position
from layers.methods.base import Allocate, Method


def build(*, allocator: Allocate = uniform, sinks: int = 4, positions: str = "absolute") -> Method:
    """Keep the first `sinks` tokens and the most recent ones; a token j is kept iff j < sinks or j >= n - (C - sinks).

    So it is after a prompt of n tokens. Generated tokens first fill the room that was planned for them, as with every
    method, and only then take the places of the oldest: C counts the prompt's tokens, a region holds C and the room.

    With positions "in-cache", as published, a query at place i of its region sees the token at place j at distance
    i - j, so a stream never leaves the distances that a model was trained for. Between recent tokens these are the
    distances in the text; sinks are turned before each query. One thing differs: a prompt is attended to in one piece
    and then cut, whereas the published stream cuts after each token; short chunks (`chunk_tokens`) come close to that.
    A layer's sliding window counts the tokens of the text in either case.

    Args:
        allocator: budgets.
        sinks: first tokens kept, >= 0; 4 as published.
        positions: what distances are between: "absolute" positions in the text, or "in-cache" places.

    Raises:
        ValueError: positions is neither.

    Source:
        Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024, section 3.2.

    Example:
        >>> build().sinks, build(positions="in-cache").in_cache
        (4, True)
    """
    if positions not in ("absolute", "in-cache"):
        raise ValueError(f'streaming: positions must be "absolute" or "in-cache", not {positions!r}')
    return Method(
        name="streaming",
        paper="StreamingLLM, arXiv 2309.17453",
        summary="first tokens and recent tokens",
        scorer=Position(),
        allocator=allocator(least=sinks + 1),
        sinks=sinks,
        ring_over_prompt=True,
        in_cache=positions == "in-cache",
    )
