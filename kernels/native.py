"""Build the C++ operators of this folder for the processor at hand, once, and load them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_SOURCES = Path(__file__).with_name("cpp")
_FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-Wno-psabi"]
_FLAGS += ["-DTORCH_TARGET_VERSION=0x020d000000000000"]  # the torch whose stable interface `ops.cpp` uses
_building: Future[Path] | None = None
_loaded = False
_lock = threading.Lock()


def compiler() -> list[str] | None:
    """The command of the C++ compiler: $CXX, or the first of g++ and clang++ that is there; None if there is none."""
    commands = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["g++"], ["clang++"]]
    return next((command for command in commands if command and shutil.which(command[0])), None)


def start() -> None:
    """Begin building in the background, if it was not done before; torch need not be imported yet."""
    global _building
    with _lock:
        if _building is None:
            _building = Future()
            threading.Thread(target=_run, args=(_building,), daemon=True).start()


def load() -> None:
    """Make the operators run in C++ from now on, waiting for their build if there must be one.

    Raises:
        RuntimeError: there is no C++ compiler, **or** it cannot build them; one line says why.
    """
    global _loaded
    if not _loaded:
        start()
        assert _building is not None
        library = _building.result()
        import torch

        from kernels.registry import all_kernels

        all_kernels()  # their schemas
        try:
            torch.ops.load_library(library)
        except OSError:  # a damaged file: once more, from the sources
            library.unlink(missing_ok=True)
            try:
                torch.ops.load_library(_built())
            except OSError as error:
                raise RuntimeError(f"{library} cannot be loaded: {error}") from error
        _loaded = True


def _run(building: Future[Path]) -> None:
    try:
        building.set_result(_built())
    except OSError as error:
        building.set_exception(
            RuntimeError(f"the C++ operators cannot be built or stored ({error}; HEADKV_ZOO_HOME says where)")
        )
    except BaseException as error:
        building.set_exception(error)


def _built() -> Path:
    """The library, from the cache or compiled now."""
    program = compiler()
    if program is None:
        raise RuntimeError("there is no C++ compiler (install g++)")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    torch_folder = spec.submodule_search_locations[0]
    sources = sorted(_SOURCES.glob("*.cpp"))
    parts = [*program, *_FLAGS, importlib.metadata.version("torch"), platform.machine(), _processor()]
    parts += [file.read_text() for file in sorted(_SOURCES.iterdir()) if file.is_file()]
    library = _cache() / f"ops-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library

    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor() as pool:
        objects = [str(Path(scratch, f"{source.stem}.o")) for source in sources]
        jobs = [
            pool.submit(_call, *program, *_FLAGS, f"-I{torch_folder}/include", "-c", str(source), "-o", target)
            for source, target in zip(sources, objects, strict=True)
        ]
        for job in jobs:
            job.result()
        made = Path(scratch, library.name)
        _call(*program, "-shared", "-fopenmp", *objects, f"-L{torch_folder}/lib", "-ltorch_cpu", "-o", str(made))
        beside = library.with_suffix(f".{os.getpid()}")
        try:
            shutil.copy(made, beside)
            beside.replace(library)
        finally:
            beside.unlink(missing_ok=True)
    return library


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.splitlines() or [f"status {done.returncode}"]
        reason = next((line for line in lines if "error" in line and "ld returned" not in line), lines[0])
        raise RuntimeError(f"{command[0]} cannot build kernels/cpp ({reason.strip()[:200]})")


def _cache() -> Path:
    """Where built libraries are kept: beside Inductor's if its folder was chosen, else under the user's cache."""
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.environ.get("HEADKV_ZOO_HOME")
    return Path(chosen or "~/.cache/headkv-zoo").expanduser() / "native"


def _processor() -> str:
    """What `-march=native` depends on."""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()
