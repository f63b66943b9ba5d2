"""Every Triton form becomes machine code for GPUs that are not here; nothing of a decode step spills or reads narrowly.

Compiling needs a process in which Triton does not interpret, so each test looks at what another process found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.aot import GPUS, TARGETS
from kernels.registry import all_kernels

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {name: kernel for name, kernel in all_kernels().items() if kernel.launch is not None}
DECODE = {"add_rms_norm", "ragged_append", "ragged_decode", "ragged_worst", "rms_norm", "rope", "silu_mul"}
HEAD_DIMS = {"smollm2-135m": 64, "phi-2": 80, "phi-3-mini": 96, "gemma-2-9b": 256}
SHAPE = ["--kept", "1024", "--batch", "16"]
QUANTISED = """
import json
from kernels import aot, ragged_decode
import torch
cases = {case.name: case for case in ragged_decode.cases()}
calls = [
    aot.Call(
        kernel=ragged_decode.KERNEL, about={"case": name}, arguments=lambda case=case: case.make(torch.bfloat16)
    )
    for name, case in cases.items()
    if "bits, D=128" in name or name == "merged and empty slots"
]
print(json.dumps(aot.report(calls, list(aot.TARGETS))))
"""
GRIDS = """
import torch
from kernels.aot import launches
from kernels.registry import all_kernels

def grids(kernel, arguments):
    return [(launch.function.__name__, launch.grid) for launch in launches(kernel, arguments)]

def filled(x, number):
    return torch.full_like(x, number) if isinstance(x, torch.Tensor) and not x.is_floating_point() else x

for kernel in all_kernels().values():
    for case in kernel.cases() if kernel.launch is not None else ():
        arguments = case.make(torch.float16)
        zeros, sevens = (grids(kernel, [filled(x, number) for x in arguments]) for number in (0, 7))
        sizes = grids(kernel, [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments])
        assert zeros == sevens == sizes, (kernel.name, case.name, zeros, sevens, sizes)
        print(kernel.name, sizes)
"""
BAD = """
import json
import torch
from kernels.language import jit, tl
from kernels import aot
from kernels.registry import Kernel

@jit
def _narrow(x, y, stride, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at * stride) + 1)

