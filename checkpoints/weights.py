"""A checkpoint's tensors, under our names and fused as our modules want them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from checkpoints.config import ModelConfig
from checkpoints.config_fields import read_fields
from checkpoints.errors import CheckpointError
from checkpoints.gguf import GgufFile
from checkpoints.meta_pth import MetaShards, open_pickle
from checkpoints.storage import atomic_file, cache_home, exclusive, progress_bar

HUGGINGFACE_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "model.layers.{}.input_layernorm",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
    "out": "model.layers.{}.self_attn.o_proj",
    "mlp_norm": "model.layers.{}.post_attention_layernorm",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
}
GGUF_NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "blk.{}.attn_norm",
    "q": "blk.{}.attn_q",
    "k": "blk.{}.attn_k",
    "v": "blk.{}.attn_v",
    "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm",
    "out": "blk.{}.attn_output",
    "mlp_norm": "blk.{}.ffn_norm",
    "gate": "blk.{}.ffn_gate",
    "up": "blk.{}.ffn_up",
    "down": "blk.{}.ffn_down",
}
_META = {
    "embed": "tok_embeddings",
    "norm": "norm",
    "head": "output",
    "attention_norm": "layers.{}.attention_norm",
    "q": "layers.{}.attention.wq",
    "k": "layers.{}.attention.wk",
    "v": "layers.{}.attention.wv",
    "out": "layers.{}.attention.wo",
    "mlp_norm": "layers.{}.ffn_norm",
    "gate": "layers.{}.feed_forward.w1",
    "up": "layers.{}.feed_forward.w3",
    "down": "layers.{}.feed_forward.w2",
}
# Frequencies that follow from the configuration, which some writers store too.
_HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq|rope\.freqs|rope_freqs\.weight|rope_factors_(long|short)\.weight")
_SAFETENSORS_NAME = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a checkpoint: some or all rows of one of ours."""

    key: str
    layer: int | None
    suffix: str
    shape: tuple[int, ...]


