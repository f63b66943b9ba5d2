"""Which token of every KV head goes next, by the attention that a decode step paid to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from kernels import ragged_decode as decode
from kernels.checks import FLOATS, INTEGERS, MOST_SLOTS, check, check_arena, check_groups, check_inside
from kernels.language import INTERPRETED, jit, tl, triton
from kernels.registry import Arguments, Case, Workload, register
from kernels.testing import ragged_arena, random

_TILE = 256
"""Slots per program that computes weights."""
_NEVER = torch.iinfo(torch.int32).max


def ragged_worst(
    stat: Tensor,
    worst_BLH: Tensor,
    q_BND: Tensor,
    lse_BN: Tensor,
    k_arena: Tensor,
    pos: Tensor,
    offset_BLH: Tensor,
    length_BLH: Tensor,
    recent_BLH: Tensor,
    layer_1: Tensor,
    position_B: Tensor,
    active_B: Tensor,
    window: int | None = None,
    *,
    accumulate: bool,
    whole_layer: bool,
    most: int,
) -> None:
    """Score every filled slot of a layer by the weights of attention, and find each head's worst, in place.

    The weights of a step are what `ragged_decode` computed and did not keep; from its log-sum-exp they follow in one
    pass over the keys: w = exp(q k / sqrt(D) - lse). A slot's weight is their mean over the query heads of its KV head,
    or over all query heads of the layer. Of the slots that may go, the one with the lowest score is the worst; of
    equals, the one with the lowest position. A slot outside the window has a weight of 0.

    Args:
        stat: (B, slots) fp32, the score of each slot, written; what it is at the token of this step is not read.
        worst_BLH: int32, arena slot of each head's worst token, written for this layer; the region's first slot where
            none may go.
        q_BND: queries after RoPE, N a multiple of H.
        lse_BN: fp32, from `ragged_decode` of the same step.
        k_arena: (B, slots, D) in q's dtype.
        pos: (B, slots) int32, absolute position of each slot.
        offset_BLH: int32, first slot of each head's region.
        length_BLH: int32, filled slots of each head, at least 1.
        recent_BLH: int32, how many of the last tokens, this step's included, may not go.
        layer_1: (1,) int64, the layer.
        position_B: int32, absolute position of this step's token.
        active_B: bool, rows that take part; of the others nothing is written.
        window: sliding window in tokens, or None for full attention.
        accumulate: add weights to the scores; otherwise they replace them.
        whole_layer: take the mean over the layer's query heads, so that all KV heads agree. Then their regions must be
            equally long and hold the same tokens in the same order.
        most: no head of any layer has more filled slots, >= 1. It fixes how much is launched.

    Raises:
        ValueError: a tensor's shape, dtype, device or layout does not fit, **or** most or window is out of range,
            **or** on a GPU, D is above 256.
        RuntimeError, IndexError: on a CPU, a head has more filled slots than `most`, **or** a region is not inside the
            arena, **or** there is no such layer.

    Source:
        Zhang et al., H2O, 2023 (running sums); Oren et al., Transformers are Multi-State RNNs (TOVA), 2024 (the last
        query's weights).

    Example:
        >>> k, pos = torch.zeros(1, 3, 2), torch.arange(3, dtype=torch.int32)[None]
        >>> k[0, 1] = -1
        >>> first, worst, length = (torch.full((1, 1, 1), n, dtype=torch.int32) for n in (0, 9, 3))
        >>> here, layer = torch.tensor([2], dtype=torch.int32), torch.tensor([0])
        >>> tables = pos, first, length, first, layer, here
        >>> q, stat = torch.ones(1, 1, 2), torch.zeros(1, 3)
        >>> _, lse = decode.ragged_decode(q, k, k, pos, first, length, layer, here, most=3)
        >>> how = {"accumulate": True, "whole_layer": False, "most": 3}
        >>> ragged_worst(stat, worst, q, lse, k, *tables, torch.tensor([True]), **how)
        >>> stat, worst.item()
        (tensor([[0.4458, 0.1084, 0.4458]]), 1)
    """
    check_arena(k_arena, k_arena, pos)
    check("q_BND", q_BND, shape=(len(k_arena), None, k_arena.shape[2]), dtype=[k_arena.dtype], like=k_arena)
    B, N, D = q_BND.shape
    check("stat", stat, shape=pos.shape, dtype=FLOATS[:1], like=k_arena, contiguous=True)
    check("lse_BN", lse_BN, shape=(B, N), dtype=FLOATS[:1], like=k_arena, contiguous=True)
    check("offset_BLH", offset_BLH, shape=(B, None, None), dtype=INTEGERS, like=k_arena, contiguous=True)
    tables = {"length_BLH": length_BLH, "recent_BLH": recent_BLH, "worst_BLH": worst_BLH}
    for name, table in tables.items():
        check(name, table, shape=offset_BLH.shape, dtype=INTEGERS, like=k_arena, contiguous=True)
    check("layer_1", layer_1, shape=(1,), dtype=[torch.int64], like=k_arena)
    check("position_B", position_B, shape=(B,), dtype=INTEGERS, like=k_arena, contiguous=True)
    check("active_B", active_B, shape=(B,), dtype=[torch.bool], like=k_arena, contiguous=True)
    check_groups("q_BND", N, "offset_BLH", offset_BLH.shape[2])
    if k_arena.device.type != "cpu" and D > 256:
        raise ValueError(f"q_BND has heads of {D} numbers, on a GPU they may have 256")
    if most < 1 or (window is not None and window < 0):
        raise ValueError(f"most is {most} and window {window}, they must be at least 1 and 0 (or None)")
    torch.ops.headkv.ragged_worst(
        stat, worst_BLH, q_BND, lse_BN, k_arena, pos, offset_BLH, length_BLH, recent_BLH, layer_1, position_B, active_B,
        min(window or 0, MOST_SLOTS), accumulate, whole_layer, most,
    )  # fmt: skip


def reference(
    stat: Tensor,
    worst_BLH: Tensor,
    q_BND: Tensor,
    lse_BN: Tensor,
    k_arena: Tensor,
    pos: Tensor,
    offset_BLH: Tensor,
    length_BLH: Tensor,
    recent_BLH: Tensor,
    layer_1: Tensor,
    position_B: Tensor,
    active_B: Tensor,
    window: int,
    accumulate: bool,
    whole_layer: bool,
    most: int,
) -> None:
    """What `ragged_worst` computes, over a rectangle as wide as `most`, or on a CPU as the longest head.

    What lies beyond a head's length stands for its first slot once more: it counts for nothing, and writes the same.
    """
    offset_BH1, length_BH1, recent_BH1 = (
        table.index_select(1, layer_1).squeeze(1)[..., None].long() for table in (offset_BLH, length_BLH, recent_BLH)
    )
    if length_BH1.device.type == "cpu" and length_BH1.numel():
        longest = int(length_BH1.max())
        if longest > most:
            raise RuntimeError(f"a head has {longest} filled slots, most is {most}")
        most = longest
    check_inside(offset_BH1, length_BH1, k_arena.shape[1])
    B, H, _ = offset_BH1.shape
    slot_C = torch.arange(most, device=q_BND.device)
    filled_BHC = slot_C < length_BH1
    index_BHC = offset_BH1 + torch.where(filled_BHC, slot_C, 0)
    row_B11 = torch.arange(B, device=q_BND.device)[:, None, None]
    position_B11, active_B11 = position_B[:, None, None], active_B[:, None, None]
    pos_BHC = pos[row_B11, index_BHC]
    seen_BHC = filled_BHC & (pos_BHC > position_B11 - window) if window else filled_BHC

    q_BHGD = q_BND.float().unflatten(1, (H, -1))
    score_BHGC = q_BHGD @ k_arena[row_B11, index_BHC].float().transpose(-1, -2) * q_BND.shape[2] ** -0.5
    weight_BHGC = (score_BHGC - lse_BN.unflatten(1, (H, -1))[..., None]).exp()
    weight_BHC = weight_BHGC.masked_fill(~seen_BHC[:, :, None], 0.0).mean(2)
    if whole_layer:
        weight_BHC = weight_BHC.mean(1, keepdim=True).expand(-1, H, -1)
    before_BHC = stat[row_B11, index_BHC]
    now_BHC = weight_BHC
    if accumulate:
        now_BHC = weight_BHC + before_BHC.masked_fill(pos_BHC >= position_B11, 0.0)
    written_BHC = torch.where(filled_BHC, now_BHC, now_BHC[..., :1])
    stat[row_B11, index_BHC] = torch.where(active_B11, written_BHC, before_BHC)

    may_go_BHC = filled_BHC & (pos_BHC <= position_B11 - recent_BH1)
    least_BH1 = now_BHC.masked_fill(~may_go_BHC, float("inf")).amin(-1, keepdim=True)
    is_worst_BHC = may_go_BHC & (now_BHC == least_BH1)
    slot_BH = offset_BH1.squeeze(-1) + pos_BHC.masked_fill(~is_worst_BHC, _NEVER).argmin(-1)
    before_BH = worst_BLH.index_select(1, layer_1).squeeze(1)
    worst_BLH.index_copy_(1, layer_1, torch.where(active_B[:, None], slot_BH.int(), before_BH)[:, None])


@jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    q,
    lse,
    k,
    pos,
    offset_BLH,
    length_BLH,
    layer_1,
    position_B,
    weight,
    layers,
    slots,
    most,
    window,
    factor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    WINDOWED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of one KV head: the sum of its query heads' weights on every filled slot."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    table = (row * layers + tl.load(layer_1)) * heads + head
    length = tl.load(length_BLH + table)
    first = tile * TILE
    if first < length:
        g, d, at = tl.arange(0, QUERIES), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
        query = (row * heads + head) * GROUP + g
        in_group, in_row = g < GROUP, d < D
        q_GD = tl.load(q + query[:, None] * D + d[None, :], mask=in_group[:, None] & in_row[None, :], other=0.0)
        lse_G = tl.load(lse + query, mask=in_group, other=0.0)
        base = row * slots + tl.load(offset_BLH + table)
        if WINDOWED:
            oldest = tl.load(position_B + row) - window
        for start in range(first, tl.minimum(first + TILE, length), BLOCK):
            slot = start + at
            # Beyond the length the last slot is read again: masks of loads cost registers.
            here = base + tl.minimum(slot, length - 1)
            k_SD = tl.load(k + here[:, None] * D + d[None, :], mask=in_row[None, :], other=0.0)
            if UPCAST:
                q_GD, k_SD = q_GD.to(tl.float32), k_SD.to(tl.float32)
            score_GS = tl.dot(q_GD, tl.trans(k_SD), input_precision="ieee") * factor
            seen_GS = in_group[:, None] & (slot < length)[None, :]
            if WINDOWED:
                seen_GS &= (tl.load(pos + here) > oldest)[None, :]
            weight_GS = tl.where(seen_GS, tl.exp(score_GS - lse_G[:, None]), 0.0)
            tl.store(weight + (row * heads + head) * most + slot, tl.sum(weight_GS, 0), mask=slot < length)


@jit
def _worst_kernel(  # type: ignore[no-untyped-def]
    weight,
    stat,
    worst_BLH,
    pos,
    offset_BLH,
    length_BLH,
    recent_BLH,
    layer_1,
    position_B,
    active_B,
    layers,
    slots,
    most,
    share,
    ACCUMULATE: tl.constexpr,
    WHOLE_LAYER: tl.constexpr,
    NEVER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One KV head per program goes over its slots: the new scores, and the lowest of those that may go."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heads = tl.num_programs(0)
    table = (row * layers + tl.load(layer_1)) * heads + head
    length, offset = tl.load(length_BLH + table), tl.load(offset_BLH + table)
    position, active = tl.load(position_B + row), tl.load(active_B + row)
    newest_to_go = position - tl.load(recent_BLH + table)
    at = tl.arange(0, BLOCK)
    least = tl.full((1,), float("inf"), tl.float32)
    oldest = tl.full((1,), NEVER, tl.int32)
    worst = tl.zeros((1,), tl.int32)
    for start in range(0, length, BLOCK):
        slot = start + at
        filled = slot < length
        here = row * slots + offset + slot
        pos_S = tl.load(pos + here, mask=filled, other=NEVER)
        if WHOLE_LAYER:
            now_S = tl.zeros((BLOCK,), tl.float32)
            for one in range(heads):
                now_S += tl.load(weight + (row * heads + one) * most + slot, mask=filled, other=0.0)
        else:
            now_S = tl.load(weight + (row * heads + head) * most + slot, mask=filled, other=0.0)
        now_S *= share
        if ACCUMULATE:
            now_S += tl.load(stat + here, mask=filled & (pos_S < position), other=0.0)
        tl.store(stat + here, now_S, mask=filled & active)

        may_go = filled & (pos_S <= newest_to_go)
        now_S = tl.where(may_go, now_S, float("inf"))
        here_least = tl.min(now_S, 0, keep_dims=True)
        pos_S = tl.where(may_go & (now_S == here_least), pos_S, NEVER)
        here_oldest = tl.min(pos_S, 0, keep_dims=True)
        here_worst = tl.min(tl.where(pos_S == here_oldest, slot, NEVER), 0, keep_dims=True)
        is_worse = (here_least < least) | ((here_least == least) & (here_oldest < oldest))
        least = tl.where(is_worse, here_least, least)
        oldest = tl.where(is_worse, here_oldest, oldest)
        worst = tl.where(is_worse, here_worst, worst)
    tl.store(worst_BLH + table + tl.arange(0, 1), offset + worst, mask=active)


def launch(
    stat: Tensor,
    worst_BLH: Tensor,
    q_BND: Tensor,
    lse_BN: Tensor,
    k_arena: Tensor,
    pos: Tensor,
    offset_BLH: Tensor,
    length_BLH: Tensor,
    recent_BLH: Tensor,
    layer_1: Tensor,
    position_B: Tensor,
    active_B: Tensor,
    window: int,
    accumulate: bool,
    whole_layer: bool,
    most: int,
) -> None:
    """The Triton form of `reference`: weights tile by tile, then each head's scores."""
    B, N, D = q_BND.shape
    L, H = offset_BLH.shape[1:]
    if not q_BND.numel():
        return
    weight_BHC = q_BND.new_empty((B, H, most), dtype=torch.float32)
    _weights_kernel[triton.cdiv(most, _TILE), H, B](
        q_BND.contiguous(),
        lse_BN,
        k_arena,
        pos,
        offset_BLH,
        length_BLH,
        layer_1,
        position_B,
        weight_BHC,
        L,
        k_arena.shape[1],
        most,
        window,
        D**-0.5,
        D=D,
        WIDTH=max(16, triton.next_power_of_2(D)),
        GROUP=N // H,
        QUERIES=max(16, triton.next_power_of_2(N // H)),
        WINDOWED=bool(window),
        TILE=_TILE,
        BLOCK=max(16, min(64, 2**14 // (triton.next_power_of_2(D) * q_BND.element_size()))),
        UPCAST=INTERPRETED and q_BND.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=2,
    )
    _worst_kernel[H, B](
        weight_BHC,
        stat,
        worst_BLH,
        pos,
        offset_BLH,
        length_BLH,
        recent_BLH,
        layer_1,
        position_B,
        active_B,
        L,
        k_arena.shape[1],
        most,
        1 / N if whole_layer else H / N,
        ACCUMULATE=accumulate,
        WHOLE_LAYER=whole_layer,
        NEVER=_NEVER,
        BLOCK=512,
        num_warps=4,
    )


def fake(*arguments: object) -> None:
    """Nothing is returned."""


def cases() -> Iterator[Case]:
    """Lengths around tiles and blocks, groups, head dims, windows, ended rows, ties, and nothing that may go."""
    yield Case(name="one token", make=partial(_arguments, [[1]], 64, 1, 0))
    yield Case(name="sums, D=80, 3 rows", make=partial(_arguments, [[65, 1], [257, 64], [3, 600]], 80, 4, 3))
    yield Case(name="sums, sliding, D=128", make=partial(_arguments, [[300, 17]], 128, 3, 5, window=200))
    yield Case(name="last weights, G=8", make=partial(_arguments, [[63, 256]], 64, 8, 1, accumulate=False))
    yield Case(name="D=256", make=partial(_arguments, [[65]], 256, 2, 0))
    yield Case(name="D=20, G=17", make=partial(_arguments, [[70, 2]], 20, 17, 0))
    yield Case(name="a layer's sums", make=partial(_arguments, [[600, 600]], 96, 2, 2, whole_layer=True))
    for window in (0, 40):
        make = partial(_arguments, [[129] * 3, [7] * 3], 64, 3, 0, accumulate=False, whole_layer=True, window=window)
        yield Case(name=f"a layer's last weights, window={window}", make=make)
    yield Case(name="all but a few are hidden", make=partial(_arguments, [[600]], 16, 1, 0, accumulate=False, window=9))
    yield Case(name="none may go", make=partial(_arguments, [[30, 4]], 16, 1, 10_000))
    yield Case(name="room for more", make=partial(_arguments, [[5, 200]], 64, 4, 4, most=1000))
    yield Case(name="no rows", make=_no_rows)


def _arguments(
    lengths_BH: Sequence[Sequence[int]],
    D: int,
    group: int,
    recent: int,
    dtype: torch.dtype,
    *,
    window: int = 0,
    accumulate: bool = True,
    whole_layer: bool = False,
    most: int | None = None,
) -> Arguments:
    """Each region's last slot is this step's token; every third row has ended."""
    arena = ragged_arena(lengths_BH, D, dtype=dtype)
    B, H = len(lengths_BH), len(lengths_BH[0])
    stat = torch.full(arena.pos.shape, float("nan"))
    for row in range(B):
        for head in range(H):
            first, count = int(arena.offset[row, 1, head]), lengths_BH[row][head]
            stat[row, first : first + count - 1] = random(count - 1, seed=head).abs()
            if whole_layer:
                arena.pos[row, first : first + count] = torch.randperm(count, generator=_seeded(row)).int()
                stat[row, first : first + count - 1] = random(count - 1, seed=row).abs()
            arena.pos[row, first + count - 1] = arena.position[row]
    q_BND = random(B, H * group, D, seed=1, dtype=dtype)
    worst_BLH = torch.full_like(arena.offset, 99)
    most = most or max(map(max, lengths_BH))
    tables = arena.pos, arena.offset, arena.length
    here = arena.layer, arena.position
    _, lse_BN = decode.reference(q_BND, arena.k, arena.v, *tables, *here, window, most)
    active_B = torch.arange(B) % 3 != 2
    options = window, accumulate, whole_layer, most
    recent_BLH = torch.full_like(arena.offset, recent)
    return stat, worst_BLH, q_BND, lse_BN, arena.k, *tables, recent_BLH, *here, active_B, *options


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _no_rows(dtype: torch.dtype) -> Arguments:
    arguments = _arguments([[3]], 64, 2, 0, dtype)
    layer_1 = arguments[9]
    return tuple(x[:0] if isinstance(x, Tensor) and x is not layer_1 else x for x in arguments)


def bytes_moved(
    stat: Tensor, worst_BLH: Tensor, q_BND: Tensor, lse_BN: Tensor, k_arena: Tensor, *others: Tensor
) -> int:
    """Filled keys once, positions and scores of their slots in and scores out, queries, and a slot per head."""
    _, _, length_BLH, _, layer_1 = others[:5]
    slot = k_arena.shape[2] * k_arena.element_size() + 12
    return int(length_BLH[:, layer_1].sum()) * slot + q_BND.nbytes + lse_BN.nbytes + 4 * worst_BLH[:, 0].numel()


def flops(stat: Tensor, worst_BLH: Tensor, q_BND: Tensor, lse_BN: Tensor, k_arena: Tensor, *others: Tensor) -> int:
    """A product per filled slot and query."""
    _, offset_BLH, length_BLH, _, layer_1 = others[:5]
    _, N, D = q_BND.shape
    return int(length_BLH[:, layer_1].sum()) * (N // offset_BLH.shape[2]) * D * 2


def sized(work: Workload) -> Arguments:
    """A decode step's layer with running sums, all heads of one size."""
    B, L, H, D = work.batch, work.layers, work.kv_heads, work.head_dim
    length = torch.full((B, L, H), work.kept, dtype=torch.int32)
    offset = (torch.arange(L * H, dtype=torch.int32) * work.kept).view(L, H).expand(B, L, H).contiguous()
    k = torch.empty(B, L * H * work.kept, D, dtype=work.dtype, device="meta")
    stat, pos = k.new_empty(k.shape[:2], dtype=torch.float32), k.new_empty(k.shape[:2], dtype=torch.int32)
    q, lse = k.new_empty(B, work.heads, D), k.new_empty(B, work.heads, dtype=torch.float32)
    position = torch.full((B,), 8 * work.kept, dtype=torch.int32)
    tables = pos, offset, length, length // 2, torch.tensor([L // 2]), position, torch.ones(B, dtype=torch.bool)
    return stat, length, q, lse, k, *tables, 0, True, False, work.kept


KERNEL = register(
    __name__,
    "(Tensor(a!) stat, Tensor(b!) worst_BLH, Tensor q_BND, Tensor lse_BN, Tensor k_arena, Tensor pos, "
    "Tensor offset_BLH, Tensor length_BLH, Tensor recent_BLH, Tensor layer_1, Tensor position_B, Tensor active_B, "
    "int window, bool accumulate, bool whole_layer, SymInt most) -> ()",
)
