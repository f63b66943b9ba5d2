"""Where the layers of a prompt wait for their budgets when all layers compete for one total."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.compress.allocators import SpreadingAllocator

_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Tokens of a layer that may be kept.

    Args:
        k_BHSD: keys after RoPE.
        v_BHSD: values.
        pos_BHS: int32 absolute positions, -1 where empty.
        score_BHS: fp32, higher is kept.
    """

    k_BHSD: Tensor
    v_BHSD: Tensor
    pos_BHS: Tensor
    score_BHS: Tensor

    def best(self, count: int) -> Candidates:
        """The best of every head, the earlier one among equals, in memory of their own and in the order they had."""
        if count >= self.pos_BHS.shape[2]:
            return Candidates(**{name: x.clone() for name, x in vars(self).items()})
        rank_BHS = self.score_BHS.clamp(min=_LOWEST).masked_fill(self.pos_BHS < 0, float("-inf"))
        place_BHC = rank_BHS.argsort(dim=-1, descending=True, stable=True)[..., :count].sort().values
        row_B, head_H = (torch.arange(n, device=place_BHC.device) for n in place_BHC.shape[:2])
        return Candidates(
            **{name: x[row_B[:, None, None], head_H[:, None], place_BHC] for name, x in vars(self).items()}
        )


class Staging:
    """Candidates of the layers seen so far.

    With `cascade`, every new layer claims its part of the total from those before it, and what they cannot keep any
    more is let go once it is a quarter of what they hold. So all layers together never hold much more than 4/3 of the
    model's total; in a batch, a layer is as wide as its most demanding row. Without it, every token of every layer
    waits for the last layer.

    Args:
        spreading: says what each layer may keep.
        keep_BLH: int, on the host; tokens per KV head, of which the total of a row counts. L is the number of layers
            that have a cache of their own, each of which will be added.

    Example:
        >>> from layers.compress.allocators import LayerPreference
        >>> staging = Staging(LayerPreference(), torch.full((1, 2, 1), 3))
        >>> x, pos = torch.zeros(1, 1, 9, 4), torch.arange(9, dtype=torch.int32).view(1, 1, 9)
        >>> for layer, wants in enumerate((3.0, 1.0)):
        ...     tokens = Candidates(k_BHSD=x, v_BHSD=x, pos_BHS=pos, score_BHS=-pos.float())
        ...     staging.add(torch.tensor([layer]), tokens, protected_BHS=pos < 1, preference_B=torch.tensor([wants]))
        >>> staging.budgets().flatten().tolist()
        [4, 2]
        >>> [tokens.pos_BHS.flatten().tolist() for _, tokens in staging.layers()]
        [[0, 1, 2, 3, 4, 5], [0, 1, 2]]
    """

    def __init__(self, spreading: SpreadingAllocator, keep_BLH: Tensor) -> None:
        B, self._num_layers, self._num_kv_heads = keep_BLH.shape
        self._spreading = spreading
        self._total_B = keep_BLH.sum((1, 2)) // self._num_kv_heads
        self._numbers_3BL = torch.empty(3, B, 0, dtype=torch.float64)
        self._may_keep_BL = torch.empty(B, 0, dtype=torch.int64)
        self._layers: list[tuple[Tensor, Candidates]] = []

    def add(self, layer_1: Tensor, tokens: Candidates, *, protected_BHS: Tensor, preference_B: Tensor) -> None:
        """Take a layer in, and cut those before it.

        Args:
            layer_1: (1,) int64, index of the layer.
            tokens: its candidates.
            protected_BHS: bool, those that are kept whatever happens.
            preference_B: what the layer wants.
        """
        filled_BHS = tokens.pos_BHS >= 0
        least_B, most_B = ((x & filled_BHS).sum(-1).amax(1) for x in (protected_BHS, filled_BHS))
        numbers_3B = torch.stack((preference_B.double(), least_B, most_B)).cpu()  # here the host waits
        self._numbers_3BL = torch.cat((self._numbers_3BL, numbers_3B[..., None]), dim=-1)
        self._may_keep_BL = torch.cat((self._may_keep_BL, numbers_3B[2, :, None].long()), dim=1)
        if self._spreading.cascade:
            self._may_keep_BL = torch.minimum(self._may_keep_BL, self._spread() + 1)  # rounding may give one back
        *before, mine = self._may_keep_BL.amax(0).tolist()
        for index, count in enumerate(before):
            layer, held = self._layers[index]
            if count <= 0.75 * held.pos_BHS.shape[2]:
                self._layers[index] = layer, held.best(count)
        self._layers.append((layer_1, tokens.best(mine)))

    def _spread(self) -> Tensor:
        preference_BL, least_BL, most_BL = self._numbers_3BL
        # The protected tokens of layers to come are on top of what is spread; there, too, are as many.
        to_come = self._num_layers - least_BL.shape[1]
        total_B = self._total_B - to_come * least_BL.amin(1).long()
        return self._spreading.spread(preference_BL, total_B=total_B, least_BL=least_BL.long(), most_BL=most_BL.long())

    def budgets(self) -> Tensor:
        """What every KV head keeps, (B, L, H) int64 on the host, once all layers are there."""
        keep_BL = torch.minimum(self._spread(), self._may_keep_BL)
        return keep_BL[..., None].repeat(1, 1, self._num_kv_heads)

    def layers(self) -> Iterator[tuple[Tensor, Candidates]]:
        """Hand the layers out and forget them."""
        while self._layers:
            yield self._layers.pop(0)
