"""The GGUF container: its metadata and its tensors, every length checked against the size of the file."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints.errors import CheckpointError

_SCALARS = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")  # by GGUF value type
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies.

    Args:
        shape: rows first, as PyTorch counts (the file has it the other way round).
        type_id: ggml's number of the storage type.
        start: first byte in the file.
    """

    shape: tuple[int, ...]
    type_id: int
    start: int


class GgufFile:
    """A memory-mapped GGUF file.

    We parse the header ourselves because the gguf library takes 4 s for a vocabulary of 50,000 entries and trusts the
    lengths it reads; the library still does all dequantisation.

    Args:
        path: a single, little-endian .gguf file of version 2 or 3.

    Attributes:
        metadata: key -> int, float, bool, str or a list of them. A float32 scalar becomes the shortest decimal number
            that rounds to it, so that an epsilon of 1e-5 reads the same as from a config.json. Bytes that are not UTF-8
            are kept as surrogate escapes.
        tensors: name -> place.

    Raises:
        CheckpointError: not a GGUF file, truncated, a header that points outside the file, one part of a split model.

    Example:
        >>> GgufFile(Path("/dev/null"))
        Traceback (most recent call last):
        ...
        checkpoints.errors.CheckpointError: /dev/null is not a GGUF file: it is empty
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is not a GGUF file: it is empty")
        # Copy on write: PyTorch wants arrays that it might write to; the file stays as it is.
        self._bytes = np.memmap(path, np.uint8, mode="c")
        self._view = self._bytes.data
        self._at = 0
        self._parse()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, rows first."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Dequantise one tensor.

        Args:
            name: a key of `tensors`.

        Returns:
            float32, on the CPU.

        Raises:
            CheckpointError: the tensor lies outside the file, or the gguf library cannot dequantise its type.
        """
        import gguf

        tensor = self.tensors[name]
        rows, columns = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        stored = self._bytes[tensor.start : tensor.start + self._nbytes(name)].reshape(rows, -1)
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        values = np.empty((rows, columns), np.float32)
        step = max(1, (1 << 20) // columns)  # the library needs twice the memory of what it is given
        try:
            for row in range(0, rows, step):
                values[row : row + step] = gguf.dequantize(stored[row : row + step], kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has type {kind.name}, which the gguf library cannot dequantise: "
                "convert the model to another type, e.g. Q8_0"
            ) from error
        return torch.from_numpy(values).reshape(tensor.shape)

    def check(self) -> None:
        """Make sure that all tensors lie inside the file.

        Raises:
            CheckpointError: the file is truncated, or a tensor has an unknown type or a shape that it cannot have.
        """
        for name, tensor in self.tensors.items():
            if tensor.start + self._nbytes(name) > self._bytes.size:
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {name} ends at byte {tensor.start + self._nbytes(name)} and the "
                    f"file has {self._bytes.size}; fetch it again"
                )

    def _nbytes(self, name: str) -> int:
        import gguf

        tensor = self.tensors[name]
        try:
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.type_id)]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {name} has the unknown type {tensor.type_id}: update the gguf package"
            ) from error
        if tensor.shape[-1] % block:
            raise CheckpointError(
                f"{self.path} is damaged: the rows of {name} have {tensor.shape[-1]} values, no multiple of {block}"
            )
        return math.prod(tensor.shape) // block * block_bytes

    def _parse(self) -> None:
        if bytes(self._view[:4]) != b"GGUF":
            raise CheckpointError(f"{self.path} is not a GGUF file")
        self._at = 4
        version = self._integer(4)
        if version not in (2, 3):
            raise CheckpointError(f"{self.path} has GGUF version {version}: supported are 2 and 3, little-endian")
        tensor_count, key_count = self._integer(8), self._integer(8)
        for _ in range(key_count):
            key = self._string()
            self.metadata[key] = self._value(self._integer(4))
        if self.metadata.get("split.count", 1) != 1:
            raise CheckpointError(
                f"{self.path} is one part of a split model: merge the parts with llama-gguf-split --merge"
            )
        relative = {}
        for _ in range(tensor_count):
            name = self._string()
            rank = self._integer(4)
            shape = tuple(self._integer(8) for _ in range(min(rank, 5)))[::-1]
            if name in relative or not 1 <= rank <= 4 or 0 in shape:
                raise CheckpointError(f"{self.path} is damaged: its header lists {name!r} twice or with shape {shape}")
            relative[name] = GgufTensor(shape=shape, type_id=self._integer(4), start=self._integer(8))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise CheckpointError(f"{self.path} is damaged: its alignment is {alignment!r}")
        origin = -(-self._at // alignment) * alignment
        for name, tensor in relative.items():
            if tensor.start % alignment:
                raise CheckpointError(f"{self.path} is damaged: tensor {name} starts at {tensor.start}, unaligned")
            self.tensors[name] = GgufTensor(shape=tensor.shape, type_id=tensor.type_id, start=origin + tensor.start)

    def _take(self, count: int) -> memoryview:
        start, self._at = self._at, self._at + count
        if self._at > len(self._view):
            raise CheckpointError(f"{self.path} is truncated or damaged: its header goes past the end; fetch it again")
        return self._view[start : self._at]

    def _integer(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _string(self) -> str:
        return bytes(self._take(self._integer(8))).decode("utf-8", "surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._integer(4), self._integer(8)
            if item == _STRING:
                return [self._string() for _ in range(count)]
            dtype = self._scalar_type(item)
            return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()
        dtype = self._scalar_type(kind)
        value = np.frombuffer(self._take(dtype.itemsize), dtype)[0]
        return float(str(value)) if dtype == np.float32 else value.item()

    def _scalar_type(self, kind: int) -> np.dtype[Any]:
        name = _SCALARS[kind] if kind < len(_SCALARS) else None
        if name is None:
            raise CheckpointError(f"{self.path} is damaged: a metadata value has the unknown type {kind}")
        return np.dtype(name)


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file, or take the last one opened if it is the same: a header with a vocabulary takes time to parse.

    Args:
        path: the file.

    Returns:
        The file; callers share it and change nothing.

    Raises:
        CheckpointError: see `GgufFile`.

    Example:
        >>> open_gguf(Path("/dev/null"))
        Traceback (most recent call last):
        ...
        checkpoints.errors.CheckpointError: /dev/null is not a GGUF file: it is empty
    """
    stat = path.stat()
    return _open_gguf(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=1)
def _open_gguf(path: Path, mtime_ns: int, size: int) -> GgufFile:
    return GgufFile(path)
