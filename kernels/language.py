"""Triton where it is installed; where it is not, everything but the Triton forms works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class TritonIsMissing(AttributeError, ValueError):
    """Something needs Triton, which is not installed; to whoever only looks for an attribute, it is not there."""

    def __init__(self) -> None:
        super().__init__("this needs Triton: pip install triton (Linux), or run on CPU tensors")


class _Missing:
    """Stands where Triton, or a function in its language, would be."""

    def __getattr__(self, name: str) -> Any:
        raise TritonIsMissing

    def __getitem__(self, grid: object) -> Any:
        raise TritonIsMissing


if TYPE_CHECKING:
    triton: Any
    tl: Any
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        triton = tl = _Missing()

INSTALLED = not isinstance(triton, _Missing)
INTERPRETED: bool = INSTALLED and triton.knobs.runtime.interpret
"""Whether Triton functions run on CPU tensors, step by step (TRITON_INTERPRET=1)."""


def jit(function: Any) -> Any:
    """`triton.jit`, or something that says what is missing when it is launched.

    Args:
        function: in Triton's language.

    Returns:
        What is launched as `function[grid](...)`.
    """
    return triton.jit(function) if INSTALLED else triton
