"""A block's decode step as a single operator."""

from __future__ import annotations

from torch import Tensor

from kernels.decode_block import decode_block
from layers.block import Block
from layers.cache.arena import ArenaCache
from layers.linear import Linear


class FusedBlock:
    """Decodes one token per row through a block's own weights; see `kernels.decode_block`.

    Args:
        block: the block, which stays as it is; weights that it is given later are not seen here.

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
        >>> torch.allclose(FusedBlock(block)(x, rotation, caches[0]), block(x, rotation, caches[1]))
        True
    """

    def __init__(self, block: Block) -> None:
        attention, mlp = block.attention, block.mlp

        def matrix(linear: Linear) -> tuple[Tensor | None, ...]:
            return linear.weight, linear.bias, linear.scale

        q_norm, k_norm = attention.q_norm, attention.k_norm
        assert isinstance(attention.layer_1, Tensor)
        self._layer_1 = attention.layer_1
        self._weights = (
            block.attention_norm.weight,
            *matrix(attention.qkv),
            q_norm.weight if q_norm else None,
            k_norm.weight if k_norm else None,
            *matrix(attention.out),
            block.mlp_norm.weight,
            *matrix(mlp.gate_up),
            *matrix(mlp.down),
            block.attention_norm.eps,
            q_norm.eps if q_norm else 0.0,
            attention.window or 0,
        )

    def __call__(self, x_BTE: Tensor, rotation: tuple[Tensor, Tensor], cache: ArenaCache) -> Tensor:
        """Transform hidden states (B, 1, E) to (B, 1, E), storing the token in the cache."""
        return decode_block(x_BTE, *rotation, self._weights, *cache.decode_tables(self._layer_1))
