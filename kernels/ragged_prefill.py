"""Attention of a chunk of new tokens over a ragged past and over itself."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import INTEGERS, MOST_SLOTS, check, check_groups
from kernels.language import INTERPRETED, jit, tl, triton
from kernels.registry import Arguments, Case, Workload, register, serve
from kernels.testing import random

_LOG2_E = 1.4426950408889634
_QUERY_BLOCK = 1024


def ragged_prefill(
    q_BTND: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BT: Tensor,
    window: int | None = None,
) -> Tensor:
    """Attend from T new tokens to the S tokens stored so far, the new ones included, causally by position.

    The last T of the S stored tokens are the new ones; the first S - T are a past that may differ from head to head.
    On a CPU this is PyTorch's own attention. Where every key is at its query's position, but for padding at the end of
    a row, no mask is built, and what a query that is padding gives means nothing; otherwise the mask of one KV head and
    at most 1024 queries exists at a time. On a GPU each key and value is read once for its whole query group, if any
    query of a block sees it.

    Args:
        q_BTND: queries after RoPE, N a multiple of H.
        k_BHSD: keys after RoPE, in the queries' dtype, as the values.
        v_BHSD: values.
        pos_BHS: int32 absolute positions; -1 marks an empty place.
        position_BT: int32 absolute positions of the queries.
        window: sliding window in tokens, >= 1, or None for full attention.

    Returns:
        (B, T, N, D) in q's dtype; zero for a query that sees nothing.

    Raises:
        ValueError: a tensor's shape, dtype or device does not fit; the window is below 1; on a GPU, D is above 256.

    Source:
        Dao, FlashAttention-2, 2023.

    Example:
        >>> q = k = torch.zeros(1, 2, 1, 4); v = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1).expand(1, 1, 2, 4)
        >>> pos = torch.arange(2, dtype=torch.int32)
        >>> ragged_prefill(q, k.transpose(1, 2), v, pos[None, None], pos[None])[0, :, 0, 0]
        tensor([1., 2.])
    """
    return _attend(q_BTND, k_BHSD, v_BHSD, pos_BHS, position_BT, window, lse=False)[0]


def ragged_prefill_lse(
    q_BTND: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BT: Tensor,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ragged_prefill` for callers that merge the attention over several sets of keys, or need its weights again.

    Keys may be any here, not only those that end with the queries' own. Of a query that is padding, with an empty place
    as its own, nothing that it gives means anything.

    Args:
        q_BTND: queries after RoPE, N a multiple of H.
        k_BHSD: keys after RoPE, in the queries' dtype, as the values.
        v_BHSD: values.
        pos_BHS: int32 absolute positions; -1 marks an empty place.
        position_BT: int32 absolute positions of the queries.
        window: sliding window in tokens, >= 1, or None for full attention.

    Returns:
        (B, T, N, D) in q's dtype, zero for a query that sees nothing, and (B, T, N) fp32, the natural logarithm of the
        sum of exponentials of its scores, -inf for such a query.

    Raises:
        ValueError: as `ragged_prefill`.

    Example:
        >>> q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
        >>> pos = torch.tensor([[[0, 1, -1]]], dtype=torch.int32)
        >>> ragged_prefill_lse(q, k, k, pos, pos[0, :, 1:2])[1].exp()
        tensor([[[2.]]])
    """
    return _attend(q_BTND, k_BHSD, v_BHSD, pos_BHS, position_BT, window, lse=True)


