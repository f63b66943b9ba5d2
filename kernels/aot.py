"""Compile the Triton forms for GPUs that are not here, and read back what they became.

    python -m kernels.aot

Nothing is launched, so nothing is measured. Registers, spills, shared memory, widths of loads and stores and counts of
tensor-core instructions are read from the machine code. Bytes and flops are each operator's own count. Occupancy and
roofline times are MODEL-BASED: computed from these and from the vendors' data sheets, without what it takes to launch.

Launches are not described a second time: `launch` is called with every tensor on the meta device, where there are
sizes but no numbers, and Triton's launcher is replaced by something that notes function, grid and arguments. So a grid
that depended on what a table holds could not be noted at all.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

NOTE = (
    "Nothing was launched. Registers, spills, shared memory, widths and instruction counts are read from machine code; "
    "occupancy and times are MODEL-BASED, never measured."
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What machine code is made for, and what bounds the programs that one processor holds.

    Args:
        backend: Triton's name of it.
        arch: Triton's name of the architecture.
        lanes: threads per warp (AMD: wave).
        warps: resident on one processor (SM, compute unit) at most.
        shared_bytes: of one processor.
        reserved_bytes: of shared memory, that the system takes for each program.
    """

    backend: str
    arch: int | str
    lanes: int
    warps: int
    shared_bytes: int
    reserved_bytes: int


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (8.0, 9.0, 10.0).
# AMD: "AMD Instinct MI300" Instruction Set Architecture guide (CDNA 3) and LLVM's AMDGPU usage guide (gfx942).
TARGETS = {
    "sm_80": Target(backend="cuda", arch=80, lanes=32, warps=64, shared_bytes=164 << 10, reserved_bytes=1024),
    "sm_90": Target(backend="cuda", arch=90, lanes=32, warps=64, shared_bytes=228 << 10, reserved_bytes=1024),
    "sm_100": Target(backend="cuda", arch=100, lanes=32, warps=64, shared_bytes=228 << 10, reserved_bytes=1024),
    "gfx942": Target(backend="hip", arch="gfx942", lanes=64, warps=32, shared_bytes=64 << 10, reserved_bytes=0),
}
# The same for all four: a processor has four parts, whose warps share 512 registers per lane in portions of eight, and
# takes up to 32 programs.
_PARTS, _REGISTERS, _PORTION, _PROGRAMS = 4, 512, 8, 32
_TENSOR_MEMORY = 512  # columns per SM of sm_100


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peaks of a GPU.

    Args:
        bytes_per_s: of its memory.
        flops_per_s: bf16 on tensor cores, without sparsity.
        processors: SMs or compute units.
    """

    bytes_per_s: float
    flops_per_s: float
    processors: int


# The vendors' data sheets of the 80 GB A100 SXM4, H100 SXM5, H200 SXM5, HGX B200 (per GPU, at 1,000 W) and MI300X.
GPUS = {
    "A100": Gpu(bytes_per_s=2.039e12, flops_per_s=312e12, processors=108),
    "H100": Gpu(bytes_per_s=3.35e12, flops_per_s=989e12, processors=132),
    "H200": Gpu(bytes_per_s=4.8e12, flops_per_s=989e12, processors=132),
    "B200": Gpu(bytes_per_s=8.0e12, flops_per_s=2250e12, processors=148),
    "MI300X": Gpu(bytes_per_s=5.3e12, flops_per_s=1307e12, processors=304),
}


def _sizes(layers: int, heads: int, kv_heads: int, head_dim: int, hidden: int, intermediate: int) -> dict[str, Any]:
    return locals()


# From the models' published configurations. The first three are what is reported unless others are asked for; the
# others have head dims of 64, 80, 96 and 256.
MODELS = {
    "llama-3-8b": _sizes(32, 32, 8, 128, 4096, 14336),
    "mistral-7b": _sizes(32, 32, 8, 128, 4096, 14336),
    "qwen2.5-7b": _sizes(28, 28, 4, 128, 3584, 18944),
    "smollm2-135m": _sizes(30, 9, 3, 64, 576, 1536),
    "phi-2": _sizes(32, 32, 32, 80, 2560, 10240),
    "phi-3-mini": _sizes(32, 32, 32, 96, 3072, 8192),
    "gemma-2-9b": _sizes(42, 16, 8, 256, 3584, 14336),
}


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton function, as `launch` asked for it.

    Args:
        function: decorated with `jit`.
        grid: programs along each axis.
        args: of the function.
        kwargs: of the function, and options such as num_warps.
    """

    function: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(kw_only=True)
