"""Models you can run: `load` one, make an `Engine`, ask it for tokens."""

from typing import TYPE_CHECKING, Any

from zoo.load import Loaded, load

if TYPE_CHECKING:
    from zoo.engine import Engine

__all__ = ["Engine", "Loaded", "load"]


def __getattr__(name: str) -> Any:
    # Importing the engine imports torch, which takes seconds: `python -m zoo.chat --help` does without.
    if name == "Engine":
        from zoo.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
