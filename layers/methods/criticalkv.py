"""CriticalKV: tokens whose values would be missed in the layer's output."""

from __future__ import annotations

from dataclasses import replace

from layers.compress.refiners import ProjectedValues
from layers.methods.base import Method

CHANGES = "snapkv"


def wrap(method: Method, *, alpha: float = 0.5) -> Method:
    """Choose half of each head's tokens as another method does, the rest also by what their values add to the output.

    What a layer's output loses is bounded by the sum over evicted tokens of A_j |V_j W_O|_1, so attention alone does
    not say whom to keep. Of the B_h tokens that KV head h keeps by the other method's budget, the floor(alpha B_h) best
    by its score s are chosen first; the rest are the best by (s_j + 1e-4) nu_j, with nu_j the mean of |V_j W_O^n|_1
    over the query heads n of the group and W_O^n the rows of the output projection that belong to n. Where heads
    compete for a layer's budget (`criticalkv+adakv`), they do so by s alone.

    B_h counts protected tokens, as in the published code. Alone, this changes `snapkv`.

    Args:
        method: what is changed; its scores must be of attention.
        alpha: share of the budget that goes by score alone, 0 to 1. 0.5 is that of the published code; the paper is
            said to have used 0.25 too.

    Raises:
        ValueError: alpha is not between 0 and 1, **or** the method has a second look already, **or** its scores are not
            of attention.

    Source:
        Feng et al., CriticalKV: Optimizing KV Cache Eviction from an Output Perturbation Perspective, 2025.

    Example:
        >>> from layers.methods import build_method
        >>> build_method("criticalkv:alpha=0.25+adakv").refine
        ProjectedValues(alpha=0.25, epsilon=0.0001)
    """
    if method.refine is not None:
        raise ValueError(f"{method.name} looks twice at its tokens already: write criticalkv once")
    if not method.attention:
        raise ValueError(
            f"criticalkv weighs attention by values, and {method.name} does not score by attention: "
            "choose another method, as in criticalkv+snapkv"
        )
    return replace(
        method,
        name=f"criticalkv+{method.name}",
        paper="CriticalKV, arXiv 2502.03805",
        summary=f"half as {method.name}, half also by what values add to the output",
        refine=ProjectedValues(alpha=alpha),
    )
