"""Questions about long contexts, as token ids of a chat: those of `recipes.needles` and RULER's families."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recipes import needles
from recipes.tasks.example import Example
from recipes.tasks.metrics import string_match
from recipes.tasks.ruler import FAMILIES, make_example

TASKS = (*needles.TASKS, *FAMILIES)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as token ids, and what should be answered.

    Args:
        task: of `TASKS`.
        kind: of fact, where a task has several; the task otherwise.
        depth: where in the context the answer lies, 0 the beginning and 1 the end; None if in several places.
        context: beginning of the chat, up to the question.
        question: the rest of the prompt, up to where the answer begins.
        lead: how the answer begins, words that the question already gave.
        gold: what follows.
        example: what judges an answer that was generated; None where each token of `gold` must be the likeliest.
    """

    task: str
    kind: str
    depth: float | None
    context: list[int]
    question: list[int]
    lead: list[int]
    gold: list[int]
    example: Example | None = None

    @property
    def sha256(self) -> str:
        """Of all its tokens."""
        return hashlib.sha256(json.dumps([self.context, self.question, self.lead, self.gold]).encode()).hexdigest()

    @property
    def room(self) -> int:
        """Tokens that an answer takes at most."""
        return len(self.lead) + max(len(self.gold), self.example.max_new_tokens if self.example else 0)

    def likelihood(self, logits_AV: Tensor) -> tuple[bool, float]:
        """Judge what a model predicted where it was fed the gold answer.

        Args:
            logits_AV: at each of its tokens, and perhaps of `lead` before it.

        Returns:
            Whether each gold token is the likeliest, and their negative log-likelihood in nats per token.
        """
        gold_A = torch.tensor(self.gold, device=logits_AV.device)
        log_AV = logits_AV[-len(gold_A) :].float().log_softmax(-1)
        return bool((log_AV.argmax(-1) == gold_A).all()), -float(log_AV.gather(1, gold_A[:, None]).mean())

    def score(self, text: str) -> float:
        """How much of what was asked for a generated answer holds, 0 to 1."""
        assert self.example is not None
        return string_match(text, self.example.answers, self.example.metric)


def make_questions(
    tokenizer: Any, chat: Any, *, split: str, task: str, tokens: int, count: int, seed: int
) -> list[Question]:
    """Questions of one task, at evenly spread depths.

    Args:
        tokenizer: of the model.
        chat: its template.
        split: "tune" or "test".
        task: of `TASKS`.
        tokens: of the prompt, for RULER's families with the answer, at most.
        count: how many.
        seed: with the other arguments decides everything.

    Returns:
        The questions.

    Raises:
        ValueError: `tokens` has no room for the task.
    """
    if task in needles.TASKS:
        prompts = needles.make_prompts(tokenizer, chat, split=split, task=task, tokens=tokens, count=count, seed=seed)
        return [
            Question(
                task=task,
                kind=prompt.kind,
                depth=prompt.depth,
                context=prompt.ids[: prompt.question],
                question=prompt.ids[prompt.question :],
                lead=prompt.lead,
                gold=prompt.value,
            )
            for prompt in prompts
        ]
    head, tail = (tokenizer.encode(part, special=True) for part in _around(chat))
    questions = []
    for number in range(seed * count, (seed + 1) * count):
        sizes = {"length": tokens, "reserve": len(head) + len(tail)}
        example = make_example(tokenizer.encode, family=task, split=split, seed=number, **sizes)
        questions.append(
            Question(
                task=task,
                kind=task,
                depth=example.depth,
                context=head + tokenizer.encode(example.context),
                question=tokenizer.encode(example.question) + tail,
                lead=tokenizer.encode(example.answer_prefix),
                gold=tokenizer.encode(" " + ", ".join(example.answers)),
                example=example,
            )
        )
    return questions


def _around(chat: Any) -> tuple[str, str]:
    """What a chat puts before and after a message of the user."""
    head, tail = chat.render([{"role": "user", "content": "\0"}]).split("\0")
    return head, tail
