"""Meta's params.json, beside consolidated.*.pth, to a ModelConfig."""

from __future__ import annotations

from pathlib import Path

from checkpoints.config import ModelConfig, RopeConfig
from checkpoints.config_fields import MAX_LAYERS, read_fields
from checkpoints.meta_pth import MetaShards

_SHAPE_KEYS = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"}
_KNOWN = _SHAPE_KEYS | {"norm_eps", "rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size"}


def read(path: Path) -> ModelConfig:
    """Read Llama 2 and 3 as Meta ships them.

    The file names neither the context nor whether the head is tied, so the context is that of the release (4,096 for
    Llama 2, 8,192 for Llama 3, 131,072 with scaled RoPE) and the rest is seen from the weights.

    Args:
        path: the params.json.

    Returns:
        The configuration.

    Raises:
        CheckpointError: damaged json, no weights beside it, an entry that we do not know.
    """
    fields = read_fields(path)
    unknown = sorted(key for key in fields.data.keys() - _KNOWN if fields.data[key] is not None)
    if unknown:
        raise fields.refuse(f"{unknown[0]} is not supported; supported are {', '.join(sorted(_KNOWN))}")
    width, num_heads, num_layers = (
        fields.integer("dim"),
        fields.integer("n_heads"),
        fields.integer("n_layers", most=MAX_LAYERS),
    )
    shards = MetaShards(path.parent, width)
    if "tok_embeddings.weight" not in shards.shapes:
        raise fields.refuse("the weights beside it have no tok_embeddings.weight: they are not a Llama's")
    vocab_size = fields.get("vocab_size", -1)  # Llama 2 says -1: as many as the tokenizer has
    scaled = fields.flag("use_scaled_rope", False)
    theta = fields.number("rope_theta", 10_000.0)
    original = 8192 if scaled or theta >= 500_000 else 4096
    return ModelConfig(
        model_type="llama",
        vocab_size=shards.shapes["tok_embeddings.weight"][0] if vocab_size == -1 else fields.integer("vocab_size"),
        hidden_size=width,
        intermediate_size=_mlp_width(
            width, fields.number("ffn_dim_multiplier", 1.0), fields.integer("multiple_of", 256)
        ),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("n_kv_heads", num_heads),
        head_dim=width // num_heads,
        max_position=131_072 if scaled else original,
        rms_norm_eps=fields.number("norm_eps", 1e-5),
        rope=RopeConfig(
            kind="llama3" if scaled else "default",
            theta=theta,
            factor=8.0 if scaled else 1.0,
            original_max_position=original if scaled else None,
        ),
        tie_embeddings="output.weight" not in shards.shapes,
        layer_windows=(None,) * num_layers,
        dtype=shards.dtype,
    )


def _mlp_width(width: int, multiplier: float, multiple_of: int) -> int:
    """Two thirds of four times the width, times the multiplier, rounded down twice and then up to a multiple."""
    hidden = int(multiplier * int(2 * 4 * width / 3))
    return -(-hidden // multiple_of) * multiple_of
