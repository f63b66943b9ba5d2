"""Files we write: the cache directory, atomic replacement, one writer at a time, a progress bar."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints.errors import CheckpointError

PARTIAL = ".partial-"  # begins the name of every file or directory that is not finished


def cache_home() -> Path:
    """The directory of everything we download or convert: $HEADKV_ZOO_HOME, or ~/.cache/headkv-zoo.

    Returns:
        The path; it may not exist yet.

    Example:
        >>> cache_home().is_absolute()
        True
    """
    return Path(os.environ.get("HEADKV_ZOO_HOME") or "~/.cache/headkv-zoo").expanduser().absolute()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write to a temporary file that takes the name `path` only when the block ends well.

    Args:
        path: the final path, in an existing directory.

    Yields:
        The temporary path to write; on an exception it is removed and `path` is left as it was.

    Raises:
        OSError: the temporary file cannot be synced or renamed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with atomic_file(path) as partial:
        ...     _ = partial.write_text("whole")
        >>> path.read_text()
        'whole'
    """
    # The same directory: renaming never crosses a file system.
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(6)}-{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def exclusive(directory: Path, *, needed_bytes: int = 0) -> Iterator[None]:
    """Be the only process that writes in `directory`, after making it, checking its room and clearing dead runs away.

    Args:
        directory: one of ours, inside `cache_home()`.
        needed_bytes: free space that the block needs.

    Raises:
        CheckpointError: the directory cannot be written or its disk is too full; also when the block itself fails so.

    Example:
        >>> import tempfile
        >>> with exclusive(Path(tempfile.mkdtemp()) / "models", needed_bytes=1):
        ...     pass
    """
    from filelock import FileLock

    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / ".lock"):
            # Whoever made these held the lock, so its owner is dead.
            for remains in directory.glob(PARTIAL + "*"):
                shutil.rmtree(remains, ignore_errors=True) if remains.is_dir() else remains.unlink()
            free = shutil.disk_usage(directory).free
            if free < needed_bytes:
                raise CheckpointError(
                    f"{directory} has {free >> 20} MiB free and {-(-needed_bytes >> 20)} MiB are needed: "
                    "make room or set HEADKV_ZOO_HOME to a directory on another disk"
                )
            yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write in {directory} ({error.strerror or error}): set HEADKV_ZOO_HOME to a writable directory "
            f"with {-(-needed_bytes >> 20)} MiB free"
        ) from error


@contextmanager
def progress_bar(description: str, total: int, *, enabled: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar of bytes on stderr.

    Args:
        description: what is being done.
        total: bytes at the end, >= 0.
        enabled: False shows nothing.

    Yields:
        A function that takes the bytes done so far.

    Example:
        >>> with progress_bar("reading", 10, enabled=False) as done:
        ...     done(5)
    """
    if not enabled:
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.update(task, completed=done)
