"""TOVA: the last query alone decides, for a whole layer."""

from __future__ import annotations

from layers.compress.allocators import Uniform
from layers.compress.decode_rules import ReplaceWorst
from layers.compress.scorers import LayerMean, WindowAttention
from layers.methods.base import Method


def build() -> Method:
    """Keep, in every layer, the C tokens to which the latest query pays most attention; after every step one goes.

    With weights A_tj of the latest query t, S_j = mean over all query heads of the layer of A_tj. When there are more
    than C tokens, those with the largest S_j are kept: after the prompt by its last token's query, and then at every
    step, where the one with the smallest S_j goes. All heads of a layer keep the same tokens, so budgets are equal. No
    token is protected: neither the first ones nor the newest, which may go at once. Until C tokens have been seen, the
    cache is the full cache; from then on it holds C tokens, and one slot for the next.

    Source:
        Oren et al., Transformers are Multi-State RNNs, EMNLP 2024.

    Example:
        >>> build().evict.recent
        0
    """
    return Method(
        name="tova",
        paper="TOVA, arXiv 2401.06104",
        summary="what the latest query attends to, in all heads of a layer",
        attention=True,
        scorer=LayerMean(scorer=WindowAttention(window=1, ahead=0, behind=0)),
        allocator=Uniform(),
        recent=0,
        evict=ReplaceWorst(accumulate=False, heads="layer"),
    )
