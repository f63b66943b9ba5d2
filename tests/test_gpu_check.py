"""The recipe for a GPU, as far as it can be run without one: its cases, numbers, tables and options."""

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from recipes import gpu_check
from recipes.gpu_check import Case, attention_timings, bars, build, exact, graph_check, random_model, spread_lengths
from tests.test_graphs import record

CPU = torch.device("cpu")
TINY = {"heads": 6, "kv_heads": 3, "head_dim": 16}
CASES = [
    Case(batch=2, kept=9, ragged=False, **TINY),
    Case(batch=2, kept=40, ragged=True, **TINY),
    Case(batch=1, kept=300, ragged=True, **TINY),
    *(Case(batch=2, kept=40, ragged=True, bits=bits, **TINY) for bits in (8, 4)),
]


def one_second(run):
    run()
    return 1.0


def test_the_cases_are_what_the_bars_speak_of():
    made = gpu_check.cases()
    assert len(set(made)) == len(made)
    for even, uneven in zip(made[:-2:2], made[1:-2:2], strict=True):
        assert replace(even, ragged=True) == uneven
        assert spread_lengths(even).sum() == spread_lengths(uneven).sum()
        assert spread_lengths(uneven).min() >= 1 and spread_lengths(uneven).max() > 2 * uneven.kept
    nbytes = [4 * case.batch * case.kept * case.kv_heads * case.head_dim for case in made]
    assert sum(size >= gpu_check.LARGE for size in nbytes) >= 8 and max(nbytes) <= 2**30
    assert gpu_check.FLEX_SIZE in [(case.batch, case.kept) for case in made]


def test_everybody_computes_the_same():
    rows = list(attention_timings(CASES, CPU, torch.float32, one_second, bandwidth=100.0))
    assert not any("left_out" in row for row in rows)
    by_case = [
        {row["contender"] for row in rows if (row["kept"], row["bits"]) == pair}
        for pair in [(9, 16), (40, 16), (300, 16), (40, 8), (40, 4)]
    ]
    assert by_case == [{"ours", "SDPA", "FlexAttention"}, *[{"ours", "FlexAttention"}] * 2, {"ours"}, {"ours"}]
    assert all(row["error"] < (1e-5 if row["bits"] == 16 else 1e-4) for row in rows)
    filled = 2 * 3 * 9 * 2 * 16 * 4
    assert rows[0]["bytes"] >= filled and rows[0]["bandwidth_share"] == rows[0]["bytes"] / 100
    uneven = next(row for row in rows if row["kept"] == 40)
    even, *_ = attention_timings([replace(CASES[1], ragged=False)], CPU, torch.float32, one_second, bandwidth=1.0)
    assert uneven["bytes"] == even["bytes"]


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setitem(gpu_check.OTHERS, "SDPA", lambda problem: lambda: torch.zeros_like(problem.q_BND))
    monkeypatch.setitem(gpu_check.OTHERS, "FlexAttention", lambda problem: 1 / 0)
    rows = {
        row["contender"]: row for row in attention_timings(CASES[:1], CPU, torch.float32, one_second, bandwidth=1.0)
    }
    assert "off by 1.000" in rows["SDPA"]["left_out"] and "ms" not in rows["SDPA"]
    assert rows["FlexAttention"]["left_out"] == "division by zero" and rows["ours"]["ms"] == 1000


