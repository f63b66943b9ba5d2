"""Grouped-query attention over whatever cache it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.rope import apply_rope
from layers.cache.base import KVCache, ReadableCache
from layers.linear import Linear
from layers.norm import RMSNorm


class Attention(nn.Module):
    """Project to queries, keys and values, rotate, let the cache attend, project back.

    Args:
        hidden_size: model width, E.
        num_heads: query heads, N.
        num_kv_heads: key/value heads, H; divides N.
        head_dim: D, even.
        layer: index of this layer, >= 0.
        qkv_bias: q, k and v projections have a bias.
        output_bias: the output projection has a bias.
        qk_norm_eps: epsilon of the RMS norm on every q and k head before RoPE; None means no such norm.
        window: sliding window in tokens; None means full attention.

    Raises:
        ValueError: N is not a multiple of H, **or** D is odd.

    Source:
        Ainslie et al., GQA, 2023.

    Example:
        >>> from layers.cache.base import NoCache
        >>> attention = Attention(8, num_heads=2, num_kv_heads=1, head_dim=4, layer=0)
        >>> _ = [torch.nn.init.ones_(p) for p in attention.parameters()]
        >>> no_turn = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
        >>> attention(torch.ones(1, 3, 8), no_turn, NoCache()).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads ({num_heads}) must be a multiple of num_kv_heads ({num_kv_heads})")
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, not {head_dim}")
        self.heads = (num_heads, num_kv_heads, num_kv_heads)
        self.head_dim = head_dim
        self.window = window
        self.qkv = Linear(hidden_size, sum(self.heads) * head_dim, bias=qkv_bias)
        self.q_norm = RMSNorm(head_dim, eps=qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, eps=qk_norm_eps) if qk_norm_eps is not None else None
        self.out = Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.register_buffer("layer_1", torch.tensor([layer], device="cpu"), persistent=False)

    def forward(self, x_BTE: Tensor, rotation: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
        """Attend from T new tokens.

        Args:
            x_BTE: normalised hidden states.
            rotation: cosine and sine of the new tokens' positions.
            cache: stores keys and values and attends.

        Returns:
            (B, T, E).
        """
        q_BTND, k_BTHD, v_BTHD = self.qkv(x_BTE).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTND, k_BTHD = self.q_norm(q_BTND), self.k_norm(k_BTHD)
        q_BTND, k_BTHD = apply_rope(q_BTND, *rotation), apply_rope(k_BTHD, *rotation)
        assert isinstance(self.layer_1, Tensor)
        o_BTND = cache.attend(self.layer_1, q_BTND, k_BTHD, v_BTHD, self.window)
        y_BTE: Tensor = self.out(o_BTND.flatten(2))
        return y_BTE


class ReadingAttention(nn.Module):
    """The attention of a layer that has no keys and values: it projects queries and reads what another layer stored.

    Args:
        attention: whose weights it takes, those of queries and output; nothing is copied.

    Source:
        Yang et al., KVSharer, 2024.

    Example:
        >>> attention = Attention(8, num_heads=2, num_kv_heads=1, head_dim=4, layer=1)
        >>> [tuple(p.shape) for p in ReadingAttention(attention).parameters()]
        [(8, 8), (8, 8)]
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.head_dim, self.window = attention.head_dim, attention.window
        self.qkv = attention.qkv.first(attention.heads[0] * attention.head_dim)
        self.q_norm, self.k_norm = attention.q_norm, None
        self.out = attention.out
        assert isinstance(attention.layer_1, Tensor)
        self.register_buffer("layer_1", attention.layer_1, persistent=False)

    def forward(self, x_BTE: Tensor, rotation: tuple[Tensor, Tensor], cache: ReadableCache) -> Tensor:
        """Attend from T new tokens.

        Args:
            x_BTE: normalised hidden states.
            rotation: cosine and sine of the new tokens' positions.
            cache: knows which layer this one reads, and has its keys and values.

        Returns:
            (B, T, E).
        """
        q_BTND = self.qkv(x_BTE).unflatten(-1, (-1, self.head_dim))
        q_BTND = apply_rope(q_BTND if self.q_norm is None else self.q_norm(q_BTND), *rotation)
        assert isinstance(self.layer_1, Tensor)
        y_BTE: Tensor = self.out(cache.read(self.layer_1, q_BTND, self.window).flatten(2))
        return y_BTE
