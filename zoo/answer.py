"""An answer as it comes: text token by token, and how long each part took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from zoo.cli import waiting

if TYPE_CHECKING:
    from zoo.engine import Engine


class Answer:
    """The text of one `Engine.stream`; iterate once.

    Args:
        engine: takes the ids in and continues them.
        ids: token ids of the prompt, or of the next turn.
        sampling: how tokens are chosen, as `Engine.stream` takes it.

    Attributes:
        text: what was said so far.
        tokens: how many tokens that took.
        prefill_s: seconds until the first token.
        decode_s: seconds from the first token to the last.
    """

    def __init__(self, engine: Engine, ids: Sequence[int], sampling: dict[str, Any]) -> None:
        self._engine, self._ids, self._sampling = engine, ids, sampling
        self.text, self.tokens, self.prefill_s, self.decode_s = "", 0, 0.0, 0.0

    def __iter__(self) -> Iterator[str]:
        """Yield the text of each token; one that ends within a character adds nothing yet."""
        decoder = self._engine.loaded.tokenizer.stream(skip_special=True)
        start = time.perf_counter()
        tokens = self._engine.stream(self._ids, **self._sampling)
        with waiting(f"Reading {len(self._ids):,} tokens"):
            first = list(islice(tokens, 1))
        self.prefill_s = time.perf_counter() - start
        for token in chain(first, tokens):
            self.decode_s = time.perf_counter() - start - self.prefill_s
            self.tokens += 1
            yield self._add(decoder.push(token))
        yield self._add(decoder.flush())

    def _add(self, piece: str) -> str:
        self.text += piece
        return piece

    @property
    def is_cut(self) -> bool:
        """Whether the answer ended only because it may not be longer."""
        return self.tokens == self._engine.max_new_tokens

    @property
    def speed(self) -> str:
        """Tokens per second taken in and given out."""
        prefill = f"prefill {len(self._ids) / self.prefill_s:,.0f} tok/s"
        return prefill + (f", decode {(self.tokens - 1) / self.decode_s:,.1f} tok/s" if self.tokens > 1 else "")


def cache_figures(engine: Engine) -> str:
    """One line on what an engine's cache holds."""
    stats = engine.stats()
    kept = stats.kept.float()
    mebibytes, full_mebibytes = stats.nbytes / 2**20, stats.full_nbytes / 2**20
    return (
        f"{stats.cache}: {sum(stats.tokens_seen):,} tokens seen, kept per head {kept.min():.0f} min, {kept.mean():.1f} "
        f"mean, {kept.max():.0f} max; {mebibytes:.1f} MiB (a full cache: {full_mebibytes:.1f} MiB)"
    )


def show(answer: Answer) -> None:
    """Print an answer on standard output as it comes."""
    for piece in answer:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
