"""What an attention layer asks of a cache: one verb; another one if the layer has no keys and values of its own."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kernels.ragged_prefill import ragged_prefill


class KVCache(Protocol):
    """Anything that takes a layer's new keys and values and answers its queries."""

    def attend(self, layer_1: Tensor, q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int | None) -> Tensor:
        """Store the new tokens as the method wants and attend to everything visible.

        Args:
            layer_1: (1,) int64, index of the layer; a tensor so that one compiled block serves every layer.
            q_BTND: new queries after RoPE.
            k_BTHD: new keys after RoPE.
            v_BTHD: new values.
            window: the layer's sliding window in tokens, or None.

        Returns:
            (B, T, N, D).
        """
        ...


class ReadableCache(KVCache, Protocol):
    """A cache in which a layer can read what an earlier one has stored."""

    def read(self, layer_1: Tensor, q_BTND: Tensor, window: int | None) -> Tensor:
        """Attend to everything visible of the layer that this one reads, the new tokens included.

        Args:
            layer_1: (1,) int64, index of the layer that reads.
            q_BTND: its new queries after RoPE.
            window: its sliding window in tokens, or None.

        Returns:
            (B, T, N, D).
        """
        ...


class NoCache:
    """Plain causal attention that stores nothing: the dense forward.

    Example:
        >>> x = torch.randn(1, 3, 2, 4)
        >>> NoCache().attend(torch.tensor([0]), x, x, x, None).shape
        torch.Size([1, 3, 2, 4])
    """

    def attend(self, layer_1: Tensor, q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int | None) -> Tensor:
        """Attend causally within the new tokens."""
        B, T, H, _ = k_BTHD.shape
        position_BT = torch.arange(T, dtype=torch.int32, device=q_BTND.device).expand(B, T)
        pos_BHS = position_BT[:, None].expand(B, H, T)
        return ragged_prefill(q_BTND, k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2), pos_BHS, position_BT, window)
