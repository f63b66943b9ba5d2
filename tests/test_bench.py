"""The bench: its arithmetic against figures worked out by hand, and what it promises to whoever reads its output."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_chat
from zoo import bench, machine
from zoo.engine import Engine

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--context", "40", "--steps", "1")
HEAD_DIM, HEADS, LAYERS = 16, 2, 3  # of tests/tiny.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.write(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command in this process: (exit status, lines of stdout, stderr)."""
    monkeypatch.setattr(machine, "read_gbps", lambda device: 10.0)

    def run(*options):
        status = bench.main(["--model", str(folder), *map(str, options)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_bytes_and_bandwidth(run, folder):
    options = ("--context", "50", "--batch", "2", "--steps", "4", "--no-compile", "--budget", "40")
    status, out, err = run("--cache", "full", "snapkv", *options)
    assert status == 0, err
    full, small = json.loads(out[-1])["points"]
    # 8 steps of warm-up, then 4 which see 2.5 tokens more on average
    for row, prompts in (full, (50, 38)), (small, (40, 38)):
        kept = [tokens + 8 + 2.5 for tokens in prompts]
        assert row["kept_per_head"] == sum(kept) / 2
        assert row["cache_read_bytes"] == sum(kept) * LAYERS * HEADS * 2 * HEAD_DIM * 4
        assert row["gbps"] == pytest.approx(
            (row["weight_read_bytes"] + row["cache_read_bytes"]) / row["decode_ms"] / 1e6
        )
        assert row["mbu"] == pytest.approx(row["gbps"] / 10)
        assert row["decode_tokens_per_s"] == pytest.approx(2000 / row["decode_ms"])
        assert row["prefill_tokens_per_s"] == pytest.approx(88 / row["first_token_s"])
        assert 0 < row["decode_ms_p10"] <= row["decode_ms"] <= row["decode_ms_p90"]
    state = load_file(folder / "model.safetensors")
    read = sum(tensor.nbytes for name, tensor in state.items() if "embed_tokens" not in name)
    buffers = LAYERS * 8 + 4 * HEAD_DIM // 2  # each layer's number in int64, and RoPE's frequencies
    assert full["weight_read_bytes"] == small["weight_read_bytes"] == read + buffers


def test_percentiles_are_those_of_the_timed_steps(run, monkeypatch):
    clock, times = [0.0], iter([9.0, *[7.0] * 8, 0.005, 0.001, 0.004, 0.002, 0.003])

    def slow(method):
        def call(self, *rows):
            clock[0] += next(times)
            return method(self, *rows)

        return call

    monkeypatch.setattr(bench, "_first_step", lambda engine, prompts: None)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    for name in ("prefill", "step"):
        monkeypatch.setattr(Engine, name, slow(getattr(Engine, name)))
    status, out, err = run("--cache", "full", "--context", "40", "--steps", "5", "--no-compile")
    assert status == 0, err
    (row,) = json.loads(out[-1])["points"]
    assert row["first_token_s"] == 9
    got = [row[name] for name in ("decode_ms_p10", "decode_ms", "decode_ms_p90")]
    np.testing.assert_allclose(got, [1.4, 3, 4.6])


def test_the_peak_is_that_of_the_point(run):
    status, out, err = run("--cache", "full", "--context", "4000", "40", "--steps", "1", "--no-compile")
    assert status == 0, err
    long, short = (row["peak_mib"] for row in json.loads(out[-1])["points"])
    assert machine.begin_peak()
    before = machine.peak_mib()
    assert 0 < short < long and short <= before + 50
    torch.ones(2**26)  # 256 MiB, which are gone again
    assert before + 250 <= machine.peak_mib() <= before + 270
    assert machine.begin_peak() and machine.peak_mib() < before + 10


def test_read_bandwidth_is_that_of_memory_not_of_a_cache(monkeypatch):
    sizes, times, total = [], iter([0.0, 2.0, 2.0, 3.0]), torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda buffer: (sizes.append(buffer.nbytes), total(buffer))[1])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(times))
    gbps = machine.read_gbps(torch.device("cpu"), repeats=2)
    assert sizes[0] == sizes[1] >= 2**28
    assert gbps == sizes[0] / 1e9  # the faster of 2 s and 1 s


