"""One file per published compression method, found by its name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from layers.compress.scoring import Scoring
from layers.methods.base import Method


def method_names() -> list[str]:
    """Names of all methods, sorted.

    Example:
        >>> "headkv" in method_names()
        True
    """
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def build_method(spec: str, importance: Mapping[str, Tensor] | None = None) -> Method:
    """Make a method from its name and options.

    Args:
        spec: a name, or a name with options: "headkv:beta=1.1,scores=r". Options are the keyword arguments of the
            method's `build`.
        importance: (L, N) query-head scores by kind ("r", "r2"), for methods that need them.

    Returns:
        The method.

    Raises:
        ValueError: no such method, **or** no such option, **or** an option's value cannot be read, **or** the method
            needs importance scores that are not given.

    Example:
        >>> build_method("snapkv:window=16").scorer.window
        16
    """
    name, _, tail = spec.partition(":")
    if name not in method_names():
        raise ValueError(f"no cache method is called {name!r}: choose from {', '.join(method_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    parameters = inspect.signature(module.build).parameters
    types = {key: str(p.annotation) for key, p in parameters.items() if key not in ("importance", "scoring")}
    scoring_types = {f.name: str(f.type) for f in fields(Scoring)} if "scoring" in parameters else {}
    presets = {"preset": "str"} if scoring_types else {}
    options = _read_options(name, tail, types | scoring_types | presets)

    arguments: dict[str, object] = {key: value for key, value in options.items() if key in types}
    if scoring_types:
        preset = options.get("preset")
        if preset is not None and preset not in module.PRESETS:
            raise ValueError(f"{name} has no preset {preset!r}: choose from {', '.join(module.PRESETS)}")
        scoring = module.PRESETS[preset] if preset else parameters["scoring"].default
        arguments["scoring"] = replace(scoring, **{k: v for k, v in options.items() if k in scoring_types})
    if "importance" in parameters:
        arguments["importance"] = importance or {}
    method: Method = module.build(**arguments)
    return method


def needs_importance(spec: str) -> bool:
    """Whether a method's budgets need head-importance scores.

    Example:
        >>> needs_importance("headkv:beta=2"), needs_importance("snapkv")
        (True, False)
    """
    name = spec.partition(":")[0]
    if name not in method_names():
        return False
    return "importance" in inspect.signature(importlib.import_module(f"{__name__}.{name}").build).parameters


def _read_options(method: str, text: str, types: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key not in types or not equals:
            known = f"write name=value with {', '.join(types)}" if types else "it takes none"
            raise ValueError(f"{method} has no option {item!r}: {known}")
        try:
            options[key] = _READERS.get(types[key], str)(value)
        except (ValueError, KeyError):
            raise ValueError(f"{method}: option {key} takes {types[key]}, not {value!r}") from None
    return options


_READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
}
