"""Attention of a chunk of new tokens over a ragged past and over itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERY_BLOCK = 1024


def ragged_prefill(
    q_BTND: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BT: Tensor,
    window: int | None,
) -> Tensor:
    """Attend from T new tokens to the S tokens stored so far, the new ones included, causally by position.

    The last T of the S stored tokens are the new ones; the first S - T are a past that may differ from head to head.
    Without past and within the window this is plain causal attention and no mask is built. Otherwise the mask of one
    KV head and at most 1024 queries exists at a time.

    Args:
        q_BTND: queries after RoPE.
        k_BHSD: keys after RoPE.
        v_BHSD: values; where `pos_BHS` is -1 they must be finite.
        pos_BHS: int32 absolute positions; -1 marks an empty place.
        position_BT: absolute positions of the queries.
        window: sliding window in tokens, or None for full attention.

    Returns:
        (B, T, N, D) in q's dtype.

    Example:
        >>> import torch
        >>> q = k = torch.zeros(1, 2, 1, 4); v = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1).expand(1, 1, 2, 4)
        >>> pos = torch.arange(2)
        >>> ragged_prefill(q, k.transpose(1, 2), v, pos[None, None], pos[None], None)[0, :, 0, 0]
        tensor([1., 2.])
    """
    B, T, N, D = q_BTND.shape
    H, S = k_BHSD.shape[1:3]
    q_BNTD = q_BTND.transpose(1, 2)
    if S == T and (window is None or window >= T):
        return F.scaled_dot_product_attention(q_BNTD, k_BHSD, v_BHSD, is_causal=True, enable_gqa=N != H).transpose(1, 2)
    o_BHGTD = torch.empty(B, H, N // H, T, D, dtype=q_BTND.dtype, device=q_BTND.device)
    for head, q_BGTD in enumerate(q_BNTD.unflatten(1, (H, N // H)).unbind(1)):
        k_B1SD, v_B1SD, pos_B1S = k_BHSD[:, head, None], v_BHSD[:, head, None], pos_BHS[:, head, None]
        for start in range(0, T, _QUERY_BLOCK):
            rows = slice(start, start + _QUERY_BLOCK)
            position_Bt1 = position_BT[:, rows, None]
            seen_BtS = (pos_B1S >= 0) & (pos_B1S <= position_Bt1)
            if window is not None:
                seen_BtS &= pos_B1S > position_Bt1 - window
            o_BHGTD[:, head, :, rows] = F.scaled_dot_product_attention(
                q_BGTD[:, :, rows], k_B1SD, v_B1SD, attn_mask=seen_BtS[:, None], enable_gqa=N != H
            )
    return o_BHGTD.flatten(1, 2).transpose(1, 2)
