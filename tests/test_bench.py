"""The bench command: its arithmetic against figures made by hand, and what it promises to whoever reads its output."""

import json
import math
import re
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from tests import tiny, tiny_chat
from zoo import bench, engine, load
from zoo.bench import Point

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--context", "40", "--steps", "3", "--no-compile")
HEAD_DIM, HEADS, LAYERS = 16, 2, 3  # of tests/tiny.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.write(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture(scope="module")
def loaded(folder):
    return load(str(folder), progress=False)


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command in this process: (exit status, lines of stdout, stderr)."""
    monkeypatch.setattr(bench, "read_gbps", lambda device: 10.0)

    def run(*options):
        status = bench.main(["--model", str(folder), *map(str, options)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_percentiles():
    assert [bench.percentile([5.0, 1.0, 4.0, 2.0, 3.0], p) for p in (0, 10, 50, 90, 100)] == [1, 1.4, 3, 4.6, 5]
    assert bench.percentile([7.0], 90) == 7
    values = [float(n) for n in tiny.hashed("times", 32) % 1000]
    assert bench.percentile(values, 50) == statistics.median(values)
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    assert bench.percentile(values, 10) == pytest.approx(deciles[0])
    assert bench.percentile(values, 90) == pytest.approx(deciles[-1])


@pytest.mark.parametrize("batch", [1, 4, 200])
@pytest.mark.parametrize(("feature", "tied"), [("plain", False), ("tied", True)])
def test_bytes_of_weights_that_a_step_reads(tmp_path, feature, tied, batch):
    config = tiny.config_json("llama", feature)
    shapes = tiny.tensor_shapes(config)
    table = shapes.pop("model.embed_tokens.weight")
    numbers = sum(map(math.prod, shapes.values()))
    numbers += math.prod(table) if tied else min(batch, table[0]) * table[1]
    buffers = LAYERS * 8 + 4 * HEAD_DIM // 2  # each layer's number in int64, and RoPE's frequencies
    model = tiny.load(tiny.write(tmp_path, config)).model
    assert bench.weight_read_bytes(model, batch) == 4 * numbers + buffers


def test_bytes_and_bandwidth_of_a_point(loaded, monkeypatch):
    monkeypatch.setattr(bench, "read_gbps", lambda device: 10.0)
    options = {"steps": 4, "compiled": False, "importance": None}
    full = bench.measure(loaded, Point(context=50, batch=2, cache="full", budget=None), **options)
    assert full["prompt_tokens"] == [50, 38]
    # 8 steps of warm-up, then 4 whose mean is 2.5 tokens more
    kept = [(tokens + 8 + 2.5) * LAYERS * HEADS for tokens in (50, 38)]
    assert full["cache_read_bytes"] == sum(kept) * 2 * HEAD_DIM * 4
    assert full["kept_per_head"] == 54.5
    small = bench.measure(loaded, Point(context=50, batch=1, cache="snapkv", budget="40"), **options)
    assert small["cache_read_bytes"] == (40 + 8 + 2.5) * LAYERS * HEADS * 2 * HEAD_DIM * 4
    for row in (full, small):
        read = bench.weight_read_bytes(loaded.model, len(row["prompt_tokens"])) + row["cache_read_bytes"]
        assert row["gbps"] == pytest.approx(read / row["decode_ms"] / 1e6)
        assert row["mbu"] == pytest.approx(row["gbps"] / 10)
        assert 0 < row["decode_ms_p10"] <= row["decode_ms"] <= row["decode_ms_p90"]
        assert row["first_token_s"] > row["prefill_s"] > 0
        assert row["prefill_tokens_per_s"] == pytest.approx(sum(row["prompt_tokens"]) / row["prefill_s"])
        assert row["peak_bytes"] > read


def test_prompts_are_ragged_plain_and_the_same_again(loaded):
    prompts = bench.random_prompts(loaded, context=400, batch=4)
    assert list(map(len, prompts)) == [400, 350, 300, 250]
    assert prompts == bench.random_prompts(loaded, context=400, batch=4)
    assert prompts != bench.random_prompts(loaded, context=400, batch=4, seed=1)
    special = set(loaded.tokenizer.special_tokens.values())
    assert special and not special & {token for ids in prompts for token in ids}


def test_read_bandwidth_is_that_of_memory_not_of_a_cache(monkeypatch):
    cpu, sums = torch.device("cpu"), []
    monkeypatch.setattr(bench, "_timed", lambda device, call: (sums.append(call()), 2.0 / len(sums)))
    free = 2**31
    monkeypatch.setattr(engine, "_free_bytes", lambda device: free)
    monkeypatch.setattr(bench, "_last_level_cache_bytes", lambda device: 2**20)
    assert bench.read_gbps(cpu, repeats=2) == 256 * 2**20 / 1e9  # the faster of 2 s and 1 s
    assert sums == [64 * 2**20] * 2
    free = 100 * 2**20
    assert bench.read_gbps(cpu, repeats=1) == pytest.approx(25 * 2**20 / (2 / 3) / 1e9)
    monkeypatch.setattr(bench, "_last_level_cache_bytes", lambda device: 20 * 2**20)
    with pytest.raises(MemoryError):
        bench.read_gbps(cpu)


# -- the command -------------------------------------------------------------------------------------------------------


def test_table_and_json(run, tmp_path):
    file = tmp_path / "rows.json"
    status, out, err = run(
        *("--context", "40", "70", "40", "--batch", "2", "--cache", "full", "snapkv:window=4,recent=4"),
        *("--budget", "16", "50%", "--dtype", "bfloat16", "--steps", "3", "--no-compile", "--json", file),
    )
    assert status == 0, err
    report = json.loads(out[-1])
    assert json.loads(file.read_text()) == report
    snapkv = "snapkv:window=4,recent=4"
    assert [(row["context"], row["batch"], row["cache"], row["budget"]) for row in report["points"]] == [
        (context, 2, cache, budget)
        for context in (40, 70)
        for cache, budget in (("full", None), (snapkv, "16"), (snapkv, "50%"))
    ]
    for row in report["points"]:
        assert row["dtype"] == "bfloat16" and row["weights"] is None and row["decode_ms"] > 0
    assert report["machine"]["threads"] == 1 and report["read_gbps"] == 10.0 and report["compile_s"] is None
    assert report["command"].startswith("python -m zoo.bench --model ") and "commit" in report
    table = "\n".join(out[:-1])
    for name in ("context", "batch", "kept", "prefill tok/s", "TTFT s", "[p10-p90]", "GB read", "MBU", "peak MiB"):
        assert name in table
    assert len(re.findall(r"^ +[47]0 +2 ", table, re.MULTILINE)) == 6
    assert [line.split(":")[0] for line in err.splitlines()][4] == "[5/6] context 70, batch 2, snapkv"


def test_a_refused_point_keeps_the_others(run, tmp_path):
    file = tmp_path / "rows.json"
    huge = 10**9
    status, out, err = run(
        *("--context", huge, "40", "--cache", "full", "snapkv", "--budget", "8", "40"),
        *("--steps", "3", "--no-compile", "--json", file),
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


def test_running_out_of_memory_costs_one_point(run, monkeypatch):
    measure = bench.measure

    def fail_once(loaded, point, **options):
        if point.context == 40:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return measure(loaded, point, **options)

    monkeypatch.setattr(bench, "measure", fail_once)
    status, out, _ = run("--cache", "full", "--context", "40", "41", "--steps", "1", "--no-compile")
    rows = json.loads(out[-1])["points"]
    assert status == 2 and "out of memory" in rows[0]["error"] and rows[1]["decode_ms"] > 0


def test_an_interruption_keeps_what_was_measured(run, monkeypatch, tmp_path):
    measure, file = bench.measure, tmp_path / "rows.json"

    def interrupted(loaded, point, **options):
        if point.context == 41:
            raise KeyboardInterrupt
        return measure(loaded, point, **options)

    monkeypatch.setattr(bench, "measure", interrupted)
    options = ("--cache", "full", "--steps", "1", "--no-compile", "--json", file)
    status, out, err = run("--context", "40", "41", "42", *options)
    assert status == 2 and err.splitlines()[-1] == "zoo.bench: interrupted"
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
        (("--budget", "12", "many"), "budget 'many' is not understood"),
        (("--context", "0"), "'0' is not a whole number from 1"),
        (("--batch", "two"), "'two' is not a whole number"),
        (("--steps", "0"), "'0' is not a whole number from 1"),
        (("--dtype", "float8"), "dtype 'float8' is not supported"),
        (("--weights", "int3"), "invalid choice: 'int3'"),
        (("--device", "abacus", "--cache", "full"), "device 'abacus' cannot be used"),
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


def test_without_a_compiler(run, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    assert "--compile needs a C++ compiler" in run("--compile")[2]
    status, out, err = run("--cache", "full", "--context", "40", "--steps", "1")
    assert status == 0 and err.startswith("no C++ compiler: measuring uncompiled")
    assert json.loads(out[-1])["points"][0]["compiled"] is False


def test_int8_weights_are_asked_of_the_loader(run, loaded, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "load", lambda name, **options: (asked.append(options), loaded)[1])
    for option in ((), ("--weights", "int8")):
        status, out, _ = run(*option, "--cache", "full", *SMALL)
        assert status == 0 and json.loads(out[-1])["points"][0]["weights"] == (option[-1] if option else None)
    assert "weights" not in asked[0] and asked[1]["weights"] == "int8"


def test_help_is_quick():
    code = "import sys\nfrom zoo import bench\nbench.main(['--help'])\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "1 - i/(2b)" in done.stdout and "--no-compile-times" in done.stdout and "--time-compile" not in done.stdout


# -- compiling ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_backend(monkeypatch):
    """Let Dynamo trace, which decides when to compile, and leave out the slow part."""
    monkeypatch.setattr(engine, "_compiled", lambda function: torch.compile(function, fullgraph=True, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_one_compilation_serves_every_point_of_a_batch_size(run, eager_backend):
    options = ("--cache", "full", "snapkv", "--budget", "40", "64", "--steps", "2", "--compile", "--no-compile-times")
    status, out, err = run("--context", "50", "300", *options)
    assert status == 0, err
    report = json.loads(out[-1])
    assert len(report["points"]) == 6 and all(row["compiled"] for row in report["points"])
    assert report["compile_s"] is None
    assert counters["stats"]["unique_graphs"] == 2, "one graph for the blocks of all layers, one for the head"


def test_compiling_is_timed_cold_and_warm_in_new_processes(run, eager_backend, monkeypatch):
    started, real = [], subprocess.run

    def child(command, **options):
        if command[0] == "git":
            return real(command, **options)
        started.append((command, options["env"]["TORCHINDUCTOR_CACHE_DIR"]))
        return SimpleNamespace(returncode=0, stdout=f"{10.0 / len(started)}\n", stderr="")

    options = ("--batch", "2", "--cache", "snapkv", "--budget", "40", "--threads", "1", "--dtype", "bfloat16")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", child)
        status, out, err = run(*options, "--context", "50", "60", "--steps", "1", "--compile")
    assert status == 0, err
    told = {"batch": 2, "cache": "snapkv", "budget": "40"}
    assert json.loads(out[-1])["compile_s"] == {**told, "cold": 10.0, "warm": 5.0}
    (first, place), (second, same_place) = started
    assert first == second and place == same_place
    status, out, err = run(*first[first.index("--time-compile") :])
    assert status == 0 and float(out[-1]) > 0, err


def test_a_broken_compiler_process_is_told_and_costs_no_point(run, eager_backend, monkeypatch):
    broken = SimpleNamespace(returncode=2, stdout="", stderr="warning\nzoo.bench: no luck\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: broken)
    monkeypatch.setattr(bench, "commit", lambda: None)
    status, out, err = run("--cache", "full", "--context", "40", "--steps", "1", "--compile")
    assert status == 2 and json.loads(out[-1])["points"][0]["decode_ms"] > 0
    assert "timing the compiler failed (zoo.bench: no luck)" in err.splitlines()[-1]


def test_a_failing_compiler_refuses_points(run, monkeypatch):
    def fail(engine, tokens):
        raise RuntimeError("no luck\nand many more lines")

    monkeypatch.setattr(engine.Engine, "step", fail)
    status, out, _ = run("--cache", "full", "--context", "40", "--compile")
    assert status == 2 and "a decode step failed (no luck): repair" in json.loads(out[-1])["points"][0]["error"]
