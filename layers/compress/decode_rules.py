"""Where the next generated token goes."""

from __future__ import annotations

from torch import Tensor


def ring_slot(start_BLH: Tensor, kept_BLH: Tensor, capacity_BLH: Tensor, generated_B: Tensor) -> Tensor:
    """Append into free slots, and once a region is full replace its oldest token that may go.

    Slots from `start` to the end of a region form a ring: prompt tokens kept beyond `start` come first, then generated
    ones, so the cursor runs from the first free slot to the region's end and goes on at `start`.

    Args:
        start_BLH: first slot, within its region, that may ever be replaced.
        kept_BLH: prompt tokens in each region, at least `start`.
        capacity_BLH: slots of each region, more than `start`.
        generated_B: tokens generated since the prompt.

    Returns:
        (B, L, H): slot within the region.

    Source:
        Xiao et al., StreamingLLM, 2023 (a ring behind protected sinks).

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1, 1, dtype=torch.int32)
        >>> [int(ring_slot(one, 2 * one, 4 * one, torch.tensor([n]))) for n in range(5)]
        [2, 3, 1, 2, 3]
    """
    return start_BLH + (kept_BLH - start_BLH + generated_B[:, None, None]) % (capacity_BLH - start_BLH)