class Code:
    """What a Triton function became for one target.

    Args:
        registers: per thread; on AMD, vector registers, those of matrix units included.
        spills: NVIDIA: instructions that store to local memory; AMD: vector registers that were spilled.
        scalar_spills: AMD: scalar registers kept in lanes of vector registers, which costs instructions and no memory.
        local_accesses: instructions that read or write local memory (AMD: scratch).
        stack_bytes: local memory per thread.
        shared_bytes: per program.
        threads: per program.
        load_bits: widest load from global memory by one thread; 0 if there is none.
        store_bits: widest store to global memory by one thread; 0 if there is none.
        tensor_cores: instructions for tensor cores (AMD: matrix units).
        tensor_columns: of tensor memory, per program; sm_100 only.
        loads: argument to the narrowest vector load through it, in bits; loads of one number for a whole warp on AMD's
            scalar unit are not among them.
        stores: argument to the narrowest store through it, in bits.
    """

    registers: int
    spills: int
    scalar_spills: int
    local_accesses: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    load_bits: int
    store_bits: int
    tensor_cores: int
    tensor_columns: int
    loads: dict[str, int]
    stores: dict[str, int]


def launches(kernel: Any, arguments: Sequence[Any]) -> list[Launch]:
    """What `kernel.launch` would launch, with nothing launched.

    Args:
        kernel: of the registry, with a Triton form.
        arguments: of the operator; on the meta device they have sizes only, and that is all a launch may need.

    Returns:
        The launches in their order.
    """
    found = []

    def note(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(Launch(function, tuple(grid), args, kwargs))

    with _launcher(note):
        kernel.launch(*arguments)
    return found


@contextmanager
def _launcher(run: Callable[..., None]) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    before, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = before


@dataclass
class _Job:
    """Something to compile, and which calls need it."""

    source: Any
    options: Any
    about: dict[str, Any]
    uses: list[dict[str, Any]] = field(default_factory=list)


def _job(op: str, launch: Launch, target: str) -> tuple[tuple[str, ...], _Job]:
    """What Triton would compile for a launch, and a key that is the same for all launches that share the code."""
    from triton.compiler import ASTSource

    function = launch.function
    backend, bind = _binder(function, target)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    options, signature, constants, attributes = function._pack_args(
        backend, launch.kwargs, bound, specialization, options
    )
    source = ASTSource(function, signature, constants, attributes)
    named = {function.arg_names[path[0]]: _plain(value) for path, value in constants.items()}
    about = {"op": op, "kernel": function.__name__, "target": target, "constants": named}
    return (op, source.hash(), options.hash(), target), _Job(source, options, about)


@cache
def _binder(function: Any, target: str) -> tuple[Any, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    made = TARGETS[target]
    backend = make_backend(GPUTarget(made.backend, made.arch, made.lanes))
    return backend, create_function_from_signature(function.signature, function.params, backend)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else str(value)


def _compile(job: _Job) -> Code:
    import triton
    from triton.backends.compiler import GPUTarget

    target = TARGETS[job.about["target"]]
    made = triton.compile(
        job.source, target=GPUTarget(target.backend, target.arch, target.lanes), options=job.options.__dict__
    )
    read = _read_cubin if target.backend == "cuda" else _read_amdgcn
    counts, accesses = read(made.asm)
    widths: dict[str, dict[str, int]] = {"load": {}, "store": {}}
    widest = {"load": 0, "store": 0}
    arguments = _arguments(made.asm["ttir"])
    for kind, line, bits in accesses:
        widest[kind] = max(widest[kind], bits)
        for name in arguments.get((kind, *line), ()):
            widths[kind][name] = min(widths[kind].get(name, bits), bits)
    return Code(
        **counts,
        shared_bytes=made.metadata.shared,
        threads=made.metadata.num_warps * target.lanes,
        load_bits=widest["load"],
        store_bits=widest["store"],
        tensor_columns=getattr(made.metadata, "tmem_size", None) or 0,
        loads=widths["load"],
        stores=widths["store"],
    )


_Access = tuple[str, tuple[str, int], int]
"""Load or store, the line of Python that it comes from, and its width in bits."""


def _read_cubin(asm: Any) -> tuple[dict[str, int], list[_Access]]:
    import triton

    programs = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([programs / name, *options, file.name], check=True, capture_output=True, text=True).stdout
            for name, *options in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c", "-g", "-ndf"))
        )
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    line, accesses = ("", 0), list[_Access]()
    counts: dict[str, int] = dict.fromkeys(("LDL", "STL", "MMA"), 0)
    for text in sass.splitlines():
        if place := re.match(r'\s*//## File "(.*?)", line (\d+)', text):
            line = place[1], int(place[2])
        elif instruction := re.match(r"\s*/\*\w+\*/\s+(?:@\S+\s+)?([\w.]+)", text):
            name, *modifiers = instruction[1].split(".")
            if name in ("LD", "LDG", "LDGSTS", "ST", "STG"):
                bits = [int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?8|[US]?16|64|128|256", m)]
                accesses.append(("load" if name.startswith("LD") else "store", line, bits[0] if bits else 32))
            elif name in ("LDL", "STL"):
                counts[name] += 1
            elif name.endswith("MMA"):
                counts["MMA"] += 1
    return {
        "registers": used["REG"],
        "spills": counts["STL"],
        "scalar_spills": 0,
        "local_accesses": counts["LDL"] + counts["STL"],
        "stack_bytes": used["STACK"] + used["LOCAL"],
        "tensor_cores": counts["MMA"],
    }, accesses


def _read_amdgcn(asm: Any) -> tuple[dict[str, int], list[_Access]]:
    text = asm["amdgcn"]
    noted = {name: int(number) for name, number in re.findall(r"^ +\.(\w+): +(\d+)$", text, re.MULTILINE)}
    files = {
        number: str(Path(folder, name))
        for number, folder, name in re.findall(r'^\t\.file\t(\d+) "(.*?)" "(.*?)"', text, re.MULTILINE)
    }
    line, accesses, matrix, scratch = ("", 0), list[_Access](), 0, 0
    for name, rest in re.findall(r"^\t(\S+)(.*)$", text, re.MULTILINE):
        if name == ".loc":
            number, place = rest.split()[:2]
            line = files[number], int(place)
        elif access := re.match(
            r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(dwordx(\d)|dword|.*short|.*byte)", name
        ):
            unit = {"d": 32, "t": 16, "e": 8}["d" if "dword" in access[2] else access[2][-1]]
            accesses.append((access[1], line, unit * int(access[3] or 1)))
        elif name.startswith("scratch_"):
            scratch += 1
        elif "mfma" in name:
            matrix += 1
    return {
        "registers": noted["vgpr_count"],
        "spills": noted["vgpr_spill_count"],
        "scalar_spills": noted["sgpr_spill_count"],
        "local_accesses": scratch,
        "stack_bytes": noted["private_segment_fixed_size"],
        "tensor_cores": matrix,
    }, accesses


def _arguments(ttir: str) -> dict[tuple[str, str, int], set[str]]:
    """Which arguments a line of Python loads or stores through: (kind, file, line) to their names.

    Follows pointers from a function's arguments to loads and stores, in Triton's first intermediate form, where all
    calls are inlined and the values of a loop's iterations are named after what they start with.
    """
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))

    def line(place: str) -> tuple[str, int]:
        if direct := re.match(r'"(.*?)":(\d+):', place):
            return direct[1], int(direct[2])
        inner = re.search(r"#loc\d*", place)  # of several, the first is where the code was written
        return line(places[inner[0]]) if inner else ("", 0)

    through: dict[str, set[str]] = {}
    found: dict[tuple[str, str, int], set[str]] = {}
    for text in ttir.splitlines():
        if "tt.func" in text:
            through |= {name: {name[1:]} for name in re.findall(r"(%\w+): !tt\.ptr", text)}
        elif access := re.search(r"tt\.(load|store) (%[\w#]+).*loc\((.*?)\)$", text):
            key = (access[1], *line(access[3]))
            found.setdefault(key, set()).update(through.get(access[2].split("#")[0], ()))
        elif "!tt.ptr" in text and (result := re.match(r"\s*(%\w+)(?::\d+)? = ", text)):
            for name, start in re.findall(r"(%\w+) = (%\w+)", text):
                through.setdefault(name, set()).update(through.get(start, ()))
            inputs = re.findall(r"%\w+", text[result.end() :])
            through.setdefault(result[1], set()).update(*(through.get(name, ()) for name in inputs))
    return found


