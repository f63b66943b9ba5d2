"""Messages to the text and the ids that a model was trained to answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from checkpoints.chat_builtin import built_in_template
from checkpoints.chat_template import ChatTemplate, Message
from checkpoints.errors import CheckpointError
from checkpoints.gguf import open_gguf
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
        _check(messages)
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
        _check(messages)
        mark = _unused_character(text for message in messages for text in message.values())
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
        _check(messages)
        if len(messages) < 3 or messages[-2]["role"] != "assistant":
            raise ValueError("only a chat whose last message but one is an answer of the assistant can be continued")
        mark = _unused_character([reply, *(text for message in messages for text in message.values())])
        broken = [self._broken(message, mark) for message in messages]
        old, new = self.render(broken[:-2]), self.render(broken)
        length = _length_of_answer(new[len(old) :], self._break(reply, mark)) if new.startswith(old) else None
        if length is None:
            return None
        cached, ids = self._ids(new[: len(old) + length], mark), self._ids(new, mark)
        return ids[len(cached) :] if ids[: len(cached)] == cached else None

    @cached_property
    def _look_alike(self) -> re.Pattern[str]:
        special = [text for text in self.tokenizer.special_tokens if text]
        if not special:
            return re.compile(r"(?!)(.)")
        # The set of first characters makes the search fast; hundreds of alternatives alone would not be.
        firsts, texts = re.escape("".join({text[0] for text in special})), "|".join(map(re.escape, special))
        return re.compile(rf"(?=[{firsts}])(?=(?:{texts}))(.)", re.DOTALL)

    def _break(self, text: str, mark: str) -> str:
        """A mark in the middle of every look-alike of a control token keeps the tokenizer from reading it as one."""
        return self._look_alike.sub(rf"\1{mark}", text)

    def _broken(self, message: Message, mark: str) -> Message:
        return {key: text if key == "role" else self._break(text, mark) for key, text in message.items()}

    def _ids(self, rendered: str, mark: str) -> list[int]:
        parts = self.tokenizer.split(rendered)
        return self.tokenizer.join([part.replace(mark, "") if isinstance(part, str) else part for part in parts])


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError("there are no messages: a chat needs at least one of the user")
    for number, message in enumerate(messages, start=1):
        texts = all(isinstance(text, str) for text in message.values())
        if not texts or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {number} of {len(messages)} needs a role and a content, both text")


def _unused_character(texts: Iterable[str]) -> str:
    """A private character that occurs in none of the texts."""
    used = set().union(*texts)
    return next(character for character in map(chr, range(0xE000, 0x10FFFF)) if character not in used)


def _length_of_answer(text: str, answer: str) -> int | None:
    """How much of a text is the answer it begins with, or None; templates trim answers and put spaces around them."""
    if text.startswith(answer):
        return len(answer)
    gap = len(text) - len(text.lstrip())
    return gap + len(answer.strip()) if text.startswith(answer.strip(), gap) else None


def load_chat(path: Path, tokenizer: Tokenizer, model_type: str) -> Chat:
    """Read the chat template of a checkpoint, or take the one of its family.

    Args:
        path: a checkpoint directory or a .gguf file.
        tokenizer: the checkpoint's.
        model_type: its family, e.g. "llama".

    Returns:
        The chat; without any fitting template it only knows the stop ids, and refuses to render.

    Raises:
        CheckpointError: a file is damaged; the template does not compile or is not safe to run.
    """
    found = _from_gguf(path) if path.is_file() else _from_directory(path)
    source, text = found.source, found.template
    if text is None:
        built_in = built_in_template(model_type, tokenizer.special_tokens)
        source, text = built_in or (f"{path} has no chat template and no built-in one fits it", None)
        source = source if text is None else f"built-in {source}"
    ends = (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
    names = {**found.names, **{name: tokenizer.decode([i]) for name, i in ends if i is not None}}
    template = None if text is None else ChatTemplate(text, source, names)
    end_of_turn = None if template is None else _end_of_turn(template, tokenizer)
    stops = {*found.stop_ids, tokenizer.eos_id, end_of_turn}
    return Chat(
        tokenizer=tokenizer,
        template=template,
        source=source,
        template_hash="" if text is None else hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(),
        stop_ids=frozenset(stop for stop in stops if stop is not None),
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a checkpoint says about chats.

    Args:
        source: the file.
        template: its template, or None.
        stop_ids: ids that end an answer.
        names: further variables of the template.
    """

    source: str
    template: str | None
    stop_ids: frozenset[int]
    names: Mapping[str, str]


def _from_gguf(path: Path) -> _Found:
    metadata = open_gguf(path).metadata
    template = metadata.get("tokenizer.chat_template")
    stops = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")}
    return _Found(
        source=str(path),
        template=template if isinstance(template, str) and template else None,
        stop_ids=frozenset(stop for stop in stops if isinstance(stop, int)),
        names={},
    )


def _from_directory(folder: Path) -> _Found:
    settings = read_optional_json(folder / "tokenizer_config.json")
    stops = read_optional_json(folder / "generation_config.json").get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    source, template = folder / "chat_template.jinja", None
    if source.is_file():
        try:
            template = read_bytes(source).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{source} is not UTF-8 ({error}): get the file again") from error
    else:
        source = folder / "tokenizer_config.json"
        template = _default(source, settings.get("chat_template"))
    names = {name: token_text(settings.get(name)) for name in ("unk_token", "pad_token")}
    return _Found(
        source=str(source),
        template=template or None,
        stop_ids=frozenset(stop for stop in stops if isinstance(stop, int)),
        names={name: text for name, text in names.items() if text is not None},
    )


def _default(source: Path, templates: object) -> str | None:
    """The template for a plain chat; a file can also hold a list of named ones."""
    if isinstance(templates, list):
        named = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
        if not isinstance(named.get("default"), str):
            raise CheckpointError(f"{source} has chat templates named {', '.join(map(str, named))} but no default one")
        templates = named["default"]
    if templates is not None and not isinstance(templates, str):
        raise CheckpointError(f"{source} has a chat_template that is no text: get the file again")
    return templates


def _end_of_turn(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The control token that the template writes right after an answer."""
    answer = "An answer."
    try:
        text = template.render(
            [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": answer}], generate=False
        )
    except CheckpointError:
        raise
    except ValueError:  # a template of a special kind, which this chat does not suit
        return None
    after = tokenizer.split(text.partition(answer)[2].lstrip())
    return after[0] if after and isinstance(after[0], int) and after[0] != tokenizer.bos_id else None
