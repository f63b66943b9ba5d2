"""Text to token ids and back: one face over every tokenizer format that our checkpoints ship."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from checkpoints.errors import CheckpointError
from checkpoints.tokenizer_gguf import read_gguf_tokenizer
from checkpoints.tokenizer_hf import read_tokenizer_json
from checkpoints.tokenizer_sentencepiece import is_sentencepiece, read_sentencepiece_model
from checkpoints.tokenizer_tiktoken import read_llama3_model, read_qwen_tiktoken, read_tekken_json


class StreamDecoder(Protocol):
    """Turns ids into text one by one, holding back bytes until they make a whole character."""

    def push(self, token_id: int) -> str:
        """Text that is certain after this id, possibly none."""

    def flush(self) -> str:
        """Text that was still held back; an unfinished character becomes U+FFFD."""


class Tokenizer(Protocol):
    """What every tokenizer offers, whatever file it came from."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, or None."""

    @property
    def eos_id(self) -> int | None:
        """The token that ends a text, or None."""

    @property
    def adds_bos(self) -> bool:
        """Whether the model was trained on texts that start with BOS."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text; plain text never encodes to one of them."""

    def encode(self, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
        """Ids of a text; `special` also reads the control tokens spelled out in it, `bos` puts BOS first."""

    def split(self, text: str) -> list[str | int]:
        """The text cut at the control tokens spelled out in it, these as ids."""

    def join(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of plain texts and ready ids in order; look-alikes of control tokens in the texts stay text."""

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; `skip_special` leaves control tokens out."""

    def texts(self) -> list[str]:
        """Text of each id alone, with the space that it begins with; "" where there is no such id."""

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive one by one; its pieces joined are `decode` of them all."""

    def fingerprint(self) -> str:
        """Sha256 in hex of the vocabulary, the merges and the control tokens."""


def _read_tokenizer_model(path: Path) -> Tokenizer:
    return read_sentencepiece_model(path) if is_sentencepiece(path) else read_llama3_model(path)


# Best first: the earlier ones say more about control tokens.
_READERS: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.json": read_tokenizer_json,
    "tekken.json": read_tekken_json,
    "tokenizer.model": _read_tokenizer_model,
    "qwen.tiktoken": read_qwen_tiktoken,
}


def load_tokenizer(path: Path) -> Tokenizer:
    r"""Read the tokenizer of a checkpoint.

    Args:
        path: a checkpoint directory, of whose tokenizer files the first of tokenizer.json, tekken.json, tokenizer.model
            and qwen.tiktoken is taken, or a .gguf file.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: none of these files is there; the file is damaged or of an unsupported kind.

    Example:
        >>> import base64, json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> words = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell"]
        >>> vocab = [{"rank": rank, "token_bytes": base64.b64encode(word).decode()} for rank, word in enumerate(words)]
        >>> config = {"pattern": r"\w+|\W+", "default_vocab_size": 279, "default_num_special_tokens": 20}
        >>> _ = (folder / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
        >>> tokenizer = load_tokenizer(folder)
        >>> tokenizer.encode("hello</s>", special=True)
        [278, 131, 2]
        >>> tokenizer.decode(tokenizer.encode("hello</s>"))
        'hello</s>'
    """
    if path.is_file() and path.suffix == ".gguf":
        return read_gguf_tokenizer(path)
    for name, read in _READERS.items():
        if (path / name).is_file():
            return read(path / name)
    raise CheckpointError(f"{path} has no tokenizer: it needs one of {', '.join(_READERS)}, or to be a .gguf file")
