"""Prefill a prompt once and compress it in many ways: what makes a comparison of cache settings cheap.

Prefill is nearly all of the cost of a needle prompt, and until a layer is compressed it does not depend on the cache.
So one dense pass is recorded, and every setting becomes a row of one arena, which then decodes all rows together. The
outcome is that of `Engine.prefill` and `Engine.step` for each setting; tests/test_recipes.py compares them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ragged_compact import ragged_compact
from layers.cache.arena import ArenaCache
from layers.cache.base import NoCache
from layers.methods.base import Method
from layers.plan import ArenaShape
from zoo import Loaded


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's part of a recorded prefill: the last queries, all keys and values, the model's sliding window."""

    q_BWND: Tensor
    k_BHSD: Tensor
    v_BHSD: Tensor
    sliding: int | None


class Record:
    """A dense prefill of one prompt.

    Args:
        loaded: the model.
        ids: the prompt.
        window: how many of the last queries to keep: the largest observation window that will be replayed.

    Attributes:
        layers: what each layer computed.
        logits_1V: of the token after the prompt.
    """

    @torch.inference_mode()
    def __init__(self, loaded: Loaded, ids: list[int], window: int) -> None:
        self.loaded, self.tokens, self.window = loaded, len(ids), min(window, len(ids))
        self.layers: list[Layer] = []
        ids_1T = torch.tensor([ids], device=loaded.model.embed.weight.device)
        position_1T = torch.arange(len(ids), device=ids_1T.device)[None]
        x_1TE = loaded.model.hidden(ids_1T, loaded.model.rope(position_1T, len(ids)), self)
        self.logits_1V = loaded.model.logits(x_1TE[:, -1])

    def attend(self, layer_1: Tensor, q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int | None) -> Tensor:
        """Attend within the prompt; see `layers.cache.base.KVCache`."""
        q_BWND = q_BTND[:, -self.window :].clone()
        self.layers.append(
            Layer(q_BWND=q_BWND, k_BHSD=k_BTHD.transpose(1, 2), v_BHSD=v_BTHD.transpose(1, 2), sliding=window)
        )
        return NoCache().attend(layer_1, q_BTND, k_BTHD, v_BTHD, window)


def compress(record: Record, settings: list[tuple[Method, int]], room: int) -> ArenaCache:
    """Compress a recorded prompt once per setting.

    Args:
        record: the prefill.
        settings: method and budget in tokens per KV head of each row.
        room: slots of each KV head for the answer.

    Returns:
        A cache ready to decode, row i holding what setting i keeps.
    """
    config, n = record.loaded.config, record.tokens
    keep_BLH = torch.stack(
        [
            method.allocator(budget=budget, prompt=n, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads)
            for method, budget in settings
        ]
    )
    k_BHSD = record.layers[0].k_BHSD
    shape = ArenaShape(
        batch=len(settings),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        slots=int((keep_BLH + room).sum((1, 2)).max()),
        dtype=k_BHSD.dtype,
    )
    cache = ArenaCache(shape, k_BHSD.device)
    most_B = torch.stack([method.most(keep_LH, n) for (method, _), keep_LH in zip(settings, keep_BLH, strict=True)])
    cache.lay_out(keep_BLH, [room] * len(settings), most_B=most_B)
    keep_BLH = keep_BLH.to(k_BHSD.device)
    position_S = torch.arange(n, dtype=torch.int32, device=k_BHSD.device)
    pos_BHS = position_S.expand(1, config.num_kv_heads, n)
    for index, layer in enumerate(record.layers):
        scored: dict[Method, Tensor] = {}
        keep_BH = keep_BLH[:, index].clone()
        for row, (method, _) in enumerate(settings):
            if method not in scored:
                window = min(method.scorer.window, n)
                scored[method] = method.scores(
                    layer.q_BWND[:, record.window - window :],
                    layer.k_BHSD,
                    pos_BHS,
                    position_S[None, n - window :],
                    torch.tensor([n], device=k_BHSD.device),
                    layer.sliding,
                )
            if method.sharing is not None:
                keep_BH[row] = method.sharing.share(keep_BH[row, None], scored[method], pos_BHS >= 0)[0]
        cache.share_out(torch.tensor([index], device=k_BHSD.device), keep_BLH[:, index], keep_BH)
        for row, (method, _) in enumerate(settings):
            cache.kept[row, index] = ragged_compact(
                cache.k[row, None],
                cache.v[row, None],
                cache.pos[row, None],
                cache.offset[row, None, index],
                keep_BH[row, None],
                int(most_B[row]),
                layer.k_BHSD,
                layer.v_BHSD,
                pos_BHS,
                scored[method],
            )[0]
    cache.ring_start.copy_(cache.kept)
    cache.length.copy_(cache.kept)
    cache.position += n
    return cache


@torch.inference_mode()
def answer_logits(record: Record, settings: list[tuple[Method, int]], answer: list[int]) -> Tensor:
    """Decode a given answer through every setting's cache.

    Args:
        record: the prefill.
        settings: method and budget in tokens per KV head of each row.
        answer: A token ids.

    Returns:
        (B, A, V) logits, those at a predicting answer token a from the prompt and the answer before it.
    """
    model, cache = record.loaded.model, compress(record, settings, room=len(answer))
    active_B = torch.ones(len(settings), dtype=torch.bool)
    logits = [record.logits_1V.expand(len(settings), -1)]
    for token in answer[:-1]:
        cache.begin_step(active_B)
        token_B1 = torch.full((len(settings), 1), token, device=cache.k.device)
        x_BTE = model.hidden(token_B1, model.rope(cache.position[:, None], record.tokens), cache)
        logits.append(model.logits(x_BTE[:, -1]))
        cache.end_step()
    return torch.stack(logits, dim=1)
