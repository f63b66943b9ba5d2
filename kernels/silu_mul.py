"""The gate of a gated MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import native


def silu_mul(gate_up: Tensor) -> Tensor:
    """Multiply SiLU of the first half of the last dimension by the second half.

    Args:
        gate_up: (..., 2F), gate first.

    Returns:
        (..., F).

    Source:
        Shazeer, GLU Variants Improve Transformer, 2020, equation 6 (SwiGLU).

    Example:
        >>> silu_mul(torch.tensor([0.0, 2.0]))
        tensor([0.])
    """
    if native.serves(gate_up):
        y: Tensor = torch.ops.headkv.silu_mul(gate_up)
        return y
    return reference(gate_up)


def reference(gate_up: Tensor) -> Tensor:
    """What `silu_mul` computes."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


torch.library.define("headkv::silu_mul", "(Tensor gate_up) -> Tensor")
torch.library.impl("headkv::silu_mul", "CompositeExplicitAutograd")(reference)
