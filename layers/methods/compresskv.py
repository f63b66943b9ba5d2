"""CompressKV: heads that read for meaning choose a layer's tokens, and layers that compression harms keep more."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from layers.compress.allocators import LayerErrors
from layers.compress.scorers import ChosenHeads
from layers.compress.scoring import Scoring, presets
from layers.methods.base import Allocate, Method, calibrated, observing
from layers.options import check_range

PRESETS = presets(Scoring(window=8, rows="mean", group="mean", ahead=2, behind=2, sinks=0, recent=8, pooling="mean"))


def allocate(*, least: int, importance: Mapping[str, Tensor], floor: int = 32, ceiling: float = 3.0) -> LayerErrors:
    """Budgets by the harm that compressing each layer does.

    With budget C, T = C L and errors e that add up to 1, every KV head of layer l keeps
    clip(m + round(e_l (T - m L)), m, M) tokens, with m = 32 and M = 3 C. What T then lacks is given to the layers one
    token at a time, the largest error first; what is too much is taken from them, the smallest first. So budgets of 32
    or less are equal.

    Args:
        least: tokens that every head gets, whatever it deserves.
        importance: what calibration found: "layer_errors", (L,).
        floor: tokens that every layer keeps, m; never less than sinks and recent ones.
        ceiling: the most that a layer keeps, M, in budgets; >= 1.

    Raises:
        ValueError: no layer errors are given.

    Example:
        >>> import torch
        >>> allocate(least=8, importance={"layer_errors": torch.rand(2)}).floor
        32
    """
    error_L = calibrated("compresskv", importance, "layer_errors")
    return LayerErrors(error_L=error_L, floor=floor, ceiling=ceiling, least=least)


def build(
    *,
    importance: Mapping[str, Tensor],
    allocator: Allocate = allocate,
    heads: int = 4,
    scoring: Scoring = PRESETS["published"],
) -> Method:
    """Keep the C tokens that a layer's semantic retrieval heads attend to, the same in all of its KV heads.

    Of each layer, the 4 query heads of the highest semantic scores vote. With A_h the attention of the last 8 tokens,
    a_h = sum over these rows of A_h and s = mean over the 4 heads of avgpool_5(a_h). The other heads, many of which
    attend to the first and the last tokens whatever these say, have no vote.

    Of its needle result with 256 of 128,000 tokens, the paper says that they are 0.07 %, and 0.7 %; they are 0.2 %.

    Args:
        importance: what calibration found: "semantic", (L, N), of which only the ranks within a layer matter.
        allocator: budgets.
        heads: query heads of a layer that vote, >= 1; all of them if there are fewer.
        scoring: window, pooling and protection; its `group` is over the heads that vote.

    Raises:
        ValueError: no semantic scores are given, **or** no head is to vote.

    Source:
        CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation, 2025.

    Example:
        >>> import torch
        >>> from layers.compress.allocators import uniform
        >>> build(importance={"semantic": torch.tensor([[0.0, 2.0, 1.0]])}, allocator=uniform, heads=2).scorer.heads
        ((1, 2),)
    """
    check_range("heads", heads, 1)
    best_LN = calibrated("compresskv", importance, "semantic").argsort(dim=1, descending=True, stable=True)
    return observing(
        name="compresskv",
        paper="CompressKV, arXiv 2508.02401",
        summary="what a layer's semantic heads attend to; more budget for layers that suffer",
        scorer=ChosenHeads(
            heads=tuple(map(tuple, best_LN[:, :heads].tolist())), attention=scoring.scorer, group=scoring.group
        ),
        scoring=scoring,
        allocator=allocator,
    )
