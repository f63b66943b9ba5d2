"""`python -m zoo.bench`: how fast a model reads prompts and decodes, and how near to the memory's speed that is."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from checkpoints.resolve import DEFAULT_MODEL
from checkpoints.storage import atomic_file
from zoo import cli
from zoo.cli import note
from zoo.load import DTYPES, Loaded, load

# torch takes seconds to import: `--help` and wrong options do not wait for it.
if TYPE_CHECKING:
    import torch

    from zoo.engine import Engine
    from zoo.family import Decoder

_DESCRIPTION = """Measure prefill, decoding and memory, and compare decoding with the machine's read bandwidth.

Every combination of --context, --batch, --cache and --budget is one point; a cache that keeps everything takes no
budget and is one point whatever the budgets. Prompts are random tokens and may be longer than the model was trained
for. In a batch they are ragged: row i of b has 1 - i/(2b) of the context. A decode step is the model and the choice
of the likeliest next token. MBU is the bytes of weights and cache that a step has to read, by the time it takes, as a
share of what a streaming sum reads.

A table goes to standard output, and after it one line with everything as JSON; progress goes to standard error. A
point that does not fit into memory is refused, the others go on, and the exit status is 2.

Unless --no-compile-times is given, two new processes with an empty compiler cache of their own then measure what
compiling adds to a first step, cold and warm; once per run, with the settings of the first point."""
_EXAMPLES = """examples:
  python -m zoo.bench --context 512 8192 --cache full headkv --budget 128
  python -m zoo.bench --context 512 --batch 1 4 --dtype bfloat16 --threads 2 --json bench.json
"""
_WARM_UP_STEPS = 8
_WARM_UP_TOKENS = 16
_COMPILED_STEPS = 16  # steps after the first, whose median says what a step takes without compiling
_MEBI = 2**20
_INT_OBJECT_BYTES = 48  # one token id in a list and in its checked copy
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is measured at once.

    Args:
        context: tokens of the longest prompt.
        batch: rows.
        cache: the method, with options if wanted.
        budget: as the user wrote it; None takes the method's default.
    """

    context: int
    batch: int
    cache: str
    budget: str | None

    def __str__(self) -> str:
        """One phrase for people."""
        budget = "" if self.budget is None else f" at {self.budget}"
        return f"context {self.context:,}, batch {self.batch}, {self.cache}{budget}"


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
    points = _checked_points(args)
    args.compile = _is_compiled(args)
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    weights = {} if args.weights is None else {"weights": args.weights}
    loaded = load(args.model, dtype=args.dtype, device=args.device, progress=sys.stderr.isatty(), **weights)
    if args.time_compile:
        return print(json.dumps(_time_compile(loaded, points[0], args.importance)))
    report: dict[str, Any] = {
        "points": [],
        "machine": machine(loaded),
        "model": args.model,
        "command": shlex.join(["python", "-m", "zoo.bench", *argv]),
        "read_gbps": None,
        "compile_s": None,
        "commit": commit(),
    }
    try:
        _measure_all(args, loaded, points, report)
    finally:  # an interruption costs what was not measured yet, nothing else
        if report["points"]:
            _show(report)
    failed = [row["error"] for row in report["points"] if "error" in row]
    if failed:
        raise ValueError(f"{len(failed)} of {len(points)} points were refused: {failed[0]}")