# -- the command -------------------------------------------------------------------------------------------------------


def test_table_and_json(run, tmp_path):
    file = tmp_path / "rows.json"
    snapkv = "snapkv:window=4,recent=4"
    status, out, err = run(
        *("--context", "40", "70", "40", "--batch", "2", "--cache", "full", snapkv, "--budget", "16", "50%"),
        *("--dtype", "bfloat16", "--weights", "int8", "--steps", "1", "--no-compile", "--json", file),
    )
    assert status == 0, err
    report = json.loads(out[-1])
    assert json.loads(file.read_text()) == report
    assert [(row["context"], row["batch"], row["cache"], row["budget"]) for row in report["points"]] == [
        (context, 2, cache, budget)
        for context in (40, 70)
        for cache, budget in (("full", None), (snapkv, "16"), (snapkv, "50%"))
    ]
    for row in report["points"]:
        assert (row["dtype"], row["weights"], row["compile"]) == ("bfloat16", "int8", False) and row["decode_ms"] > 0
    assert report["machine"]["threads"] == 1 and report["compile_s"] is None
    assert report["command"].startswith("python -m zoo.bench --model ") and "commit" in report
    table = "\n".join(out[:-1])
    for name in ("context", "batch", "kept", "prefill tok/s", "TTFT s", "[p10-p90]", "cache B", "MBU", "peak MiB"):
        assert name in table
    assert len(re.findall(r"^ +[47]0 +2 ", table, re.MULTILINE)) == 6
    assert [line.split(":")[0] for line in err.splitlines()][4] == "[5/6] context 70, batch 2, snapkv"


def test_a_refused_point_keeps_the_others(run, tmp_path):
    file = tmp_path / "rows.json"
    status, out, err = run(
        *("--context", 10**9, "40", "--cache", "full", "snapkv", "--budget", "8", "40"),
        *("--steps", "1", "--no-compile", "--json", file),
    )
    assert status == 2 and "Traceback" not in err
    rows = json.loads(out[-1])["points"]
    assert json.loads(file.read_text())["points"] == rows
    errors = [row.get("error") for row in rows]
    assert re.search(r"the full cache would take [\d,]+ MiB and [\d,]+ MiB are free", errors[0])
    assert "at least 32 tokens" in errors[1] and "at least 32 tokens" in errors[4]
    assert re.search(r"cache and prefill would take [\d,]+ MiB and [\d,]+ MiB are free", errors[2])
    assert errors[3] is None and errors[5] is None and rows[5]["decode_ms"] > 0
    assert err.splitlines()[-1].startswith("zoo.bench: 4 of 6 points were refused: the full cache")
    assert sum("refused" in line for line in out[:-1]) == 4


