"""One file per published compression method, found by its name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor

from layers.compress.allocators import uniform
from layers.compress.scoring import Scoring
from layers.methods.base import Allocate, Method
from layers.options import Option, options_of, read_options


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
        LayerTopK(alpha=0.5, least=32, compat=False)
    """
    name, tail, inner = _parts(spec)
    module = _module(name)
    if not hasattr(module, "wrap"):
        return _made(spec, lambda: _build(name, tail, importance or {}))
    changed = build_method(inner, importance)
    options = read_options(name, tail, describe(spec).own)
    return _made(spec.partition("+")[0], lambda: module.wrap(changed, **options))


_CHANGED = "what changes before what is changed, as in criticalkv+snapkv or kvsharer+headkv"


def _parts(spec: str) -> tuple[str, str, str]:
    """Name, options, and the method that it changes; empty where it changes none.

    Raises:
        ValueError: there is no such method, **or** one side of a plus is empty, **or** it changes none and is to.
    """
    outer, plus, inner = spec.partition("+")
    name, _, tail = outer.partition(":")
    if plus and not (outer and inner):
        raise ValueError(f"{spec!r} lacks a method on one side of the plus: write {_CHANGED}")
    if name not in method_names():
        raise ValueError(f"no cache method is called {name!r}: choose from {', '.join(method_names())}")
    changes: str = getattr(_module(name), "CHANGES", "")
    if plus and not changes:
        raise ValueError(f"{name} is complete and changes no other method: instead of {spec!r}, write {_CHANGED}")
    return name, tail, inner or changes


def _made(spec: str, make: Callable[[], Method]) -> Method:
    """Make a method; who refuses a number need not know of what it is an option, so this says it."""
    try:
        return make()
    except ValueError as error:
        known = str(error).startswith(spec.partition(":")[0])
        raise ValueError(f"{error}" if known else f"{spec}: {error}") from None


def _build(name: str, tail: str, importance: Mapping[str, Tensor]) -> Method:
    about = describe(f"{name}:{tail}")
    values = read_options(name, tail, about.options)
    build, allocate = _module(name).build, _allocate(name, tail)

    def chosen(options: Mapping[str, Option]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key in options}

    arguments = chosen(about.own)
    if _takes_importance(build):
        arguments["importance"] = importance
    if about.presets:
        preset = values.get("preset", about.choices["preset"].default)
        if preset not in about.presets:
            raise ValueError(f"{name} has no preset {preset!r}: choose from {', '.join(about.presets)}")
        arguments["scoring"] = replace(about.presets[preset], **chosen(about.scoring))
    if allocate:
        given = {"importance": importance} if _takes_importance(allocate) else {}
        arguments["allocator"] = partial(allocate, **given, **chosen(about.budgets))
    method: Method = build(**arguments)
    return method


@dataclass(frozen=True, kw_only=True)
class Description:
    """What users may set of a method, all of it from its signatures and docstrings.

    Args:
        name: of the method.
        allocator: whose budgets it has; empty where it takes none of others.
        choices: its options "allocator" and "preset".
        budgets: options of these budgets.
        own: options that only this method has.
        scoring: options of the scores that every method with a window has.
        presets: settings of all `scoring` options by the name that "preset" takes.
        changes: the method that it changes; empty where it is complete in itself.
    """

    name: str
    allocator: str
    choices: Mapping[str, Option]
    budgets: Mapping[str, Option]
    own: Mapping[str, Option]
    scoring: Mapping[str, Option]
    presets: Mapping[str, Scoring]
    changes: str

    @property
    def options(self) -> dict[str, Option]:
        """All options; one that budgets and scores have in common sets both."""
        return {**self.choices, **self.budgets, **self.own, **self.scoring}


def describe(spec: str) -> Description:
    """Tell what may be set of a method.

    Args:
        spec: as `build_method` takes it; of its options, only "allocator" matters, whose budgets have options.

    Returns:
        The description; where a method changes another, only that of the first.

    Raises:
        ValueError: there is no such method or allocator.

    Example:
        >>> about = describe("snapkv:allocator=adakv")
        >>> list(about.budgets), about.scoring["window"].default, list(about.presets)
        (['alpha', 'compat'], 32, ['published', 'tuned', 'adaptive'])
    """
    name, tail, changes = _parts(spec)
    function = _module(name).wrap if changes else _module(name).build
    allocate = None if changes else _allocate(name, tail)
    usual = {key: parameter.default for key, parameter in inspect.signature(function).parameters.items()}
    allocators = {_allocator(other): other for other in allocator_names()}
    choices, scoring = {}, {}
    if allocate:
        meaning = f"whose way to share the budget out: {', '.join(allocators.values())}"
        choices["allocator"] = Option(type="str", default=allocators[usual["allocator"]], meaning=meaning)
    presets: dict[str, Scoring] = _module(name).PRESETS if "scoring" in usual else {}
    if presets:
        default = next(preset for preset in presets if presets[preset] == usual["scoring"])
        meaning = f"settings of the scores: {', '.join(presets)}"
        choices["preset"] = Option(type="str", default=default, meaning=meaning)
        made = options_of(Scoring)
        scoring = {key: replace(option, default=getattr(presets[default], key)) for key, option in made.items()}
    return Description(
        name=name,
        allocator=allocators[allocate] if allocate else "",
        choices=choices,
        budgets=options_of(allocate, without=_MADE_HERE) if allocate else {},
        own=options_of(function, without=_MADE_HERE),
        scoring=scoring,
        presets=presets,
        changes=changes,
    )


_MADE_HERE = ("importance", "scoring", "allocator", "least", "method")


def needs_importance(spec: str) -> bool:
    """Whether a method's scores or budgets need what calibration found; False for what is no method.

    Example:
        >>> needs_importance("headkv:beta=2"), needs_importance("snapkv"), needs_importance("snapkv:allocator=headkv")
        (True, False, True)
    """
    try:
        name, tail, changed = _parts(spec)
        allocate = None if changed else _allocate(name, tail)
    except ValueError:
        return False
    if changed:
        return needs_importance(changed)
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
    allocate: Allocate = parameter.default if chosen is None else _allocator(chosen)
    return allocate


def _allocator(name: str) -> Allocate:
    allocate: Allocate = uniform if name == "uniform" else _module(name).allocate
    return allocate


def _takes_importance(function: Callable[..., object]) -> bool:
    return "importance" in inspect.signature(function).parameters
