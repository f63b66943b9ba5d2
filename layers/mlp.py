"""Gated MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.silu_mul import silu_mul
from layers.linear import Linear

_ROWS_AT_ONCE = 2048  # bounds the memory that a long prompt takes; fewer rows make slower products


class GatedMLP(nn.Module):
    """SwiGLU feed-forward with gate and up projections fused into one product.

    Args:
        hidden_size: model width, E.
        intermediate_size: inner width, F.
        bias: whether both projections have a bias.

    Source:
        Shazeer, GLU Variants Improve Transformer, 2020, equation 6.

    Example:
        >>> mlp = GatedMLP(4, 8)
        >>> _ = [torch.nn.init.ones_(p) for p in mlp.parameters()]
        >>> mlp(torch.zeros(1, 4)).shape
        torch.Size([1, 4])
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., T, E) to (..., T, E)."""
        parts = [self.down(silu_mul(self.gate_up(part))) for part in x.split(_ROWS_AT_ONCE, dim=-2)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
