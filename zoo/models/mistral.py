"""Mistral 7B and its successors: Llama with an optional sliding window."""

from __future__ import annotations

from checkpoints.config import ModelConfig
from layers.attention import Attention


def attention(config: ModelConfig, layer: int) -> Attention:
    """Grouped-query attention over the last `window` tokens, if the checkpoint sets one (7B v0.1 does)."""
    return Attention(
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        layer=layer,
        window=config.layer_windows[layer],
    )
