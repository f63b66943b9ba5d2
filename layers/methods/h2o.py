"""H2O: tokens that have received most attention so far, and recent ones."""

from __future__ import annotations

from layers.compress.allocators import uniform
from layers.compress.decode_rules import ReplaceWorst
from layers.compress.scorers import AttentionSums
from layers.methods.base import Allocate, Method
from layers.options import check_range


def build(*, allocator: Allocate = uniform, ratio: float = 0.5) -> Method:
    """Keep the last R tokens of every KV head and, of the others, those with the largest sums of attention.

    With weights A_ij of query i on token j, S_j = sum over i >= j of A_ij, over all queries of the prompt and then over
    each generated token's; a new token begins with the attention that it pays to itself. A head with a budget of C
    keeps the last R = floor(ratio C) tokens and the C - R heavy hitters with the largest S_j among the older ones:
    after the prompt, and after every step, where one goes. Sums go with their tokens into later turns. No first token
    is protected. Until C tokens have been seen, the cache is the full cache; from then on it holds C tokens, and one
    slot for the next.

    The paper has a set of tokens per query head; here a group shares one, by the mean of its query heads' weights,
    which stores G times less.

    Args:
        allocator: budgets.
        ratio: share of a budget that the last tokens have, 0 to 1; half, as published.

    Raises:
        ValueError: the ratio is not between 0 and 1.

    Source:
        Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, NeurIPS
        2023.

    Example:
        >>> build().evict.recent_share
        0.5
    """
    check_range("ratio", ratio, 0, 1)
    return Method(
        name="h2o",
        paper="H2O, arXiv 2306.14048",
        summary="what all queries so far attended to most, and recent tokens",
        attention=True,
        lse=True,
        scorer=AttentionSums(),
        allocator=allocator(least=1),
        recent=0,
        evict=ReplaceWorst(accumulate=True, heads="group", recent_share=ratio),
    )
