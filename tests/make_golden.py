"""Write tests/golden from transformers: `python -m tests.make_golden`, after `pip install -e '.[test]'`.

Run it again when tests/tiny.py gets a family or a feature. Unchanged rows must come out unchanged, up to rounding.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from checkpoints.resolve import DEFAULT_MODEL, resolve
from checkpoints.tokenizer import load_tokenizer
from tests import reference, tiny
from zoo.family import family_names

GOLDEN = Path(__file__).with_name("golden")
SHORT, LONG = tiny.TRAINED - 2, tiny.CONTEXT - 4  # tokens: within and beyond the context before RoPE scaling
LOGITS = 8  # the first ones, for the token after the last
NEW_TOKENS = 64
PROMPTS = [
    "The history of the steam engine begins",
    "def fibonacci(n):\n    ",
    "La capitale de la France est Paris, et la capitale de l'Italie est",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "A baker sold 48 loaves on Monday, half as many on Tuesday, and 12 more on Wednesday than on Tuesday. " * 8,
]


def tiny_rows() -> dict[str, Any]:
    rows = {}
    for family in family_names():
        for feature in tiny.features(family):
            with tempfile.TemporaryDirectory() as directory:
                model = reference.from_directory(tiny.write(Path(directory), tiny.config_json(family, feature)))
            rows[f"{family}/{feature}"] = {
                length: numbers(model(torch.tensor([tiny.tokens(length)])).logits[0, -1]) for length in (SHORT, LONG)
            }
    return rows


def default_rows() -> dict[str, Any]:
    model, tokenizer = reference.default_model(), load_tokenizer(resolve(DEFAULT_MODEL))
    rows = {}
    for text in PROMPTS:
        ids = tokenizer.encode(text, special=True)
        rows[text] = {
            "ids": ids,
            "logits": numbers(model(torch.tensor([ids])).logits[0, -1]),
            "new_ids": reference.greedy(model, ids, NEW_TOKENS),
        }
    return rows


def numbers(logits_V: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in logits_V[:LOGITS].tolist()]


def write(name: str, rows: dict[str, Any]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items()]
    (GOLDEN / name).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write("tiny.json", tiny_rows())
    write(f"{DEFAULT_MODEL}.json", default_rows())
