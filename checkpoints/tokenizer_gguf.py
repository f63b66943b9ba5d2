"""The vocabulary inside a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from checkpoints.errors import CheckpointError
from checkpoints.gguf import open_gguf
from checkpoints.tokenizer_files import Roles
from checkpoints.tokenizer_hf import TokenizersEncoder, byte_level_bytes
from checkpoints.tokenizer_sentencepiece import serialise_model, tokenizer_of_model
from checkpoints.tokenizer_tiktoken import LLAMA3_PATTERN, QWEN_PATTERN
from checkpoints.tokenizer_vocab import VocabTokenizer

_TYPES = {1, 2, 3, 4, 5, 6}  # of tokens, as sentencepiece numbers them
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


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
    metadata = open_gguf(path).metadata

    def entry(name: str, kind: type, default: Any = None) -> Any:
        value = metadata.get(f"tokenizer.ggml.{name}", default)
        if type(value) is not kind:
            raise CheckpointError(f"{path} has no usable tokenizer.ggml.{name}: convert the model again")
        return value

    def optional(name: str, kind: type) -> Any:
        return entry(name, kind) if f"tokenizer.ggml.{name}" in metadata else None

    def texts(name: str) -> list[str]:
        values: list[str] = entry(name, list)
        try:
            "".join(values).encode()
        except (TypeError, UnicodeEncodeError) as error:
            raise CheckpointError(f"{path} has a tokenizer.ggml.{name} that is no text: get the file again") from error
        return values

    kind, tokens = entry("model", str), texts("tokens")
    ids = range(len(tokens))
    types = entry("token_type", list, [1] * len(ids))
    if len(types) != len(ids) or not set(types) <= _TYPES:
        raise CheckpointError(
            f"{path} has {len(ids)} tokens and {len(types)} types, not all 1 to 6: get the file again"
        )
    roles = Roles(
        bos=optional("bos_token_id", int),
        eos=optional("eos_token_id", int),
        adds_bos=optional("add_bos_token", bool),
        control=frozenset(),
        added={},
    )
    if kind == "gpt2":
        return _byte_level_tokenizer(path, tokens, types, texts("merges"), entry("pre", str), roles)
    if kind != "llama":
        raise CheckpointError(f"{path} has a vocabulary of the kind {kind!r}: supported are gpt2 and llama")

    scores, unknown_id = entry("scores", list), entry("unknown_token_id", int, 0)
    if len(scores) != len(ids) or not all(isinstance(score, float) for score in scores) or unknown_id not in ids:
        raise CheckpointError(
            f"{path} has {len(ids)} tokens, {len(scores)} scores and the unknown token {unknown_id}: get the file again"
        )
    if _UNKNOWN not in types:  # some converters call it a control token
        types[unknown_id] = _UNKNOWN
    model = serialise_model(
        zip(tokens, scores, types, strict=True),
        prefix_space=entry("add_space_prefix", bool, True),
        squeeze_spaces=entry("remove_extra_whitespaces", bool, False),
    )
    return tokenizer_of_model(path, model, roles)


def _byte_level_tokenizer(
    path: Path, tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], pre: str, roles: Roles
) -> VocabTokenizer:
    if pre not in _WORDS:
        raise CheckpointError(f"{path} has the unknown pre-tokenizer {pre!r}: supported are {', '.join(_WORDS)}")
    words = _WORDS[pre]
    special = {text: i for i, text in enumerate(tokens) if types[i] == _CONTROL or i in (roles.bos, roles.eos)}
    bos_id, eos_id = roles.ids(path, special, len(tokens))
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    # Control tokens that no merge makes stay outside, so that no word of a text can be one.
    made = {left + right for left, right in pairs}
    vocabulary = {text: i for i, text in enumerate(tokens) if text not in special or text in made}
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
    return VocabTokenizer(
        encoder=TokenizersEncoder(library, library),
        pieces=[text.encode() if text in raw else byte_level_bytes(text) for text in tokens],
        special_tokens=special,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=bos_id is not None and (words.bos if roles.adds_bos is None else roles.adds_bos),
        rules="\n".join(merges).encode(),
    )
