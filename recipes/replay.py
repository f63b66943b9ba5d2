"""Prefill a prompt once and compress it in many ways: what makes a comparison of cache settings cheap.

Prefill is nearly all of the cost of a needle prompt, and until a layer is compressed it does not depend on the cache.
So one dense pass is recorded; for every method each budget becomes a row of an arena, and arenas decode together.
The outcome is that of `Engine.prefill`, `extend` and `step` for each setting; tests/test_recipes.py compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from kernels.ragged_prefill import ragged_prefill_lse
from layers.block import Block
from layers.cache.arena import ArenaCache
from layers.cache.prompt import PromptPass
from layers.compress.scorers import Observation
from layers.methods.base import Method
from layers.plan import ArenaShape
from zoo import Loaded


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's part of a recorded prefill: what it computed, and the model's sliding window."""

    q_BTND: Tensor
    k_BHSD: Tensor
    v_BHSD: Tensor
    lse_BTN: Tensor
    sliding: int | None


class Record:
    """A dense prefill of one prompt.

    Args:
        loaded: the model.
        ids: the prompt.

    Attributes:
        ids: the prompt.
        layers: what each layer computed.
        logits_1V: of the token after the prompt.
    """

    @torch.inference_mode()
    def __init__(self, loaded: Loaded, ids: list[int]) -> None:
        self.loaded, self.ids = loaded, ids
        self.layers: list[Layer] = []
        ids_1T = torch.tensor([ids], device=loaded.model.embed.weight.device)
        position_1T = torch.arange(len(ids), device=ids_1T.device)[None]
        x_1TE = loaded.model.hidden(ids_1T, loaded.model.rope(position_1T, len(ids)), self)
        self.logits_1V = loaded.model.logits(x_1TE[:, -1])

    def beginning(self, tokens: int) -> Record:
        """A record of the first tokens, without another prefill where RoPE does not depend on the prompt's length.

        Its `logits_1V` stay those after the whole prompt: they are for who lets something follow.
        """
        frequencies = self.loaded.model.rope.frequencies
        if not torch.equal(frequencies([tokens]), frequencies([len(self.ids)])):
            return Record(self.loaded, self.ids[:tokens])
        part = copy(self)
        part.ids = self.ids[:tokens]
        part.layers = [
            Layer(
                q_BTND=layer.q_BTND[:, :tokens],
                k_BHSD=layer.k_BHSD[:, :, :tokens],
                v_BHSD=layer.v_BHSD[:, :, :tokens],
                lse_BTN=layer.lse_BTN[:, :tokens],
                sliding=layer.sliding,
            )
            for layer in self.layers
        ]
        return part

    def attend(self, layer_1: Tensor, q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int | None) -> Tensor:
        """Attend within the prompt; see `layers.cache.base.KVCache`."""
        k_BHSD, v_BHSD = k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2)
        position_1T = torch.arange(len(self.ids), dtype=torch.int32, device=q_BTND.device)[None]
        pos_1HS = position_1T[:, None].expand(1, k_BHSD.shape[1], -1)
        o_BTND, lse_BTN = ragged_prefill_lse(q_BTND, k_BHSD, v_BHSD, pos_1HS, position_1T, window)
        self.layers.append(Layer(q_BTND=q_BTND, k_BHSD=k_BHSD, v_BHSD=v_BHSD, lse_BTN=lse_BTN, sliding=window))
        return o_BTND


class _Replay(PromptPass):
    """Takes in a prompt that is the same in all rows, so that it is looked at once."""

    _layer_and_first_row: tuple[Observation, Observation] | None = None

    def scores(self, seen: Observation) -> Tensor:
        return super().scores(self._first_row(seen)).expand(len(seen.pos_BHS), -1, -1)

    def preference(self, seen: Observation) -> Tensor:
        return super().preference(self._first_row(seen)).expand(len(seen.pos_BHS))

    def _first_row(self, seen: Observation) -> Observation:
        """Of a layer always the same observation, for it remembers what it has computed."""
        if self._layer_and_first_row is None or self._layer_and_first_row[0] is not seen:
            rows: dict[str, Any] = {name: x[:1] for name, x in vars(seen).items() if isinstance(x, Tensor)}
            self._layer_and_first_row = seen, replace(seen, **rows)
        return self._layer_and_first_row[1]