@pytest.mark.parametrize(
    ("failure", "says"),
    [(KeyboardInterrupt(), "interrupted"), (RuntimeError("can't allocate memory: 1 bytes"), "out of memory: ")],
    ids=["interrupt", "memory"],
)
def test_what_was_measured_is_kept(run, monkeypatch, tmp_path, failure, says):
    file, prefill = tmp_path / "rows.json", Engine.prefill

    def fail(engine, prompts):
        if len(prompts[0]) == 41:
            raise failure
        return prefill(engine, prompts)

    monkeypatch.setattr(Engine, "prefill", fail)
    options = ("--cache", "full", "--steps", "1", "--no-compile", "--json", file)
    status, out, err = run("--context", "40", "41", "42", *options)
    assert status == 2 and err.splitlines()[-1].startswith(f"zoo.bench: {says}")
    rows = json.loads(file.read_text())["points"]
    assert [row["context"] for row in rows] == [40] and json.loads(out[-1])["points"] == rows
    assert run("--context", "41", *options)[:2] == (2, [])
    assert json.loads(file.read_text())["points"] == rows  # nothing was measured, nothing is lost


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--cache", "nonsense"), "no cache method is called 'nonsense'"),
        (("--cache", "full", "--budget", "64"), "--cache full keeps everything: drop --budget"),
        (("--cache", "full", "snapkv", "--importance", "x.json"), "does not use head importance"),
        (("--cache", "full", "snapkv", "--sharing", "x.json"), "shares no layers: drop --sharing x.json"),
        (("--budget", "12", "many"), "budget 'many' is not understood"),
        (("--context", "0"), "'0' is not a whole number from 1"),
        (("--batch", "two"), "'two' is not a whole number"),
        (("--steps", "0"), "'0' is not a whole number from 1"),
        (("--dtype", "float8", "--no-compile"), "dtype 'float8' is not supported"),
        (("--weights", "int3"), "invalid choice: 'int3'"),
        (("--compile", "gcc"), "invalid choice: 'gcc'"),
        (("--device", "abacus", "--cache", "full", "--no-compile"), "device 'abacus' cannot be used"),
        (("--json", "/nowhere/rows.json"), "--json /nowhere/rows.json cannot be written"),
        (("--json", "/tmp"), "--json /tmp cannot be written"),
        (("--prompt", "x"), "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_options_are_one_line_before_the_model_is_loaded(run, monkeypatch, options, says):
    monkeypatch.setattr(sys.modules["zoo.load"], "resolve", lambda *_, **__: pytest.fail("the model was looked for"))
    status, out, err = run(*options)
    assert status == 2 and not out
    assert len(err.splitlines()) == 1 and err.startswith("zoo.bench: ") and says in err


def test_help_is_quick():
    code = "import sys\nfrom zoo import bench\nbench.main(['--help'])\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "1 - i/(2b)" in done.stdout and "--no-compile-times" in done.stdout and "--time-compile" not in done.stdout


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "compile"),
    [((), True), (("--compile",), True), (("--compile", "inductor"), "inductor")],
    ids=["default", "compile", "inductor"],
)
def test_what_is_compiled(run, monkeypatch, options, compile):
    asked = []
    monkeypatch.setattr(Engine, "step", lambda engine, token_B: (asked.append(engine), torch.zeros(1, 9))[1])
    status, out, err = run(*SMALL, "--cache", "full", "--no-compile-times", *options)
    assert status == 0, err
    assert json.loads(out[-1])["points"][0]["compile"] == compile
    assert {type(block).__name__ for block in asked[0]._blocks} == {"FusedBlocks" if compile is True else "partial"}


def test_a_broken_compiler(run, without_native):
    status, out, err = run(*SMALL, "--cache", "full", "--compile")
    assert status == 2 and not out and len(err.splitlines()) == 1
    assert re.match(r"zoo.bench: compiling failed \(.*\): repair that, or pass --no-compile$", err.strip())
    status, out, err = run(*SMALL, "--cache", "full")
    assert status == 0 and "running uncompiled" in err.splitlines()[0]
    assert json.loads(out[-1])["points"][0]["compile"] is False


def test_compiling_is_timed_cold_and_warm_in_new_processes(run, monkeypatch):
    started, real = [], subprocess.run

    def child(command, **options):
        if command[0] == "git":
            return real(command, **options)
        started.append((command, options["env"]["TORCHINDUCTOR_CACHE_DIR"]))
        return SimpleNamespace(returncode=0, stdout=f"{10.0 / len(started)}\n", stderr="")

    options = ("--cache", "snapkv", "--budget", "8", "40", "--context", "50", "--steps", "1", "--compile")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", child)
        status, out, err = run(*options)
    assert status == 2 and "1 of 2 points were refused" in err
    assert json.loads(out[-1])["compile_s"] == {"cold": 10.0, "warm": 5.0}
    (first, place), (second, same_place) = started
    assert first == second and place == same_place
    assert first[-2:] == ["--time-compile", "1"], "the point that was refused cannot be compiled for"
    status, out, err = run(*first[first.index("--cache") :])
    assert status == 0 and len(out) == 1 and 0 <= float(out[0]) < 60, err


def test_a_failing_compiler_process_costs_no_point(run, monkeypatch):
    broken = SimpleNamespace(returncode=2, stdout="", stderr="warning\nzoo.bench: no luck\n")
    monkeypatch.setattr(machine, "commit", lambda: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: broken)
    status, out, err = run(*SMALL, "--cache", "full", "--compile")
    assert status == 2 and json.loads(out[-1])["points"][0]["decode_ms"] > 0
    assert "timing the compiler failed (zoo.bench: no luck)" in err.splitlines()[-1]
