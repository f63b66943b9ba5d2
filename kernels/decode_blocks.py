"""One token per row through whole transformer blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import few_rows_linear, ragged_append, ragged_decode
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.silu_mul import silu_mul

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
            without a scale have x's dtype.
        eps: epsilon of the norms.
        qk_eps: epsilon of q_norm and k_norm.
        windows: sliding window of each block in tokens, 0 for none.
        *cache: k_arena, v_arena, pos, slot_BLH, offset_BLH, length_BLH, layer_1 (of the first block; the others
            follow), position_B and active_B, as for `ragged_append` and `ragged_decode`; the first three are written.

    Returns:
        (B, 1, E) in x's dtype.

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
    y_BTE: Tensor = torch.ops.headkv.decode_blocks.default(
        x_BTE, cos_BTd, sin_BTd, weights, eps, qk_eps, windows, *cache
    )
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
    q_BTND, k_BTHD, v_BTHD = qkv_BTHD.split((qkv_BTHD.shape[2] - 2 * H, H, H), dim=2)
    if q_norm is not None:
        q_BTND, k_BTHD = rms_norm(q_BTND, q_norm, qk_eps), rms_norm(k_BTHD, k_norm, qk_eps)
    q_BTND, k_BTHD = apply_rope(q_BTND, cos_BTd, sin_BTd), apply_rope(k_BTHD, cos_BTd, sin_BTd)
    ragged_append.reference(k_arena, v_arena, pos, slot_BLH, layer_1, k_BTHD[:, 0], v_BTHD[:, 0], position_B, active_B)
    o_BND = ragged_decode.reference(
        q_BTND[:, 0], k_arena, v_arena, pos, offset_BLH, length_BLH, layer_1, position_B, window
    )
    x_BTE = x_BTE + linear(o_BND.flatten(1)[:, None], out, out_bias, out_scale)
    gate_up_BTF = linear(rms_norm(x_BTE, mlp_norm, eps), gate_up, gate_up_bias, gate_up_scale)
    y_BTE: Tensor = x_BTE + linear(silu_mul(gate_up_BTF), down, down_bias, down_scale)
    return y_BTE


torch.library.define(
    "headkv::decode_blocks",
    "(Tensor x_BTE, Tensor cos_BTd, Tensor sin_BTd, Tensor?[] weights, float eps, float qk_eps, int[] windows, "
    "Tensor(a!) k_arena, Tensor(b!) v_arena, Tensor(c!) pos, Tensor slot_BLH, Tensor offset_BLH, Tensor length_BLH, "
    "Tensor layer_1, Tensor position_B, Tensor active_B) -> Tensor",
)


torch.library.impl("headkv::decode_blocks", "CompositeExplicitAutograd")(reference)


def _fake(x_BTE: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x_BTE, memory_format=torch.contiguous_format)


torch.library.register_fake("headkv::decode_blocks", _fake)
