"""Jobs on a Ray cluster give what they give here; who has no Ray is told how to get it."""

from __future__ import annotations

import json
import os
import sys
from functools import partial

import pytest

from recipes import leaderboard
from recipes.cluster import spread
from tests import tiny_chat

OPTIONS = ["--tokens", "900", "--question", "seen", "unseen", "--prompts", "2", "--caches", "headkv:window=8", "snapkv"]
OPTIONS += ["--budgets", "48", "--threads", "1"]


def test_who_lacks_ray_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert leaderboard.main(["--engine", "ray", "--model", "no-such", "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "pip install -c constraints.txt -e '.[ray]'" in capsys.readouterr().err


@pytest.fixture
def ray(monkeypatch):
    module = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    original = module.init
    monkeypatch.setattr(module, "init", partial(original, address="local", num_cpus=2))
    return module


def test_a_cluster_writes_the_rows_of_one_process(ray, one_thread, monkeypatch, tmp_path, capsys):
    model = tiny_chat.write(tmp_path / "tiny", max_position_embeddings=1000)
    scores = tiny_chat.write_scores(model, tmp_path / "scores.json")
    written = {}
    for engine in ("local", "ray"):
        output, table = tmp_path / f"{engine}.jsonl", tmp_path / f"{engine}.md"
        arguments = ["--model", str(model), "--importance", str(scores), *OPTIONS, "--engine", engine]
        arguments += ["--output", str(output), "--table", str(table)]
        assert leaderboard.main(arguments) == 0, capsys.readouterr().err
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        own = [{name: row.pop(name) for name in ("seconds", "command", "machine")} for row in rows]
        assert all(machine["machine"]["threads"] == 1 for machine in own)
        tables = [line for line in table.read_text().splitlines() if line.startswith("|")]
        written[engine] = sorted(map(json.dumps, rows)), tables
        if engine == "ray":  # what is done is not done again, so that nothing is started
            monkeypatch.setattr(ray, "init", None)
            assert leaderboard.main(arguments) == 0
            assert len(output.read_text().splitlines()) == len(rows) == 2 * 2 * 2
    assert written["ray"] == written["local"]


def sevenths(dies: bool):
    def do(job: int) -> list[float]:
        if dies:
            os._exit(1)
        if job == 0:
            raise ValueError("zero has no seventh")
        return [job / 7]

    return do


def test_failures_are_those_of_the_job(ray):
    fraction, dying = partial(sevenths, False), partial(sevenths, True)
    room = {"cpus": 1, "gpus": 0}
    with pytest.raises(ValueError, match="zero has no seventh"):
        list(spread(fraction, [7, 0], workers=1, **room))
    with pytest.raises(ChildProcessError, match="a worker was lost"):
        list(spread(dying, [7], workers=1, **room))
    with pytest.raises(ValueError, match="room for 2 workers of 1 CPUs"):
        list(spread(fraction, [7], workers=3, **room))
