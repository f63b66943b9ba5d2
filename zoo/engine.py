"""The object that users hold: a model, its cache, and the steps between them."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from checkpoints import LayerSharing
from kernels import native
from kernels.few_rows_linear import MOST_ROWS
from layers.block import Block
from layers.budget import Budget, parse_budget
from layers.cache.arena import ArenaCache
from layers.cache.prompt import PromptPass
from layers.fused import FusedBlocks
from layers.methods import build_method, needs_importance
from layers.plan import ArenaShape
from layers.sampler import check_sampling, sample
from zoo.graphs import CudaGraphs, GraphedStep, places
from zoo.load import Loaded, head_importance, layer_sharing


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What the cache holds.

    Args:
        cache: the method.
        budget: as parsed; None for a cache that keeps everything.
        kept: (B, L, H) int32, tokens held by each KV head; where decoding evicts, with the one that goes next.
        nbytes: bytes of the cache's allocation.
        full_nbytes: bytes that a full cache of the tokens seen would take, in the same dtype, keys and values alone.
        tokens_seen: per row.
        prefill: "whole" if every prompt so far was one dense pass, "chunked" if one was longer than `chunk_tokens`.
    """

    cache: str
    budget: str | None
    kept: Tensor
    nbytes: int
    full_nbytes: int
    tokens_seen: list[int]
    prefill: str


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A conversation as it was; made by `Engine.snapshot`.

    Args:
        cache: whose contents it holds.
        contents: copies of the cache's tensors.
        frequencies_Bd: of the conversation's rotation.
        tokens_seen: per row.
        pending: per row, tokens handed out that the cache does not hold yet.
        prefill: see `Stats`.
    """

    cache: ArenaCache
    contents: dict[str, Tensor]
    frequencies_Bd: Tensor
    tokens_seen: tuple[int, ...]
    pending: tuple[tuple[int, ...], ...]
    prefill: str


class Engine:
    """Runs a model over a cache of fixed size.

    The cache is planned and allocated here. `prefill` starts a conversation, `step` decodes one token per row, `extend`
    adds a turn; `generate` and `stream` do all of it. A prompt batch of another size makes a new cache of as many rows.

    Args:
        loaded: what `load` returned.
        cache: a method's name, with options if wanted: "headkv", "headkv:beta=1.1,preset=published", "full".
        budget: tokens per KV head kept of the prompt (128), a share of it ("12.5%") or bytes for everything ("64MiB");
            None takes the method's default. The full cache keeps every token and reads no budget.
        max_new_tokens: tokens that `generate` and `stream` produce at most unless told otherwise.
        decode_room: slots per KV head for generated tokens, on top of the budget; None takes `max_new_tokens`. Beyond
            it the oldest generated tokens make place. The full cache has none of its own: all of it is room. Methods
            that evict while decoding (h2o, tova) have one slot, and take no `decode_room`.
        max_context: tokens of a conversation at most; None takes the model's trained context. A full cache is as large.
            With `streaming:positions=in-cache`, None sets a conversation no end. What must then be within the trained
            context is a region's slots, and every prompt, turn or chunk of one with the tokens held before it.
        batch: rows to allocate now.
        compile: decode through compiled code. True takes what is fastest: on a CPU and up to 8 rows one C++ operator
            for all blocks (built once per machine), for more torch.compile, once for all layers, and so for methods
            that evict while decoding, whatever the rows; on a CUDA device the whole step as a graph, captured when the
            first token is decoded. "inductor" takes torch.compile for the blocks in any case. From then on all engines
            of the process use the C++ operators where PyTorch's would run.
        importance: head-importance file for methods that need one; None takes the one that ships for the model.
        sharing: layer-sharing file for `kvsharer`; None takes the one that ships for the model.
        chunk_tokens: prompts longer than this are taken in chunks of as many tokens, compressed after each.
        allow_overflow: allow conversations longer than the model's trained context.

    Attributes:
        blocks: what prompts go through: the model's blocks, or those that read another layer's cache in their place.
        endless: a conversation has no end.

    Raises:
        ValueError: unknown method or option, **or** compiling is wanted and no compiler works, **or** a budget that
            cannot be read or is below sinks and window, **or** sizes that are not positive, **or** a context beyond the
            model's, **or** a cache larger than free memory, **or** regions beyond the context of a conversation without
            end, **or** more layers are to share than a search found.
        CheckpointError: no usable head importance, **or** nothing usable that says which layers can share.

    Example:
        >>> from zoo import load  # doctest: +SKIP
        >>> engine = Engine(load(), cache="headkv", budget=128, max_new_tokens=64)  # doctest: +SKIP
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        cache: str = "headkv",
        budget: int | str | None = None,
        max_new_tokens: int = 256,
        decode_room: int | None = None,
        max_context: int | None = None,
        batch: int = 1,
        compile: bool | Literal["inductor"] = False,
        importance: str | Path | None = None,
        sharing: str | Path | None = None,
        chunk_tokens: int = 16_384,
        allow_overflow: bool = False,
    ) -> None:
        room = max_new_tokens if decode_room is None else decode_room
        for name, value in {
            "max_new_tokens": max_new_tokens,
            "decode_room": room,
            "max_context": max_context,
            "batch": batch,
            "chunk_tokens": chunk_tokens,
        }.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if compile not in (True, False, "inductor"):
            raise ValueError(f'compile must be True, False or "inductor", not {compile!r}')
        config = loaded.config
        trained = config.max_position
        if max_context is not None and max_context > trained and not allow_overflow:
            raise ValueError(
                f"max_context {max_context} is beyond the {trained} tokens that {loaded.name} was trained for: "
                "lower it, or allow overflow"
            )
        scores = head_importance(loaded, importance) if needs_importance(cache) else None
        self.loaded, self.model, self.max_new_tokens = loaded, loaded.model, max_new_tokens
        self.method = build_method(cache, scores)
        self._source = list(range(config.num_layers))
        self.blocks = cast("list[Block]", list(self.model.blocks))
        if self.method.shared_layers:
            self._share_layers(layer_sharing(loaded, sharing))
        self._owners = [layer for layer, source in enumerate(self._source) if layer == source]
        self.max_context = max_context or trained
        self.endless = self.method.in_cache and max_context is None
        self.chunk_tokens = chunk_tokens
        self.budget: Budget | None = None
        if self.method.default_budget is not None:
            self.budget = parse_budget(self.method.default_budget if budget is None else budget)
        if decode_room is not None and self.method.evict is not None:
            raise ValueError(f"{self.method.name} evicts while decoding and needs no decode_room: leave it out")
        self._room = self.method.room(room) if self.budget else 0
        weight = self.model.norm.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._compile = compile
        self._capture = partial(CudaGraphs, self._device) if compile and self._device.type == "cuda" else None
        if compile and self._device.type == "cpu":
            try:
                native.load()
            except RuntimeError as error:
                raise ValueError(f"cannot compile ({error}): repair that, or run uncompiled") from error
        self._graphs: GraphedStep | None = None
        self._graphs_most = 0
        self._allocate(batch)
        self.reset()

    def _share_layers(self, found: LayerSharing) -> None:
        """Let as many layers as the method wants read another's cache instead of their own."""
        count = max(1, round(self.method.shared_layers * found.num_layers))
        if count > len(found.pairs):
            raise ValueError(
                f"{self.method.name} is to let {count} of {found.num_layers} layers read another's cache, but the "
                f"search for {found.model_id} found {len(found.pairs)}: lower the share, or search for more"
            )
        self._source = list(found.sources(count))
        own = [layer == source for layer, source in enumerate(self._source)]
        self.blocks = [b if owns else b.reading() for b, owns in zip(self.blocks, own, strict=True)]
        owners = [layer for layer, owns in enumerate(own) if owns]
        self.method = replace(self.method, allocator=self.method.allocator.of_layers(owners))

    def _allocate(self, batch: int) -> None:
        config = self.loaded.config
        heads = len(self._owners) * config.num_kv_heads

        def shape(slots: int) -> ArenaShape:
            return ArenaShape(
                batch=batch,
                num_layers=config.num_layers,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                slots=slots,
                dtype=self._dtype,
                evict=self.method.evict,
                context=self.max_context if self.method.sentences else 0,
                sinks=self.method.turned_sinks,
            )

        method, most = self.method, self.max_context
        surplus = method.allocator.surplus(num_layers=len(self._owners), num_kv_heads=config.num_kv_heads)
        if self.budget is not None and self.budget.kind == "bytes":
            most = (shape(0).slots_within(int(self.budget.amount)) - surplus) // heads - self._room
        elif self.budget is not None:
            most = self._prompt_budget(self.max_context, most)
        if most < method.least:
            given, least = f"budget {self.budget} is too small", f"{method.least} tokens"
            if self.budget is not None and self.budget.kind == "bytes":
                given = f"budget {self.budget} leaves {max(0, most)} tokens per KV head for {batch} row(s)"
                smallest = shape(heads * (method.least + self._room) + surplus)
                least = f"{smallest.nbytes} bytes, or lower max_new_tokens"
            raise ValueError(f"{given}: {method.too_small(f'raise the budget to at least {least}')}")
        shares = self._shares(self.max_context, most)
        planned = shape(heads * (min(most, self.max_context) + self._room) + surplus)
        largest = int(method.most(shares, self.max_context)) + self._room
        if self.endless and largest > self.max_context:
            raise ValueError(
                f"a KV head would hold up to {largest} tokens, the context is {self.max_context}: lower the budget or "
                "max_new_tokens"
            )
        free = free_bytes(self._device)
        if planned.nbytes > free:
            raise ValueError(
                f"the {method.name} cache would take {planned.nbytes / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are "
                "free: lower the budget, max_new_tokens, max_context or the batch"
            )
        few = batch <= MOST_ROWS and method.evict is None  # what the fused operator can do
        fused = self._compile is True and self._device.type == "cpu" and few
        inductor = self._compile == "inductor" or (self._compile is True and not fused and self._capture is None)
        self._graphs = None  # before the new cache takes memory
        self.cache = ArenaCache(planned, self._device, most=largest, compiled=inductor, source=self._source)
        self._frequencies_Bd = torch.zeros(batch, config.head_dim // 2, device=self._device)
        self._most_tokens = most
        self._blocks: list[Callable[..., Tensor]] = [*self.blocks]
        if fused:
            self._blocks = [FusedBlocks(self.blocks)]
        elif inductor:
            # Inductor would otherwise test-compile every vector extension: over half of a cold start.
            compiled = torch.compile(Block.forward, fullgraph=True, options={"cpp.vec_isa_ok": True})
            self._blocks = [partial(compiled, block) for block in self.blocks]

    def _prompt_budget(self, tokens: int, most: int) -> int:
        """Mean tokens per KV head to keep of a prompt of so many tokens, of which the arena holds at most so many."""
        if self.budget is None or self.budget.kind == "bytes":
            return most
        if self.budget.kind == "tokens":
            return int(self.budget.amount)
        return max(int(self.budget.amount * tokens + 1e-9), self.method.least)

    def _shares(self, tokens: int, most: int) -> Tensor:
        """(L, H) tokens that each KV head may keep of so many, on the host; none for layers that read another's."""
        config = self.loaded.config
        keep_LH = torch.zeros(config.num_layers, config.num_kv_heads, dtype=torch.int64)
        keep_LH[self._owners] = self.method.shares(
            budget=min(self._prompt_budget(tokens, most), self.max_context),
            prompt=tokens,
            num_layers=len(self._owners),
            num_kv_heads=config.num_kv_heads,
        )
        return keep_LH

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget the conversation; the memory stays allocated."""
        self.cache.reset()
        self._turn = object()
        self.tokens_seen = [0] * self.cache.shape.batch
        self._prefill = "whole"
        self._pending: list[list[int]] = [[] for _ in self.tokens_seen]

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start a conversation per row.

        Args:
            prompts: token ids, one sequence per row; lengths may differ.

        Returns:
            (B, V) logits of the token after each prompt.

        Raises:
            ValueError: no prompt, **or** an empty one, **or** one longer than the context, **or** an id outside the
                vocabulary.
        """
        rows = _as_rows(prompts)
        self._check(rows, seen=[0] * len(rows))
        if len(rows) != self.cache.shape.batch:
            self._allocate(len(rows))
        self.reset()
        self._frequencies_Bd.copy_(self.model.rope.frequencies(list(map(len, rows))))
        return self._take_in(rows)

    @torch.inference_mode()
    def extend(self, more: Sequence[Sequence[int]]) -> Tensor:
        """Add a turn to every row; the cache stays and afterwards is within its budget again.

        Args:
            more: token ids, one sequence per row, none empty.

        Returns:
            (B, V) logits of the token after each turn.

        Raises:
            ValueError: no conversation has begun, **or** as for `prefill`, **or** the number of rows differs.
        """
        if not all(self.tokens_seen):
            raise ValueError("extend needs a conversation: call prefill first")
        rows = _as_rows(more)
        if len(rows) != len(self.tokens_seen):
            raise ValueError(f"extend got {len(rows)} rows, the conversation has {len(self.tokens_seen)}")
        self._check(rows, seen=[n + len(ids) for n, ids in zip(self.tokens_seen, self._pending, strict=True)])
        self._turn = object()
        return self._take_in([[*pending, *ids] for pending, ids in zip(self._pending, rows, strict=True)])

    @torch.inference_mode()
    def snapshot(self) -> Snapshot:
        """Copy the conversation, so that `restore` can come back to it as often as wanted.

        A snapshot takes as much memory as the cache. It does not hold the logits that led here; keep them beside it.

        Returns:
            The copy, which nothing changes any more.

        Raises:
            ValueError: no conversation has begun.
        """
        if not all(self.tokens_seen):
            raise ValueError("snapshot needs a conversation: call prefill first")
        return Snapshot(
            cache=self.cache,
            contents=self.cache.save(),
            frequencies_Bd=self._frequencies_Bd.clone(),
            tokens_seen=tuple(self.tokens_seen),
            pending=tuple(map(tuple, self._pending)),
            prefill=self._prefill,
        )

    @torch.inference_mode()
    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot: every later call gives what it would have given then, to the bit.

        Tensors are written where they are, so captured graphs stay valid. An answer that is being streamed ends.

        Args:
            snapshot: of this engine, since whose making no prompt had another number of rows.

        Raises:
            ValueError: it is another engine's, **or** the number of rows has changed since.
        """
        if snapshot.cache is not self.cache:
            raise ValueError(
                "this snapshot is of another engine, or of another number of rows: restore it where it was made, "
                "before a prompt with another number of rows"
            )
        self.cache.load(snapshot.contents)
        self._frequencies_Bd.copy_(snapshot.frequencies_Bd)
        self._turn = object()
        self.tokens_seen = list(snapshot.tokens_seen)
        self._pending = [list(ids) for ids in snapshot.pending]
        self._prefill = snapshot.prefill

    def _check(self, prompts: list[list[int]], seen: list[int]) -> None:
        if not prompts:
            raise ValueError("there is no prompt: give at least one sequence of token ids")
        for row, (ids, before) in enumerate(zip(prompts, seen, strict=True)):
            if not ids:
                raise ValueError(f"the prompt of row {row} is empty: give at least one token")
            if self.endless:
                last = min(len(ids), self.chunk_tokens)
                held = min(before + len(ids) - last, self.cache.most)
                if held + last > self.max_context:
                    raise ValueError(
                        f"row {row} would read {last} tokens at once after the {held} that are held, the context is "
                        f"{self.max_context}: lower chunk_tokens"
                    )
            elif before + len(ids) > self.max_context:
                earlier = f" after {before} earlier ones" if before else ""
                raise ValueError(
                    f"the prompt of row {row} has {len(ids)} tokens{earlier}, the context is {self.max_context}: "
                    "shorten it, or allow overflow with a larger max_context"
                )
            self._check_ids(ids)

    def _check_ids(self, ids: Sequence[int]) -> None:
        last = self.loaded.config.vocab_size - 1
        if wrong := [token for token in ids if not 0 <= token <= last]:
            raise ValueError(f"token id {wrong[0]} is outside 0..{last}: encode with this model's tokenizer")

    def _take_in(self, prompts: list[list[int]]) -> Tensor:
        logits_BV = torch.empty(0)
        try:
            chunks = range(0, max(map(len, prompts)), self.chunk_tokens)
            if len(chunks) > 1:
                self._prefill = "chunked"
            for start in chunks:
                rows = [ids[start : start + self.chunk_tokens] for ids in prompts]
                chunk_BV = self._take_in_chunk(rows)
                has_new_B1 = torch.tensor([[bool(ids)] for ids in rows], device=self._device)
                logits_BV = torch.where(has_new_B1, chunk_BV, logits_BV) if start else chunk_BV
            if not logits_BV.isfinite().all():
                raise ValueError(
                    f"{self.loaded.name} computes numbers that are not finite: its weights are damaged, or "
                    f"{str(self._dtype).removeprefix('torch.')} is too narrow for it (try another dtype)"
                )
        except BaseException:
            self.reset()
            raise
        self._pending = [[] for _ in prompts]
        return logits_BV

    def _take_in_chunk(self, rows: list[list[int]]) -> Tensor:
        lengths = [len(ids) for ids in rows]
        ids_BT = torch.tensor([ids + [0] * (max(lengths) - len(ids)) for ids in rows], device=self._device)
        seen = [before + new for before, new in zip(self.tokens_seen, lengths, strict=True)]
        keep_BLH = torch.stack([self._shares(min(tokens, self.max_context), self._most_tokens) for tokens in seen])
        room = [self._room if self.budget else self.max_context - tokens for tokens in seen]
        chunk = PromptPass(
            self.cache,
            self.method,
            keep_BLH=keep_BLH,
            room=room,
            new_tokens=lengths,
            outputs=[block.attention.out for block in self.blocks],
            frequencies_Bd=self._frequencies_Bd,
            ends_BT=self.loaded.sentences(ids_BT, lengths) if self.method.sentences else None,
        )
        rotation = self.model.rope.rotation(chunk.position_BT, self._frequencies_Bd, endless=self.method.in_cache)
        x_BTE = self.model.hidden(ids_BT, rotation, chunk, blocks=self.blocks)
        chunk.finish()
        self.tokens_seen = seen
        last_B = torch.tensor(lengths, device=self._device).clamp(min=1) - 1
        return self.model.logits(x_BTE[torch.arange(len(rows), device=self._device), last_B])

    def step(self, token_B: Tensor | Sequence[int], active_B: Tensor | Sequence[bool] | None = None) -> Tensor:
        """Decode one token per row.

        Args:
            token_B: the token that each row continues with.
            active_B: rows that take part, all by default; the others keep their state and their logits mean nothing.

        Returns:
            (B, V) logits of the next token.

        Raises:
            ValueError: no conversation has begun, **or** the number of rows differs, **or** a token is no id (in a
                tensor they are not looked at: that would wait for the device), **or** the context is full.
        """
        batch = len(self.tokens_seen)
        active = [True] * batch if active_B is None else [bool(flag) for flag in active_B]
        if not isinstance(token_B, Tensor):
            (token_B,) = _as_rows([token_B])
            self._check_ids(token_B)
        if not all(self.tokens_seen):
            raise ValueError("step needs a conversation: call prefill first")
        if len(token_B) != batch or len(active) != batch:
            raise ValueError(
                f"step got {len(token_B)} tokens and {len(active)} flags, the conversation has {batch} rows"
            )
        if any(self.is_full(row) for row in range(batch) if active[row]):
            raise ValueError(f"the context of {self.max_context} tokens is full: reset, or make the engine larger")
        self._turn = object()
        return self._step(torch.as_tensor(token_B, device=self._device), active)

    @torch.inference_mode()
    def _step(self, token_B: Tensor, active: list[bool]) -> Tensor:
        if self._capture is None:
            logits_BV = self._decode_step(token_B, torch.tensor(active, device=self._device))
        else:
            logits_BV = self._graphed_step()(token_B, active)
        self.tokens_seen = [seen + flag for seen, flag in zip(self.tokens_seen, active, strict=True)]
        self._pending = [[] if flag else ids for flag, ids in zip(active, self._pending, strict=True)]
        return logits_BV

    def _decode_step(self, token_B: Tensor, active_B: Tensor) -> Tensor:
        """What a step does to tensors, of the first rows or all: always the same work, which can be captured."""
        rows = len(token_B)
        cache = self.cache if rows == self.cache.shape.batch else self.cache.first(rows)
        cache.begin_step(active_B)
        frequencies_Bd = self._frequencies_Bd[:rows]
        rotation = self.model.rope.rotation(cache.position[:, None], frequencies_Bd, endless=self.method.in_cache)
        x_BTE = self.model.hidden(token_B[:, None], rotation, cache, blocks=self._blocks)
        logits_BV = self.model.logits(x_BTE[:, -1])
        cache.end_step()
        return logits_BV

    def _graphed_step(self) -> GraphedStep:
        """The step's graphs, which hold for a cache and for the largest region that they were captured with."""
        if self._graphs is None or self._graphs_most != self.cache.most:
            assert self._capture is not None
            self._graphs = None  # before new ones take memory
            self._graphs = GraphedStep(
                self._decode_step,
                rows=self.cache.shape.batch,
                vocab_size=self.loaded.config.vocab_size,
                dtype=self._dtype,
                device=self._device,
                fixed=places(self.model, cache=self.cache),
                capture=self._capture(),
            )
            self._graphs_most = self.cache.most
        return self._graphs

    def is_full(self, row: int) -> bool:
        """Whether a row's conversation has reached `max_context`, if it has an end."""
        return not self.endless and self.tokens_seen[row] >= self.max_context

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Continue prompts, each until a stop token, its limit or the end of the context.

        Args:
            prompts: token ids, one sequence per row.
            max_new_tokens: limit per row; None takes the engine's.
            temperature: 0 is greedy.
            top_k: see `layers.sampler.sample`.
            top_p: see there.
            min_p: see there.
            seed: row i uses seed + i.

        Returns:
            New ids per row, without the stop token.

        Raises:
            ValueError: as for `prefill`, **or** sampling settings, limit or seed are out of range.
        """
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        limit = self._checked_limit(max_new_tokens, seed, sampling)
        logits_BV = self.prefill(prompts)
        new: list[list[int]] = [[] for _ in self.tokens_seen]
        for tokens, active in self._decode(logits_BV, limit, seed, sampling):
            for ids, token, flag in zip(new, tokens, active, strict=True):
                if flag:
                    ids.append(token)
        return new

    def stream(
        self,
        ids: Sequence[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Add a turn to a single conversation, or begin one, and yield the answer token by token.

        What was yielded is part of the conversation, also when the caller stops early or interrupts.

        Args:
            ids: the turn's token ids.
            max_new_tokens: limit; None takes the engine's.
            temperature: 0 is greedy.
            top_k: see `layers.sampler.sample`.
            top_p: see there.
            min_p: see there.
            seed: of the random stream.

        Yields:
            New ids, without the stop token.

        Raises:
            ValueError: as for `prefill` and `extend`, **or** sampling settings, limit or seed are out of range, **or**
                another turn has begun since the last token.
        """
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        limit = self._checked_limit(max_new_tokens, seed, sampling)
        logits_BV = self.extend([ids]) if all(self.tokens_seen) else self.prefill([ids])
        for tokens, _ in self._decode(logits_BV, limit, seed, sampling):
            yield tokens[0]

    def _checked_limit(self, limit: int | None, seed: int, sampling: dict[str, float]) -> int:
        for name, value in {"max_new_tokens": limit, "top_k": sampling["top_k"], "seed": seed}.items():
            if value is not None and not hasattr(value, "__index__"):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
        check_sampling(**sampling)  # type: ignore[arg-type]
        if not 0 <= seed < 2**62:
            raise ValueError(f"seed must be from 0 to 2**62 - 1, not {seed}")
        if limit is not None and limit < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {limit}")
        return self.max_new_tokens if limit is None else limit

    def _decode(
        self, logits_BV: Tensor, limit: int, seed: int, sampling: dict[str, float]
    ) -> Iterator[tuple[list[int], list[bool]]]:
        """Sample and step; a token is pending from the moment it is handed out until the cache holds it."""
        turn, batch = self._turn, len(self.tokens_seen)
        seed_B = torch.arange(seed, seed + batch, device=self._device)
        active = [True] * batch
        for count in range(limit):
            token_B = sample(logits_BV, seed_B, self.cache.position, **sampling)  # type: ignore[arg-type]
            tokens: list[int] = token_B.tolist()
            active = [
                flag and token not in self.loaded.chat.stop_ids and not self.is_full(row)
                for row, (flag, token) in enumerate(zip(active, tokens, strict=True))
            ]
            if not any(active):
                return
            self._pending = [[token] if flag else [] for token, flag in zip(tokens, active, strict=True)]
            yield tokens, active
            if count + 1 < limit:
                if turn is not self._turn:
                    raise ValueError("this answer cannot go on: another turn of the conversation has begun since")
                logits_BV = self._step(token_B, active)

    def stats(self) -> Stats:
        """What the cache holds now."""
        config = self.loaded.config
        token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self._dtype.itemsize
        return Stats(
            cache=self.method.name,
            budget=None if self.budget is None else str(self.budget),
            kept=self.cache.length.clone(),
            nbytes=self.cache.nbytes,
            full_nbytes=sum(self.tokens_seen) * token_bytes,
            tokens_seen=list(self.tokens_seen),
            prefill=self._prefill,
        )


def _as_rows(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids as plain lists, whether they came in lists, arrays or tensors."""
    try:
        return [[operator.index(token) for token in ids] for ids in prompts]
    except TypeError:
        raise ValueError("token ids must be whole numbers, in one sequence per row: [[1, 2, 3], [4, 5]]") from None


def free_bytes(device: torch.device) -> int:
    """Bytes of memory that can be had now; all there are where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
