"""Models you can run: `load` one, make an `Engine`, ask it for tokens."""

from zoo.engine import Engine
from zoo.load import Loaded, load

__all__ = ["Engine", "Loaded", "load"]
