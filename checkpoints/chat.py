"""Messages to the text and the ids that a model was trained to answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from checkpoints.chat_template import ChatTemplate, Message
from checkpoints.errors import CheckpointError
from checkpoints.gguf import GgufFile
from checkpoints.tokenizer import Tokenizer
from checkpoints.tokenizer_files import read_bytes, read_optional_json, token_text


@dataclass(frozen=True, kw_only=True)
class Chat:
    """How a model is talked to.

    Args:
        tokenizer: the model's.
        template: its chat template, or None for a base model.
        source: where the template comes from, e.g. "tokenizer_config.json" or "built-in Llama 2"; without one, why.
        template_hash: sha256 of the template's text in hex, "" without one.
        stop_ids: tokens that end an answer.
    """

    tokenizer: Tokenizer = field(repr=False)
    template: ChatTemplate | None = field(repr=False)
    source: str
    template_hash: str
    stop_ids: frozenset[int]

    def render(self, messages: Sequence[Message]) -> str:
        """Write messages as the text that the model continues with its answer.

        Args:
            messages: each with a "role" and a "content", oldest first, at least one.

        Returns:
            The text, control tokens spelled out; it ends with the generation prompt.

        Raises:
            ValueError: no messages, one of a wrong form, or the template refuses them (e.g. roles must alternate).
            CheckpointError: the model has no template, or one that is not safe to run.
        """
        if self.template is None:
            raise CheckpointError(
                f"{self.source}: it seems to be a base model, to be continued with `python -m zoo.generate`; "
                "for a chat take an instruct model"
            )
        if not messages:
            raise ValueError("there are no messages: a chat needs at least one of the user")
        for number, message in enumerate(messages, start=1):
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise ValueError(f"message {number} of {len(messages)} needs a role and a content, both text")
        return self.template.render(messages, generate=True)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Turn messages into ids: control tokens are those that the template writes, never look-alikes in a content.

        Args:
            messages: as `render` takes them.

        Returns:
            The ids; they end with the generation prompt.

        Raises:
            ValueError: as `render`; a content holds a lone surrogate.
            CheckpointError: as `render`.
        """
        mark = self._mark(messages)
        return self._ids(self.render([self._broken(message, mark) for message in messages]), mark)

    def continuation(self, messages: Sequence[Message], reply: str) -> list[int] | None:
        """The ids to append to a cache that holds the chat up to the last answer.

        Args:
            messages: all of them; the last is the new one of the user, the one before it the last answer.
            reply: that answer exactly as it was generated.

        Returns:
            What follows the answer, from the end of its turn to the generation prompt; None when the template rewrites
            what is already in the cache, which then has to be filled anew with `encode`.

        Raises:
            ValueError: as `encode`; there is no answer before the last message.
            CheckpointError: as `render`.
        """
        if len(messages) < 3 or messages[-2].get("role") != "assistant":
            raise ValueError("a chat is continued with an assistant's answer and a message after the first ones")
        mark = self._mark([*messages, {"content": reply}])
        broken = [self._broken(message, mark) for message in messages]
        answer = self._break(reply, mark)
        old, new = self.render(broken[:-2]), self.render(broken)
        if not new.startswith(old):
            return None
        rest = new[len(old) :]
        # Templates trim answers and set spaces around them.
        start = 0 if rest.startswith(answer) else len(rest) - len(rest.lstrip())
        answer = answer if start == 0 and rest.startswith(answer) else answer.strip()
        if not rest.startswith(answer, start):
            return None
        head = new[: len(old) + start + len(answer)]
        cached, ids = self._ids(head, mark), self._ids(new, mark)
        return ids[len(cached) :] if ids[: len(cached)] == cached else None

    @cached_property
    def _look_alike(self) -> re.Pattern[str]:
        texts = "|".join(map(re.escape, self.tokenizer.special_tokens)) or r"(?!)"
        return re.compile(rf"(?=(?:{texts}))(.)", re.DOTALL)

    @staticmethod
    def _mark(messages: Sequence[Message]) -> str:
        """A character that occurs in none of the messages."""
        used = {character for message in messages for text in message.values() for character in text}
        return next(mark for mark in map(chr, range(0xE000, 0xF8FF)) if mark not in used)

    def _break(self, text: str, mark: str) -> str:
        """A mark in the middle of every look-alike of a control token keeps the tokenizer from reading it as one."""
        return self._look_alike.sub(rf"\1{mark}", text)

    def _broken(self, message: Message, mark: str) -> Message:
        return {key: text if key == "role" else self._break(text, mark) for key, text in message.items()}

    def _ids(self, rendered: str, mark: str) -> list[int]:
        parts = self.tokenizer.split(rendered)
        return self.tokenizer.join([part.replace(mark, "") if isinstance(part, str) else part for part in parts])
