"""Prose that nobody has to download: the language reference that ships inside Python, and its vocabulary.

The text is `pydoc_data.topics` (Python Software Foundation licence). Of it only paragraphs of running prose are taken,
each once: about 180,000 characters, or 40,000 tokens, half of them for each split. What is longer repeats them in
another order. The text changes a little from one Python to the next; rows that are compared carry the prompt's hash.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache

SPLITS = ("tune", "test")
_SHORTEST = 120  # characters; what is shorter is headings, signatures and remarks on versions


@cache
def paragraphs(split: str) -> tuple[str, ...]:
    """Paragraphs of one split. A topic goes to one split whole, but for what an earlier topic said already.

    Args:
        split: "tune" or "test".

    Returns:
        Each paragraph once, on one line.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    halves: dict[str, list[str]] = {name: [] for name in SPLITS}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        found = [" ".join(block.split()) for block in re.split(r"\n\s*\n", topics[name])]
        prose = [text for text in found if len(text) >= _SHORTEST and text[0].isupper() and text.endswith(".")]
        shorter = min(SPLITS, key=lambda half: sum(map(len, halves[half])))
        halves[shorter] += [text for text in dict.fromkeys(prose) if text not in seen]
        seen.update(prose)
    return tuple(halves[split])


@cache
def vocabulary(split: str) -> tuple[str, ...]:
    """Plain words of four to ten letters that the whole text uses, every second one for each split.

    Args:
        split: "tune" or "test".

    Returns:
        About a thousand words in alphabetical order.
    """
    text = " ".join(text for half in SPLITS for text in paragraphs(half))
    words = sorted(set(re.findall(r"(?<![\w.'’\"*-])[a-z]{4,10}(?![\w.('’\"*-])", text)))
    return tuple(words[SPLITS.index(split) :: 2])


def stream(split: str, rng: random.Random) -> Iterator[str]:
    """Paragraphs without end, in a new order whenever all have been there.

    Args:
        split: "tune" or "test".
        rng: decides the order.

    Yields:
        Paragraphs.
    """
    order = list(paragraphs(split))
    while True:
        rng.shuffle(order)
        yield from order