class _Reader(Protocol):
    """An open file format."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape."""

    def read(self, name: str) -> torch.Tensor:
        """Give one tensor, on the CPU and in whatever dtype it is stored in."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A reader and how its format names and lays out tensors.

    Args:
        path: for messages.
        reader: the open format.
        names: part key -> name in the file without .weight or .bias, with {} for the layer.
        interleaved: the rows of q and k are in Meta's order (x0, y0, x1, y1, …) instead of (x0, x1, …, y0, y1, …).
    """

    path: Path
    reader: _Reader
    names: Mapping[str, str]
    interleaved: bool

    def name(self, part: Part) -> str:
        return f"{self.names[part.key].format(part.layer)}.{part.suffix}"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Say which tensors a model of this configuration has.

    Args:
        config: the configuration.

    Returns:
        Our name -> shape, in the order of the network.

    Example:
        >>> from checkpoints.config import RopeConfig
        >>> config = ModelConfig(
        ...     model_type="llama", vocab_size=9, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2,
        ...     num_kv_heads=1, head_dim=4, max_position=64, rms_norm_eps=1e-5, rope=RopeConfig(), tie_embeddings=True,
        ...     layer_windows=(None,))
        >>> expected_shapes(config)["blocks.0.attention.qkv.weight"]
        (16, 8)
    """
    return {name: _fused_shape(parts) for name, parts in layout(config).items()}


def load_state(
    path: Path, config: ModelConfig, *, dtype: torch.dtype, device: str | torch.device = "cpu", progress: bool = True
) -> dict[str, torch.Tensor]:
    """Read all weights; beyond the model itself, at most one of its tensors is in memory at a time.

    A GGUF file is dequantised once, into a safetensors file under `cache_home()`; from then on it is memory-mapped.

    Args:
        path: what `resolve` returned.
        config: what `load_config` made of it.
        dtype: float32, bfloat16, float16 or float64; numbers beyond float16's range become infinite there.
        device: where the tensors go.
        progress: show a bar on stderr.

    Returns:
        Our name -> tensor, the names of `expected_shapes`. Rows of q and k are in the order of rotate-half RoPE.

    Raises:
        CheckpointError: files missing, truncated or damaged; tensors missing, unexpected or mis-shaped (all listed in
            one message); a tensor that does not hold floating-point numbers; the cache cannot be written.
        ValueError: another dtype.
    """
    if dtype not in _SAFETENSORS_NAME:
        raise ValueError(f"dtype {dtype} is not supported: use one of {', '.join(map(str, _SAFETENSORS_NAME))}")
    if path.suffix == ".gguf" and path.is_file():
        return _load_converted(path, config, dtype, torch.device(device), progress)
    source = _open_directory(path, config)
    _check(source, config)
    return dict(_stream(source, config, dtype, torch.device(device), label="Reading weights", progress=progress))


def layout(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    """Where the rows of each of our tensors come from.

    Args:
        config: the configuration.

    Returns:
        Our name -> the tensors of a checkpoint that make its rows, from the first row to the last.
    """
    layout: dict[str, tuple[Part, ...]] = {}

    def add(name: str, rows: Mapping[str, int], *columns: int, layer: int | None = None, bias: bool = False) -> None:
        layout[f"{name}.weight"] = tuple(
            Part(key=key, layer=layer, suffix="weight", shape=(count, *columns)) for key, count in rows.items()
        )
        if bias:
            layout[f"{name}.bias"] = tuple(
                Part(key=key, layer=layer, suffix="bias", shape=(count,)) for key, count in rows.items()
            )

    width, mlp_width, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_heads * head_dim, config.num_kv_heads * head_dim
    add("embed", {"embed": config.vocab_size}, width)
    for i in range(config.num_layers):
        block = f"blocks.{i}"
        add(f"{block}.attention_norm", {"attention_norm": width}, layer=i)
        qkv = {"q": q_rows, "k": kv_rows, "v": kv_rows}
        add(f"{block}.attention.qkv", qkv, width, layer=i, bias=config.qkv_bias)
        if config.qk_norm:
            add(f"{block}.attention.q_norm", {"q_norm": head_dim}, layer=i)
            add(f"{block}.attention.k_norm", {"k_norm": head_dim}, layer=i)
        add(f"{block}.attention.out", {"out": width}, q_rows, layer=i, bias=config.output_bias)
        add(f"{block}.mlp_norm", {"mlp_norm": width}, layer=i)
        gate_up = {"gate": mlp_width, "up": mlp_width}
        add(f"{block}.mlp.gate_up", gate_up, width, layer=i, bias=config.mlp_bias)
        add(f"{block}.mlp.down", {"down": width}, mlp_width, layer=i, bias=config.mlp_bias)
    add("norm", {"norm": width})
    if not config.tie_embeddings:
        add("head", {"head": config.vocab_size}, width)
    return layout


def _fused_shape(parts: tuple[Part, ...]) -> tuple[int, ...]:
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def _check(source: _Source, config: ModelConfig) -> None:
    wanted = {source.name(part): part.shape for parts in layout(config).values() for part in parts}
    shapes = {name: shape for name, shape in source.reader.shapes.items() if not _HARMLESS.fullmatch(name)}
    embed, head = (f"{source.names[key]}.weight" for key in ("embed", "head"))
    duplicate = shapes.pop(head, None) if config.tie_embeddings else None
    problems = {
        "missing": [name for name in wanted if name not in shapes],
        "unexpected": [name for name in shapes if name not in wanted],
        "mis-shaped": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in wanted.items()
            if shapes.get(name, shape) != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names)
        raise CheckpointError(f"{source.path} does not hold the tensors that its configuration asks for: {listed}")
    if duplicate is not None and not torch.equal(source.reader.read(embed), source.reader.read(head)):
        raise CheckpointError(
            f"{source.path}: tie_word_embeddings is true, but {head} differs from {embed}: "
            "set it to false in config.json"
        )


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _stream(
    source: _Source, config: ModelConfig, dtype: torch.dtype, device: torch.device, *, label: str, progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Make our tensors one after the other."""
    with progress_bar(label, _nbytes(config, dtype), enabled=progress) as report:
        done = 0
        for name, parts in layout(config).items():
            yield name, _fused(source, parts, config.head_dim, dtype, device)
            done += math.prod(_fused_shape(parts)) * dtype.itemsize
            report(done)


