"""Qwen3, dense: q and k are normalised per head, and heads may be wider than E / N."""

from __future__ import annotations

from checkpoints.config import ModelConfig
from layers.attention import Attention


def attention(config: ModelConfig, layer: int) -> Attention:
    """Grouped-query attention with RMS-normalised q and k."""
    return Attention(
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        layer=layer,
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        qk_norm_eps=config.rms_norm_eps,
        window=config.layer_windows[layer],
    )
