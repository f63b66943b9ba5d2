"""A checkpoint's tensors, under our names and fused as our modules want them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from checkpoints.config import ModelConfig
from checkpoints.errors import CheckpointError
from checkpoints.gguf import GgufFile
from checkpoints.meta_pth import MetaShards, open_pickle
from checkpoints.storage import atomic_file, cache_home, exclusive, progress_bar

_HUGGINGFACE = {
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
_GGUF = {
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


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One tensor of a checkpoint: some or all rows of one of ours."""

    key: str
    layer: int | None
    suffix: str
    shape: tuple[int, ...]


class _Reader(Protocol):
    """An open file format."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str) -> torch.Tensor: ...


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

    def name(self, part: _Part) -> str:
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
    return {name: _fused_shape(parts) for name, parts in _layout(config).items()}


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
        CheckpointError: files missing, truncated or damaged; tensors missing, unexpected, mis-shaped or of a type that
            is not a floating-point number (all listed in one message); the cache cannot be written.
    """
    if path.suffix == ".gguf" and path.is_file():
        return _load_converted(path, config, dtype, torch.device(device), progress)
    source = _open_directory(path, config)
    _check(source, config)
    total = sum(math.prod(shape) for shape in expected_shapes(config).values()) * dtype.itemsize
    state: dict[str, torch.Tensor] = {}
    with progress_bar("Reading weights", total, enabled=progress) as report:
        done = 0
        for name, parts in _layout(config).items():
            state[name] = _assemble(source, parts, config.head_dim, dtype, torch.device(device))
            done += state[name].nbytes
            report(done)
    return state
