"""A job of the leaderboard, which is one question, and the worker that does it: the same here and on a cluster."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import native
from recipes import press_scores
from recipes.peers import Shared
from recipes.questions import Question
from recipes.replay import Record, Replay, answer, generate
from zoo import Engine, Loaded, load, machine

ROOM = 64  # tokens of an answer, in the caches whose bytes are reported


@dataclass(frozen=True, kw_only=True)
class Job:
    """A question, and the caches that it is still to be put to.

    Args:
        question: the question.
        tokens: length of the prompt that was asked for.
        index: of the question in its task.
        missing: budgets in tokens per KV head, by way of asking and cache.
    """

    question: Question
    tokens: int
    index: int
    missing: Mapping[str, Mapping[str, list[int]]]


class Worker:
    """Does jobs with a model that it holds.

    Args:
        loaded: the model.
        args: of the command line of `recipes.leaderboard`.
        origin: what all rows say.
    """

    def __init__(self, loaded: Loaded, args: argparse.Namespace, origin: Mapping[str, Any]) -> None:
        self._loaded, self._args = loaded, args
        self._origin = {**origin, "machine": machine.description(torch.device(args.device))}
        self._shared = Shared(loaded) if args.peers else None
        self._engine = functools.cache(self._make_engine)

    def _make_engine(self, name: str, budget: int, tokens: int) -> Engine:
        most = min(tokens + ROOM, self._loaded.config.max_position)
        files = {"importance": self._args.importance, "sharing": self._args.sharing}
        return Engine(self._loaded, cache=name, budget=budget, max_new_tokens=ROOM, max_context=most, **files)

    def rows(self, job: Job) -> Iterator[dict[str, Any]]:
        """Do a job: a row for each way of asking, as soon as it is done."""
        args, question = self._args, job.question
        record: Record | None = None
        for mode, missing in job.missing.items():
            if not missing:
                continue
            started = time.perf_counter()
            presses = {name: budgets for name, budgets in missing.items() if name in args.peers}
            engines = {
                name: {budget: self._engine(name, budget, job.tokens) for budget in budgets}
                for name, budgets in missing.items()
                if name not in args.peers
            }
            row = self._origin | {"tokens": job.tokens, "question": mode, "prompt_sha256": question.sha256}
            row |= {"split": args.split, "task": question.task, "kind": question.kind, "seed": args.seed}
            row |= {"index": job.index, "depth": question.depth, "mebibytes": {}, "results": {}}
            if engines:
                record = record or Record(self._loaded, question.context + question.question)
                verify = job.index < args.verify
                row["results"] = evaluate(record, question, mode=mode, engines=engines, verify=verify)
                row["mebibytes"] = {
                    name: {str(budget): round(made.cache.nbytes / 2**20, 2) for budget, made in by_budget.items()}
                    for name, by_budget in engines.items()
                }
            if self._shared and presses:
                theirs = press_scores.evaluate(self._shared, question, mode=mode, presses=presses, room=ROOM)
                row["results"] |= theirs.results
                row["mebibytes"] |= theirs.mebibytes
                row |= {"kept": theirs.kept, "refused": theirs.refused, "versions": press_scores.versions()}
            yield row | {"seconds": round(time.perf_counter() - started, 2)}


def load_model(args: argparse.Namespace) -> Loaded:
    """The model of the command line, with fast operators where they can be had."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu":
        try:
            native.load()
        except RuntimeError as error:
            print(f"without the C++ operators, so slower ({error})", file=sys.stderr)
    return load(args.model, dtype=args.dtype, device=args.device)


def make_worker(args: argparse.Namespace, origin: Mapping[str, Any]) -> Callable[[Job], Iterator[dict[str, Any]]]:
    """Load a model of its own for a worker: what does jobs with it."""
    return Worker(load_model(args), args, origin).rows


def ask_engine(engine: Engine, question: Question, mode: str) -> tuple[Tensor, list[int]]:
    """Put a question to an engine: what `Replay` does for many caches at once.

    Args:
        engine: with room for the answer.
        question: the question.
        mode: "seen" while compressing, or "unseen": asked in a second turn.

    Returns:
        (A, V) logits, those at a predicting token a of the lead and the gold answer; the generated answer's ids, none
        where no answer is to be generated.
    """
    if mode == "seen":
        logits_1V = engine.prefill([question.context + question.question])
    else:
        engine.prefill([question.context])
        logits_1V = engine.extend([question.question])
    asked, forced = engine.snapshot(), [logits_1V]
    forced += [engine.step([token]) for token in (question.lead + question.gold)[:-1]]
    text: list[int] = []
    if question.example is not None:
        engine.restore(asked)
        for token in question.lead:
            logits_1V = engine.step([token])
        while len(text) < question.example.max_new_tokens:
            token = int(logits_1V.argmax())
            if token in engine.loaded.chat.stop_ids:
                break
            text.append(token)
            logits_1V = engine.step([token])
    return torch.cat(forced), text


def evaluate(
    record: Record,
    question: Question,
    *,
    mode: str,
    engines: Mapping[str, Mapping[int, Engine]],
    verify: bool = False,
) -> dict[str, dict[str, list[float]]]:
    """Ask one question through many caches.

    Args:
        record: its dense prefill.
        question: the question.
        mode: "seen" while compressing, or "unseen": asked in a second turn.
        engines: by cache and budget, in tokens per KV head. Those whose layers share caches prefill for themselves.
        verify: run the prompt through the engines themselves too.

    Returns:
        By cache and budget: the answer's score, 0 to 1, and the gold answer's negative log-likelihood, nats per token.

    Raises:
        AssertionError: replay and engine differ by more than rounding.
    """
    later = question.question if mode == "unseen" else []
    seen = record.beginning(len(question.context)) if later else record
    replays: dict[str, Replay] = {}
    for cache, by_budget in engines.items():
        method = next(iter(by_budget.values())).method
        if not method.shared_layers:
            replays[cache] = Replay(seen, method, list(by_budget), room=question.room, later=len(later))
            if later:
                replays[cache].extend(later)
    logits = answer(list(replays.values()), question.lead + question.gold)
    texts: list[list[list[int]]] = []
    if question.example is not None:
        stop_ids, limit = record.loaded.chat.stop_ids, question.example.max_new_tokens
        texts = generate(list(replays.values()), question.lead, max_new_tokens=limit, stop_ids=stop_ids)
    replayed = {
        (cache, budget): (logits[number][row], texts[number][row] if texts else [])
        for number, cache in enumerate(replays)
        for row, budget in enumerate(engines[cache])
    }
    results: dict[str, dict[str, list[float]]] = {}
    for cache, by_budget in engines.items():
        for budget, engine in by_budget.items():
            logits_AV, text = replayed.get((cache, budget)) or ask_engine(engine, question, mode)
            if verify and cache in replays:
                worst = float((ask_engine(engine, question, mode)[0] - logits_AV).abs().max())
                assert worst < 2e-3, f"engine and replay differ by {worst} with {cache} at {budget}"
            right, nll = question.likelihood(logits_AV)
            score = float(right)
            if question.example is not None:
                score = question.score(record.loaded.tokenizer.decode(text))
            results.setdefault(cache, {})[str(budget)] = [round(score, 4), round(nll, 5)]
    return results
