"""Weights in 8 bits: a scale per row of every matrix, activations as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers.embedding import Embedding
from layers.linear import Linear


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round every row to whole multiples of 1/127 of its largest magnitude.

    Args:
        weight: (rows, columns), any float dtype.

    Returns:
        (rows, columns) int8 and (rows,) fp32, what one unit of each row is worth.

    Example:
        >>> quantize_rows(torch.tensor([[2.54, -1.0]]))
        (tensor([[127, -50]], dtype=torch.int8), tensor([0.0200]))
    """
    wide = weight.float()
    scale = wide.abs().amax(1) / 127
    steps = wide / scale.where(scale > 0, 1.0)[:, None]
    return steps.round().to(torch.int8), scale


def quantize_weights(model: nn.Module) -> None:
    """Quantise, in place, the matrices of every `Linear` and `Embedding` of a model; norms and biases stay.

    Decoding then reads half of what it reads in bf16. Many rows at once, as in a prompt, multiply by a copy of one
    matrix at a time in the activations' dtype.

    Args:
        model: holds them.

    Example:
        >>> layer = Linear(2, 1)
        >>> layer.weight = nn.Parameter(torch.tensor([[2.0, 1.0]]), requires_grad=False)
        >>> quantize_weights(layer)
        >>> layer.weight.dtype, round(layer(torch.tensor([[1.0, 2.0]])).item(), 1)
        (torch.int8, 4.0)
    """
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            if isinstance(module, Embedding):
                module.dtype = module.weight.dtype
            weight, module.scale = quantize_rows(module.weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
