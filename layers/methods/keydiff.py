"""KeyDiff: keys that differ from the others stay."""

from __future__ import annotations

from layers.compress.allocators import uniform
from layers.compress.scorers import KeyDifference
from layers.methods.base import Allocate, Method


def build(*, allocator: Allocate = uniform, sinks: int = 0, recent: int = 1) -> Method:
    """Keep the C tokens of every KV head whose keys differ most from its mean key; no query is looked at.

    The score of token j is -cos(k_j, a) with the anchor a = mean over j of k_j / |k_j|. So it does not matter what is
    asked, or whether the question is in the prompt. Keys are those that are stored, after RoPE. The paper compresses
    after every block of 128 tokens: that is what a prompt in chunks gives (the engine's `chunk_tokens`); in one piece,
    all of its keys are compared at once. The paper protects no token; here the last one stays.

    Args:
        allocator: budgets.
        sinks: first tokens that are always kept.
        recent: last tokens that are always kept, >= 1.

    Source:
        Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
        Resource-Constrained Environments, 2025.

    Example:
        >>> build().least
        1
    """
    return Method(
        name="keydiff",
        paper="KeyDiff, arXiv 2504.15364",
        summary="tokens whose keys differ most, whatever is asked",
        scorer=KeyDifference(),
        allocator=allocator(least=sinks + recent),
        sinks=sinks,
        recent=recent,
    )
