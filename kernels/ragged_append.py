"""Write one new token per KV head into its slot of the arena."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_append(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    slot_BH: Tensor,
    k_BHD: Tensor,
    v_BHD: Tensor,
    position_B: Tensor,
    active_B: Tensor,
) -> None:
    """Store one key and value per (row, KV head), in place.

    A row that is not active writes back what its slot already holds, so a finished row of a batch changes nothing and
    the work has the same shape in every step.

    Args:
        k_arena: (B, slots, D), written.
        v_arena: (B, slots, D), written.
        pos: (B, slots) int32, absolute position of each slot, written.
        slot_BH: arena slot that each head writes.
        k_BHD: new keys, after RoPE.
        v_BHD: new values.
        position_B: absolute position of the new token.
        active_B: bool, rows that take part.

    Example:
        >>> import torch
        >>> k, v, pos = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.full((1, 3), -1, dtype=torch.int32)
        >>> new = torch.ones(1, 1, 2)
        >>> ragged_append(k, v, pos, torch.tensor([[1]]), new, new, torch.tensor([7]), torch.tensor([True]))
        >>> k[0, :, 0].tolist(), pos[0].tolist()
        ([0.0, 1.0, 0.0], [-1, 7, -1])
    """
    slot_BH = slot_BH.long()
    row_B1 = torch.arange(slot_BH.shape[0], device=slot_BH.device)[:, None]
    active_B1, active_B11 = active_B[:, None], active_B[:, None, None]
    k_arena[row_B1, slot_BH] = torch.where(active_B11, k_BHD, k_arena[row_B1, slot_BH])
    v_arena[row_B1, slot_BH] = torch.where(active_B11, v_BHD, v_arena[row_B1, slot_BH])
    pos[row_B1, slot_BH] = torch.where(active_B1, position_B[:, None].to(pos.dtype), pos[row_B1, slot_BH])
