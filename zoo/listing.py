"""What `--list` shows: all that can be chosen, or all that can be set of one cache method."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from checkpoints.resolve import ALIASES, DEFAULT_MODEL
from zoo.cli import described
from zoo.load import DTYPES

# rich and torch take their time to import: a chat does not wait for what it does not show.
if TYPE_CHECKING:
    from rich.table import Table

    from layers.methods import Description
    from layers.options import Option


def show(method: str = "") -> None:
    """Print it.

    Args:
        method: as --cache takes it; none for all that --model, --cache and --dtype may be.

    Raises:
        ValueError: there is no such method or option.
    """
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 100, markup=False, highlight=False)
    console.print(*(_options(method) if method else _choices()), sep="\n")


def _choices() -> Iterator[Table | str]:
    from layers.methods import allocator_names, method_names, needs_importance
    from zoo.family import family_names

    models = _table("Models", "--model", "what it is")
    for alias in ALIASES:
        models.add_row(alias, f"{ALIASES[alias].requirement}{' (default)' if alias == DEFAULT_MODEL else ''}")
    models.add_row("a folder, .gguf file or hub id", f"of a family among {', '.join(family_names())}")
    methods = _table("Cache methods", "--cache", "keeps", "source")
    parts = _table(
        "Their parts", "--cache", "scores by", "budgets by", "calibrated", "evicts prompt tokens while decoding"
    )
    for name in method_names():
        method = described(name)
        methods.add_row(name, method.summary, method.paper)
        calibrated = needs_importance(name) or method.shared_layers > 0
        evicts = method.ring_over_prompt or method.evict
        scores = ", ".join(_words(part) for part in (method.scorer, method.refine) if part is not None)
        parts.add_row(name, scores, _words(method.allocator), *("yes" if x else "-" for x in (calibrated, evicts)))
    fixed = "full, tova, and what changes others, as criticalkv+snapkv and kvsharer+headkv"
    yield from (models, "", methods, "")
    yield "Options and presets of a method: --list METHOD, as in --list snapkv"
    yield from ("", parts, "")
    yield f"With other budgets (but not {fixed}): :allocator={'|'.join(allocator_names())}"
    yield from ("", f"--dtype: {', '.join(DTYPES)}")


def _options(spec: str) -> Iterator[Table | str]:
    from layers.methods import describe

    method, about = described(spec), describe(spec)
    yield f"{method.name} keeps: {method.summary}"
    yield f"Paper: {method.paper}"
    yield f"Formulas and reasons: layers/methods/{about.name.replace('-', '_')}.py"
    yield f"Options follow a colon: --cache {_example(spec)}" if about.options else "It has no options."
    budgets = f"Budgets of {about.allocator}"
    for title, options in (("Options", {**about.choices, **about.own}), (budgets, about.budgets)):
        if options:
            yield from ("", _defaults(title, options))
    if about.presets:
        yield from ("", _presets(about))
    if both := [name for name in about.budgets if name in {**about.own, **about.scoring}]:
        yield from ("", f"Budgets and scores have a default each; what is set is set for both: {', '.join(both)}")
    if about.allocator:
        other = "adakv" if about.allocator != "adakv" else "headkv"
        yield from ("", f"Other budgets have other options: --list {about.name}:allocator={other}")
    if "+" in spec:
        yield from ("", *_options(about.changes))
    elif about.changes:
        yield from ("", f"It changes another method, {about.changes} unless one follows: --list {about.name}+snapkv")


def _defaults(title: str, options: Mapping[str, Option]) -> Table:
    table = _table(title, "option", "default", "meaning")
    for name, option in options.items():
        table.add_row(name, option.written, option.meaning)
    return table


def _presets(about: Description) -> Table:
    usual = about.choices["preset"].default
    names = [f"{preset} (default)" if preset == usual else preset for preset in about.presets]
    table = _table("Settings, by preset", "option", *names, "meaning")
    for name, option in about.scoring.items():
        values = (str(getattr(preset, name)) for preset in about.presets.values())
        table.add_row(name, *values, option.meaning)
    return table


def _example(spec: str) -> str:
    """The method with its budgets, another preset if it has presets, and one more option; and so what it changes."""
    from layers.methods import describe

    about = describe(spec)
    chosen = {"allocator": about.allocator} if about.allocator else {}
    if about.presets:
        chosen["preset"] = next(preset for preset in about.presets if preset != about.choices["preset"].default)
    plain = {**about.budgets, **about.own, **about.scoring}
    chosen |= {name: option.written for name, option in list(plain.items())[:1]}
    options = ",".join(map("=".join, chosen.items()))
    return f"{about.name}{':' if options else ''}{options}{f'+{_example(about.changes)}' if '+' in spec else ''}"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    return Table(*columns, box=None, title=title, title_justify="left")


def _words(part: object) -> str:
    """The name of a part's class as words."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(part).__name__).lower()
