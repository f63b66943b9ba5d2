"""Keep everything."""

from __future__ import annotations

from layers.compress.allocators import Uniform
from layers.compress.scorers import Position
from layers.methods.base import Method


def build() -> Method:
    """The full cache: every token of every head, exact attention.

    Example:
        >>> build().default_budget is None
        True
    """
    return Method(
        name="full",
        paper="-",
        summary="every token of every head; exact",
        scorer=Position(),
        allocator=Uniform(),
        default_budget=None,
    )
