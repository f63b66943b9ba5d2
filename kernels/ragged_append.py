"""Write new tokens into their slots of the arena."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.checks import INTEGERS, check, check_arena, check_inside
from kernels.language import jit, tl, triton
from kernels.registry import Arguments, Case, Workload, register
from kernels.testing import random


def ragged_append(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    slot_BLHT: Tensor,
    layer_1: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    position_B: Tensor,
    active_B: Tensor,
) -> None:
    """Store T keys and values per (row, KV head) of a layer, in place.

    A row that is not active changes nothing, and the work has the same shape in every step.

    Args:
        k_arena: (B, slots, D), written.
        v_arena: (B, slots, D), written.
        pos: (B, slots) int32, absolute position of each slot, written.
        slot_BLHT: int32, arena slot of each head's new tokens; those of one row are distinct.
        layer_1: (1,) int64, the layer.
        k_BTHD: new keys, after RoPE, in the arena's dtype.
        v_BTHD: new values.
        position_B: int32, absolute position of the first new token; the others follow it.
        active_B: bool, rows that take part.

    Raises:
        ValueError: a shape, dtype or device does not fit, **or** the arena or a table is not contiguous, **or** it has
            more slots than int32 counts.
        RuntimeError, IndexError: on a CPU, a slot of an active row is outside the arena, **or** there is no such layer.

    Example:
        >>> k, v, pos = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), torch.full((1, 3), -1, dtype=torch.int32)
        >>> slot, position = torch.tensor([[[[1]]]], dtype=torch.int32), torch.tensor([7], dtype=torch.int32)
        >>> new = torch.ones(1, 1, 1, 2)
        >>> ragged_append(k, v, pos, slot, torch.tensor([0]), new, new, position, torch.tensor([True]))
        >>> k[0, :, 0].tolist(), pos[0].tolist()
        ([0.0, 1.0, 0.0], [-1, 7, -1])
    """
    check_arena(k_arena, v_arena, pos)
    B, _, D = k_arena.shape
    check("slot_BLHT", slot_BLHT, shape=(B, None, None, None), dtype=INTEGERS, like=k_arena, contiguous=True)
    _, _, H, T = slot_BLHT.shape
    check("layer_1", layer_1, shape=(1,), dtype=[torch.int64], like=k_arena)
    for name, new_BTHD in (("k_BTHD", k_BTHD), ("v_BTHD", v_BTHD)):
        check(name, new_BTHD, shape=(B, T, H, D), dtype=[k_arena.dtype], like=k_arena)
    check("position_B", position_B, shape=(B,), dtype=INTEGERS, like=k_arena, contiguous=True)
    check("active_B", active_B, shape=(B,), dtype=[torch.bool], like=k_arena, contiguous=True)
    torch.ops.headkv.ragged_append(k_arena, v_arena, pos, slot_BLHT, layer_1, k_BTHD, v_BTHD, position_B, active_B)


def reference(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    slot_BLHT: Tensor,
    layer_1: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    position_B: Tensor,
    active_B: Tensor,
) -> None:
    """What `ragged_append` computes: rows that are not active write back what is there."""
    slot_BTH = slot_BLHT.index_select(1, layer_1).squeeze(1).transpose(1, 2).long()
    check_inside(slot_BTH, active_B[:, None, None].int(), k_arena.shape[1])
    slot_BTH = slot_BTH.where(active_B[:, None, None], 0)  # of a row that is not active, anything may stand there
    B, T, _ = slot_BTH.shape
    row_B11 = torch.arange(B, device=slot_BTH.device)[:, None, None]
    position_BT = position_B[:, None] + torch.arange(T, dtype=torch.int32, device=pos.device)
    active_B111 = active_B[:, None, None, None]
    k_arena[row_B11, slot_BTH] = torch.where(active_B111, k_BTHD, k_arena[row_B11, slot_BTH])
    v_arena[row_B11, slot_BTH] = torch.where(active_B111, v_BTHD, v_arena[row_B11, slot_BTH])
    pos[row_B11, slot_BTH] = torch.where(active_B111[..., 0], position_BT[..., None], pos[row_B11, slot_BTH])


@jit
def _kernel(  # type: ignore[no-untyped-def]
    k_arena,
    v_arena,
    pos,
    slot,
    layer,
    k,
    v,
    position,
    active,
    slots,
    layers,
    tokens,
    heads,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per BLOCK of a row's (token, head) pairs, in the order in which they lie in memory."""
    row = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = (pair < tokens * heads) & tl.load(active + row)
    token, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    table = slot + (row * layers + tl.load(layer)) * heads * tokens
    place = row * slots + tl.load(table + head * tokens + token, mask=wanted, other=0)
    tl.store(pos + place, tl.load(position + row) + token.to(tl.int32), mask=wanted)

    at = tl.arange(0, BLOCK_D)
    inside = wanted[:, None] & (at < D)
    target = (place * D)[:, None] + at
    from_k = (row * k_row + token * k_token + head * k_head)[:, None] + at
    from_v = (row * v_row + token * v_token + head * v_head)[:, None] + at
    tl.store(k_arena + target, tl.load(k + from_k, mask=inside), mask=inside)
    tl.store(v_arena + target, tl.load(v + from_v, mask=inside), mask=inside)


