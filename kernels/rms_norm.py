"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale every row to unit root mean square, in fp32, then by a learned weight.

    Args:
        x: (..., E), any float dtype.
        weight: (E,).
        eps: added to the mean square, > 0.

    Returns:
        (..., E) in x's dtype.

    Source:
        Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.

    Example:
        >>> rms_norm(torch.tensor([3.0, 4.0]), torch.ones(2), 1e-6)
        tensor([0.8485, 1.1314])
    """
    if native.serves(x):
        y: Tensor = torch.ops.headkv.rms_norm(x, weight, eps)
        return y
    return reference(x, weight, eps)


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What `rms_norm` computes."""
    x_fp32 = x.float()
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return weight * (x_fp32 * scale).to(x.dtype)


torch.library.define("headkv::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.impl("headkv::rms_norm", "CompositeExplicitAutograd")(reference)
