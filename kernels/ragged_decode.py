"""Attention of one query token over KV heads that keep different numbers of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_decode(
    q_BND: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BLH: Tensor,
    length_BLH: Tensor,
    layer_1: Tensor,
    position_B: Tensor,
    window: int | None,
) -> Tensor:
    """Attend from one token per row to the filled slots of every KV head of a layer.

    Scores, weights and sums are fp32. Memory beyond a head's length is not read. On a CPU this is C++
    (`kernels/cpp/ragged_decode.cpp`): each key and value is read once for its whole query group, in tiles of a fixed
    size, so that a row gives the same bits alone and in any batch.

    Args:
        q_BND: queries after RoPE, in the arena's dtype.
        k_arena: (B, slots, D).
        v_arena: (B, slots, D).
        pos: (B, slots) int32, absolute position of each slot.
        offset_BLH: int32, first slot of each head's region.
        length_BLH: int32, filled slots of each head.
        layer_1: (1,) int64, the layer.
        position_B: int32, absolute position of the query.
        window: sliding window in tokens, or None for full attention.

    Returns:
        (B, N, D) in q's dtype; zero for a head without a slot, or none within the window.

    Source:
        Dao et al., Flash-Decoding, 2023 (split keys, merged by their log-sum-exp).

    Example:
        >>> k = torch.zeros(1, 4, 2); v = torch.tensor([[[1.0, 1], [3, 3], [9, 9], [9, 9]]])
        >>> pos, length = torch.arange(4, dtype=torch.int32)[None], torch.full((1, 1, 1), 2, dtype=torch.int32)
        >>> first, here = torch.zeros_like(length), torch.tensor([1], dtype=torch.int32)
        >>> ragged_decode(torch.ones(1, 1, 2), k, v, pos, first, length, torch.tensor([0]), here, None)
        tensor([[[2., 2.]]])
    """
    o_BND: Tensor = torch.ops.headkv.ragged_decode(
        q_BND, k_arena, v_arena, pos, offset_BLH, length_BLH, layer_1, position_B, window or 0
    )
    return o_BND


def reference(
    q_BND: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BLH: Tensor,
    length_BLH: Tensor,
    layer_1: Tensor,
    position_B: Tensor,
    window: int | None,
) -> Tensor:
    """What `ragged_decode` computes, over a rectangle as long as the longest head.

    What lies beyond a head's length is read from its first slot instead and masked. On a GPU this waits for the longest
    length.
    """
    B, N, D = q_BND.shape
    offset_BH1, length_BH1 = (
        table.index_select(1, layer_1).squeeze(1)[..., None].long() for table in (offset_BLH, length_BLH)
    )
    slot_C = torch.arange(int(length_BH1.max()), device=q_BND.device)
    seen_BHC = slot_C < length_BH1
    index_BHC = torch.where(seen_BHC, offset_BH1 + slot_C, offset_BH1.clamp(max=k_arena.shape[1] - 1))
    row_B11 = torch.arange(B, device=q_BND.device)[:, None, None]
    if window:
        seen_BHC &= pos[row_B11, index_BHC] > (position_B - window)[:, None, None]
    k_BHCD = k_arena[row_B11, index_BHC].float()
    v_BHCD = v_arena[row_B11, index_BHC].float().masked_fill(~seen_BHC[..., None], 0.0)
    q_BHGD = q_BND.float().unflatten(1, (offset_BH1.shape[1], -1))
    score_BHGC = (q_BHGD @ k_BHCD.transpose(-1, -2) * D**-0.5).masked_fill(~seen_BHC[:, :, None], float("-inf"))
    weight_BHGC = score_BHGC.softmax(-1).where(seen_BHC.any(-1)[:, :, None, None], 0.0)
    o_BHGD: Tensor = weight_BHGC @ v_BHCD
    return o_BHGD.reshape(B, N, D).to(q_BND.dtype)


torch.library.define(
    "headkv::ragged_decode",
    "(Tensor q_BND, Tensor k_arena, Tensor v_arena, Tensor pos, Tensor offset_BLH, Tensor length_BLH, Tensor layer_1, "
    "Tensor position_B, int window) -> Tensor",
)


torch.library.impl("headkv::ragged_decode", "CompositeExplicitAutograd")(reference)


def _fake(
    q_BND: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BLH: Tensor,
    length_BLH: Tensor,
    layer_1: Tensor,
    position_B: Tensor,
    window: int,
) -> Tensor:
    return torch.empty_like(q_BND, memory_format=torch.contiguous_format)


torch.library.register_fake("headkv::ragged_decode", _fake)
