"""Write one new token per KV head into its slot of the arena."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_append(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    slot_BLH: Tensor,
    layer_1: Tensor,
    k_BHD: Tensor,
    v_BHD: Tensor,
    position_B: Tensor,
    active_B: Tensor,
) -> None:
    """Store one key and value per (row, KV head) of a layer, in place.

    A row that is not active changes nothing, and the work has the same shape in every step.

    Args:
        k_arena: (B, slots, D), written.
        v_arena: (B, slots, D), written.
        pos: (B, slots) int32, absolute position of each slot, written.
        slot_BLH: int32, arena slot that each head writes.
        layer_1: (1,) int64, the layer.
        k_BHD: new keys, after RoPE.
        v_BHD: new values.
        position_B: int32, absolute position of the new token.
        active_B: bool, rows that take part.

    Example:
        >>> k, v, pos = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.full((1, 3), -1, dtype=torch.int32)
        >>> slot, position = torch.tensor([[[1]]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
        >>> new = torch.ones(1, 1, 2)
        >>> ragged_append(k, v, pos, slot, torch.tensor([0]), new, new, position, torch.tensor([True]))
        >>> k[0, :, 0].tolist(), pos[0].tolist()
        ([0.0, 1.0, 0.0], [-1, 7, -1])
    """
    torch.ops.headkv.ragged_append(k_arena, v_arena, pos, slot_BLH, layer_1, k_BHD, v_BHD, position_B, active_B)


def reference(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    slot_BLH: Tensor,
    layer_1: Tensor,
    k_BHD: Tensor,
    v_BHD: Tensor,
    position_B: Tensor,
    active_B: Tensor,
) -> None:
    """What `ragged_append` computes: rows that are not active write back what is there."""
    slot_BH = slot_BLH.index_select(1, layer_1).squeeze(1).long()
    row_B1 = torch.arange(slot_BH.shape[0], device=slot_BH.device)[:, None]
    active_B1, active_B11 = active_B[:, None], active_B[:, None, None]
    k_arena[row_B1, slot_BH] = torch.where(active_B11, k_BHD, k_arena[row_B1, slot_BH])
    v_arena[row_B1, slot_BH] = torch.where(active_B11, v_BHD, v_arena[row_B1, slot_BH])
    pos[row_B1, slot_BH] = torch.where(active_B1, position_B[:, None], pos[row_B1, slot_BH])


torch.library.define(
    "headkv::ragged_append",
    "(Tensor(a!) k_arena, Tensor(b!) v_arena, Tensor(c!) pos, Tensor slot_BLH, Tensor layer_1, Tensor k_BHD, "
    "Tensor v_BHD, Tensor position_B, Tensor active_B) -> ()",
)


torch.library.impl("headkv::ragged_append", "CompositeExplicitAutograd")(reference)


def _fake(*arguments: Tensor) -> None:
    pass


torch.library.register_fake("headkv::ragged_append", _fake)
