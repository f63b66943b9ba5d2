"""Keep the best tokens of every KV head and lay them out in the arena."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_compact(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BH: Tensor,
    keep_BH: Tensor,
    max_keep: int,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    score_BHS: Tensor,
) -> Tensor:
    """Copy each head's `keep` best-scored tokens to its region, in order of position.

    Equal scores are settled in favour of the earlier place, so the result does not depend on a sort's whims.
    No size depends on tensor values: every head copies `max_keep` tokens, those beyond its own share being repetitions
    of its last one.

    Args:
        k_arena: (B, slots, D), written.
        v_arena: (B, slots, D), written.
        pos: (B, slots) int32, written.
        offset_BH: first slot of each head's region.
        keep_BH: how many tokens each head may keep, at least 1.
        max_keep: an upper bound of `keep_BH`, known to the host.
        k_BHSD: candidate keys.
        v_BHSD: candidate values.
        pos_BHS: int32 absolute positions; -1 marks an empty place, never kept.
        score_BHS: fp32, higher is kept; at least one place of every head is not empty.

    Returns:
        (B, H) int32: tokens kept, the smaller of `keep_BH` and the places that are not empty.

    Example:
        >>> import torch
        >>> k_arena, v_arena = torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)
        >>> pos = torch.full((1, 2), -1, dtype=torch.int32)
        >>> k = torch.tensor([10.0, 11, 12]).view(1, 1, 3, 1); places = torch.arange(3, dtype=torch.int32).view(1, 1, 3)
        >>> score = torch.tensor([[[0.2, 0.1, 0.9]]]); zero, two = torch.zeros(1, 1).int(), torch.full((1, 1), 2)
        >>> ragged_compact(k_arena, v_arena, pos, zero, two, 2, k, k, places, score)
        tensor([[2]], dtype=torch.int32)
        >>> k_arena.flatten().tolist(), pos.tolist()
        ([10.0, 12.0], [[0, 2]])
    """
    B, _, S, D = k_BHSD.shape
    filled_BHS = pos_BHS >= 0
    kept_BH = torch.minimum(keep_BH, filled_BHS.sum(-1)).to(torch.int32)
    order_BHS = score_BHS.masked_fill(~filled_BHS, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    rank_C = torch.arange(min(max_keep, S), device=pos.device)
    best_BHC = order_BHS[..., : len(rank_C)]
    beyond_BHC = rank_C >= kept_BH[..., None]
    last = torch.iinfo(pos_BHS.dtype).max
    by_position_BHC = pos_BHS.gather(-1, best_BHC).masked_fill(beyond_BHC, last).argsort(dim=-1)
    rank_BHC = torch.minimum(rank_C, kept_BH[..., None] - 1).long()
    source_BHC = best_BHC.gather(-1, by_position_BHC).gather(-1, rank_BHC)
    slot_BHC = offset_BH.long()[..., None] + rank_BHC
    row_B11 = torch.arange(B, device=pos.device)[:, None, None]
    wide_BHCD = source_BHC[..., None].expand(-1, -1, -1, D)
    k_arena[row_B11, slot_BHC] = k_BHSD.gather(2, wide_BHCD)
    v_arena[row_B11, slot_BHC] = v_BHSD.gather(2, wide_BHCD)
    pos[row_B11, slot_BHC] = pos_BHS.gather(-1, source_BHC)
    return kept_BH
