"""The C++ kernels: naive loops in float64, a row's bits in any company, what they must not touch, and their build."""

import ctypes
import itertools
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import decode_blocks, few_rows_linear, native, ragged_append, ragged_decode, rms_norm, rope, silu_mul
from kernels.few_rows_linear import few_rows_linear as product
from kernels.window_scores import cases as window_cases
from kernels.window_scores import window_scores
from layers import linear
from layers.attention import Attention
from layers.block import Block
from layers.cache.arena import ArenaCache
from layers.fused import FusedBlocks
from layers.linear import Linear
from layers.mlp import GatedMLP
from layers.plan import ArenaShape
from layers.quantize import quantize_rows, quantize_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 5, 16, 33, 63, 64, 65, 576, 1000]
LENGTHS = [0, 1, 63, 64, 65, 255, 256, 257, 1000]
NAN = float("nan")
L, LAYER = 3, torch.tensor([1])  # the layer in use is in the middle of the tables
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])


@pytest.fixture(scope="module", autouse=True)
def cpp():
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    native.load()


def random(*size, seed=0, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a, b):
    """Equal bit for bit; NaN equals NaN."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check(out, exact, plain):
    """Out is about as near to the exact numbers as plain PyTorch is in the same dtype."""
    assert out.dtype == plain.dtype and out.shape == exact.shape and out.isfinite().all()
    error, allowed = (torch.zeros(1) if not x.numel() else (x.double() - exact).abs().max() for x in (out, plain))
    allowed = 2 * allowed + (torch.finfo(out.dtype).eps / 2 + 1e-6) * exact.abs().max()
    assert error <= allowed, f"off by {error:.3g}, {allowed:.3g} allowed"


def fenced(x):
    """The same numbers, contiguous, with poison before and behind them in memory."""
    fence = torch.full((64,), 77 if x.dtype == torch.int8 else NAN).to(x.dtype)
    return torch.cat((fence, x.flatten(), fence))[64:-64].view(x.shape)


def with_threads(run):
    """What `run` gives with 1, 2 and 3 threads, if it gives the same bits."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    assert all(same(result, results[0]) for result in results)
    return results[0]


def linear_case(dtype, int8, rows, K, N, bias, seed=0):
    """Arguments of the kernel, the exact result, and that of plain PyTorch."""
    x, weight = random(rows, K, seed=seed, dtype=dtype), random(N, K, seed=seed + 1, dtype=dtype)
    bias, scale, used = random(N, seed=seed + 2, dtype=dtype) if bias else None, None, weight
    if int8:
        weight, scale = quantize_rows(weight)
        used = weight.double() * scale.double()[:, None]
    exact = F.linear(x.double(), used.double(), None if bias is None else bias.double())
    return (x, weight, bias, scale), exact, F.linear(x, used.to(dtype), bias)


@dtypes
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("K", WIDTHS)
def test_few_rows_linear_is_the_product(dtype, int8, K):
    for N, rows, bias in itertools.product((1, 5, 16, 33, 64, 65), (1, 2, 3, 4, 5, 6, 7, 8, 13), (False, True)):
        arguments, exact, plain = linear_case(dtype, int8, rows, K, N, bias, seed=rows)
        check(product(*arguments), exact, plain)
    for N in WIDTHS:
        arguments, exact, plain = linear_case(dtype, int8, 3, K, N, True)
        check(product(*arguments), exact, plain)


@dtypes
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("K", [1, 33, 64, 200])
def test_few_rows_linear_takes_any_shape_and_layout_of_x(dtype, int8, K):
    (x, *weights), exact, plain = linear_case(dtype, int8, 6, K, 7, True)
    expected = product(x, *weights)
    check(expected, exact, plain)
    for shape in ((6, 1), (1, 6), (2, 3), (6, 1, 1), (1, 2, 3)):
        assert same(product(x.view(*shape, K), *weights), expected.view(*shape, 7))
    assert same(product(x[2], *weights), expected[2])
    strided = {
        "columns apart": x.repeat_interleave(2, 1)[:, ::2],
        "transposed": x.t().contiguous().t(),
        "rows apart": x.repeat_interleave(3, 0)[::3],
        "part of a wider row": torch.cat((torch.full_like(x, NAN), x, torch.full_like(x, NAN)), 1)[:, K : 2 * K],
    }
    for layout, view in strided.items():
        assert same(product(view, *weights), expected), layout
    assert same(product(x[:1].expand(6, K), *weights), expected[:1].expand(6, 7))


@dtypes
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("K", WIDTHS)
def test_few_rows_linear_gives_a_row_the_same_bits_in_any_company(dtype, int8, K):
    (x, *weights), _, _ = linear_case(dtype, int8, 13, K, 33, True)
    together = product(x, *weights)
    for rows in range(1, 13):
        assert same(product(x[:rows], *weights), together[:rows])
    for row in range(13):
        assert same(product(x[row], *weights), together[row])
    order = torch.randperm(13, generator=torch.Generator().manual_seed(K))
    assert same(product(x[order], *weights), together[order])


@dtypes
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_threads_do_not_change_bits(dtype, int8):
    arguments, exact, plain = linear_case(dtype, int8, 5, 300, 501, True)
    check(with_threads(lambda: product(*arguments)), exact, plain)


@dtypes
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("K", [1, 5, 33, 65, 576])
def test_few_rows_linear_reads_and_leaves_nothing_else(dtype, int8, K):
    arguments, _, _ = linear_case(dtype, int8, 3, K, 33, True)
    expected = product(*arguments)
    assert same(product(*(argument if argument is None else fenced(argument) for argument in arguments)), expected)
    for _ in range(20):  # the allocator hands the same memory out again
        poison = torch.full((3, 33), NAN, dtype=dtype)
        del poison
        assert same(product(*arguments), expected)


