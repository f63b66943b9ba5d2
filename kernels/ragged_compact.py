"""Keep the best tokens of every KV head and lay them out in the arena."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import INTEGERS, check, check_arena
from kernels.language import jit, tl, triton
from kernels.registry import Arguments, Case, Workload, register
from kernels.testing import random

_COUNTS = (torch.int32, torch.int64)
_LOWEST = torch.finfo(torch.float32).min


def ragged_compact(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BH: Tensor,
    keep_BH: Tensor,
    max_keep: int,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    score_BHS: Tensor,
) -> Tensor:
    """Copy each head's `keep` best-scored tokens to its region, in order of position.

    Equal scores are settled in favour of the earlier place, so the result does not depend on a sort's whims. No size
    depends on tensor values, only on `max_keep`.

    Args:
        k_arena: (B, slots, D), written.
        v_arena: (B, slots, D), written.
        pos: (B, slots) int32, written.
        offset_BH: int32 or int64, first slot of each head's region.
        keep_BH: int32 or int64, how many tokens each head may keep, at least 1.
        max_keep: an upper bound of `keep_BH`, known to the host, >= 1; what is beyond it is not kept.
        k_BHSD: candidate keys in the arena's dtype, in order of position; they must not share memory with the arena.
        v_BHSD: candidate values; nor may they.
        pos_BHS: int32 absolute positions, rising; -1 marks an empty place, which may be anywhere and is never kept.
        score_BHS: fp32, higher is kept, not NaN; at least one place of every head is not empty. Infinity is allowed,
            and its negative is as good as the lowest finite number.

    Returns:
        (B, H) int32: tokens kept, the smaller of `keep_BH` and the places that are not empty.

    Raises:
        ValueError: a shape, dtype or device does not fit, **or** the arena is not contiguous or has more slots than
            int32 counts, **or** `max_keep` is below 1.

    Example:
        >>> import torch
        >>> k_arena, v_arena = torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)
        >>> pos = torch.full((1, 2), -1, dtype=torch.int32)
        >>> k = torch.tensor([10.0, 11, 12]).view(1, 1, 3, 1); places = torch.arange(3, dtype=torch.int32).view(1, 1, 3)
        >>> score = torch.tensor([[[0.2, 0.1, 0.9]]]); zero, two = torch.zeros(1, 1).int(), torch.full((1, 1), 2)
        >>> ragged_compact(k_arena, v_arena, pos, zero, two, 2, k, k, places, score)
        tensor([[2]], dtype=torch.int32)
        >>> k_arena.flatten().tolist(), pos.tolist()
        ([10.0, 12.0], [[0, 2]])
    """
    check_arena(k_arena, v_arena, pos)
    B, _, D = k_arena.shape
    check("k_BHSD", k_BHSD, shape=(B, None, None, D), dtype=[k_arena.dtype], like=k_arena)
    check("v_BHSD", v_BHSD, shape=k_BHSD.shape, dtype=[k_arena.dtype], like=k_arena)
    check("pos_BHS", pos_BHS, shape=k_BHSD.shape[:3], dtype=INTEGERS, like=k_arena)
    check("score_BHS", score_BHS, shape=k_BHSD.shape[:3], dtype=[torch.float32], like=k_arena)
    check("offset_BH", offset_BH, shape=k_BHSD.shape[:2], dtype=_COUNTS, like=k_arena)
    check("keep_BH", keep_BH, shape=k_BHSD.shape[:2], dtype=_COUNTS, like=k_arena)
    if max_keep < 1:
        raise ValueError(f"max_keep is {max_keep}, it must be at least 1")
    kept_BH: Tensor = torch.ops.headkv.ragged_compact(
        k_arena, v_arena, pos, offset_BH, keep_BH, max_keep, k_BHSD, v_BHSD, pos_BHS, score_BHS
    )
    return kept_BH


def reference(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BH: Tensor,
    keep_BH: Tensor,
    max_keep: int,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    score_BHS: Tensor,
) -> Tensor:
    """What `ragged_compact` computes: all heads copy equally often, beyond their share their last token once more."""
    B, _, S, D = k_BHSD.shape
    filled_BHS = pos_BHS >= 0
    kept_BH = torch.minimum(keep_BH.clamp(max=max_keep), filled_BHS.sum(-1)).to(torch.int32)
    comparable_BHS = score_BHS.clamp(min=_LOWEST).masked_fill(~filled_BHS, float("-inf"))
    order_BHS = comparable_BHS.argsort(dim=-1, descending=True, stable=True)
    rank_C = torch.arange(min(max_keep, S), device=pos.device)
    beyond_BHC = rank_C >= kept_BH[..., None]
    best_BHC = order_BHS[..., : len(rank_C)].masked_fill(beyond_BHC, S).sort(dim=-1).values
    rank_BHC = torch.minimum(rank_C, kept_BH[..., None] - 1).long()
    source_BHC = best_BHC.gather(-1, rank_BHC)
    slot_BHC = offset_BH.long()[..., None] + rank_BHC
    row_B11 = torch.arange(B, device=pos.device)[:, None, None]
    wide_BHCD = source_BHC[..., None].expand(-1, -1, -1, D)
    k_arena[row_B11, slot_BHC] = k_BHSD.gather(2, wide_BHCD)
    v_arena[row_B11, slot_BHC] = v_BHSD.gather(2, wide_BHCD)
    pos[row_B11, slot_BHC] = pos_BHS.gather(-1, source_BHC)
    return kept_BH


@jit
def _candidates(score, pos, pos_place, start, places, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places from `start` on: their numbers, whether they are filled, and integers in the order of their scores."""
    place = start + tl.arange(0, BLOCK)
    filled = tl.load(pos + place.to(tl.int64) * pos_place, mask=place < places, other=-1) >= 0
    x = tl.maximum(tl.load(score + place, mask=place < places, other=0.0), -3.4028234663852886e38)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # no negative zero
    ordered = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    return place, filled, ordered.to(tl.uint32, bitcast=True)


