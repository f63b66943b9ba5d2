"""Token embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Look token ids up in a table.

    Args:
        vocab_size: rows of the table, V.
        hidden_size: columns of the table, E.

    Attributes:
        weight: (V, E), int8 once quantised.
        scale: (V,) fp32, what one unit of each quantised row is worth, or None.
        dtype: of what a quantised table gives, or None.

    Example:
        >>> import torch
        >>> embed = Embedding(3, 2)
        >>> embed.weight = torch.nn.Parameter(torch.arange(6.0).view(3, 2))
        >>> embed(torch.tensor([[2]])).tolist()
        [[[4.0, 5.0]]]
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.scale: Tensor | None
        self.register_buffer("scale", None)
        self.dtype: torch.dtype | None = None

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embed ids (B, T) to (B, T, E)."""
        x_BTE = F.embedding(ids_BT, self.weight)
        if self.scale is not None:
            x_BTE = (x_BTE * self.scale[ids_BT][..., None]).to(self.dtype)
        return x_BTE
