"""The gate of a gated MLP."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """Multiply SiLU of the first half of the last dimension by the second half.

    Args:
        gate_up: (..., 2F), gate first.

    Returns:
        (..., F).

    Source:
        Shazeer, GLU Variants Improve Transformer, 2020, equation 6 (SwiGLU).

    Example:
        >>> import torch
        >>> silu_mul(torch.tensor([0.0, 2.0]))
        tensor([0.])
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
