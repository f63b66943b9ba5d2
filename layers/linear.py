"""Linear projection that picks its product by the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.few_rows_linear import MOST_ROWS, few_rows_linear, reference

_FEW_OF_INT8 = 32
"""Rows from which on it pays to make floats of all int8 weights for a BLAS product."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Multiply by a weight matrix and add a bias if there is one.

    On a CPU and outside autograd, up to 8 rows (32 with an int8 weight) go through `kernels.few_rows_linear`, more
    through BLAS.

    Args:
        x: (..., in).
        weight: (out, in), in x's dtype **or** int8 with a scale.
        bias: (out,) or None.
        scale: (out,) fp32, what one unit of each row of an int8 weight is worth, or None.

    Returns:
        (..., out).

    Example:
        >>> linear(torch.tensor([[3.0, 4.0]]), torch.ones(1, 2))
        tensor([[7.]])
    """
    few = MOST_ROWS if scale is None else _FEW_OF_INT8
    if x.numel() <= few * x.shape[-1] and x.device.type == "cpu" and not torch.is_grad_enabled():
        return few_rows_linear(x, weight, bias, scale)
    return reference(x, weight, bias, scale)


class Linear(nn.Module):
    """A weight matrix and an optional bias; see `linear`.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether a bias is added.

    Attributes:
        weight: (out, in), int8 once quantised.
        bias: (out,) or None.
        scale: (out,) fp32, what one unit of each quantised row is worth, or None.

    Example:
        >>> layer = Linear(2, 1)
        >>> layer.weight = nn.Parameter(torch.ones(1, 2))
        >>> layer(torch.tensor([[3.0, 4.0]])).item()
        7.0
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.scale: Tensor | None
        self.register_buffer("scale", None)

    def first(self, rows: int) -> Linear:
        """The first rows as a projection of their own, over the same memory.

        Args:
            rows: how many, at most `out_features`.

        Example:
            >>> layer = Linear(2, 3)
            >>> layer.first(1).weight.data_ptr() == layer.weight.data_ptr()
            True
        """
        part = Linear(0, 0)
        part.weight = nn.Parameter(self.weight[:rows], requires_grad=False)
        part.bias = None if self.bias is None else nn.Parameter(self.bias[:rows], requires_grad=False)
        part.scale = None if self.scale is None else self.scale[:rows]
        return part

    def forward(self, x: Tensor) -> Tensor:
        """Project the last dimension: (..., in) to (..., out)."""
        return linear(x, self.weight, self.bias, self.scale)
