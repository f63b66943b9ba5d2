"""From integer capacities to places in the arena and bytes, before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layers.compress.decode_rules import ReplaceWorst

INT32_BYTES = 4
TABLES_PER_HEAD = 6
TABLES_PER_EVICTING_HEAD = 2
FP32_BYTES = 4
COUNTERS_PER_ROW = 2
FLAG_BYTES = 1


@dataclass(frozen=True, kw_only=True)
class ArenaShape:
    """The numbers that fix an arena's memory.

    Args:
        batch: rows, B.
        num_layers: L.
        num_kv_heads: H.
        head_dim: D.
        slots: places for one token of one KV head, per row, all layers together.
        dtype: of keys and values.
        evict: how tokens are replaced while decoding, if they are chosen by attention: takes a statistic per slot.
        context: positions of a row of which it is known whether a sentence ends there; 0 where nobody asks.
        sinks: first tokens of every region whose keys turn with each query: takes a copy of them; 0 where none turn.

    Example:
        >>> shape = ArenaShape(batch=1, num_layers=2, num_kv_heads=1, head_dim=4, slots=10, dtype=torch.float32)
        >>> shape.nbytes == 10 * (2 * 4 * 4 + 4) + 2 * 6 * 4 + 2 * 4 + 1
        True
    """

    batch: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    slots: int
    dtype: torch.dtype
    evict: ReplaceWorst | None = None
    context: int = 0
    sinks: int = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: key, value, position, and the statistic if there is one."""
        return 2 * self.head_dim * self.dtype.itemsize + INT32_BYTES + (FP32_BYTES if self.evict else 0)

    @property
    def row_overhead_bytes(self) -> int:
        """Bytes of one row's tables, counters and flags, and of what turning sinks takes."""
        tables = TABLES_PER_HEAD + (TABLES_PER_EVICTING_HEAD if self.evict else 0)
        numbers = tables * self.num_layers * self.num_kv_heads + COUNTERS_PER_ROW
        turning = self.sinks * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize
        turning += FP32_BYTES * self.head_dim // 2 if self.sinks else 0
        return INT32_BYTES * numbers + FLAG_BYTES * (1 + self.context) + turning

    @property
    def nbytes(self) -> int:
        """Bytes of everything that the arena allocates."""
        return self.batch * (self.slots * self.slot_bytes + self.row_overhead_bytes)

    def slots_within(self, nbytes: int) -> int:
        """How many slots per row fit into a number of bytes for the whole arena."""
        return max(0, nbytes // self.batch - self.row_overhead_bytes) // self.slot_bytes


def offsets(capacity_BLH: Tensor) -> Tensor:
    """First slot of every region when regions follow each other, layer by layer and head by head.

    Args:
        capacity_BLH: slots of each region.

    Returns:
        (B, L, H) of the same dtype.

    Example:
        >>> offsets(torch.tensor([[[2, 3], [1, 4]]])).tolist()
        [[[0, 2], [5, 6]]]
    """
    flat = capacity_BLH.flatten(1)
    return (flat.cumsum(-1) - flat).view_as(capacity_BLH).to(capacity_BLH.dtype)