@dtypes
@pytest.mark.parametrize("K", [5, 64, 65])
def test_what_is_not_finite_stays_where_it_belongs(dtype, K):
    for int8, rows in itertools.product((False, True), (1, 3, 4, 5, 8)):
        (x, weight, bias, scale), _, _ = linear_case(dtype, int8, rows, K, 6, True)
        clean = product(x, weight, bias, scale)
        for bad, column in itertools.product((NAN, float("inf"), -float("inf")), (0, K - 1)):
            dirty = x.clone()
            dirty[rows - 1, column] = bad
            out = product(dirty, weight, bias, scale)
            assert same(out[:-1], clean[:-1])
            touched = weight[:, column] != 0
            assert not out[-1, touched].isfinite().any() and out[-1, touched].isnan().all() == (bad != bad)
    weight = weight.to(dtype)
    clean = product(x, weight, bias)
    for n in range(6):
        dirty, others = weight.clone(), [i for i in range(6) if i != n]
        dirty[n] = NAN
        out = product(x, dirty, bias)
        assert out[:, n].isnan().all() and same(out[:, others], clean[:, others])


def row_case(op, dtype, B, T, size):
    """A function of rows, its arguments (the first of which is (B, T, …)), the exact result and plain PyTorch's."""
    x = random(B, T, 2 * size, seed=size, dtype=dtype)
    if op == "rms_norm":
        weight, wide = random(2 * size, seed=1, dtype=dtype), x.double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
        return rms_norm.rms_norm, (x, weight, 1e-5), exact, rms_norm.reference(x, weight, 1e-5)
    if op == "silu_mul":
        x = 5 * x
        gate, up = x.double().chunk(2, -1)
        return silu_mul.silu_mul, (x,), F.silu(gate) * up, silu_mul.reference(x)
    x, angle = random(B, T, 3, 2 * size, seed=size, dtype=dtype), 9 * random(B, T, size, seed=1)
    cos, sin = (angle.cos(), angle.sin())
    turn = torch.complex(cos.to(dtype).double(), sin.to(dtype).double())[:, :, None]
    turned = torch.complex(*x.double().chunk(2, -1)) * turn
    return rope.apply_rope, (x, cos, sin), torch.cat((turned.real, turned.imag), -1), rope.reference(x, cos, sin)


@dtypes
@pytest.mark.parametrize("op", ["rms_norm", "silu_mul", "rope"])
@torch.no_grad()
def test_work_on_rows_is_its_formula(dtype, op):
    for size, (B, T) in itertools.product((1, 5, 16, 33, 64, 289), ((1, 1), (3, 1), (1, 4), (2, 5))):
        function, (x, *rest), exact, plain = row_case(op, dtype, B, T, size)
        out = function(x, *rest)
        check(out, exact, plain)
        views = {
            "in a wider row": torch.cat((x * NAN, x, x * NAN), 2)[:, :, x.shape[2] : 2 * x.shape[2]],
            "rows apart": x.repeat_interleave(2, 1)[:, ::2],
            "the first of more rows": torch.cat((x, x * NAN), 1)[:, :T],
            "batch last": x.movedim(0, -1).contiguous().movedim(-1, 0),
            "elements apart": x.repeat_interleave(2, -1)[..., ::2],
        }
        for layout, view in views.items():
            assert same(function(view, *rest), out), layout
        for row, step in itertools.product(range(B), range(T)):
            own = [t[row : row + 1, step : step + 1] for t in rest] if op == "rope" else rest
            alone = function(x[row : row + 1, step : step + 1], *own)
            assert same(alone, out[row : row + 1, step : step + 1])
        dirty = x.clone()
        dirty[-1, -1] = NAN
        spoiled = function(dirty, *rest)
        assert spoiled[-1, -1].isnan().all() and same(spoiled.flatten(0, 1)[:-1], out.flatten(0, 1)[:-1])
    assert same(with_threads(lambda: function(x, *rest)), out)


def arena_of(lengths_BH, D, *, dtype=torch.float32, group=1, window=None, seed=0, spare=NAN):
    """A batch of ragged regions, out of order and with gaps between them; whatever is not in one holds `spare`.

    Every region has one more slot than its length; `slot` is that free one.
    """
    lengths = torch.tensor(lengths_BH)
    B, H = lengths.shape
    shuffle = torch.Generator().manual_seed(seed)
    slots = int((lengths + 4).sum(1).max()) + 5
    k, v = (torch.full((B, slots, D), spare, dtype=dtype) for _ in range(2))
    pos = torch.full((B, slots), 2**31 - 1, dtype=torch.int32)  # newer than any query: no window hides it
    offset, length, slot = (torch.full((B, L, H), 10**6, dtype=torch.int32) for _ in range(3))
    for row in range(B):
        at = 2
        for head in torch.randperm(H, generator=shuffle).tolist():
            count = int(lengths[row, head])
            k[row, at : at + count] = random(count, D, seed=seed + 7 * row + head, dtype=dtype)
            v[row, at : at + count] = random(count, D, seed=seed + 7 * row + head + 99, dtype=dtype)
            pos[row, at : at + count] = torch.randperm(1500, generator=shuffle)[:count].int()
            offset[row, LAYER, head], length[row, LAYER, head], slot[row, LAYER, head] = at, count, at + count
            at += count + 3
    position = 1500 + 5 * torch.arange(B, dtype=torch.int32)
    q = random(B, H * group, D, seed=seed + 1000, dtype=dtype)
    return types.SimpleNamespace(
        q=q, k=k, v=v, pos=pos, offset=offset, length=length, slot=slot, position=position, window=window, bias=None
    )


