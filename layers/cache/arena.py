"""The ragged cache: all layers and heads in one arena, each KV head with a region of its own size."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from kernels.ragged_append import ragged_append
from kernels.ragged_decode import ragged_decode
from kernels.ragged_worst import ragged_worst
from layers.compress.decode_rules import ring_slot, worst_slot
from layers.plan import ArenaShape, offsets
from layers.rope import turn


class ArenaCache:
    """Keys, values and positions of a fixed number of slots, and the tables that say whose they are.

    Memory is allocated once. What a prompt changes are numbers in the tables, never shapes, so one compiled decode step
    serves every prompt. Attention does not depend on the order of slots within a region.

    A `PromptPass` fills the cache. Then, per token: `begin_step`, `attend` once per layer, `end_step`. A step that is
    interrupted before `end_step` has not happened for any later prompt or step; only a full region has lost the token
    that had to go, and running sums of attention have seen the step.

    Args:
        shape: sizes and dtype.
        device: where it lives.
        most: slots of the largest region that will be laid out, as far as that is known.
        compiled: whether `attend` will be compiled; then the number of slots is marked as one that may change.
        source: per layer, whose regions it reads: its own, or those of an earlier layer that has its own. In the tables
            a layer that reads has what its source has, and slots only once. None if every layer has its own.

    Raises:
        ValueError: a source is a later layer, **or** has no regions of its own.

    Attributes:
        source: per layer, whose regions it reads.
        owners: layers that have regions of their own, in order.
        k: (B, slots, D) keys after RoPE, at absolute positions but for sinks that turn.
        v: (B, slots, D) values.
        pos: (B, slots) int32 absolute positions, -1 where nothing was written since the last prompt.
        offset: (B, L, H) int32, first slot of each region.
        capacity: (B, L, H) int32, slots of each region.
        kept: (B, L, H) int32, prompt tokens in each region.
        ring_start: (B, L, H) int32, first slot within a region that generated tokens may replace.
        length: (B, L, H) int32, filled slots of each region.
        position: (B,) int32, tokens seen, which is the next token's absolute position.
        generated: (B,) int32, tokens generated since the last prompt.
        stat: (B, slots) fp32, what decoding knows of each slot's worth; None if tokens do not go by attention, as with
            the following two. See `layers.compress.decode_rules.ReplaceWorst`.
        recent: (B, L, H) int32, last tokens that may not go.
        worst: (B, L, H) int32, slot of the arena whose token goes next, as of the last attention.
        ends: (B, context) bool, positions where a sentence of a prompt ends, generated tokens not looked at; None if
            the method does not ask.
        sink_k: (B, L, H, sinks, D) keys of the sinks at their absolute positions, the first in place of those that a
            region lacks; None if sinks do not turn, as with the following.
        frequencies_Bd: fp32, radians per token by which they turn.

    Example:
        >>> shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=1, head_dim=4, slots=8, dtype=torch.float32)
        >>> ArenaCache(shape, "cpu").nbytes == shape.nbytes
        True
    """

    def __init__(
        self,
        shape: ArenaShape,
        device: torch.device | str,
        *,
        most: int = 0,
        compiled: bool = False,
        source: Sequence[int] | None = None,
    ) -> None:
        B, L, H, D = shape.batch, shape.num_layers, shape.num_kv_heads, shape.head_dim

        def integers(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        self.source = list(range(L) if source is None else source)
        if wrong := [layer for layer, of in enumerate(self.source) if not 0 <= of <= layer or self.source[of] != of]:
            raise ValueError(
                f"layer {wrong[0]} cannot read layer {self.source[wrong[0]]}: a source must be an earlier layer that "
                "reads no other"
            )
        self.owners = sorted(set(self.source))
        self.shape, self._compiled = shape, compiled
        self._grow(most)
        self.k = torch.zeros(B, shape.slots, D, dtype=shape.dtype, device=device)
        self.v = torch.zeros(B, shape.slots, D, dtype=shape.dtype, device=device)
        self.pos = integers(B, shape.slots)
        self.offset, self.capacity, self.kept = integers(B, L, H), integers(B, L, H), integers(B, L, H)
        self.ring_start, self.length, self._slot = integers(B, L, H), integers(B, L, H), integers(B, L, H)
        self.position, self.generated = integers(B), integers(B)
        self.stat: Tensor | None = None
        self.recent: Tensor | None = None
        self.worst: Tensor | None = None
        self.ends: Tensor | None = None
        if shape.context:
            self.ends = torch.zeros(B, shape.context, dtype=torch.bool, device=device)
        if shape.evict is not None:
            self.stat = torch.zeros(B, shape.slots, dtype=torch.float32, device=device)
            self.recent, self.worst = integers(B, L, H), integers(B, L, H)
        self.sink_k: Tensor | None = None
        self.frequencies_Bd: Tensor | None = None
        if shape.sinks:
            self.sink_k = torch.zeros(B, L, H, shape.sinks, D, dtype=shape.dtype, device=device)
            self.frequencies_Bd = torch.zeros(B, D // 2, device=device)
        if compiled:
            for tensor in (self.k, self.v, self.pos, self.stat):
                if tensor is not None:
                    torch._dynamo.mark_dynamic(tensor, 1)
        self._active_B = torch.ones(B, dtype=torch.bool, device=device)
        self.reset()

    @property
    def nbytes(self) -> int:
        """Bytes allocated, of everything that the cache owns."""
        tables = (self.offset, self.capacity, self.kept, self.ring_start, self.length, self._slot)
        small = (self.position, self.generated, self._active_B)
        asked = (self.stat, self.recent, self.worst, self.ends, self.sink_k, self.frequencies_Bd)
        given = (tensor for tensor in asked if tensor is not None)
        return sum(tensor.nbytes for tensor in (self.k, self.v, self.pos, *tables, *small, *given))

    @property
    def most(self) -> int:
        """No region has more slots.

        It sizes what decoding launches on a GPU. So it only ever grows, and what was captured before is then of no use.
        """
        return self._span.shape[0]

    def _grow(self, most: int) -> None:
        self._span = torch.empty(most, 0)  # a number is a constant to torch.compile, a size need not be one
        if self._compiled:
            torch._dynamo.mark_dynamic(self._span, 0)

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.pos.fill_(-1)
        for counter in (self.length, self.position, self.generated):
            counter.zero_()
        if self.ends is not None:
            self.ends.zero_()

    def first(self, rows: int) -> ArenaCache:
        """The first rows as a cache of their own, in the same memory.

        Args:
            rows: how many, from 1 to the batch.

        Example:
            >>> shape = ArenaShape(batch=3, num_layers=1, num_kv_heads=1, head_dim=4, slots=8, dtype=torch.float32)
            >>> cache = ArenaCache(shape, "cpu")
            >>> _ = cache.first(2).position.add_(5)
            >>> cache.position.tolist()
            [5, 5, 0]
        """
        part = copy(self)
        part.shape = replace(self.shape, batch=rows)
        for name, tensor in self._tensors().items():
            setattr(part, name, tensor[:rows])
        return part

    def save(self) -> dict[str, Tensor]:
        """Copy everything that prompts and steps change.

        Returns:
            Copies by attribute, for `load`.

        Example:
            >>> shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=1, head_dim=4, slots=8, dtype=torch.float32)
            >>> cache = ArenaCache(shape, "cpu")
            >>> saved = cache.save()
            >>> _ = cache.position.add_(5)
            >>> cache.load(saved)
            >>> cache.position.tolist()
            [0]
        """
        return {name: tensor.clone() for name, tensor in self._tensors().items()}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Make the contents those that this cache had when `save` copied them; all tensors stay where they are.

        Args:
            saved: what `save` returned.
        """
        for name, tensor in self._tensors().items():
            tensor.copy_(saved[name])

    def _tensors(self) -> dict[str, Tensor]:
        """Contents, tables and counters; `most` is none of them, for it only ever grows."""
        return {n: value for n, value in vars(self).items() if isinstance(value, Tensor) and value is not self._span}

    def lay_out(self, keep_BLH: Tensor, room: list[int], *, most_B: Tensor | None = None) -> None:
        """Give every region its place.

        Args:
            keep_BLH: int, on the host; prompt tokens that each KV head may keep. Those of layers that read another's do
                not count.
            room: per row, further slots of each region, for generated tokens.
            most_B: int, on the host; prompt tokens that any KV head of a row may come to keep once layers are shared
                out. None if they will not be.

        Raises:
            ValueError: the regions need more slots than there are.
        """
        room_B = torch.tensor(room)
        capacity_BLH = torch.zeros_like(keep_BLH)
        capacity_BLH[:, self.owners] = keep_BLH[:, self.owners] + room_B[:, None, None]
        needed = int(capacity_BLH.sum((1, 2)).max())
        if needed > self.shape.slots:
            raise ValueError(f"the regions need {needed} slots per row, the arena has {self.shape.slots}")
        self.capacity.copy_(capacity_BLH)
        self.offset.copy_(offsets(capacity_BLH))
        self.follow_sources()
        if most_B is None:
            most_B = keep_BLH.amax((1, 2))
        if (most := int((most_B + room_B).max())) > self.most:
            self._grow(most)

    def follow_sources(self) -> None:
        """Point layers that read another's regions to where these are now, and to what they hold."""
        if len(self.owners) < len(self.source):
            for table in (self.offset, self.capacity, self.kept):
                table.copy_(table[:, self.source])

    def share_out(self, layer_1: Tensor, keep_BH: Tensor, shared_BH: Tensor) -> None:
        """Move the borders between the regions of a layer; the layer stays where it is.

        Args:
            layer_1: (1,) int64, index of the layer.
            keep_BH: int, prompt tokens that each KV head was laid out for.
            shared_BH: int, those that it may keep now; of a row no more in all than before.

        Example:
            >>> shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=2, head_dim=4, slots=8, dtype=torch.float32)
            >>> cache, keep = ArenaCache(shape, "cpu"), torch.tensor([[[3, 3]]])
            >>> cache.lay_out(keep, room=[1], most_B=torch.tensor([6]))
            >>> cache.share_out(torch.tensor([0]), keep[:, 0], torch.tensor([[5, 1]]))
            >>> cache.offset.tolist(), cache.capacity.tolist()
            ([[[0, 6]]], [[[6, 2]]])
        """
        first_BL1 = self.offset[..., :1].index_select(1, layer_1)
        capacity_BLH = self.capacity.index_select(1, layer_1) + (shared_BH - keep_BH)[:, None]
        self.capacity.index_copy_(1, layer_1, capacity_BLH.int())
        self.offset.index_copy_(1, layer_1, (first_BL1 + offsets(capacity_BLH)).int())

    def begin_answer(self) -> None:
        """Make ready to decode, once a prompt's tokens, `kept` and `ring_start` are in place."""
        self.length.copy_(self.kept)
        self.generated.zero_()
        if self.recent is not None and self.shape.evict is not None:
            self.recent.copy_(self.shape.evict.protected(self.capacity - 1))
            self._slot.copy_(self.offset + self.kept)
        if self.sink_k is not None:
            _, slot_BX1 = self._sink_places()
            self.sink_k.copy_(self.k.gather(1, slot_BX1.expand(-1, -1, self.k.shape[2])).view_as(self.sink_k))

    def restore_sinks(self) -> None:
        """Turn sinks back to their absolute positions, as a prompt finds and leaves them."""
        if self.sink_k is not None:
            self._write_sinks(self.sink_k, self._sink_places()[1], torch.ones_like(self._active_B))

    def _turn_sinks(self) -> None:
        """Put sinks as far before this step's queries as their places in the region are before the last one.

        All other tokens are there already: they are those before the query, without a gap.
        """
        if self.sink_k is None or self.frequencies_Bd is None:
            return
        place_BLHs, slot_BX1 = self._sink_places()
        pos_BLHs = self.pos.gather(1, slot_BX1[..., 0]).view_as(place_BLHs)
        skipped_BLH = self.position[:, None, None] + 1 - self.length
        by_BLHs = skipped_BLH[..., None] + place_BLHs - pos_BLHs
        turned_BLHsD = turn(self.sink_k, by_BLHs, self.frequencies_Bd[:, None, None, None])
        self._write_sinks(turned_BLHsD, slot_BX1, self._active_B)

    def _sink_places(self) -> tuple[Tensor, Tensor]:
        """Where each sink is: (B, L, H, sinks) in its region, and (B, L * H * sinks, 1) in the arena."""
        place_s = torch.arange(self.shape.sinks, dtype=torch.int32, device=self.k.device)
        place_BLHs = place_s * (place_s < self.ring_start[..., None])
        return place_BLHs, (self.offset[..., None] + place_BLHs).flatten(1)[..., None].long()

    def _write_sinks(self, k_BLHsD: Tensor, slot_BX1: Tensor, active_B: Tensor) -> None:
        """Place keys of rows that take part. Who shares a slot, as readers and their source do, has equal keys."""
        slot_BXD = slot_BX1.expand(-1, -1, self.k.shape[2])
        there_BLH11 = (active_B[:, None, None] & (self.ring_start > 0))[..., None, None]
        before_BLHsD = self.k.gather(1, slot_BXD).view_as(k_BLHsD)
        self.k.scatter_(1, slot_BXD, torch.where(there_BLH11, k_BLHsD, before_BLHsD).flatten(1, 3))

    def begin_step(self, active_B: Tensor) -> None:
        """Choose, for all layers at once, where the next token of every head goes, and turn sinks to it.

        Where the worst token goes, that was chosen by the end of the last step.

        Args:
            active_B: bool, rows that take part; the others keep their contents.
        """
        self._active_B.copy_(active_B)
        if self.worst is None:
            self._slot.copy_(self.offset + ring_slot(self.ring_start, self.kept, self.capacity, self.generated))
        held_BLH = self.kept + (self.generated + active_B)[:, None, None]
        self.length.copy_(torch.minimum(held_BLH, self.capacity))
        self._turn_sinks()

    def end_step(self) -> None:
        """Count the token that every active row has stored."""
        self.generated += self._active_B
        self.position += self._active_B
        if self.worst is not None:
            self._slot.copy_(worst_slot(self.offset, self.kept, self.capacity, self.generated, self.worst))

    @property
    def next_slot(self) -> Tensor:
        """(B, L, H) int32: where each head's next token goes, whose contents no longer count; between steps only."""
        return self._slot

    def decode_tables(self, layer_1: Tensor) -> tuple[Tensor, ...]:
        """What `kernels.decode_blocks` needs of the cache, within a step."""
        tables = self._slot, self.offset, self.length
        return (self.k, self.v, self.pos, *tables, layer_1, self.position, self._active_B)

    def attend(self, layer_1: Tensor, q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int | None) -> Tensor:
        """Store one token per row and attend to everything kept; see `layers.cache.base.KVCache`."""
        slot_BLHT, counters = self._slot[..., None], (self.position, self._active_B)
        ragged_append(self.k, self.v, self.pos, slot_BLHT, layer_1, k_BTHD, v_BTHD, *counters)
        q_BND = q_BTND.squeeze(1)
        o_BND, lse_BN = self._attention(layer_1, q_BND, window)
        if (rule := self.shape.evict) is not None:
            assert self.stat is not None and self.recent is not None and self.worst is not None
            ragged_worst(
                self.stat,
                self.worst,
                q_BND,
                lse_BN,
                self.k,
                self.pos,
                self.offset,
                self.length,
                self.recent,
                layer_1,
                *counters,
                window,
                accumulate=rule.accumulate,
                whole_layer=rule.heads == "layer",
                most=self.most,
            )
        return o_BND[:, None]

    def read(self, layer_1: Tensor, q_BTND: Tensor, window: int | None) -> Tensor:
        """Attend to everything kept, this step's token included; see `layers.cache.base.ReadableCache`.

        Who reads has no say in what goes: that is chosen by the attention of the layer that owns the regions.
        """
        o_BND, _ = self._attention(layer_1, q_BTND.squeeze(1), window)
        return o_BND[:, None]

    def _attention(self, layer_1: Tensor, q_BND: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        tables = self.pos, self.offset, self.length, layer_1, self.position
        return ragged_decode(q_BND, self.k, self.v, *tables, window, most=self.most)
