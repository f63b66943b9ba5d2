"""What an arena held before a prompt's next chunk, while that chunk is written over it."""

from __future__ import annotations

import torch
from torch import Tensor

from layers.cache.arena import ArenaCache
from layers.compress.decode_rules import ReplaceWorst


class Past:
    """The tokens stored so far, layer by layer, in order of position.

    Empty places come first, so that the last stored token and the first new one are neighbours. Tables and positions
    are copied, keys and values only if asked for.

    Args:
        cache: the arena, before it is laid out anew.
        evict: how decoding replaced tokens.
        width: tokens of the longest region, C.

    Example:
        >>> from layers.plan import ArenaShape
        >>> shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=1, head_dim=4, slots=3, dtype=torch.float32)
        >>> cache = ArenaCache(shape, "cpu")
        >>> _ = cache.length.fill_(2), cache.pos.copy_(torch.tensor([[7, 5, -1]])), cache.position.fill_(8)
        >>> Past(cache, None, width=2).tokens(torch.tensor([0]))[2].tolist()
        [[[5, 7]]]
    """

    def __init__(self, cache: ArenaCache, evict: ReplaceWorst | None, *, width: int) -> None:
        self.width = width
        self._evicts = evict is not None
        self._offset, self._length, self._pos = cache.offset.clone(), cache.length.clone(), cache.pos.clone()
        self._next_slot, self._position = cache.next_slot.clone(), cache.position.clone()
        self._k, self._v = cache.k, cache.v
        self._stat = cache.stat.clone() if evict is not None and evict.accumulate and cache.stat is not None else None

    def move_away(self, cache: ArenaCache) -> None:
        """Copy keys and values if layers have moved since.

        A layer's past is copied before anything of the layer is written, so others are in no danger.
        """
        if not torch.equal(self._offset[..., 0], cache.offset[..., 0]):
            self._k, self._v = cache.k.clone(), cache.v.clone()

    def tokens(self, layer_1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A layer's keys and values (B, H, C, D), positions (B, H, C), -1 where empty, and sums of attention.

        Args:
            layer_1: (1,) int64, index of the layer.

        Returns:
            The four; sums are None where decoding adds none up, and 0 in empty places.
        """

        def of_layer(table: Tensor) -> Tensor:
            return table.index_select(1, layer_1).squeeze(1).long()[..., None]

        place_C = torch.arange(self.width, device=self._pos.device)
        offset_BH1 = of_layer(self._offset)
        filled_BHC = place_C < of_layer(self._length)
        index_BHC = torch.where(filled_BHC, offset_BH1 + place_C, offset_BH1)
        if self._evicts:  # the token that goes next is evicted already
            filled_BHC = filled_BHC & (index_BHC != of_layer(self._next_slot))
        row_B11 = torch.arange(len(index_BHC), device=index_BHC.device)[:, None, None]
        # A step that was interrupted may have stored its token, whose position is not behind us yet, in some layers.
        pos_BHC = self._pos[row_B11, index_BHC]
        filled_BHC = filled_BHC & (pos_BHC >= 0) & (pos_BHC < self._position[:, None, None])
        index_BHC = torch.where(filled_BHC, index_BHC, offset_BH1)
        pos_BHC, order_BHC = pos_BHC.masked_fill(~filled_BHC, -1).sort(dim=-1)
        index_BHC = index_BHC.gather(-1, order_BHC)
        sums_BHC = None
        if self._stat is not None:
            sums_BHC = self._stat[row_B11, index_BHC].masked_fill(pos_BHC < 0, 0.0)
        return self._k[row_B11, index_BHC], self._v[row_B11, index_BHC], pos_BHC, sums_BHC