def rows_of(a, rows):
    tensors = {name: x[rows].contiguous() if isinstance(x, torch.Tensor) else x for name, x in vars(a).items()}
    return types.SimpleNamespace(**tensors)


MOST = 10**6  # slots of a region, however long: C++ looks at the tables


def decode_with_lse(a):
    tables = a.pos, a.offset, a.length, LAYER, a.position
    return ragged_decode.ragged_decode(a.q, a.k, a.v, *tables, a.window, most=MOST, bias=a.bias)


def decode(a):
    return decode_with_lse(a)[0]


def naive_decode(a, dtype):
    return naive_decode_with_lse(a, dtype)[0]


def naive_decode_with_lse(a, dtype):
    out, lse = torch.zeros(a.q.shape, dtype=dtype), torch.full(a.q.shape[:2], -float("inf"), dtype=dtype)
    group = a.q.shape[1] // a.offset.shape[2]
    for row, n in itertools.product(range(a.q.shape[0]), range(a.q.shape[1])):
        first, count = (int(table[row, LAYER, n // group]) for table in (a.offset, a.length))
        seen = [
            slot
            for slot, pos in enumerate(a.pos[row, first : first + count].tolist(), first)
            if (not a.window or pos > int(a.position[row]) - a.window)
            and (a.bias is None or a.bias[row, slot] > -float("inf"))
        ]
        if seen:
            score = a.k[row, seen].to(dtype) @ a.q[row, n].to(dtype) * a.q.shape[2] ** -0.5
            score += 0 if a.bias is None else a.bias[row, seen].to(dtype)
            out[row, n], lse[row, n] = score.softmax(0) @ a.v[row, seen].to(dtype), score.logsumexp(0)
    return out, lse


def check_decode(a):
    (out, lse), (exact, exact_lse) = decode_with_lse(a), naive_decode_with_lse(a, torch.float64)
    check(out, exact, naive_decode(a, torch.float32).to(a.q.dtype))
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    return out


@dtypes
@pytest.mark.parametrize("D", [4, 6, 64, 80, 96, 128, 256])
def test_ragged_decode_attends(dtype, D):
    for group, window in itertools.product((1, 3, 4, 5), (None, 700)):
        check_decode(arena_of([[65, 0, 7]], D, dtype=dtype, group=group, window=window, seed=group))
    check_decode(arena_of([[300, 1], [0, 64], [17, 257]], D, dtype=dtype, group=2))


@dtypes
@pytest.mark.parametrize("length", LENGTHS)
def test_ragged_decode_has_no_special_length(dtype, length):
    for D, group, window in itertools.product((6, 64), (1, 8), (None, 1000)):
        check_decode(arena_of([[length, 3]], D, dtype=dtype, group=group, window=window))


@dtypes
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 17])
def test_ragged_decode_takes_any_group(dtype, group):
    check_decode(arena_of([[9, 270], [31, 0], [256, 2]], 10, dtype=dtype, group=group))


@dtypes
@pytest.mark.parametrize("window", [None, 700])
def test_a_bias_makes_a_slot_stand_for_more_tokens_or_none(dtype, window):
    a = arena_of([[65, 300], [1, 0]], 64, dtype=dtype, group=5, window=window)
    a.bias = random(*a.pos.shape)
    a.bias[:, ::3] = -float("inf")
    out = check_decode(a)
    unseen = a.bias == -float("inf")
    a.k[unseen], a.v[unseen] = NAN, NAN
    assert same(decode(a), out)
    a.bias.fill_(-float("inf"))
    out, lse = decode_with_lse(a)
    assert (out == 0).all() and (lse == -float("inf")).all()


@dtypes
def test_a_head_that_sees_nothing_gives_zeros(dtype):
    a = arena_of([[0, 300, 5]], 6, dtype=dtype, group=3)
    a.window = 1
    assert (decode(a) == 0).all()
    a.window = None
    assert (decode(a)[:, :3] == 0).all() and (decode(a)[:, 3:] != 0).all()


@dtypes
@pytest.mark.parametrize("spoiled", ["k", "v"])
@pytest.mark.parametrize("length", [5, 64, 300])
def test_what_is_outside_the_window_does_not_count(dtype, spoiled, length):
    a = arena_of([[length, length]], 6, dtype=dtype, group=3, window=900)
    expected = check_decode(a)
    getattr(a, spoiled)[a.pos <= int(a.position) - 900] = NAN
    assert same(decode(a), expected)


@dtypes
def test_a_window_begins_where_it_should(dtype):
    for window in (1, 2, 100, 256, 257, 300, 301):
        a = arena_of([[300, 300]], 6, dtype=dtype, window=window)
        a.position[:] = 300
        a.pos[0, a.offset[0, 1, 0] :][:300] = torch.arange(1, 301)
        a.pos[0, a.offset[0, 1, 1] :][:300] = torch.arange(300, 0, -1)
        check_decode(a)
        assert (decode(a) != 0).all()


@dtypes
@pytest.mark.parametrize("D", [6, 33, 64, 80])
def test_memory_beyond_a_heads_length_does_not_count(dtype, D):
    lengths = [[64, 0, 257, 1], [3, 100, 0, 31]]
    for window in (None, 700):
        outs = [decode(arena_of(lengths, D, dtype=dtype, group=3, window=window, spare=s)) for s in (NAN, 0.0, -60000)]
        assert same(outs[0], outs[1]) and same(outs[0], outs[2])


@dtypes
@pytest.mark.parametrize("D", [6, 64, 80])
@pytest.mark.parametrize("window", [None, 700])
def test_ragged_decode_gives_a_row_the_same_bits_in_any_company(dtype, D, window):
    a = arena_of([[65, 300], [0, 64], [600, 1], [256, 17]], D, dtype=dtype, group=5, window=window)
    together = decode(a)
    for row in range(4):
        assert same(decode(rows_of(a, [row])), together[row : row + 1])
    for order in ([3, 2, 1, 0], [1, 3], [2, 2, 0, 1, 3, 3]):
        assert same(decode(rows_of(a, order)), together[order])
    assert same(with_threads(lambda: decode(a)), together)


@dtypes
def test_the_order_of_slots_changes_only_rounding(dtype):
    a = arena_of([[400, 90]], 64, dtype=dtype, group=3, window=1000)
    exact = check_decode(a).double()
    for head in range(2):
        first, count = int(a.offset[0, 1, head]), int(a.length[0, 1, head])
        order = first + torch.randperm(count, generator=torch.Generator().manual_seed(5))
        for tensor in (a.k, a.v, a.pos):
            tensor[0, first : first + count] = tensor[0, order]
    assert (check_decode(a).double() - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


@dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_scores(dtype, sign):
    a = arena_of([[300, 257]], 64, dtype=dtype, group=4)
    used = a.k.isfinite()
    for scale in (60.0, 0.0, 1e-3):
        a.q.fill_(60.0)
        a.k[used] = sign * scale  # equal scores, up to 60 · 60 · 64 / 8: the mean of the values
        check_decode(a)
    a.k[used] = (random(*a.k.shape, seed=4) * 60).to(dtype)[used]  # scores apart by tens of thousands: one slot wins
    check_decode(a)


def test_the_exponential_has_fp32s_precision():
    """Of two slots with scores -s and 0 the first weighs e^-s / (1 + e^-s)."""
    s = torch.cat((torch.linspace(0, 86.9, 8000), random(192).abs()))
    k = torch.stack((-s, torch.zeros_like(s)), 1).view(1, -1, 1)
    v, pos = torch.tensor([1.0, 0.0]).repeat(s.numel()).view(1, -1, 1), torch.zeros(1, k.shape[1], dtype=torch.int32)
    offset = torch.arange(0, k.shape[1], 2, dtype=torch.int32).view(1, 1, -1)
    tables = offset, torch.full_like(offset, 2), torch.tensor([0]), torch.zeros(1, dtype=torch.int32)
    out, _ = ragged_decode.ragged_decode(torch.ones(1, s.numel(), 1), k, v, pos, *tables, most=2)
    exact = torch.sigmoid(-s.double())
    assert ((out.flatten() - exact).abs() / exact).max() < 1e-6
    k = 1000 * k - (k < 0) * 88.0
    out, _ = ragged_decode.ragged_decode(torch.ones(1, s.numel(), 1), k, v, pos, *tables, most=2)
    assert (out.flatten()[1:8000] == 0).all()


@dtypes
def test_ragged_append_stores_views_and_leaves_the_rest(dtype):
    B, H, D, N = 4, 3, 6, 6
    a = arena_of([[5, 0, 9]] * B, D, dtype=dtype, seed=3)
    active = torch.tensor([True, False, True, True])
    layouts = {
        "a fused buffer": (random(B, N + 2 * H, D, dtype=dtype).split((N, H, H), 1)[1:]),
        "a step of a prompt": (random(B, 7, H, D, dtype=dtype)[:, 3], random(B, 7, H, D, seed=1, dtype=dtype)[:, 6]),
        "heads apart": (random(B, 2 * H, D, dtype=dtype)[:, ::2], random(H, B, D, dtype=dtype).transpose(0, 1)),
        "elements apart": (random(B, H, 2 * D, dtype=dtype)[..., 1::2], random(B, D, H, dtype=dtype).mT),
        "one for all rows": (
            random(1, H, D, dtype=dtype).expand(B, H, D),
            random(1, 1, D, dtype=dtype).expand(B, H, D),
        ),
    }
    for layout, (k, v) in layouts.items():
        arenas = [tuple(x.clone() for x in (a.k, a.v, a.pos)) for _ in range(2)]
        ragged_append.ragged_append(*arenas[0], a.slot[..., None], LAYER, k[:, None], v[:, None], a.position, active)
        for row, head in itertools.product((0, 2, 3), range(H)):
            slot = a.slot[row, 1, head]
            for tensor, new in zip(arenas[1], (k[row, head], v[row, head], a.position[row]), strict=True):
                tensor[row, slot] = new
        assert all(same(got, expected) for got, expected in zip(*arenas, strict=True)), layout


@dtypes
def test_ragged_append_stores_what_is_not_finite(dtype):
    a = arena_of([[5, 1]], 4, dtype=dtype)
    k = torch.tensor([0.0, -0.0, float("inf"), -float("inf")], dtype=dtype).repeat(1, 1, 2, 1)
    active = torch.tensor([True])
    ragged_append.ragged_append(a.k, a.v, a.pos, a.slot[..., None], LAYER, k, k * NAN, a.position, active)
    slot = a.slot[0, 1].long()
    assert same(a.k[:, slot], k[0]) and a.v[0, slot].isnan().all()


def block_case(
    *,
    dtype=torch.float32,
    B=3,
    E=20,
    D=6,
    H=2,
    group=3,
    width=33,
    biases=False,
    qk_norm=False,
    int8=False,
    window=None,
    reads=False,
    seed=0,
):
    """Weights of one block, its numbers, an arena whose free slots are in its lengths, and the other arguments."""
    N, seeds = H * group, itertools.count(seed)

    def matrix(rows, columns):
        weight, bias, scale = random(rows, columns, seed=next(seeds), dtype=dtype) / columns**0.5, None, None
        if int8:
            weight, scale = quantize_rows(weight)
        if biases:
            bias = random(rows, seed=next(seeds), dtype=dtype)
        return weight, bias, scale

    def norm(size):
        return (1 + random(size, seed=next(seeds)) / 4).to(dtype)

    norms = (norm(D), norm(D)) if qk_norm else (None, None)
    weights = (
        norm(E),
        *matrix((N if reads else N + 2 * H) * D, E),
        *norms,
        *matrix(E, N * D),
        norm(E),
        *matrix(2 * width, E),
    )
    weights = (*weights, *matrix(E, width), 1e-5, 1e-6, window or 0)
    lengths = [[(7, 0, 260, 31)[(row + head) % 4] for head in range(H)] for row in range(B)]
    a = arena_of(lengths, D, dtype=dtype, window=window, seed=seed)
    active = torch.arange(B) % 3 != 1
    if not reads:  # what another layer stored is there already
        a.length += active[:, None, None].int()
    angle = random(B, 1, D // 2, seed=next(seeds)) * 9
    cache = [a.k, a.v, a.pos, a.slot, a.offset, a.length, LAYER, a.position, active]
    return [2 * random(B, 1, E, seed=next(seeds), dtype=dtype), angle.cos(), angle.sin(), weights, *cache]


def blocks(run, x, cos, sin, weights, *cache):
    """A single block by something with the arguments of `decode_blocks`."""
    *weights, eps, qk_eps, window = weights
    return run(x, cos, sin, weights, eps, qk_eps, [window], *cache)


def cloned(case):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in case]


def naive_block(x, cos, sin, weights, k_arena, v_arena, pos, slot, offset, length, layer, position, active):
    """The block in float64, row by row; the arena is not written."""
    wide = [w.double() if isinstance(w, torch.Tensor) else w for w in weights]
    attention_norm, qkv, qkv_bias, qkv_scale, q_norm, k_norm, out, out_bias, out_scale, mlp_norm, *rest = wide
    gate_up, gate_up_bias, gate_up_scale, down, down_bias, down_scale, eps, qk_eps, window = rest
    H, D = slot.shape[2], k_arena.shape[2]

    def linear(x, weight, bias, scale):
        return F.linear(x, weight if scale is None else weight * scale[:, None], bias)

    def norm(x, weight, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(x_ND, row):
        angle = torch.complex(cos[row, 0].double(), sin[row, 0].double())
        turned = torch.complex(x_ND[:, : D // 2], x_ND[:, D // 2 :]) * angle
        return torch.cat((turned.real, turned.imag), 1)

    a = types.SimpleNamespace(k=k_arena.double(), v=v_arena.double(), pos=pos.clone(), offset=offset, length=length)
    a.bias = None
    a.position, a.window, a.bias, queries = position, window, None, []
    for row in range(x.shape[0]):
        heads = linear(norm(x[row, 0].double(), attention_norm, eps), qkv, qkv_bias, qkv_scale).view(-1, D)
        N = out.shape[1] // D
        q, k, v = heads[:N], heads[N : N + H], heads[N + H :]
        if q_norm is not None:
            q, k = norm(q, q_norm, qk_eps), norm(k, k_norm, qk_eps)
        queries.append(rotate(q, row))
        if active[row] and len(heads) > N:
            at = slot[row, layer].flatten().long()
            a.k[row, at], a.v[row, at], a.pos[row, at] = rotate(k, row), v, position[row]
    a.q = torch.stack(queries)
    x = x.double() + linear(naive_decode(a, torch.float64).flatten(1)[:, None], out, out_bias, out_scale)
    gate, up = linear(norm(x, mlp_norm, eps), gate_up, gate_up_bias, gate_up_scale).chunk(2, -1)
    return x + linear(F.silu(gate) * up, down, down_bias, down_scale), a


def check_block(case):
    """The result and the cache afterwards; returns the result."""
    x, cos, sin, weights, *cache = cloned(case)
    y = blocks(decode_blocks.decode_blocks, x, cos, sin, weights, *cache)
    plain = cloned(case)
    exact, after = naive_block(*case)
    check(y, exact, blocks(decode_blocks.reference, *plain))
    assert same(x, case[0]) and all(same(a, b) for a, b in zip(cache[3:], case[7:], strict=True)), (
        "only the arena is written"
    )
    assert same(cache[2], after.pos)
    if len(weights[1]) == weights[6].shape[1]:
        assert all(same(got, before) for got, before in zip(cache[:2], case[4:6], strict=True)), "it stores nothing"
        return y
    slot, active = cache[3][:, 1].long(), cache[8]
    for got, exact_arena, before, plain_arena in zip(cache, (after.k, after.v), case[4:], plain[4:6], strict=False):
        rows = torch.arange(len(slot))[:, None].expand_as(slot)[active], slot[active]
        check(got[rows], exact_arena[rows], plain_arena[rows])
        rest = got.clone()
        rest[rows] = before[rows]
        assert same(rest, before), "only the new slots of active rows change"
    return y


BLOCKS = {
    "plain": {},
    "biases": {"biases": True},
    "qk norm": {"qk_norm": True},
    "window": {"window": 700},
    "everything": {"biases": True, "qk_norm": True, "window": 700},
    "one head each": {"group": 1},
    "groups of 4": {"group": 4, "H": 1},
    "even sizes": {"E": 64, "D": 16, "width": 96},
    "large": {"E": 65, "D": 80, "width": 131, "H": 3},
    "reads": {"reads": True},
    "reads, everything": {"reads": True, "biases": True, "qk_norm": True, "window": 700},
    "tiny": {"E": 2, "D": 2, "H": 1, "group": 1, "width": 1},
}


@dtypes
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("B", [1, 3, 8, 11])
@pytest.mark.parametrize("block", BLOCKS)
def test_decode_blocks_is_the_block(dtype, int8, B, block):
    check_block(block_case(dtype=dtype, int8=int8, B=B, **BLOCKS[block]))


@dtypes
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("block", BLOCKS)
def test_decode_blocks_gives_a_row_the_same_bits_in_any_company(dtype, int8, block):
    case = block_case(dtype=dtype, int8=int8, B=9, **BLOCKS[block])

    def run(rows):
        x, cos, sin, weights, *cache = case
        x, cos, sin, *cache = (t if t is LAYER else t[rows].contiguous() for t in (x, cos, sin, *cache))
        return (blocks(decode_blocks.decode_blocks, x, cos, sin, weights, *cache), *cache[:3])

    together = run(list(range(9)))
    orders = [[row] for row in range(9)] + [[8, 7, 6, 5, 4, 3, 2, 1], [2, 0], [4, 4, 4, 1, 3]]
    for rows in orders:
        assert all(same(part, whole[rows]) for part, whole in zip(run(rows), together, strict=True)), rows


@dtypes
def test_decode_blocks_stores_what_ragged_append_would(dtype):
    case = block_case(dtype=dtype, B=4)
    *_, weights, k_arena, v_arena, pos, slot, _, _, _, position, active = case
    zero_angle = torch.ones_like(case[1]), torch.zeros_like(case[2])
    x = case[0]
    mean_square = x.float().square().mean(-1, keepdim=True)
    normed = x.float() * torch.rsqrt(mean_square + weights[-3]) * weights[0].float()
    H, D = slot.shape[2], k_arena.shape[2]
    k, v = product(normed, weights[1].float()).view(4, 1, -1, D).to(dtype)[:, :, -2 * H :].chunk(2, 2)
    expected = [t.clone() for t in (k_arena, v_arena, pos)]
    ragged_append.ragged_append(*expected, slot[..., None], LAYER, k, v, position, active)
    blocks(decode_blocks.decode_blocks, x, *zero_angle, weights, *case[4:])
    for got, wanted in zip((k_arena, v_arena, pos), expected, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert same(got.isnan(), wanted.isnan()) if got.is_floating_point() else same(got, wanted)


@dtypes
def test_decode_blocks_takes_strided_hidden_states(dtype):
    case = block_case(dtype=dtype, B=3)
    expected = blocks(decode_blocks.decode_blocks, *cloned(case))
    case[0] = torch.stack((case[0], case[0] * NAN), -1)[..., 0]
    case[1:3] = (x.repeat_interleave(2, -1)[..., ::2] for x in case[1:3])
    assert not case[0].is_contiguous() and not case[1].is_contiguous()
    assert same(blocks(decode_blocks.decode_blocks, *case), expected)


def test_decode_blocks_does_not_depend_on_threads():
    case = block_case(B=5, **BLOCKS["large"])
    with_threads(lambda: blocks(decode_blocks.decode_blocks, *cloned(case)))


def test_the_gate_is_silu_over_its_whole_range():
    """Only biases: the block's result is silu(gate) · 1, through an identity."""
    width = 512
    zero = torch.zeros
    for gate in torch.linspace(-200, 200, 8 * width).view(8, width):
        weights = (torch.ones(width), zero(6, width), None, None, None, None, zero(width, 2), None, None)
        weights += (torch.ones(width), zero(2 * width, width), torch.cat((gate, torch.ones(width))), None)
        weights += (torch.eye(width), None, None, 1e-5, 0.0, 0)
        table = torch.zeros(1, 1, 1, dtype=torch.int32)
        cache = (zero(1, 1, 2), zero(1, 1, 2), table[0], table, table, table + 1, torch.tensor([0]), table[0, 0])
        y = blocks(
            decode_blocks.decode_blocks,
            zero(1, 1, width),
            zero(1, 1, 1),
            zero(1, 1, 1),
            weights,
            *cache,
            torch.tensor([True]),
        )
        assert y.isfinite().all()
        torch.testing.assert_close(y.flatten().double(), F.silu(gate.double()), rtol=1e-6, atol=1e-35)


@dtypes
def test_quantize_rows_rounds_to_the_nearest_step(dtype):
    for rows, columns in ((1, 1), (5, 33), (64, 65)):
        weight = random(rows, columns, dtype=dtype) * torch.logspace(-3, 2, rows).to(dtype)[:, None]
        weight[rows // 2] = 0
        steps, scale = quantize_rows(weight)
        error = (steps.double() * scale.double()[:, None] - weight.double()).abs()
        assert steps.dtype == torch.int8 and scale.dtype == torch.float32
        assert (error <= 0.5001 * scale.double()[:, None]).all() and steps.abs().max() <= 127
        assert (steps[rows // 2] == 0).all() and scale[rows // 2] == 0
        largest = weight.float().abs().argmax(1, keepdim=True)
        assert (steps.gather(1, largest).abs().flatten()[weight.abs().amax(1) > 0] == 127).all()


@dtypes
def test_a_quantised_layer_gives_few_and_many_rows_the_same_numbers(dtype):
    layer = Linear(300, 33, bias=True)
    layer.weight = torch.nn.Parameter(random(33, 300, dtype=dtype), requires_grad=False)
    layer.bias = torch.nn.Parameter(random(33, seed=1, dtype=dtype), requires_grad=False)
    quantize_weights(layer)
    x = 8 * random(40, 300, seed=2, dtype=dtype)
    used = layer.weight.double() * layer.scale.double()[:, None]
    exact = F.linear(x.double(), used, layer.bias.double())
    plain = F.linear(x, used.to(dtype), layer.bias)
    with torch.no_grad():
        check(layer(x), exact, plain)
        check(torch.cat([layer(row[None]) for row in x]), exact, plain)


def test_which_rows_read_int8_codes_and_which_make_floats_of_them(monkeypatch):
    read = []
    monkeypatch.setattr(linear, "few_rows_linear", lambda x, *rest: read.append(len(x)) or product(x, *rest))
    weight, scale = quantize_rows(random(5, 16))
    with torch.no_grad():
        for rows in (8, 9, 32, 33):
            linear.linear(random(rows, 16), weight, scale=scale)
            linear.linear(random(rows, 16), random(5, 16))
    assert read == [8, 8, 9, 32]


def test_a_product_in_half_precision_overflows_only_where_its_result_does():
    weight, scale = quantize_rows(random(4, 1000).abs() / 100 + 1)
    x = torch.ones(9, 1000, dtype=torch.float16)
    exact = (weight.double() * scale.double()[:, None]).sum(1).expand(9, 4)
    for out in (product(x, weight, None, scale), few_rows_linear.reference(x, weight, None, scale)):
        check(out, exact, exact.half())


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("qk_norm_eps", [None, 1e-6])
@pytest.mark.parametrize("window", [None, 3])
def test_fused_blocks_are_their_blocks(int8, qk_norm_eps, window):
    B, E, D, H, N, steps = 3, 20, 6, 2, 6, 6

    def make(layer, window):
        bias = {"qkv_bias": True, "qk_norm_eps": qk_norm_eps}
        attention = Attention(E, num_heads=N, num_kv_heads=H, head_dim=D, layer=layer, window=window, **bias)
        return Block(attention, GatedMLP(E, 33, bias=True), E, eps=1e-5)

    block = torch.nn.Sequential(make(1, window), make(2, None))
    for seed, parameter in enumerate(block.parameters()):
        parameter.requires_grad_(False).copy_(random(*parameter.shape, seed=seed) / 4)
    if int8:
        quantize_weights(block)
    shape = ArenaShape(batch=B, num_layers=3, num_kv_heads=H, head_dim=D, slots=24, dtype=torch.float32)
    fused, caches = FusedBlocks([*block]), [ArenaCache(shape, "cpu") for _ in range(2)]
    for cache in caches:
        cache.lay_out(torch.zeros(B, 3, H), room=[4] * B)

    def plain(x, rotation, cache):
        return block[1](block[0](x, rotation, cache), rotation, cache)

    for step in range(steps):
        x, angle = random(B, 1, E, seed=step), torch.full((B, 1, D // 2), float(step))
        outs = []
        for run, cache in zip((fused, plain), caches, strict=True):
            cache.begin_step(torch.tensor([True, step % 2 == 0, step < 4]))
            with torch.no_grad():
                outs.append(run(x, (angle.cos(), angle.sin()), cache))
            cache.end_step()
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(caches[0].k, caches[1].k, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(caches[0].v, caches[1].v, rtol=1e-5, atol=1e-6)
        assert same(caches[0].pos, caches[1].pos)


@dtypes
@pytest.mark.parametrize(
    "op",
    ["few_rows_linear", "int8", "ragged_append", "ragged_decode", "decode_blocks", "rms_norm", "silu_mul", "rope"],
)
def test_the_operators_say_what_they_do(dtype, op):
    a = arena_of([[5, 0], [300, 2]], 6, dtype=dtype, group=2)
    arguments = {
        "few_rows_linear": linear_case(dtype, False, 3, 5, 7, True)[0],
        "int8": linear_case(dtype, True, 3, 5, 7, False)[0],
        "ragged_append": (
            a.k,
            a.v,
            a.pos,
            a.slot[..., None],
            LAYER,
            a.q[:, None, :2],
            a.q[:, None, 2:],
            a.position,
            torch.tensor([True, False]),
        ),
        "ragged_decode": (a.q, a.k, a.v, a.pos, a.offset, a.length, LAYER, a.position, 0, MOST, None, None, None),
    }
    x, cos, sin, weights, *cache = block_case(dtype=dtype, biases=True)
    arguments["decode_blocks"] = blocks(lambda *case: case, x, cos, sin, weights, *cache)
    arguments["rms_norm"], arguments["silu_mul"] = (x, weights[0], 1e-5), (x,)
    arguments["rope"] = (x.view(3, 1, 2, 10), *(random(3, 1, 5, seed=seed, dtype=dtype) for seed in (1, 2)))
    function = getattr(torch.ops.headkv, "few_rows_linear" if op == "int8" else op).default
    torch.library.opcheck(function, arguments[op], test_utils=("test_schema", "test_faketensor"))


@dtypes
def test_compiled_functions_append_and_attend_in_place(dtype):
    torch._dynamo.reset()
    a = arena_of([[5, 0], [300, 2]], 6, dtype=dtype, group=2)
    a.length += 1
    k, v, active = (
        random(2, 1, 2, 6, seed=5, dtype=dtype),
        random(2, 1, 2, 6, seed=6, dtype=dtype),
        torch.tensor([True, True]),
    )

    def step(k_arena, v_arena, pos):
        ragged_append.ragged_append(k_arena, v_arena, pos, a.slot[..., None], LAYER, k, v, a.position, active)
        tables = pos, a.offset, a.length, LAYER, a.position
        return ragged_decode.ragged_decode(a.q, k_arena, v_arena, *tables, most=MOST)[0]

    arenas = [tuple(x.clone() for x in (a.k, a.v, a.pos)) for _ in range(2)]
    pointers = [x.data_ptr() for x in arenas[0]]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arenas[0])
    assert same(compiled, step(*arenas[1])) and all(same(x, y) for x, y in zip(*arenas, strict=True))
    assert pointers == [x.data_ptr() for x in arenas[0]]
    a.k, a.v, a.pos = arenas[0]
    check(compiled, naive_decode(a, torch.float64), naive_decode(a, dtype))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`kernels.native` as in a new process with an empty cache, which is returned."""
    monkeypatch.setattr(native, "_building", None)
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("/bin/false", "/false cannot build kernels/cpp (status 1)"),
        ("/no/such/compiler", "there is no C++ compiler"),
        ("echo a note; echo 'x.cpp:1: error: too old' >&2; echo more >&2; exit 3", "(x.cpp:1: error: too old)"),
    ],
)
def test_a_broken_compiler_is_one_clear_line(fresh, monkeypatch, tmp_path, program, says):
    monkeypatch.setenv("CXX", program if program.startswith("/") else script(tmp_path / "compiler", program))
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            native.load()
        assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not files(fresh) and not native._loaded


def test_an_unusable_cache_folder_is_one_clear_line(fresh):
    fresh.write_text("a file where the folder should be")
    with pytest.raises(RuntimeError) as caught:
        native.load()
    assert str(fresh) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_damaged_library_is_one_clear_line(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", 'while [ "$1" != -o ]; do shift; done; echo made > "$2"'))
    with pytest.raises(RuntimeError) as caught:
        native.load()
    assert files(fresh)[0].name in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_damaged_library_is_built_again(fresh, monkeypatch, tmp_path):
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(native, "_SOURCES", tmp_path / "cpp")
    library = native._built()
    library.write_bytes(library.read_bytes()[:100])
    native.load()
    assert ctypes.CDLL(str(library)).one() == 1


def test_other_sources_are_another_library(fresh, monkeypatch, tmp_path):
    """With a compiler that only makes files and counts its calls."""
    calls, sources = tmp_path / "calls", tmp_path / "cpp"
    fake = f'echo >> {calls}; while [ "$1" != -o ]; do shift; done; echo made > "$2"'
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", fake))
    sources.mkdir()
    for file in native._SOURCES.iterdir():
        (sources / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(native, "_SOURCES", sources)
    first = native._built()
    once = calls.read_text()
    assert native._built() == first and calls.read_text() == once, "built once"
    with (sources / "simd.h").open("a") as header:
        header.write("// another\n")
    second = native._built()
    monkeypatch.setenv("CXX", script(tmp_path / "other", fake))
    third = native._built()
    assert len({first, second, third}) == 3 and sorted(files(fresh)) == sorted({first, second, third})


def test_two_processes_build_at_once(fresh, monkeypatch, tmp_path):
    """Neither compiler starts to work before both were called."""
    sources = tmp_path / "cpp"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    wait = f"echo > {tmp_path}/called.$$; while [ $(ls {tmp_path}/called.* | wc -l) -lt 2 ]; do sleep 0.05; done"
    monkeypatch.setenv("CXX", script(tmp_path / "compiler", f'{wait}; exec {shlex.join(native.compiler())} "$@"'))
    build = "import sys, pathlib; from kernels import native; native._SOURCES = pathlib.Path(sys.argv[1]); "
    build += "print(native._built())"
    root = Path(__file__).parents[1]
    processes = [
        subprocess.Popen([sys.executable, "-c", build, str(sources)], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    libraries = {process.communicate(timeout=25)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert [str(file) for file in files(fresh)] == list(libraries)
    assert ctypes.CDLL(libraries.pop()).one() == 1


@pytest.mark.parametrize("slot", [0, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_ragged_decode_hides_no_damaged_key(slot, value):
    k, v = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    k[0, slot, 0] = value
    pos, zero = torch.arange(4, dtype=torch.int32)[None], torch.zeros(1, 1, 1, dtype=torch.int32)
    arguments = (torch.ones(1, 1, 8), k, v, pos, zero, zero + 4, torch.tensor([0]), pos[:, 3].contiguous(), None)
    for form in (ragged_decode.ragged_decode, ragged_decode.reference):
        out, lse = form(*arguments, most=4)
        assert out.isnan().all() and not lse.isfinite().any()


def test_what_would_be_read_wrongly_is_refused():
    op, half, zero = torch.ops.headkv, torch.zeros(1, 4, 16)[..., :8], torch.zeros(1, 1, 1, dtype=torch.int32)
    pos, layer = torch.zeros(1, 4, dtype=torch.int32), torch.tensor([0])
    whole, here = half.contiguous(), pos[:, 0].contiguous()
    for q, k, v, at in [
        (whole[:, :1].bfloat16(), whole, whole, layer),
        (whole[:, :1], half, whole, layer),
        (whole[:, :1], whole, half, layer),
        (whole[:, :1, :4], whole, whole, layer),
        (whole[:, :1], whole, whole, layer + 1),
    ]:
        with pytest.raises(RuntimeError):
            op.ragged_decode(q, k, v, pos, zero, zero, at, here, 0, 4, None, None, None)
    for x, weight in [((1, 0), (3, 0)), ((1, 10), (2, 5)), ((1, 4), (4, 8))]:
        with pytest.raises(RuntimeError):
            op.few_rows_linear(torch.zeros(x), torch.zeros(weight), None, None)
    with pytest.raises(RuntimeError):
        op.silu_mul(torch.ones(2, 5))


def test_windows_at_the_edges():
    (q, k, pos, position, protected, *_), where = list(window_cases())[2].make(torch.float32), {"rows": "mean"}
    where |= {"group": "mean", "protected_BHS": protected}
    with torch.inference_mode():
        far = window_scores(q, k, pos, position, **where, ahead=10**30, behind=10**30)
        assert torch.equal(far, window_scores(q, k, pos, position, **where, ahead=k.shape[2], behind=k.shape[2]))
        with pytest.raises(ValueError, match="q_BWND has no queries"):
            window_scores(q[:, :0], k, pos, position[:, :0], **where, ahead=0, behind=0)
        nobody = torch.ops.headkv.window_scores(q[:, :0], k, pos, position[:, :0], protected, 0, False, 0, 0, 0, None)
    assert torch.equal(nobody, torch.zeros(k.shape[:3]))
