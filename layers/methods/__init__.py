"""One file per published compression method, found by its name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from layers.compress.allocators import uniform
from layers.compress.scoring import Scoring
from layers.methods.base import Allocate, Method


def method_names() -> list[str]:
    """Names of all methods, sorted.

    Example:
        >>> "headkv" in method_names(), "expected-attention" in method_names()
        (True, True)
    """
    files = (module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")
    return sorted(file.replace("_", "-") for file in files)


def allocator_names() -> list[str]:
    """Names that the option `allocator` may have: that of equal budgets and those of methods with budgets of their own.

    Example:
        >>> allocator_names()
        ['adakv', 'cake', 'compresskv', 'headkv', 'headkv-r2', 'pyramidkv', 'uniform']
    """
    return sorted(["uniform", *(name for name in method_names() if hasattr(_module(name), "allocate"))])


def build_method(spec: str, importance: Mapping[str, Tensor] | None = None) -> Method:
    """Make a method from its name and options.

    Args:
        spec: a name, or a name with options: "headkv:beta=1.1,scores=r". Options are the keyword arguments of the
            method's `build` and `allocate`. Its scores go with the budgets of any other: "snapkv:allocator=headkv".
            A method that changes others (its file has `wrap`) stands before the one that it changes, with a plus.
        importance: what calibration found, by kind: (L, N) query-head scores ("r", "r2", "semantic") and (L,)
            "layer_errors", for methods and budgets that need them.

    Returns:
        The method.

    Raises:
        ValueError: no such method or allocator, **or** no such option, **or** an option is given twice, **or** its
            value cannot be read or is out of range, **or** scores or budgets need importance that is not given.

    Example:
        >>> build_method("snapkv:window=16").scorer.window
        16
        >>> build_method("snapkv:allocator=adakv,alpha=0.5").allocator
        LayerTopK(alpha=0.5, protected=32, compat=False)
    """
    outer, plus, inner = spec.partition("+")
    name, _, tail = outer.partition(":")
    if plus and not (outer and inner):
        raise ValueError(f"{spec!r} lacks a method on one side of the plus: write {_CHANGED}")
    if name not in method_names():
        raise ValueError(f"no cache method is called {name!r}: choose from {', '.join(method_names())}")
    module = _module(name)
    if hasattr(module, "wrap"):
        changed = build_method(inner if plus else module.CHANGES, importance)
        options = _read_options(name, tail, _option_types(module.wrap))
        return _made(outer, lambda: module.wrap(changed, **options))
    if plus:
        raise ValueError(f"{name} is complete and changes no other method: instead of {spec!r}, write {_CHANGED}")
    return _made(outer, lambda: _build(name, tail, importance or {}))


_CHANGED = "what changes before what is changed, as in criticalkv+snapkv or kvsharer+headkv"


def _made(spec: str, make: Callable[[], Method]) -> Method:
    """Make a method; who refuses a number need not know of what it is an option, so this says it."""
    try:
        return make()
    except ValueError as error:
        known = str(error).startswith(spec.partition(":")[0])
        raise ValueError(f"{error}" if known else f"{spec}: {error}") from None


def _build(name: str, tail: str, importance: Mapping[str, Tensor]) -> Method:
    module = _module(name)
    parameters = inspect.signature(module.build).parameters
    allocate = _allocate(name, tail)
    types = _option_types(module.build)
    allocator_types = {"allocator": "str", **_option_types(allocate)} if allocate else {}
    scoring_types = {f.name: str(f.type) for f in fields(Scoring)} if "scoring" in parameters else {}
    presets = {"preset": "str"} if scoring_types else {}
    options = _read_options(name, tail, allocator_types | types | scoring_types | presets)

    arguments: dict[str, object] = {key: value for key, value in options.items() if key in types}
    if "importance" in parameters:
        arguments["importance"] = importance
    if scoring_types:
        preset = options.get("preset")
        if preset is not None and preset not in module.PRESETS:
            raise ValueError(f"{name} has no preset {preset!r}: choose from {', '.join(module.PRESETS)}")
        scoring = module.PRESETS[preset] if preset else parameters["scoring"].default
        arguments["scoring"] = replace(scoring, **{k: v for k, v in options.items() if k in scoring_types})
    if allocate:
        chosen = {k: v for k, v in options.items() if k in allocator_types and k != "allocator"}
        if _takes_importance(allocate):
            chosen["importance"] = importance
        arguments["allocator"] = partial(allocate, **chosen)
    method: Method = module.build(**arguments)
    return method


def needs_importance(spec: str) -> bool:
    """Whether a method's scores or budgets need what calibration found; False for what is no method.

    Example:
        >>> needs_importance("headkv:beta=2"), needs_importance("snapkv"), needs_importance("snapkv:allocator=headkv")
        (True, False, True)
    """
    outer, plus, inner = spec.partition("+")
    name, _, tail = outer.partition(":")
    if name in method_names() and hasattr(_module(name), "wrap"):
        return needs_importance(inner if plus else _module(name).CHANGES)
    try:
        allocate = _allocate(name, tail) if name in method_names() else None
    except ValueError:
        return False
    return allocate is not None and (_takes_importance(allocate) or _takes_importance(_module(name).build))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")


def _allocate(name: str, options: str) -> Allocate | None:
    """What makes the budgets of a method with these options; None if it takes no budgets of others.

    Raises:
        ValueError: there are no such budgets.
    """
    parameter = inspect.signature(_module(name).build).parameters.get("allocator")
    chosen = dict(item.partition("=")[::2] for item in options.split(",")).get("allocator")
    if parameter is None:
        return None
    if chosen is not None and chosen not in allocator_names():
        raise ValueError(f"{name} has no allocator {chosen!r}: choose from {', '.join(allocator_names())}")
    allocate: Allocate = parameter.default
    if chosen is not None:
        allocate = uniform if chosen == "uniform" else _module(chosen).allocate
    return allocate


def _takes_importance(function: Callable[..., object]) -> bool:
    return "importance" in inspect.signature(function).parameters


def _option_types(function: Callable[..., object]) -> dict[str, str]:
    """Types of the arguments that a user may set."""
    made_here = ("importance", "scoring", "allocator", "protected", "method")
    return {key: str(p.annotation) for key, p in inspect.signature(function).parameters.items() if key not in made_here}


def _read_options(method: str, text: str, types: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        if key in types and not equals:
            raise ValueError(f"{method}: option {key} needs a value: write {key}=...")
        if key not in types:
            known = f"write name=value with {', '.join(types)}" if types else "it takes none"
            raise ValueError(f"{method} has no option {item!r}: {known}")
        if key in options:
            raise ValueError(f"{method}: option {key} is given twice in {text!r}: write it once")
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
