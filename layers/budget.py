"""How much a cache may hold, as people write it: tokens, a share of the prompt, or bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_UNITS = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_HELP = 'write tokens per KV head (128), a share of the prompt ("12.5%") or bytes for everything ("64MiB")'


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A parsed budget.

    Args:
        kind: "tokens" (slots per KV head kept of the prompt), "share" (of the prompt) or "bytes" (whole cache).
        amount: tokens, a share in (0, 1], or bytes.
    """

    kind: Literal["tokens", "share", "bytes"]
    amount: float

    def __str__(self) -> str:
        """Write the budget as `parse_budget` reads it."""
        if self.kind == "share":
            return f"{self.amount:.6%}".rstrip("%").rstrip("0").rstrip(".") + "%"
        return f"{self.amount:.0f}" + ("B" if self.kind == "bytes" else "")


def parse_budget(text: int | str) -> Budget:
    """Read a budget.

    Args:
        text: 128, "128", "12.5%", "64MiB", "1.5GB".

    Returns:
        The budget.

    Raises:
        ValueError: it is none of these forms, **or** not positive, **or** a share above 100 %, **or** a fraction of
            a token.

    Example:
        >>> parse_budget("12.5%")
        Budget(kind='share', amount=0.125)
        >>> parse_budget("1KiB").amount
        1024.0
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*(%|[a-z]*)", str(text).strip().lower(), re.ASCII)
    if match is None or isinstance(text, bool):
        raise ValueError(f"budget {text!r} is not understood: {_HELP}")
    number, unit = float(match[1]), match[2]
    if number <= 0:
        raise ValueError(f"budget {text!r} must be positive: {_HELP}")
    if unit == "%":
        if number > 100:
            raise ValueError(f"budget {text!r} is more than the whole prompt: give at most 100%")
        return Budget(kind="share", amount=number / 100)
    if unit in _UNITS:
        return Budget(kind="bytes", amount=float(int(number * _UNITS[unit])))
    if unit or not number.is_integer():
        raise ValueError(f"budget {text!r} is not understood: {_HELP}")
    return Budget(kind="tokens", amount=number)
