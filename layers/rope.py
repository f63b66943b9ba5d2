"""Rotary position embedding: which angle each position turns each pair of dimensions by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def default_frequencies(head_dim: int, theta: float) -> Tensor:
    """Angular frequencies of the original RoPE, radians per token.

    Args:
        head_dim: D, even.
        theta: base of the geometric series.

    Returns:
        (D / 2,) fp32, the fastest first.

    Source:
        Su et al., RoFormer, 2021, section 3.2.2.

    Example:
        >>> default_frequencies(4, 10_000.0)
        tensor([1.0000, 0.0100])
    """
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)


def dynamic_frequencies(head_dim: int, theta: float, *, factor: float, trained: int, context: int) -> Tensor:
    """NTK-aware frequencies whose base grows with the context once it is longer than the trained one.

    Args:
        head_dim: D.
        theta: base at the trained context.
        factor: extension factor.
        trained: trained context in tokens.
        context: tokens that the sequence has; at most `trained` changes nothing.

    Returns:
        (D / 2,) fp32.

    Source:
        bloc97, dynamic NTK-aware scaled RoPE, 2023; the constants as published checkpoints are run.

    Example:
        >>> same = dynamic_frequencies(4, 10_000.0, factor=2.0, trained=8, context=8)
        >>> bool((same == default_frequencies(4, 10_000.0)).all())
        True
    """
    growth = factor * max(context, trained) / trained - (factor - 1)
    return default_frequencies(head_dim, theta * growth ** (head_dim / (head_dim - 2)))


def llama3_frequencies(frequencies_d: Tensor, *, factor: float, low: float, high: float, trained: int) -> Tensor:
    """Slow frequencies divided by `factor`, fast ones kept, a linear blend between.

    Args:
        frequencies_d: (D / 2,) unscaled.
        factor: divisor of the slow ones.
        low: turns over the trained context below which a frequency is slow.
        high: turns over the trained context above which a frequency is fast.
        trained: trained context in tokens.

    Returns:
        (D / 2,) fp32.

    Source:
        Llama 3.1, 2024: the scaling that its reference implementation applies.

    Example:
        >>> llama3_frequencies(torch.tensor([1.0, 1e-6]), factor=8.0, low=1.0, high=4.0, trained=8192).tolist()
        [1.0, 1.2499999968440534e-07]
    """
    turns_d = trained * frequencies_d / (2 * math.pi)
    keep_d = ((turns_d - low) / (high - low)).clamp(0, 1)
    return frequencies_d * keep_d + frequencies_d / factor * (1 - keep_d)


def yarn_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float,
    trained: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """Frequencies blended between extrapolation (fast ones) and interpolation (slow ones).

    Args:
        head_dim: D.
        theta: base of the geometric series.
        factor: extension factor.
        trained: trained context in tokens.
        beta_fast: turns over the trained context at which a dimension is fully extrapolated.
        beta_slow: turns at which it is fully interpolated.
        truncate: round the two boundaries outwards to whole dimensions.

    Returns:
        (D / 2,) fp32.

    Source:
        Peng et al., YaRN, 2023, equations 17-23.

    Example:
        >>> yarn_frequencies(4, 10_000.0, factor=1.0, trained=2048)
        tensor([1.0000, 0.0100])
    """

    def dimension(turns: float) -> float:
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp_d = (torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (max(high - low, 0.001))
    interpolate_d = ramp_d.clamp(0, 1)
    frequencies_d = default_frequencies(head_dim, theta)
    return frequencies_d / factor * interpolate_d + frequencies_d * (1 - interpolate_d)


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """Factor on cos and sin that keeps attention's temperature when a context is stretched.

    Args:
        factor: extension factor.
        mscale: weight of the logarithm above the fraction line; with `mscale_all_dim`, as DeepSeek ships it.
        mscale_all_dim: weight of the logarithm below the fraction line.

    Returns:
        The factor; 1 without stretching.

    Source:
        Peng et al., YaRN, 2023, equation 22 (its square root, since q and k both carry it).

    Example:
        >>> round(yarn_attention_factor(4.0), 4)
        1.1386
    """

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def longrope_attention_factor(factor: float, trained: int) -> float:
    """Factor on cos and sin for LongRoPE.

    Args:
        factor: extension factor.
        trained: trained context in tokens.

    Returns:
        The factor; 1 without stretching.

    Source:
        Ding et al., LongRoPE, 2024, as the Phi-3 checkpoints are run.

    Example:
        >>> round(longrope_attention_factor(32.0, 4096), 4)
        1.1902
    """
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0


class RotaryEmbedding(nn.Module):
    """Cosine and sine of every position's angles.

    Args:
        frequencies_d: (D / 2,) radians per token.
        attention_factor: multiplies both results.
        long_frequencies_d: frequencies for contexts longer than `trained`; None if they do not depend on it.
        trained: trained context in tokens; read only with `long_frequencies_d`.

    Example:
        >>> rope = RotaryEmbedding(default_frequencies(4, 10_000.0))
        >>> cos, sin = rope(torch.tensor([[0, 1]]))
        >>> cos.shape, float(sin[0, 0, 0])
        (torch.Size([1, 2, 2]), 0.0)
    """

    def __init__(
        self,
        frequencies_d: Tensor,
        *,
        attention_factor: float = 1.0,
        long_frequencies_d: Tensor | None = None,
        trained: int = 0,
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies_d", frequencies_d, persistent=False)
        self.register_buffer("long_frequencies_d", long_frequencies_d, persistent=False)
        self.attention_factor = attention_factor
        self.trained = trained

    def forward(self, position_BT: Tensor, context: int | Sequence[int] = 0) -> tuple[Tensor, Tensor]:
        """Angles of absolute positions.

        Args:
            position_BT: absolute positions.
            context: tokens of the sequence, or of each row's, for scalings that depend on it; a conversation keeps its
                first one, since stored keys have been turned already.

        Returns:
            Cosine and sine, each (B, T, D / 2) fp32.
        """
        return self.rotation(position_BT, self.frequencies(context))

    def rotation(self, position_BT: Tensor, frequencies_Bd: Tensor, *, endless: bool = False) -> tuple[Tensor, Tensor]:
        """Angles of absolute positions at known frequencies, which `forward` may have to make on the host.

        Args:
            position_BT: absolute positions.
            frequencies_Bd: of each row, or one row for all; see `frequencies`.
            endless: make angles in fp64: in fp32, they are wrong by a quarter of a radian at position 4 million.

        Returns:
            As `forward`.
        """
        cos_BTd, sin_BTd = _angles(position_BT, frequencies_Bd[:, None], torch.float64 if endless else torch.float32)
        return cos_BTd * self.attention_factor, sin_BTd * self.attention_factor

    def frequencies(self, context: int | Sequence[int]) -> Tensor:
        """Frequencies for contexts of so many tokens.

        Args:
            context: as for `forward`.

        Returns:
            (B, D / 2) fp32; one row where one number is given.
        """
        contexts = [context] if isinstance(context, int) else context
        return torch.stack([self._frequencies(tokens) for tokens in contexts])

    def _frequencies(self, context: int) -> Tensor:
        long = self.long_frequencies_d is not None and context > self.trained
        frequencies_d = self.long_frequencies_d if long else self.frequencies_d
        assert isinstance(frequencies_d, Tensor)
        return frequencies_d


class DynamicRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding whose base grows with the context.

    Args:
        head_dim: D.
        theta: base at the trained context.
        factor: extension factor.
        trained: trained context in tokens.

    Example:
        >>> rope = DynamicRotaryEmbedding(4, 10_000.0, factor=2.0, trained=8)
        >>> bool((rope(torch.tensor([[5]]), context=16)[0] == rope(torch.tensor([[5]]), context=8)[0]).all())
        False
    """

    def __init__(self, head_dim: int, theta: float, *, factor: float, trained: int) -> None:
        super().__init__(default_frequencies(head_dim, theta), trained=trained)
        self.head_dim, self.theta, self.factor = head_dim, theta, factor

    def _frequencies(self, context: int) -> Tensor:
        assert isinstance(self.frequencies_d, Tensor)
        if context <= self.trained:
            return self.frequencies_d
        longer_d = dynamic_frequencies(
            self.head_dim, self.theta, factor=self.factor, trained=self.trained, context=context
        )
        return longer_d.to(self.frequencies_d.device)


