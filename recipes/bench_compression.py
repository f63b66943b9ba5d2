"""How long compressing a prompt takes, as a share of its dense prefill.

    python -m recipes.bench_compression --tokens 2000 --output recipes/results/bench_compression.json

A prompt is prefilled densely and recorded; then every cache scores and stores what it keeps of the recording, all of
them in turn, several rounds in one process. What decoding costs is measured by `zoo.bench`.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from kernels import native
from layers.methods import build_method, method_names, needs_importance
from recipes.questions import make_questions
from recipes.replay import Record, Replay
from zoo import Loaded, cli, load, machine
from zoo.load import DTYPES, head_importance

ROOM = 64


def measure(loaded: Loaded, *, tokens: int, caches: list[str], budget: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by cache; of the dense prefill under "prefill".

    Args:
        loaded: the model.
        tokens: length of the prompts, each round another one.
        caches: methods with options.
        budget: tokens per KV head.
        rounds: how many; one more goes first and does not count.

    Raises:
        ValueError: as `build_method`; a budget below what a cache always keeps; a prompt without room for its question.
        CheckpointError: no usable head importance.
    """
    importance = head_importance(loaded, None) if any(map(needs_importance, caches)) else None
    methods = {cache: build_method(cache, importance) for cache in caches}
    for cache, method in methods.items():
        if method.default_budget is not None and budget < method.least:
            raise ValueError(f"{cache}: {method.too_small(f'raise --budget from {budget}')}")
    questions = make_questions(
        loaded.tokenizer, loaded.chat, split="tune", task="prose", tokens=tokens, count=rounds + 1, seed=0
    )
    seconds: dict[str, list[float]] = {"prefill": [], **{cache: [] for cache in caches}}
    for number, question in enumerate(track(questions, "Rounds", console=Console(stderr=True))):
        started = time.perf_counter()
        record = Record(loaded, question.context + question.question)
        taken = {"prefill": time.perf_counter() - started}
        for cache, method in methods.items():
            started = time.perf_counter()
            Replay(record, method, [budget], room=ROOM)
            taken[cache] = time.perf_counter() - started
        if number:
            for name, value in taken.items():
                seconds[name].append(value)
    return seconds


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return cli.run("recipes.bench_compression", lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    changes_layers = "kvsharer"  # another model, whose prefill cannot be replayed
    count = cli.whole_number(1)
    parser = cli.Parser(prog="python -m recipes.bench_compression", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="alias, directory, .gguf file or hub id")
    parser.add_argument("--tokens", type=count, default=2000, help="prompt length")
    parser.add_argument(
        "--caches",
        nargs="+",
        default=[name for name in method_names() if name != changes_layers],
        help=f"methods with options (default: all but {changes_layers})",
    )
    parser.add_argument("--budget", type=count, default=128, help="tokens per KV head")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=cli.whole_number(1, 1024), help="CPU threads")
    parser.add_argument("--output", type=Path, help="json file for the seconds of every round")
    args = parser.parse_args(argv)
    cli.check_writable("--output", args.output)
    commit = machine.commit()
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load(args.model, dtype=args.dtype)
    try:
        native.load()
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    sizes = {"tokens": args.tokens, "budget": args.budget, "rounds": args.rounds}
    seconds = measure(loaded, caches=args.caches, **sizes)
    command = "python -m recipes.bench_compression " + shlex.join(sys.argv[1:] if argv is None else argv)
    origin = {"model": loaded.name, "dtype": args.dtype, "commit": commit, "command": command}
    if args.output:
        args.output.write_text(json.dumps(origin | {"threads": torch.get_num_threads()} | {"seconds": seconds}) + "\n")
    prefill = statistics.median(seconds.pop("prefill"))
    print(f"{loaded.name}, {args.dtype}, {args.tokens:,} tokens: prefill {prefill:.2f} s (median of {args.rounds})\n")
    print("| cache | ms | of prefill |\n|---|---|---|")
    for cache, values in sorted(seconds.items(), key=lambda item: statistics.median(item[1])):
        print(f"| `{cache}` | {statistics.median(values) * 1e3:.0f} | {statistics.median(values) / prefill:.1%} |")


if __name__ == "__main__":
    sys.exit(main())
