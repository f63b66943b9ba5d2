"""What compressed caches still know: methods, budgets, tasks, lengths and ways of asking in one table.

    python -m recipes.leaderboard --split test --question seen unseen --output scores.jsonl --table scores.md

A prompt is prefilled once for all caches. With the question seen, it is compressed whole; unseen, its context is
compressed, and the question follows as a second turn. Then the gold answer is fed token by token through the compressed
cache, which gives its log-likelihood. A needle (tasks noise and prose) counts as found when every token of the
asked-for value is the most likely one, which is what greedy decoding from the words that lead up to it would give.
Answers of RULER's families are generated and searched for what was asked for.

`--peers kvpress` puts the same questions to kvpress's presses, which share a prefill per way of asking. A press that
fails at a budget is left out there and only there; why is `refused` in the row, and it is not tried again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from checkpoints import CheckpointError
from kernels import native
from layers.methods import build_method, needs_importance
from recipes import press_scores
from recipes.needles import TASKS as NEEDLES
from recipes.peers import Shared
from recipes.questions import TASKS, Question, make_questions
from recipes.replay import Record, Replay, answer, generate
from zoo import Engine, Loaded, load, machine
from zoo.load import head_importance

CACHES = ["headkv", "headkv:preset=published,beta=1.1", "snapkv", "snapkv:preset=tuned", "streaming"]

PEERS_NOTE = [
    "Presses of kvpress keep as many tokens of what they compress; a question that comes later stays whole on top.",
    "Their MiB are what their caches take, for the first prompt: AdaKV hides tokens, but holds them all.",
    "",
]

KEY = ("model", "dtype", "template_sha256", "importance_sha256", "sharing_sha256")  # what rows must share to be one run
ROOM = 64  # tokens of an answer, in the caches whose bytes are reported


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


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share.

    Source:
        Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.

    Example:
        >>> [round(x, 3) for x in wilson(18, 24)]
        [0.551, 0.88]
    """
    z = 1.959964
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % confidence interval of a mean, by drawing the values anew; always the same for the same values.

    Example:
        >>> low, high = bootstrap([0.0, 1.0] * 12)
        >>> low < 0.5 < high
        True
    """
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Results as Markdown: one table per length of prompts and way of asking."""
    parts: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        parts.setdefault((row["tokens"], row["question"]), []).append(row)
    first = next(iter(parts.values()))[0]
    commits = sorted({row["commit"] for part in parts.values() for row in part})
    lines = [
        f"# Leaderboard: {first['model']}, {first['dtype']}, split `{first['split']}`, seed {first['seed']}",
        "",
        f"At {', '.join(commits)}. Question seen: it is in the prompt, which is prefilled whole and compressed once;",
        "unseen: the context is compressed before the question comes, as a second turn. Accuracy: needles whose value",
        "is the most likely in every token, RULER's generated answers by string match; above the full cache it is not",
        "fidelity, as fewer tokens distract less. ΔNLL: nats per token of the gold answer above the full cache.",
        "Brackets: 95 % intervals (Wilson, bootstrap). The columns with fractions count by task and kind of fact.",
        "",
        *(PEERS_NOTE if any("versions" in row for part in parts.values() for row in part) else []),
        *(f"    {command}" for command in sorted({row["command"] for part in parts.values() for row in part})),
    ]
    for (tokens, question), part in sorted(parts.items()):
        cells = pool(part)
        full = cells.pop((tokens, "full"))
        tasks, kinds = (" ".join(dict.fromkeys(row[name] for row in part)) for name in ("task", "kind"))
        lines += ["", f"## {tokens:,} tokens, question {question}, {len(full.results)} questions", ""]
        lines += [f"| tokens per KV head | MiB | cache | accuracy | of full | ΔNLL | {tasks} | {kinds} |"]
        lines += ["|---" * 8 + "|", full.line("all", "full", full)]
        lines += [cell.line(str(budget), cache, full) for (budget, cache), cell in sorted(cells.items())]
        lines += _refusals(part)
    return "\n".join(lines) + "\n"


def _refusals(rows: list[dict[str, Any]]) -> list[str]:
    reasons: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        for cache, by_budget in row.get("refused", {}).items():
            for budget, reason in by_budget.items():
                reasons.setdefault((cache, int(budget)), []).append(reason)
    return [
        f"\n`{cache}` at {budget} is left out in {len(found)}, e.g. as it {found[0]}"
        for (cache, budget), found in sorted(reasons.items())
    ]


