"""What the task files of lm-eval call: data made on the spot by the model's own tokenizer, and RULER's string match."""

from __future__ import annotations

from dataclasses import asdict
from difflib import get_close_matches
from inspect import signature
from typing import Any

from checkpoints.resolve import resolve
from checkpoints.tokenizer import load_tokenizer
from recipes.tasks.example import Example
from recipes.tasks.metrics import string_match
from recipes.tasks.ruler import make_example

_ALIKE = 0.8  # lenght is this much like length, and no argument of lm-eval's models is like one of ours


def examples(
    *,
    family: str,
    length: int = 4096,
    examples: int = 50,
    split: str = "test",
    seed: int = 0,
    reserve: int = 64,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **others: Any,
) -> list[Example]:
    """Make a task's examples.

    Args:
        family: a key of `recipes.tasks.ruler.FAMILIES`; the task file says which.
        length: tokens of prompt and answer at most.
        examples: how many.
        split: "tune" or "test".
        seed: of the first; the others count on.
        reserve: tokens of these left free for a chat template.
        tokenizer: a model's alias, folder, .gguf file or hub id, whose tokenizer counts.
        pretrained: the same, where lm-eval hands over the model's arguments; `tokenizer` goes first.
        others: the model's other arguments and what lm-eval notes about the task, none of which matters here. What
            reads like a slip of the pen for one of the above is refused.

    Returns:
        The examples.

    Raises:
        ValueError: a misspelt argument, **or** no tokenizer, **or** numbers out of range, **or** as for `make_example`.
        CheckpointError: the tokenizer cannot be found or read.
    """
    known = [name for name, p in signature(globals()["examples"]).parameters.items() if p.kind is not p.VAR_KEYWORD]
    for key in others:
        if meant := get_close_matches(key, known, n=1, cutoff=_ALIKE):
            raise ValueError(f"--metadata has no {key}: write {meant[0]}, if that is meant")
    name = tokenizer or pretrained
    if not isinstance(name, str):
        raise ValueError("lengths need a tokenizer to count by: give --metadata tokenizer=MODEL")
    numbers = {"length": (length, 1), "examples": (examples, 1), "seed": (seed, 0), "reserve": (reserve, 0)}
    for what, (value, least) in numbers.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{what} must be a whole number from {least} on, not {value!r}")
    words = load_tokenizer(resolve(name))

    def encode(text: str) -> list[int]:
        return words.encode(text, bos=words.adds_bos)

    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return [
        make_example(encode, family=family, split=split, seed=number, length=length, reserve=reserve)
        for number in track(range(seed, seed + examples), family, console=console, disable=not console.is_terminal)
    ]


def dataset(**metadata: Any) -> dict[str, Any]:
    """The examples as lm-eval wants them, under the name of the only split that the task files know.

    Args:
        metadata: what `examples` takes; all else is left alone, since lm-eval adds the model's arguments.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list([asdict(example) for example in examples(**metadata)])}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The score of one answer.

    Args:
        doc: an example.
        results: the answer.
    """
    return {"string_match": string_match(results[0], doc["answers"], doc["metric"])}
