"""Rotary position embedding: the rotation itself."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native


def apply_rope(x_BTHD: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """Rotate the two halves of every head vector against each other.

    Args:
        x_BTHD: queries or keys.
        cos_BTd: cosine of each angle, d = D / 2, as `layers.rope.RotaryEmbedding` makes them.
        sin_BTd: sine of each angle.

    Returns:
        (B, T, H, D) in x's dtype.

    Source:
        Su et al., RoFormer, 2021, equation 34, in the half-rotation order of the published checkpoints.

    Example:
        >>> quarter_turn = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
        >>> apply_rope(torch.tensor([1.0, 2.0]).view(1, 1, 1, 2), *quarter_turn).flatten()
        tensor([-2.,  1.])
    """
    if native.serves(x_BTHD):
        y_BTHD: Tensor = torch.ops.headkv.rope(x_BTHD, cos_BTd.to(x_BTHD.dtype), sin_BTd.to(x_BTHD.dtype))
        return y_BTHD
    return reference(x_BTHD, cos_BTd, sin_BTd)


def reference(x_BTHD: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """What `apply_rope` computes."""
    cos, sin = cos_BTd[:, :, None].to(x_BTHD.dtype), sin_BTd[:, :, None].to(x_BTHD.dtype)
    first, second = x_BTHD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


torch.library.define("headkv::rope", "(Tensor x_BTHD, Tensor cos_BTd, Tensor sin_BTd) -> Tensor")
torch.library.impl("headkv::rope", "CompositeExplicitAutograd")(reference)
