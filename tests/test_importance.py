"""Head-importance files: written and read back, the published form, and every file that must be refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import (
    CheckpointError,
    HeadImportance,
    config_hash,
    read_all_importance,
    read_importance,
    write_importance,
)
from checkpoints.config import ModelConfig, RopeConfig

CONFIG = ModelConfig(
    model_type="llama", vocab_size=48, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=128, rms_norm_eps=1e-5, rope=RopeConfig(), tie_embeddings=False,
    layer_windows=(None,) * 3,
)  # fmt: skip
R2 = HeadImportance(
    model_id="tiny", config_hash=config_hash(CONFIG), tokenizer_hash="t" * 64, method="r2", trials=20,
    scores_LN=((0.0, 0.25, 1.0, 3.5), (1e-9, 2.0, 0.1, 0.2), (0.3, 0.4, 0.5, 1e9)),
    provenance={"command": "calibrate", "date": "2025-01-01", "prompts": ["a", "b"]},
)  # fmt: skip
R = replace(R2, method="r", trials=7, scores_LN=((0.5,) * 4,) * 3)
SEMANTIC = replace(R2, method="semantic", trials=5)
ERRORS = replace(R2, method="layer_errors", trials=4, scores_LN=((0.5,), (0.0,), (0.25,)))


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        read_importance(path, **{"config": CONFIG, **options})
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_importance(path, [R2, R])
    assert read_importance(path, config=CONFIG) == R2
    assert read_importance(path, config=CONFIG, method="r", tokenizer_hash="t" * 64) == R
    assert [file.name for file in tmp_path.iterdir()] == ["scores.json"]
    write_importance(path, [R])
    assert "no scores of method 'r2'; it has r" in refused(path)


def test_all_kinds_or_those_of_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_importance(path, [R2, ERRORS, SEMANTIC, R])
    assert json.loads(path.read_text())["methods"]["layer_errors"] == {"trials": 4, "scores": [0.5, 0.0, 0.25]}
    assert read_importance(path, config=CONFIG, method="layer_errors") == ERRORS
    found = read_all_importance(path, config=CONFIG, tokenizer_hash="t" * 64)
    assert found == {"r": R, "r2": R2, "semantic": SEMANTIC, "layer_errors": ERRORS}
    write_importance(path, [R, R2])
    assert read_all_importance(path, config=CONFIG) == {"r": R, "r2": R2}
    assert "no scores of method 'semantic'; it has r, r2" in refused(path, method="semantic")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.1, 0.2], "its layer errors are not 3 numbers"),
        ([[0.1], [0.2], [0.3]], "finite number >= 0, not [0.1]"),
        ([0.1, -0.2, 0.3], "finite number >= 0, not -0.2"),
        (0.5, "its layer errors are not 3 numbers"),
        (None, "its layer errors are not 3 numbers"),
    ],
)
def test_damaged_layer_errors(tmp_path: Path, scores: Any, message: str) -> None:
    data = document()
    data["methods"]["layer_errors"] = {"trials": 1, "scores": scores}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    assert message in refused(path)


def test_the_same_model_in_another_format_or_dtype(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_importance(path, [R2])
    assert read_importance(path, config=replace(CONFIG, dtype="bfloat16", max_position=64)) == R2


def test_another_model(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_importance(path, [R2])
    other = replace(CONFIG, intermediate_size=97)
    message = refused(path, config=other)
    assert "of another model: it was made for 'tiny'" in message
    assert config_hash(CONFIG)[:12] in message and config_hash(other)[:12] in message
    message = refused(path, tokenizer_hash="u" * 64)
    assert "tokenizer tttttttttttt" in message and "uuuuuuuuuuuu" in message


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    for scores in ([], [R2, R2], [R2, replace(R, model_id="other")], [replace(R2, scores_LN=((float("nan"),),))]):
        with pytest.raises(ValueError):
            write_importance(path, scores)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError):
        write_importance(tmp_path / "absent" / "scores.json", [R2])


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_importance(path, [R2])
    with pytest.raises(ValueError):
        write_importance(path, [replace(R2, scores_LN=((float("inf"),),))])
    assert read_importance(path, config=CONFIG) == R2 and len(list(tmp_path.iterdir())) == 1


def document() -> dict[str, Any]:
    return {
        "version": 1, "model_id": "tiny", "config_hash": config_hash(CONFIG), "tokenizer_hash": "t" * 64,
        "methods": {"r2": {"trials": 3, "scores": [[0.5] * 4] * 3}}, "provenance": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("version", 2, "version 2: supported is 1"),
        ("version", None, "version None"),
        ("config_hash", None, "of another model"),
        ("config_hash", 3, "of another model"),
        ("methods", {}, "it has none"),
        ("methods", [], "it has none"),
        ("methods", {"r2": []}, "no scores of method"),
        ("trials", 0, "trials must be a positive integer"),
        ("trials", True, "trials must be a positive integer"),
        ("trials", "3", "trials must be a positive integer"),
        ("scores", None, "3 layers x 4 heads"),
        ("scores", [[0.5] * 4] * 2, "3 layers x 4 heads"),
        ("scores", [[0.5] * 3] * 3, "3 layers x 4 heads"),
        ("scores", [[0.5] * 4, [0.5] * 4, 3], "3 layers x 4 heads"),
        ("scores", {"0": [0.5] * 4}, "3 layers x 4 heads"),
        *(
            ("scores", [[0.5] * 4, [0.5, bad, 0.5, 0.5], [0.5] * 4], "a score must be a finite number >= 0")
            for bad in (float("nan"), float("inf"), -0.1, True, "0.5", None, [0.5], 10**400)
        ),
    ],
)
def test_damaged(tmp_path: Path, place: str, value: Any, message: str) -> None:
    data = document()
    target = data["methods"]["r2"] if place in ("trials", "scores") else data
    target[place] = value
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    assert message in refused(path)


def test_the_undamaged_document_is_read(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(document()))
    assert read_importance(tmp_path / "scores.json", config=CONFIG).scores_LN == ((0.5,) * 4,) * 3


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"3", b"\xff\xfe", b"null", b"[" * 100_000, b'{"0-0": "x"}']
)
def test_not_importance(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    refused(path)


def test_no_file(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "absent.json")
    assert "cannot read" in refused(tmp_path)


# The published form


def published(layers: int = 3, heads: int = 4, trials: int = 5) -> dict[str, Any]:
    rng = random.Random(0)
    keys = [f"{layer}-{head}" for layer in range(layers) for head in range(heads)]
    rng.shuffle(keys)  # the order says nothing
    return {key: [rng.random() for _ in range(trials)] for key in keys}


def test_published_form(tmp_path: Path) -> None:
    data = published()
    path = tmp_path / "tiny_retrieval_reasoning_heads.json"
    path.write_text(json.dumps(data))
    got = read_importance(path, config=CONFIG, tokenizer_hash="any", method="r")
    assert (got.trials, got.method, got.model_id) == (5, "r", path.stem)
    assert [*read_all_importance(path, config=CONFIG)] == ["r", "r2", "semantic"]
    for layer in range(3):
        for head in range(4):
            values = data[f"{layer}-{head}"]
            assert got.scores_LN[layer][head] == pytest.approx(sum(values) / 5, rel=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("2-3"), "holds 11 heads in 3 layers x 4, and this model has 3 x 4"),
        (lambda data: data.update({"3-0": [1.0] * 5}), "holds 13 heads in 4 layers x 4"),
        (lambda data: data.update({"01-1": [1.0] * 5}), "holds 13 heads"),
        (lambda data: data.update({"0-0": []}), '"layer-head": [scores]'),
        (lambda data: data.update({"0-0": [1.0]}), "between 1 and 5 trials"),
        (lambda data: data.update({"0-0": 1.0}), '"layer-head": [scores]'),
        (lambda data: data.update({"a-b": [1.0] * 5}), '"layer-head": [scores]'),
        (lambda data: data.update({"-1-0": [1.0] * 5}), '"layer-head": [scores]'),
        (lambda data: data.update({"0": [1.0] * 5}), '"layer-head": [scores]'),
        (lambda data: data.update({"0-0": [1.0, float("nan"), 1.0, 1.0, 1.0]}), "finite number >= 0, not nan"),
        (lambda data: data.update({"0-0": [1.0, -1.0, 1.0, 1.0, 1.0]}), "finite number >= 0, not -1.0"),
        (lambda data: data.update({"0-0": [1.0, True, 1.0, 1.0, 1.0]}), "finite number >= 0, not True"),
    ],
)
def test_published_form_refused(tmp_path: Path, change: Any, message: str) -> None:
    data = published()
    change(data)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    assert message in refused(path)


def test_published_form_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(published(4, 3)))  # as many heads in all
    assert "holds 12 heads in 4 layers x 3, and this model has 3 x 4" in refused(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["methods", "r2", "version", "trials", "scores", "0-0", "1-2"]), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["", "version", "methods", "r2", "trials", "scores", "config_hash", "provenance"]), JSON)
def test_any_json_is_read_or_refused(tmp_path: Path, place: str, value: Any) -> None:
    data: Any = document()
    if place == "":
        data = value
    elif place in ("trials", "scores"):
        data["methods"]["r2"][place] = value
    elif place == "r2":
        data["methods"]["r2"] = value
    else:
        data[place] = value
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(data))
    try:
        got = read_importance(path, config=CONFIG)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert len(got.scores_LN) == 3 and all(len(row) == 4 for row in got.scores_LN)
