"""How often a compressed cache still finds the needle: accuracy and log-likelihood of answers, at equal bytes.

    python -m recipes.eval_needles --split test --output needles.jsonl --table needles.md

The prompt, question included, is prefilled and compressed; then the gold answer is fed token by token through the
compressed cache. A prompt counts as answered when every token of the asked-for value is the most likely one, which is
what greedy decoding from the words that lead up to it would give.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from checkpoints import CheckpointError
from layers.methods.base import Method
from recipes.needles import SPLITS, TASKS, NeedlePrompt, make_prompts
from recipes.replay import Record, answer_logits
from zoo import Engine, Loaded, load, machine

CACHES = ["headkv", "headkv:preset=published,beta=1.1", "snapkv", "snapkv:preset=tuned", "streaming"]


def value_scores(logits_AV: Tensor, prompt: NeedlePrompt) -> tuple[bool, float]:
    """Whether all tokens of the value are the most likely ones, and their mean negative log-likelihood in nats."""
    value_A = torch.tensor(prompt.value, device=logits_AV.device)
    log_AV = logits_AV[-len(prompt.value) :].float().log_softmax(-1)
    hit = bool((log_AV.argmax(-1) == value_A).all())
    return hit, -float(log_AV.gather(1, value_A[:, None]).mean())


def check_with_engine(engine: Engine, prompt: NeedlePrompt, expected_AV: Tensor) -> None:
    """Run one prompt through the engine itself and compare with the replay.

    Raises:
        AssertionError: the logits differ by more than rounding.
    """
    logits = [engine.prefill([prompt.ids])]
    logits += [engine.step([token]) for token in (prompt.lead + prompt.value)[:-1]]
    worst = float((torch.cat(logits) - expected_AV).abs().max())
    assert worst < 2e-3, f"engine and replay differ by {worst} with {engine.method.name} at {engine.budget}"


def evaluate(
    loaded: Loaded,
    *,
    split: str,
    tasks: list[str],
    tokens: int,
    count: int,
    seed: int,
    caches: list[str],
    budgets: list[int],
    importance: Path | None = None,
    verify: int = 0,
) -> list[dict[str, Any]]:
    """Evaluate caches on needle prompts.

    Args:
        loaded: the model.
        split: "tune" or "test".
        tasks: of `TASKS`.
        tokens: length of the prompts.
        count: prompts per task.
        seed: of the prompts.
        caches: methods with options, as `Engine` takes them; "full" is always among the results.
        budgets: tokens per KV head.
        importance: head-importance file; None takes the one that ships.
        verify: on the first so many prompts of each task, one setting in turn also runs through the engine itself.

    Returns:
        One row per task, cache and budget, with the results of every prompt.

    Raises:
        ValueError: as `Engine`; two caches of one budget that do not take the same bytes.
        CheckpointError: as `Engine`.
    """
    room = 64
    pairs = [("full", tokens), *((cache, budget) for budget in budgets for cache in caches if cache != "full")]
    engines = [
        Engine(
            loaded,
            cache=cache,
            budget=budget,
            max_new_tokens=room,
            max_context=tokens + room,
            importance=importance,
        )
        for cache, budget in pairs
    ]
    methods: dict[str, Method] = {cache: engine.method for (cache, _), engine in zip(pairs, engines, strict=True)}
    sizes = {
        budget: {e.stats().nbytes for (_, b), e in zip(pairs[1:], engines[1:], strict=True) if b == budget}
        for budget in budgets
    }
    for budget, nbytes in sizes.items():
        if len(nbytes) > 1:
            raise ValueError(f"caches of budget {budget} take different bytes: {sorted(nbytes)}")
    settings = [(methods[cache], budget) for cache, budget in pairs]
    window = max(method.scorer.window for method in methods.values())

    rows = []
    for task in tasks:
        prompts = make_prompts(
            loaded.tokenizer, loaded.chat, split=split, task=task, tokens=tokens, count=count, seed=seed
        )
        scores: list[list[tuple[bool, float]]] = [[] for _ in pairs]
        for number, prompt in enumerate(track(prompts, f"Needles in {task}", console=Console(stderr=True))):
            record = Record(loaded, prompt.ids, window)
            answer = prompt.lead + prompt.value
            # The full cache is as large as all others together: it gets an arena of its own.
            logits_BAV = torch.cat(
                [answer_logits(record, part, answer) for part in (settings[:1], settings[1:]) if part]
            )
            if number < verify:
                turn = (tasks.index(task) * verify + number) % len(pairs)
                check_with_engine(engines[turn], prompt, logits_BAV[turn])
            for per_pair, logits_AV in zip(scores, logits_BAV, strict=True):
                per_pair.append(value_scores(logits_AV, prompt))
        digest = hashlib.sha256(json.dumps([p.ids + p.lead + p.value for p in prompts]).encode()).hexdigest()
        for (cache, budget), engine, per_pair in zip(pairs, engines, scores, strict=True):
            rows.append(
                {
                    "task": task,
                    "cache": cache,
                    "budget": None if cache == "full" else budget,
                    "nbytes": engine.stats().nbytes,
                    "method": repr(engine.method.scorer),
                    "allocator": type(engine.method.allocator).__name__,
                    "beta": getattr(engine.method.allocator, "beta", None),
                    "alpha": getattr(engine.method.allocator, "alpha", None),
                    "protected": [engine.method.sinks, engine.method.recent],
                    "split": split,
                    "tokens": tokens,
                    "seed": seed,
                    "prompts_sha256": digest,
                    "kinds": [p.kind for p in prompts],
                    "hits": [int(hit) for hit, _ in per_pair],
                    "nll": [round(nll, 5) for _, nll in per_pair],
                }
            )
    return rows


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
    """Results as Markdown: one table per task and one for all tasks together."""
    rows = list(rows)
    first = rows[0]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = [
        f"# Needles in {' and '.join(tasks)}, {first['tokens']:,} tokens, {first['model']}, {first['dtype']}",
        "",
        f"{len(first['hits'])} prompts per task, split `{first['split']}`, seed {first['seed']}, at {first['commit']}.",
        "The question is in the prompt, which is prefilled whole and compressed once. Accuracy: all tokens of the",
        "asked-for value are the most likely ones; above the full cache it is not fidelity, as fewer tokens distract",
        "less. ΔNLL: nats per token of the value above the full cache. Brackets: 95 % intervals (Wilson, bootstrap).",
        "Caches of one budget take the same bytes. The last column counts right answers by kind of needle.",
        "",
        f"    {first['command']}",
    ]
    for task in (*tasks, None) if len(tasks) > 1 else tasks:
        groups: dict[tuple[int | None, str], list[dict[str, Any]]] = {}
        for row in rows:
            if task in (None, row["task"]):
                groups.setdefault((row["budget"], row["cache"]), []).append(row)
        full = _Pooled(groups.pop((None, "full")))
        lines += ["", f"## {task or 'All tasks together'}", ""]
        lines += [f"| slots per KV head | MiB | cache | accuracy | of full | ΔNLL | {' '.join(full.by_kind)} |"]
        lines += ["|---" * 7 + "|", full.line("all", "full", "-", f"(NLL {sum(full.nll) / len(full.nll):.3f})")]
        for (budget, cache), group in groups.items():
            pooled = _Pooled(group)
            extra = [nll - base for nll, base in zip(pooled.nll, full.nll, strict=True)]
            below, above = bootstrap(extra)
            share = f"{sum(pooled.hits) / sum(full.hits):.0%}" if sum(full.hits) else "-"
            mean = f"{sum(extra) / len(extra):+.3f} [{below:+.3f}, {above:+.3f}]"
            lines.append(pooled.line(str(budget), cache, share, mean))
    return "\n".join(lines) + "\n"


class _Pooled:
    """The prompts of several rows as one."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.mebibytes = rows[0]["nbytes"] / 2**20
        self.hits: list[int] = [hit for row in rows for hit in row["hits"]]
        self.nll: list[float] = [nll for row in rows for nll in row["nll"]]
        self.by_kind: dict[str, list[int]] = {}
        for kind, hit in zip((kind for row in rows for kind in row["kinds"]), self.hits, strict=True):
            self.by_kind.setdefault(kind, []).append(hit)

    def line(self, budget: str, cache: str, share: str, nll: str) -> str:
        hits, count = sum(self.hits), len(self.hits)
        low, high = wilson(hits, count)
        accuracy = f"{hits}/{count} = {hits / count:.2f} [{low:.2f}, {high:.2f}]"
        kinds = " ".join(f"{sum(hits)}/{len(hits)}" for hits in self.by_kind.values())
        return f"| {budget} | {self.mebibytes:.1f} | `{cache}` | {accuracy} | {share} | {nll} | {kinds} |"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.eval_needles", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, directory, .gguf file or hub id")
    parser.add_argument("--split", choices=[name for name in SPLITS if name != "calibrate"], default="tune")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--tokens", type=int, default=2000, help="prompt length")
    parser.add_argument("--prompts", type=int, default=24, help="per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--caches", nargs="+", default=CACHES, help="methods with options, e.g. headkv:beta=1.1")
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64, 128], help="tokens per KV head")
    parser.add_argument("--importance", type=Path, help="head-importance file (default: the one that ships)")
    parser.add_argument("--verify", type=int, default=0, help="prompts per task to run through the engine itself too")
    parser.add_argument("--output", type=Path, required=True, help="jsonl file, one row per task, cache and budget")
    parser.add_argument("--table", type=Path, help="Markdown file for the table, which is always printed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args(argv)
    try:
        commit = machine.commit()  # before the long part, during which the tree may change
        if args.threads:
            torch.set_num_threads(args.threads)
        loaded = load(args.model, dtype=args.dtype, device=args.device)
        rows = evaluate(
            loaded,
            split=args.split,
            tasks=args.tasks,
            tokens=args.tokens,
            count=args.prompts,
            seed=args.seed,
            caches=args.caches,
            budgets=args.budgets,
            importance=args.importance,
            verify=args.verify,
        )
        origin = {
            "model": loaded.name,
            "dtype": args.dtype,
            "template_sha256": loaded.chat.template_hash,
            "commit": commit,
            "command": "python -m recipes.eval_needles " + " ".join(sys.argv[1:] if argv is None else argv),
        }
        rows = [row | origin for row in rows]
        args.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
