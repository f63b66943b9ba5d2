"""Pictures are made of the rows that recipes write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recipes.plot as plot

PEERS = Path(__file__).parents[1] / "recipes" / "results" / "bench_peers.jsonl"


@pytest.fixture
def needles(tmp_path):
    rows = [
        {
            "tokens": tokens,
            "question": question,
            "prompt_sha256": f"{tokens}/{index}",
            "model": "some",
            "split": "tune",
            "task": "noise",
            "kind": "number",
            "depth": (index + 0.5) / 6,
            "mebibytes": {"full": {str(tokens): 9.0}, "headkv": {"32": 1.0, "64": 2.0}},
            "results": {"full": {str(tokens): [1, 0.1]}, "headkv": {"32": [index % 2, 0.5], "64": [1, 0.2]}},
        }
        for tokens in (100, 200)
        for question in ("seen", "unseen")
        for index in range(6)
    ]
    file = tmp_path / "needles.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_report_holds_all_pictures(needles, tmp_path, capsys):
    arguments = ["--scores", str(needles), "--peers", str(PEERS), "--budget", "64", "--output", str(tmp_path / "out")]
    assert plot.main(arguments) == 0
    names = [f"quality_{n}_{q}" for q in ("seen", "unseen") for n in (100, 200)]
    names += ["depths_64_seen", "depths_64_unseen", "speed"]
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == set(names)
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == len(names) and "http" not in report
    assert "7 pictures" in capsys.readouterr().out


def test_quality_shows_the_numbers(needles):
    rows = [row for row in plot.read_rows(needles) if row["tokens"] == 100 and row["question"] == "seen"]
    left, right = plot.quality(rows).axes
    accuracy, more_nll = (axes.lines[0].get_ydata().tolist() for axes in (left, right))
    assert accuracy == [0.5, 1.0] and more_nll == pytest.approx([0.4, 0.1])
    depths = plot.depths(rows, 32).axes[0]
    assert [text.get_text() for text in depths.texts] == [
        "1/1",
        "1/1",
        "2/2",
        "1/1",
        "1/1",
        "0/1",
        "1/1",
        "1/2",
        "0/1",
        "1/1",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "nothing to plot"), (["--scores", "/nowhere.jsonl"], "no file /nowhere.jsonl")],
)
def test_what_cannot_be_plotted_is_said(arguments, message, capsys):
    assert plot.main(arguments) == 2
    assert message in capsys.readouterr().err