class Replay:
    """A recorded prompt in a cache, once per budget; then questions and answers go through it.

    Args:
        record: the prefill.
        method: of the cache.
        budgets: tokens per KV head of each row.
        room: slots of each KV head for the answer; a method that evicts while decoding takes one instead.
        later: tokens that further turns will add.

    Raises:
        ValueError: the method lets layers read another's cache, so that the recorded prefill is not its own.

    Attributes:
        record: the prefill.
        cache: ready to decode, row i holding what budget i keeps.
        frequencies_Bd: of RoPE, radians per token.
        logits_BV: of the token after what was taken in so far.
    """

    @torch.inference_mode()
    def __init__(self, record: Record, method: Method, budgets: list[int], *, room: int, later: int = 0) -> None:
        if method.shared_layers:
            raise ValueError(
                f"{method.name} cannot be replayed: layers that read another's cache change the prefill; use an Engine"
            )
        config, model = record.loaded.config, record.loaded.model
        k_BHSD, rows = record.layers[0].k_BHSD, len(budgets)
        self.record, self._method, self._budgets, self._room = record, method, budgets, method.room(room)
        self.frequencies_Bd = model.rope.frequencies([len(record.ids)] * rows).to(k_BHSD.device)
        self._seen = len(record.ids)
        shape = ArenaShape(
            batch=rows,
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            slots=int((self._keep(len(record.ids) + later) + self._room).sum((1, 2)).max()),
            dtype=k_BHSD.dtype,
            evict=method.evict,
            context=len(record.ids) + later if method.sentences else 0,
            sinks=method.turned_sinks,
        )
        self.cache = ArenaCache(shape, k_BHSD.device)
        chunk = _Replay(self.cache, method, **self._arguments(len(record.ids), record.ids))
        pos_BHS = chunk.position_BT[:, None].expand(rows, config.num_kv_heads, -1)
        for index, layer in enumerate(record.layers):
            q_BTND, k_BHSD, v_BHSD = (x.expand(rows, -1, -1, -1) for x in (layer.q_BTND, layer.k_BHSD, layer.v_BHSD))
            layer_1 = torch.tensor([index], device=k_BHSD.device)
            chunk.keep(
                layer_1, q_BTND, k_BHSD, v_BHSD, pos_BHS, layer.sliding, lse_BTN=layer.lse_BTN.expand(rows, -1, -1)
            )
        chunk.finish()
        self.logits_BV = record.logits_1V.expand(rows, -1)

    def _keep(self, tokens: int) -> Tensor:
        config = self.record.loaded.config
        sizes = {"num_layers": config.num_layers, "num_kv_heads": config.num_kv_heads}
        return torch.stack([self._method.shares(budget=b, prompt=tokens, **sizes) for b in self._budgets])

    def _arguments(self, seen: int, new: list[int]) -> dict[str, Any]:
        rows, loaded, ends_BT = len(self._budgets), self.record.loaded, None
        if self._method.sentences:
            ids_BT = torch.tensor([new] * rows, device=self.cache.k.device)
            ends_BT = loaded.sentences(ids_BT, [len(new)] * rows)
        return {
            "keep_BLH": self._keep(seen),
            "room": [self._room] * rows,
            "new_tokens": [len(new)] * rows,
            "outputs": [block.attention.out for block in cast("list[Block]", loaded.model.blocks)],
            "frequencies_Bd": self.frequencies_Bd,
            "ends_BT": ends_BT,
        }

    @torch.inference_mode()
    def extend(self, ids: list[int]) -> None:
        """Take in a further turn, the same in every row."""
        model, rows = self.record.loaded.model, len(self._budgets)
        self._seen += len(ids)
        chunk = PromptPass(self.cache, self._method, **self._arguments(self._seen, ids))
        rotation = model.rope.rotation(chunk.position_BT, self.frequencies_Bd, endless=self._method.in_cache)
        x_BTE = model.hidden(torch.tensor([ids] * rows, device=self.cache.k.device), rotation, chunk)
        chunk.finish()
        self.logits_BV = model.logits(x_BTE[:, -1])


