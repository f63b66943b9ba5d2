"""How much attention the last prompt tokens pay to each stored token."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import INTEGERS, MOST_SLOTS, check, check_groups
from kernels.language import INTERPRETED, jit, tl, triton
from kernels.ragged_prefill import ragged_prefill_lse
from kernels.registry import Arguments, Case, Workload, register, serve
from kernels.testing import random

ROWS = ("mean", "max", "variance", "entropy")
"""How weights are reduced over queries; the operator takes the number."""
_ROWS_MAX, _ROWS_VARIANCE, _ROWS_ENTROPY = 1, 2, 3


def window_scores(
    q_BWND: Tensor,
    k_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BW: Tensor,
    *,
    rows: str,
    group: str,
    ahead: int,
    behind: int,
    protected_BHS: Tensor,
    window: int | None = None,
    lse_BWN: Tensor | None = None,
) -> Tensor:
    """Attention weights of W observing queries, reduced to one score per token and KV head, spread over neighbours.

    The weights of a query head are reduced over its queries, then over the query heads that share a KV head. Protected
    tokens count as 0 from there on. A token's score is then the largest found from `ahead` tokens before it to `behind`
    tokens after it. Keys at empty places are not read; a query that sees no key pays no attention.

    Args:
        q_BWND: queries of the observation window, after RoPE.
        k_BHSD: stored keys, after RoPE, in order of position, in the queries' dtype.
        pos_BHS: int32 absolute positions of the keys; -1 marks an empty place.
        position_BW: int32 absolute positions of the queries; -1 marks one that does not exist, which is not counted.
        rows: "mean" or "max" over the window's queries, their unbiased "variance", or "entropy": -A ln A of the weights
            A, summed.
        group: "mean" or "max" over the query heads of a KV head.
        ahead: tokens after a hot one that share its score, >= 0.
        behind: tokens before a hot one that share its score, >= 0.
        protected_BHS: bool; tokens that are kept anyway, whose scores must not spread.
        window: the model's sliding window in tokens, >= 1, or None.
        lse_BWN: fp32, of each query the natural logarithm of the sum of exponentials of its scores, as
            `ragged_prefill_lse` gives it for the same keys; None computes it, which takes about as long as the rest.

    Returns:
        (B, H, S) fp32.

    Raises:
        ValueError: `rows` or `group` is unknown; a number is too small; no query; a shape, dtype or device does not
            fit; on a GPU, a head dimension above 256.

    Source:
        Li et al., SnapKV, 2024, section 4 (mean up to a constant: published code sums).

    Example:
        >>> q, k, pos = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 2, 4), torch.tensor([[[0, 1]]], dtype=torch.int32)
        >>> how = {"rows": "mean", "group": "mean", "ahead": 1, "behind": 0}
        >>> window_scores(q, k, pos, pos[:, 0, 1:], **how, protected_BHS=pos < 0)
        tensor([[[0.5000, 0.5000]]])
    """
    for name, way, ways in (("rows", rows, ROWS), ("group", group, ROWS[:2])):
        if way not in ways:
            raise ValueError(f"{name} must be one of {', '.join(ways)}, not {way!r}")
    for name, number, least in (("ahead", ahead, 0), ("behind", behind, 0), ("window", window, 1)):
        if number is not None and number < least:
            raise ValueError(f"{name} is {number}, it must be at least {least}")
    check("q_BWND", q_BWND, shape=(None,) * 4)
    B, W, N, D = q_BWND.shape
    if not W:
        raise ValueError("q_BWND has no queries: let at least one observe")
    check("k_BHSD", k_BHSD, shape=(B, None, None, D), dtype=[q_BWND.dtype], like=q_BWND)
    H, S = k_BHSD.shape[1:3]
    check_groups("q_BWND", N, "k_BHSD", H)
    check("pos_BHS", pos_BHS, shape=(B, H, S), dtype=INTEGERS, like=q_BWND)
    check("position_BW", position_BW, shape=(B, W), dtype=INTEGERS, like=q_BWND)
    check("protected_BHS", protected_BHS, shape=(B, H, S), dtype=[torch.bool], like=q_BWND)
    if lse_BWN is not None:
        check("lse_BWN", lse_BWN, shape=(B, W, N), dtype=[torch.float32], like=q_BWND)
    form = torch.ops.headkv.window_scores if serve() else reference
    score_BHS: Tensor = form(
        q_BWND,
        k_BHSD,
        pos_BHS,
        position_BW,
        protected_BHS,
        ROWS.index(rows),
        group == "max",
        min(ahead, S),
        min(behind, S),
        min(window or 0, MOST_SLOTS),
        lse_BWN,
    )
    return score_BHS


def reference(
    q_BWND: Tensor,
    k_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BW: Tensor,
    protected_BHS: Tensor,
    rows: int,
    group_max: bool,
    ahead: int,
    behind: int,
    window: int,
    lse_BWN: Tensor | None,
) -> Tensor:
    """What `window_scores` computes, one KV head at a time."""
    queries_B11 = (position_BW >= 0).sum(1)[:, None, None]
    score_BHS = torch.empty(k_BHSD.shape[:3], dtype=torch.float32, device=q_BWND.device)
    for head, weight_BGWS in enumerate(_weights(q_BWND, k_BHSD, pos_BHS, position_BW, window, lse_BWN)):
        if rows == _ROWS_MAX:
            of_head_BGS = weight_BGWS.amax(2)
        elif rows == _ROWS_VARIANCE:
            apart_BGS = weight_BGWS.square().sum(2) - weight_BGWS.sum(2).square() / queries_B11.clamp(min=1)
            of_head_BGS = apart_BGS.clamp(min=0) / (queries_B11 - 1).clamp(min=1)
        elif rows == _ROWS_ENTROPY:
            of_head_BGS = torch.special.entr(weight_BGWS).sum(2)
        else:
            of_head_BGS = weight_BGWS.sum(2) / queries_B11.clamp(min=1)
        score_BHS[:, head] = of_head_BGS.amax(1) if group_max else of_head_BGS.mean(1)
    padded = F.pad(score_BHS.masked_fill_(protected_BHS, 0.0), (ahead, behind))
    return F.max_pool1d(padded, ahead + 1 + behind, stride=1)


def _weights(
    q_BWND: Tensor, k_BHSD: Tensor, pos_BHS: Tensor, position_BW: Tensor, window: int, lse_BWN: Tensor | None
) -> Iterator[Tensor]:
    """(B, G, W, S) fp32 weights of one KV head after the other; a query that sees no key has weights of 0."""
    H = k_BHSD.shape[1]
    same_for_all = pos_BHS.stride(1) == 0  # one mask, then
    for head in range(H):
        if head == 0 or not same_for_all:
            pos_B1S = pos_BHS[:, head, None]
            seen_BWS = (pos_B1S >= 0) & (pos_B1S <= position_BW[..., None])
            if window:
                seen_BWS &= pos_B1S > position_BW[..., None] - window
            hidden_B1WS = ~seen_BWS[:, None]
        q_BGWD = q_BWND.unflatten(2, (H, -1))[:, :, head].transpose(1, 2).float() * k_BHSD.shape[3] ** -0.5
        logit_BXS = q_BGWD.flatten(1, 2) @ k_BHSD[:, head].float().transpose(-1, -2)  # keys are read once for X = G W
        logit_BGWS = logit_BXS.unflatten(1, q_BGWD.shape[1:3]).masked_fill_(hidden_B1WS, float("-inf"))
        if lse_BWN is None:
            weight_BGWS = logit_BGWS.softmax(-1)
        else:
            lse_BGW = lse_BWN.unflatten(2, (H, -1))[:, :, head].transpose(1, 2)
            weight_BGWS = logit_BGWS.sub_(lse_BGW[..., None]).exp_()
        yield weight_BGWS.masked_fill_(hidden_B1WS, 0.0)


@jit
def _keys(k, pos, position, s, W, S, window, stride_ks, D: tl.constexpr, ALL_W: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Positions of a tile's places, the keys there that some query may see (no other is read), and how many queries."""
    w = tl.arange(0, ALL_W)
    position_W = tl.load(position + w, mask=w < W, other=-1)
    newest = tl.max(position_W)
    oldest = tl.min(tl.where(position_W >= 0, position_W, newest)) - window + 1
    pos_S = tl.load(pos + s, mask=s < S, other=-1)
    read = (pos_S >= 0) & (pos_S <= newest) & (pos_S >= oldest)
    d = tl.arange(0, BLOCK_D)
    at = s.to(tl.int64)[:, None] * stride_ks + d[None, :]
    k_SD = tl.load(k + at, mask=read[:, None] & (d < D)[None, :], other=0.0)
    newer_than_all = 2**31 - 1  # where places are empty, so that no query sees them
    return tl.where(pos_S >= 0, pos_S, newer_than_all), k_SD, tl.sum((position_W >= 0).to(tl.int32))


