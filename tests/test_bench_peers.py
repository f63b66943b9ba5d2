"""Other programs get our weights and compute what we do; who is absent or broken costs nobody else a result."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import recipes.bench_peers as bench_peers
from checkpoints.config import load_config
from checkpoints.weights import load_state
from recipes.peers import PEERS, LlamaCpp, Ours, Peer, Point, Shared, write_gguf
from tests import tiny
from zoo import Loaded
from zoo.family import Decoder

POINT = Point(context=40, batch=2, new_tokens=6, budget=24, threads=1)
MODELS = ["llama/plain", "llama/tied", "llama/both-biases", "mistral/theta", "qwen2/plain", "qwen3/wide-heads"]
ATOL = 1e-4


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return tiny_model(request.param, tmp_path_factory.mktemp("model"))


def tiny_model(name: str, directory: Path, **changes: Any) -> Loaded:
    return tiny.load(tiny.write(directory, tiny.config_json(*name.split("/")) | changes))


def prompts() -> torch.Tensor:
    return torch.tensor([tiny.tokens(POINT.context), tiny.tokens(POINT.context, "another")])


def assert_computes_what_we_do(contender: Any, loaded: Loaded, steps: int = POINT.new_tokens) -> None:
    """Twice, since a benchmark prefills several times."""
    ours = Ours(loaded, POINT, cache="full", compile=False)
    for _ in range(2):
        expected = ours.prefill(prompts())
        torch.testing.assert_close(contender.prefill(prompts()), expected, atol=ATOL, rtol=0)
        for _ in range(steps):
            token_B = expected.argmax(-1)
            expected = ours.step(token_B)
            torch.testing.assert_close(contender.step(token_B), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_loader_reads_the_gguf_file_back(loaded: Loaded, dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    state = {name: tensor.to(dtype) for name, tensor in loaded.model.state_dict().items()}
    model = Decoder(loaded.config)
    model.load_state_dict(state, assign=True)
    write_gguf(replace(loaded, model=model), file)
    config = load_config(file)
    again = load_state(file, config, dtype=dtype, progress=False)
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor), name
    assert replace(config, model_type="", dtype="") == replace(loaded.config, model_type="", dtype="")


def test_transformers_computes_what_we_do_on_our_tensors(loaded: Loaded) -> None:
    pytest.importorskip("transformers")
    shared = Shared(loaded)
    assert_computes_what_we_do(PEERS["transformers"].make(shared, POINT), loaded)
    mine = {tensor.untyped_storage().data_ptr() for tensor in loaded.model.parameters()}
    assert {tensor.untyped_storage().data_ptr() for tensor in shared.transformers.parameters()} == mine


def test_llama_cpp_computes_what_we_do(loaded: Loaded) -> None:
    pytest.importorskip("llama_cpp")
    assert_computes_what_we_do(LlamaCpp(Shared(loaded), POINT), loaded)


def test_kvpress_keeps_the_budget_and_goes_on_behind_the_prompt(tmp_path: Path) -> None:
    pytest.importorskip("kvpress")
    loaded = tiny_model("llama/plain", tmp_path)
    contender = PEERS["kvpress"].make(Shared(loaded), POINT)
    assert_computes_what_we_do(contender, loaded, steps=0)
    contender.step(torch.tensor([1, 2]))
    assert {layer.keys.shape[2] for layer in contender._cache.layers} == {POINT.budget + 1}
    assert contender._position.tolist() == [POINT.context]


def test_a_static_cache_is_compiled_for_once(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    loaded = tiny_model("llama/plain", tmp_path, num_hidden_layers=1)
    contender = PEERS["static"].make(Shared(loaded), POINT)
    contender.prefill(prompts())
    contender.step(prompts()[:, 0])
    graphs = counters["stats"]["unique_graphs"]
    assert graphs
    assert_computes_what_we_do(contender, loaded)
    assert counters["stats"]["unique_graphs"] == graphs


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    loaded = tiny_model("llama/plain", tmp_path)
    ours = Ours(loaded, POINT, cache="full", compile=False)
    expected, tokens_SB = bench_peers.reference(ours, prompts(), 3)
    assert tokens_SB.shape == (3, 2)
    lane = bench_peers.Lane(name="peer", cache="full", make=lambda: ours)
    bench_peers.check(lane, prompts(), expected, 1e-5)
    loaded.model.blocks[1].attention.qkv.weight.data[0] *= -1
    with pytest.raises(ValueError, match="logits differ from ours by"):
        bench_peers.check(lane, prompts(), expected, 1e-2)


def test_ratios_are_the_peers_time_by_ours() -> None:
    def lane(name: str, cache: str, step_ms: list[float], prefill_s: float, **rest: Any) -> bench_peers.Lane:
        contender = type("Fake", (), {"lossless": cache == "full", "note": "n"})()
        made = bench_peers.Lane(name=name, cache=cache, make=lambda: contender, **rest)
        made.contender, made.step_ms, made.prefill_s = contender, step_ms, [prefill_s] * 3
        return made

    lanes = [
        lane("ours", "full", [4.0, 2.0, 3.0], 1.0),
        lane("ours", "headkv", [1.5] * 3, 1.25),
        lane("kvpress", "snapkv", [6.0] * 3, 2.0),
        lane("llama.cpp", "full", [], 0.0, error="it | broke", left_out="it | broke"),
        lane("transformers", "full", [], 0.0, left_out="no use"),
    ]
    rows = bench_peers.summarize(lanes, budget=128)
    assert [row["contender"] for row in rows] == ["ours", "ours", "kvpress", "llama.cpp"]
    assert rows[2]["decode_ratio"] == {"full": 2.0, "headkv": 4.0} and rows[2]["prefill_ratio"]["headkv"] == 1.6
    assert rows[0]["decode_ms"] == 3.0 and rows[0]["decode_ms_p10"] == pytest.approx(2.2)
    assert [row.get("budget") for row in rows] == [None, 128, 128, None]
    text = bench_peers.table([row | {"dtype": "float32", "context": 8, "batch": 1} for row in rows])
    assert "| kvpress, budget 128 | 6.0 [6.0, 6.0] | 2.00 | 4.00 | 2.00 | 2.00 | 1.60 |" in text
    assert "it \\| broke" in text and len({line.replace("\\|", "").count("|") for line in text.splitlines()}) == 1


class Twin(Ours):
    """A peer that is ours; fails where it is told to."""

    def __init__(self, shared: Shared, point: Point) -> None:
        super().__init__(shared.loaded, point, cache="full", compile=False)


class Stumbling(Twin):
    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("it\nstumbled")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command with peers of our own beside a tiny model; gives the exit status and the rows."""
    loaded = tiny_model("llama/plain", tmp_path)
    monkeypatch.setattr(bench_peers, "PAUSE_S", 0)
    monkeypatch.setattr(bench_peers, "load", lambda *_, **__: loaded)
    for name, make in {"twin": Twin, "stumbling": Stumbling}.items():
        monkeypatch.setitem(PEERS, name, Peer(module="torch", extra="none", make=make))
    threads, output = torch.get_num_threads(), tmp_path / "rows.jsonl"
    usual = ["--dtype", "float32", "--context", "40", "50", "--steps", "2", "--rounds", "2", "--no-compile"]
    usual += ["--cache", "full", "snapkv:window=8,recent=8", "--budget", "24", "--threads", str(threads)]

    def call(*options: str) -> tuple[int, list[dict[str, Any]]]:
        status = bench_peers.main([*usual, "--output", str(output), *options])
        return status, [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []

    return call


def test_rows_say_where_they_come_from(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run("--peers", "twin", "--table", str(tmp_path / "table.md"))
    assert status == 0 and len(rows) == 2 * 3
    assert [row["context"] for row in rows] == [40] * 3 + [50] * 3
    for row in rows:
        assert row["timed_steps"] == 4 and len(row["prefill_all_s"]) == 3 and row["logits_difference"] < 1e-4
        assert row["decode_ms_p10"] <= row["decode_ms"] <= row["decode_ms_p90"]
        assert "--peers twin" in row["command"] and row["versions"]["torch"] == torch.__version__
    assert (tmp_path / "table.md").read_text() == capsys.readouterr().out
    _, more = run("--peers", "twin")
    assert more[:6] == rows and len(more) == 12


def test_absent_peers_are_named_and_left_out(
    run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    status, rows = run("--peers", "llama.cpp", "twin")
    assert status == 0 and {row["contender"] for row in rows} == {"ours", "twin"}
    assert capsys.readouterr().err == "llama.cpp is not installed and left out: pip install -e '.[llama-cpp]'\n"


def test_a_peer_that_ends_the_process_is_left_out(
    run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "aborting.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(Peer, "is_installed", lambda peer: True)
    monkeypatch.setitem(PEERS, "aborting", Peer(module="aborting", extra="none", make=Twin))
    status, rows = run("--peers", "aborting", "twin")
    assert status == 0 and {row["contender"] for row in rows} == {"ours", "twin"}
    assert capsys.readouterr().err.startswith("aborting is left out: importing aborting ends Python by SIGABRT")


def test_a_broken_peer_costs_only_its_own_results(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run("--peers", "stumbling", "twin")
    assert status == 2 and len(rows) == 2 * 4
    for row in rows:
        assert ("error" in row) == (row["contender"] == "stumbling")
        assert "error" not in row or row["error"] == "RuntimeError: it stumbled"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "stumbling is left out at float32, context 40: RuntimeError: it stumbled"
    assert len(lines) == 3 and "stumbling failed" in lines[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache", "snapkw"], "snapkw"),
        (["--dtype", "float8"], "float8"),
        (["--peers", "vllm"], "vllm"),
        (["--context", "0"], "'0' is not a whole number"),
        (["--context", "2000000000"], r"take [\d,]+ bytes and [\d,]+ are free"),
        (["--budget", "2"], "raise the budget"),
        (["--table", "/nowhere/table.md"], "no folder /nowhere"),
    ],
)
def test_bad_options_are_one_line(
    run: Any, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    status, rows = run("--peers", "twin", *options)
    captured = capsys.readouterr()
    assert status == 2 and not rows and captured.out == ""
    assert captured.err.count("\n") == 1 and re.search(message, captured.err)


def test_spinning_threads_are_refused(
    run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert run("--peers", "twin") == (2, [])
    assert "OMP_WAIT_POLICY" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama/rope-linear", "mistral/window"])
def test_models_that_cannot_be_handed_on_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scaled RoPE or sliding windows"):
        Shared(tiny_model(name, tmp_path))
