"""`python -m zoo.bench`: how fast a model reads prompts and decodes, and how near to the memory's speed that is."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from checkpoints.resolve import DEFAULT_MODEL
from checkpoints.storage import atomic_file
from zoo import cli
from zoo.load import DTYPES, WEIGHTS, Loaded, load

# torch takes seconds to import: `--help` and wrong options do not wait for it.
if TYPE_CHECKING:
    from zoo.engine import Engine

_DESCRIPTION = """Measure prefill, decoding and memory, and compare decoding with the machine's read bandwidth.

Every combination of --context, --batch, --cache and --budget is one point. Prompts are random tokens and may be longer
than the model was trained for. In a batch they are ragged: row i of b has 1 - i/(2b) of the context. A decode step is
the model and the choice of the likeliest next token. MBU is the bytes of weights and cache that a step has to read, by
the time it takes, as a share of what a streaming sum reads. Two new processes with a compiler cache of their own then
measure what compiling adds to a first step: cold, and warm when it was done before.

A table goes to standard output, and after it one line with everything as JSON; progress goes to standard error. A
point that does not fit into memory is refused, the others go on, and the exit status is 2."""
_EXAMPLES = """examples:
  python -m zoo.bench --context 512 8192 --cache full headkv --budget 128
  python -m zoo.bench --context 512 --batch 1 4 --dtype bfloat16 --threads 2 --json bench.json