@jit
def _select(  # type: ignore[no-untyped-def]
    score,
    pos,
    keep,
    source,
    kept,
    heads,
    places,
    most,
    pos_row,
    pos_head,
    pos_place,
    BLOCK: tl.constexpr,
):
    """One program per head finds the score of the last token to keep, digit by digit, then lists what is kept.

    A digit is 8 bits. Counting how many scores have each digit, among those that begin like the one sought, tells the
    next digit of it; no score is moved.
    """
    pair = tl.program_id(1).to(tl.int64) * heads + tl.program_id(0)
    score += pair * places
    pos += tl.program_id(1).to(tl.int64) * pos_row + tl.program_id(0).to(tl.int64) * pos_head
    source += pair * most
    wanted = tl.minimum(tl.load(keep + pair), most).to(tl.int32)
    last = tl.full((), 0, tl.uint32)
    digits = tl.arange(0, 256)
    for shift in tl.static_range(24, -8, -8):
        count = tl.zeros((256,), tl.int32)
        for start in range(0, places, BLOCK):
            place, filled, key = _candidates(score, pos, pos_place, start, places, BLOCK)
            alike = filled & ((key >> shift >> 8) == (last >> shift >> 8))
            count += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=alike)
        if shift == 24:
            wanted = tl.minimum(wanted, tl.sum(count))
            tl.store(kept + pair, wanted)
        at_least = tl.sum(count) - tl.cumsum(count) + count
        digit = tl.sum((at_least >= wanted).to(tl.int32)) - 1
        wanted -= tl.sum(tl.where(digits > digit, count, 0))
        last |= digit.to(tl.uint32) << shift

    better_before = 0
    equal_before = 0
    for start in range(0, places, BLOCK):
        place, filled, key = _candidates(score, pos, pos_place, start, places, BLOCK)
        better = (filled & (key > last)).to(tl.int32)
        equal = (filled & (key == last)).to(tl.int32)
        earlier = equal_before + tl.cumsum(equal) - equal
        rank = better_before + tl.cumsum(better) - better + tl.minimum(earlier, wanted)
        tl.store(source + rank, place, mask=(better + equal * (earlier < wanted)) > 0)
        better_before += tl.sum(better)
        equal_before += tl.sum(equal)