def test_regions_are_handed_out_in_pages():
    problem = build(CASES[1], CPU, torch.float32)
    k, v, counts = gpu_check.pages(problem, 16)
    assert k.shape == (sum(counts), 16, 1, 16)
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    for region, length, (start, end) in zip(problem.regions(problem.v), problem.lengths, pairwise(starts), strict=True):
        assert torch.equal(v[start:end].reshape(-1, 16)[:length], region) and end - start == -(-length // 16)


def attend(q_GD, k_SD, v_SD):
    return torch.softmax(q_GD @ k_SD.T * q_GD.shape[1] ** -0.5, -1) @ v_SD


def varlen_attn(q, k, v, ends_q, ends_k, most_q, most_k, *, enable_gqa):
    assert enable_gqa and q.shape[1:] == (2, 16) and k.shape[1:] == v.shape[1:] == (1, 16)
    assert most_q == 1 == int(ends_q.diff().max()) and most_k == int(ends_k.diff().max())
    assert ends_q.dtype == ends_k.dtype == torch.int32
    sequences = zip(q, pairwise(ends_k.tolist()), strict=True)
    return torch.stack([attend(q_GD, k[start:end, 0], v[start:end, 0]) for q_GD, (start, end) in sequences])


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table):
    assert q.shape[1:] == (1, 2, 16) and k_cache.shape[1:] == (256, 1, 16)
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    out = []
    for q_1GD, length, numbers in zip(q, cache_seqlens.tolist(), block_table.long(), strict=True):
        k_SD, v_SD = (cache[numbers].reshape(-1, 16)[:length] for cache in (k_cache, v_cache))
        out.append(attend(q_1GD[0], k_SD, v_SD)[None])
    return torch.stack(out)


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(self, workspace, layout):
        assert workspace.dtype == torch.uint8 and layout == "NHD"

    def plan(self, indptr, indices, last_page_len, heads, kv_heads, head_dim, page_size, *, q_data_type, kv_data_type):
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert (heads, kv_heads, head_dim, page_size) == (2, 1, 16, 16) and q_data_type == kv_data_type == torch.float32
        self.parts = [indices[start:end].long() for start, end in pairwise(indptr.tolist())]
        self.lengths = [
            16 * (len(part) - 1) + last for part, last in zip(self.parts, last_page_len.tolist(), strict=True)
        ]

    def run(self, q, caches):
        out = []
        for q_GD, part, length in zip(q, self.parts, self.lengths, strict=True):
            out.append(attend(q_GD, *(cache[part].reshape(-1, 16)[:length] for cache in caches)))
        return torch.stack(out)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_what_runs_on_a_gpu_alone_is_given_every_region(case, monkeypatch):
    """These stand-ins read their arguments as the packages' documentation says that they are read."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache))
    wrapper = {"BatchDecodeWithPagedKVCacheWrapper": BatchDecodeWithPagedKVCacheWrapper}
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(**wrapper))
    problem = build(case, CPU, torch.float32)
    for name in set(gpu_check.OTHERS) - set(gpu_check.ON_A_CPU):
        torch.testing.assert_close(gpu_check.OTHERS[name](problem)(), exact(problem), msg=name)


def test_the_exact_numbers_are_attention():
    problem = build(CASES[0], CPU, torch.float32)
    want = gpu_check.sdpa(problem)()
    torch.testing.assert_close(exact(problem), want)


def test_no_time_left_is_said():
    rows = list(attention_timings(CASES, CPU, torch.float32, one_second, bandwidth=1.0, deadline=0.0))
    assert [row["left_out"] for row in rows] == ["there was no time left"] * len(CASES)
    assert bars(rows)["bandwidth_share"] == {"worst": None, "limit": 0.7, "met": None}


def row(contender, ragged, ms, *, nbytes=2**28, share=0.8):
    found = {"batch": 16, "kept": 4096, "ragged": ragged, "bits": 16, "contender": contender, "bytes": nbytes}
    return found | {"ms": ms, "gbps": 1.0, "bandwidth_share": share, "error": 0.0}


def test_bars_take_the_worst_of_large_cases():
    rows = [
        row("ours", False, 1.00),
        row("ours", True, 1.04, share=0.75),
        row("FlexAttention", True, 3.0),
        row("FlashInfer", True, 0.90),
        row("ours", False, 1.0, nbytes=2**20, share=0.1),
    ]
    found = bars(rows)
    assert found["bandwidth_share"] == {"worst": 0.75, "limit": 0.7, "met": True}
    assert found["ragged_over_uniform"] == {"worst": 1.04, "limit": 1.05, "met": True}
    assert found["ragged_over_oracle"]["worst"] == pytest.approx(1.1556, abs=1e-4)
    assert not found["ragged_over_oracle"]["met"]
    assert found["peak_share"]["met"] is None
    assert bars(rows, peak_gbps=2.0)["peak_share"] == {"worst": 0.5, "limit": 0.7, "met": False}


@torch.inference_mode()  # as in the command
@pytest.mark.parametrize("cache", ["full", "snapkv:window=4,recent=4"])
def test_graphs_are_compared_with_steps(cache):
    config = replace(
        gpu_check.SMALL_LLAMA,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layer_windows=(None, None),
    )
    made = []

    def adjust(engine):
        engine._capture = lambda: lambda run: made.append(run) or record(run)

    loaded = random_model(config, CPU, torch.float32)
    found = graph_check(loaded, cache=cache, batch=3, prompt=20, steps=5, adjust=adjust)
    assert made and found["difference"] < 1e-5 and found["same_choices"]
    assert found["eager_tokens_per_s"] > 0 and found["graph_tokens_per_s"] > 0


def test_kernel_tests_are_counted():
    lines = [
        "tests/test_kernels.py::test_triton_form[a-lengths=[[1, 63]], D=64-float32] PASSED [  1%]",
        "tests/test_kernels.py::test_triton_form[a-no rows-float32] FAILED [  2%]",
        "tests/test_kernels.py::test_form_on_a_cpu[b] SKIPPED (there is none) [ 50%]",
        "tests/test_kernels.py::test_fake_form[b] ERROR [100%]",
        "FAILED tests/test_kernels.py::test_triton_form[a-no rows-float32] - AssertionError",
    ]
    told = []
    script = f"import os, sys; print(*{lines}, sep=chr(10)); sys.exit('TRITON_INTERPRET' in os.environ)"
    found = gpu_check.kernel_tests(told.append, command=[sys.executable, "-c", script])
    assert [found[word] for word in ("passed", "failed", "error", "skipped")] == [1, 1, 1, 1] and len(told) == 4
    assert found["names"][0].endswith("[a-no rows-float32]") and found["finished"]
    assert not gpu_check.kernel_tests(told.append, command=[sys.executable, "-c", "import sys; sys.exit(3)"])[
        "finished"
    ]


def test_the_report_ends_with_everything_in_one_line(capsys):
    graph = {"cache": "full", "batch": 1, "prompt": 10, "difference": 0.0, "same_choices": True}
    rates = {"eager_tokens_per_s": 10.0, "graph_tokens_per_s": 90.0, "first_graph_step_s": 1.0}
    left_out = {**row("FlashInfer", True, 1.0), "left_out": "it does not like this"}
    del left_out["ms"]
    rows = [
        row("ours", False, 1.25),
        left_out,
        {
            "batch": 1,
            "kept": 2,
            "ragged": True,
            "bits": 8,
            "contender": "everybody",
            "left_out": "there was no time left",
        },
    ]
    tests = {"passed": 5, "failed": 1, "error": 0, "skipped": 2, "names": ["a::b"], "finished": False, "seconds": 240.0}
    report = {"machine": {"device": "a GPU", "torch": "2"}, "tests": tests, "graphs": [graph | rates], "timings": rows}
    report |= {"bandwidth_gbps": 3000.0, "data_sheet_gbps": 3350.0, "bars": bars(rows, 3350.0)}
    gpu_check.show(report)
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == report
    for words in ("a GPU", "5 passed, 1 failed", "cut off", "1.2500", "it does not like this", "no time left", "3,000"):
        assert words in out
    assert re.search(r"bandwidth share: 0.80, the bar is 0.7", out)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({}, None),
        ({"tests": {"passed": 5, "failed": 0, "error": 0, "names": [], "finished": True}}, None),
        (
            {"tests": {"passed": 5, "failed": 1, "error": 1, "names": ["a::b"], "finished": True}},
            "2 kernel tests failed.*a::b",
        ),
        (
            {"tests": {"passed": 5, "failed": 0, "error": 0, "names": [], "finished": False}},
            "did not come to their end",
        ),
        ({"graphs": [{"cache": "full", "batch": 8, "difference": float("nan")}]}, "full, batch 8, are off by nan"),
        ({"timings": [row("FlashInfer", True, 1.0) | {"left_out": "no"}]}, None),
        ({"timings": [row("ours", True, 1.0) | {"left_out": "no"}]}, "ragged_decode, batch 16, 4096 kept: no"),
    ],
)
def test_what_is_a_fault(report, words):
    found = gpu_check.faults(report)
    assert bool(found) == bool(words) and (not words or re.search(words, found[0]))


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    out, err = capsys.readouterr()
    assert not out and re.fullmatch(r"recipes.gpu_check: PyTorch sees no CUDA device here: .*\n", err)
    assert (
        gpu_check.main(["--json", str(tmp_path / "none" / "file")]) == 2
        and "cannot be written" in capsys.readouterr().err
    )
    assert gpu_check.main(["--parts", "test"]) == 2 and "invalid choice" in capsys.readouterr().err
    assert gpu_check.main(["--help"]) == 0 and "--parts" in capsys.readouterr().out


def test_interpreted_kernels_are_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main([]) == 2 and "unset it" in capsys.readouterr().err


def test_all_parts_in_one_command(capsys, monkeypatch, tmp_path):
    """With a CPU in the GPU's place and everything small."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, stand_in in {"is_available": lambda: True, "current_device": lambda: 0}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "device", lambda *_: CPU)
    monkeypatch.setattr(
        gpu_check,
        "kernel_tests",
        lambda tick: (
            tick("one")
            or {"passed": 1, "failed": 0, "error": 0, "skipped": 0, "names": [], "finished": True, "seconds": 1.0}
        ),
    )
    monkeypatch.setattr(gpu_check, "random_model", lambda *_: None)
    monkeypatch.setattr(
        gpu_check,
        "graph_check",
        lambda loaded, **kind: {
            "cache": kind["cache"],
            "batch": kind["batch"],
            "difference": 0.0,
            "same_choices": True,
            "eager_tokens_per_s": 1.0,
            "graph_tokens_per_s": 2.0,
        },
    )
    monkeypatch.setattr(gpu_check, "GraphTimer", lambda device: one_second)
    monkeypatch.setattr(gpu_check, "measured_bandwidth", lambda device, timer: 1e9)
    monkeypatch.setattr(gpu_check, "cases", lambda: CASES)
    file = tmp_path / "gpu.json"
    assert gpu_check.main(["--json", str(file)]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert report == json.loads(file.read_text()) and not err
    assert report["tests"]["passed"] == 1 and len(report["graphs"]) == 4 and len(report["timings"]) == 9
    assert set(report) >= {"machine", "commit", "command", "bandwidth_gbps", "bars", "seconds"}
    assert gpu_check.main(["--parts", "graphs"]) == 0
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == {
        "machine",
        "commit",
        "command",
        "graphs",
        "seconds",
    }


def test_bandwidth_is_the_better_of_copies_and_sums():
    assert gpu_check.measured_bandwidth(CPU, lambda run: (run(), 0.5)[1], nbytes=2**12) == 2 * 2**12 / 0.5
