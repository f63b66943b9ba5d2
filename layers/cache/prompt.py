"""The pass that takes a prompt into the arena: exact attention first, then only what the method keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ragged_compact import ragged_compact
from kernels.ragged_prefill import ragged_prefill, ragged_prefill_lse
from layers.cache.arena import ArenaCache
from layers.cache.past import Past
from layers.cache.staging import Candidates, Staging
from layers.compress.scorers import Observation
from layers.linear import Linear
from layers.methods.base import Method
from layers.rope import turn


class PromptPass:
    """Attend from a chunk of new tokens to all that is stored and to itself, layer by layer, compressing each at once.

    The first chunk of a conversation attends to itself only. A later one attends to what earlier ones left; afterwards
    every head again holds at most its share of everything seen. Peak memory is the arena and one layer's dense keys and
    values, and a copy of the arena where regions move. Where layers compete for the model's total, nothing is laid out
    or written before the last layer has been seen; until then what layers may still come to keep is staged. Dense keys
    and values that other layers read stay until the last of them has.

    Args:
        cache: the arena; laid out anew here.
        method: scores tokens and says which are protected.
        keep_BLH: int, on the host; tokens that each KV head may keep of everything seen. Where the method's allocator
            shares layers out, what counts is the sum of each layer, and where it spreads, the sum of all.
        room: per row, slots of each KV head for generated tokens.
        new_tokens: per row, how many of the chunk's T tokens are real; the rest is padding on the right.
        outputs: the layers' output projections in turn, for methods that look at them.
        frequencies_Bd: angular frequencies of RoPE, for methods that look at them or turn sinks.
        ends_BT: bool, new tokens that end a sentence, for methods that ask (`Method.sentences`).

    Raises:
        ValueError: the cache was planned for another kind of method, **or** there are no frequencies to turn sinks by.

    Example:
        >>> from layers.methods import build_method
        >>> from layers.plan import ArenaShape
        >>> shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=1, head_dim=4, slots=3, dtype=torch.float32)
        >>> cache, x = ArenaCache(shape, "cpu"), torch.randn(1, 9, 1, 4)
        >>> keep_two = torch.full((1, 1, 1), 2)
        >>> chunk = PromptPass(cache, build_method("streaming:sinks=1"), keep_BLH=keep_two, room=[1], new_tokens=[9])
        >>> _ = chunk.attend(torch.tensor([0]), x, x, x, None)
        >>> chunk.finish()
        >>> cache.pos
        tensor([[ 0,  8, -1]], dtype=torch.int32)
    """

    def __init__(
        self,
        cache: ArenaCache,
        method: Method,
        *,
        keep_BLH: Tensor,
        room: list[int],
        new_tokens: list[int],
        outputs: Iterable[Linear] = (),
        frequencies_Bd: Tensor | None = None,
        ends_BT: Tensor | None = None,
    ) -> None:
        device = cache.k.device
        self.cache, self.method = cache, method
        if cache.shape.evict != method.evict:
            raise ValueError(f"the cache was planned for {cache.shape.evict}, {method.name} needs {method.evict}")
        if cache.shape.sinks != method.turned_sinks:
            raise ValueError(
                f"the cache was planned to turn {cache.shape.sinks} sinks, {method.name} turns {method.turned_sinks}"
            )
        if cache.frequencies_Bd is not None:
            if frequencies_Bd is None:
                raise ValueError(f"{method.name} turns sinks: give PromptPass `frequencies_Bd`")
            cache.frequencies_Bd.copy_(frequencies_Bd)
        cache.restore_sinks()
        self.new_B = torch.tensor(new_tokens, dtype=torch.int32, device=device)
        new_T = torch.arange(max(new_tokens), dtype=torch.int32, device=device)
        self.position_BT = cache.position[:, None] + new_T
        self._pos_BT = self.position_BT.masked_fill(new_T >= self.new_B[:, None], -1)
        held = int(cache.length.max())
        self._past = Past(cache, method.evict, width=held) if held else None
        self._adds = method.evict is not None and method.evict.accumulate
        self._keep_BLH, self._room, self._tokens = keep_BLH.to(device), room, held + len(new_T)
        self._staging = Staging(method.spreading, keep_BLH[:, cache.owners]) if method.spreading else None
        if self._staging is None:
            self._lay_out(keep_BLH, method.most(keep_BLH, self._tokens))
            if self._past is not None:
                self._past.move_away(cache)
        self._outputs, self._frequencies_Bd = iter(outputs), frequencies_Bd
        if ends_BT is not None:
            self._remember(ends_BT)
        self._knows_ends = ends_BT is not None
        self._layer = 0
        self._readers = Counter(source for layer, source in enumerate(cache.source) if source != layer)
        self._dense: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _lay_out(self, keep_BLH: Tensor, most_B: Tensor) -> None:
        self.cache.lay_out(keep_BLH, self._room, most_B=most_B)
        self.cache.pos.fill_(-1)
        self._max_keep = min(int(most_B.max()), self._tokens)
        self._keep_BLH = keep_BLH.to(self.cache.k.device)

    def attend(self, layer_1: Tensor, q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int | None) -> Tensor:
        """Attend, then keep the layer's share; see `layers.cache.base.KVCache`."""
        k_BHSD, v_BHSD, pos_BHS, sums_BHS = self._with_past(layer_1, k_BTHD, v_BTHD)
        turned_BHSD = self._with_turned_sinks(k_BHSD, pos_BHS)
        dense = turned_BHSD, v_BHSD, pos_BHS
        lse_BTN = None
        if self.method.lse and self._past is None and (window is None or window >= q_BTND.shape[1]):  # costs nothing
            o_BTND, lse_BTN = ragged_prefill_lse(q_BTND, *dense, self.position_BT, window)
        else:
            o_BTND = ragged_prefill(q_BTND, *dense, self.position_BT, window)
        if self._layer in self._readers:
            self._dense[self._layer] = dense
        self.keep(layer_1, q_BTND, k_BHSD, v_BHSD, pos_BHS, window, sums_BHS, lse_BTN)
        return o_BTND

    def read(self, layer_1: Tensor, q_BTND: Tensor, window: int | None) -> Tensor:
        """Attend to all that the layer's source attended to; see `layers.cache.base.ReadableCache`."""
        source = self.cache.source[self._layer]
        o_BTND = ragged_prefill(q_BTND, *self._dense[source], self.position_BT, window)
        self._readers[source] -= 1
        if not self._readers[source]:
            del self._dense[source]
        next(self._outputs, None)
        self._layer += 1
        return o_BTND

    def keep(
        self,
        layer_1: Tensor,
        q_BTND: Tensor,
        k_BHSD: Tensor,
        v_BHSD: Tensor,
        pos_BHS: Tensor,
        window: int | None,
        sums_BHS: Tensor | None = None,
        lse_BTN: Tensor | None = None,
    ) -> None:
        """Store what the method keeps of a layer; `attend` calls it, and so may who has attended already.

        Args:
            layer_1: (1,) int64, index of the layer; layers come in order.
            q_BTND: new queries after RoPE.
            k_BHSD: keys of all tokens, stored and new, after RoPE, in order of position.
            v_BHSD: their values.
            pos_BHS: int32 absolute positions, -1 where empty.
            window: the layer's sliding window in tokens, or None.
            sums_BHS: fp32, what decoding has added up for stored tokens; None where nothing is.
            lse_BTN: fp32, what `ragged_prefill_lse` says of the new queries; None where nobody asked it.
        """
        keep_BH = self._keep_BLH.index_select(1, layer_1).squeeze(1)
        seen = Observation(
            q_BTND=q_BTND,
            position_BT=self._pos_BT,
            k_BHSD=k_BHSD,
            v_BHSD=v_BHSD,
            pos_BHS=pos_BHS,
            protected_BHS=self.method.protects(pos_BHS, self.cache.position + self.new_B, keep_BH),
            sliding=window,
            layer=self._layer,
            out=next(self._outputs, None),
            frequencies_Bd=self._frequencies_Bd,
            sums_BHS=sums_BHS,
            ends_BHS=self._ends(pos_BHS),
            lse_BTN=lse_BTN,
        )
        self._layer += 1
        worth_BHS = self.scores(seen)
        score_BHS = worth_BHS.masked_fill(seen.protected_BHS, float("inf"))
        tokens = Candidates(k_BHSD=k_BHSD, v_BHSD=v_BHSD, pos_BHS=pos_BHS, score_BHS=score_BHS)
        if self._staging is not None:
            self._staging.add(layer_1, tokens, protected_BHS=seen.protected_BHS, preference_B=self.preference(seen))
            return
        if (sharing := self.method.sharing) is not None:
            laid_out_BH, keep_BH = keep_BH, sharing.share(keep_BH, score_BHS, pos_BHS >= 0)
            if self.method.evict is not None:  # what a short prompt leaves is room to grow
                keep_BH = keep_BH + (laid_out_BH - keep_BH).sum(1, keepdim=True) // keep_BH.shape[1]
            self.cache.share_out(layer_1, laid_out_BH, keep_BH)
        if self.method.refine is not None:
            tokens = replace(tokens, score_BHS=self.method.refine(score_BHS, keep_BH, seen))
        self._write(layer_1, keep_BH, tokens)
        if self._adds and self.cache.stat is not None:  # sums go where their tokens go
            stat, worth_BHS1 = self.cache.stat[..., None], worth_BHS[..., None]
            self._compact(layer_1, keep_BH, tokens, (stat, stat), (worth_BHS1, worth_BHS1))

    def _write(self, layer_1: Tensor, keep_BH: Tensor, tokens: Candidates) -> None:
        """Store the best of a layer's tokens in its regions."""
        arena, dense = (self.cache.k, self.cache.v), (tokens.k_BHSD, tokens.v_BHSD)
        kept_BH = self._compact(layer_1, keep_BH, tokens, arena, dense)
        self.cache.kept.index_copy_(1, layer_1, kept_BH[:, None])

    def _compact(
        self,
        layer_1: Tensor,
        keep_BH: Tensor,
        tokens: Candidates,
        arena: tuple[Tensor, Tensor],
        dense: tuple[Tensor, Tensor],
    ) -> Tensor:
        offset_BH = self.cache.offset.index_select(1, layer_1).squeeze(1)
        places = self.cache.pos, offset_BH, keep_BH
        return ragged_compact(*arena, *places, self._max_keep, *dense, tokens.pos_BHS, tokens.score_BHS)

    def scores(self, seen: Observation) -> Tensor:
        """How much each token of a layer matters, (B, H, S); what it says of protected tokens does not matter."""
        return self.method.scorer(seen)

    def preference(self, seen: Observation) -> Tensor:
        """How much a layer wants of the model's total, (B,); asked of allocators that spread it."""
        assert self.method.spreading is not None
        return self.method.spreading.preference(seen)

    def finish(self) -> None:
        """Make the cache ready to decode, once every layer has attended."""
        cache, sinks = self.cache, self.method.sinks
        if self._staging is not None:
            keep_BLH = torch.zeros(cache.offset.shape, dtype=torch.int64)
            keep_BLH[:, cache.owners] = self._staging.budgets()
            self._lay_out(keep_BLH, keep_BLH.amax((1, 2)))
            for layer_1, tokens in self._staging.layers():
                self._write(layer_1, self._keep_BLH.index_select(1, layer_1).squeeze(1), tokens)
        cache.follow_sources()
        cache.ring_start.copy_(cache.kept.clamp(max=sinks) if self.method.ring_over_prompt else cache.kept)
        cache.position += self.new_B
        cache.begin_answer()

    def _with_past(
        self, layer_1: Tensor, k_BTHD: Tensor, v_BTHD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys, values, positions and sums of attention, stored and new, in order of position."""
        k_BHTD, v_BHTD = k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2)
        pos_BHT = self._pos_BT[:, None].expand(-1, k_BHTD.shape[1], -1)
        if self._past is None:
            return k_BHTD, v_BHTD, pos_BHT, None
        k_BHCD, v_BHCD, pos_BHC, sums_BHC = self._past.tokens(layer_1)
        return (
            torch.cat((k_BHCD, k_BHTD), dim=2),
            torch.cat((v_BHCD, v_BHTD), dim=2),
            torch.cat((pos_BHC, pos_BHT), dim=2),
            None if sums_BHC is None else F.pad(sums_BHC, (0, pos_BHT.shape[2])),
        )

    def _with_turned_sinks(self, k_BHSD: Tensor, pos_BHS: Tensor) -> Tensor:
        """Keys of which sinks are as far before the chunk as stored tokens are many; what is stored does not turn."""
        if self.cache.frequencies_Bd is None or self._past is None:
            return k_BHSD
        past = self._past.width
        held_BH1 = (pos_BHS[..., :past] >= 0).sum(-1, keepdim=True)
        sink_s = torch.arange(self.method.sinks, device=k_BHSD.device)
        column_BHs = (past - held_BH1 + sink_s).clamp(max=past - 1)
        by_BHs = self.cache.position[:, None, None] - past + column_BHs - pos_BHS.gather(2, column_BHs)
        column_BHsD = column_BHs[..., None].expand(-1, -1, -1, k_BHSD.shape[3])
        turned_BHsD = turn(k_BHSD.gather(2, column_BHsD), by_BHs, self.cache.frequencies_Bd[:, None, None])
        return k_BHSD.scatter(2, column_BHsD, turned_BHsD)

    def _remember(self, ends_BT: Tensor) -> None:
        """Write down where the chunk's sentences end, for itself and for later turns."""
        row_M, column_M = (self._pos_BT >= 0).nonzero(as_tuple=True)
        position_M, seen = self._pos_BT[row_M, column_M], int(self._pos_BT.max()) + 1
        if self.cache.ends is None or self.cache.shape.context < seen:
            raise ValueError(
                f"the arena remembers where sentences end for {self.cache.shape.context} tokens of each row, and there "
                f"are {seen}: plan its ArenaShape with a context of the longest conversation"
            )
        self.cache.ends[row_M, position_M] = ends_BT[row_M, column_M]

    def _ends(self, pos_BHS: Tensor) -> Tensor | None:
        """Which tokens of a layer end a sentence, by their positions; what it says of empty places does not matter."""
        if not self._knows_ends or self.cache.ends is None:
            return None
        row_B11 = torch.arange(len(pos_BHS), device=pos_BHS.device)[:, None, None]
        return self.cache.ends[row_B11, pos_BHS.clamp(min=0)]
