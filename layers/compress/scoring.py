"""Settings of observation-window scoring that every method with a window shares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from layers.compress.scorers import WindowAttention
from layers.options import check_range

MOST = 4096  # tokens that windows and pooling reach: far beyond any use, and their work is bounded


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How tokens are scored and which are kept whatever their score.

    Args:
        window: last queries that observe, 1 to 4096.
        rows: "mean" or "max" over the observing queries.
        group: "mean" or "max" over the query heads of a KV head.
        ahead: tokens after a hot one that share its score, up to 4096.
        behind: tokens before a hot one that share its score, up to 4096.
        stop: "sentence" if scores do not spread beyond a sentence's end; otherwise "none".
        always: tokens after a hot one that share its score even if a sentence ends in between.
        sinks: first tokens of the sequence that are always kept.
        recent: last tokens of the prompt that are always kept, >= 1.
        pooling: "max" or "mean" over neighbours.

    Example:
        >>> published(window=8).recent
        8
    """

    window: int
    rows: Literal["mean", "max"]
    group: Literal["mean", "max"]
    ahead: int
    behind: int
    stop: Literal["none", "sentence"] = "none"
    always: int = 0
    sinks: int
    recent: int
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("ahead", 0), ("behind", 0), ("always", 0)):
            check_range(name, getattr(self, name), least, MOST)
        for name in ("rows", "group", "pooling"):
            if getattr(self, name) not in ("mean", "max"):
                raise ValueError(f'{name} must be "mean" or "max", not {getattr(self, name)!r}')
        if self.stop not in ("none", "sentence"):
            raise ValueError(f'stop must be "none" or "sentence", not {self.stop!r}')
        if self.always and self.stop == "none":
            raise ValueError("always says how far scores spread beyond a sentence's end: it needs stop=sentence")
        if self.pooling == "mean" and self.stop == "sentence":
            raise ValueError("only the largest score spreads up to a sentence's end: stop=sentence needs pooling=max")

    @property
    def protected(self) -> int:
        """Tokens that every head keeps whatever their score."""
        return self.sinks + self.recent

    @property
    def sentences(self) -> bool:
        """Whether scoring has to know where sentences end."""
        return self.stop == "sentence"

    @property
    def scorer(self) -> WindowAttention:
        """The scorer with these settings."""
        return WindowAttention(
            window=self.window,
            rows=self.rows,
            group=self.group,
            ahead=self.ahead,
            behind=self.behind,
            pooling=self.pooling,
            stop=self.stop,
            always=self.always,
        )


def published(*, window: int) -> Scoring:
    """The settings of the published LongBench runs: mean, centred max-pooling of 7, the whole window kept, no sinks.

    Args:
        window: observation window; 32 for SnapKV and Ada-KV, 8 for HeadKV and PyramidKV.
    """
    return Scoring(window=window, rows="mean", group="mean", ahead=3, behind=3, sinks=0, recent=window)


TUNED = Scoring(window=32, rows="max", group="max", ahead=12, behind=0, sinks=4, recent=4)
"""What measured best on prompts kept apart from every test prompt; see recipes/LOG.md."""

ADAPTIVE = replace(TUNED, ahead=24, stop="sentence", always=4)
"""The same, but what follows a hot token shares its score up to the end of the sentence; see recipes/LOG.md."""


def presets(as_published: Scoring) -> dict[str, Scoring]:
    """Settings by the name that users write: those that a method was published with, and those that every method has.

    Example:
        >>> list(presets(published(window=8)))
        ['published', 'tuned', 'adaptive']
    """
    return {"published": as_published, "tuned": TUNED, "adaptive": ADAPTIVE}
