"""Pre-norm transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.add_rms_norm import add_rms_norm
from layers.attention import Attention, ReadingAttention
from layers.cache.base import KVCache
from layers.mlp import GatedMLP
from layers.norm import RMSNorm


class Block(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream.

    Args:
        attention: the layer's attention, over its own keys and values or another layer's.
        mlp: the layer's MLP.
        hidden_size: model width, E.
        eps: epsilon of both norms.

    Example:
        >>> import torch
        >>> from layers.cache.base import NoCache
        >>> block = Block(Attention(8, num_heads=2, num_kv_heads=1, head_dim=4, layer=0), GatedMLP(8, 16), 8, eps=1e-5)
        >>> _ = [torch.nn.init.ones_(p) for p in block.parameters()]
        >>> block(torch.ones(1, 3, 8), (torch.ones(1, 3, 2), torch.zeros(1, 3, 2)), NoCache()).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, attention: Attention | ReadingAttention, mlp: GatedMLP, hidden_size: int, *, eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(hidden_size, eps=eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(hidden_size, eps=eps)
        self.mlp = mlp

    def reading(self) -> Block:
        """The same block without keys and values of its own, over the same weights; see `ReadingAttention`."""
        assert isinstance(self.attention, Attention)
        block = Block(ReadingAttention(self.attention), self.mlp, len(self.mlp_norm.weight), eps=self.mlp_norm.eps)
        block.attention_norm, block.mlp_norm = self.attention_norm, self.mlp_norm
        return block

    def forward(self, x_BTE: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
        """Transform hidden states (B, T, E) to (B, T, E)."""
        attended_BTE = self.attention(self.attention_norm(x_BTE), rotation, cache)
        normed_BTE, x_BTE = add_rms_norm(attended_BTE, x_BTE, self.mlp_norm.weight, self.mlp_norm.eps)
        y_BTE: Tensor = x_BTE + self.mlp(normed_BTE)
        return y_BTE
