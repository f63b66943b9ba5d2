"""Qwen2 and Qwen2.5: biases on q, k and v; upper layers may use a sliding window."""

from __future__ import annotations

from checkpoints.config import ModelConfig
from layers.attention import Attention


def attention(config: ModelConfig, layer: int) -> Attention:
    """Grouped-query attention with projection biases."""
    return Attention(
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        layer=layer,
        qkv_bias=True,
        window=config.layer_windows[layer],
    )
