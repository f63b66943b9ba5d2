"""Values taken out of somebody else's json or metadata, checked as they are taken."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError

MAX_LAYERS = 10_000
REQUIRED: Any = object()  # as a default: the value must be there


class Fields:
    """A json object or metadata whose values are checked when they are taken; null counts as absent."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def refuse(self, what: str) -> CheckpointError:
        """Make the error that names the file."""
        return CheckpointError(f"{self.where}: {what}")

    def get(self, key: str, default: Any = None) -> Any:
        """Take any value."""
        value = self.data.get(key)
        if value is None and default is REQUIRED:
            raise self.refuse(f"{key} is missing")
        return default if value is None else value

    def integer(self, key: str, default: Any = REQUIRED, most: int = 2**31 - 1) -> Any:
        """Take an integer from 1 to `most`."""
        value = self.get(key, default)
        if value is not default and (type(value) is not int or not 1 <= value <= most):
            raise self.refuse(f"{key} must be an integer from 1 to {most}, not {value!r}")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """Take a finite number >= 0, as a float."""
        value = self.get(key, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 <= value <= sys.float_info.max:
            raise self.refuse(f"{key} must be a number >= 0, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Take true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} must be true or false, not {value!r}")
        return value

    def factors(self, key: str, head_dim: int) -> tuple[float, ...]:
        """Take a list of head_dim / 2 positive numbers."""
        values = self.get(key, REQUIRED)
        good = isinstance(values, list) and all(type(v) in (int, float) and 0 < v <= sys.float_info.max for v in values)
        if not good or len(values) != head_dim // 2:
            raise self.refuse(f"{key} must be a list of {head_dim // 2} positive numbers")
        return tuple(float(value) for value in values)


def read_fields(path: Path) -> Fields:
    """Read a json object.

    Args:
        path: the file.

    Returns:
        Its fields; errors about them name the file.

    Raises:
        CheckpointError: not valid json, or not an object.
    """
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid json ({error}): fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a json object, not {type(data).__name__}")
    return Fields(data, str(path))
