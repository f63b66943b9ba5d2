"""Decoding and prefill beside the programs that people would use instead: transformers, kvpress, llama.cpp.

    python -m recipes.bench_peers --table recipes/results/bench_peers.md

Everybody has the same weights, precision, threads and prompts of random tokens, and then decodes the same tokens at the
same positions: those that our full cache finds likeliest. Before anything is timed, logits must be ours: after a short
prompt, and a few steps on where the cache keeps everything. Then turns are taken, A B A B: first prefills, then rounds
of steps, the first step of each untimed. The median over all rounds counts.

All run in this process, so that the weights are held once. Between turns there is a pause in which the threads of the
last program fall asleep; with OMP_WAIT_POLICY=ACTIVE they never would, so that is refused.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from checkpoints.resolve import DEFAULT_MODEL
from recipes.peers import PEERS, Contender, Ours, Point, Shared, Unsuitable
from zoo import Loaded, cli, load, machine
from zoo.engine import free_bytes

# Largest difference from our logits. In bfloat16 the programs round at different places: by up to 0.7 on the default
# model, where one layer's wrong queries make 4 and wrongly ordered ones 7.
TOLERANCE = {"float32": 1e-2, "bfloat16": 1.5}
CHECK_TOKENS, CHECK_STEPS = 96, 2  # as many steps as the shortest race has
PAUSE_S = 0.05
PACKAGES = ("torch", "transformers", "kvpress", "llama-cpp-python")


@dataclass(kw_only=True)
class Lane:
    """One contender and what is known of it.

    Args:
        name: "ours" or the peer's.
        cache: what it keeps.
        make: makes the contender.
    """

    name: str
    cache: str
    make: Callable[[], Contender]
    contender: Contender | None = None
    difference: float | None = None
    prefill_s: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    left_out: str | None = None
    error: str | None = None

    def __str__(self) -> str:
        """As tables call it."""
        return f"{self.name} {self.cache}" if self.name == "ours" else self.name


def race(
    lanes: Sequence[Lane], ids_BT: Tensor, expected: list[Tensor], tokens_SB: Tensor, *, rounds: int, tolerance: float
) -> Iterator[str]:
    """Check every contender, then let them prefill and decode in turn; results are in the lanes.

    A peer that fails, in whatever way, drops out.

    Args:
        lanes: the contenders.
        ids_BT: the prompts.
        expected: logits after the first `CHECK_TOKENS` tokens, and after each further step (see `reference`).
        tokens_SB: what is decoded after the prompts, a whole number of tokens per round.
        rounds: turns of decoding.
        tolerance: largest difference from the expected logits.

    Yields:
        Before each turn, whose it is.
    """
    turns: list[Callable[[Lane], None]] = [lambda lane: check(lane, ids_BT, expected, tolerance)]
    turns += [lambda lane: time_prefill(lane, ids_BT)] * prefills(ids_BT.shape[1])
    turns += [lambda lane, part=part: time_steps(lane, part) for part in tokens_SB.chunk(rounds)]  # type: ignore[misc]
    for turn in turns:
        for lane in lanes:
            yield str(lane)
            if lane.left_out:
                continue
            time.sleep(PAUSE_S)
            try:
                turn(lane)
            except Unsuitable as reason:
                lane.left_out = str(reason)
            except Exception as error:
                if lane.name == "ours":
                    raise
                lane.left_out = lane.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                lane.contender = None


def prefills(context: int) -> int:
    """How often prompts of so many tokens are prefilled."""
    return 3 if context <= 2048 else 2


def reference(contender: Contender, ids_BT: Tensor, steps: int) -> tuple[list[Tensor], Tensor]:
    """What others are compared with and fed.

    Args:
        contender: ours, with a full cache.
        ids_BT: prompts.
        steps: tokens to decode.

    Returns:
        Logits after the first `CHECK_TOKENS` tokens and, for each of `CHECK_STEPS` more of them, after that; the (S, B)
        likeliest tokens after the whole prompts.
    """
    expected = [logits.clone() for logits in _checked_logits(contender, ids_BT)]
    logits_BV, tokens = contender.prefill(ids_BT), []
    for _ in range(steps):
        tokens.append(logits_BV.argmax(-1))
        logits_BV = contender.step(tokens[-1])
    return expected, torch.stack(tokens)


def _checked_logits(contender: Contender, ids_BT: Tensor) -> Iterator[Tensor]:
    yield contender.prefill(ids_BT[:, :CHECK_TOKENS])
    if contender.lossless:
        for token_B in ids_BT[:, :CHECK_STEPS].T:
            yield contender.step(token_B)


def check(lane: Lane, ids_BT: Tensor, expected: list[Tensor], tolerance: float) -> None:
    """Make the contender and compare its logits.

    Raises:
        ValueError: they differ.
    """
    lane.contender = lane.make()
    pairs = zip(_checked_logits(lane.contender, ids_BT), expected, strict=False)
    lane.difference = max(float((got.float() - wanted.float()).abs().max()) for got, wanted in pairs)
    if not lane.difference <= tolerance:
        raise ValueError(f"its logits differ from ours by {lane.difference:.3g}, which is more than {tolerance}")


def time_prefill(lane: Lane, ids_BT: Tensor) -> None:
    """Prefill once."""
    assert lane.contender is not None
    start = time.perf_counter()
    lane.contender.prefill(ids_BT)
    lane.prefill_s.append(time.perf_counter() - start)


def time_steps(lane: Lane, tokens_SB: Tensor) -> None:
    """Decode tokens, the first one untimed: it wakes the threads and fills the caches of the CPU."""
    assert lane.contender is not None
    lane.contender.step(tokens_SB[0])
    for token_B in tokens_SB[1:]:
        start = time.perf_counter()
        lane.contender.step(token_B)
        lane.step_ms.append(1000 * (time.perf_counter() - start))


def summarize(lanes: Sequence[Lane], budget: int) -> list[dict[str, Any]]:
    """Medians, and how many times as long as each of ours everybody took.

    Args:
        lanes: after the race; those left out without an error have no row.
        budget: of the compressed caches.

    Returns:
        One row per contender.
    """
    rows = []
    for lane in lanes:
        row: dict[str, Any] = {"contender": lane.name, "cache": lane.cache, "logits_difference": lane.difference}
        if lane.error:
            rows.append(row | {"error": lane.error})
        elif not lane.left_out:
            assert lane.contender is not None
            p10, median, p90 = np.percentile(lane.step_ms, [10, 50, 90]).tolist()
            rows.append(
                row
                | {
                    "budget": None if lane.contender.lossless else budget,
                    "note": lane.contender.note,
                    "timed_steps": len(lane.step_ms),
                    "decode_ms": median,
                    "decode_ms_p10": p10,
                    "decode_ms_p90": p90,
                    "prefill_s": statistics.median(lane.prefill_s),
                    "prefill_all_s": lane.prefill_s,
                }
            )
    ours = [row for row in rows if row["contender"] == "ours"]
    for row in rows:
        if "error" not in row:
            for name in ("decode_ms", "prefill_s"):
                row[name.split("_")[0] + "_ratio"] = {other["cache"]: row[name] / other[name] for other in ours}
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line per point and contender, with its times as multiples of ours."""
    caches = list(dict.fromkeys(row["cache"] for row in rows if row["contender"] == "ours"))
    head = ["dtype", "context", "batch", "contender", "decode ms [p10, p90]", *(f"/ ours {c}" for c in caches)]
    head += ["prefill s", *(f"/ ours {c}" for c in caches)]
    lines = [head, ["---"] * 3 + ["---"] + ["--:"] * (len(head) - 4)]
    for row in rows:
        name = f"**ours** `{row['cache']}`" if row["contender"] == "ours" else row["contender"]
        name += f", budget {row['budget']}" if row.get("budget") else ""
        line = [row["dtype"], f"{row['context']}", f"{row['batch']}", name]
        if "error" in row:
            line += [row["error"].replace("|", "\\|")] + [""] * (len(head) - 5)
        else:
            line += [f"{row['decode_ms']:.1f} [{row['decode_ms_p10']:.1f}, {row['decode_ms_p90']:.1f}]"]
            line += [f"{row['decode_ratio'][cache]:.2f}" for cache in caches]
            line += [f"{row['prefill_s']:.2f}", *(f"{row['prefill_ratio'][cache]:.2f}" for cache in caches)]
        lines.append(line)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run("recipes.bench_peers", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    _check_options(args)
    peers = [name for name in dict.fromkeys(args.peers) if _is_there(name)]
    points = [
        Point(context=n, batch=b, new_tokens=args.rounds * (args.steps + 1), budget=args.budget, threads=args.threads)
        for n, b in itertools.product(args.context, args.batch)
    ]
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    origin = {
        "model": args.model,
        "threads": args.threads,
        "commit": machine.commit(),  # before rows are written, which may be to a file of the tree
        "command": shlex.join(["python", "-m", "recipes.bench_peers", *argv]),
        "machine": machine.description(torch.device("cpu")),
        "versions": _versions(),
    }
    # A bar that refreshes itself would run while steps are timed.
    bar = Progress(console=Console(stderr=True), auto_refresh=False, disable=not sys.stderr.isatty())
    turns = len(args.dtype) * sum(1 + prefills(point.context) + args.rounds for point in points)
    with args.output.open("a") as output, bar:
        task = bar.add_task("", total=turns * (len(args.cache) + len(peers)))
        for dtype in args.dtype:
            loaded = load(args.model, dtype=dtype, progress=False)
            shared = Shared(loaded)
            for point in points:
                lanes = _lanes(shared, point, args.cache, peers, compile=args.compile)
                _check_memory(loaded, point, len(lanes))
                ids_BT, expected, tokens_SB = _work(loaded, point)
                race_ = race(lanes, ids_BT, expected, tokens_SB, rounds=args.rounds, tolerance=TOLERANCE[dtype])
                for whose in race_:
                    bar.update(task, description=f"{dtype} {point.context} × {point.batch}: {whose}", refresh=True)
                    bar.advance(task)
                for lane in lanes:
                    if lane.left_out:
                        cli.note(f"{lane} is left out at {dtype}, context {point.context}: {lane.left_out}")
                new = [
                    origin | {"dtype": dtype, "context": point.context, "batch": point.batch} | row
                    for row in summarize(lanes, point.budget)
                ]
                output.writelines(json.dumps(row) + "\n" for row in new)
                output.flush()
                rows += new
    text = table(rows)
    if args.table:
        args.table.write_text(text)
    print(text, end="")
    if failed := sorted({row["contender"] for row in rows if "error" in row}):
        raise ValueError(f"{', '.join(failed)} failed, see above; what the others did is in {args.output}")


def _parser() -> argparse.ArgumentParser:
    made = cli.Parser(
        prog="python -m recipes.bench_peers", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add, whole = made.add_argument, cli.whole_number(1)
    add("--model", default=DEFAULT_MODEL, metavar="M", help="as for zoo.chat (default: %(default)s)")
    add("--dtype", nargs="+", choices=TOLERANCE, default=list(TOLERANCE), help="default: all")
    add("--context", nargs="+", type=whole, default=[512, 8192], metavar="N", help="prompt tokens (default: 512 8192)")
    add("--batch", nargs="+", type=whole, default=[1], metavar="N", help="prompts at once (default: 1)")
    add("--cache", nargs="+", default=["full", "headkv"], metavar="C", help="ours (default: full headkv)")
    add("--budget", type=whole, default=128, metavar="B", help="tokens per KV head (default: %(default)s)")
    usual = [name for name in PEERS if name != "static"]
    add("--peers", nargs="*", choices=PEERS, default=usual, help="default: all but static, which compiles for minutes")
    add("--steps", type=whole, default=32, metavar="N", help="timed steps per round (default: %(default)s)")
    add("--rounds", type=whole, default=3, metavar="N", help="turns of decoding (default: %(default)s)")
    add("--threads", type=cli.whole_number(1, 1024), default=2, metavar="N", help="CPU threads (default: %(default)s)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=cli.has_compiler(),
        help="compile our decode step (default: where there is a C++ compiler)",
    )
    results = Path(__file__).with_name("results")
    add("--output", type=Path, default=results / "bench_peers.jsonl", metavar="FILE", help="where rows are appended")
    add("--table", type=Path, metavar="FILE", help="Markdown file for the table, which is always printed")
    return made


def _check_options(args: argparse.Namespace) -> None:
    for cache in args.cache:
        cli.described(cache)
    if args.compile and not cli.has_compiler():
        raise ValueError("--compile needs a C++ compiler and there is none: install g++, or pass --no-compile")
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        raise ValueError("OMP_WAIT_POLICY=ACTIVE makes idle programs slow down the one measured: unset it")
    cli.check_writable("--table", args.table)


def _is_there(name: str) -> bool:
    peer = PEERS[name]
    if not peer.is_installed():
        cli.note(f"{name} is not installed and left out: pip install -e '.[{peer.extra}]'")
        return False
    # In a process of its own: a program built for another processor does not raise, it ends the process.
    tried = subprocess.run([sys.executable, "-c", f"import {peer.module}"], capture_output=True)
    if tried.returncode < 0:
        cli.note(
            f"{name} is left out: importing {peer.module} ends Python by {signal.Signals(-tried.returncode).name}; "
            "install it anew, for this machine"
        )
        return False
    return True


def _lanes(shared: Shared, point: Point, caches: list[str], peers: list[str], *, compile: bool) -> list[Lane]:
    torch.compiler.reset()  # the functions of the last point, of which only so many are allowed
    lanes = [
        Lane(name="ours", cache=cache, make=partial(Ours, shared.loaded, point, cache=cache, compile=compile))
        for cache in dict.fromkeys(caches)
    ]
    return lanes + [
        Lane(name=name, cache=PEERS[name].cache, make=partial(PEERS[name].make, shared, point)) for name in peers
    ]


def _check_memory(loaded: Loaded, point: Point, contenders: int) -> None:
    """Refuse what cannot fit: everybody's cache, ours for reference, and the widest activations of a prefill.

    Raises:
        ValueError: it is more than is free.
    """
    config = loaded.config
    per_token = (contenders + 1) * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    per_token += 3 * config.intermediate_size + 4 * config.hidden_size
    needed = point.batch * point.tokens * per_token * loaded.model.embed.weight.dtype.itemsize
    free = free_bytes(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"{contenders} contenders with {point.batch} prompt(s) of {point.context} tokens take {needed:,} bytes "
            f"and {free:,} are free: lower --context or --batch, or name fewer --peers"
        )


def _work(loaded: Loaded, point: Point) -> tuple[Tensor, list[Tensor], Tensor]:
    """Prompts, the logits that are expected, the tokens to decode."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(loaded.config.vocab_size, (point.batch, point.context), generator=generator)
    return ids_BT, *reference(Ours(loaded, point, cache="full", compile=False), ids_BT, point.new_tokens)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


if __name__ == "__main__":
    sys.exit(main())
