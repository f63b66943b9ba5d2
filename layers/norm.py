"""RMS normalisation as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Normalise the last dimension to unit root mean square and scale it.

    Args:
        size: length of the last dimension.
        eps: added to the mean square, > 0.

    Example:
        >>> import torch
        >>> norm = RMSNorm(2, eps=1e-6)
        >>> norm.weight = torch.nn.Parameter(torch.ones(2))
        >>> norm(torch.tensor([3.0, 4.0])).detach()
        tensor([0.8485, 1.1314])
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise: (..., E) to (..., E)."""
        return rms_norm(x, self.weight, self.eps)
