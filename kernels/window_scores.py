"""How much attention the last prompt tokens pay to each stored token."""

from __future__ import annotations

import torch
from torch import Tensor


def window_scores(
    q_BWND: Tensor, k_BHSD: Tensor, pos_BHS: Tensor, position_BW: Tensor, *, rows: str, window: int | None = None
) -> Tensor:
    """Attention weights of W observing queries, reduced over the queries.

    One KV head is scored at a time, so memory is B·G·W·S fp32 numbers.

    Args:
        q_BWND: queries of the observation window, after RoPE.
        k_BHSD: stored keys, after RoPE.
        pos_BHS: int32 absolute positions of the keys; -1 marks an empty place.
        position_BW: absolute positions of the queries; -1 marks a query that does not exist; the others
            see at least one key, as a token sees itself.
        rows: "mean" or "max" over the window's queries.
        window: the model's sliding window in tokens, or None.

    Returns:
        (B, N, S) fp32; 0 at empty places.

    Raises:
        ValueError: `rows` is neither "mean" nor "max".

    Source:
        Li et al., SnapKV, 2024, section 4 (mean up to a constant: published code sums).

    Example:
        >>> import torch
        >>> q, k, pos = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4), torch.tensor([[[0, 1]]])
        >>> window_scores(q, k, pos, torch.tensor([[1]]), rows="mean")
        tensor([[[0.5000, 0.5000]]])
    """
    if rows not in ("mean", "max"):
        raise ValueError(f'rows must be "mean" or "max", not {rows!r}')
    B, _, N, D = q_BWND.shape
    H, S = k_BHSD.shape[1:3]
    exists_BW1 = (position_BW >= 0)[..., None]
    out_BHGS = torch.empty(B, H, N // H, S, dtype=torch.float32, device=q_BWND.device)
    same_for_all = pos_BHS.stride(1) == 0  # one mask, then
    for head in range(H):
        if head == 0 or not same_for_all:
            pos_B1S = pos_BHS[:, head, None]
            seen_BWS = (pos_B1S >= 0) & (pos_B1S <= position_BW[..., None])
            if window is not None:
                seen_BWS &= pos_B1S > position_BW[..., None] - window
            hidden_B1WS = ~(seen_BWS | ~exists_BW1)[:, None]
        q_BGWD = q_BWND.unflatten(2, (H, N // H))[:, :, head].transpose(1, 2).float() * D**-0.5
        logit_BGWS = q_BGWD @ k_BHSD[:, head, None].float().transpose(-1, -2)
        weight_BGWS = logit_BGWS.masked_fill_(hidden_B1WS, float("-inf")).softmax(-1)
        weight_BGWS.masked_fill_(~exists_BW1[:, None], 0.0)
        if rows == "max":
            out_BHGS[:, head] = weight_BGWS.amax(2)
        else:
            out_BHGS[:, head] = weight_BGWS.sum(2) / exists_BW1.sum(1).clamp(min=1)[:, None]
    return out_BHGS.flatten(1, 2)
