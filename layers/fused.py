"""All blocks of a decode step as a single operator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.decode_blocks import decode_blocks
from layers.block import Block
from layers.cache.arena import ArenaCache
from layers.linear import Linear


class FusedBlocks:
    """Decodes one token per row through blocks' own weights; see `kernels.decode_blocks`.

    Args:
        blocks: of a model, from its first layer on, some of which may read another's cache; they stay as they are, and
            weights that they are given later are not seen here.

    Example:
        >>> import torch
        >>> from layers.attention import Attention
        >>> from layers.mlp import GatedMLP
        >>> from layers.plan import ArenaShape
        >>> block = Block(Attention(8, num_heads=2, num_kv_heads=1, head_dim=4, layer=0), GatedMLP(8, 16), 8, eps=1e-5)
        >>> _ = [torch.nn.init.constant_(p, 0.1).requires_grad_(False) for p in block.parameters()]
        >>> shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=1, head_dim=4, slots=3, dtype=torch.float32)
        >>> caches, rotation = [ArenaCache(shape, "cpu") for _ in "ab"], (torch.ones(1, 1, 2), torch.zeros(1, 1, 2))
        >>> for cache in caches:
        ...     cache.lay_out(torch.zeros(1, 1, 1), room=[3])
        ...     cache.begin_step(torch.tensor([True]))
        >>> x = torch.ones(1, 1, 8)
        >>> torch.allclose(FusedBlocks([block])(x, rotation, caches[0]), block(x, rotation, caches[1]))
        True
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        first = blocks[0]
        assert isinstance(first.attention.layer_1, Tensor)
        self._first_layer_1 = first.attention.layer_1
        self._weights = [weight for block in blocks for weight in _weights(block)]
        q_norm = first.attention.q_norm
        self._numbers = first.attention_norm.eps, q_norm.eps if q_norm else 0.0
        self._windows = [block.attention.window or 0 for block in blocks]

    def __call__(self, x_BTE: Tensor, rotation: tuple[Tensor, Tensor], cache: ArenaCache) -> Tensor:
        """Transform hidden states (B, 1, E) to (B, 1, E), storing the token in every layer of the cache."""
        tables = cache.decode_tables(self._first_layer_1)
        return decode_blocks(x_BTE, *rotation, self._weights, *self._numbers, self._windows, *tables)


def _weights(block: Block) -> tuple[Tensor | None, ...]:
    attention, mlp = block.attention, block.mlp

    def matrix(linear: Linear) -> tuple[Tensor | None, ...]:
        return linear.weight, linear.bias, linear.scale

    return (
        block.attention_norm.weight,
        *matrix(attention.qkv),
        attention.q_norm.weight if attention.q_norm else None,
        attention.k_norm.weight if attention.k_norm else None,
        *matrix(attention.out),
        block.mlp_norm.weight,
        *matrix(mlp.gate_up),
        *matrix(mlp.down),
    )