@jit
def _hungry(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    row = tl.load(x + at)
    tl.store(y + at, row * tl.sum(row))

def launch(x):
    y = torch.empty_like(x)
    _narrow[1,](x, y, 3, SIZE=1024)
    _hungry[1,](x, y, SIZE=1 << 15, num_warps=1)
    return y

def wait(x):
    return x[:int(x.sum())]

x = torch.empty(1 << 16)
none = dict(schema="", reference=None, fake=None, cases=tuple, sized=None)
none |= dict(bytes_moved=lambda x: 2 * x.nbytes, flops=lambda x: 0)
calls = [
    aot.Call(kernel=Kernel(name=f.__name__, launch=f, **none), about={}, arguments=lambda: (x,)) for f in (launch, wait)
]
print(json.dumps(aot.report(calls, ["sm_80", "gfx942"])))
"""


def start(*command, **environment):
    """A process without the interpreter."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, *command],
        env={**found, **environment},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def output(process):
    out, err = process.communicate()
    assert process.returncode == 0, (out + err)[-4000:]
    return out


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Reports of every operator at one model's sizes, and of decoding at other head dims and with other options."""
    folder = tmp_path_factory.mktemp("aot")
    everything = start("-m", "kernels.aot", *SHAPE, "--model", "llama-3-8b", "--json", str(folder / "all"))
    dims = ["--op", "ragged_decode", "--model", *HEAD_DIMS, "--json", str(folder / "dims")]
    dims = start("-m", "kernels.aot", *SHAPE, *dims)
    quantised = start("-c", QUANTISED)
    table, _, options = map(output, (everything, dims, quantised))
    found = {name: json.loads((folder / name).read_text()) for name in ("all", "dims")}
    return {**found, "options": json.loads(options), "table": table}


def test_every_kernel_compiles_for_every_target(compiled):
    for name in ("all", "dims", "options"):
        assert compiled[name]["failures"] == []
    found = {(row["op"], row["target"]) for row in compiled["all"]["code"]}
    assert found == {(name, target) for name in KERNELS for target in TARGETS}
    assert all(0 < row["occupancy"] <= 1 for row in compiled["all"]["code"])


def test_nothing_of_a_decode_step_spills_or_touches_local_memory(compiled):
    rows = [row for name in ("all", "dims", "options") for row in compiled[name]["code"] if row["op"] in DECODE]
    assert {row["op"] for row in rows} == DECODE & set(KERNELS)
    assert len({row["kernel"] for row in rows if row["op"] == "ragged_decode"}) == 2  # tiles and their merge
    for row in rows:
        assert not (row["spills"] or row["local_accesses"] or row["stack_bytes"]), row


def test_keys_and_values_are_read_128_bits_at_a_time(compiled):
    rows = [
        row for name in ("all", "dims", "options") for row in compiled[name]["code"] if row["op"] == "ragged_decode"
    ]
    rows = [row for row in rows if "k" in row["loads"]]
    dims = {(row["constants"]["D"], row["target"]) for row in rows}
    assert dims == {(D, target) for D in (128, *HEAD_DIMS.values()) for target in TARGETS}
    assert {row["constants"]["BITS"] for row in rows} == {0, 4, 8}
    for row in rows:
        assert row["loads"]["k"] == row["loads"]["v"] == row["load_bits"] == 128, row
        assert row["tensor_cores"], row


def test_grids_depend_on_sizes_alone():
    """Nothing can be read of a tensor on the meta device; and tables of zeros or of sevens give the same grids."""
    assert {line.split()[0] for line in output(start("-c", GRIDS)).splitlines()} == set(KERNELS)


def test_times_are_a_model_and_say_so(compiled):
    assert "MODEL-BASED" in compiled["all"]["note"] and compiled["table"].count("MODEL-BASED") == 2
    assert {row["op"] for row in compiled["all"]["model_based"]} == set(KERNELS)
    (norm,) = (row for row in compiled["all"]["model_based"] if row["op"] == "rms_norm")
    assert norm["grids"] == [["_kernel", [16]]] and norm["bytes"] == 2 * (2 * 16 + 1) * 4096
    assert norm["roofline_us"]["H100"] == pytest.approx(norm["bytes"] / 3.35e12 * 1e6)
    for row in compiled["all"]["model_based"]:
        for name, gpu in GPUS.items():
            seconds = max(row["bytes"] / gpu.bytes_per_s, row["flops"] / gpu.flops_per_s)
            assert row["roofline_us"][name] == pytest.approx(seconds * 1e6)


def test_bad_code_is_seen(tmp_path):
    """Narrow loads, spills and launches that read a tensor would not go unnoticed."""
    (tmp_path / "bad.py").write_text(BAD)
    made = json.loads(output(start(str(tmp_path / "bad.py"), PYTHONPATH=str(ROOT))))
    code = {(row["kernel"], row["target"]): row for row in made["code"]}
    for target in ("sm_80", "gfx942"):
        narrow, hungry = (code[name, target] for name in ("_narrow", "_hungry"))
        assert narrow["loads"]["x"] == 32 and narrow["stores"]["y"] == 128
        assert narrow["spills"] == narrow["local_accesses"] == narrow["stack_bytes"] == narrow["tensor_cores"] == 0
        assert hungry["spills"] and hungry["local_accesses"] and hungry["stack_bytes"]
    (failure,) = made["failures"]
    assert failure["op"] == "wait" and "meta" in failure["error"]


@pytest.mark.parametrize(
    "options, environment, said",
    [
        ([], {"TRITON_INTERPRET": "1"}, "kernels.aot: TRITON_INTERPRET is set"),
        (["--op", "softmax"], {}, "'softmax'; there are add_rms_norm"),
        (["--kept", "0"], {}, "'0' is not a whole number from 1"),
        (["--model", "gpt-2"], {}, "llama-3-8b"),
        (["--json", "/no/folder/x"], {}, "--json: [Errno 2] No such file or directory: '/no/folder/x'"),
    ],
)
def test_what_cannot_be_tried_is_refused(options, environment, said):
    process = start("-m", "kernels.aot", *options, **environment)
    _, err = process.communicate()
    assert process.returncode == 2 and said in err.splitlines()[-1], err
