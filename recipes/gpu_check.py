"""What holds on a GPU, in one command of less than 8 minutes: kernels, graphs of the decode step, and their speed."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from checkpoints.config import ModelConfig, RopeConfig
from kernels.aot import GPUS
from kernels.quantize_kv import dequantize_kv, quantize_kv
from kernels.ragged_decode import KERNEL, ragged_decode
from zoo import Engine, cli, machine
from zoo.family import Decoder, rotary_embedding
from zoo.graphs import CudaGraphs
from zoo.load import Loaded

DESCRIPTION = """Three parts, each of which can be asked for alone:

tests    runs tests/test_kernels.py natively, for four and a half minutes at most, and counts.
graphs   decodes with a small model of random weights, step by step and as a captured graph: are the logits the same,
         how many tokens per second.
timings  ragged attention of one token over caches of many sizes, with a cold L2 cache and as a captured graph: regions
         of different sizes, of one size with as many bytes, and in 8 and 4 bits. Beside it PyTorch's SDPA (one size
         only), and the oracle: every region as a sequence of its own with one KV head, by PyTorch's varlen_attn and
         FlexAttention, and by FlashAttention and FlashInfer where they are installed. Speed is given as a share of the
         bandwidth that copies and sums reach in the same process.

Tables go to standard output, and after them one line with everything as JSON; progress goes to standard error."""
PARTS = ("tests", "graphs", "timings")
TESTS_S, ALL_S = 270, 430
"""Seconds after which the tests are cut off, and after which no further size is timed."""
STEPS = 64
LARGE = 2**27
"""Bytes of keys and values from which on the bars hold."""
BARS = {"peak_share": 0.70, "bandwidth_share": 0.70, "ragged_over_uniform": 1.05, "ragged_over_oracle": 1.10}
TOLERANCE = 0.02
"""How far results may be off, as a share of the largest number: bf16 rounds to 0.004."""
FLEX_SIZE = (16, 4096)
"""Rows and mean tokens for which FlexAttention is compiled: each size takes it many seconds."""
ROOT = Path(__file__).resolve().parents[1]

Timer = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""


# -- the kernels' tests ------------------------------------------------------------------------------------------------


def kernel_tests(tick: Callable[[str], None], *, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the tests of all kernels in a process of their own, where Triton is not interpreted.

    Args:
        tick: called with every test's name and outcome.
        command: what to run; None takes pytest, which prints a line per test.

    Returns:
        Counts by outcome, names of what failed, seconds, and whether the tests came to their end.
    """
    pytest = [sys.executable, "-m", "pytest", "tests/test_kernels.py", "-v", "-o", "addopts=", "--tb=line"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start, counts, failed = time.perf_counter(), Counter[str](), []
    process = subprocess.Popen(
        ["timeout", str(TESTS_S), *(command or [*pytest, "-p", "no:cacheprovider"])],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.match(r"(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", line):
            name, word = found[1], found[2].lower()
            counts[word] += 1
            failed += [name] if word in ("failed", "error") else []
            tick(f"{name} {word}")
    status = process.wait()
    outcomes = {word: counts[word] for word in ("passed", "failed", "error", "skipped")}
    return outcomes | {
        "names": failed,
        "finished": status in (0, 1),
        "seconds": time.perf_counter() - start,
    }


# -- graphs of the decode step -----------------------------------------------------------------------------------------

SMALL_LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_position=8192,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    tie_embeddings=False,
    layer_windows=(None,) * 16,
)


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Loaded:
    """A model of random weights that keep activations near 1; it never stops by itself."""
    with torch.device("meta"):
        model = Decoder(config).eval().requires_grad_(False).to(dtype)
    model = model.to_empty(device=device)
    model.rope = rotary_embedding(config.rope, config.head_dim).to(device)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        torch.nn.init.ones_(weight) if "norm" in name else torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    for layer, block in enumerate(model.blocks):
        block.get_buffer("attention.layer_1").fill_(layer)
    nothing: Any = SimpleNamespace(stop_ids=frozenset())
    return Loaded(name="random", model=model, tokenizer=nothing, chat=nothing, config=config)


def graph_check(
    loaded: Loaded,
    *,
    cache: str,
    batch: int,
    prompt: int,
    steps: int,
    adjust: Callable[[Engine], object] = lambda engine: None,
) -> dict[str, Any]:
    """Decode the same tokens step by step and by replaying a graph.

    Args:
        loaded: the model.
        cache: method.
        batch: rows.
        prompt: tokens of the longest row; others have fewer.
        steps: tokens to decode.
        adjust: told of the engine that shall take graphs, for tests without a GPU.

    Returns:
        Largest difference of logits as a share of the largest logit, tokens per second of both, seconds of capturing.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = loaded.config.vocab_size
    prompts = [
        torch.randint(vocabulary, (prompt - row * prompt // (2 * batch),), generator=generator).tolist()
        for row in range(batch)
    ]
    device = loaded.model.embed.weight.device
    token_SB = torch.randint(vocabulary, (steps, batch), generator=generator).to(device)
    logits: list[Tensor] = []
    rates, first_s = [], []

    def seconds(tokens: Iterable[Tensor]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for token_B in tokens:
            last_BV = engine.step(token_B)
        last_BV[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    for compile in (False, device.type == "cuda"):
        engine = Engine(
            loaded, cache=cache, max_new_tokens=2 * steps + 1, max_context=prompt + 2 * steps + 1, compile=compile
        )
        if logits:
            adjust(engine)
        engine.prefill(prompts)
        first_s.append(seconds(token_SB[:1]))
        logits.append(torch.stack([engine.step(token_B) for token_B in token_SB]).float())
        rates.append(steps * batch / seconds(token_SB))
    return {
        "cache": cache,
        "batch": batch,
        "prompt": prompt,
        "difference": ((logits[1] - logits[0]).abs().max() / logits[0].abs().max()).item(),
        "same_choices": bool((logits[1].argmax(-1) == logits[0].argmax(-1)).all()),
        "eager_tokens_per_s": rates[0],
        "graph_tokens_per_s": rates[1],
        "first_graph_step_s": first_s[1],
    }


# -- attention over regions --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one layer of a model with 32 query heads over 8 KV heads, or of another one, keeps.

    Args:
        batch: rows.
        kept: mean tokens per KV head.
        ragged: whether heads keep different numbers of tokens; the sum is the same.
        bits: of stored numbers; 16, 8 or 4.
        heads: query heads.
        kv_heads: of these as many share one.
        head_dim: D.
    """

    batch: int
    kept: int
    ragged: bool
    bits: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


def cases() -> list[Case]:
    """From 8 MiB of keys and values per call to 1 GiB; the first of every size is uniform."""
    sizes = [(1, 2048), (64, 128), (1, 32_768), (8, 4096), (16, 4096), (64, 1024), (16, 16_384)]
    both = [Case(batch=batch, kept=kept, ragged=ragged) for batch, kept in sizes for ragged in (False, True)]
    return [*both, *(Case(batch=16, kept=4096, ragged=True, bits=bits) for bits in (8, 4))]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A case's tensors.

    Args:
        case: the case.
        length_BH: tokens of each region, on the host.
        q_BND: queries.
        k: (B, slots, D) keys, regions without gaps one after the other.
        v: (B, slots, D) values.
        stored: what `ragged_decode` takes for keys and values: `k` and `v` or their codes, and the codes' scales.
    """

    case: Case
    length_BH: Tensor
    q_BND: Tensor
    k: Tensor
    v: Tensor
    stored: tuple[Tensor, Tensor, Tensor | None, Tensor | None]

    @property
    def lengths(self) -> list[int]:
        """Of all regions, row by row."""
        lengths: list[int] = self.length_BH.flatten().tolist()
        return lengths

    @property
    def queries(self) -> Tensor:
        """(B * H, G, D): a group of queries per region."""
        return self.q_BND.reshape(len(self.lengths), -1, self.case.head_dim)

    def regions(self, arena: Tensor) -> list[Tensor]:
        """(tokens, D) of every region, row by row; views."""
        rows = zip(arena, self.length_BH.tolist(), strict=True)
        return [region for row, lengths in rows for region in row[: sum(lengths)].split(lengths)]


def spread_lengths(case: Case) -> Tensor:
    """(B, H) tokens of each region: the case's mean, or as uneven as heads' budgets are, with the same sum in each row.

    Example:
        >>> spread_lengths(Case(batch=2, kept=100, ragged=True)).sum(1).tolist()
        [800, 800]
    """
    if not case.ragged:
        return torch.full((case.batch, case.kv_heads), case.kept)
    weight_BH = torch.randn(case.batch, case.kv_heads, generator=torch.Generator().manual_seed(0)).exp()
    total = case.kept * case.kv_heads
    end_BH = (weight_BH.cumsum(1) / weight_BH.sum(1, keepdim=True) * (total - case.kv_heads)).round().long()
    return end_BH.diff(dim=1, prepend=torch.zeros(case.batch, 1, dtype=torch.long)) + 1


def build(case: Case, device: torch.device, dtype: torch.dtype) -> Problem:
    """Random tensors of a case."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    length_BH = spread_lengths(case)
    slots = int(length_BH.sum(1).max())
    k, v = (normal(case.batch, slots, case.head_dim) for _ in "kv")
    stored: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = (k, v, None, None)
    if case.bits < 16:
        (k_codes, k_scale), (v_codes, v_scale) = (quantize_kv(x, case.bits) for x in (k, v))
        k, v = (dequantize_kv(x, s, case.bits).to(dtype) for x, s in ((k_codes, k_scale), (v_codes, v_scale)))
        stored = k_codes, v_codes, k_scale, v_scale
    return Problem(
        case=case, length_BH=length_BH, q_BND=normal(case.batch, case.heads, case.head_dim), k=k, v=v, stored=stored
    )


def exact(problem: Problem) -> Tensor:
    """(B, N, D) fp32: softmax attention of every region by itself."""
    regions = zip(problem.queries.float(), problem.regions(problem.k), problem.regions(problem.v), strict=True)
    scale = problem.case.head_dim**-0.5
    o = [(q @ k.float().T * scale).softmax(-1) @ v.float() for q, k, v in regions]
    return torch.stack(o).reshape(problem.q_BND.shape)


Call = Callable[[], Tensor]


def ours(problem: Problem) -> tuple[Call, tuple[Any, ...]]:
    """The operator's call, and its arguments in the order of its schema."""
    device, length_BH = problem.q_BND.device, problem.length_BH.to(torch.int32)
    length_BLH = length_BH[:, None].to(device)
    offset_BLH = (length_BH.cumsum(1) - length_BH).int()[:, None].to(device)
    pos = torch.arange(problem.k.shape[1], dtype=torch.int32, device=device).repeat(problem.case.batch, 1)
    layer_1 = torch.zeros(1, dtype=torch.int64, device=device)
    position_B = torch.full((problem.case.batch,), problem.k.shape[1], dtype=torch.int32, device=device)
    k, v, k_scale, v_scale = problem.stored
    tables = pos, offset_BLH, length_BLH, layer_1, position_B
    most = int(length_BH.max())

    def call() -> Tensor:
        return ragged_decode(problem.q_BND, k, v, *tables, most=most, k_scale=k_scale, v_scale=v_scale)[0]

    return call, (problem.q_BND, k, v, *tables, None, most, None, k_scale, v_scale)


def sdpa(problem: Problem) -> Call | None:
    """PyTorch's attention over a rectangle; None where regions are no rectangle."""
    if problem.case.ragged:
        return None
    k_BHCD, v_BHCD = (x.unflatten(1, (problem.case.kv_heads, -1)) for x in (problem.k, problem.v))
    q_BN1D = problem.q_BND[:, :, None]
    return lambda: F.scaled_dot_product_attention(q_BN1D, k_BHCD, v_BHCD, enable_gqa=True)[:, :, 0]


def varlen(problem: Problem) -> Call | None:
    """PyTorch's FlashAttention over packed sequences of one KV head each."""
    from torch.nn.attention.varlen import varlen_attn

    q, shape = problem.queries, problem.q_BND.shape
    k, v = (torch.cat(problem.regions(x))[:, None] for x in (problem.k, problem.v))
    ends = torch.tensor([0, *problem.lengths]).cumsum(0).to(q.device, torch.int32)
    ones = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    most = max(problem.lengths)
    return lambda: _tensor(varlen_attn(q, k, v, ones, ends, 1, most, enable_gqa=True)).view(shape)


def flex(problem: Problem) -> Call | None:
    """FlexAttention over padded sequences of one KV head each, whose empty blocks it skips."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, shape = problem.queries[:, :, None], problem.q_BND.shape
    if q.is_cuda and (problem.case.batch, problem.case.kept) != FLEX_SIZE:
        return None
    k, v = (
        torch.nn.utils.rnn.pad_sequence(problem.regions(x), batch_first=True)[:, None] for x in (problem.k, problem.v)
    )
    length_S = torch.tensor(problem.lengths, device=q.device)
    mask = create_block_mask(
        lambda sequence, head, query, key: key < length_S[sequence], len(q), None, 1, k.shape[2], device=str(q.device)
    )
    run: Any = torch.compile(flex_attention, dynamic=False) if q.is_cuda else flex_attention
    return lambda: _tensor(run(q, k, v, block_mask=mask, enable_gqa=True)).view(shape)


def pages(problem: Problem, size: int) -> tuple[Tensor, Tensor, list[int]]:
    """Keys and values as (pages, size, 1, D), every region beginning with a page; and how many pages each has."""
    counts = [-(-length // size) for length in problem.lengths]

    def paged(arena: Tensor) -> Tensor:
        out = arena.new_zeros(sum(counts), size, 1, arena.shape[2])
        starts = torch.tensor([0, *counts]).cumsum(0).tolist()
        for region, (start, end) in zip(problem.regions(arena), pairwise(starts), strict=True):
            out[start:end].view(-1, arena.shape[2])[: len(region)] = region
        return out

    return paged(problem.k), paged(problem.v), counts


def flash_attention(problem: Problem) -> Call | None:
    """The package flash-attn over pages, a sequence of one KV head per region."""
    from flash_attn import flash_attn_with_kvcache

    k, v, counts = pages(problem, 256)
    q, shape, device = problem.queries[:, None], problem.q_BND.shape, problem.q_BND.device
    pages_of = torch.arange(sum(counts), dtype=torch.int32).split(counts)
    table = torch.nn.utils.rnn.pad_sequence(list(pages_of), batch_first=True).to(device)
    lengths = torch.tensor(problem.lengths, dtype=torch.int32, device=device)
    return lambda: _tensor(flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table)).view(shape)


def flashinfer(problem: Problem) -> Call | None:
    """The package FlashInfer over pages, a sequence of one KV head per region."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    k, v, counts = pages(problem, 16)
    q, shape, device = problem.queries, problem.q_BND.shape, problem.q_BND.device
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.zeros(2**28, dtype=torch.uint8, device=device), "NHD")
    wrapper.plan(
        torch.tensor([0, *counts], device=device).cumsum(0).int(),
        torch.arange(sum(counts), dtype=torch.int32, device=device),
        torch.tensor([(length - 1) % 16 + 1 for length in problem.lengths], dtype=torch.int32, device=device),
        q.shape[1],
        1,
        problem.case.head_dim,
        16,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    return lambda: _tensor(wrapper.run(q, (k, v))).view(shape)


def _tensor(result: Any) -> Tensor:
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


OTHERS: dict[str, Callable[[Problem], Call | None]] = {
    "SDPA": sdpa,
    "varlen_attn": varlen,
    "FlexAttention": flex,
    "FlashAttention": flash_attention,
    "FlashInfer": flashinfer,
}
ON_A_CPU = ("SDPA", "FlexAttention")


def attention_timings(
    cases: Iterable[Case],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    *,
    bandwidth: float,
    deadline: float = float("inf"),
    tick: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Check and time everybody on every case.

    Args:
        cases: what to time.
        device: where.
        dtype: of queries, and of keys and values that have no codes.
        timer: gives seconds.
        bandwidth: bytes per second that are the measure.
        deadline: of `time.monotonic`; what would begin later is left out.
        tick: called with what comes next.

    Yields:
        One row per case and contender, with its time or with why it has none. The bytes are those that ours has to
        move, whoever is timed.
    """
    for case in cases:
        if time.monotonic() > deadline:
            yield asdict(case) | {"contender": "everybody", "left_out": "there was no time left"}
            continue
        problem = build(case, device, dtype)
        call, arguments = ours(problem)
        moved = KERNEL.bytes_moved(*arguments)
        right = exact(problem)
        others = [name for name in OTHERS if case.bits == 16 and (device.type == "cuda" or name in ON_A_CPU)]
        for name in ("ours", *others):
            tick(f"{case.batch} x {case.kept}{' ragged' if case.ragged else ''}, {case.bits} bits: {name}")
            row = asdict(case) | {"contender": name, "bytes": moved}
            try:
                run = call if name == "ours" else OTHERS[name](problem)
                if run is None:
                    continue
                off = ((run().float() - right).abs().max() / right.abs().max()).item()
                if not off <= TOLERANCE:
                    raise ValueError(f"results are off by {off:.3f} of the largest")
                seconds = timer(run)
            except ImportError:
                continue
            except Exception as error:  # others may not take a case at all; ours must
                yield row | {"left_out": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}
                continue
            yield row | {
                "error": off,
                "ms": 1000 * seconds,
                "gbps": moved / seconds / 1e9,
                "bandwidth_share": moved / seconds / bandwidth,
            }


def bars(rows: Sequence[dict[str, Any]], peak_gbps: float | None = None) -> dict[str, dict[str, Any]]:
    """What the project wants of a GPU, and what was reached at worst, among cases of at least 128 MiB.

    Args:
        rows: what `attention_timings` gave.
        peak_gbps: the memory's bandwidth by its data sheet, if that is known.

    Returns:
        For each bar the worst figure (None where nothing was measured), the limit, and whether it is met.
    """
    large = [row for row in rows if "ms" in row and row["bytes"] >= LARGE and row["bits"] == 16]
    mine = [row for row in large if row["contender"] == "ours"]

    def partners(row: dict[str, Any], *, ragged: bool, mine: bool) -> list[float]:
        return [
            other["ms"]
            for other in large
            if (other["batch"], other["kept"], other["ragged"]) == (row["batch"], row["kept"], ragged)
            and (other["contender"] == "ours") == mine
        ]

    uneven = [row for row in mine if row["ragged"]]
    even = [row["ms"] / min(found) for row in uneven if (found := partners(row, ragged=False, mine=True))]
    oracle = [row["ms"] / min(found) for row in uneven if (found := partners(row, ragged=True, mine=False))]
    slowest = min((row["gbps"] for row in mine), default=None)
    worst = {
        "peak_share": None if peak_gbps is None or slowest is None else slowest / peak_gbps,
        "bandwidth_share": min((row["bandwidth_share"] for row in mine), default=None),
        "ragged_over_uniform": max(even, default=None),
        "ragged_over_oracle": max(oracle, default=None),
    }
    result: dict[str, dict[str, Any]] = {}
    for name, limit in BARS.items():
        value = worst[name]
        met = None if value is None else (value >= limit if name.endswith("_share") else value <= limit)
        result[name] = {"worst": value, "limit": limit, "met": met}
    return result


# -- time on a GPU -----------------------------------------------------------------------------------------------------


class GraphTimer:
    """Times calls as captured graphs, each repetition after the L2 cache has been filled with something else.

    Args:
        device: a CUDA device.
        repeats: of which the median is taken.
    """

    def __init__(self, device: torch.device, repeats: int = 20) -> None:
        self._device, self._repeats = device, repeats
        self._other = torch.ones(2**27, device=device)  # read, not written: lines to write back would cost time later

    def __call__(self, run: Callable[[], object]) -> float:
        """Median seconds of a call."""
        graph = CudaGraphs(self._device)(run)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        milliseconds = []
        for _ in range(self._repeats):
            self._other.sum()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            milliseconds.append(start.elapsed_time(end))
        return float(median(milliseconds)) / 1000


def measured_bandwidth(device: torch.device, timer: Timer, nbytes: int = 2**30) -> float:
    """Bytes per second of a large copy or a large sum, whichever is faster."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return max(2 * nbytes / timer(lambda: target.copy_(source)), nbytes / timer(source.sum))


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe.

    Args:
        argv: its options; None takes those of the process.

    Returns:
        The exit status; see `zoo.cli.run`.
    """
    return cli.run("recipes.gpu_check", lambda: _main(sys.argv[1:] if argv is None else argv))


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m recipes.gpu_check",
        description=(__doc__ or "").splitlines()[0] + "\n\n" + DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the JSON here too, also after a part has failed"
    )
    return parser


def _main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    cli.check_writable("--json", args.json)
    if not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device here: run this on a machine with a GPU, with PyTorch for CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 interprets kernels on the CPU: unset it")
    started, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    report: dict[str, Any] = {
        "machine": machine.description(device),
        "commit": machine.commit(),
        "command": shlex.join(["python", "-m", "recipes.gpu_check", *argv]),
    }
    bar = Progress(console=Console(stderr=True), auto_refresh=False, disable=not sys.stderr.isatty())
    with bar, torch.inference_mode():  # a bar that refreshes itself would run while something is timed
        task = bar.add_task("", total=None)

        def tick(text: str) -> None:
            bar.update(task, description=text, advance=1, refresh=True)

        try:
            if "tests" in args.parts:
                report["tests"] = kernel_tests(tick)
            if "graphs" in args.parts:
                report["graphs"] = []
                loaded = random_model(SMALL_LLAMA, device, torch.bfloat16)
                for cache in ("full", "snapkv"):
                    for batch in (1, 8):
                        tick(f"graphs: {cache}, batch {batch}")
                        report["graphs"].append(graph_check(loaded, cache=cache, batch=batch, prompt=1024, steps=STEPS))
                del loaded
            if "timings" in args.parts:
                timer = GraphTimer(device)
                bandwidth = measured_bandwidth(device, timer)
                report |= {"bandwidth_gbps": bandwidth / 1e9, "timings": []}
                deadline = started + ALL_S
                for row in attention_timings(
                    cases(), device, torch.bfloat16, timer, bandwidth=bandwidth, deadline=deadline, tick=tick
                ):
                    report["timings"].append(row)
                found = (gpu.bytes_per_s / 1e9 for name, gpu in GPUS.items() if name in report["machine"]["device"])
                peak = next(found, None)
                report |= {"data_sheet_gbps": peak, "bars": bars(report["timings"], peak)}
        finally:
            report["seconds"] = time.monotonic() - started
            if args.json is not None:
                args.json.write_text(json.dumps(report) + "\n")
    show(report)
    if wrong := faults(report):
        raise ValueError("; ".join(wrong))


def faults(report: dict[str, Any]) -> list[str]:
    """What is wrong; a bar that is not met is a result."""
    found, tests = [], report.get("tests")
    if tests and (tests["failed"] or tests["error"]):
        found.append(f"{tests['failed'] + tests['error']} kernel tests failed, the first is {tests['names'][0]}")
    if tests and not tests["finished"]:
        found.append(f"the kernel tests did not come to their end, {tests['passed']} had passed")
    for row in report.get("graphs", []):
        if not row["difference"] <= TOLERANCE:
            found.append(f"graphs of {row['cache']}, batch {row['batch']}, are off by {row['difference']:.3f}")
    for row in report.get("timings", []):
        if row["contender"] == "ours" and "left_out" in row:
            found.append(f"ragged_decode, batch {row['batch']}, {row['kept']} kept: {row['left_out']}")
    return found


def show(report: dict[str, Any]) -> None:
    """Print tables of what was measured, and everything as the last line."""
    console = Console(width=max(140, Console().width), markup=False, highlight=False)
    console.print(f"{report['machine']['device']}, torch {report['machine']['torch']}")
    if tests := report.get("tests"):
        counts = ", ".join(f"{tests[word]} {word}" for word in ("passed", "failed", "error", "skipped"))
        console.print(f"kernel tests: {counts} in {tests['seconds']:.0f} s{'' if tests['finished'] else ', cut off'}")
    if graphs := report.get("graphs"):
        table = _table("cache", "batch", "eager tok/s", "graph tok/s", "largest difference", "same choices")
        for row in graphs:
            rates = (f"{row[f'{kind}_tokens_per_s']:,.0f}" for kind in ("eager", "graph"))
            same = "yes" if row["same_choices"] else "no"
            table.add_row(row["cache"], str(row["batch"]), *rates, f"{row['difference']:.2g}", same)
        console.print(table)
    if "timings" in report:
        table = _table("batch", "kept", "regions", "bits", "MiB", "contender", "ms", "GB/s", "of bandwidth")
        for row in report["timings"]:
            size = f"{row['bytes'] / 2**20:,.0f}" if "bytes" in row else "-"
            case = [str(row["batch"]), f"{row['kept']:,}", "ragged" if row["ragged"] else "uniform", str(row["bits"])]
            figures = [row.get("left_out", ""), "", ""]
            if "ms" in row:
                figures = [f"{row['ms']:.4f}", f"{row['gbps']:,.0f}", f"{row['bandwidth_share']:.2f}"]
            table.add_row(*case, size, row["contender"], *figures)
        console.print(table)
        sheet = report["data_sheet_gbps"]
        console.print(
            f"bandwidth of a copy or sum here: {report['bandwidth_gbps']:,.0f} GB/s; by the data sheet: "
            f"{'unknown' if sheet is None else f'{sheet:,.0f} GB/s'}"
        )
        for name, bar in report["bars"].items():
            worst = "not measured" if bar["worst"] is None else f"{bar['worst']:.2f}"
            console.print(f"{name.replace('_', ' ')}: {worst}, the bar is {bar['limit']}")
    print(json.dumps(report))


def _table(*columns: str) -> Table:
    table = Table(box=None)
    for name in columns:
        table.add_column(name, justify="left" if name in ("cache", "contender", "regions") else "right")
    return table


if __name__ == "__main__":
    sys.exit(main())
