"""LongBench and SCBench from local files in their public schema: a context, and questions that share it.

Nothing is downloaded: the files are the benchmarks' own JSONL, or others of that form. LongBench has one question per
context, SCBench several. Instructions are in our words, so scores are to be compared with each other, not with
published ones. Tasks in Chinese and SCBench's `repoqa` need other metrics and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.tasks.metrics import METRICS


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question on a context.

    Args:
        task: the benchmark's name for it.
        question: what follows the context.
        answers: right ones.
        classes: that the metric "classification" chooses from.
        max_new_tokens: room for the answer.
        metric: a key of `recipes.tasks.metrics.METRICS`.
        first_line: whether only the first line of the answer counts.
    """

    task: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()
    max_new_tokens: int
    metric: str
    first_line: bool = False

    def score(self, answer: str) -> float:
        """How right an answer is, from 0 to 1."""
        if self.first_line:
            answer = answer.lstrip("\n").split("\n")[0]
        return METRICS[self.metric](answer, self.answers, self.classes)


@dataclass(frozen=True, kw_only=True)
class SharedContext:
    """A context and the questions on it.

    Args:
        id: the file's.
        context: what may be compressed before any question is known.
        turns: in order; each may depend on the ones before.
    """

    id: str
    context: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """How a task is asked and judged.

    Args:
        metric: as in `Turn`.
        max_new_tokens: as in `Turn`.
        ask: the question with its instruction; {input} and {options} stand for what the file says.
        first_line: as in `Turn`.
    """

    metric: str
    max_new_tokens: int
    ask: str = "\n\n{input}"
    first_line: bool = False


_SHORT = "\n\nAnswer the question with a few words from the text above.\nQuestion: {input}\nAnswer:"
_SUMMARY = "\n\nWrite a summary of the text above.\nSummary:"
_PARAGRAPH = '\n\nWhich paragraph is this a summary of? Answer with "Paragraph" and its number.\n{input}\nAnswer:'
_COUNT = "\n\nHow many different paragraphs are there above, repeated ones counted once? Answer with a number.\nAnswer:"
LONGBENCH = {
    "narrativeqa": _Task(metric="f1", max_new_tokens=128, ask=_SHORT),
    "qasper": _Task(metric="f1", max_new_tokens=128, ask=_SHORT),
    "multifieldqa_en": _Task(metric="f1", max_new_tokens=64, ask=_SHORT),
    "hotpotqa": _Task(metric="f1", max_new_tokens=32, ask=_SHORT),
    "2wikimqa": _Task(metric="f1", max_new_tokens=32, ask=_SHORT),
    "musique": _Task(metric="f1", max_new_tokens=32, ask=_SHORT),
    "gov_report": _Task(metric="rouge-l", max_new_tokens=512, ask=_SUMMARY),
    "qmsum": _Task(metric="rouge-l", max_new_tokens=512, ask=_SHORT.replace("with a few words ", "")),
    "multi_news": _Task(metric="rouge-l", max_new_tokens=512, ask=_SUMMARY),
    "trec": _Task(metric="classification", max_new_tokens=64, first_line=True),
    "triviaqa": _Task(metric="f1", max_new_tokens=32, first_line=True),
    "samsum": _Task(metric="rouge-l", max_new_tokens=128, first_line=True),
    "passage_count": _Task(metric="counting", max_new_tokens=32, ask=_COUNT),
    "passage_retrieval_en": _Task(metric="retrieval", max_new_tokens=32, ask=_PARAGRAPH),
    "lcc": _Task(metric="code-similarity", max_new_tokens=64, ask="{input}"),
    "repobench-p": _Task(metric="code-similarity", max_new_tokens=64, ask="{input}"),
}
SCBENCH = {
    "scbench_kv": _Task(metric="contains-all", max_new_tokens=150),
    "scbench_prefix_suffix": _Task(metric="contains-all", max_new_tokens=150),
    "scbench_vt": _Task(metric="contains-all", max_new_tokens=30),
    "scbench_qa_eng": _Task(metric="contains-any", max_new_tokens=40, ask="\n\nQuestion: {input}\nAnswer briefly:"),
    "scbench_choice_eng": _Task(metric="choice", max_new_tokens=40, ask="\n\nQuestion: {input}\n{options}\nLetter:"),
    "scbench_many_shot": _Task(metric="contains-any", max_new_tokens=10),
    "scbench_mf": _Task(metric="first-number", max_new_tokens=5),
    "scbench_summary": _Task(metric="rouge-l-sum", max_new_tokens=200),
    "scbench_passkey": _Task(metric="first-number", max_new_tokens=15),
}


