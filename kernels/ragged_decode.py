"""Attention of one query token over KV heads that keep different numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from kernels.checks import FLOATS, INTEGERS, MOST_SLOTS, check, check_arena, check_groups, check_inside
from kernels.language import INTERPRETED, jit, tl, triton
from kernels.quantize_kv import dequantize_kv, quantize_kv
from kernels.registry import Arguments, Case, Workload, register
from kernels.testing import ragged_arena, random

_TILE = 256
"""Slots per program of the Triton form; the same whatever the batch, so that a row's sums have one order."""
_WIDEST = 256
"""Largest head dim whose keys and values fit in a multiprocessor's shared memory."""


def ragged_decode(
    q_BND: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BLH: Tensor,
    length_BLH: Tensor,
    layer_1: Tensor,
    position_B: Tensor,
    window: int | None = None,
    *,
    most: int,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from one token per row to the filled slots of every KV head of a layer.

    Scores, weights and sums are fp32. Memory beyond a head's length is not read. Within it, values outside the window
    or of a slot whose bias is -inf do not count, but must be finite. Every key and value is read once for its whole
    query group, in tiles of a fixed size which are then merged by their log-sum-exp, so that a row gives the same bits
    alone and in any batch.

    Args:
        q_BND: queries after RoPE, N a multiple of H.
        k_arena: (B, slots, D) in q's dtype, or codes from `quantize_kv`: (B, slots, D) or (B, slots, D / 2) uint8.
        v_arena: likewise.
        pos: (B, slots) int32, absolute position of each slot.
        offset_BLH: int32, first slot of each head's region.
        length_BLH: int32, filled slots of each head.
        layer_1: (1,) int64, the layer.
        position_B: int32, absolute position of the query.
        window: sliding window in tokens, or None for full attention.
        most: no head of any layer has more filled slots, >= 1. It fixes how much is launched, without a look at the
            tables; up to 256 nothing is left to merge.
        bias: (B, slots) fp32, added to a slot's scores: 0 for a token, the logarithm of how many it stands for if it
            was merged from several, -inf for a slot that counts as empty; None if all are 0.
        k_scale: (B, slots, 2) fp32, step >= 0 and least number of each slot's codes; None for an arena without codes.
        v_scale: likewise.

    Returns:
        (B, N, D) in q's dtype, zero for a head that sees no slot, and (B, N) fp32, the natural logarithm of the sum of
        exponentials of its scores, -inf for such a head.

    Raises:
        ValueError: a tensor's shape, dtype, device or layout does not fit, **or** most or window is out of range,
            **or** on a GPU, D is above 256.
        RuntimeError, IndexError: on a CPU, a head has more filled slots than `most`, **or** a region is not inside the
            arena, **or** there is no such layer.

    Source:
        Dao et al., Flash-Decoding, 2023 (split keys, merged by their log-sum-exp).

    Example:
        >>> k = torch.zeros(1, 4, 2); v = torch.tensor([[[1.0, 1], [3, 3], [9, 9], [9, 9]]])
        >>> pos, length = torch.arange(4, dtype=torch.int32)[None], torch.full((1, 1, 1), 2, dtype=torch.int32)
        >>> first, here = torch.zeros_like(length), torch.tensor([1], dtype=torch.int32)
        >>> ragged_decode(torch.ones(1, 1, 2), k, v, pos, first, length, torch.tensor([0]), here, most=4)
        (tensor([[[2., 2.]]]), tensor([[0.6931]]))
    """
    check("q_BND", q_BND, shape=(None, None, None))
    B, N, D = q_BND.shape
    quantised = k_scale is not None or v_scale is not None
    check_arena(k_arena, v_arena, pos, dtype=[torch.uint8] if quantised else [q_BND.dtype])
    check("q_BND", q_BND, shape=(len(k_arena), None, None), like=k_arena)
    check("offset_BLH", offset_BLH, shape=(B, None, None), dtype=INTEGERS, like=k_arena, contiguous=True)
    check("length_BLH", length_BLH, shape=offset_BLH.shape, dtype=INTEGERS, like=k_arena, contiguous=True)
    check("layer_1", layer_1, shape=(1,), dtype=[torch.int64], like=k_arena)
    check("position_B", position_B, shape=(B,), dtype=INTEGERS, like=k_arena, contiguous=True)
    widths = (D, D / 2) if quantised else (D,)
    if k_arena.shape[2] not in widths:
        raise ValueError(
            f"q_BND has heads of {D} numbers, k_arena rows of {k_arena.shape[2]}, it must have as many"
            f"{' codes or half' if quantised else ''}"
        )
    check_groups("q_BND", N, "offset_BLH", offset_BLH.shape[2])
    if k_arena.device.type != "cpu" and D > _WIDEST:
        raise ValueError(f"q_BND has heads of {D} numbers, on a GPU they may have {_WIDEST}")
    if most < 1 or (window is not None and window < 0):
        raise ValueError(f"most is {most} and window {window}, they must be at least 1 and 0 (or None)")
    if bias is not None:
        check("bias", bias, shape=k_arena.shape[:2], dtype=FLOATS[:1], like=k_arena, contiguous=True)
    if quantised:
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is None:
                raise ValueError(f"{name} is None, it must be given with the other arena's scale")
            check(name, scale, shape=(*k_arena.shape[:2], 2), dtype=FLOATS[:1], like=k_arena, contiguous=True)
    tables = pos, offset_BLH, length_BLH, layer_1, position_B
    attended: tuple[Tensor, Tensor] = torch.ops.headkv.ragged_decode(
        q_BND, k_arena, v_arena, *tables, min(window or 0, MOST_SLOTS), most, bias, k_scale, v_scale
    )
    return attended


def reference(
    q_BND: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BLH: Tensor,
    length_BLH: Tensor,
    layer_1: Tensor,
    position_B: Tensor,
    window: int | None,
    most: int,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `ragged_decode` computes, over a rectangle as wide as `most`, or on a CPU as the longest head.

    What lies beyond a head's length is read from its first slot instead and masked.
    """
    B, N, D = q_BND.shape
    offset_BH1, length_BH1 = (
        table.index_select(1, layer_1).squeeze(1)[..., None].long() for table in (offset_BLH, length_BLH)
    )
    if length_BH1.device.type == "cpu" and length_BH1.numel():
        longest = int(length_BH1.max())
        if longest > most:
            raise RuntimeError(f"a head has {longest} filled slots, most is {most}")
        most = longest
    check_inside(offset_BH1, length_BH1, k_arena.shape[1])
    slot_C = torch.arange(most, device=q_BND.device)
    seen_BHC = slot_C < length_BH1
    index_BHC = torch.where(seen_BHC, offset_BH1 + slot_C, offset_BH1.clamp(max=k_arena.shape[1] - 1))
    row_B11 = torch.arange(B, device=q_BND.device)[:, None, None]
    if window:
        seen_BHC &= pos[row_B11, index_BHC] > (position_B - window)[:, None, None]
    if bias is not None:
        bias_BHC = bias[row_B11, index_BHC]
        seen_BHC &= bias_BHC != float("-inf")

    def stored(arena: Tensor, scale: Tensor | None) -> Tensor:
        x_BHCD = arena[row_B11, index_BHC]
        return x_BHCD.float() if scale is None else dequantize_kv(x_BHCD, scale[row_B11, index_BHC], _bits(arena, D))

    v_BHCD = stored(v_arena, v_scale).masked_fill(~seen_BHC[..., None], 0.0)
    q_BHGD = q_BND.float().unflatten(1, (offset_BH1.shape[1], -1))
    score_BHGC = q_BHGD @ stored(k_arena, k_scale).transpose(-1, -2) * D**-0.5
    if bias is not None:
        score_BHGC = score_BHGC + bias_BHC[:, :, None]
    score_BHGC = score_BHGC.masked_fill(~seen_BHC[:, :, None], float("-inf"))
    weight_BHGC = score_BHGC.softmax(-1).where(seen_BHC.any(-1)[:, :, None, None], 0.0)
    o_BHGD = weight_BHGC @ v_BHCD
    return o_BHGD.reshape(B, N, D).to(q_BND.dtype), score_BHGC.logsumexp(-1).reshape(B, N)


def _bits(arena: Tensor, D: int) -> int:
    """How many an arena's codes have: two of 4 bits share a byte."""
    return 8 * arena.shape[2] // D


@jit
def _tile_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    pos,
    offset_BLH,
    length_BLH,
    layer_1,
    position_B,
    bias,
    k_scale,
    v_scale,
    o,
    lse,
    layers,
    slots,
    window,
    factor,
    D: tl.constexpr,
    ROW: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    BITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of one KV head, for the head's whole query group: the running sums of blocks of slots.

    ROW is what lies between two rows of an arena, WIDTH a power of two that holds it, QUERIES one that holds GROUP and
    that a tensor core takes. Codes stand for least + step * code; their products are taken of whole numbers around
    zero, which every float dtype holds exactly, and step and least are brought in per slot.
    """
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles, heads = tl.num_programs(0), tl.num_programs(1)
    table = (row.to(tl.int64) * layers + tl.load(layer_1)) * heads + head
    length = tl.load(length_BLH + table)
    first = tile * TILE
    g, d, at = tl.arange(0, QUERIES), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    query = (row.to(tl.int64) * heads + head) * GROUP + g
    out = query * tiles + tile
    in_group, in_row = g < GROUP, d < ROW
    in_query = in_group[:, None] & in_row[None, :]
    largest = tl.full((QUERIES,), -float("inf"), tl.float32)
    mass = tl.zeros((QUERIES,), tl.float32)

    if (first < length) | (tiles == 1):
        total = tl.zeros((QUERIES, WIDTH), tl.float32)
        from_q = q + query[:, None] * D + d[None, :]
        q_low = tl.load(from_q, mask=in_query, other=0.0)
        if BITS != 0:
            q_sum = tl.sum(q_low.to(tl.float32), 1)
            centres = tl.zeros((QUERIES,), tl.float32)
        if BITS == 4:
            total_high = tl.zeros((QUERIES, WIDTH), tl.float32)
            q_high = tl.load(from_q + ROW, mask=in_query, other=0.0)
            q_sum += tl.sum(q_high.to(tl.float32), 1)
        base = row.to(tl.int64) * slots + tl.load(offset_BLH + table)
        if WINDOWED:
            oldest = tl.load(position_B + row) - window

        for start in range(first, tl.minimum(first + TILE, length), BLOCK):
            slot = start + at
            # Beyond the length the last slot is read again: masks of loads cost registers.
            here = base + tl.minimum(slot, length - 1)
            stored = tl.load(k + here[:, None] * ROW + d[None, :], mask=in_row[None, :], other=0)
            if BITS == 0:
                score = _product(q_low, tl.trans(stored), UPCAST)
            else:
                score = _product(q_low, tl.trans(_codes(stored, q, BITS, 0)), UPCAST)
                if BITS == 4:
                    score += _product(q_high, tl.trans(_codes(stored, q, BITS, 1)), UPCAST)
                step, centre = _step_and_centre(k_scale, here, BITS)
                score = score * step[None, :] + q_sum[:, None] * centre[None, :]
            score *= factor
            seen = slot < length
            if WINDOWED:
                seen &= tl.load(pos + here) > oldest
            if bias is not None:
                extra = tl.load(bias + here)
                seen &= extra != -float("inf")
                score += extra[None, :]
            score = tl.where(seen[None, :], score, -float("inf"))

            before = largest
            largest = tl.maximum(before, tl.max(score, 1))
            top = tl.where(largest == -float("inf"), 0.0, largest)
            weight = tl.exp(score - top[:, None])
            shrink = tl.exp(before - top)
            mass = mass * shrink + tl.sum(weight, 1)

            stored = tl.load(v + here[:, None] * ROW + d[None, :], mask=in_row[None, :], other=0)
            total *= shrink[:, None]
            if BITS == 0:
                total += _product(weight.to(stored.dtype), stored, UPCAST)
            else:
                step, centre = _step_and_centre(v_scale, here, BITS)
                centres = centres * shrink + tl.sum(weight * centre[None, :], 1)
                # Steps relative to the block's largest: fp16 would lose weights times small steps.
                coarsest = tl.max(step, 0)
                relative = step / tl.where(coarsest > 0, coarsest, 1.0)
                weight = (weight * relative[None, :]).to(q.dtype.element_ty)
                total += _product(weight, _codes(stored, q, BITS, 0), UPCAST) * coarsest
                if BITS == 4:
                    total_high *= shrink[:, None]
                    total_high += _product(weight, _codes(stored, q, BITS, 1), UPCAST) * coarsest

        share = tl.where(mass == 0, 0.0, 1 / mass)[:, None]
        to_o = o + out[:, None] * D + d[None, :]
        if BITS != 0:
            total += centres[:, None]
        tl.store(to_o, (total * share).to(o.dtype.element_ty), mask=in_query)
        if BITS == 4:
            total_high += centres[:, None]
            tl.store(to_o + ROW, (total_high * share).to(o.dtype.element_ty), mask=in_query)
    tl.store(lse + out, largest + tl.log(mass), mask=in_group)


@jit
def _product(a, b, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """A product with sums in fp32; the interpreter's is wrong for bf16 operands."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def _codes(stored, q, BITS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes around zero, in the dtype of the queries."""
    if BITS == 8:
        centred = (stored ^ 128).to(tl.int8, bitcast=True)
    else:
        centred = ((stored >> 4 * HALF) & 15).to(tl.int8, bitcast=True) - 8
    return centred.to(tl.float32).to(q.dtype.element_ty)  # the interpreter takes no integer to bf16


@jit
def _step_and_centre(scale, here, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a code of one more adds, and what the code around which they are centred stands for."""
    step, least = tl.split(tl.load(scale + here[:, None] * 2 + tl.arange(0, 2)[None, :]))
    return step, least + step * 2 ** (BITS - 1)


@jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    part,
    part_lse,
    length_BLH,
    layer_1,
    o,
    lse,
    layers,
    tiles,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One query per program, over the tiles that its head fills, in their order."""
    query_head, row = tl.program_id(0), tl.program_id(1)
    queries = tl.num_programs(0)
    table = (row.to(tl.int64) * layers + tl.load(layer_1)) * (queries // GROUP) + query_head // GROUP
    filled = tl.cdiv(tl.load(length_BLH + table), TILE)
    query = row.to(tl.int64) * queries + query_head
    at, d = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    largest = tl.full((1,), -float("inf"), tl.float32)
    mass = tl.zeros((1,), tl.float32)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, filled, BLOCK):
        tile = query * tiles + start + at
        score = tl.load(part_lse + tile, mask=start + at < filled, other=-float("inf"))
        seen = score != -float("inf")
        here = part + tile[:, None] * D + d[None, :]
        mixed = tl.load(here, mask=seen[:, None] & (d < D)[None, :], other=0.0)
        before = largest
        largest = tl.maximum(before, tl.max(score, 0, keep_dims=True))
        top = tl.where(largest == -float("inf"), 0.0, largest)
        weight = tl.exp(score - top)
        shrink = tl.exp(before - top)
        mass = mass * shrink + tl.sum(weight, 0, keep_dims=True)
        total = total * shrink + tl.sum(weight[:, None] * mixed, 0)
    share = tl.where(mass == 0, 0.0, 1 / mass)
    tl.store(o + query * D + d, (total * share).to(o.dtype.element_ty), mask=d < D)
    tl.store(lse + query + tl.arange(0, 1), largest + tl.log(mass))


def launch(
    q_BND: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BLH: Tensor,
    length_BLH: Tensor,
    layer_1: Tensor,
    position_B: Tensor,
    window: int | None,
    most: int,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The Triton form of `reference`: tiles, then their merge unless a single tile holds any head."""
    B, N, D = q_BND.shape
    L, H = offset_BLH.shape[1:]
    row, tiles = k_arena.shape[2], triton.cdiv(most, _TILE)
    bits = 0 if k_scale is None else _bits(k_arena, D)
    o_BND, lse_BN = fake(q_BND)
    if not o_BND.numel():
        return o_BND, lse_BN
    part, part_lse = o_BND, lse_BN
    if tiles > 1:
        part = q_BND.new_empty((B, N, tiles, D), dtype=torch.float32)
        part_lse = q_BND.new_empty((B, N, tiles), dtype=torch.float32)
    _tile_kernel[tiles, H, B](
        q_BND.contiguous(),
        k_arena,
        v_arena,
        pos,
        offset_BLH,
        length_BLH,
        layer_1,
        position_B,
        bias,
        k_scale,
        v_scale,
        part,
        part_lse,
        L,
        k_arena.shape[1],
        window or 0,
        D**-0.5,
        D=D,
        ROW=row,
        WIDTH=max(16, triton.next_power_of_2(row)),
        GROUP=N // H,
        QUERIES=max(16, triton.next_power_of_2(N // H)),
        BITS=bits,
        WINDOWED=bool(window),
        TILE=_TILE,
        BLOCK=_block(triton.next_power_of_2(D) * q_BND.element_size(), bits),
        UPCAST=INTERPRETED and q_BND.dtype == torch.bfloat16,
        num_warps=4,
        num_stages=1 if bits else 2,  # codes go through registers, where no copy can run ahead of them
    )
    if tiles > 1:
        _merge_kernel[N, B](
            part,
            part_lse,
            length_BLH,
            layer_1,
            o_BND,
            lse_BN,
            L,
            tiles,
            D=D,
            WIDTH=triton.next_power_of_2(D),
            GROUP=N // H,
            TILE=_TILE,
            BLOCK=16,
            num_warps=4,
        )
    return o_BND, lse_BN


def _block(row_bytes: int, bits: int) -> int:
    """Slots that are multiplied at once: up to 16 KiB of operands, and what fits in registers of unpacked codes."""
    return max(16, min(256 // bits if bits else 64, 2**14 // row_bytes))


def fake(q_BND: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    """Empty results."""
    o_BND = torch.empty_like(q_BND, memory_format=torch.contiguous_format)
    return o_BND, q_BND.new_empty(q_BND.shape[:2], dtype=torch.float32)


def cases() -> Iterator[Case]:
    """Lengths around tiles, empty heads, one head with everything; groups, head dims, windows, biases and codes."""
    for lengths, D, group, window in (
        ([[1, 63, 64]], 64, 1, 0),
        ([[65, 0], [257, 1], [0, 0]], 80, 4, 0),
        ([[0, 1000, 0]], 128, 4, 0),
        ([[513], [64]], 64, 8, 300),
        ([[63, 300]], 96, 3, 40),
        ([[65], [300]], 256, 8, 0),
        ([[2, 70]], 20, 17, 1),
    ):
        yield Case(
            name=f"lengths={lengths}, D={D}, G={group}, window={window}",
            make=partial(_arguments, lengths, D, group, window),
        )
    yield Case(name="4,500 slots, the last of them largest", make=_rising)
    yield Case(name="a tile holds every head", make=partial(_arguments, [[5, 256], [0, 17]], 64, 4, 0, most=256))
    yield Case(name="room for more", make=partial(_arguments, [[5, 200]], 64, 4, 0, most=1000))
    yield Case(name="merged and empty slots", make=partial(_arguments, [[65, 300, 4]], 64, 4, 200, biased=True))
    for bits in (8, 4):
        for D, lengths in ((64, [[1, 300]]), (80, [[65, 0], [7, 64]]), (96, [[63]]), (128, [[257]]), (256, [[64, 1]])):
            make = partial(_arguments, lengths, D, 4, 0, bits=bits)
            yield Case(name=f"{bits} bits, D={D}, lengths={lengths}", make=make)
        make = partial(_arguments, [[65, 300]], 64, 8, 100, bits=bits, biased=True)
        yield Case(name=f"{bits} bits, window and bias", make=make)
    yield Case(name="no rows", make=_no_rows)


def _arguments(
    lengths_BH: Sequence[Sequence[int]],
    D: int,
    group: int,
    window: int,
    dtype: torch.dtype,
    *,
    most: int | None = None,
    biased: bool = False,
    bits: int = 0,
) -> Arguments:
    arena = ragged_arena(lengths_BH, D, dtype=dtype)
    B, H = len(lengths_BH), len(lengths_BH[0])
    q_BND = random(B, H * group, D, seed=1, dtype=dtype)
    k, v, k_scale, v_scale, bias = arena.k, arena.v, None, None, None
    if bits:
        (k, k_scale), (v, v_scale) = quantize_kv(k, bits), quantize_kv(v, bits)
    if biased:
        bias = random(*arena.pos.shape, seed=2).abs()
        bias[:, ::5] = float("-inf")
    tables = arena.pos, arena.offset, arena.length, arena.layer, arena.position
    return q_BND, k, v, *tables, window, most or max(map(max, lengths_BH)) or 1, bias, k_scale, v_scale


def _rising(dtype: torch.dtype) -> Arguments:
    """More tiles than are merged at once, of which the last have the largest scores."""
    q_BND, k, *others = _arguments([[4500]], 16, 1, 0, dtype)
    k[:, -100:] *= 8
    return q_BND, k, *others


def _no_rows(dtype: torch.dtype) -> Arguments:
    arguments = _arguments([[3]], 64, 2, 0, dtype)
    layer_1 = arguments[6]
    return tuple(x[:0] if isinstance(x, Tensor) and x is not layer_1 else x for x in arguments)


def bytes_moved(
    q_BND: Tensor,
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BLH: Tensor,
    length_BLH: Tensor,
    layer_1: Tensor,
    position_B: Tensor,
    window: int | None,
    most: int,
    bias: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> int:
    """Filled slots once per KV head, with what belongs to them, queries and results; whatever the window."""
    slot = 2 * k_arena.shape[2] * k_arena.element_size()
    slot += 4 * (window != 0 and window is not None) + 4 * (bias is not None) + 16 * (k_scale is not None)
    filled = int(length_BLH[:, layer_1].sum())
    return filled * slot + 2 * q_BND.nbytes + 4 * q_BND[..., 0].numel()


def flops(q_BND: Tensor, k_arena: Tensor, v_arena: Tensor, *others: Tensor) -> int:
    """Two products per filled slot and query."""
    _, offset_BLH, length_BLH, layer_1 = others[:4]
    _, N, D = q_BND.shape
    return int(length_BLH[:, layer_1].sum()) * (N // offset_BLH.shape[2]) * D * 4


def sized(work: Workload) -> Arguments:
    """A decode step's layer, in the middle of its heads' budgets: one head has twice the mean, one has half of it."""
    B, L, H, D = work.batch, work.layers, work.kv_heads, work.head_dim
    length = torch.full((B, L, H), work.kept, dtype=torch.int32)
    length[:, :, 0] *= 2
    length[:, :, -1] //= 2
    flat = length.flatten(1)
    offset = (flat.cumsum(1) - flat).view_as(length).int()
    k = torch.empty(B, int(flat.sum(1).max()), D, dtype=work.dtype, device="meta")
    pos, q = torch.empty(k.shape[:2], dtype=torch.int32, device="meta"), k.new_empty(B, work.heads, D)
    position = torch.full((B,), 8 * work.kept, dtype=torch.int32)
    return q, k, k.clone(), pos, offset, length, torch.tensor([L // 2]), position, 0, 2 * work.kept, None, None, None


KERNEL = register(
    __name__,
    "(Tensor q_BND, Tensor k_arena, Tensor v_arena, Tensor pos, Tensor offset_BLH, Tensor length_BLH, "
    "Tensor layer_1, Tensor position_B, int window, SymInt most, Tensor? bias, Tensor? k_scale, Tensor? v_scale) "
    "-> (Tensor, Tensor)",
)