def _parser() -> argparse.ArgumentParser:
    made = cli._Parser(
        prog="python -m zoo.bench",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, whole = made.add_argument, cli._whole(1)
    add("--model", default=DEFAULT_MODEL, metavar="M", help="as for zoo.chat (default: %(default)s)")
    add("--cache", nargs="+", default=["full", "headkv"], metavar="C", help="methods (default: full headkv)")
    add("--budget", nargs="+", type=cli._budget, default=[None], metavar="B", help="default: the method decides")
    add("--context", nargs="+", type=whole, default=[512, 2048, 8192], metavar="N", help="default: 512 2048 8192")
    add("--batch", nargs="+", type=whole, default=[1], metavar="N", help="rows (default: 1)")
    add("--dtype", default="float32", metavar="D", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    add("--weights", choices=["int8"], help="keep weights as int8, one scale per channel")
    add("--threads", type=cli._whole(1, 1024), metavar="N", help="CPU threads (default: torch decides)")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the decode step (default: where there is a C++ compiler)",
    )
    add("--no-compile-times", action="store_true", help="do not measure how long compiling takes")
    add("--steps", type=whole, default=32, metavar="N", help="timed decode steps per point (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="keep the JSON here too, as far as it is, after every point")
    add("--device", default="cpu", metavar="D", help="where to run, e.g. cpu or cuda (default: %(default)s)")
    add("--importance", metavar="FILE", help="head importance for headkv (default: what ships for the model)")
    add("--time-compile", action="store_true", help=argparse.SUPPRESS)  # what the new processes are told
    return made


def _checked_points(args: argparse.Namespace) -> list[Point]:
    """The points that the options ask for, after everything that can be refused without the model.

    Raises:
        ValueError: options that make no sense, alone or together.
    """
    from layers.methods import needs_importance

    keeps_everything = {cache: cli.described(cache).default_budget is None for cache in args.cache}
    names = " ".join(args.cache)
    if args.budget != [None] and all(keeps_everything.values()):
        raise ValueError(f"--cache {names} keeps everything: drop --budget, or add another method")
    if args.importance is not None and not any(map(needs_importance, args.cache)):
        raise ValueError(f"--cache {names} does not use head importance: drop --importance {args.importance}")
    if args.json is not None and (args.json.is_dir() or not os.access(args.json.parent, os.W_OK)):
        raise ValueError(f"--json {args.json} cannot be written: give a file in a folder that exists and is yours")
    points = itertools.product(args.context, args.batch, args.cache, args.budget)
    return list(
        dict.fromkeys(
            Point(context=context, batch=batch, cache=cache, budget=None if keeps_everything[cache] else budget)
            for context, batch, cache, budget in points
        )
    )


def _is_compiled(args: argparse.Namespace) -> bool:
    """Whether to compile: what the options say, else whether there is a compiler.

    Raises:
        ValueError: it is wanted and there is no compiler.
    """
    if args.compile is False or cli.has_compiler():
        return args.compile is not False
    if args.compile:
        raise ValueError("--compile needs a C++ compiler and there is none: install g++, or pass --no-compile")
    note("no C++ compiler: measuring uncompiled, which is slower; install g++, or silence this with --no-compile")
    return False


def _measure_all(args: argparse.Namespace, loaded: Loaded, points: list[Point], report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    rows = report["points"]

    def save() -> None:
        if args.json is not None:
            with atomic_file(args.json) as partial:
                partial.write_text(json.dumps(report) + "\n")

    # Drawn between points only: a bar that refreshes itself would run while steps are timed.
    bar = Progress(console=Console(stderr=True), auto_refresh=False, disable=not sys.stderr.isatty())
    with bar:
        task = bar.add_task("", total=len(points))
        for number, point in enumerate(points, 1):
            bar.update(task, description=str(point), refresh=True)
            row: dict[str, Any] = {**vars(point), "dtype": args.dtype, "weights": args.weights}
            try:
                row |= measure(loaded, point, steps=args.steps, compiled=args.compile, importance=args.importance)
                report["read_gbps"] = max(report["read_gbps"] or 0, row["read_gbps"])
            except ValueError as error:
                row["error"] = str(error)
            except (MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "memory" not in str(error):
                    raise
                row["error"] = "out of memory: lower the context, the batch or the budget"
            rows.append(row)
            save()
            if "error" in row or bar.disable:
                result = row.get("error") or f"decode {row['decode_ms']:.2f} ms, MBU {row['mbu']:.2f}"
                note(f"[{number}/{len(points)}] {point}: {result}")
            bar.advance(task)
    measured = [point for point, row in zip(points, rows, strict=True) if "error" not in row]
    if measured and args.compile and not args.no_compile_times:
        report["compile_s"] = _compile_seconds(args, measured[0])
        save()


# -- one point ---------------------------------------------------------------------------------------------------------


def measure(loaded: Loaded, point: Point, *, steps: int, compiled: bool, importance: str | None) -> dict[str, Any]:
    """Measure one point.

    Args:
        loaded: the model.
        point: what to measure.
        steps: timed decode steps, at least 1.
        compiled: compile the decode step.
        importance: head-importance file, or None.

    Returns:
        The figures by name, units in the names.

    Raises:
        ValueError: the engine refuses the point, **or** it needs more memory than is free, **or** compiling fails.
    """
    from zoo.engine import _free_bytes

    device = loaded.model.embed.weight.device
    _let_go(device)
    free = _free_bytes(device)
    engine = _engine(loaded, point, steps=_WARM_UP_STEPS + steps, compiled=compiled, importance=importance)
    needed = engine.stats().nbytes + _prefill_bytes(engine, point)
    if needed > free:
        raise ValueError(
            f"cache and prefill would take {needed / _MEBI:,.0f} MiB and {free / _MEBI:,.0f} MiB are free: lower the "
            "context, the batch or the budget"
        )
    before_gbps = read_gbps(device)
    _warm_up(engine, point)
    prompts = random_prompts(loaded, context=point.context, batch=point.batch)

    has_own_peak = _reset_peak(device)
    with _undisturbed():
        logits_BV, prefill_s = _timed(device, lambda: engine.prefill(prompts))
        token_B, first_s = _timed(device, lambda: logits_BV.argmax(-1))

        def step() -> None:
            nonlocal token_B
            token_B = engine.step(token_B).argmax(-1)

        for _ in range(_WARM_UP_STEPS):
            step()
        step_ms, kept = [], []
        for _ in range(steps):
            step_ms.append(1000 * _timed(device, step)[1])
            kept.append(int(engine.stats().kept.sum()))
    peaks = _peaks(device)
    bandwidth = max(before_gbps, read_gbps(device))

    decode_ms, stats, shape = percentile(step_ms, 50), engine.stats(), engine.cache.shape
    kept_tokens = sum(kept) / steps
    cache_bytes = kept_tokens * 2 * shape.head_dim * shape.dtype.itemsize
    weight_bytes = weight_read_bytes(loaded.model, point.batch)
    gbps = (weight_bytes + cache_bytes) / (decode_ms / 1000) / 1e9
    return {
        "budget": point.budget or stats.budget,
        "compiled": compiled,
        "steps": steps,
        "prompt_tokens": list(map(len, prompts)),
        "kept_per_head": kept_tokens / stats.kept.numel(),
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": sum(map(len, prompts)) / prefill_s,
        "first_token_s": prefill_s + first_s,
        "decode_ms": decode_ms,
        "decode_ms_p10": percentile(step_ms, 10),
        "decode_ms_p90": percentile(step_ms, 90),
        "decode_tokens_per_s": 1000 * point.batch / decode_ms,
        "weight_read_bytes": weight_bytes,
        "cache_read_bytes": round(cache_bytes),
        "cache_allocated_bytes": stats.nbytes,
        "gbps": gbps,
        "read_gbps": bandwidth,
        "mbu": gbps / bandwidth,
        "peak_of": "point" if has_own_peak else "process",
        **peaks,
    }


def _engine(loaded: Loaded, point: Point, *, steps: int, compiled: bool, importance: str | None) -> Engine:
    from zoo.engine import Engine

    return Engine(
        loaded,
        cache=point.cache,
        budget=point.budget,
        max_new_tokens=steps,
        max_context=point.context + steps,
        batch=point.batch,
        compile=compiled,
        importance=importance,
        allow_overflow=True,
    )


def _prefill_bytes(engine: Engine, point: Point) -> int:
    """About how many bytes a prefill takes for a while, beside the weights and the cache.

    These are the token ids on the host, a chunk's activations in one block, one layer's dense keys and values, and the
    copy of the cache that later chunks work from.
    """
    config, chunk = engine.loaded.config, min(point.context, engine.chunk_tokens)
    kv_width = 2 * config.num_kv_heads * config.head_dim
    attention_width = 2 * (kv_width + config.num_heads * config.head_dim)  # before and after RoPE
    width = 3 * config.hidden_size + max(attention_width, 3 * config.intermediate_size)
    seen = point.context if engine.budget is None else chunk
    numbers = point.batch * (chunk * width + seen * kv_width)
    copy = engine.cache.nbytes if point.context > chunk else 0
    return point.batch * point.context * _INT_OBJECT_BYTES + numbers * engine.cache.shape.dtype.itemsize + copy


def random_prompts(loaded: Loaded, *, context: int, batch: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens that are no control tokens.

    Args:
        loaded: says which ids there are.
        context: tokens of the longest.
        batch: how many; row i has 1 - i / (2 batch) of the context.
        seed: the same seed gives the same prompts.

    Returns:
        Token ids, one list per row.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    special = set(loaded.tokenizer.special_tokens.values())
    plain = torch.tensor([token for token in range(loaded.config.vocab_size) if token not in special])
    lengths = [max(1, round(context * (1 - row / (2 * batch)))) for row in range(batch)]
    return [plain[torch.randint(len(plain), (length,), generator=generator)].tolist() for length in lengths]


def _warm_up(engine: Engine, point: Point) -> None:
    """Let weights be paged in, libraries start and, if wanted, blocks be compiled."""
    tokens = min(_WARM_UP_TOKENS, point.context)
    prompts = random_prompts(engine.loaded, context=tokens, batch=point.batch)
    engine.prefill(prompts)
    try:
        engine.step([ids[0] for ids in prompts])
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"a decode step failed ({reason}): repair the C++ compiler, or pass --no-compile") from error
    engine.reset()


# -- arithmetic --------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], percent: float) -> float:
    """A percentile, linear between neighbours.

    Args:
        values: at least one, in any order.
        percent: 0 to 100; 50 is the median.

    Returns:
        The percentile.

    Example:
        >>> percentile([4.0, 1.0, 2.0, 3.0], 50), percentile([4.0, 1.0, 2.0, 3.0], 10)
        (2.5, 1.3)
    """
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def weight_read_bytes(model: Decoder, batch: int) -> int:
    """Bytes of parameters and buffers that one decode step has to read.

    Args:
        model: the decoder.
        batch: rows.

    Returns:
        All of them; but of an embedding table that is not the output head as well, only one row per row of the batch.
    """
    total = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    if model.head is None:
        return total
    vocab = model.config.vocab_size
    table = sum(tensor.nbytes for tensor in itertools.chain(model.embed.parameters(), model.embed.buffers()))
    return total - table + table * min(batch, vocab) // vocab


def read_gbps(device: torch.device, repeats: int = 7) -> float:
    """How fast memory can be read now: the best of several sums over a buffer far larger than the caches.

    Args:
        device: whose memory.
        repeats: sums, at least 1.

    Returns:
        10^9 bytes per second.

    Raises:
        MemoryError: too little memory is free for a buffer that the caches cannot hold.
    """
    import torch

    from zoo.engine import _free_bytes

    cached = _last_level_cache_bytes(device)
    nbytes = min(max(256 * _MEBI, 4 * cached), _free_bytes(device) // 4)
    if nbytes < 2 * cached:
        raise MemoryError
    buffer = torch.ones(nbytes // 4, device=device)  # written: untouched pages would all be one page of zeros
    with _undisturbed():
        seconds = min(_timed(device, buffer.sum)[1] for _ in range(repeats))
    return buffer.nbytes / seconds / 1e9


def _last_level_cache_bytes(device: torch.device) -> int:
    """Bytes of the largest cache in front of the memory; 0 where the system does not say."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=0)


# -- clocks and memory -------------------------------------------------------------------------------------------------


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the garbage collector from running meanwhile."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _timed(device: torch.device, call: Callable[[], _T]) -> tuple[_T, float]:
    """The result of a call and the seconds until the device has it."""
    _synchronize(device)
    start = time.perf_counter()
    result = call()
    _synchronize(device)
    return result, time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def _let_go(device: torch.device) -> None:
    """Give back the memory of the point before."""
    gc.collect()
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def _reset_peak(device: torch.device) -> bool:
    """Begin a new peak of resident memory; False where only the peak of the whole process can be had."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _peaks(device: torch.device) -> dict[str, int]:
    """Peak bytes of resident memory, and of the device's if it has its own."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        resident = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type != "cuda":
        return {"peak_bytes": resident}
    import torch

    return {"peak_bytes": resident, "device_peak_bytes": torch.cuda.max_memory_allocated(device)}


# -- compiling ---------------------------------------------------------------------------------------------------------


def _compile_seconds(args: argparse.Namespace, point: Point) -> dict[str, Any]:
    """What compiling adds to the first step of a new process, cold and warm.

    Raises:
        ValueError: such a process failed.
    """
    from layers.methods import needs_importance

    command = [sys.executable, "-m", "zoo.bench", "--time-compile", "--context", str(_WARM_UP_TOKENS), "--compile"]
    command += ["--batch", str(point.batch), "--cache", point.cache]
    asked = {**vars(args), "budget": point.budget}
    if not needs_importance(point.cache):
        asked["importance"] = None
    for name in ("model", "budget", "dtype", "weights", "threads", "device", "importance"):
        if asked[name] is not None:
            command += [f"--{name}", str(asked[name])]
    seconds: dict[str, Any] = {"batch": point.batch, "cache": point.cache, "budget": point.budget}
    with tempfile.TemporaryDirectory(prefix="headkv-zoo-") as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": os.path.join(folder, "triton")}
        for kind in ("cold", "warm"):
            done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise ValueError(f"timing the compiler failed ({reason}): repair that, or pass --no-compile-times")
            seconds[kind] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _time_compile(loaded: Loaded, point: Point, importance: str | None) -> float:
    """Seconds of the first compiled step of this process beyond what a step takes."""
    device = loaded.model.embed.weight.device
    engine = _engine(loaded, point, steps=1 + _COMPILED_STEPS, compiled=True, importance=importance)
    token_B = engine.prefill(random_prompts(loaded, context=point.context, batch=point.batch)).argmax(-1)
    seconds = [_timed(device, lambda: engine.step(token_B).argmax(-1))[1] for _ in range(1 + _COMPILED_STEPS)]
    return seconds[0] - percentile(seconds[1:], 50)


# -- the report --------------------------------------------------------------------------------------------------------


def machine(loaded: Loaded) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    device = loaded.model.embed.weight.device
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "last_level_cache_bytes": _last_level_cache_bytes(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit that the working tree is at, with a + when it differs from it; None outside a git repository."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "prefill tok/s": lambda row: f"{row['prefill_tokens_per_s']:,.0f}",
    "TTFT s": lambda row: f"{row['first_token_s']:.3f}",
    "decode ms [p10-p90]": lambda row: (
        f"{row['decode_ms']:.2f} [{row['decode_ms_p10']:.2f}-{row['decode_ms_p90']:.2f}]"
    ),
    "tok/s": lambda row: f"{row['decode_tokens_per_s']:,.1f}",
    "GB read": lambda row: f"{(row['weight_read_bytes'] + row['cache_read_bytes']) / 1e9:.3f}",
    "GB/s": lambda row: f"{row['gbps']:.1f}",
    "MBU": lambda row: f"{row['mbu']:.2f}",
    "peak MiB": lambda row: f"{row.get('device_peak_bytes', row['peak_bytes']) / _MEBI:,.0f}",
}


def _show(report: dict[str, Any]) -> None:
    """Print the table, and the whole report as the last line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for name in ("context", "batch", "cache", "budget", "kept", *_COLUMNS):
        table.add_column(name, justify="left" if name == "cache" else "right")
    for row in report["points"]:
        key = [str(row["context"]), str(row["batch"]), row["cache"], row["budget"] or "-"]
        if "error" in row:
            table.add_row(*key, "-", "refused")
        else:
            table.add_row(*key, f"{row['kept_per_head']:.1f}", *(cell(row) for cell in _COLUMNS.values()))
    # A narrow terminal breaks long lines; the table would cut numbers off.
    console = Console(width=max(160, Console().width), markup=False, highlight=False)
    console.print(table)
    if report["read_gbps"]:
        console.print(f"memory reads at {report['read_gbps']:.1f} GB/s")
    if report["compile_s"]:
        console.print("compiling takes {cold:.1f} s, and {warm:.1f} s when done before".format(**report["compile_s"]))
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