def read_longbench(path: Path) -> list[SharedContext]:
    """Read a file of LongBench's form.

    Args:
        path: JSONL with `_id`, `input`, `context`, `answers`, `dataset`, `length`, `language` and `all_classes`.

    Returns:
        A context with one question per line.

    Raises:
        ValueError: the file cannot be read, has no line or a malformed one (it is named), **or** a task that has no
            metric here.
    """
    return list(_read(path, _longbench_row))


def read_scbench(path: Path, task: str | None = None) -> list[SharedContext]:
    """Read a file of SCBench's form.

    Args:
        path: JSONL with `id`, `context` and `multi_turns`: a list of `input` and `answer`, for multiple choice with
            `options`, and with `task` where turns differ.
        task: what the turns are unless they say so; None takes the file's name without its ending.

    Returns:
        A context with its questions per line.

    Raises:
        ValueError: as for `read_longbench`.
    """
    return list(_read(path, lambda row: _scbench_row(row, task or path.stem)))


def _read(path: Path, parse: Callable[[dict[str, Any]], SharedContext]) -> Iterator[SharedContext]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path} is empty: give a file with one JSON object per line")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError("is no JSON object")
            yield parse(row)
        except RecursionError:
            raise ValueError(f"{path}, line {number}: brackets are nested too deeply for JSON") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def _longbench_row(row: dict[str, Any]) -> SharedContext:
    classes = row.get("all_classes")
    name = _text(row, "dataset")
    task = _task(LONGBENCH, name)
    if task.metric == "classification" and not classes:
        raise ValueError(f"all_classes must list the classes of {name}")
    turn = _judged(
        task=name,
        question=task.ask.format(input=_text(row, "input")),
        answers=_texts(row, "answers"),
        classes=_texts(row, "all_classes") if classes else (),
        max_new_tokens=task.max_new_tokens,
        metric=task.metric,
        first_line=task.first_line,
    )
    return SharedContext(id=_text(row, "_id"), context=_context(row), turns=(turn,))


def _scbench_row(row: dict[str, Any], usual: str) -> SharedContext:
    turns = row.get("multi_turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("multi_turns must be a list of at least one object")
    return SharedContext(
        id=_text(row, "id", numbers=True),
        context=_context(row),
        turns=tuple(_scbench_turn(turn, usual) for turn in turns),
    )


def _scbench_turn(turn: dict[str, Any], usual: str) -> Turn:
    name = _text(turn, "task") if "task" in turn else usual
    task = _task(SCBENCH, name)
    several = isinstance(turn.get("answer"), list)
    answers = _texts(turn, "answer") if several else (_text(turn, "answer", numbers=True),)
    options = ""
    if task.metric == "choice":
        by_letter = dict(zip("ABCD", _texts(turn, "options"), strict=False))
        options = "\n".join(f"{letter}. {text}" for letter, text in by_letter.items())
        answers = tuple(letter for letter, text in by_letter.items() if letter in answers or text in answers)
        if not answers:
            raise ValueError(f"answer must be one of the options or its letter, not {turn['answer']!r}")
    return _judged(
        task=name,
        question=task.ask.format(input=_text(turn, "input"), options=options),
        answers=answers,
        max_new_tokens=task.max_new_tokens,
        metric=task.metric,
    )


def _judged(**fields: Any) -> Turn:
    """A turn that has judged an empty answer: gold that its metric cannot read is found before a model runs."""
    turn = Turn(**fields)
    turn.score("")
    return turn


def _task(known: dict[str, _Task], name: str) -> _Task:
    if name not in known:
        raise ValueError(f"the task {name!r} has no metric here: choose from {', '.join(known)}")
    return known[name]


def _text(row: dict[str, Any], key: str, *, numbers: bool = False) -> str:
    value = row.get(key)
    if numbers and isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text, not {value!r}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{key} holds half of a surrogate pair, which is no text")
    return value


def _context(row: dict[str, Any]) -> str:
    context = _text(row, "context")
    if not context:
        raise ValueError("context is empty: there is nothing to ask about")
    return context


def _texts(row: dict[str, Any], key: str) -> tuple[str, ...]:
    value = row.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str | int | float) for item in value):
        raise ValueError(f"{key} must be a list of at least one text, not {value!r}")
    return tuple(map(str, value))
