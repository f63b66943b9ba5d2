"""The vocabulary inside a GGUF file, and the metadata it is read from."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from checkpoints.errors import CheckpointError
from checkpoints.tokenizer_files import Roles
from checkpoints.tokenizer_hf import TokenizersEncoder, byte_level_bytes
from checkpoints.tokenizer_sentencepiece import serialise_model, tokenizer_of_model
from checkpoints.tokenizer_tiktoken import LLAMA3_PATTERN, QWEN_PATTERN
from checkpoints.tokenizer_vocab import VocabTokenizer, table

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens


class _Values:
    """Reads the values of a GGUF file one after the other."""

    _FORMATS = "BbHhIif?SAQqd"  # struct's letters by type number; S and A stand for string and array

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._position = data, 0

    def take(self, size: int) -> bytes:
        begin, self._position = self._position, self._position + size
        if self._position > len(self._data):
            raise ValueError(f"it ends inside its metadata, after {len(self._data)} bytes")
        return self._data[begin : self._position]

    def numbers(self, letter: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{letter}", self.take(count * struct.calcsize(f"<{letter}")))

    def string(self) -> str:
        return self.take(self.numbers("Q", 1)[0]).decode()

    def value(self) -> Any:
        letter = self._letter()
        if letter != "A":
            return self.string() if letter == "S" else self.numbers(letter, 1)[0]
        inner, count = self._letter(), self.numbers("Q", 1)[0]
        if inner == "A":
            raise ValueError("it has an array of arrays in its metadata")
        return [self.string() for _ in range(count)] if inner == "S" else [*self.numbers(inner, count)]

    def _letter(self) -> str:
        kind: int = self.numbers("I", 1)[0]
        if kind >= len(self._FORMATS):
            raise ValueError(f"it has a value of the unknown type {kind} in its metadata")
        return self._FORMATS[kind]


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Read the key-value part of a GGUF file, in a fraction of the time that the gguf library takes.

    Args:
        path: a .gguf file, little-endian, of version 2 or 3.

    Returns:
        Numbers, booleans, strings and flat lists of them by key.

    Raises:
        CheckpointError: the file cannot be read, is no such file, or ends too early.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            values = _Values(data)
            if values.take(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            version, _, num_values = (*values.numbers("I", 1), *values.numbers("Q", 2))
            if version not in (2, 3):
                raise ValueError(f"it is of version {version}, not 2 or 3")
            return {values.string(): values.value() for _ in range(num_values)}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check that it is there") from error
    except (ValueError, OverflowError, struct.error) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file ({error}): get the file again") from error


@dataclass(frozen=True, kw_only=True)
class _Words:
    """How a family cuts a text into words before byte-level BPE.

    Args:
        patterns: regular expressions, each of which cuts what the ones before it left.
        whole: a word that is a token is taken without merging.
        nfc: normalise the text to NFC first.
        bos: texts start with BOS unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    nfc: bool = False
    bos: bool = False


_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = _Words(patterns=(LLAMA3_PATTERN,), whole=True, bos=True)
# By tokenizer.ggml.pre. Source: the published tokenizer.json of each family; "default" as llama.cpp defines it.
_WORDS = {
    "default": _Words(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Words(patterns=(_GPT2_PATTERN,)),
    "llama-bpe": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "qwen2": _Words(patterns=(QWEN_PATTERN,), nfc=True),
    "smollm": _Words(patterns=(r"\p{N}", _GPT2_PATTERN)),
    "tekken": _Words(patterns=(_TEKKEN_PATTERN,), whole=True, bos=True),
}


def read_gguf_tokenizer(path: Path) -> VocabTokenizer:
    """Read the vocabulary of a GGUF file.

    Raises:
        CheckpointError: the file is damaged; it has no vocabulary, or one of an unsupported kind.
    """
    metadata = read_gguf_metadata(path)

    def entry(name: str, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if value is None:
            raise CheckpointError(
                f"{path} has no tokenizer.ggml.{name}: convert the model again with a newer converter"
            )
        return value

    kind, tokens = entry("model"), entry("tokens")
    types = entry("token_type", [1] * len(tokens))
    roles = Roles(
        bos=metadata.get("tokenizer.ggml.bos_token_id", 1 if kind == "llama" else None),
        eos=metadata.get("tokenizer.ggml.eos_token_id", 2 if kind == "llama" else None),
        adds_bos=metadata.get("tokenizer.ggml.add_bos_token"),
        control=frozenset(),
        added={},
    )
    if len(types) != len(tokens) or not all(i is None or i in range(len(tokens)) for i in (roles.bos, roles.eos)):
        raise CheckpointError(
            f"{path} has {len(tokens)} tokens, {len(types)} types of tokens, BOS {roles.bos} and EOS {roles.eos}, "
            "which do not fit together: get the file again"
        )
    if kind == "gpt2":
        return _byte_level_tokenizer(path, tokens, types, entry("merges"), entry("pre"), roles)
    if kind != "llama":
        raise CheckpointError(f"{path} has a vocabulary of the kind {kind!r}: supported are gpt2 and llama")

    unknown_id = types.index(_UNKNOWN) if _UNKNOWN in types else entry("unknown_token_id", 0)
    model = serialise_model(
        zip(tokens, entry("scores"), [*types[:unknown_id], _UNKNOWN, *types[unknown_id + 1 :]], strict=False),
        unknown_id=unknown_id,
        prefix_space=entry("add_space_prefix", True),
        squeeze_spaces=entry("remove_extra_whitespaces", False),
    )
    return tokenizer_of_model(path, model, roles)


def _byte_level_tokenizer(
    path: Path, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str, roles: Roles
) -> VocabTokenizer:
    if pre not in _WORDS:
        raise CheckpointError(f"{path} has the unknown pre-tokenizer {pre!r}: supported are {', '.join(_WORDS)}")
    words = _WORDS[pre]
    special = {text: i for i, text in enumerate(tokens) if types[i] == _CONTROL or i in (roles.bos, roles.eos)}
    # Control tokens stay outside, so that no text can spell one.
    vocabulary = {text: i for i, text in enumerate(tokens) if text not in special}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=words.whole))
    except Exception as error:  # the library has no error class of its own
        raise CheckpointError(f"{path} has unusable merges ({error}): get the file again") from error
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated") for pattern in words.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if words.nfc:
        library.normalizer = normalizers.NFC()
    own = [text for i, text in enumerate(tokens) if types[i] == _USER_DEFINED]
    library.add_tokens([tokenizers.AddedToken(text, special=False, normalized=False) for text in own])

    raw = {*special, *own}
    pieces = {i: text.encode() if text in raw else byte_level_bytes(text) for i, text in enumerate(tokens)}
    bos_id, eos_id = roles.ids(path, special)
    return VocabTokenizer(
        encoder=TokenizersEncoder(library, library),
        pieces=table(path, pieces),
        special_tokens=special,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=bos_id is not None and (words.bos if roles.adds_bos is None else roles.adds_bos),
        rules="\n".join(merges).encode(),
    )
