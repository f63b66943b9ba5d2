"""PyTorch pickles, opened so that nothing in them can run, and Meta's consolidated.*.pth shards made of them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from checkpoints.errors import CheckpointError

# How Meta's tensor parallelism cuts each matrix; what is not here is the same in all shards.
_SPLIT_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


def open_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Map the tensors of a file that torch.save wrote; only tensors are unpickled, and no code runs.

    Args:
        path: a .bin, .pt or .pth file in PyTorch's zip format.

    Returns:
        Name -> tensor on the CPU, memory-mapped.

    Raises:
        CheckpointError: missing, truncated, in the format from before PyTorch 1.6, or holding anything but named
            tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: fetch the checkpoint again") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects other than tensors, which are never loaded: use a safetensors file"
        ) from error
    except Exception as error:  # a damaged zip or pickle fails in as many ways as there are opcodes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as a PyTorch file ({reason}): fetch it again") from error
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items())
    ):
        raise CheckpointError(f"{path} must hold named tensors: use the model's weights, not a training checkpoint")
    return {name: tensor.detach() for name, tensor in state.items()}


class MetaShards:
    """Meta's consolidated.00.pth, consolidated.01.pth, … as one set of whole tensors.

    Args:
        directory: holds the shards.
        width: the model's width, E; tells by which dimension the embedding was cut.

    Attributes:
        shapes: name -> shape of the whole tensor.
        dtype: of the first matrix, e.g. "bfloat16".

    Raises:
        CheckpointError: no shards, a gap in their numbers, shards that do not fit together, a damaged shard.
    """

    def __init__(self, directory: Path, width: int) -> None:
        self._directory = directory
        self._width = width
        paths = sorted(directory.glob("consolidated.*.pth"))
        numbers = [re.fullmatch(r"consolidated\.(\d+)\.pth", path.name) for path in paths]
        if not paths or [int(match[1]) if match else -1 for match in numbers] != list(range(len(paths))):
            raise CheckpointError(
                f"{directory} must hold consolidated.00.pth, consolidated.01.pth, … without a gap; it holds "
                f"{', '.join(path.name for path in paths) or 'none'}"
            )
        self._shards = [open_pickle(path) for path in paths]
        names = {name for shard in self._shards for name in shard}
        for path, shard in zip(paths, self._shards, strict=True):
            if shard.keys() != names:
                raise CheckpointError(
                    f"{path} lacks {min(names - shard.keys())}, which other shards hold: fetch it again"
                )
        self.dtype = str(next(iter(self._shards[0].values())).dtype).removeprefix("torch.")
        self.shapes = {name: self._shape(name) for name in self._shards[0]}

    def read(self, name: str) -> torch.Tensor:
        """Put one tensor together.

        Args:
            name: a key of `shapes`.

        Returns:
            The whole tensor on the CPU, in its stored dtype.
        """
        dim = self._dim(name)
        return self._shards[0][name] if dim is None else torch.cat([shard[name] for shard in self._shards], dim)

    def _dim(self, name: str) -> int | None:
        if len(self._shards) == 1:
            return None
        stem = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if stem == "tok_embeddings":  # Llama 2 cut its columns, Llama 3 its rows
            return 0 if self._shards[0][name].shape[-1] == self._width else 1
        return _SPLIT_DIM.get(stem)

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes = [tuple(shard[name].shape) for shard in self._shards]
        if len(set(shapes)) > 1:
            raise CheckpointError(f"{self._directory}: the shards disagree on the shape of {name}: {set(shapes)}")
        dim = self._dim(name)
        return tuple(size * len(shapes) if at == dim else size for at, size in enumerate(shapes[0]))
