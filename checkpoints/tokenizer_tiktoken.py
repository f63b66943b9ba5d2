"""Vocabularies that the tiktoken library encodes: Llama 3's tokenizer.model, qwen.tiktoken and tekken.json."""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import tiktoken

from checkpoints.errors import CheckpointError
from checkpoints.tokenizer_files import read_bytes, read_json
from checkpoints.tokenizer_vocab import VocabTokenizer

# The published regular expressions that cut a text into words.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
QWEN_PATTERN = rf"{_LETTERS}|\p{{N}}|{_REST}"

_LLAMA3_RANKS = 128_000
_LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
)
_QWEN_RANKS = 151_643
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_TEKKEN_SPECIAL = (  # of the files that do not list theirs
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)

# The library's regular expression engine overflows its stack on runs of white space not much longer than this.
_LONGEST_SPACE = 500_000


class TiktokenEncoder:
    r"""Encodes plain text with the tiktoken library.

    Args:
        pattern: the regular expression that cuts a text into words.
        words: the bytes of each token in the order of merging.
        first_id: the id of the first of them.
        nfc: normalise the text to NFC first.

    Raises:
        ValueError: the pattern is not a regular expression; a byte has no token; a token comes twice.

    Example:
        >>> words = [bytes([byte]) for byte in range(256)] + [b"ab"]
        >>> TiktokenEncoder(r"\w+|\W+", words, first_id=10).encode("abc", start=True)
        [266, 109]
    """

    def __init__(self, pattern: str, words: Sequence[bytes], *, first_id: int, nfc: bool = False) -> None:
        ranks = {word: rank for rank, word in enumerate(words)}
        if len(ranks) != len(words):
            raise ValueError(f"{len(words) - len(ranks)} tokens come twice")
        # The library would panic over these, and only when it meets the byte.
        if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
            raise ValueError(f"{len(missing)} of the 256 bytes have no token, the first is {missing[0]}")
        self._encoding = tiktoken.Encoding("checkpoint", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._first_id, self._nfc = first_id, nfc

    def encode(self, text: str, *, start: bool) -> list[int]:
        """Ids of a text without any control token; what precedes it makes no difference."""
        if self._nfc:
            text = unicodedata.normalize("NFC", text)
        cuts = [0, len(text)]
        if len(text) > _LONGEST_SPACE:
            for run in re.finditer(r"\s+", text):
                cuts += range(run.start() + _LONGEST_SPACE, run.end(), _LONGEST_SPACE)
        ranks: list[int] = []
        for begin, end in pairwise(sorted(cuts)):
            ranks += self._encoding.encode_ordinary(text[begin:end])
        return [self._first_id + rank for rank in ranks] if self._first_id else ranks


def read_llama3_model(path: Path) -> VocabTokenizer:
    """Read the tokenizer.model of Llama 3.

    Raises:
        CheckpointError: the file is damaged or another vocabulary.
    """
    special = {text: _LLAMA3_RANKS + i for i, text in enumerate(_LLAMA3_SPECIAL)}
    words = _read_ranks(path, expected=_LLAMA3_RANKS, family="Llama 3")
    return _tokenizer(path, LLAMA3_PATTERN, words, special, bos="<|begin_of_text|>", eos="<|end_of_text|>")


def read_qwen_tiktoken(path: Path) -> VocabTokenizer:
    """Read the qwen.tiktoken of Qwen's first generation.

    Raises:
        CheckpointError: the file is damaged or another vocabulary.
    """
    special = {text: _QWEN_RANKS + i for i, text in enumerate(_QWEN_SPECIAL)}
    words = _read_ranks(path, expected=_QWEN_RANKS, family="Qwen")
    return _tokenizer(path, QWEN_PATTERN, words, special, bos=None, eos="<|endoftext|>", nfc=True)


def read_tekken_json(path: Path) -> VocabTokenizer:
    """Read Mistral's tekken.json, whose control tokens come before all others.

    Raises:
        CheckpointError: the file is damaged.
    """
    spec = read_json(path)
    try:
        num_special = int(spec["config"]["default_num_special_tokens"])
        num_words = int(spec["config"]["default_vocab_size"]) - num_special
        ranks = {int(entry["rank"]): base64.b64decode(entry["token_bytes"]) for entry in spec["vocab"]}
        words = [ranks[rank] for rank in range(num_words)]  # the file holds more than the model was trained with
        listed = spec.get("special_tokens")
        texts = dict(enumerate(_TEKKEN_SPECIAL)) if listed is None else {t["rank"]: t["token_str"] for t in listed}
        special = {str(texts.get(i, f"<SPECIAL_{i}>")): i for i in range(num_special)}
        pattern = str(spec["config"]["pattern"])
        if len(special) != num_special:
            raise ValueError(f"{num_special - len(special)} control tokens come twice")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a tekken.json ({type(error).__name__}: {error}): get the file again"
        ) from error
    return _tokenizer(path, pattern, words, special, bos="<s>", eos="</s>")


def _read_ranks(path: Path, *, expected: int, family: str) -> list[bytes]:
    """Read lines of "base64 rank", in the order of the ranks."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            word, rank = line.split()
            ranks[int(rank)] = base64.b64decode(word, validate=True)
        except ValueError as error:
            raise CheckpointError(
                f"{path} line {number} is not a base64 token and its rank ({error}): get the file again"
            ) from error
    if ranks.keys() != set(range(expected)):
        raise CheckpointError(
            f"{path} has {len(ranks)} tokens where {family} has {expected}: "
            "it is damaged or another model's; a checkpoint with a tokenizer.json is read whatever its size"
        )
    return [ranks[rank] for rank in range(expected)]


def _tokenizer(
    path: Path,
    pattern: str,
    words: Sequence[bytes],
    special: Mapping[str, int],
    *,
    bos: str | None,
    eos: str,
    nfc: bool = False,
) -> VocabTokenizer:
    control = [text.encode() for text in special]
    comes_first = min(special.values(), default=len(words)) == 0
    try:
        encoder = TiktokenEncoder(pattern, words, first_id=len(control) if comes_first else 0, nfc=nfc)
        bos_id, eos_id = None if bos is None else special[bos], special[eos]
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} holds no usable vocabulary ({error}): get the file again") from error
    return VocabTokenizer(
        encoder=encoder,
        pieces=[*control, *words] if comes_first else [*words, *control],
        special_tokens=special,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=bos is not None,
    )