@jit
def _copy(  # type: ignore[no-untyped-def]
    k_arena,
    v_arena,
    pos,
    offset,
    kept,
    source,
    k,
    v,
    from_pos,
    slots,
    heads,
    most,
    k_row,
    k_head,
    k_place,
    v_row,
    v_head,
    v_place,
    pos_row,
    pos_head,
    pos_place,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK tokens of a head."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    pair = row * heads + head
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = rank < tl.load(kept + pair)
    place = tl.load(source + pair * most + rank, mask=wanted, other=0).to(tl.int64)
    slot = row * slots + tl.load(offset + pair) + rank
    position = tl.load(from_pos + row * pos_row + head * pos_head + place * pos_place, mask=wanted)
    tl.store(pos + slot, position, mask=wanted)

    at = tl.arange(0, BLOCK_D)
    inside = wanted[:, None] & (at < D)
    target = (slot * D)[:, None] + at
    from_k = k + row * k_row + head * k_head + (place * k_place)[:, None] + at
    from_v = v + row * v_row + head * v_head + (place * v_place)[:, None] + at
    tl.store(k_arena + target, tl.load(from_k, mask=inside), mask=inside)
    tl.store(v_arena + target, tl.load(from_v, mask=inside), mask=inside)


def launch(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BH: Tensor,
    keep_BH: Tensor,
    max_keep: int,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    score_BHS: Tensor,
) -> Tensor:
    """The Triton form of `reference`."""
    B, H, S, D = k_BHSD.shape
    most = min(max_keep, S)
    k_BHSD, v_BHSD = (x if x.stride(3) == 1 else x.contiguous() for x in (k_BHSD, v_BHSD))
    source_BHC = torch.empty(B, H, most, dtype=torch.int32, device=pos.device)
    kept_BH = torch.empty(B, H, dtype=torch.int32, device=pos.device)
    _select[(H, B)](
        score_BHS.contiguous(),
        pos_BHS,
        keep_BH.contiguous(),
        source_BHC,
        kept_BH,
        H,
        S,
        most,
        *pos_BHS.stride(),
        BLOCK=2048,
        num_warps=8,
    )
    block_d = triton.next_power_of_2(D)
    block = max(4096 // block_d, 1)
    _copy[(triton.cdiv(most, block), H, B)](
        k_arena,
        v_arena,
        pos,
        offset_BH.contiguous(),
        kept_BH,
        source_BHC,
        k_BHSD,
        v_BHSD,
        pos_BHS,
        k_arena.shape[1],
        H,
        most,
        *k_BHSD.stride()[:3],
        *v_BHSD.stride()[:3],
        *pos_BHS.stride(),
        D=D,
        BLOCK_D=block_d,
        BLOCK=block,
        num_warps=4,
    )
    return kept_BH


def fake(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BH: Tensor,
    keep_BH: Tensor,
    max_keep: int,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    score_BHS: Tensor,
) -> Tensor:
    """An empty result."""
    return torch.empty_like(keep_BH, dtype=torch.int32, memory_format=torch.contiguous_format)


def cases() -> Iterator[Case]:
    """Many ties, empty places, and scores whose order their bits do not have."""
    yield Case(name="one place", make=partial(_arguments, [[1]], 1, 64))
    yield Case(name="S=63, D=80", make=partial(_arguments, [[9, 100], [1, 62], [63, 3]], 63, 80))
    yield Case(name="S=65, D=128", make=partial(_arguments, [[64, 1, 5, 65, 2, 2, 40, 33]], 65, 128))
    yield Case(name="S=1000, D=256", make=partial(_arguments, [[1000, 1]], 1000, 256))
    yield Case(name="more than a block, D=96", make=partial(_arguments, [[777]], 2100, 96))
    yield Case(name="more asked for than the most", make=partial(_arguments, [[40, 9]], 100, 64, most=20))
    yield Case(name="less asked for than the most", make=partial(_arguments, [[40, 9]], 100, 64, most=90))
    yield Case(name="all equal", make=partial(_arguments, [[64, 63, 1]], 1000, 64, values=(1.0,)))
    yield Case(
        name="zeros, infinities, and numbers that only their last bits tell apart",
        make=partial(
            _arguments,
            [[30, 64], [65, 1], [7, 200]],
            1000,
            64,
            values=(0.0, -0.0, 1.0, 1.0 + 2**-23, 1.0 - 2**-24, -1.0, -1e-45, 1e-45, float("inf"), -float("inf")),
        ),
    )


def _arguments(
    keep: list[list[int]],
    S: int,
    D: int,
    dtype: torch.dtype,
    *,
    most: int | None = None,
    values: tuple[float, ...] | None = None,
) -> Arguments:
    """Candidates of which every fourth place is empty, with random scores or `values` in turn; none overlaps."""
    keep_BH = torch.tensor(keep)
    B, H = keep_BH.shape
    generator = torch.Generator().manual_seed(S)
    empty_BHS = torch.rand(B, H, S, generator=generator) < 0.25
    empty_BHS[..., S // 2] = False
    pos_BHS = torch.arange(3, S + 3, dtype=torch.int32).repeat(B, H, 1).masked_fill(empty_BHS, -1)
    score_BHS = random(B, H, S, seed=1)
    if values is not None:
        score_BHS = torch.tensor(values)[torch.randint(0, len(values), (B, H, S), generator=generator)]
    empty_BHS1 = empty_BHS[..., None]
    k_BHSD = random(B, S, H, D, dtype=dtype).transpose(1, 2).masked_fill(empty_BHS1, float("nan"))
    v_BHSD = random(B, H, S, D, seed=1, dtype=dtype).masked_fill(empty_BHS1, float("nan"))
    offset_BH = keep_BH.cumsum(1) - keep_BH
    arena = torch.full((B, int(keep_BH.sum(1).max()) + 1, D), float("nan"), dtype=dtype)
    pos = torch.full(arena.shape[:2], -1, dtype=torch.int32)
    return arena, -arena, pos, offset_BH.int(), keep_BH, most or int(keep_BH.max()), k_BHSD, v_BHSD, pos_BHS, score_BHS


def bytes_moved(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    offset_BH: Tensor,
    keep_BH: Tensor,
    max_keep: int,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    score_BHS: Tensor,
) -> int:
    """Scores and positions in, and the tokens that are kept, if no place is empty, in and out."""
    kept = int(keep_BH.clamp(max=min(max_keep, k_BHSD.shape[2])).sum())
    token = 2 * k_BHSD.shape[3] * k_BHSD.element_size() + 4
    return score_BHS.nbytes + 4 * pos_BHS.numel() + offset_BH.nbytes + 2 * keep_BH.nbytes + 2 * kept * token


def flops(*arguments: object) -> int:
    """Nothing is added or multiplied but counts."""
    return 0


def sized(work: Workload) -> Arguments:
    """A prompt chunk of 1024 tokens after a full cache, whose heads keep half to one and a half times the mean."""
    B, H, S, D = work.batch, work.kv_heads, work.kept + 1024, work.head_dim
    keep_BH = torch.linspace(0.5, 1.5, H).mul(work.kept).round().long().clamp(min=1).repeat(B, 1)
    arena = torch.empty(B, work.layers * H * work.kept, D, dtype=work.dtype, device="meta")
    pos = torch.empty(arena.shape[:2], dtype=torch.int32, device="meta")
    new_BHSD = torch.empty(B, H, S, D, dtype=work.dtype, device="meta")
    pos_BHS = torch.empty(B, H, S, dtype=torch.int32, device="meta")
    score_BHS = torch.empty(B, H, S, device="meta")
    tables = (keep_BH.cumsum(1) - keep_BH).int(), keep_BH, int(keep_BH.max())
    return arena, torch.empty_like(arena), pos, *tables, new_BHSD, torch.empty_like(new_BHSD), pos_BHS, score_BHS


KERNEL = register(
    __name__,
    "(Tensor(a!) k_arena, Tensor(b!) v_arena, Tensor(c!) pos, Tensor offset_BH, Tensor keep_BH, int max_keep, "
    "Tensor k_BHSD, Tensor v_BHSD, Tensor pos_BHS, Tensor score_BHS) -> Tensor",
)
