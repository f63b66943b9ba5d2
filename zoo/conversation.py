"""A conversation: its messages, and an engine whose cache holds them from turn to turn."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.storage import atomic_file
from zoo.answer import Answer, cache_figures
from zoo.cli import check_fits, note

if TYPE_CHECKING:
    from zoo.engine import Engine

Message = dict[str, str]


class Conversation:
    """Messages, and the engine that answers them.

    Args:
        engine: with one row; this conversation's alone.
        system: the system prompt; None leaves that to the model's template.
        sampling: how tokens are chosen, as `Engine.stream` takes it.

    Attributes:
        messages: what was said: perhaps a system prompt, then user and assistant in turn.
    """

    def __init__(self, engine: Engine, *, system: str | None, sampling: dict[str, Any]) -> None:
        self._engine, self._sampling = engine, sampling
        self.begin(opening(system))

    def begin(self, messages: list[Message]) -> None:
        """Forget what was said and take these messages as said; they are read with the next turn."""
        self.messages = messages
        self._answer: Answer | None = None
        self._engine.reset()

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    def ask(self, text: str) -> Generator[str]:
        """Answer, piece by piece.

        If the caller stops early, what was said until then is part of the conversation. If an error or interrupt ends
        the answer, the cache is lost as well, and the next turn reads the whole conversation again.

        Args:
            text: what the user says.

        Yields:
            Text, possibly none.

        Raises:
            ValueError: the turn and its answer do not fit into the context, **or** the model's template refuses it.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self._answer = Answer(self._engine, self._new_ids(asked), self._sampling)
        is_whole = False
        try:
            yield from answer
            is_whole = True
        except (Exception, KeyboardInterrupt):
            self._engine.reset()
            raise
        finally:
            if is_whole or answer.tokens:
                self.messages = [*asked, {"role": "assistant", "content": answer.text}]

    def _new_ids(self, asked: list[Message]) -> list[int]:
        """What the cache lacks of a conversation."""
        engine, chat = self._engine, self._engine.loaded.chat
        seen = engine.tokens_seen[0]
        ids = chat.continuation(asked, self.messages[-1]["content"]) if seen else None
        if ids is not None:
            self._check_fits(len(ids), seen)
            return ids
        ids = chat.encode(asked)
        self._check_fits(len(ids), 0)
        if any(message["role"] == "assistant" for message in asked):
            note("(reading the whole conversation again)")
        engine.reset()
        return ids

    def _check_fits(self, new: int, seen: int) -> None:
        if not self._engine.endless:  # then it knows itself what it can read at once
            check_fits(new, seen, self._engine.max_new_tokens, self._engine.max_context, "begin anew with /reset")

    @property
    def is_cut(self) -> bool:
        """Whether the last answer ended only because it may not be longer."""
        return self._answer is not None and self._answer.is_cut

    def figures(self) -> list[str]:
        """Lines on what the cache holds and how fast the last answer came."""
        speed = [self._answer.speed] if self._answer and self._answer.tokens else []
        return [cache_figures(self._engine), *speed]


def opening(system: str | None) -> list[Message]:
    """How a conversation begins: with a system prompt, or with nothing, which leaves that to the model's template."""
    return [] if system is None else [{"role": "system", "content": system}]


def read_messages(path: Path) -> list[Message]:
    """Messages that `write_messages` wrote.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    try:
        messages = json.loads(path.read_bytes())["messages"]
        turns = messages[1:] if messages[:1] and messages[0]["role"] == "system" else messages
        is_chat = [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        "".join(message["content"] for message in messages).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        is_chat = False
    if not is_chat:
        raise ValueError(f"{path} is not a conversation that was saved here: choose another file")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def write_messages(path: Path, messages: list[Message]) -> None:
    """Write messages to a new file or over older ones; nothing else is overwritten.

    Raises:
        ValueError: the file is there and holds something else.
        OSError: it cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "chat.json"
        >>> write_messages(path, opening("Be brief."))
        >>> read_messages(path)
        [{'role': 'system', 'content': 'Be brief.'}]
    """
    if path.exists():
        read_messages(path)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps({"messages": messages}, indent=1) + "\n")