def pool(rows: Iterable[dict[str, Any]]) -> dict[tuple[int, str], Pooled]:
    """What every cache did, by budget and name, on prompts of one length and one way of asking."""
    cells: dict[tuple[int, str], Pooled] = {}
    for row in rows:
        for cache, by_budget in row["results"].items():
            for budget, (score, nll) in by_budget.items():
                cell = cells.setdefault((int(budget), cache), Pooled(row["mebibytes"][cache][budget]))
                cell.add(row, score, nll)
    return cells


class Pooled:
    """What a cache did on several prompts.

    Args:
        mebibytes: that the cache takes.

    Attributes:
        results: whether the answer was right and its negative log-likelihood in nats per token, by prompt.
    """

    def __init__(self, mebibytes: float) -> None:
        self.mebibytes = mebibytes
        self.results: dict[str, tuple[float, float]] = {}
        self._groups: dict[str, dict[str, list[float]]] = {"task": {}, "kind": {}}

    def add(self, row: dict[str, Any], score: float, nll: float) -> None:
        """Count a prompt, once."""
        if row["prompt_sha256"] not in self.results:
            self.results[row["prompt_sha256"]] = score, nll
            for name, group in self._groups.items():
                group.setdefault(row[name], []).append(score)

    @property
    def right(self) -> float:
        """Right answers, those that are right in part counted in part."""
        return sum(score for score, _ in self.results.values())

    def accuracy(self) -> tuple[float, float, float]:
        """Mean score and its 95 % interval."""
        scores = [score for score, _ in self.results.values()]
        whole = all(score in (0, 1) for score in scores)
        return self.right / len(scores), *(wilson(round(self.right), len(scores)) if whole else bootstrap(scores))

    def more_nll(self, full: Pooled) -> tuple[float, float, float]:
        """Nats per token above the full cache on the same prompts, and their 95 % interval."""
        more = [nll - full.results[prompt][1] for prompt, (_, nll) in self.results.items()]
        return sum(more) / len(more), *bootstrap(more)

    def line(self, budget: str, cache: str, full: Pooled) -> str:
        """A row of the table."""
        share, low, high = self.accuracy()
        accuracy = f"{self.right:g}/{len(self.results)} = {share:.2f} [{low:.2f}, {high:.2f}]"
        if self is full:
            change = f"(NLL {sum(nll for _, nll in self.results.values()) / len(self.results):.3f})"
        else:
            change = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*self.more_nll(full))
        of_full = sum(full.results[prompt][0] for prompt in self.results)
        part = f"{self.right / of_full:.0%}" if of_full else "-"
        fractions = (
            " ".join(f"{round(sum(x), 2):g}/{len(x)}" for x in group.values()) for group in self._groups.values()
        )
        cells = budget, f"{self.mebibytes:.1f}", f"`{cache}`", accuracy, part, change, *fractions
        return f"| {' | '.join(cells)} |"


def read_rows(path: Path, columns: tuple[str, ...] = ("results", "prompt_sha256")) -> list[dict[str, Any]]:
    """Rows of a results file, each with at least some columns; none if there is no file.

    Raises:
        ValueError: a line is no row; says which.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            row = json.loads(line)
            for column in columns:
                row[column]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}, line {number}: not a row with {' and '.join(columns)}; mend or remove it"
            ) from None
        rows.append(row)
    return rows


def run(loaded: Loaded, args: argparse.Namespace, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Evaluate what the output file lacks, adding a row per prompt as soon as it is done.

    Returns:
        All rows that the arguments ask for, old and new.
    """
    jobs = [
        (tokens, task, number, asked)
        for tokens in args.tokens
        for task in args.tasks
        for number, asked in enumerate(
            make_questions(
                loaded.tokenizer,
                loaded.chat,
                split=args.split,
                task=task,
                tokens=tokens,
                count=args.prompts,
                seed=args.seed,
            )
        )
    ]

    @functools.cache
    def engine(name: str, budget: int, tokens: int) -> Engine:
        most = min(tokens + ROOM, loaded.config.max_position)
        files = {"importance": args.importance, "sharing": args.sharing}
        return Engine(loaded, cache=name, budget=budget, max_new_tokens=ROOM, max_context=most, **files)

    scores = head_importance(loaded, args.importance) if any(map(needs_importance, args.caches)) else None
    caches = dict.fromkeys(("full", *args.caches))
    whole = {cache for cache in caches if build_method(cache, scores).default_budget is None} | {"kvpress:full"}
    rows, wanted = read_rows(args.output), []
    shared, told = Shared(loaded) if args.peers else None, set[str]()
    for tokens, task, number, question in track(jobs, "Questions", console=Console(stderr=True)):
        record: Record | None = None
        for mode in args.question:
            key = {name: origin.get(name) for name in KEY}
            key |= {"tokens": tokens, "question": mode, "prompt_sha256": question.sha256}
            done = [row for row in rows if key.items() <= {name: row.get(name) for name in key}.items()]
            wanted += done
            asked_for = {name: [tokens] if name in whole else args.budgets for name in (*caches, *args.peers)}
            missing = _missing(asked_for, done)
            if not missing:
                continue
            started = time.perf_counter()
            presses = {name: missing.pop(name) for name in args.peers if name in missing}
            row = origin | key | {"split": args.split, "task": task, "kind": question.kind, "seed": args.seed}
            row |= {"index": number, "depth": question.depth, "mebibytes": {}, "results": {}}
            if missing:
                record = record or Record(loaded, question.context + question.question)
                engines = {
                    name: {budget: engine(name, budget, tokens) for budget in budgets}
                    for name, budgets in missing.items()
                }
                row["results"] = evaluate(record, question, mode=mode, engines=engines, verify=number < args.verify)
                row["mebibytes"] = {
                    name: {str(budget): round(made.cache.nbytes / 2**20, 2) for budget, made in by_budget.items()}
                    for name, by_budget in engines.items()
                }
            if shared and presses:
                theirs = press_scores.evaluate(shared, question, mode=mode, presses=presses, room=ROOM)
                row["results"] |= theirs.results
                row["mebibytes"] |= theirs.mebibytes
                row |= {"kept": theirs.kept, "refused": theirs.refused, "versions": press_scores.versions()}
                for name in sorted(theirs.refused.keys() - told):
                    told.add(name)  # once, so that nobody waits for hours for what never comes
                    print(f"{name} is left out where it fails: {theirs.refused[name]}", file=sys.stderr)
            row["seconds"] = round(time.perf_counter() - started, 2)
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            wanted.append(row)
    return wanted


