"""One token per row through whole transformer blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import few_rows_linear, ragged_append, ragged_decode
from kernels.checks import INTEGERS, check, check_arena
from kernels.registry import Arguments, Case, Workload, register
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.silu_mul import silu_mul
from kernels.testing import random

PER_BLOCK = 16


def decode_blocks(
    x_BTE: Tensor,
    cos_BTd: Tensor,
    sin_BTd: Tensor,
    weights: Sequence[Tensor | None],
    eps: float,
    qk_eps: float,
    windows: Sequence[int],
    *cache: Tensor,
) -> Tensor:
    """Norm, attention over the arena, norm and gated MLP, each added to the residual stream, block after block.

    On a CPU this is C++ (`kernels/cpp/decode_blocks.cpp`) from the first norm to the last sum: between the products of
    a small model, calling a dozen operators per block from Python takes longer than they do. It is to a CPU what a
    captured graph is to a GPU. Sums and what passes between the steps are fp32.

    Args:
        x_BTE: (B, 1, E) hidden states, 1 to 8 rows.
        cos_BTd: (B, 1, D / 2) cosines of the token's position.
        sin_BTd: its sines.
        weights: 16 per block, all blocks of the same sizes: attention_norm (E); qkv (N·D + 2·H·D, E), its bias and int8
            scale; q_norm and k_norm (D); out (E, N·D), its bias and scale; mlp_norm (E); gate_up (2F, E), its bias and
            scale; down (E, F), its bias and scale. What a block does not have is None. Biases, norms and matrices
            without a scale have x's dtype. A block whose qkv is (N·D, E) stores nothing: the tables give its layer the
            region of an earlier one.
        eps: epsilon of the norms.
        qk_eps: epsilon of q_norm and k_norm.
        windows: sliding window of each block in tokens, 0 for none.
        *cache: k_arena, v_arena, pos, slot_BLH, offset_BLH, length_BLH, layer_1 (of the first block; the others
            follow), position_B and active_B, as for `ragged_append` and `ragged_decode`; the first three are written.

    Returns:
        (B, 1, E) in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit, **or** the arena, a table or a weight is not contiguous.

    Example:
        >>> E, D = 8, 4
        >>> norm, zero = torch.ones(E), torch.zeros
        >>> weights = (norm, zero(3 * D, E), None, None, None, None, zero(E, D), None, None,
        ...            norm, zero(4, E), None, None, zero(E, 2), None, None)
        >>> table, position = torch.zeros(1, 1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        >>> cache = (zero(1, 2, D), zero(1, 2, D), table[0].repeat(1, 2), table, table, table + 1, torch.tensor([0]),
        ...          position, torch.tensor([True]))
        >>> x, angles = torch.ones(1, 1, E), (torch.ones(1, 1, 2), zero(1, 1, 2))
        >>> decode_blocks(x, *angles, weights, 1e-5, 0.0, [0], *cache)[0, 0, :3]
        tensor([1., 1., 1.])
    """
    try:
        y_BTE: Tensor = torch.ops.headkv.decode_blocks.default(
            x_BTE, cos_BTd, sin_BTd, weights, eps, qk_eps, windows, *cache
        )
    except RuntimeError:  # C++ refuses the same; to look at hundreds of tensors before every call takes too long
        _check(x_BTE, cos_BTd, sin_BTd, weights, windows, *cache)
        raise
    return y_BTE


def reference(
    x_BTE: Tensor,
    cos_BTd: Tensor,
    sin_BTd: Tensor,
    weights: Sequence[Tensor | None],
    eps: float,
    qk_eps: float,
    windows: Sequence[int],
    *cache: Tensor,
) -> Tensor:
    """What `decode_blocks` computes, in the model's own dtype between the steps."""
    _check(x_BTE, cos_BTd, sin_BTd, weights, windows, *cache)
    *arena, first_1, position_B, active_B = cache
    for block, window in enumerate(windows):
        of_block = weights[block * PER_BLOCK : (block + 1) * PER_BLOCK]
        cache = (*arena, first_1 + block, position_B, active_B)
        x_BTE = _block(x_BTE, cos_BTd, sin_BTd, of_block, eps, qk_eps, window, *cache)
    return x_BTE.clone(memory_format=torch.contiguous_format)


def _block(
    x_BTE: Tensor,
    cos_BTd: Tensor,
    sin_BTd: Tensor,
    weights: Sequence[Any],
    eps: float,
    qk_eps: float,
    window: int,
    *cache: Tensor,
) -> Tensor:
    attention_norm, qkv, qkv_bias, qkv_scale, q_norm, k_norm, out, out_bias, out_scale, *rest = weights
    mlp_norm, gate_up, gate_up_bias, gate_up_scale, down, down_bias, down_scale = rest
    k_arena, v_arena, pos, slot_BLH, offset_BLH, length_BLH, layer_1, position_B, active_B = cache
    linear, D, H = few_rows_linear.reference, k_arena.shape[-1], slot_BLH.shape[-1]

    qkv_BTHD = linear(rms_norm(x_BTE, attention_norm, eps), qkv, qkv_bias, qkv_scale).unflatten(-1, (-1, D))
    N, arena = out.shape[1] // D, (k_arena, v_arena, pos)
    if qkv_BTHD.shape[2] > N:
        k_BTHD, v_BTHD = qkv_BTHD[:, :, N:].split(H, dim=2)
        k_BTHD = apply_rope(k_BTHD if k_norm is None else rms_norm(k_BTHD, k_norm, qk_eps), cos_BTd, sin_BTd)
        ragged_append.reference(*arena, slot_BLH[..., None], layer_1, k_BTHD, v_BTHD, position_B, active_B)
    q_BTND = qkv_BTHD[:, :, :N]
    q_BTND = apply_rope(q_BTND if q_norm is None else rms_norm(q_BTND, q_norm, qk_eps), cos_BTd, sin_BTd)
    tables = offset_BLH, length_BLH, layer_1, position_B
    o_BND, _ = ragged_decode.reference(q_BTND[:, 0], *arena, *tables, window, k_arena.shape[1])
    x_BTE = x_BTE + linear(o_BND.flatten(1)[:, None], out, out_bias, out_scale)
    gate_up_BTF = linear(rms_norm(x_BTE, mlp_norm, eps), gate_up, gate_up_bias, gate_up_scale)
    y_BTE: Tensor = x_BTE + linear(silu_mul(gate_up_BTF), down, down_bias, down_scale)
    return y_BTE


def _check(
    x_BTE: Tensor, cos_BTd: Tensor, sin_BTd: Tensor, weights: Sequence[Any], windows: Sequence[int], *cache: Tensor
) -> None:
    """Refuse what `decode_blocks` would read wrongly."""
    k_arena, v_arena, pos, slot_BLH, offset_BLH, length_BLH, layer_1, position_B, active_B = cache
    check("x_BTE", x_BTE, shape=(None, 1, None))
    B, packed = len(x_BTE), partial(check, like=x_BTE, contiguous=True)
    check_arena(k_arena, v_arena, pos, [x_BTE.dtype])
    packed("k_arena", k_arena, shape=(B, None, None), dtype=[x_BTE.dtype])
    D = k_arena.shape[2]
    packed("slot_BLH", slot_BLH, shape=(B, None, None), dtype=INTEGERS)
    packed("offset_BLH", offset_BLH, shape=slot_BLH.shape, dtype=INTEGERS)
    packed("length_BLH", length_BLH, shape=slot_BLH.shape, dtype=INTEGERS)
    packed("layer_1", layer_1, shape=(1,), dtype=[torch.int64])
    packed("position_B", position_B, shape=(B,), dtype=INTEGERS)
    packed("active_B", active_B, shape=(B,), dtype=[torch.bool])
    for name, angle_BTd in (("cos_BTd", cos_BTd), ("sin_BTd", sin_BTd)):
        check(name, angle_BTd, shape=(B, 1, D // 2), like=x_BTE)
    if D % 2:
        raise ValueError(f"k_arena has a head dim of {D}, it must be even")
    if not windows or len(weights) != len(windows) * PER_BLOCK:
        raise ValueError(
            f"weights has {len(weights)} tensors for {len(windows)} windows, it must have {PER_BLOCK} for each"
        )
    for block in range(len(windows)):
        _check_weights(weights[block * PER_BLOCK : (block + 1) * PER_BLOCK], x_BTE, D, slot_BLH.shape[2])


def _check_weights(weights: Sequence[Any], x_BTE: Tensor, D: int, H: int) -> None:
    attention_norm, qkv, qkv_bias, qkv_scale, q_norm, k_norm, out, out_bias, out_scale, *rest = weights
    mlp_norm, gate_up, gate_up_bias, gate_up_scale, down, down_bias, down_scale = rest
    E, packed, dtype = x_BTE.shape[2], partial(check, like=x_BTE, contiguous=True), [x_BTE.dtype]
    for name, norm, size in (
        ("attention_norm", attention_norm, E),
        ("mlp_norm", mlp_norm, E),
        ("q_norm", q_norm, D),
        ("k_norm", k_norm, D),
    ):
        if norm is not None:
            packed(name, norm, shape=(size,), dtype=dtype)
    width, inner = out.shape[-1], down.shape[-1]
    if width % (H * D):
        raise ValueError(f"out has {width} columns, it must have a multiple of {H} KV heads of {D}")
    qkv_rows = width if len(qkv) == width else width + 2 * H * D
    for name, weight, bias, scale, rows, columns in (
        ("qkv", qkv, qkv_bias, qkv_scale, qkv_rows, E),
        ("out", out, out_bias, out_scale, E, width),
        ("gate_up", gate_up, gate_up_bias, gate_up_scale, 2 * inner, E),
        ("down", down, down_bias, down_scale, E, inner),
    ):
        packed(name, weight, shape=(rows, columns), dtype=dtype if scale is None else [torch.int8])
        if bias is not None:
            packed(f"{name}_bias", bias, shape=(rows,), dtype=dtype)
        if scale is not None:
            packed(f"{name}_scale", scale, shape=(rows,), dtype=[torch.float32])


def fake(
    x_BTE: Tensor,
    cos_BTd: Tensor,
    sin_BTd: Tensor,
    weights: Sequence[Tensor | None],
    eps: float,
    qk_eps: float,
    windows: Sequence[int],
    *cache: Tensor,
) -> Tensor:
    """An empty result."""
    _check(x_BTE, cos_BTd, sin_BTd, weights, windows, *cache)
    return torch.empty_like(x_BTE, memory_format=torch.contiguous_format)


def cases() -> Iterator[Case]:
    """Blocks with everything that a block may have, and without; `tests/test_native.py` has many more."""
    yield Case(name="plain, G=1", make=partial(_arguments, 1, 1, 1, 64))
    yield Case(name="biases and norms of heads, G=4, D=80", make=partial(_arguments, 3, 2, 4, 80, extras=True))
    yield Case(name="int8, window, G=8", make=partial(_arguments, 3, 1, 8, 64, int8=True, window=40))


def _arguments(
    B: int, H: int, G: int, D: int, dtype: torch.dtype, *, extras: bool = False, int8: bool = False, window: int = 0
) -> Arguments:
    """Two blocks on the last two of three layers, in regions of 65 slots of which each head has filled others."""
    E, inner, N, L, slots = 66, 100, H * G, 3, 65
    seeds = iter(range(99))

    def norm(size: int) -> Tensor:
        return (1 + random(size, seed=next(seeds)) / 4).to(dtype)

    def matrix(rows: int, columns: int) -> tuple[Tensor | None, ...]:
        weight, scale = random(rows, columns, seed=next(seeds)) / columns**0.5, None
        if int8:
            scale = weight.abs().amax(1) / 127
            weight = (weight / scale[:, None]).round()
        bias = random(rows, seed=next(seeds), dtype=dtype) if extras else None
        return weight.to(torch.int8 if int8 else dtype), bias, scale

    head_norms = (norm(D), norm(D)) if extras else (None, None)
    weights: list[Tensor | None] = []
    for _ in range(2):
        weights += norm(E), *matrix((N + 2 * H) * D, E), *head_norms, *matrix(E, N * D), norm(E)
        weights += *matrix(2 * inner, E), *matrix(E, inner)
    offset_BLH = slots * torch.arange(L * H, dtype=torch.int32).view(L, H).repeat(B, 1, 1)
    stored_BLH = torch.tensor([0, 63, 64, 1], dtype=torch.int32).repeat(B * L * H)[: B * L * H].view(B, L, H)
    filled = (torch.arange(slots) < stored_BLH[..., None]).view(B, L * H * slots)
    arena = random(2, B, L * H * slots, D, seed=next(seeds), dtype=dtype).where(filled[..., None], float("nan"))
    pos = torch.arange(slots, dtype=torch.int32).repeat(B, L * H).masked_fill(~filled, -1)
    angle_BTd = 9 * random(B, 1, D // 2, seed=next(seeds))
    tables = offset_BLH + stored_BLH, offset_BLH, stored_BLH + 1, torch.tensor([1])
    rows = torch.full((B,), slots, dtype=torch.int32), torch.ones(B, dtype=torch.bool)
    x_BTE = random(B, 1, E, seed=next(seeds), dtype=dtype)
    numbers = 1e-5, 1e-6, [window, 0]
    return x_BTE, angle_BTd.cos(), angle_BTd.sin(), weights, *numbers, *arena.unbind(), pos, *tables, *rows


def bytes_moved(x_BTE: Tensor, cos_BTd: Tensor, sin_BTd: Tensor, weights: Sequence[Tensor | None], *rest: Any) -> int:
    """Weights, the stored tokens of the blocks' layers, x in and out, and the new token in each."""
    windows, k_arena, slot_BLH, tokens = _read(*rest)
    token = 2 * k_arena.shape[2] * k_arena.element_size() + 4
    new = len(windows) * slot_BLH[:, 0].numel()
    tables = 3 * 4 * new + 5 * len(slot_BLH) + 8
    kept = sum(weight.nbytes for weight in weights if weight is not None)
    return kept + 2 * x_BTE.nbytes + cos_BTd.nbytes + sin_BTd.nbytes + (tokens + new) * token + tables


def flops(x_BTE: Tensor, cos_BTd: Tensor, sin_BTd: Tensor, weights: Sequence[Tensor | None], *rest: Any) -> int:
    """Two per weight and row, and four per number of a stored token and query head."""
    _, k_arena, slot_BLH, tokens = _read(*rest)
    matrices = [weight for weight in weights if weight is not None and weight.dim() == 2]
    group = matrices[1].shape[1] // k_arena.shape[2] // slot_BLH.shape[2]
    return 2 * len(x_BTE) * sum(matrix.numel() for matrix in matrices) + 4 * tokens * group * k_arena.shape[2]


def _read(
    eps: float, qk_eps: float, windows: Sequence[int], k_arena: Tensor, v_arena: Tensor, pos: Tensor, *tables: Tensor
) -> tuple[Sequence[int], Tensor, Tensor, int]:
    """Windows, arena, slots, and how many stored tokens are read."""
    slot_BLH, _, length_BLH, layer_1, _, _ = tables
    first = int(layer_1)
    return windows, k_arena, slot_BLH, int(length_BLH[:, first : first + len(windows)].sum())


def sized(work: Workload) -> Arguments:
    """One decode step through all layers, without biases and norms of heads."""
    B, L, N, H, D, E = work.batch, work.layers, work.heads, work.kv_heads, work.head_dim, work.hidden
    x_BTE = torch.empty(B, 1, E, dtype=work.dtype, device="meta")
    angle_BTd = torch.empty(B, 1, D // 2, device="meta")
    norm = x_BTE.new_empty(E)
    attention = norm, x_BTE.new_empty((N + 2 * H) * D, E), None, None, None, None, x_BTE.new_empty(E, N * D), None, None
    inner = work.intermediate
    mlp = norm, x_BTE.new_empty(2 * inner, E), None, None, x_BTE.new_empty(E, inner), None, None
    numbers = L * (*attention, *mlp), 1e-5, 0.0, L * [0]
    append = ragged_append.sized(work)
    k_arena, v_arena, pos, slot_BLHT, _, _, _, position_B, active_B = append
    slot_BLH = slot_BLHT.squeeze(3)
    tables = slot_BLH, slot_BLH - work.kept, torch.full_like(slot_BLH, work.kept + 1), torch.tensor([0])
    return x_BTE, angle_BTd, angle_BTd, *numbers, k_arena, v_arena, pos, *tables, position_B, active_B


KERNEL = register(
    __name__,
    "(Tensor x_BTE, Tensor cos_BTd, Tensor sin_BTd, Tensor?[] weights, float eps, float qk_eps, int[] windows, "
    "Tensor(a!) k_arena, Tensor(b!) v_arena, Tensor(c!) pos, Tensor slot_BLH, Tensor offset_BLH, "
    "Tensor length_BLH, Tensor layer_1, Tensor position_B, Tensor active_B) -> Tensor",
)
