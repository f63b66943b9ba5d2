"""config.json as the transformers library writes it, in its older and newer forms, to a ModelConfig."""

from __future__ import annotations

from pathlib import Path

from checkpoints.config import MODEL_TYPES, ROPE_KINDS, ModelConfig, RopeConfig
from checkpoints.config_fields import MAX_LAYERS, REQUIRED, Fields, read_fields

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def read(path: Path) -> ModelConfig:
    """Read a config.json, following what transformers' own configuration classes make of it.

    Args:
        path: the config.json.

    Returns:
        The configuration.

    Raises:
        CheckpointError: damaged json, a missing dimension, a model type or feature that we do not support.
    """
    fields = read_fields(path)
    model_type = fields.get("model_type", REQUIRED)
    if model_type not in MODEL_TYPES:
        raise fields.refuse(f"model_type {model_type!r} is not supported; supported are {', '.join(MODEL_TYPES)}")
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.refuse(f"hidden_act {fields.get('hidden_act')!r} is not supported; supported is silu")
    if fields.get("quantization_config"):
        raise fields.refuse(
            "quantization_config: quantised Hugging Face checkpoints are not supported; "
            "use the original weights or a GGUF file"
        )
    dtype = str(fields.get("dtype", fields.get("torch_dtype", "float32")))
    if dtype not in _DTYPES:
        raise fields.refuse(f"dtype {dtype!r} is not supported; supported are {', '.join(_DTYPES)}")
    width, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", 128 if model_type == "qwen3" else width // num_heads)
    # transformers fills an absent key from the class and an explicit null from the query heads.
    absent_kv_heads = {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(model_type, num_heads)
    num_kv_heads = fields.integer(
        "num_key_value_heads", num_heads if "num_key_value_heads" in fields.data else absent_kv_heads
    )
    attention_bias = fields.flag("attention_bias", False) and model_type in ("llama", "qwen3")
    num_layers = fields.integer("num_hidden_layers", most=MAX_LAYERS)
    max_position = fields.integer("max_position_embeddings")
    rope = _rope(fields, max_position, head_dim)
    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=_extended(rope, max_position),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias", False) and model_type == "llama",
        qk_norm=model_type == "qwen3",
        layer_windows=_windows(fields, model_type, num_layers),
        dtype=dtype,
    )


def _extended(rope: RopeConfig, max_position: int) -> int:
    """The usable context: config.json may state the one before dynamic or yarn scaling (or, for yarn, after it)."""
    if rope.kind in ("dynamic", "yarn"):
        return max(max_position, int(rope.factor * (rope.original_max_position or max_position)))
    return max_position


def _windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    window = fields.integer("sliding_window", None if "sliding_window" in fields.data else 4096)
    if model_type == "llama":
        first_windowed = num_layers
    elif model_type == "mistral":
        first_windowed = 0
    else:
        window = window if fields.flag("use_sliding_window", False) else None
        first_windowed = fields.get("max_window_layers", 28)
        if type(first_windowed) is not int:
            raise fields.refuse(f"max_window_layers must be an integer, not {first_windowed!r}")
    windows = tuple(window if layer >= first_windowed else None for layer in range(num_layers))
    types = fields.get("layer_types")
    if types is None:
        return windows
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.refuse(f"layer_types must be a list of {num_layers} names")
    unknown = [name for name in types if name not in ("full_attention", "sliding_attention")]
    if unknown:
        raise fields.refuse(
            f"layer_types holds {unknown[0]!r}, which is not supported; supported are full_attention, sliding_attention"
        )
    asked = tuple(window if name == "sliding_attention" else None for name in types)
    if model_type in ("llama", "mistral") and asked != windows:
        raise fields.refuse(f"layer_types that differ between layers are not supported for {model_type}")
    if window is None and "sliding_attention" in types:
        raise fields.refuse("layer_types asks for sliding windows, but no sliding_window is in use")
    return asked


def _rope(fields: Fields, max_position: int, head_dim: int) -> RopeConfig:
    data = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(data, dict) or any(isinstance(value, dict) for value in data.values()):
        raise fields.refuse("RoPE parameters must be one flat object; parameters per layer type are not supported")
    rope = Fields(data, f"{fields.where}: RoPE parameters")
    for source in (rope, fields):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise source.refuse("partial_rotary_factor below 1 is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    original = fields.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_position)
    )
    match kind:
        case "default":
            return RopeConfig(theta=theta)
        case "linear":
            return RopeConfig(kind="linear", theta=theta, factor=rope.number("factor"))
        case "dynamic":
            return RopeConfig(
                kind="dynamic", theta=theta, factor=rope.number("factor"), original_max_position=max_position
            )
        case "llama3":
            return RopeConfig(
                kind="llama3",
                theta=theta,
                factor=rope.number("factor"),
                original_max_position=original,
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
            )
        case "yarn":
            return RopeConfig(
                kind="yarn",
                theta=theta,
                factor=rope.number("factor", max_position / original),
                original_max_position=original,
                # Zero counts as absent, as it does in transformers.
                beta_fast=rope.number("beta_fast", 32.0) or 32.0,
                beta_slow=rope.number("beta_slow", 1.0) or 1.0,
                attention_factor=rope.number("attention_factor", None),
                mscale=rope.number("mscale", None),
                mscale_all_dim=rope.number("mscale_all_dim", None),
                truncate=rope.flag("truncate", True),
            )
        case "longrope":
            return RopeConfig(
                kind="longrope",
                theta=theta,
                factor=rope.number("factor", max_position / original),
                original_max_position=original,
                attention_factor=rope.number("attention_factor", None),
                short_factor=rope.factors("short_factor", head_dim),
                long_factor=rope.factors("long_factor", head_dim),
            )
        case _:
            raise rope.refuse(f"rope_type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