"""
_WARM_UP_STEPS = 8
_SHORT_PROMPT = 16
_BYTES_OF_AN_ID = 48  # one token id in a list and in its checked copy


class _Point(NamedTuple):
    """What is measured at once; a budget of None is the method's default."""

    context: int
    batch: int
    cache: str
    budget: str | None


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its options; None takes those of the process.

    Returns:
        The exit status; see `zoo.cli.run`.
    """
    return cli.run("zoo.bench", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    points = _points(args)
    times_compiling = args.time_compile is not None
    if not times_compiling:
        args.compile = cli.compiles(args, interactive=True) and (args.compile or True)
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    loaded = load(args.model, dtype=args.dtype, weights=args.weights, device=args.device, progress=sys.stderr.isatty())
    if times_compiling:
        print(_compile_seconds(args, loaded, points[args.time_compile]._replace(context=_SHORT_PROMPT)))
        return

    from zoo import machine

    report: dict[str, Any] = {
        "points": [],
        "compile_s": None,
        "machine": machine.description(loaded.model.embed.weight.device),
        "model": args.model,
        "command": shlex.join(["python", "-m", "zoo.bench", *argv]),
        "commit": machine.commit(),
    }
    try:
        for number, point in enumerate(points, 1):
            row = {**point._asdict(), "dtype": args.dtype, "weights": args.weights, "compile": args.compile}
            try:
                row |= _measure(args, loaded, point)
                result = f"decode {row['decode_ms']:.2f} ms, MBU {row['mbu']:.2f}"
            except ValueError as error:
                result = row["error"] = str(error)
            report["points"].append(row)
            _save(report, args.json)
            what = f"context {point.context}, batch {point.batch}, {point.cache} {point.budget or ''}".rstrip()
            cli.note(f"[{number}/{len(points)}] {what}: {result}")
        measured = [number for number, row in enumerate(report["points"]) if "error" not in row]
        if measured and args.compile and not args.no_compile_times:
            report["compile_s"] = _time_compiling([*argv, "--time-compile", str(measured[0])])
            _save(report, args.json)
    finally:  # an interruption costs what was not measured yet, nothing else
        if report["points"]:
            _show(report)
    if failed := [row["error"] for row in report["points"] if "error" in row]:
        raise ValueError(f"{len(failed)} of {len(points)} points were refused: {failed[0]}")


def _parser() -> argparse.ArgumentParser:
    made = cli.Parser(
        prog="python -m zoo.bench",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, count = made.add_argument, cli.whole_number(1)
    add("--model", default=DEFAULT_MODEL, metavar="M", help="as for zoo.chat (default: %(default)s)")
    add("--cache", nargs="+", default=["full", "headkv"], metavar="C", help="methods (default: full headkv)")
    add("--budget", nargs="+", type=cli.budget_text, default=[None], metavar="B", help="default: the method decides")
    add("--context", nargs="+", type=count, default=[512, 2048, 8192], metavar="N", help="default: 512 2048 8192")
    add("--batch", nargs="+", type=count, default=[1], metavar="N", help="rows (default: 1)")
    add("--dtype", default="float32", metavar="D", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    add("--weights", choices=WEIGHTS, help="int8: matrices in 8 bits, a scale per row (default: as --dtype)")
    add("--threads", type=cli.whole_number(1, 1024), metavar="N", help="CPU threads (default: torch decides)")
    add("--compile", nargs="?", const=True, choices=["inductor"], help="as for zoo.chat; inductor: with torch.compile")
    add("--no-compile", dest="compile", action="store_false", default=None, help="decode uncompiled")
    add("--no-compile-times", action="store_true", help="do not measure how long compiling takes")
    add("--steps", type=count, default=32, metavar="N", help="timed decode steps per point (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="keep the JSON here too, as far as it is, after every point")
    add("--device", default="cpu", metavar="D", help="where to run, e.g. cpu or cuda (default: %(default)s)")
    add("--importance", metavar="FILE", help="head importance if it is needed (default: what ships for the model)")
    add("--sharing", metavar="FILE", help="layers that share, for kvsharer (default: what ships for the model)")
    add("--time-compile", type=int, help=argparse.SUPPRESS)  # tells the new processes which point to take
    return made


def _points(args: argparse.Namespace) -> list[_Point]:
    """The points that the options ask for, after everything that can be refused without the model."""
    from layers.methods import needs_importance

    keeps_everything = {cache: cli.described(cache).default_budget is None for cache in args.cache}
    names = " ".join(args.cache)
    if args.budget != [None] and all(keeps_everything.values()):
        raise ValueError(f"--cache {names} keeps everything: drop --budget, or add another method")
    if args.importance is not None and not any(map(needs_importance, args.cache)):
        raise ValueError(f"--cache {names} does not use head importance: drop --importance {args.importance}")
    if args.sharing is not None and not any(cli.described(cache).shared_layers for cache in args.cache):
        raise ValueError(f"--cache {names} shares no layers: drop --sharing {args.sharing}")
    cli.check_writable("--json", args.json)
    points = [
        _Point(context, batch, cache, None if keeps_everything[cache] else budget)
        for context, batch, cache, budget in itertools.product(args.context, args.batch, args.cache, args.budget)
    ]
    return list(dict.fromkeys(points))


# -- one point ---------------------------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace, loaded: Loaded, point: _Point) -> dict[str, Any]:
    """The figures of a point by name, units in the names.

    Raises:
        ValueError: the engine refuses the point, **or** it needs more memory than is free.
    """
    import numpy as np

    from zoo import machine
    from zoo.engine import free_bytes

    device = loaded.model.embed.weight.device
    read_gbps, free = machine.read_gbps(device), free_bytes(device)
    engine = _engine(args, loaded, point, steps=_WARM_UP_STEPS + args.steps, compile=args.compile)
    needed = engine.cache.nbytes + _prefill_bytes(engine, point)
    if needed > free:
        raise ValueError(
            f"cache and prefill would take {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free: lower the "
            "context, the batch or the budget"
        )
    prompts = _random_prompts(loaded, point)
    _first_step(engine, prompts)

    token_B: Any = None
    has_own_peak, seconds, kept = machine.begin_peak(), [], []
    for step in range(1 + _WARM_UP_STEPS + args.steps):
        start = time.perf_counter()
        token_B = (engine.step(token_B) if step else engine.prefill(prompts)).max(-1).indices
        token_B.tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
        kept.append(int(engine.cache.length.sum()))
    p10, median, p90 = (1000 * np.percentile(seconds[-args.steps :], [10, 50, 90])).tolist()
    kept_tokens = sum(kept[-args.steps :]) / args.steps

    model, shape = loaded.model, engine.cache.shape
    weight_bytes = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    if model.head is not None:  # few rows of the table are looked up
        weight_bytes -= model.embed.weight.nbytes
    cache_bytes = round(kept_tokens * 2 * shape.head_dim * shape.dtype.itemsize)
    gbps = (weight_bytes + cache_bytes) / median / 1e6
    return {
        "budget": point.budget or engine.stats().budget,
        "prefill_tokens_per_s": sum(map(len, prompts)) / seconds[0],
        "first_token_s": seconds[0],
        "steps": args.steps,
        "decode_ms": median,
        "decode_ms_p10": p10,
        "decode_ms_p90": p90,
        "decode_tokens_per_s": 1000 * point.batch / median,
        "kept_per_head": kept_tokens / engine.cache.length.numel(),
        "weight_read_bytes": weight_bytes,
        "cache_read_bytes": cache_bytes,
        "gbps": gbps,
        "read_gbps": read_gbps,
        "mbu": gbps / read_gbps,
        "peak_mib": machine.peak_mib() if has_own_peak else None,
    }


def _engine(args: argparse.Namespace, loaded: Loaded, point: _Point, *, steps: int, compile: Any) -> Engine:
    from zoo.engine import Engine

    return Engine(
        loaded,
        cache=point.cache,
        budget=point.budget,
        max_new_tokens=steps,
        max_context=point.context + steps,
        batch=point.batch,
        compile=compile,
        importance=args.importance,
        sharing=args.sharing,
        allow_overflow=True,
    )


def _prefill_bytes(engine: Engine, point: _Point) -> int:
    """About how many bytes a prefill takes for a while, beside the weights and the cache."""
    config, chunk = engine.loaded.config, min(point.context, engine.chunk_tokens)
    kv_width = 2 * config.num_kv_heads * config.head_dim
    attention_width = 2 * (kv_width + config.num_heads * config.head_dim)  # before and after RoPE
    width = 3 * config.hidden_size + max(attention_width, 3 * config.intermediate_size)
    dense = point.context if engine.budget is None else chunk  # tokens whose keys and values a layer holds densely
    numbers = point.batch * (chunk * width + dense * kv_width)
    copy = engine.cache.nbytes if point.context > chunk else 0  # what later chunks work from
    return point.batch * point.context * _BYTES_OF_AN_ID + numbers * engine.cache.shape.dtype.itemsize + copy


def _random_prompts(loaded: Loaded, point: _Point) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths = [max(1, round(point.context * (1 - row / (2 * point.batch)))) for row in range(point.batch)]
    return [torch.randint(loaded.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _first_step(engine: Engine, prompts: list[list[int]]) -> None:
    """Begin prompts and decode once: then weights are in memory, libraries loaded and blocks compiled."""
    engine.step(engine.prefill([ids[:_SHORT_PROMPT] for ids in prompts]).argmax(-1)).tolist()


# -- compiling ---------------------------------------------------------------------------------------------------------


def _time_compiling(argv: Sequence[str]) -> dict[str, float]:
    """What `_compile_seconds` says in a new process, cold and then warm."""
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="headkv-zoo-") as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": os.path.join(folder, "triton")}
        for kind in ("cold", "warm"):
            command = [sys.executable, "-m", "zoo.bench", *argv]
            done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise ValueError(f"timing the compiler failed ({reason}): repair that, or pass --no-compile-times")
            seconds[kind] = float(done.stdout.splitlines()[-1])
    return seconds


def _compile_seconds(args: argparse.Namespace, loaded: Loaded, point: _Point) -> float:
    """Seconds that this process's first compiled engine takes until its first step is done, less those of a second."""
    prompts = _random_prompts(loaded, point)

    def seconds(compile: Any) -> float:
        start = time.perf_counter()
        _first_step(_engine(args, loaded, point, steps=1, compile=compile), prompts)
        return time.perf_counter() - start

    seconds(False)  # reads the weights from disk
    return max(0.0, seconds(args.compile or True) - seconds(args.compile or True))


