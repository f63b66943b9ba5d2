"""The tokenizer that all formats share: control tokens, decoding and streaming around one library's encoder."""

from __future__ import annotations

import codecs
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from checkpoints.errors import CheckpointError


class Encoder(Protocol):
    """One library's encoder of plain text."""

    def encode(self, text: str, *, start: bool) -> list[int]:
        """Ids of a text without any control token; `start` says that nothing precedes it."""


@dataclass(frozen=True, kw_only=True)
class VocabTokenizer:
    """A `Tokenizer` made of an encoder and the bytes of every id.

    Args:
        encoder: encodes plain text.
        pieces: the bytes of each id, None where there is no such id.
        special_tokens: control tokens by their text.
        bos_id: the token that begins a text, or None.
        eos_id: the token that ends a text, or None.
        adds_bos: whether the model was trained on texts that start with BOS.
        strips_space: the encoder puts a space before a text, so decoding takes it away again.
        rules: what else decides the encoding (merges, scores); only hashed.
        eats_left: control tokens that swallow the white space before them.
        eats_right: control tokens that swallow the white space after them.
    """

    encoder: Encoder = field(repr=False)
    pieces: Sequence[bytes | None] = field(repr=False)
    special_tokens: Mapping[str, int] = field(repr=False)
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    strips_space: bool = False
    rules: bytes = field(default=b"", repr=False)
    eats_left: frozenset[int] = frozenset()
    eats_right: frozenset[int] = frozenset()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.pieces)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(filter(None, self.special_tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.special_tokens.values())

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Turn text into ids.

        Args:
            text: any text.
            special: read control tokens spelled out in the text as such; by default they are plain text.
            bos: put the BOS token first.

        Returns:
            The ids.

        Raises:
            ValueError: the text holds a lone surrogate; `bos` without a BOS token in the vocabulary.
        """
        ids = self.join(self.split(text) if special else [text])
        if not bos:
            return ids
        if self.bos_id is None:
            raise ValueError("this vocabulary has no BOS token: encode with bos=False")
        return [self.bos_id, *ids]

    def split(self, text: str) -> list[str | int]:
        """Cut a text at the control tokens spelled out in it, these as ids; empty texts are left out."""
        parts: list[str | int] = []
        position, eat = 0, False
        for match in self._special_pattern.finditer(text):
            token_id = self.special_tokens[match[0]]
            plain = text[position : match.start()]
            plain = plain.lstrip() if eat else plain
            parts += [plain.rstrip() if token_id in self.eats_left else plain, token_id]
            position, eat = match.end(), token_id in self.eats_right
        parts.append(text[position:].lstrip() if eat else text[position:])
        return [part for part in parts if part != ""]

    def join(self, parts: Sequence[str | int]) -> list[int]:
        """Encode plain texts, and keep ready ids, in order.

        Args:
            parts: texts, in which look-alikes of control tokens stay text, and ids.

        Returns:
            The ids.

        Raises:
            ValueError: a text holds a lone surrogate.
        """
        ids: list[int] = []
        for index, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
                continue
            try:
                part.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"the text is not valid Unicode: a lone surrogate U+{ord(part[error.start]):04X} at character "
                    f"{error.start}; decode its bytes with errors='replace'"
                ) from error
            ids += self.encoder.encode(part, start=index == 0)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn ids into text.

        Args:
            ids: each in [0, vocab_size).
            skip_special: leave control tokens out.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])

    def texts(self) -> list[str]:
        """Text of each id alone, with the space that it begins with.

        Returns:
            As many as the vocabulary has; "" where there is no such id, U+FFFD for bytes that are no whole character.
        """
        return [(piece or b"").decode(errors="replace") for piece in self.pieces]

    def stream(self, *, skip_special: bool = False) -> ByteStream:
        """A decoder for ids that arrive one by one; all that it returns, joined, is `decode` of them."""
        return ByteStream(lambda token_id: self._bytes(token_id, skip_special), strips_space=self.strips_space)

    def _bytes(self, token_id: int, skip_special: bool) -> bytes:
        piece = self.pieces[token_id] if 0 <= token_id < len(self.pieces) else None
        if piece is None:
            raise ValueError(f"id {token_id} is not in the vocabulary of {len(self.pieces)} tokens")
        return b"" if skip_special and token_id in self._special_ids else piece

    def fingerprint(self) -> str:
        """Sha256 in hex of the vocabulary, the rules and the control tokens: the same whatever file held them."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            digest.update(b"-" if piece is None else b"%d:%b" % (len(piece), piece))
        digest.update(repr(sorted(self.special_tokens.items())).encode())
        digest.update(self.rules)
        return digest.hexdigest()


class ByteStream:
    r"""Decodes ids one by one, holding back the bytes of an unfinished character.

    Args:
        piece: the bytes of an id.
        strips_space: take one space away from the beginning of the text.

    Example:
        >>> stream = ByteStream({0: b" caf", 1: b"\xc3", 2: b"\xa9"}.__getitem__, strips_space=True)
        >>> stream.push(0), stream.push(1), stream.push(2), stream.flush()
        ('caf', '', 'é', '')
    """

    def __init__(self, piece: Callable[[int], bytes], *, strips_space: bool) -> None:
        self._piece = piece
        self._at_start = strips_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that is certain after this id, possibly none.

        Raises:
            ValueError: the id is not in the vocabulary.
        """
        data = self._piece(token_id)
        if self._at_start and data:
            data, self._at_start = data.removeprefix(b" "), False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Text that was still held back; an unfinished character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def table(path: Path, pieces: Mapping[int, bytes]) -> list[bytes | None]:
    """Bytes by id as a list, with None where there is no such id.

    Args:
        path: of the vocabulary, for the message.
        pieces: the bytes of each id.

    Raises:
        CheckpointError: there are no ids, or the largest one is out of all proportion.
    """
    size = max(pieces, default=-1) + 1
    if not pieces or min(pieces) < 0 or size > 2 * len(pieces) + 100_000:
        raise CheckpointError(f"{path} holds {len(pieces)} tokens with ids up to {size - 1}: get the file again")
    return [pieces.get(i) for i in range(size)]
