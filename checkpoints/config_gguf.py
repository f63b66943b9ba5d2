"""A GGUF file's metadata to a ModelConfig."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from checkpoints.config import ModelConfig, RopeConfig
from checkpoints.config_fields import MAX_LAYERS, Fields
from checkpoints.errors import CheckpointError
from checkpoints.gguf import GgufFile, open_gguf

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_SCALINGS = ("none", "linear", "yarn", "longrope")
_STORED = {0: "float32", 1: "float16", 30: "bfloat16"}  # ggml's type numbers


def read(path: Path) -> ModelConfig:
    """Read the configuration of a GGUF file.

    Args:
        path: the file.

    Returns:
        The configuration. Its dtype is float32 for quantised files, which is what they dequantise to. Mistral calls
        itself llama in this format, and is one as long as it states no sliding window.

    Raises:
        CheckpointError: a damaged file; an architecture, scaling or feature that we do not support.
    """
    file = open_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path}: GGUF architecture {architecture!r} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    entries = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    fields = Fields({key: _uniform(value) for key, value in entries.items()}, f"{path}: {architecture} metadata")
    for key in ("expert_count", "attention.scale", "rope.scaling.yarn_log_multiplier"):
        if fields.get(key):
            raise fields.refuse(f"{key} = {fields.get(key)} is not supported")
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        if name not in file.tensors or len(file.tensors[name].shape) != 2:
            raise CheckpointError(f"{path} has no matrix {name}: it holds no model that we can read")

    width, num_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", width // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise fields.refuse(f"{key} = {fields.get(key)} other than the head dimension {head_dim} is not supported")
    num_layers, max_position = fields.integer("block_count", most=MAX_LAYERS), fields.integer("context_length")
    window = fields.integer("attention.sliding_window", None) if architecture == "llama" else None
    return ModelConfig(
        model_type="mistral" if window else architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=fields.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position=max_position,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(fields, file, max_position, head_dim),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm=architecture == "qwen3",
        layer_windows=(window,) * num_layers,
        dtype=_STORED.get(file.tensors["blk.0.attn_q.weight"].type_id, "float32"),
    )


def _uniform(value: Any) -> Any:
    """The format allows one number per layer; ours are the models that have the same in all."""
    return value[0] if isinstance(value, list) and value and all(item == value[0] for item in value) else value


def _rope(fields: Fields, file: GgufFile, max_position: int, head_dim: int) -> RopeConfig:
    theta = fields.number("rope.freq_base", 10_000.0)
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0)) or 1.0  # 0 says unscaled
    # Absent, the type is linear: so do files from before the key existed read.
    kind = fields.get("rope.scaling.type", "none" if factor == 1.0 else "linear")
    original = fields.integer("rope.scaling.original_context_length", max_position)
    attention = fields.number("rope.scaling.attn_factor", 1.0) * fields.number("rope.scaling.yarn_attn_factor", 1.0)
    if kind not in _SCALINGS:
        raise fields.refuse(f"rope.scaling.type {kind!r} is not supported; supported are {', '.join(_SCALINGS)}")
    if kind in ("none", "linear") and attention != 1.0:
        raise fields.refuse(f"an attention factor of {attention} with rope.scaling.type {kind!r} is not supported")
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise fields.refuse(f"rope.scaling.type {kind!r} beside the tensor rope_freqs.weight is not supported")
        # How Llama 3.1's scaling is shipped: what it divides each frequency by, whatever the length.
        short = long = _divisors(file, "rope_freqs.weight", head_dim)
        kind, factor = "longrope", 1.0
    elif kind == "longrope":
        short = _divisors(file, "rope_factors_short.weight", head_dim)
        long = _divisors(file, "rope_factors_long.weight", head_dim)
        factor = max(1.0, max_position / original)
    match kind:
        case "linear":
            return RopeConfig(kind="linear", theta=theta, factor=factor)
        case "yarn":
            if fields.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
                raise fields.refuse("rope.scaling.yarn_ext_factor other than 1 is not supported")
            return RopeConfig(
                kind="yarn",
                theta=theta,
                factor=factor,
                original_max_position=original,
                beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
                # Here the stated factor multiplies yarn's own; ours replaces it.
                attention_factor=None if attention == 1.0 else attention * (1.0 + 0.1 * math.log(factor)),
            )
        case "longrope":
            return RopeConfig(
                kind="longrope",
                theta=theta,
                factor=factor,
                original_max_position=original,
                attention_factor=attention,
                short_factor=short,
                long_factor=long,
            )
        case _:
            return RopeConfig(theta=theta)


def _divisors(file: GgufFile, name: str, head_dim: int) -> tuple[float, ...]:
    if name not in file.tensors or file.tensors[name].shape != (head_dim // 2,):
        raise CheckpointError(f"{file.path}: its RoPE scaling needs the tensor {name} with {head_dim // 2} values")
    divisors = tuple(file.read(name).tolist())
    if not all(0 < value < math.inf for value in divisors):
        raise CheckpointError(f"{file.path} is damaged: {name} must hold positive numbers")
    return divisors