def turn(x: Tensor, by: Tensor, frequencies_d: Tensor) -> Tensor:
    """Move keys that have been rotated to other positions.

    Args:
        x: (..., D) after RoPE.
        by: (...) int, how many positions to move each of them.
        frequencies_d: (..., D / 2) radians per token, of as many dimensions as x.

    Returns:
        As x, rounded to its dtype once; exactly x where `by` is 0.

    Source:
        Xiao et al., StreamingLLM, 2023, section 3.2; there, keys are stored before their rotation instead.

    Example:
        >>> from kernels.rope import apply_rope
        >>> rope, x = RotaryEmbedding(default_frequencies(4, 10_000.0)), torch.randn(1, 1, 1, 4)
        >>> at_5, at_7 = (apply_rope(x, *rope(torch.tensor([[position]]))) for position in (5, 7))
        >>> torch.allclose(turn(at_5, torch.tensor([[[2]]]), rope.frequencies_d.view(1, 1, 1, 2)), at_7, atol=1e-6)
        True
    """
    cos, sin = _angles(by, frequencies_d, torch.float64)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _angles(position: Tensor, frequencies_d: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine in fp32 of angles that are made in a dtype."""
    angle_d = position[..., None].to(dtype) * frequencies_d.to(dtype)
    return angle_d.cos().float(), angle_d.sin().float()


def divided(frequencies_d: Tensor, factors: Sequence[float]) -> Tensor:
    """Frequencies divided one by one (LongRoPE's factors, or the factors that a GGUF file stores).

    Args:
        frequencies_d: (D / 2,) unscaled.
        factors: D / 2 divisors.

    Returns:
        (D / 2,) fp32.

    Raises:
        ValueError: the number of factors is not D / 2.

    Example:
        >>> divided(torch.tensor([1.0, 0.5]), (1.0, 2.0))
        tensor([1.0000, 0.2500])
    """
    if len(factors) != len(frequencies_d):
        raise ValueError(f"RoPE has {len(frequencies_d)} frequencies, but {len(factors)} factors are given")
    return frequencies_d / torch.tensor(factors, dtype=torch.float32, device=frequencies_d.device)
