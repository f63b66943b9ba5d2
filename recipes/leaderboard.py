"""What compressed caches still know: methods, budgets, tasks, lengths and ways of asking in one table.

    python -m recipes.leaderboard --split test --question seen unseen --output scores.jsonl --table scores.md

A prompt is prefilled once for all caches. With the question seen, it is compressed whole; unseen, its context is
compressed, and the question follows as a second turn. Then the gold answer is fed token by token through the compressed
cache, which gives its log-likelihood. A needle (tasks noise and prose) counts as found when every token of the
asked-for value is the most likely one, which is what greedy decoding from the words that lead up to it would give.
Answers of RULER's families are generated and searched for what was asked for.

`--peers kvpress` puts the same questions to kvpress's presses, which share a prefill per way of asking. A press that
fails at a budget is left out there and only there; why is `refused` in the row, and it is not tried again.
`--engine ray` spreads the questions over a Ray cluster (`pip install -e '.[ray]'`), for the same rows.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from layers.methods import build_method, needs_importance
from recipes import cluster, press_scores
from recipes.needles import TASKS as NEEDLES
from recipes.questions import TASKS, Question, make_questions
from recipes.standings import KEY, resume, table
from recipes.worker import Job, Worker, load_model, make_worker
from zoo import Loaded, cli, machine
from zoo.load import head_importance

CACHES = ["headkv", "headkv:preset=published,beta=1.1", "snapkv", "snapkv:preset=tuned", "streaming"]


def run(loaded: Loaded, args: argparse.Namespace, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Evaluate what the output file lacks, adding a row per prompt as soon as it is done.

    Returns:
        All rows that the arguments ask for, old and new.
    """
    asked = [
        (tokens, index, question)
        for tokens in args.tokens
        for task in args.tasks
        for index, question in enumerate(
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
    _check_room(loaded, asked)
    rows = resume(args.output)

    def done(tokens: int, mode: str, question: Question) -> list[dict[str, Any]]:
        key = {name: origin.get(name) for name in KEY}
        key |= {"tokens": tokens, "question": mode, "prompt_sha256": question.sha256}
        return [row for row in rows if key.items() <= {name: row.get(name) for name in key}.items()]

    scores = head_importance(loaded, args.importance) if any(map(needs_importance, args.caches)) else None
    caches = dict.fromkeys(("full", *args.caches))
    whole = {cache for cache in caches if build_method(cache, scores).default_budget is None} | {"kvpress:full"}
    jobs = []
    for tokens, index, question in asked:
        wanted = {name: [tokens] if name in whole else args.budgets for name in (*caches, *args.peers)}
        missing = {mode: _missing(wanted, done(tokens, mode, question)) for mode in args.question}
        if any(missing.values()):
            jobs.append(Job(question=question, tokens=tokens, index=index, missing=missing))
    results: Iterable[Iterable[dict[str, Any]]] = []
    if jobs and args.engine == "ray":
        make = functools.partial(make_worker, args, origin)
        gpus = int(torch.device(args.device).type == "cuda")
        results = cluster.spread(make, jobs, workers=args.workers, cpus=args.threads or 1, gpus=gpus)
    elif jobs:
        results = map(Worker(loaded, args, origin).rows, jobs)
    told: set[str] = set()
    for made in track(results, "Questions", total=len(jobs), console=Console(stderr=True)):
        for row in made:
            for name in sorted(row.get("refused", {}).keys() - told):
                told.add(name)  # once, so that nobody waits for hours for what never comes
                print(f"{name} is left out where it fails: {row['refused'][name]}", file=sys.stderr)
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
    return [row for tokens, _, question in asked for mode in args.question for row in done(tokens, mode, question)]


def _check_room(loaded: Loaded, asked: Iterable[tuple[int, int, Question]]) -> None:
    """Refuse prompts that leave no room for their answer in what the model was trained for."""
    most = loaded.config.max_position
    for tokens, _, question in asked:
        needed = len(question.context) + len(question.question) + question.room
        if needed > most:
            raise ValueError(
                f"--tokens {tokens}: a prompt of {question.task} takes {needed} tokens with its answer, {loaded.name} "
                f"was trained for {most}: lower --tokens"
            )


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
    return cli.run("recipes.leaderboard", lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    count = cli.whole_number(1)
    parser = cli.Parser(prog="python -m recipes.leaderboard", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, directory, .gguf file or hub id")
    parser.add_argument("--split", choices=["tune", "test"], default="tune")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(NEEDLES))
    parser.add_argument("--tokens", type=count, nargs="+", default=[2000], help="prompt lengths")
    parser.add_argument("--question", nargs="+", choices=["seen", "unseen"], default=["seen"], help="while compressing")
    parser.add_argument("--prompts", type=count, default=24, help="questions per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--caches", nargs="*", default=CACHES, help="methods with options, e.g. headkv:beta=1.1")
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[],
        metavar="PEER",
        help="kvpress for its presses, or presses by name, e.g. kvpress:snapkv or 'kvpress:snapkv(window_size=32)'",
    )
    parser.add_argument("--budgets", type=count, nargs="+", default=[32, 64, 128, 256], help="tokens per KV head")
    parser.add_argument("--importance", type=Path, help="head-importance file (default: the one that ships)")
    parser.add_argument("--sharing", type=Path, help="layers that share, for kvsharer (default: what ships)")
    parser.add_argument(
        "--verify",
        type=cli.whole_number(0),
        default=0,
        help="prompts per task that go through the engines too",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="jsonl file, a row per prompt; what it has already is not done again"
    )
    parser.add_argument("--table", type=Path, help="Markdown file for the table, which is always printed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=cli.whole_number(1, 1024), help="CPU threads, with --engine ray per worker")
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="ray: questions over a Ray cluster")
    parser.add_argument("--workers", type=count, help="with --engine ray (default: as many as the cluster holds)")
    args = parser.parse_args(argv)
    for option, path in (("--output", args.output), ("--table", args.table)):
        cli.check_writable(option, path)
    args.peers = press_scores.names(args.peers)
    commit = machine.commit()  # before the long part, during which the tree may change
    if args.engine == "ray":
        cluster.require_ray()
    loaded = load_model(args)
    origin = {
        "model": loaded.name,
        "dtype": args.dtype,
        "template_sha256": loaded.chat.template_hash,
        "stop_ids": sorted(loaded.chat.stop_ids),
        "importance_sha256": _sha256(args.importance),
        "sharing_sha256": _sha256(args.sharing),
        "commit": commit,
        "command": "python -m recipes.leaderboard " + shlex.join(sys.argv[1:] if argv is None else argv),
    }
    try:
        rows = run(loaded, args, origin)
    except KeyboardInterrupt:
        raise ValueError(f"interrupted: what is done is in {args.output}, the same command goes on") from None
    text = table(rows)
    if args.table:
        args.table.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
