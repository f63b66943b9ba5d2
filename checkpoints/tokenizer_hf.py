"""Vocabularies that the tokenizers library encodes: tokenizer.json, and GGUF's "gpt2"."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers

from checkpoints.errors import CheckpointError
from checkpoints.tokenizer_files import read_bytes, read_json, read_roles
from checkpoints.tokenizer_sentencepiece import spaced_bytes
from checkpoints.tokenizer_vocab import VocabTokenizer, table


class TokenizersEncoder:
    """Encodes plain text with the tokenizers library.

    Args:
        start: encodes a text that nothing precedes.
        inner: encodes a text that follows a control token; mostly the same object.
    """

    def __init__(self, start: tokenizers.Tokenizer, inner: tokenizers.Tokenizer) -> None:
        self._start, self._inner = start, inner

    def encode(self, text: str, *, start: bool) -> list[int]:
        """Ids of a text without any control token."""
        ids: list[int] = (self._start if start else self._inner).encode(text, add_special_tokens=False).ids
        return ids


@cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes a printable byte as its Latin-1 character and the others, in order, from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted({*range(256)} - {*printable})
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def byte_level_bytes(token: str) -> bytes:
    r"""The bytes of a token of byte-level BPE; a token in other characters stands for itself.

    Example:
        >>> byte_level_bytes("Ġcaf"), byte_level_bytes("日")
        (b' caf', b'\xe6\x97\xa5')
    """
    table = _byte_of_character()
    try:
        return bytes([table[character] for character in token])
    except KeyError:
        return token.encode()


def read_tokenizer_json(path: Path) -> VocabTokenizer:
    """Read a tokenizer.json, with what the files beside it say about control tokens.

    Raises:
        CheckpointError: one of the files is damaged; its model or decoder is none of those that our families use.
    """
    spec, roles = read_json(path), read_roles(path.parent)
    start = _library_tokenizer(path, read_bytes(path), roles.control)
    unprefixed = _without_prefix(spec)
    inner = start if unprefixed is None else _library_tokenizer(path, json.dumps(unprefixed).encode(), roles.control)
    model, decoders = spec["model"], {str(step.get("type")): step for step in _steps(spec.get("decoder"))}
    if model.get("type") != "BPE":
        raise CheckpointError(f"{path} has a model of type {model.get('type')}: the supported type is BPE")
    if "ByteLevel" in decoders:
        to_bytes = byte_level_bytes
    elif "Metaspace" in decoders or "Replace" in decoders:
        to_bytes = spaced_bytes
    else:
        raise CheckpointError(
            f"{path} has the decoder {', '.join(decoders) or None}: supported are ByteLevel, Metaspace and Replace"
        )

    added, vocabulary = start.get_added_tokens_decoder(), start.get_vocab(with_added_tokens=True)
    special = {text: i for text, i in {**roles.added, **vocabulary}.items() if text in roles.control}
    special |= {token.content: i for i, token in added.items() if token.special}
    words = {i: to_bytes(text) for text, i in vocabulary.items()}
    words |= {i: token.content.encode() for i, token in added.items()}
    words |= {i: text.encode() for text, i in special.items()}
    pieces = table(path, words)

    bos_id, eos_id = roles.ids(path, special, len(pieces))
    template = start.encode("").ids  # what the file itself puts around a text
    if bos_id is None and template:
        bos_id = template[0]
    spaces = decoders.get("Metaspace", {"prepend_scheme": "never"})
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    return VocabTokenizer(
        encoder=TokenizersEncoder(start, inner),
        pieces=pieces,
        special_tokens=special,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=bos_id is not None and (template[:1] == [bos_id] if roles.adds_bos is None else roles.adds_bos),
        strips_space="Strip" in decoders or spaces.get("prepend_scheme", "always") != "never",
        rules="\n".join(merges).encode(),
        eats_left=frozenset(i for i, token in added.items() if token.special and token.lstrip),
        eats_right=frozenset(i for i, token in added.items() if token.special and token.rstrip),
    )


def _library_tokenizer(path: Path, data: bytes, control: Iterable[str]) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library has no error class of its own
        raise CheckpointError(f"{path} is not a tokenizer.json ({error}): get the file again") from error
    # Some files still cut or pad every text to the length of their training batches.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A token is a control token when any of the files says so.
    marked = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    more = [text for text in control if text not in marked and tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in more])
    tokenizer.encode_special_tokens = True  # look-alikes stay text: we cut at control tokens ourselves
    return tokenizer


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a part of the pipeline, which is missing, one step or a sequence of them."""
    if not isinstance(part, dict):
        return []
    nested = part.get("pretokenizers", part.get("decoders"))
    return [part] if nested is None else [step for inner in nested for step in _steps(inner)]


def _without_prefix(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """The pipeline for a text that is not the first, or None where that makes no difference."""
    steps = _steps(spec.get("pre_tokenizer"))
    if not any(step.get("prepend_scheme") == "first" for step in steps):
        return None
    changed = [{**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step for step in steps]
    return {**spec, "pre_tokenizer": {"type": "Sequence", "pretokenizers": changed}}