def occupancy(code: Code, target: Target) -> float:
    """An estimate: resident warps, as a share of the most that a processor holds.

    Args:
        code: of a function.
        target: that it was compiled for.

    Returns:
        0 to 1.

    Example:
        >>> import dataclasses
        >>> zero = dict.fromkeys((field.name for field in dataclasses.fields(Code)), 0)
        >>> code = Code(**{**zero, "registers": 128, "threads": 128})
        >>> occupancy(code, TARGETS["sm_80"])
        0.25
    """
    warps = -(-code.threads // target.lanes)
    per_part = min(target.warps // _PARTS, _REGISTERS // (-(-max(code.registers, 1) // _PORTION) * _PORTION))
    bounds = [_PROGRAMS, per_part * _PARTS // warps]
    if shared := code.shared_bytes + target.reserved_bytes:
        bounds.append(target.shared_bytes // shared)
    if code.tensor_columns:
        bounds.append(_TENSOR_MEMORY // code.tensor_columns)
    return min(bounds) * warps / target.warps


def roofline_us(bytes_moved: int, flops: int, gpu: Gpu) -> float:
    """MODEL-BASED: microseconds below which no program can stay at a GPU's peaks.

    Args:
        bytes_moved: from and to memory.
        flops: on tensor cores, in bf16.
        gpu: the peaks.

    Example:
        >>> round(roofline_us(2_039_000_000, 0, GPUS["A100"]))
        1000
    """
    return max(bytes_moved / gpu.bytes_per_s, flops / gpu.flops_per_s) * 1e6


@dataclass(frozen=True, kw_only=True)
class Call:
    """An operator and what it is called with.

    Args:
        kernel: of the registry, with a Triton form.
        about: of the arguments, for people: model, kept and batch, or others.
        arguments: makes them.
    """

    kernel: Any
    about: dict[str, Any]
    arguments: Callable[[], Sequence[Any]]


def report(
    calls: Iterable[Call], targets: Sequence[str], track: Callable[[Sequence[Any]], Iterable[Any]] = iter
) -> dict[str, Any]:
    """Compile what calls would launch, and say what became of it and what a model expects of it.

    Args:
        calls: of operators.
        targets: names from `TARGETS`.
        track: shows progress while it goes through what must be compiled.

    Returns:
        "code": a row per function, specialisation and target, as in `Code`, with the calls that use it.
        "model_based": a row per call: what it moves and computes, and roofline times.
        "failures": what cannot be launched or compiled, and why.
        "gpus", "note": what the model is made of.
    """
    jobs: dict[tuple[str, ...], _Job] = {}
    model_based, failures = [], []
    for call in calls:
        kernel = call.kernel
        try:
            arguments = call.arguments()
            launched = launches(kernel, [_to_meta(x) for x in arguments])
            needed = [_job(kernel.name, launch, target) for launch in launched for target in targets]
            moved, flops = kernel.bytes_moved(*arguments), kernel.flops(*arguments)
        except Exception as error:  # whatever is wrong with one call, the others are reported
            failures.append({"op": kernel.name, **call.about, "error": _first_line(error)})
            continue
        for key, job in needed:
            job = jobs.setdefault(key, job)
            if call.about not in job.uses:
                job.uses.append(call.about)
        grids = [[launch.function.__name__, list(launch.grid)] for launch in launched]
        times = {name: roofline_us(moved, flops, gpu) for name, gpu in GPUS.items()}
        numbers = {"bytes": moved, "flops": flops, "flops_per_byte": flops / max(moved, 1), "roofline_us": times}
        model_based.append({"op": kernel.name, **call.about, "grids": grids, **numbers})
    code = []
    for job in track(list(jobs.values())):
        try:
            made = _compile(job)
        except Exception as error:
            failures.append({**job.about, **job.uses[0], "error": _first_line(error)})
            continue
        share = occupancy(made, TARGETS[job.about["target"]])
        if not share:
            failures.append({**job.about, **job.uses[0], "error": f"no processor has room for {made}"})
        code.append({**job.about, **asdict(made), "occupancy": share, "uses": job.uses})
    gpus = {name: asdict(gpu) for name, gpu in GPUS.items()}
    return {"note": NOTE, "gpus": gpus, "code": code, "model_based": model_based, "failures": failures}


def _to_meta(x: Any) -> Any:
    import torch

    return x.to("meta") if isinstance(x, torch.Tensor) else x


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command.

    Args:
        argv: options; those of the process if not given.

    Returns:
        0; 1 if an operator could not be launched or compiled; 2 if nothing could be tried.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    from kernels.language import INSTALLED, INTERPRETED
    from kernels.registry import Workload, all_kernels

    if not INSTALLED or INTERPRETED:
        reason = "Triton is not installed: pip install triton (Linux)"
        if INSTALLED:
            reason = "TRITON_INTERPRET is set: nothing is compiled, unset it"
        print(f"kernels.aot: {reason}", file=sys.stderr)
        return 2
    known = {name: kernel for name, kernel in all_kernels().items() if kernel.launch is not None}
    if wrong := [name for name in args.op or () if name not in known]:
        parser.error(f"no operator with a Triton form is called {wrong[0]!r}; there are {', '.join(known)}")
    if args.json is not None:
        try:
            args.json.open("a").close()  # rather now than after minutes of work
        except OSError as error:
            parser.error(f"--json: {error}")
    calls = [
        Call(
            kernel=known[name],
            about={"model": model, "kept": kept, "batch": batch},
            arguments=partial(known[name].sized, Workload(model=model, kept=kept, batch=batch, **MODELS[model])),
        )
        for name, model, kept, batch in product(args.op or known, args.model, args.kept, args.batch)
    ]
    made = report(calls, args.target, _track)
    if args.json is not None:
        args.json.write_text(json.dumps(made) + "\n")
    _show(made)
    return 1 if made["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, default: Sequence[Any] | None, text: str, **more: Any) -> None:
        shown = "every one" if default is None else " ".join(map(str, default))
        parser.add_argument(name, nargs="+", default=default, help=f"{text} (default: {shown})", **more)

    add("--op", None, "operators with a Triton form", metavar="NAME")
    add("--target", list(TARGETS), "what to compile for", choices=TARGETS, metavar="T")
    add("--model", list(MODELS)[:3], f"whose sizes; of {', '.join(MODELS)}", choices=MODELS, metavar="M")
    add("--kept", [64, 1024, 8192], "mean tokens per KV head in the cache", type=_whole, metavar="N")
    add("--batch", [1, 16, 64], "rows that decode together", type=_whole, metavar="N")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write everything to a file: sizes in bytes, widths in bits, times in microseconds and MODEL-BASED",
    )
    return parser


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {1 << 20}")
    return int(text)


def _track(jobs: Sequence[_Job]) -> Iterator[_Job]:
    """Go through the jobs, with a progress bar on stderr if it takes more than two seconds."""
    from rich.console import Console
    from rich.progress import Progress

    started, progress = time.monotonic(), Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("Compiling", total=len(jobs))
    try:
        for job in jobs:
            if not progress.live.is_started and time.monotonic() - started > 2:
                progress.start()
            progress.update(task, description=f"Compiling {job.about['op']} for {job.about['target']}")
            yield job
            progress.advance(task)
    finally:
        progress.stop()


def _show(made: dict[str, Any]) -> None:
    """Print the tables; rows that differ only in where they apply are one."""
    from rich.console import Console
    from rich.table import Table

    # A narrow terminal breaks long lines; the table would cut numbers off.
    console = Console(width=max(200, Console().width), markup=False, highlight=False)
    asked = {name: list(dict.fromkeys(row[name] for row in made["model_based"])) for name in ("model", "kept", "batch")}

    def where(uses: Sequence[dict[str, Any]]) -> list[str]:
        found = {name: [x for x in all_ if any(use[name] == x for use in uses)] for name, all_ in asked.items()}
        return ["any" if 1 < len(x) == len(asked[name]) else ",".join(map(str, x)) for name, x in found.items()]

    def table(title: str, head: str, rows: Iterable[tuple[list[str], list[dict[str, Any]]]]) -> None:
        shown = Table(title=title, title_justify="left", box=None, header_style="bold")
        for name in head.split("|"):
            shown.add_column(name, justify="left" if name in ("operator", "kernel", "target", "model") else "right")
        merged: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for cells, uses in rows:
            merged.setdefault(tuple(cells), []).extend(uses)
        for (op, *rest), uses in merged.items():
            shown.add_row(op, *where(uses), *rest)
        console.print(shown)
        console.print()

    table(
        "Read from machine code; occupancy is an estimate from registers, shared memory and threads",
        "operator|model|kept|batch|kernel|target|registers|spills|scalar spills|local|shared B|load bits|store bits"
        "|tensor-core|threads|occupancy",
        ((_code_cells(row), row["uses"]) for row in made["code"]),
    )
    table(
        "MODEL-BASED, not measured: the roofline time in µs, max(bytes / bandwidth, flops / dense bf16 peak)",
        "|".join(
            ["operator", "model", "kept", "batch", "programs", "MB", "Mflop", "flop/B", *(f"{g} µs" for g in GPUS)]
        ),
        ((_model_cells(row), [row]) for row in made["model_based"]),
    )
    peaks = (
        f"{name} {gpu.bytes_per_s / 1e12:.2f} TB/s, {gpu.flops_per_s / 1e12:.0f} TFLOPS, {gpu.processors} processors"
        for name, gpu in GPUS.items()
    )
    console.print(f"Peaks by the vendors' data sheets: {'; '.join(peaks)}.")
    console.print(made["note"])
    for failure in made["failures"]:
        console.print("FAILED: " + ", ".join(f"{name} {value}" for name, value in failure.items()))


def _code_cells(row: dict[str, Any]) -> list[str]:
    names = "registers spills scalar_spills local_accesses shared_bytes load_bits store_bits tensor_cores threads"
    numbers = [str(row[name]) for name in names.split()]
    return [row["op"], row["kernel"], row["target"], *numbers, f"{row['occupancy']:.0%}"]


def _model_cells(row: dict[str, Any]) -> list[str]:
    programs = " + ".join(f"{prod(grid):,}" for _, grid in row["grids"])
    amounts = [f"{row['bytes'] / 1e6:,.3f}", f"{row['flops'] / 1e6:,.3f}", f"{row['flops_per_byte']:.2f}"]
    return [
        row["op"],
        programs,
        *amounts,
        *(f"{us:.3g}" if us < 1000 else f"{us:,.0f}" for us in row["roofline_us"].values()),
    ]


if __name__ == "__main__":
    sys.exit(main())
