"""Linear projection that picks its product by the number of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply by a weight matrix and add a bias if there is one.

    Compiled code on a CPU writes the product of a single row as a reduction, which decodes the default model 1.4 times
    as fast as BLAS in bf16 and as fast in fp32 (recipes/LOG.md).

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.

    Returns:
        (..., out).

    Example:
        >>> linear(torch.tensor([[3.0, 4.0]]), torch.ones(1, 2))
        tensor([[7.]])
    """
    one_row = x.numel() == x.shape[-1]
    if torch.compiler.is_compiling() and one_row and x.device.type == "cpu":
        y = (weight * x.view(-1)).sum(-1).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


class Linear(nn.Module):
    """A weight matrix and an optional bias; see `linear`.

    Args:
        in_features: columns of the weight.
        out_features: rows of the weight.
        bias: whether a bias is added.

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

    def forward(self, x: Tensor) -> Tensor:
        """Project the last dimension: (..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)
