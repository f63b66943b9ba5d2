"""Attention of one query token over KV heads that keep different numbers of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_decode(
    q_BND: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BH: Tensor,
    length_BH: Tensor,
    slot_C: Tensor,
    position_B: Tensor,
    window: int | None,
) -> Tensor:
    """Attend from one token per row to the filled slots of every KV head.

    Each head's region is read as a rectangle as long as `slot_C`; what lies beyond a head's length is read from its
    first slot instead and masked, so unused memory never enters the arithmetic (not even NaN times zero).

    Args:
        q_BND: queries after RoPE.
        k_arena: (B, slots, D).
        v_arena: (B, slots, D).
        pos: (B, slots) int32, absolute position of each slot.
        offset_BH: first slot of each head's region.
        length_BH: filled slots of each head, at least 1.
        slot_C: 0, 1, …, C - 1 with C at least the largest length; a tensor so that C may change without recompiling.
        position_B: absolute position of the query.
        window: sliding window in tokens, or None for full attention.

    Returns:
        (B, N, D) in q's dtype.

    Source:
        The rectangle is the plain form of split-KV decoding (Dao et al., Flash-Decoding, 2023) with one split.

    Example:
        >>> import torch
        >>> k = torch.zeros(1, 4, 2); v = torch.tensor([[[1.0, 1], [3, 3], [9, 9], [9, 9]]])
        >>> one, two = torch.zeros(1, 1, dtype=torch.int32), torch.full((1, 1), 2)
        >>> ragged_decode(torch.ones(1, 1, 2), k, v, torch.arange(4)[None], one, two, torch.arange(3), one[0], None)
        tensor([[[2., 2.]]])
    """
    B, N, D = q_BND.shape
    H = offset_BH.shape[1]
    offset_BH1 = offset_BH.long()[..., None]
    keep_BHC = slot_C < length_BH[..., None]
    index_BHC = torch.where(keep_BHC, offset_BH1 + slot_C, offset_BH1)
    row_B11 = torch.arange(B, device=q_BND.device)[:, None, None]
    if window is not None:
        keep_BHC = keep_BHC & (pos[row_B11, index_BHC] > (position_B - window)[:, None, None])
    k_BHCD, v_BHCD = k_arena[row_B11, index_BHC], v_arena[row_B11, index_BHC]
    q_BHGD = q_BND.view(B, H, N // H, D)
    score_BHGC = q_BHGD.float() @ k_BHCD.transpose(-1, -2).float() * D**-0.5
    weight_BHGC = score_BHGC.masked_fill(~keep_BHC[:, :, None], float("-inf")).softmax(-1)
    o_BHGD: Tensor = weight_BHGC.to(v_BHCD.dtype) @ v_BHCD
    return o_BHGD.reshape(B, N, D)