def _fused(
    source: _Source, parts: tuple[Part, ...], head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    tensor = torch.empty(_fused_shape(parts), dtype=dtype, device=device)
    row = 0
    for part in parts:
        _fill(tensor[row : row + part.shape[0]], source, part, head_dim)
        row += part.shape[0]
    return tensor


def _fill(target: torch.Tensor, source: _Source, part: Part, head_dim: int) -> None:
    stored = source.reader.read(source.name(part))
    if not stored.is_floating_point():
        raise CheckpointError(f"{source.path}: {source.name(part)} holds {stored.dtype}, not floating-point numbers")
    if source.interleaved and part.key in ("q", "k"):
        columns = part.shape[1:]
        stored = stored.reshape(-1, head_dim // 2, 2, *columns).transpose(1, 2)
        target = target.view(-1, 2, head_dim // 2, *columns)
    target.copy_(stored)


def _nbytes(config: ModelConfig, dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(config).values()) * dtype.itemsize


class _SafetensorsFiles:
    """One or several safetensors files, memory-mapped."""

    def __init__(self, paths: Collection[Path]) -> None:
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read as safetensors ({error}): fetch it again") from error
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if name in self._file_of:
                    raise CheckpointError(f"{path} holds {name}, which another shard holds too: fetch both again")
                self._file_of[name] = file
                self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor


class _PickleFiles:
    """One or several files of torch.save, memory-mapped."""

    def __init__(self, paths: Collection[Path]) -> None:
        self._tensors = {name: tensor for path in paths for name, tensor in open_pickle(path).items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _open_directory(path: Path, config: ModelConfig) -> _Source:
    if not (path / "config.json").is_file():
        reader: _Reader = MetaShards(path, config.hidden_size)
        return _Source(path=path, reader=reader, names=_META, interleaved=True)
    safetensors = sorted(path.glob("*.safetensors"))
    if paths := _shards(path, "model.safetensors"):
        reader = _SafetensorsFiles(paths)
    elif paths := _shards(path, "pytorch_model.bin"):
        reader = _PickleFiles(paths)
    elif len(safetensors) == 1:
        reader = _SafetensorsFiles(safetensors)
    else:
        raise CheckpointError(
            f"{path} has no weights: neither model.safetensors nor pytorch_model.bin, whole or with an .index.json"
        )
    return _Source(path=path, reader=reader, names=HUGGINGFACE_NAMES, interleaved=False)


def _shards(directory: Path, name: str) -> list[Path]:
    """The file of this name, or the files that its index names, or none."""
    if (directory / name).is_file():
        return [directory / name]
    index = directory / f"{name}.index.json"
    if not index.is_file():
        return []
    weight_map = read_fields(index).get("weight_map", {})
    files = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    for file in files:
        # A plain name: an index must not make us read outside the checkpoint.
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise CheckpointError(
                f"{index} names the file {file!r}, which is not beside it: fetch it from a trusted place"
            )
        if not (directory / file).is_file():
            raise CheckpointError(
                f"{directory / file} is missing, which {index.name} names: fetch the checkpoint again"
            )
    if not files:
        raise CheckpointError(f"{index} names no files: fetch it again")
    return sorted(directory / file for file in files)


def _load_converted(
    path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, progress: bool
) -> dict[str, torch.Tensor]:
    """Map the conversion of a GGUF file, after making it if there is none of this very file and dtype."""
    place = path.resolve()
    name = f"{path.stem}-{hashlib.sha256(str(place).encode()).hexdigest()[:12]}-{str(dtype).removeprefix('torch.')}"
    converted = cache_home() / "converted" / f"{name}.safetensors"
    stat = place.stat()
    identity = {"source": str(place), "size": str(stat.st_size), "mtime_ns": str(stat.st_mtime_ns), "layout": "1"}
    if not _is_conversion(converted, identity, config, dtype):
        file = GgufFile(path)
        file.check()
        llama = file.metadata.get("general.architecture") == "llama"  # only there, llama.cpp's converter reorders
        source = _Source(path=path, reader=file, names=GGUF_NAMES, interleaved=llama)
        _check(source, config)
        with exclusive(converted.parent, needed_bytes=_nbytes(config, dtype)):
            if not _is_conversion(converted, identity, config, dtype):  # another process may have made it meanwhile
                label = "Dequantising, this once"
                tensors = _stream(source, config, dtype, torch.device("cpu"), label=label, progress=progress)
                with atomic_file(converted) as partial:
                    _write_safetensors(partial, tensors, expected_shapes(config), dtype, identity)
    return load_file(converted, device=str(device))


def _is_conversion(path: Path, identity: Mapping[str, str], config: ModelConfig, dtype: torch.dtype) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            return (
                file.metadata() == identity
                and {name: tuple(part.get_shape()) for name, part in slices.items()} == expected_shapes(config)
                and all(part.get_dtype() == _SAFETENSORS_NAME[dtype] for part in slices.values())
            )
    except (SafetensorError, OSError):
        return False


def _write_safetensors(
    path: Path,
    tensors: Iterator[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write tensors as they come, in the order of `shapes`; the safetensors library wants them all at once."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAME[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligns the data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            file.write(tensor.flatten().view(torch.uint8).numpy().data)
            del tensor  # before the next one is made
