"""Vocabularies that the sentencepiece library encodes: Llama 2's and Mistral's tokenizer.model, and GGUF's "llama"."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import sentencepiece

from checkpoints.errors import CheckpointError
from checkpoints.tokenizer_files import Roles, read_bytes, read_optional_json, read_roles
from checkpoints.tokenizer_vocab import VocabTokenizer, table


class SentencePieceEncoder:
    """Encodes plain text with the sentencepiece library.

    Args:
        processor: the library's object.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor

    def encode(self, text: str, *, start: bool) -> list[int]:
        """Ids of a text without any control token; every such text gets the space that the model puts before it."""
        ids: list[int] = self._processor.encode(text)
        return ids


def spaced_bytes(token: str) -> bytes:
    r"""The bytes of a token in which U+2581 stands for a space and <0xE2> for a byte.

    Example:
        >>> spaced_bytes("▁the"), spaced_bytes("<0x0A>")
        (b' the', b'\n')
    """
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(match[1])
    return token.replace("▁", " ").encode()


def is_sentencepiece(path: Path) -> bool:
    """Whether a tokenizer.model is a serialised model, which begins with the tag of its first piece, a line feed.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return read_bytes(path).startswith(b"\n")


def read_sentencepiece_model(path: Path) -> VocabTokenizer:
    """Read a tokenizer.model, with what the files beside it say about control tokens.

    Raises:
        CheckpointError: one of the files is damaged.
    """
    roles = read_roles(path.parent)
    more = read_optional_json(path.parent / "added_tokens.json")
    added = {**roles.added, **{text: i for text, i in more.items() if isinstance(i, int)}}
    return tokenizer_of_model(path, read_bytes(path), replace(roles, added=added))


def tokenizer_of_model(path: Path, model: bytes, roles: Roles) -> VocabTokenizer:
    """Make a tokenizer of a serialised model.

    Args:
        path: where it comes from, for messages.
        model: the serialised model.
        roles: its control tokens, besides those that it marks itself; all tokens added to it count as such.

    Raises:
        CheckpointError: the library refuses the model; it lacks the BOS or EOS that `roles` names.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds no sentencepiece model ({error}): get the file again") from error
    ids = range(processor.get_piece_size())
    texts: list[str] = processor.id_to_piece(list(ids))
    special = {texts[i]: i for i in ids if processor.IsControl(i) or processor.IsUnknown(i)}
    special |= {**{text: i for i, text in enumerate(texts) if text in roles.control}, **roles.added}
    words = {i: spaced_bytes(text) for i, text in enumerate(texts)} | {i: text.encode() for text, i in special.items()}
    pieces = table(path, words)

    bos_id, eos_id = roles.ids(path, special, len(pieces))
    if bos_id is None and processor.bos_id() >= 0:
        bos_id = processor.bos_id()
    if eos_id is None and processor.eos_id() >= 0:
        eos_id = processor.eos_id()
    return VocabTokenizer(
        encoder=SentencePieceEncoder(processor),
        pieces=pieces,
        special_tokens=special,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=bos_id is not None and roles.adds_bos is not False,
        strips_space="".join(processor.encode("a", out_type=str)).startswith("▁"),
        rules=struct.pack(f"<{len(ids)}f", *processor.get_score(list(ids))),
    )


def serialise_model(pieces: Iterable[tuple[str, float, int]], *, prefix_space: bool, squeeze_spaces: bool) -> bytes:
    """Write a vocabulary as the BPE model with byte fallback that the library reads.

    Args:
        pieces: text, score and type of each token; the types are the library's own numbers, which GGUF also uses.
        prefix_space: put a space before a text.
        squeeze_spaces: make one space of several.

    Returns:
        A serialised ModelProto.

    Source:
        The protocol buffer definition `sentencepiece_model.proto` of the sentencepiece project.
    """
    # Messages are written field by field: a tag (field number and kind), then the value.
    model = b"".join(
        _message(1, _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for text, score, kind in pieces
    )
    trainer = _number(3, 2) + _number(35, 1)
    normalizer = _message(1, b"identity") + _number(3, prefix_space) + _number(4, squeeze_spaces) + _number(5, 1)
    return model + _message(2, trainer) + _message(3, normalizer)


def _varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low]) if not high else bytes([low | 0x80]) + _varint(high)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