@jit
def _logits(  # type: ignore[no-untyped-def]
    q,
    position,
    k_SD,
    pos_S,
    w,
    W,
    window,
    scale,
    stride_qw,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scaled products of some queries of one head with a tile's keys; -inf where a query does not see a key."""
    position_W = tl.load(position + w, mask=w < W, other=-1)
    d = tl.arange(0, BLOCK_D)
    at = w.to(tl.int64)[:, None] * stride_qw + d[None, :]
    q_WD = tl.load(q + at, mask=(w < W)[:, None] & (d < D)[None, :], other=0.0)
    age_SW = position_W[None, :] - pos_S[:, None]
    if UPCAST:
        q_WD, k_SD = q_WD.to(tl.float32), k_SD.to(tl.float32)
    logit_SW = tl.dot(k_SD, tl.trans(q_WD), input_precision="ieee") * scale
    # As unsigned numbers, the ages of keys that are newer than the query are above any window.
    return tl.where(age_SW.to(tl.uint32) < window, logit_SW, float("-inf"))


@jit
def _lse_of_tile(  # type: ignore[no-untyped-def]
    q, k, pos, position, lse, W, S, window, scale, G,
    stride_qb, stride_qw, stride_qn, stride_kb, stride_kh, stride_ks, stride_pb, stride_ph, stride_tb,
    D: tl.constexpr, ALL_W: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys of one KV head: the LSE over the tile, of every query of the head's group."""
    tile, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q += row * stride_qb + head * G * stride_qn
    position += row * stride_tb
    lse += (row * tl.num_programs(1) + head) * G * W * tl.num_programs(0) + tile
    s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    k += row * stride_kb + head * stride_kh
    pos += row * stride_pb + head * stride_ph
    pos_S, k_SD, _ = _keys(k, pos, position, s, W, S, window, stride_ks, D, ALL_W, BLOCK_D)
    for member in range(G):
        for start in range(0, W, BLOCK_W):
            w = start + tl.arange(0, BLOCK_W)
            logit_SW = _logits(
                q + member * stride_qn, position, k_SD, pos_S, w, W, window, scale, stride_qw, D, BLOCK_D, UPCAST
            )
            most_W = tl.max(logit_SW, 0)
            most_W = tl.where(most_W == float("-inf"), 0.0, most_W)
            lse_W = most_W + tl.log(tl.sum(tl.exp(logit_SW - most_W[None, :]), 0))
            tl.store(lse + (member * W + w).to(tl.int64) * tl.num_programs(0), lse_W, mask=w < W)


@jit
def _merge(part, lse, rows, tiles, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per few queries: the LSE over all tiles, in their order."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    most_R = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    sum_R = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (r < rows)[:, None] & (t < tiles)[None, :]
        part_RT = tl.load(part + r[:, None] * tiles + t[None, :], mask=inside, other=float("-inf"))
        more_R = tl.maximum(most_R, tl.max(part_RT, 1))
        finite_R = tl.where(more_R == float("-inf"), 0.0, more_R)
        sum_R = sum_R * tl.exp(most_R - finite_R) + tl.sum(tl.exp(part_RT - finite_R[:, None]), 1)
        most_R = more_R
    tl.store(lse + r, most_R + tl.log(sum_R), mask=r < rows)


@jit
def _scores_of_tile(  # type: ignore[no-untyped-def]
    q, k, pos, position, protected, lse, score, W, S, window, scale, G,
    stride_qb, stride_qw, stride_qn, stride_kb, stride_kh, stride_ks, stride_pb, stride_ph, stride_tb,
    stride_gb, stride_gh, stride_gs,
    ROWS: tl.constexpr, GROUP_MAX: tl.constexpr, D: tl.constexpr, ALL_W: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys of one KV head: the weights of the head's group on them, reduced."""
    tile, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    q += row * stride_qb + head * G * stride_qn
    position += row * stride_tb
    head_of_all = row * tl.num_programs(1) + head
    s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    k += row * stride_kb + head * stride_kh
    pos += row * stride_pb + head * stride_ph
    pos_S, k_SD, queries = _keys(k, pos, position, s, W, S, window, stride_ks, D, ALL_W, BLOCK_D)
    at = s.to(tl.int64) * stride_gs
    is_protected_S = tl.load(protected + row * stride_gb + head * stride_gh + at, mask=s < S, other=0)
    of_group_S = tl.zeros((BLOCK_S,), tl.float32)
    for member in range(G):
        of_head_S = tl.zeros((BLOCK_S,), tl.float32)
        squares_S = tl.zeros((BLOCK_S,), tl.float32)
        for start in range(0, W, BLOCK_W):
            w = start + tl.arange(0, BLOCK_W)
            logit_SW = _logits(
                q + member * stride_qn, position, k_SD, pos_S, w, W, window, scale, stride_qw, D, BLOCK_D, UPCAST
            )
            lse_W = tl.load(lse + (head_of_all * G + member) * W + w, mask=w < W, other=0.0)
            # Whatever the LSE of a query that does not exist or sees nothing is, its weights are 0.
            weight_SW = tl.where(logit_SW == float("-inf"), 0.0, tl.exp(logit_SW - lse_W[None, :]))
            if ROWS == 1:
                of_head_S = tl.maximum(of_head_S, tl.max(weight_SW, 1))
            elif ROWS == 3:
                of_head_S += tl.sum(tl.where(weight_SW > 0, weight_SW * (lse_W[None, :] - logit_SW), 0.0), 1)
            else:
                of_head_S += tl.sum(weight_SW, 1)
                if ROWS == 2:
                    squares_S += tl.sum(weight_SW * weight_SW, 1)
        if ROWS == 2:
            apart_S = squares_S - of_head_S * of_head_S / tl.maximum(queries, 1)
            of_head_S = tl.maximum(apart_S, 0.0) / tl.maximum(queries - 1, 1)
        if GROUP_MAX:
            of_group_S = tl.maximum(of_group_S, of_head_S)
        else:
            of_group_S += of_head_S
    if ROWS == 0:
        of_group_S /= tl.maximum(queries, 1)
    if not GROUP_MAX:
        of_group_S /= G
    tl.store(score + head_of_all * S + s, tl.where(is_protected_S, 0.0, of_group_S), mask=s < S)


@jit
def _spread(score, spread, S, ahead, behind, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per piece of one KV head's scores: the largest from `ahead` before each to `behind` after it."""
    score += tl.program_id(1).to(tl.int64) * S
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    most_S = tl.zeros((BLOCK,), tl.float32)
    for shift in range(-ahead, behind + 1):
        near = s + shift
        most_S = tl.maximum(most_S, tl.load(score + near, mask=(near >= 0) & (near < S), other=0.0))
    tl.store(spread + tl.program_id(1).to(tl.int64) * S + s, most_S, mask=s < S)


def launch(
    q_BWND: Tensor,
    k_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BW: Tensor,
    protected_BHS: Tensor,
    rows: int,
    group_max: bool,
    ahead: int,
    behind: int,
    window: int,
    lse_BWN: Tensor | None,
) -> Tensor:
    """The Triton form of `reference`: keys are read once for the LSE of each query, and once for the weights."""
    B, W, N, D = q_BWND.shape
    H, S = k_BHSD.shape[1:3]
    if D > 256:
        raise ValueError(f"k_BHSD has head dimension {D}, on a GPU it must be at most 256")
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BWND, k_BHSD))
    pos, position = (x if x.stride(-1) == 1 else x.contiguous() for x in (pos_BHS, position_BW))
    block_d = max(16, triton.next_power_of_2(D))
    all_w = triton.next_power_of_2(W)
    block_s = (16 << 10) // (max(block_d, 128) * q.element_size())  # 16 KiB: more would spill
    tiles = triton.cdiv(S, block_s)
    inputs = (W, S, window or 2**31 - 1, D**-0.5, N // H)
    strides = (*q.stride()[:3], *k.stride()[:3], *pos.stride()[:2], position.stride(0))
    sizes = {
        "D": D, "ALL_W": all_w, "BLOCK_W": min(max(all_w, 16), 64), "BLOCK_S": block_s, "BLOCK_D": block_d,
        "UPCAST": INTERPRETED and q.dtype == torch.bfloat16, "num_stages": 1,
    }  # fmt: skip
    if lse_BWN is not None:
        lse = lse_BWN.transpose(1, 2).contiguous()
    else:
        lse = q.new_empty((tiles, B * N * W), dtype=torch.float32)
        _lse_of_tile[(tiles, H, B)](q, k, pos, position, lse, *inputs, *strides, **sizes)
        if tiles > 1:
            part, lse = lse, lse.new_empty(B * N * W)
            _merge[(triton.cdiv(B * N * W, 8),)](part, lse, B * N * W, tiles, BLOCK_R=8, BLOCK_T=64)
    score_BHS = lse.new_empty(B, H, S)
    _scores_of_tile[(tiles, H, B)](
        q, k, pos, position, protected_BHS, lse, score_BHS, *inputs, *strides, *protected_BHS.stride(),
        ROWS=rows, GROUP_MAX=group_max, **sizes,
    )  # fmt: skip
    if not ahead + behind:
        return score_BHS
    spread_BHS = torch.empty_like(score_BHS)
    _spread[(triton.cdiv(S, 1024), B * H)](score_BHS, spread_BHS, S, ahead, behind, BLOCK=1024)
    return spread_BHS


def fake(
    q_BWND: Tensor,
    k_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BW: Tensor,
    protected_BHS: Tensor,
    rows: int,
    group_max: bool,
    ahead: int,
    behind: int,
    window: int,
    lse_BWN: Tensor | None,
) -> Tensor:
    """An empty result."""
    return torch.empty(k_BHSD.shape[:3], dtype=torch.float32, device=k_BHSD.device)


def cases() -> Iterator[Case]:
    """Observation windows over awkward numbers of tokens, with holes."""
    yield Case(name="one token", make=partial(_arguments, S=1, W=1))
    yield Case(name="S=63, D=80, no neighbours", make=partial(_arguments, S=63, D=80, W=4, ahead=0, behind=0))
    yield Case(name="S=64, G=8, means", make=partial(_arguments, S=64, G=8, W=8))
    yield Case(name="S=65, D=96, maxima", make=partial(_arguments, S=65, D=96, W=32, rows="max", group_max=True))
    yield Case(name="S=1000, G=1, D=128", make=partial(_arguments, S=1000, G=1, D=128, W=8))
    yield Case(name="S=4200", make=partial(_arguments, S=4200, G=1, H=1, D=16, W=2))
    yield Case(name="3 rows, maximum of means", make=partial(_arguments, B=3, S=70, D=16, W=8, group_max=True))
    yield Case(name="D=256, sliding", make=partial(_arguments, S=300, D=256, G=1, W=8, rows="max", window=100))
    yield Case(name="more than 64 queries", make=partial(_arguments, S=200, W=70, H=1))
    yield Case(name="variance", make=partial(_arguments, B=3, S=300, W=20, rows="variance"))
    yield Case(name="variance of one query", make=partial(_arguments, S=40, W=1, rows="variance", ahead=0, behind=0))
    yield Case(name="entropy, D=128", make=partial(_arguments, B=2, S=200, D=128, W=33, rows="entropy", window=90))
    yield Case(name="logarithms given", make=partial(_arguments, B=3, S=100, W=9, lse=True))
    yield Case(name="halo larger than all", make=partial(_arguments, S=20, W=3, ahead=40, behind=30, rows="max"))


def _arguments(
    dtype: torch.dtype,
    *,
    B: int = 1,
    S: int,
    W: int,
    H: int = 2,
    G: int = 4,
    D: int = 64,
    rows: str = "mean",
    group_max: bool = False,
    ahead: int = 3,
    behind: int = 2,
    window: int = 0,
    lse: bool = False,
) -> Arguments:
    """The first KV head holds everything, others have empty places with NaN; rows may have fewer than W queries."""
    g = torch.Generator().manual_seed(S)
    pos = torch.arange(S, dtype=torch.int32).expand(B, H, S).clone()
    pos[:, 1:][torch.rand(B, H - 1, S, generator=g) < 0.3] = -1
    pos[B - 1, H - 1, : S // 2] = -1
    k = random(B, S, H, D, seed=1, dtype=dtype).transpose(1, 2)
    k[pos < 0] = float("nan")
    position = torch.arange(S - W, S, dtype=torch.int32).expand(B, W).clone()
    position[B - 1, : W // 3] = -1
    q = random(B, W, H * G, D, dtype=dtype)
    how = ROWS.index(rows), group_max, ahead, behind, window
    return q, k, pos, position, pos >= S - 2, *how, _lse(q, k, pos, position, window) if lse else None


def _lse(q_BWND: Tensor, k_BHSD: Tensor, pos_BHS: Tensor, position_BW: Tensor, window: int) -> Tensor:
    """Of all queries; NaN for those that do not exist."""
    lse_BWN = ragged_prefill_lse(q_BWND, k_BHSD, k_BHSD, pos_BHS, position_BW, window or None)[1]
    return lse_BWN.masked_fill(position_BW[..., None] < 0, float("nan"))


def bytes_moved(
    q_BWND: Tensor,
    k_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BW: Tensor,
    protected_BHS: Tensor,
    rows: int,
    group_max: bool,
    ahead: int,
    behind: int,
    window: int,
    lse_BWN: Tensor | None,
) -> int:
    """Queries, every key that can be seen, positions and marks in; scores out."""
    seen = _seen(pos_BHS, position_BW, window)
    tables = pos_BHS.numel() * 4 + position_BW.numel() * 4 + protected_BHS.numel()
    return q_BWND.nbytes + seen * k_BHSD.shape[3] * k_BHSD.element_size() + tables + pos_BHS.numel() * 4


def flops(
    q_BWND: Tensor,
    k_BHSD: Tensor,
    pos_BHS: Tensor,
    position_BW: Tensor,
    protected_BHS: Tensor,
    rows: int,
    group_max: bool,
    ahead: int,
    behind: int,
    window: int,
    lse_BWN: Tensor | None,
) -> int:
    """One product of every query with every key that can be seen."""
    _, W, N, D = q_BWND.shape
    return 2 * W * N // k_BHSD.shape[1] * D * _seen(pos_BHS, position_BW, window)


def _seen(pos_BHS: Tensor, position_BW: Tensor, window: int) -> int:
    """Keys that some query sees, if queries stand next to each other."""
    newest_B11 = position_BW.amax(1)[:, None, None]
    oldest_B11 = position_BW.where(position_BW >= 0, newest_B11[..., 0]).amin(1)[:, None, None] - (window or 2**30)
    return int(((pos_BHS >= 0) & (pos_BHS <= newest_B11) & (pos_BHS > oldest_B11)).sum())


def sized(work: Workload) -> Arguments:
    """The last 32 tokens of a chunk look at all that is stored before it is compressed: 1024 new ones, and the past."""
    B, H, S = work.batch, work.kv_heads, work.kept + 1024
    q = torch.empty(B, 32, work.heads, work.head_dim, dtype=work.dtype, device="meta")
    k = torch.empty(B, S, H, work.head_dim, dtype=work.dtype, device="meta").transpose(1, 2)
    pos = torch.arange(S, dtype=torch.int32).expand(B, H, S)
    return q, k, pos, pos[:, 0, -32:], pos >= S - 32, 0, False, 3, 3, 0, None


KERNEL = register(
    __name__,
    "(Tensor q_BWND, Tensor k_BHSD, Tensor pos_BHS, Tensor position_BW, Tensor protected_BHS, int rows, "
    "bool group_max, int ahead, int behind, int window, Tensor? lse_BWN) -> Tensor",
)
