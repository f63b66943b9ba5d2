"""What figures are measured with, and what is written beside them: memory, its speed, the machine, the commit."""

from __future__ import annotations

import ctypes
import gc
import platform
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def begin_peak() -> bool:
    """Give back what earlier work has left and begin a new peak of resident memory; False where Linux does not."""
    gc.collect()
    with suppress(AttributeError):  # only glibc has it, and only glibc needs it
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_mib() -> int:
    """The largest resident memory of this process since `begin_peak`, mapped weights included, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) // 1024


def read_gbps(device: torch.device, repeats: int = 7) -> float:
    """How fast memory can be read now: the best of several sums over a buffer far larger than the caches.

    Args:
        device: whose memory.
        repeats: sums, at least 1.

    Returns:
        10^9 bytes per second.
    """
    caches = [file.read_text() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    nbytes = max([2**28, *(4 * 1024 * int(size.strip().removesuffix("K")) for size in caches)])
    buffer, seconds = torch.ones(nbytes // 4, device=device), []  # written: pages never written are all one page
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum().item()
        seconds.append(time.perf_counter() - start)
    return nbytes / min(seconds) / 1e9


def description(device: torch.device) -> dict[str, Any]:
    """The machine as figures are labelled with it."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
    }


def commit() -> str | None:
    """The commit that the working tree is at, with a + when it differs from it; None outside a git repository."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
