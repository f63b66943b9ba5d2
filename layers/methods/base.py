"""What a compression method consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.compress.allocators import Allocator, SharingAllocator, SpreadingAllocator, Uniform
from layers.compress.decode_rules import ReplaceWorst
from layers.compress.refiners import Refiner
from layers.compress.scorers import Scorer
from layers.compress.scoring import Scoring
from layers.options import check_range

Allocate = Callable[..., Allocator]
"""Makes an allocator, given `least`: tokens that every head gets, room for those that are kept in any case."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A scorer, an allocator, and what is protected.

    Args:
        name: as users write it.
        paper: citation.
        summary: one line for a list of methods.
        scorer: how much each token matters.
        allocator: how many tokens each KV head keeps.
        sinks: first tokens of the sequence that every head keeps.
        recent: last tokens of the prompt that every head keeps.
        ring_over_prompt: once the decode room is full, new tokens replace the oldest token that is not a sink, prompt
            included; otherwise they replace the oldest generated one.
        evict: new tokens replace the worst one, by attention, so that a region holds its budget at every step; None if
            they replace the oldest.
        attention: scores are of attention: at least 0, and in proportion to what queries take from a token.
        sentences: the scorer has to know where sentences end.
        lse: the scorer is faster if it knows the logarithms of all queries' sums of exponentials.
        default_budget: tokens per KV head when the user names none; None for a method that keeps everything.
        refine: scores a layer's tokens anew once each head's budget is known; None where one look is enough.
        shared_layers: share of the layers that read an earlier layer's keys and values instead of their own.
        in_cache: distances are those between places in a region instead of those in the text. Asks for a ring over the
            prompt, behind whose sinks a region holds an unbroken run of tokens up to the newest.
    """

    name: str
    paper: str
    summary: str
    scorer: Scorer
    allocator: Allocator
    sinks: int = 0
    recent: int = 1
    ring_over_prompt: bool = False
    evict: ReplaceWorst | None = None
    attention: bool = False
    sentences: bool = False
    lse: bool = False
    default_budget: int | None = 128
    refine: Refiner | None = None
    shared_layers: float = 0.0
    in_cache: bool = False

    def __post_init__(self) -> None:
        check_range("sinks", self.sinks, 0)
        check_range("recent", self.recent, 0 if self.evict else 1)
        if self.evict is not None and self.evict.heads == "layer" and not isinstance(self.allocator, Uniform):
            raise ValueError(f"{self.name} keeps one set of tokens for all heads of a layer: its budgets must be equal")
        if self.spreading is not None and (self.evict is not None or self.refine is not None):
            raise ValueError(
                f"{self.name} needs each layer's budget at once, and layers that compete for the model's total have "
                "theirs at the end only: choose another allocator"
            )

    @property
    def least(self) -> int:
        """The smallest budget that makes sense: room for sinks and recent tokens, and for one token in any case."""
        return max(1, self.sinks + self.recent)

    def too_small(self, remedy: str) -> str:
        """What to say of a budget below `least`: which options make it what it is, and what to do.

        Args:
            remedy: what helps besides lower options.

        Example:
            >>> from layers.methods import build_method
            >>> build_method("snapkv:sinks=4").too_small("raise the budget")
            'snapkv always keeps 36 tokens per KV head (sinks=4 and recent=32): raise the budget, or lower ...'
        """
        lower = [name for name, most in (("sinks", 0), ("recent", 1)) if getattr(self, name) > most]
        parts = [f"{name}={getattr(self, name)}" for name in lower] + ["the last one"] * (self.recent == 1)
        what = f"{self.least} token{'s' * (self.least > 1)} per KV head"
        if parts:
            what += f" ({' and '.join(parts)})"
        if lower:
            remedy += f", or lower {' or '.join(lower)}"
        return f"{self.name} always keeps {what}: {remedy}"

    @property
    def turned_sinks(self) -> int:
        """First tokens of every region whose keys turn with each query."""
        return self.sinks if self.in_cache else 0

    @property
    def sharing(self) -> SharingAllocator | None:
        """The allocator, if it shares layers out once their scores are known."""
        return self.allocator if isinstance(self.allocator, SharingAllocator) else None

    @property
    def spreading(self) -> SpreadingAllocator | None:
        """The allocator, if it spreads the model's total over the layers once they have shown a prompt."""
        return self.allocator if isinstance(self.allocator, SpreadingAllocator) else None

    def shares(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """(L, H) tokens that each KV head may hold, on the host; see `Allocator`.

        Where decoding evicts, regions are as large as the budget even if the prompt is shorter: they fill up later.

        Example:
            >>> from layers.methods import build_method
            >>> sizes = {"budget": 8, "prompt": 3, "num_layers": 1, "num_kv_heads": 1}
            >>> [int(build_method(name).shares(**sizes)) for name in ("snapkv", "h2o")]
            [3, 8]
        """
        prompt = max(prompt, budget) if self.evict else prompt
        return self.allocator(budget=budget, prompt=prompt, num_layers=num_layers, num_kv_heads=num_kv_heads)

    def room(self, tokens: int) -> int:
        """Slots per KV head on top of the budget, for so many generated tokens: one where decoding evicts."""
        return 1 if self.evict else tokens

    def protects(self, pos_BHS: Tensor, seen_B: Tensor, keep_BH: Tensor) -> Tensor:
        """Which tokens are kept whatever their score.

        Args:
            pos_BHS: int32 absolute positions, -1 where empty.
            seen_B: int, tokens seen so far.
            keep_BH: int, tokens that each head may keep.

        Returns:
            (B, H, S) bool; what it says of empty places does not matter.

        Example:
            >>> from layers.methods import build_method
            >>> pos, seen, keep = torch.arange(4).view(1, 1, 4), torch.tensor([4]), torch.tensor([[2]])
            >>> build_method("streaming:sinks=1").protects(pos, seen, keep).tolist()
            [[[True, False, False, True]]]
        """
        recent_BH = torch.full_like(keep_BH, self.recent)
        if self.evict is not None:
            recent_BH = self.evict.protected(keep_BH).clamp(min=self.recent)
        return (pos_BHS < self.sinks) | (pos_BHS >= seen_B[:, None, None] - recent_BH[..., None])

    def most(self, keep: Tensor, prompt: int) -> Tensor:
        """The most tokens that any head may come to keep, known before any score is.

        Where layers compete for the model's total, it is a guess: four times the mean. The arena learns of more when it
        is laid out.

        Args:
            keep: (..., L, H) int on the host, what the allocator gave.
            prompt: tokens that there are at most; where decoding evicts, more will come.

        Returns:
            (...) int.

        Example:
            >>> from layers.methods import build_method
            >>> keep = torch.full((2, 3), 8)
            >>> build_method("snapkv").most(keep, 100), build_method("adakv").most(keep, 100)
            (tensor(8), tensor(24))
        """
        if self.spreading is not None:
            return (4 * keep.amax((-2, -1))).clamp(max=prompt)
        if self.sharing is None:
            return keep.amax((-2, -1))
        most = keep.sum(-1).amax(-1)
        return most if self.evict else most.clamp(max=prompt)


def observing(
    *, name: str, paper: str, summary: str, scoring: Scoring, allocator: Allocate, scorer: Scorer | None = None
) -> Method:
    """A method that looks at what the prompt's last queries attend to.

    Args:
        name: as for `Method`, like the next two.
        paper: citation.
        summary: one line.
        scoring: window, pooling and protection.
        allocator: makes the budgets.
        scorer: None takes that of the settings.

    Example:
        >>> from layers.compress.allocators import uniform
        >>> from layers.compress.scoring import published
        >>> words = {"name": "mine", "paper": "-", "summary": "-"}
        >>> observing(**words, scoring=published(window=8), allocator=uniform).recent
        8
    """
    return Method(
        name=name,
        paper=paper,
        summary=summary,
        scorer=scorer or scoring.scorer,
        attention=True,
        allocator=allocator(least=scoring.protected),
        sinks=scoring.sinks,
        recent=scoring.recent,
        sentences=scoring.sentences,
    )


def calibrated(method: str, importance: Mapping[str, Tensor], kind: str) -> Tensor:
    """Scores of one kind, for a method that cannot do without.

    Args:
        method: who needs them.
        importance: all that there are, by kind.
        kind: which ones.

    Raises:
        ValueError: there are none of that kind; says how to make them.

    Example:
        >>> import torch
        >>> calibrated("headkv", {"r2": torch.ones(1, 2)}, "r2")
        tensor([[1., 1.]])
    """
    if kind not in importance:
        raise ValueError(
            f"{method} needs head importance of kind {kind!r}; at hand: {', '.join(importance) or 'none'}; "
            "`python -m recipes.calibrate_heads` makes it"
        )
    return importance[kind]
