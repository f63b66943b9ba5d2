"""KVSharer: layers that read the keys and values of an earlier, dissimilar layer."""

from __future__ import annotations

from dataclasses import replace

from layers.methods.base import Method
from layers.options import check_range

CHANGES = "full"


def wrap(method: Method, *, share: float = 0.125) -> Method:
    """Any method over fewer layers: some have no keys and values of their own and read those of an earlier layer.

    A search (`recipes.search_sharing`) gives a map m from layers that share to their sources, m(l) < l. Layer l attends
    with its own queries to the keys (after RoPE) and values of layer m(l), of the prompt and of every token decoded
    since:

        o_l = softmax(q_l K_m(l)^T / sqrt(D)) V_m(l)

    It has no k and v projections and no place in the arena. What the other method decides, it decides for the layers
    that own their cache and by them: budgets are shared out as in a model of these layers alone, and tokens are scored
    by their owner's queries. The importance of a reader's heads says nothing here, for it was found with keys that
    these heads no longer see.

    Args:
        method: what the layers that own their cache do; "full" if none is named.
        share: of the layers, how many read another's cache, at least one unless 0. Published figures are for 0.125,
            0.25 and 0.375.

    Raises:
        ValueError: the share is not from 0 to below 1, **or** the method shares layers already.

    Source:
        Yang et al., KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing, 2024.

    Example:
        >>> from layers.methods import build_method
        >>> wrap(build_method("snapkv"), share=0.25).name
        'kvsharer+snapkv'
    """
    if method.shared_layers:
        raise ValueError(f"{method.name} shares layers already: write kvsharer once")
    check_range("share", share, 0, below=1)
    whole = method.name == CHANGES
    return replace(
        method,
        name="kvsharer" if whole else f"kvsharer+{method.name}",
        paper="KVSharer, arXiv 2410.18517" + ("" if whole else f"; {method.paper}"),
        summary=f"{'every token of every head' if whole else method.summary}; some layers read an earlier layer's",
        shared_layers=share,
    )
