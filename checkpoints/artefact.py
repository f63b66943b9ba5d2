"""What the files have in common that say something about one model: json that names the model it was made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints.config import ModelConfig, config_hash
from checkpoints.errors import CheckpointError


def read_object(path: Path, *, what: str, holds: str, recipe: str) -> dict[str, Any]:
    """Read a json object.

    Args:
        path: the file.
        what: it is said to be, for messages: "head importance file".
        holds: what an object of the kind must have: "scores".
        recipe: that makes such files.

    Raises:
        CheckpointError: no such file, **or** not valid json, **or** no object, **or** an empty one.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "scores.json"
        >>> _ = path.write_text('{"version": 1}')
        >>> read_object(path, what="head importance file", holds="scores", recipe="calibrate_heads")
        {'version': 1}
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read the {what} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid json ({error}): make it again with {recipe}") from error
    if not isinstance(data, dict) or not data:
        raise CheckpointError(f"{path} is not a {what}: it must hold a json object with {holds}")
    return data


def check_model(
    path: Path, data: dict[str, Any], *, version: int, config: ModelConfig, tokenizer_hash: str | None, again: str
) -> None:
    """Refuse what was made for another model.

    Args:
        path: the file, for messages.
        data: what it holds.
        version: that is supported.
        config: of the model that will use it.
        tokenizer_hash: of the same model; None leaves it unchecked.
        again: what to do instead: "calibrate".

    Raises:
        CheckpointError: another version, configuration or tokenizer.
    """
    if data.get("version") != version:
        raise CheckpointError(f"{path} has version {data.get('version')!r}: supported is {version}; {again} again")
    for part, stated, ours in (
        ("configuration", data.get("config_hash"), config_hash(config)),
        ("tokenizer", data.get("tokenizer_hash"), tokenizer_hash),
    ):
        if ours is not None and stated != ours:
            raise CheckpointError(
                f"{path} is of another model: it was made for {data.get('model_id')!r} with {part} "
                f"{str(stated)[:12]}, and this {config.model_type} model has {ours[:12]}; {again} this model's own"
            )
