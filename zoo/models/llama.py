"""Llama 2, 3, 3.1, 3.2 and SmolLM2: the base from which the other families differ."""

from __future__ import annotations

from checkpoints.config import ModelConfig
from layers.attention import Attention


def attention(config: ModelConfig, layer: int) -> Attention:
    """Grouped-query attention; some checkpoints have biases on all four projections."""
    return Attention(
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        layer=layer,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
    )
