"""What a calibration found out about a model's query heads and layers, and only for the model it saw."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.artefact import check_model, read_object
from checkpoints.config import ModelConfig
from checkpoints.errors import CheckpointError
from checkpoints.storage import atomic_file

HEAD_METHODS = ("r", "r2", "semantic")
METHODS = (*HEAD_METHODS, "layer_errors")
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class HeadImportance:
    """The scores of one method.

    Args:
        model_id: the model they were found on, as the user calls it.
        config_hash: `config_hash` of its configuration; "" in a published file, which does not say.
        tokenizer_hash: fingerprint of its tokenizer; "" likewise.
        method: "r" (retrieval), "r2" (retrieval and reasoning), "semantic" (attention to all of a needle, words around
            the answer included) or "layer_errors" (what compressing a layer alone costs its attention output).
        trials: prompts behind the scores, >= 1.
        scores_LN: per layer, per query head: finite, >= 0, higher matters more. Of "layer_errors", one number per layer
            (N = 1).
        provenance: free notes, e.g. command, date, prompts.

    Source:
        HeadKV, arXiv 2410.19258, section 3.1 (r, r2); CompressKV, arXiv 2508.02401 (semantic, layer_errors).
    """

    model_id: str
    config_hash: str
    tokenizer_hash: str
    method: str
    trials: int
    scores_LN: tuple[tuple[float, ...], ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)


def read_importance(
    path: Path, *, config: ModelConfig, tokenizer_hash: str | None = None, method: str = "r2"
) -> HeadImportance:
    """Read one method's scores, ours or in the published form {"layer-head": [one float per trial]}.

    Args:
        path: a json file.
        config: of the model that will use the scores.
        tokenizer_hash: of the same model; None leaves it unchecked.
        method: one of `METHODS`; a published file does not name its method and is taken to be any but "layer_errors".

    Returns:
        The scores.

    Raises:
        CheckpointError: as `read_all_importance`, **or** the method is not in the file.

    Example:
        >>> import tempfile
        >>> from checkpoints.config import RopeConfig
        >>> config = ModelConfig(
        ...     model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2,
        ...     num_kv_heads=1, head_dim=4, max_position=64, rms_norm_eps=1e-5, rope=RopeConfig(), tie_embeddings=True,
        ...     layer_windows=(None,))
        >>> path = Path(tempfile.mkdtemp()) / "published.json"
        >>> _ = path.write_text('{"0-1": [1.0, 3.0], "0-0": [0.0, 0.5]}')
        >>> read_importance(path, config=config).scores_LN
        ((0.25, 2.0),)
    """
    found = read_all_importance(path, config=config, tokenizer_hash=tokenizer_hash)
    if method not in found:
        raise CheckpointError(f"{path} has no scores of method {method!r}; it has {', '.join(found) or 'none'}")
    return found[method]


def read_all_importance(
    path: Path, *, config: ModelConfig, tokenizer_hash: str | None = None
) -> dict[str, HeadImportance]:
    """Read the scores of every method that a file has; older files have fewer.

    Args:
        path: a json file.
        config: of the model that will use the scores.
        tokenizer_hash: of the same model; None leaves it unchecked.

    Returns:
        Scores by method, in the order of `METHODS`.

    Raises:
        CheckpointError: no such file; not valid json; made for another model; not numbers that are finite and >= 0, per
            layer and query head, or per layer.
    """
    data = read_object(path, what="head importance file", holds="scores", recipe="calibrate_heads")
    if "methods" not in data:
        return _published(path, data, config)
    check_model(path, data, version=_VERSION, config=config, tokenizer_hash=tokenizer_hash, again="calibrate")
    methods, provenance = data["methods"], data.get("provenance", {})
    found = {}
    for method in METHODS:
        part = methods.get(method) if isinstance(methods, dict) else None
        if not isinstance(part, dict):
            continue
        trials = part.get("trials")
        if type(trials) is not int or trials < 1:
            raise CheckpointError(f"{path}: trials must be a positive integer, not {trials!r}")
        read = _layer_scores if method == "layer_errors" else _head_scores
        found[method] = HeadImportance(
            model_id=str(data.get("model_id")),
            config_hash=data["config_hash"],
            tokenizer_hash=str(data.get("tokenizer_hash")),
            method=method,
            trials=trials,
            scores_LN=read(path, part.get("scores"), config),
            provenance=provenance if isinstance(provenance, dict) else {},
        )
    return found


def write_importance(path: Path, scores: Sequence[HeadImportance]) -> None:
    """Write one file with the scores of one or more methods of one model; a crash leaves the old file or the new.

    Args:
        path: the json file.
        scores: of the same model, each method once; the provenance of the first is written.

    Raises:
        ValueError: nothing to write, two models, or one method twice.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "scores.json"
        >>> write_importance(path, [HeadImportance(
        ...     model_id="m", config_hash="c", tokenizer_hash="t", method="r2", trials=1, scores_LN=((0.5, 1.0),))])
        >>> json.loads(path.read_text())["methods"]["r2"]["scores"]
        [[0.5, 1.0]]
    """
    models = {(item.model_id, item.config_hash, item.tokenizer_hash) for item in scores}
    if len(models) != 1 or len({item.method for item in scores}) != len(scores):
        raise ValueError("scores must be of one model, each method once")
    data = {
        "version": _VERSION,
        "model_id": scores[0].model_id,
        "config_hash": scores[0].config_hash,
        "tokenizer_hash": scores[0].tokenizer_hash,
        "methods": {
            item.method: {
                "trials": item.trials,
                "scores": [row[0] for row in item.scores_LN] if item.method == "layer_errors" else item.scores_LN,
            }
            for item in scores
        },
        "provenance": scores[0].provenance,
    }
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def _published(path: Path, data: Mapping[str, Any], config: ModelConfig) -> dict[str, HeadImportance]:
    rows: dict[tuple[int, int], list[Any]] = {}
    for key, values in data.items():
        layer, dash, head = key.partition("-")
        if not (dash and layer.isdecimal() and head.isdecimal() and isinstance(values, list) and values):
            raise CheckpointError(
                f'{path} is not a head importance file: {key!r} is neither "methods" nor "layer-head": [scores]'
            )
        rows[int(layer), int(head)] = values
    wanted = {(layer, head) for layer in range(config.num_layers) for head in range(config.num_heads)}
    trials = {len(values) for values in rows.values()}
    if rows.keys() != wanted or len(rows) != len(data):
        layers, heads = (1 + max(place[at] for place in rows) for at in (0, 1))
        raise CheckpointError(
            f"{path} is of another model: it holds {len(data)} heads in {layers} layers x {heads}, and this model has "
            f"{config.num_layers} x {config.num_heads}"
        )
    if len(trials) != 1:
        raise CheckpointError(f"{path} is damaged: its heads have between {min(trials)} and {max(trials)} trials")
    table = [[rows[layer, head] for head in range(config.num_heads)] for layer in range(config.num_layers)]
    checked = [[_numbers(path, values) for values in row] for row in table]
    scores_LN = tuple(tuple(math.fsum(values) / len(values) for values in row) for row in checked)
    return {
        method: HeadImportance(
            model_id=path.stem,
            config_hash="",
            tokenizer_hash="",
            method=method,
            trials=min(trials),
            scores_LN=scores_LN,
            provenance={"form": "published"},
        )
        for method in HEAD_METHODS
    }


def _head_scores(path: Path, table: Any, config: ModelConfig) -> tuple[tuple[float, ...], ...]:
    rows = table if isinstance(table, list) else []
    if len(rows) != config.num_layers or any(not isinstance(row, list) or len(row) != config.num_heads for row in rows):
        raise CheckpointError(
            f"{path} is of another model: its scores are not a table of {config.num_layers} layers x "
            f"{config.num_heads} heads"
        )
    return tuple(_numbers(path, row) for row in rows)


def _layer_scores(path: Path, values: Any, config: ModelConfig) -> tuple[tuple[float, ...], ...]:
    if not isinstance(values, list) or len(values) != config.num_layers:
        raise CheckpointError(f"{path} is of another model: its layer errors are not {config.num_layers} numbers")
    return tuple((value,) for value in _numbers(path, values))


def _numbers(path: Path, values: list[Any]) -> tuple[float, ...]:
    for value in values:
        if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
            raise CheckpointError(f"{path} is damaged: a score must be a finite number >= 0, not {value!r}")
    return tuple(float(value) for value in values)
