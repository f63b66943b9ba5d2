"""What users may set of a function: its keyword arguments, as its signature and its docstring have them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Option:
    """One thing that users may set.

    Args:
        type: "int", "float" or "bool"; whatever else it is called, it is a text.
        default: what it is where nobody sets it.
        meaning: what it does.

    Example:
        >>> Option(type="bool", default=False, meaning="").written
        'false'
    """

    type: str
    default: object
    meaning: str

    @property
    def written(self) -> str:
        """The default as users would write it."""
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)

    def read(self, text: str) -> Any:
        """The value that a user has written.

        Raises:
            ValueError: the text is not of the option's type.
        """
        return _READERS.get(self.type, str)(text)


_READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: bool(("false", "true").index(text.lower())),
}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def options_of(function: Callable[..., object], *, without: Collection[str] = ()) -> dict[str, Option]:
    """What may be set of a function or a dataclass, by name.

    Args:
        function: types are read from its signature, meanings from the Args of its docstring.
        without: arguments that are not for users.

    Returns:
        Its options, in the order of the signature.

    Example:
        >>> from layers.compress.refiners import ProjectedValues
        >>> options_of(ProjectedValues, without=["alpha"])
        {'epsilon': Option(type='float', default=0.0001, meaning='lets large values win over tokens without ...')}
    """
    args = re.search(r"^Args:\n((?: .*\n?)+)", inspect.getdoc(function) or "", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", args[1] if args else "", re.MULTILINE)
    meanings = {name: " ".join(text.split()) for name, text in entries}
    return {
        name: Option(type=_type(parameter), default=parameter.default, meaning=meanings.get(name, ""))
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in without
    }


def _type(parameter: inspect.Parameter) -> str:
    """The name of its type, whether or not its module has annotations evaluated."""
    kind = parameter.annotation
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def read_options(owner: str, text: str, options: Mapping[str, Option]) -> dict[str, Any]:
    """Read "name=value,name=value".

    Args:
        owner: whose options they are; begins the messages.
        text: what the user has written.
        options: those that there are.

    Returns:
        The values of the options that are set.

    Raises:
        ValueError: there is no such option, **or** it has no value, **or** one that is not of its type, **or** two.

    Example:
        >>> read_options("mine", "share=0.5", {"share": Option(type="float", default=1.0, meaning="")})
        {'share': 0.5}
    """
    values: dict[str, Any] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, equals, value = item.partition("=")
        if name in options and not equals:
            raise ValueError(f"{owner}: option {name} needs a value: write {name}=...")
        if name not in options:
            known = f"write name=value with {', '.join(options)}" if options else "it takes none"
            raise ValueError(f"{owner} has no option {item!r}: {known}")
        if name in values:
            raise ValueError(f"{owner}: option {name} is given twice in {text!r}: write it once")
        try:
            values[name] = options[name].read(value)
        except ValueError:
            kind = _KINDS[options[name].type]
            raise ValueError(f"{owner}: option {name} takes {kind}, not {value!r}") from None
    return values


def check_range(name: str, value: float, least: float, most: float = math.inf, *, below: float | None = None) -> None:
    """Refuse a number that is out of range, NaN included.

    Args:
        name: what the number is called.
        value: the number.
        least: smallest that is allowed.
        most: largest that is allowed.
        below: smallest that is too large.

    Raises:
        ValueError: it is out of range.

    Example:
        >>> check_range("alpha", 2.0, 0, 1)
        Traceback (most recent call last):
        ValueError: alpha must be from 0 to 1, not 2.0
    """
    if least <= value <= most and (below is None or value < below):
        return
    if below is not None:
        bounds = f"at least {least:,} and below {below:,}"
    else:
        bounds = f"at least {least:,}" if most == math.inf else f"from {least:,} to {most:,}"
    raise ValueError(f"{name} must be {bounds}, not {value}")