# -- the report --------------------------------------------------------------------------------------------------------

_COLUMNS = {
    "kept": "{kept_per_head:.1f}",
    "prefill tok/s": "{prefill_tokens_per_s:,.0f}",
    "TTFT s": "{first_token_s:.3f}",
    "decode ms [p10-p90]": "{decode_ms:.2f} [{decode_ms_p10:.2f}-{decode_ms_p90:.2f}]",
    "tok/s": "{decode_tokens_per_s:,.1f}",
    "weights B": "{weight_read_bytes:,}",
    "cache B": "{cache_read_bytes:,}",
    "GB/s": "{gbps:.1f}",
    "memory GB/s": "{read_gbps:.1f}",
    "MBU": "{mbu:.2f}",
    "peak MiB": "{peak_mib}",
}


def _save(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(report) + "\n")


def _show(report: dict[str, Any]) -> None:
    """Print the table, and the whole report as the last line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for name in ("context", "batch", "cache", "budget", *_COLUMNS):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in report["points"]:
        cells = ["refused"] if "error" in row else [cell.format_map(row) for cell in _COLUMNS.values()]
        table.add_row(str(row["context"]), str(row["batch"]), row["cache"], row["budget"] or "-", *cells)
    # A narrow terminal breaks long lines; the table would cut numbers off.
    console = Console(width=max(180, Console().width), markup=False, highlight=False)
    console.print(table)
    if report["compile_s"]:
        console.print("compiling takes {cold:.1f} s, and {warm:.1f} s when done before".format(**report["compile_s"]))
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
