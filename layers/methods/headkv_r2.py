"""HeadKV-R2: the published settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from layers.compress.allocators import HeadImportance
from layers.compress.scoring import Scoring
from layers.methods import headkv
from layers.methods.base import Allocate, Method

PRESETS = headkv.PRESETS


def allocate(
    *, least: int, importance: Mapping[str, Tensor], beta: float = 1.01, compat: bool = False
) -> HeadImportance:
    """Budgets by retrieval and reasoning scores; see `layers.methods.headkv.allocate`.

    Args:
        least: tokens that every head gets, whatever it deserves.
        importance: (L, N) query-head scores by kind, "r2" among them.
        beta: >= 1; larger shares less. 1.01 is what the paper picks for Llama-3-8B and 128 tokens.
        compat: the published code's rounding instead of exact, water-filled totals.

    Raises:
        ValueError: no importance of that kind is given.

    Example:
        >>> import torch
        >>> allocate(least=8, importance={"r2": torch.rand(2, 4)}).beta
        1.01
    """
    return headkv.allocate(least=least, importance=importance, scores="r2", beta=beta, compat=compat)


def build(*, allocator: Allocate = allocate, scoring: Scoring = PRESETS["published"]) -> Method:
    """HeadKV as the paper runs it: retrieval-reasoning scores, a window of 8, nearly all of the budget in the pool.

    The parts are those of `headkv`, whose defaults are what measured best here: `headkv:preset=published,beta=1.01` is
    this method, `headkv-r2:preset=tuned,beta=3` is `headkv`.

    Args:
        allocator: budgets.
        scoring: window, pooling and protection.

    Source:
        Fu et al., Not All Heads Matter: A Head-Level KV Cache Compression Method with Integrated Retrieval and
        Reasoning, ICLR 2025.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> build(allocator=partial(allocate, importance={"r2": torch.rand(2, 4)})).least
        8
    """
    return replace(
        headkv.build(allocator=allocator, scoring=scoring),
        name="headkv-r2",
        paper="HeadKV-R2, arXiv 2410.19258",
        summary="as headkv, with the published settings",
    )