def _attend(
    q_BTND: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BT: Tensor,
    window: int | None,
    *,
    lse: bool,
) -> tuple[Tensor, Tensor]:
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, it must be at least 1")
    check("q_BTND", q_BTND, shape=(None,) * 4)
    B, T, N, D = q_BTND.shape
    check("k_BHSD", k_BHSD, shape=(B, None, None, D), dtype=[q_BTND.dtype], like=q_BTND)
    H, S = k_BHSD.shape[1:3]
    check_groups("q_BTND", N, "k_BHSD", H)
    check("v_BHSD", v_BHSD, shape=(B, H, S, D), dtype=[q_BTND.dtype], like=q_BTND)
    check("pos_BHS", pos_BHS, shape=(B, H, S), dtype=INTEGERS, like=q_BTND)
    check("position_BT", position_BT, shape=(B, T), dtype=INTEGERS, like=q_BTND)
    form = torch.ops.headkv.ragged_prefill if serve() else reference
    o_BTND: Tensor
    lse_BTN: Tensor
    o_BTND, lse_BTN = form(q_BTND, k_BHSD, v_BHSD, pos_BHS, position_BT, min(window or 0, MOST_SLOTS), lse)
    return o_BTND, lse_BTN


def reference(
    q_BTND: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BT: Tensor,
    window: int,
    lse: bool,
) -> tuple[Tensor, Tensor]:
    """What `ragged_prefill` computes; without `lse` the second result is empty."""
    B, T, N, D = q_BTND.shape
    H, S = k_BHSD.shape[1:3]
    q_BNTD = q_BTND.transpose(1, 2)
    lse_BTN = q_BTND.new_empty((B, T, N) if lse else 0, dtype=torch.float32)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # no public name of it gives the logarithms
    fast = not lse or (T and q_BTND.device.type == "cpu")
    if S == T and (not window or window >= T) and fast and _is_plain(pos_BHS, position_BT):
        empty_BHS1 = (pos_BHS < 0)[..., None]
        k, v = (x.masked_fill(empty_BHS1, 0.0) if empty_BHS1.any() else x for x in (k_BHSD, v_BHSD))
        if lse:
            side_by_side = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BNTD, k, v))
            o_BNTD, lse_BNT = flash(*side_by_side, 0.0, True)
            return o_BNTD.transpose(1, 2).contiguous(), lse_BNT.transpose(1, 2)
        o_BNTD = F.scaled_dot_product_attention(q_BNTD, k, v, is_causal=True, enable_gqa=N != H)
        return o_BNTD.transpose(1, 2).contiguous(), lse_BTN
    o_BTND = torch.empty_like(q_BTND, memory_format=torch.contiguous_format)
    for head, q_BGTD in enumerate(q_BNTD.unflatten(1, (H, N // H)).unbind(1)):
        pos_B1S = pos_BHS[:, head, None]
        empty_B1S1 = (pos_B1S < 0)[..., None]
        k_B1SD, v_B1SD = (x[:, head, None].masked_fill(empty_B1S1, 0.0) for x in (k_BHSD, v_BHSD))
        for start in range(0, T, _QUERY_BLOCK):
            rows = slice(start, start + _QUERY_BLOCK)
            position_Bt1 = position_BT[:, rows, None]
            seen_BtS = (pos_B1S >= 0) & (pos_B1S <= position_Bt1)
            if window:
                seen_BtS &= pos_B1S > position_Bt1 - window
            seen_B1tS = seen_BtS[:, None]
            o_BGtD = F.scaled_dot_product_attention(
                q_BGTD[:, :, rows], k_B1SD, v_B1SD, attn_mask=seen_B1tS, enable_gqa=N != H
            )
            o_BTND.unflatten(2, (H, -1))[:, rows, head] = o_BGtD.transpose(1, 2)
            if lse:
                score_BGtS = q_BGTD[:, :, rows].float() * D**-0.5 @ k_B1SD.float().transpose(-1, -2)
                lse_BGt = score_BGtS.masked_fill_(~seen_B1tS, float("-inf")).logsumexp(-1)
                lse_BTN.unflatten(2, (H, -1))[:, rows, head] = lse_BGt.transpose(1, 2)
    return o_BTND, lse_BTN


def _is_plain(pos_BHS: Tensor, position_BT: Tensor) -> bool:
    """Whether every row is its own queries' tokens in order of position, with empty places at its end only."""
    if pos_BHS.stride(1) == 0:  # the same for all heads
        pos_BHS = pos_BHS[:, :1]
    filled_BHS = pos_BHS >= 0
    in_place = (pos_BHS == position_BT[:, None]) | ~filled_BHS
    at_end = filled_BHS[..., 1:] <= filled_BHS[..., :-1]
    one_by_one = position_BT[:, 1:] - position_BT[:, :-1] == 1
    return bool(in_place.all() and at_end.all() and one_by_one.all())


@jit
def _kernel(  # type: ignore[no-untyped-def]
    q, k, v, pos, position, o, lse, T, S, window, scale,
    stride_qb, stride_qt, stride_qn, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_pb, stride_ph, stride_tb,
    LSE: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per block of queries of one KV head: rows are (T, G), G fastest, so a key serves its whole group."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries see most, so their programs start first
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q += row * stride_qb + head * G * stride_qn
    k += row * stride_kb + head * stride_kh
    v += row * stride_vb + head * stride_vh
    pos += row * stride_pb + head * stride_ph
    d = tl.arange(0, BLOCK_D)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    t, member = (r // G).to(tl.int64), r % G
    inside_R = r < T * G
    inside_RD = inside_R[:, None] & (d < D)[None, :]
    position_R = tl.load(position + row * stride_tb + t, mask=inside_R, other=-1)
    q_RD = tl.load(q + t[:, None] * stride_qt + member[:, None] * stride_qn + d[None, :], mask=inside_RD, other=0.0)
    if UPCAST:
        q_RD = q_RD.to(tl.float32)

    # Empty places count as newer than any query. The first and the last place that is seen bound what is looked at.
    newer_than_all = 2**31 - 1
    newest = tl.max(position_R)
    oldest = tl.min(tl.where(inside_R, position_R, newest)) - window + 1
    first, end = S, 0
    for start in range(0, S, BLOCK_P):
        s = start + tl.arange(0, BLOCK_P)
        pos_P = tl.load(pos + s, mask=s < S, other=-1)
        seen_P = (pos_P >= 0) & (pos_P <= newest) & (pos_P >= oldest)
        first = tl.minimum(first, tl.min(tl.where(seen_P, s, S)))
        end = tl.maximum(end, tl.max(tl.where(seen_P, s + 1, 0)))

    most_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    sum_R = tl.zeros((BLOCK_R,), tl.float32)
    o_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(first // BLOCK_S * BLOCK_S, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        pos_S = tl.load(pos + s, mask=s < S, other=-1)
        pos_S = tl.where(pos_S >= 0, pos_S, newer_than_all)
        read_SD = ((pos_S <= newest) & (pos_S >= oldest))[:, None] & (d < D)[None, :]
        at_S1 = s.to(tl.int64)[:, None]
        k_SD = tl.load(k + at_S1 * stride_ks + d[None, :], mask=read_SD, other=0.0)
        v_SD = tl.load(v + at_S1 * stride_vs + d[None, :], mask=read_SD, other=0.0)
        if UPCAST:
            k_SD, v_SD = k_SD.to(tl.float32), v_SD.to(tl.float32)
        age_RS = position_R[:, None] - pos_S[None, :]
        score_RS = tl.dot(q_RD, tl.trans(k_SD), input_precision="ieee") * scale
        # As unsigned numbers, the ages of keys that are newer than the query are above any window.
        score_RS = tl.where(age_RS.to(tl.uint32) < window, score_RS, float("-inf"))
        more_R = tl.maximum(most_R, tl.max(score_RS, 1))
        finite_R = tl.where(more_R == float("-inf"), 0.0, more_R)
        weight_RS = tl.exp2(score_RS - finite_R[:, None])
        fade_R = tl.exp2(most_R - finite_R)
        sum_R = sum_R * fade_R + tl.sum(weight_RS, 1)
        o_RD = tl.dot(weight_RS.to(v_SD.dtype), v_SD, o_RD * fade_R[:, None], input_precision="ieee")
        most_R = more_R

    out_R = (row * T + t) * tl.num_programs(1) * G + head * G + member
    o_RD /= tl.where(sum_R > 0, sum_R, 1.0)[:, None]
    tl.store(o + out_R[:, None] * D + d[None, :], o_RD.to(o.dtype.element_ty), mask=inside_RD)
    if LSE:
        ln_2: tl.constexpr = 0.6931471805599453
        tl.store(lse + out_R, (most_R + tl.log2(sum_R)) * ln_2, mask=inside_R)


def launch(
    q_BTND: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BT: Tensor,
    window: int,
    lse: bool,
) -> tuple[Tensor, Tensor]:
    """The Triton form of `reference`."""
    B, T, N, D = q_BTND.shape
    H, S = k_BHSD.shape[1:3]
    if D > 256:
        raise ValueError(f"k_BHSD has head dimension {D}, on a GPU it must be at most 256")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTND, k_BHSD, v_BHSD))
    pos, position = (x if x.stride(-1) == 1 else x.contiguous() for x in (pos_BHS, position_BT))
    o_BTND = torch.empty_like(q_BTND, memory_format=torch.contiguous_format)
    lse_BTN = q.new_empty((B, T, N) if lse else 0, dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(D))
    most_rows = 64 if block_d > 128 or q.element_size() > 2 else 128  # as many as registers hold
    rows = min(max(16, triton.next_power_of_2(T * N // H)), most_rows)
    _kernel[(triton.cdiv(T * N // H, rows), H, B)](
        q, k, v, pos, position, o_BTND, lse_BTN, T, S, window or 2**31 - 1, D**-0.5 * _LOG2_E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *pos.stride()[:2], position.stride(0),
        LSE=lse, G=N // H, D=D, BLOCK_R=rows, BLOCK_S=32, BLOCK_P=2048, BLOCK_D=block_d,
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16, num_warps=8 if rows >= 64 else 4, num_stages=2,
    )  # fmt: skip
    return o_BTND, lse_BTN


def fake(
    q_BTND: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BT: Tensor,
    window: int,
    lse: bool,
) -> tuple[Tensor, Tensor]:
    """Empty results."""
    o_BTND = torch.empty_like(q_BTND, memory_format=torch.contiguous_format)
    return o_BTND, q_BTND.new_empty(q_BTND.shape[:3] if lse else 0, dtype=torch.float32)


def cases() -> Iterator[Case]:
    """Chunks of awkward sizes after pasts of awkward sizes."""
    yield Case(name="one token", make=partial(_arguments, T=1, past=0))
    yield Case(name="causal, D=80", make=partial(_arguments, T=63, past=0, D=80, B=3))
    yield Case(name="causal, G=1, logarithms", make=partial(_arguments, T=40, past=0, G=1, B=2, lse=True))
    yield Case(name="causal, sliding, D=256", make=partial(_arguments, T=65, past=0, D=256, H=1, window=7, lse=True))
    yield Case(name="one token, past of 1000", make=partial(_arguments, T=1, past=1000, D=128, lse=True))
    yield Case(name="G=1, past of 64", make=partial(_arguments, T=64, past=64, G=1, lse=True))
    yield Case(name="G=8, D=96, 3 rows", make=partial(_arguments, T=5, past=65, G=8, D=96, B=3, lse=True))
    yield Case(name="G=3, sliding past", make=partial(_arguments, T=20, past=300, G=3, D=16, window=50))
    yield Case(name="past of 2100", make=partial(_arguments, T=9, past=2100, G=1, D=16, window=1500))
    yield Case(name="no past, holes", make=partial(_arguments, T=40, past=0, D=16, holes=True))
    yield Case(name="no past, gaps", make=partial(_arguments, T=9, past=0, D=16, window=12, gap=3))
    yield Case(name="no past, queries that see nothing", make=partial(_arguments, T=9, past=0, D=16, apart=100))
    yield Case(name="queries that see nothing", make=partial(_arguments, T=70, past=90, H=1, apart=100, lse=True))


def _arguments(
    dtype: torch.dtype,
    *,
    T: int,
    past: int,
    B: int = 1,
    H: int = 2,
    G: int = 4,
    D: int = 64,
    window: int = 0,
    apart: int = 0,
    holes: bool = False,
    gap: int = 1,
    lse: bool = False,
) -> Arguments:
    """The first KV head's past is full, others are ragged, the last row's last one empty; empty places hold NaN.

    With `apart`, all keys are that much newer. With a past, the last fifth of the last row's queries is padding. With
    `holes`, every third key after the first is missing; positions are `gap` apart.
    """
    S = past + T
    pos = torch.arange(S, dtype=torch.int32).expand(B, H, S).clone()
    if holes:
        pos[..., 1::3] = -1
    if past:
        missing = torch.rand(B, H - 1, past, generator=torch.Generator().manual_seed(S)) < 0.3
        pos[:, 1:, :past][missing] = -1
        pos[B - 1, H - 1, : past // 2] = -1
        pos[B - 1, :, S - T // 5 :] = -1
    pos[pos >= 0] += apart
    k, v = (random(B, S, H, D, seed=seed, dtype=dtype).transpose(1, 2) for seed in (1, 2))
    for x in (k, v):
        x[pos < 0] = float("nan")
    position = torch.arange(past, S, dtype=torch.int32).expand(B, T)
    pos, position = pos.where(pos < 0, gap * pos), gap * position
    return random(B, T, H * G, D, dtype=dtype), k, v, pos, position, window, lse


def bytes_moved(
    q_BTND: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BT: Tensor,
    window: int,
    lse: bool,
) -> int:
    """Queries in, results out, positions, and every key and value that some query sees."""
    newest_B11 = position_BT.amax(1)[:, None, None]
    oldest_B11 = position_BT.amin(1)[:, None, None] - window + 1 if window else 0
    seen = int(((pos_BHS >= 0) & (pos_BHS <= newest_B11) & (pos_BHS >= oldest_B11)).sum())
    results = q_BTND.nbytes + (4 * q_BTND.shape[:3].numel() if lse else 0)
    tables = 4 * (pos_BHS.numel() + position_BT.numel())
    return q_BTND.nbytes + results + tables + 2 * seen * k_BHSD.shape[3] * k_BHSD.element_size()


def flops(
    q_BTND: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BT: Tensor,
    window: int,
    lse: bool,
) -> int:
    """Two products for every pair of a query and a key that it sees."""
    H = pos_BHS.shape[1]
    order_BHS = pos_BHS.where(pos_BHS >= 0, 2**31 - 1).sort(-1).values
    position_BHT = position_BT[:, None].expand(-1, H, -1)
    pairs = torch.searchsorted(order_BHS, position_BHT.contiguous(), right=True).sum()
    if window:
        pairs -= torch.searchsorted(order_BHS, position_BHT - window, right=True).sum()
    return 4 * q_BTND.shape[2] // H * q_BTND.shape[3] * int(pairs)


def sized(work: Workload) -> Arguments:
    """A chunk of 1024 tokens after a past of `kept`."""
    B, T, S = work.batch, 1024, work.kept + 1024
    q = torch.empty(B, T, work.heads, work.head_dim, dtype=work.dtype, device="meta")
    k, v = (q.new_empty(B, S, work.kv_heads, work.head_dim).transpose(1, 2) for _ in range(2))
    position = torch.arange(S, dtype=torch.int32)
    return q, k, v, position.expand(B, work.kv_heads, S), position[work.kept :].expand(B, T), 0, False


KERNEL = register(
    __name__,
    "(Tensor q_BTND, Tensor k_BHSD, Tensor v_BHSD, Tensor pos_BHS, Tensor position_BT, int window, bool lse) "
    "-> (Tensor, Tensor)",
)
