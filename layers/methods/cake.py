"""CAKE: layers compete for the cache, by how dispersed and how shifting their attention is."""

from __future__ import annotations

from layers.compress.allocators import LayerPreference
from layers.compress.scorers import VaryingAttention
from layers.methods.base import Allocate, Method


def allocate(
    *,
    least: int,
    window: int = 32,
    tau1: float = 1.0,
    tau2: float = 1.0,
    cascade: bool = True,
    compat: bool = False,
) -> LayerPreference:
    """Budgets for whole layers, from the attention A of the prompt's last W queries.

    With dispersion H_l = -sum_hij A ln A and shift V_l = sum_hj Var_i A_ij, layer l has the preference
    P_l = H_l^(1/tau1) V_l^(1/tau2), and each of its KV heads keeps P_l / sum_k P_k (C - W) L tokens and its last W.

    The published temperatures (tau1, tau2) come from a grid search per model and budget, for budgets of 1024 and 128:
    Llama-3.1 (1.6, 0.4) and (1.6, 0.6), Mistral-v0.3 (0.8, 0.5) and (1.0, 0.8), Qwen2.5 (1.5, 0.6) and (0.4, 0.6),
    Llama-2-7B (1.9, 1.8) and (0.9, 2.3), Llama-2-13B (0.5, 0.4) and (1.8, 2.0), any other model (1, 1).

    A layer cannot keep more tokens than there are. The paper shares what is beyond that equally, here it goes to the
    others in proportion to their preferences: then budgets only shrink from layer to layer, so that cutting layers
    while the prompt passes (`cascade`) keeps the same tokens as waiting for the last layer. Sums over a batch, as in
    the published code, would let prompts change each other's budgets; here every row has its own.

    Args:
        least: tokens that every head gets, whatever it deserves.
        window: last queries that are looked at.
        tau1: temperature of the dispersion.
        tau2: temperature of the shift.
        cascade: cut layers while the prompt passes; otherwise every token of every layer is held until its end, which
            takes as much memory as the full cache.
        compat: the published code: whole tokens, what is beyond a layer's cap or missing in the end is shared equally,
            once each. Then a layer may be given tokens that it has lost already, and fewer are kept than the total.
            (Not imitated: prompts of up to C + W tokens are kept whole there, which is more than the budget.)

    Example:
        >>> allocate(least=32, tau1=1.6, tau2=0.4).tau2
        0.4
    """
    return LayerPreference(window=window, tau1=tau1, tau2=tau2, cascade=cascade, compat=compat)


def build(
    *,
    allocator: Allocate = allocate,
    window: int = 32,
    gamma: float = 200.0,
    pool: int = 5,
    sinks: int = 0,
    recent: int = 32,
) -> Method:
    """Keep the tokens that the prompt's end attends to much or by turns, more of them in layers that want more.

    Token j scores I_j = mean_i A_ij + gamma Var_i A_ij over the last W queries i, averaged over 5 neighbours and over
    the query heads of a group. The paper also evicts while decoding, by the attention of every new token; here
    generated tokens go where they go with most methods, into room of their own.

    Args:
        allocator: budgets.
        window: last queries that observe, W.
        gamma: weight of the variance.
        pool: tokens over which scores are averaged, odd.
        sinks: first tokens that are always kept; none as published.
        recent: last tokens that are always kept, >= 1; W as published.

    Source:
        Qin et al., CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences, ICLR 2025.

    Example:
        >>> build().spreading.cascade
        True
    """
    return Method(
        name="cake",
        paper="CAKE, arXiv 2503.12491",
        summary="as snapkv, but the layers compete for the budget",
        attention=True,
        scorer=VaryingAttention(window=window, gamma=gamma, pool=pool),
        allocator=allocator(least=sinks + recent),
        sinks=sinks,
        recent=recent,
    )
