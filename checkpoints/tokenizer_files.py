"""The small files beside a vocabulary: which tokens are control tokens, and which of them begin and end a text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints.errors import CheckpointError


def read_bytes(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check that it is there") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    data = read_bytes(path)
    try:
        value = json.loads(data)
        if b"\\ud" in data.lower():  # half of a character can be escaped, but nothing can be done with it
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): get the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: get the file again")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty when there is no file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    return read_json(path) if path.exists() else {}


@dataclass(frozen=True, kw_only=True)
class Roles:
    """What tokenizer_config.json and config.json say about tokens.

    Args:
        bos: the text, or else the id, of the token that begins a text.
        eos: of the one that ends it.
        adds_bos: the explicit choice, or None.
        control: texts of the control tokens.
        added: ids of the tokens that were added to the vocabulary, control tokens or not.
    """

    bos: str | int | None
    eos: str | int | None
    adds_bos: bool | None
    control: frozenset[str]
    added: Mapping[str, int]

    def ids(self, path: Path, control: Mapping[str, int], size: int) -> tuple[int | None, int | None]:
        """Ids of BOS and EOS.

        Args:
            path: of the vocabulary, for the message.
            control: ids of its control tokens.
            size: of the vocabulary.

        Raises:
            CheckpointError: the vocabulary has no such token.
        """

        def checked(token: str | int | None) -> int | None:
            token_id = control.get(token) if isinstance(token, str) else token
            if token is not None and (token_id is None or not 0 <= token_id < size):
                raise CheckpointError(
                    f"{path} lacks the token {token!r} that its config makes BOS or EOS: get both again"
                )
            return token_id

        return checked(self.bos), checked(self.eos)


def read_roles(folder: Path) -> Roles:
    """Read tokenizer_config.json and, for what it leaves open, config.json; either may be missing.

    Raises:
        CheckpointError: one of them is damaged.
    """
    settings = read_optional_json(folder / "tokenizer_config.json")
    model = read_optional_json(folder / "config.json")

    def role(name: str) -> str | int | None:
        # An explicit null means that the tokenizer has no such token, whatever the model's config says.
        if f"{name}_token" in settings:
            return token_text(settings[f"{name}_token"])
        ids = model.get(f"{name}_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        return first if isinstance(first, int) else None

    try:
        added = {int(i): dict(token) for i, token in (settings.get("added_tokens_decoder") or {}).items()}
        ids = {str(token["content"]): i for i, token in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} has a malformed added_tokens_decoder: get the file again"
        ) from error
    named = [settings.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk")]
    more = settings.get("additional_special_tokens")
    named += [*more] if isinstance(more, list) else []
    named += [token for token in added.values() if token.get("special")]
    adds_bos = settings.get("add_bos_token")
    return Roles(
        bos=role("bos"),
        eos=role("eos"),
        adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
        control=frozenset(text for text in map(token_text, named) if text),
        added=ids,
    )


def token_text(token: object) -> str | None:
    """The text of a token that is written as itself or as a dict of its flags.

    Example:
        >>> token_text("<s>"), token_text({"content": "<s>", "lstrip": False}), token_text(None)
        ('<s>', '<s>', None)
    """
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