def launch(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    slot_BLHT: Tensor,
    layer_1: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    position_B: Tensor,
    active_B: Tensor,
) -> None:
    """The Triton form of `reference`."""
    B, slots, D = k_arena.shape
    _, L, H, T = slot_BLHT.shape
    if slot_BLHT.numel() == 0:
        return
    k_BTHD, v_BTHD = (x if x.stride(3) == 1 else x.contiguous() for x in (k_BTHD, v_BTHD))
    block_d = triton.next_power_of_2(D)
    block = min(triton.next_power_of_2(T * H), max(4096 // block_d, 1))
    _kernel[(triton.cdiv(T * H, block), B)](
        k_arena,
        v_arena,
        pos,
        slot_BLHT,
        layer_1,
        k_BTHD,
        v_BTHD,
        position_B,
        active_B,
        slots,
        L,
        T,
        H,
        *k_BTHD.stride()[:3],
        *v_BTHD.stride()[:3],
        D=D,
        BLOCK_D=block_d,
        BLOCK=block,
        num_warps=min(max(block * block_d // 512, 1), 4),
    )


def fake(*arguments: Tensor) -> None:
    """Nothing is returned."""


def cases() -> Iterator[Case]:
    """One token and many, into regions in no particular order, of rows that take part and rows that do not."""
    yield Case(name="one token", make=partial(_arguments, 3, 8, 1, 64))
    yield Case(name="one row, one head, T=63", make=partial(_arguments, 1, 1, 63, 128))
    yield Case(name="three heads, D=80, T=65", make=partial(_arguments, 3, 3, 65, 80))
    yield Case(name="D=96, T=64", make=partial(_arguments, 1, 2, 64, 96))
    yield Case(name="D=256", make=partial(_arguments, 3, 2, 5, 256))
    yield Case(name="no token", make=_no_token)


def _arguments(B: int, H: int, T: int, D: int, dtype: torch.dtype) -> Arguments:
    L, slots = 3, 2 * H * T + 7
    generator = torch.Generator().manual_seed(T)
    slot_BLHT = torch.stack([torch.randperm(slots, generator=generator)[: H * T] for _ in range(B * L)])
    arena = torch.full((B, slots, D), float("nan"), dtype=dtype)
    pos = torch.full((B, slots), -1, dtype=torch.int32)
    heads_BTHD = random(B, T, 4 * H, D, dtype=dtype)  # as a product of all heads of q, k and v leaves them
    k_BTHD, v_BTHD = heads_BTHD.split((2 * H, H, H), dim=2)[1:]
    position_B = 1000 * torch.arange(B, dtype=torch.int32)
    tables = slot_BLHT.int().view(B, L, H, T), torch.tensor([1])
    return arena, -arena, pos, *tables, k_BTHD, v_BTHD, position_B, torch.arange(B) % 3 != 1


def _no_token(dtype: torch.dtype) -> Arguments:
    *cache, _, _, position_B, active_B = _arguments(1, 2, 0, 64, dtype)
    k_BTHD, v_BTHD = (torch.empty(1, 0, 2, 64, dtype=dtype) for _ in "kv")  # `opcheck` takes no empty views
    return *cache, k_BTHD, v_BTHD, position_B, active_B


def bytes_moved(
    k_arena: Tensor,
    v_arena: Tensor,
    pos: Tensor,
    slot_BLHT: Tensor,
    layer_1: Tensor,
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    position_B: Tensor,
    active_B: Tensor,
) -> int:
    """Keys and values in and out, a slot read and a position written for each, and what is there once per row."""
    pairs = slot_BLHT[:, 0].numel()
    return 2 * (k_BTHD.nbytes + v_BTHD.nbytes) + 8 * pairs + layer_1.nbytes + position_B.nbytes + active_B.nbytes


def flops(*arguments: Tensor) -> int:
    """Nothing is computed."""
    return 0


def sized(work: Workload) -> Arguments:
    """One decode step's token per row, in regions of equal size, in the middle layer."""
    B, L, H, D = work.batch, work.layers, work.kv_heads, work.head_dim
    arena = torch.empty(B, L * H * (work.kept + 1), D, dtype=work.dtype, device="meta")
    pos = torch.empty(arena.shape[:2], dtype=torch.int32, device="meta")
    first_LH1 = torch.arange(L * H, dtype=torch.int32).view(L, H, 1) * (work.kept + 1)
    slot_BLHT = (first_LH1 + work.kept).expand(B, L, H, 1).contiguous()
    new_BTHD = torch.empty(B, 1, H, D, dtype=work.dtype, device="meta")
    rows = torch.full((B,), work.kept, dtype=torch.int32), torch.ones(B, dtype=torch.bool)
    return arena, torch.empty_like(arena), pos, slot_BLHT, torch.tensor([L // 2]), new_BTHD, new_BTHD, *rows


KERNEL = register(
    __name__,
    "(Tensor(a!) k_arena, Tensor(b!) v_arena, Tensor(c!) pos, Tensor slot_BLHT, Tensor layer_1, Tensor k_BTHD, "
    "Tensor v_BTHD, Tensor position_B, Tensor active_B) -> ()",
)
