"""The decoder that all families share; a family's file says only what its attention is."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from checkpoints.config import ModelConfig, RopeConfig
from layers import rope
from layers.block import Block
from layers.cache.base import KVCache, NoCache
from layers.embedding import Embedding
from layers.linear import Linear, linear
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from zoo import models


def family_names() -> list[str]:
    """Names of all families, sorted.

    Example:
        >>> family_names()
        ['llama', 'mistral', 'qwen2', 'qwen3']
    """
    return sorted(module.name for module in pkgutil.iter_modules(models.__path__))


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        config: all of its numbers.

    Raises:
        ValueError: no family has the configuration's `model_type`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.model_type not in family_names():
            raise ValueError(
                f"no model family is called {config.model_type!r}: choose from {', '.join(family_names())}"
            )
        family = importlib.import_module(f"{models.__name__}.{config.model_type}")
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.rope = rotary_embedding(config.rope, config.head_dim)
        self.blocks = nn.ModuleList(
            Block(
                family.attention(config, layer),
                GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias),
                config.hidden_size,
                eps=config.rms_norm_eps,
            )
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Dense forward without a cache: ids (B, T) to logits (B, T, V)."""
        position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        return self.logits(self.hidden(ids_BT, self.rope(position_BT, ids_BT.shape[1]), NoCache()))

    def hidden(
        self,
        ids_BT: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: KVCache,
        *,
        blocks: Iterable[Callable[..., Tensor]] | None = None,
    ) -> Tensor:
        """Hidden states after the last block, before the final norm.

        Args:
            ids_BT: token ids.
            rotation: what `rope` gives for their absolute positions.
            cache: stores keys and values and attends.
            blocks: what stands in for the model's blocks, in turn; None takes the blocks themselves.

        Returns:
            (B, T, E).
        """
        x_BTE: Tensor = self.embed(ids_BT)
        for block in blocks or self.blocks:
            x_BTE = block(x_BTE, rotation, cache)
        return x_BTE

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and output head: (..., E) to (..., V)."""
        x = self.norm(x)
        if self.head is not None:
            return self.head(x)  # type: ignore[no-any-return]
        return linear(x, self.embed.weight, scale=self.embed.scale)


def rotary_embedding(config: RopeConfig, head_dim: int) -> rope.RotaryEmbedding:
    """The rotary embedding that a configuration describes.

    Args:
        config: scaling kind and its numbers.
        head_dim: D.

    Returns:
        The module.
    """
    base_d = rope.default_frequencies(head_dim, config.theta)
    trained = config.original_max_position or 0
    match config.kind:
        case "default":
            return rope.RotaryEmbedding(base_d)
        case "linear":
            return rope.RotaryEmbedding(base_d / config.factor)
        case "dynamic":
            return rope.DynamicRotaryEmbedding(head_dim, config.theta, factor=config.factor, trained=trained)
        case "llama3":
            return rope.RotaryEmbedding(
                rope.llama3_frequencies(
                    base_d,
                    factor=config.factor,
                    low=config.low_freq_factor,
                    high=config.high_freq_factor,
                    trained=trained,
                )
            )
        case "yarn":
            frequencies_d = rope.yarn_frequencies(
                head_dim,
                config.theta,
                factor=config.factor,
                trained=trained,
                beta_fast=config.beta_fast,
                beta_slow=config.beta_slow,
                truncate=config.truncate,
            )
            scale = rope.yarn_attention_factor(config.factor, config.mscale, config.mscale_all_dim)
        case "longrope":
            frequencies_d = rope.divided(base_d, config.short_factor)
            scale = rope.longrope_attention_factor(config.factor, trained)
    return rope.RotaryEmbedding(
        frequencies_d,
        attention_factor=scale if config.attention_factor is None else config.attention_factor,
        long_frequencies_d=rope.divided(base_d, config.long_factor) if config.kind == "longrope" else None,
        trained=trained,
    )
