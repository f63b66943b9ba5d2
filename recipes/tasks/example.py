"""What a long-context question consists of, and how as much context as fits is found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Encode = Callable[[str], "list[int]"]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question about a long context, in pieces: what is compressed may or may not have seen the question.

    Args:
        family: what sort of task.
        split: "tune" or "test".
        seed: with family, split, length and tokenizer decides everything.
        length: tokens of context, question, answer prefix, room for the answer and reserve at most.
        tokens: how many these are.
        depth: where in the context the answer is, 0 the beginning and 1 the end; None if it is in several places.
        context: what comes before the question; it ends with a blank line.
        question: asked about the context.
        answer_prefix: how the answer begins.
        answers: what the answer must contain; which of them is up to `metric`.
        max_new_tokens: room for the answer.
        metric: "all" counts the share of the answers that are found, "part" whether any is.
    """

    family: str
    split: str
    seed: int
    length: int
    tokens: int
    depth: float | None
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: Literal["all", "part"]

    @property
    def prompt(self) -> str:
        """The text that is continued with the answer, for a model without a chat template."""
        return f"{self.context}{self.question} {self.answer_prefix}"

    @property
    def sha256(self) -> str:
        """Of the prompt: two runs that name the same one asked the same."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()


def count_tokens(encode: Encode, context: str, rest: str) -> int:
    """Tokens of a context and what follows it, encoded apart or together, whichever is more."""
    return max(len(encode(context)) + len(encode(rest)), len(encode(context + rest)))


def largest(size: Callable[[int], int], limit: int, least: int) -> int:
    """How many units fit.

    Args:
        size: tokens that some number of units take; about proportional to it.
        limit: tokens there are.
        least: units that there must be.

    Returns:
        A number of units that fits, while one more does not.

    Raises:
        ValueError: not even `least` units fit.

    Example:
        >>> largest(lambda units: 7 + 3 * units, limit=30, least=1)
        7
    """
    low, low_size = least, size(least)
    if low_size > limit:
        raise ValueError(f"the length has no room for the task itself: give at least {low_size - limit} tokens more")
    high, high_size = low + 32, size(low + 32)
    while high_size <= limit:
        rate = (high_size - low_size) / (high - low)
        # A little beyond where the limit is expected, so that the two ends soon lie around it.
        step = int((limit - high_size) / rate * 1.01) + 2
        low, low_size, high = high, high_size, high + step
        high_size = size(high)
    halve = True
    while high - low > 1:
        halve = not halve  # every second step, in case the proportion misleads
        share = 0.5 if halve else (limit - low_size) / (high_size - low_size)
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        middle_size = size(middle)
        if middle_size <= limit:
            low, low_size = middle, middle_size
        else:
            high, high_size = middle, middle_size
    return low