def _sha256(file: Path | None) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file else None


def _missing(wanted: Mapping[str, list[int]], done: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Budgets by cache that no row has."""
    left = {
        cache: [b for b in budgets if not any(str(b) in _settled(row, cache) for row in done)]
        for cache, budgets in wanted.items()
    }
    return {cache: budgets for cache, budgets in left.items() if budgets}


def _settled(row: dict[str, Any], cache: str) -> dict[str, Any]:
    """What a row says about a cache, by budget: results, or why there are none."""
    return {**row["results"].get(cache, {}), **row.get("refused", {}).get(cache, {})}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.leaderboard", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, directory, .gguf file or hub id")
    parser.add_argument("--split", choices=["tune", "test"], default="tune")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(NEEDLES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000], help="prompt lengths")
    parser.add_argument("--question", nargs="+", choices=["seen", "unseen"], default=["seen"], help="while compressing")
    parser.add_argument("--prompts", type=int, default=24, help="questions per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--caches", nargs="+", default=CACHES, help="methods with options, e.g. headkv:beta=1.1")
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="PEER",
        help="kvpress for its presses, or presses by name, e.g. kvpress:snapkv or 'kvpress:snapkv(window_size=32)'",
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128, 256], help="tokens per KV head")
    parser.add_argument("--importance", type=Path, help="head-importance file (default: the one that ships)")
    parser.add_argument("--sharing", type=Path, help="layers that share, for kvsharer (default: what ships)")
    parser.add_argument(
        "--verify", type=int, default=0, help="prompts per task to run through the engines themselves too"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="jsonl file, a row per prompt; what it has already is not done again"
    )
    parser.add_argument("--table", type=Path, help="Markdown file for the table, which is always printed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args(argv)
    try:
        args.peers = press_scores.names(args.peers)
        commit = machine.commit()  # before the long part, during which the tree may change
        if args.threads:
            torch.set_num_threads(args.threads)
        loaded = load(args.model, dtype=args.dtype, device=args.device)
        if args.device == "cpu":
            try:
                native.load()
            except RuntimeError as error:
                print(f"without the C++ operators, so slower ({error})", file=sys.stderr)
        origin = {
            "model": loaded.name,
            "dtype": args.dtype,
            "template_sha256": loaded.chat.template_hash,
            "stop_ids": sorted(loaded.chat.stop_ids),
            "machine": machine.description(torch.device(args.device)),
            "importance_sha256": _sha256(args.importance),
            "sharing_sha256": _sha256(args.sharing),
            "commit": commit,
            "command": "python -m recipes.leaderboard " + shlex.join(sys.argv[1:] if argv is None else argv),
        }
        rows = run(loaded, args, origin)
        text = table(rows)
        if args.table:
            args.table.write_text(text)
    except (CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