@torch.inference_mode()
def answer(replays: Sequence[Replay], ids: list[int]) -> list[Tensor]:
    """Decode a given answer through copies of the caches of several replays of one model, together where they can.

    Args:
        replays: prompts in caches.
        ids: A token ids.

    Returns:
        Per replay (B, A, V) logits, those at a predicting answer token a from the prompt and the answer before it.
    """

    def decode(batch: _Batch) -> Sequence[Tensor]:
        rows = len(batch.logits_BV)
        return torch.stack([batch.logits_BV, *(batch.step([token] * rows) for token in ids[:-1])], dim=1).unbind()

    return [torch.stack(rows) for rows in _in_batches(replays, decode)]


@torch.inference_mode()
def generate(
    replays: Sequence[Replay], lead: list[int], *, max_new_tokens: int, stop_ids: Collection[int]
) -> list[list[list[int]]]:
    """Continue an answer greedily through copies of the caches of several replays of one model.

    Args:
        replays: prompts in caches.
        lead: token ids that the answer begins with.
        max_new_tokens: limit.
        stop_ids: tokens that end an answer.

    Returns:
        Per replay and row, token ids without the lead and what ends them.
    """

    def decode(batch: _Batch) -> list[list[int]]:
        logits_BV = batch.logits_BV
        for token in lead:
            logits_BV = batch.step([token] * len(logits_BV))
        texts: list[list[int]] = [[] for _ in logits_BV]
        going = set(range(len(texts)))
        for _ in range(max_new_tokens):
            tokens = logits_BV.argmax(-1).tolist()
            going -= {row for row in going if tokens[row] in stop_ids}
            for row in going:
                texts[row].append(tokens[row])
            if not going:
                break
            logits_BV = batch.step(tokens)
        return texts

    return _in_batches(replays, decode)


def _in_batches(replays: Sequence[Replay], decode: Callable[[_Batch], Sequence[Any]]) -> list[list[Any]]:
    """Decode caches of one kind and of similar size together: what each replay's rows give."""
    batches: dict[object, list[int]] = {}
    for index, replay in enumerate(replays):
        shape = replay.cache.shape
        kind = shape.evict, shape.sinks, replay._method.in_cache, shape.slots.bit_length()
        batches.setdefault(kind, []).append(index)
    results: list[list[Any]] = [[] for _ in replays]
    for indices in batches.values():
        rows = iter(decode(_Batch([replays[index] for index in indices])))
        for index in indices:
            results[index] = [next(rows) for _ in replays[index].logits_BV]
    return results


class _Batch:
    """The rows of several replays in one cache."""

    def __init__(self, replays: Sequence[Replay]) -> None:
        self._model, self._endless = replays[0].record.loaded.model, replays[0]._method.in_cache
        self._cache = _joined([replay.cache for replay in replays])
        self._frequencies_Bd = torch.cat([replay.frequencies_Bd for replay in replays])
        self.logits_BV = torch.cat([replay.logits_BV for replay in replays])

    def step(self, tokens: list[int]) -> Tensor:
        token_B1 = torch.tensor(tokens, device=self._cache.k.device)[:, None]
        self._cache.begin_step(torch.ones(len(tokens), dtype=torch.bool, device=token_B1.device))
        position_B1 = self._cache.position[:, None]
        rotation = self._model.rope.rotation(position_B1, self._frequencies_Bd, endless=self._endless)
        x_BTE = self._model.hidden(token_B1, rotation, self._cache)
        self._cache.end_step()
        return self._model.logits(x_BTE[:, -1])


def _joined(caches: Sequence[ArenaCache]) -> ArenaCache:
    """One cache with the rows of several, as wide as the widest."""
    shape = replace(
        caches[0].shape,
        batch=sum(cache.shape.batch for cache in caches),
        slots=max(cache.shape.slots for cache in caches),
        context=max(cache.shape.context for cache in caches),
    )
    joined = ArenaCache(shape, caches[0].k.device, most=max(cache.most for cache in caches))
    first = 0
    for cache in caches:
        rows = joined.first(first + cache.shape.batch)
        for name, tensor in cache.save().items():
            part = getattr(rows, name)[first:]
            if tensor.ndim > 1:
                part = part[:, : tensor.shape[1]]
            part.copy_(tensor)
        first += cache.shape.batch
    return joined
