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

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Embed ids (B, T) to (B, T, E)."""
        return F.embedding(ids_BT, self.weight)
