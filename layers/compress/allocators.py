"""How many tokens each KV head may keep of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from layers.compress.scorers import Observation
from layers.options import check_range


class Allocator(Protocol):
    """Turns a mean budget into one integer per (layer, KV head), on the host, before scores are known.

    That is all for most methods. A `SharingAllocator` looks at each layer's scores as well, a `SpreadingAllocator` at
    what all layers show of the prompt.
    """

    def __call__(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """Share the budget out.

        Args:
            budget: mean tokens per KV head, protected ones included.
            prompt: tokens that there are to keep.
            num_layers: L.
            num_kv_heads: H.

        Returns:
            (L, H) int64, each between 1 and `prompt`, `min(budget, prompt) * L * H` in total; published rounding may
            add up to `surplus`.
        """
        ...

    def surplus(self, *, num_layers: int, num_kv_heads: int) -> int:
        """Tokens beyond `budget * L * H` that rounding may give out at most, whatever budget and prompt: 0 if exact."""
        ...

    def of_layers(self, layers: Sequence[int]) -> Allocator:
        """The same for a model that has only some of the layers, in this order."""
        ...


@runtime_checkable
class SharingAllocator(Allocator, Protocol):
    """An allocator with a second stage: on the device, it shares a layer's total out among the layer's KV heads."""

    def share(self, keep_BH: Tensor, score_BHS: Tensor, filled_BHS: Tensor) -> Tensor:
        """Share out what the first stage gave a layer.

        A layer's total is fixed before, so its place in the arena is too, and no shape depends on what is decided here.

        Args:
            keep_BH: int64, what the first stage gave.
            score_BHS: fp32, higher is kept; infinite for tokens that are kept whatever their score.
            filled_BHS: bool, places that hold a token.

        Returns:
            (B, H) int64, each at least 1 and at most the tokens that the head has, per row at most `keep_BH.sum(1)`,
            and as many unless there are fewer tokens.
        """
        ...


@runtime_checkable
class SpreadingAllocator(Allocator, Protocol):
    """An allocator with a second stage: once layers have shown a prompt, it spreads the model's total over them.

    The first stage fixes the total of a row. Decisions are made on the host, which waits for every layer's preference
    while a prompt is taken in, and never while decoding. All heads of a layer keep the same number.
    """

    @property
    def cascade(self) -> bool:
        """Whether layers are cut as soon as later ones claim their part, rather than when all have been seen."""
        ...

    def preference(self, seen: Observation) -> Tensor:
        """How much a layer wants.

        Args:
            seen: the layer's tokens.

        Returns:
            (B,) float64, >= 0, of each row by itself; 0 where a row has no new token.
        """
        ...

    def spread(self, preference_BL: Tensor, *, total_B: Tensor, least_BL: Tensor, most_BL: Tensor) -> Tensor:
        """Spread what there is over the layers seen so far. Everything is on the host.

        When further layers join, no budget may grow by more than one token: it was cut by what it got before.

        Args:
            preference_BL: float64, of as many layers as have been seen.
            total_B: int64, tokens for one KV head of each of these layers together.
            least_BL: int64, tokens per head that are protected, in all no more than the total.
            most_BL: int64, tokens per head that there are, at least as many.

        Returns:
            (B, L) int64, each from `least_BL` to `most_BL`, per row as many as the total unless there are fewer tokens.
        """
        ...


@dataclass(frozen=True)
class Uniform:
    """The same for every head.

    Example:
        >>> Uniform()(budget=8, prompt=100, num_layers=1, num_kv_heads=2).tolist()
        [[8, 8]]
    """

    def __call__(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """Give every head the budget, or the prompt if that is shorter."""
        return torch.full((num_layers, num_kv_heads), min(budget, prompt))

    def surplus(self, *, num_layers: int, num_kv_heads: int) -> int:
        """None."""
        return 0

    def of_layers(self, layers: Sequence[int]) -> Uniform:
        """The same: every layer is treated alike."""
        return self


def uniform(*, least: int) -> Uniform:
    """The same for every head, whatever each gets at least.

    Example:
        >>> uniform(least=4)
        Uniform()
    """
    return Uniform()


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadImportance:
    """HeadKV's allocation: a floor for every head and a common pool shared out by importance.

    With b = budget - least, every head has the floor b (1 - 1/beta); the pool of b/beta per head goes to head h in
    proportion to its score. A larger beta means a *smaller* pool. No head gets more than the prompt: what it cannot use
    flows to the others in proportion to their scores. Totals are exact (largest remainder).

    Args:
        importance_LN: score of each query head, >= 0; a KV head has its group's mean; all zero means uniform.
        beta: >= 1.
        least: tokens that every head gets, whatever it deserves: room for sinks and recent ones.
        compat: the published code's arithmetic: pool of b // beta, no redistribution, totals only up to rounding.

    Raises:
        ValueError: beta is below 1.

    Source:
        Fu et al., Not All Heads Matter (HeadKV), ICLR 2025, equation 4.

    Example:
        >>> share = HeadImportance(importance_LN=torch.tensor([[3.0, 1.0]]), beta=2.0, least=2)
        >>> share(budget=10, prompt=100, num_layers=1, num_kv_heads=2).tolist()
        [[12, 8]]
    """

    importance_LN: Tensor
    beta: float
    least: int
    compat: bool = False

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 1)

    def __call__(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """Share the budget out; the scores must be those of a model with as many layers and a multiple of its KV heads.

        Raises:
            ValueError: they are not.
        """
        layers, heads = self.importance_LN.shape
        if layers != num_layers or heads % num_kv_heads:
            raise ValueError(
                f"importance scores are for {layers} layers of {heads} query heads, "
                f"the model has {num_layers} layers of {num_kv_heads} KV heads"
            )
        if prompt <= budget:
            return torch.full((num_layers, num_kv_heads), prompt)
        score = self.importance_LN.double().unflatten(1, (num_kv_heads, -1)).mean(-1).flatten()
        score = score / score.sum() if score.sum() > 0 else torch.full_like(score, 1 / len(score))
        free = budget - self.least
        if self.compat:
            donated = free // self.beta
            extra = (score * (donated * len(score)) + (free - donated)).round().long()
            return (extra.clamp(max=prompt - self.least) + self.least).view(num_layers, num_kv_heads)
        floor = free * (1 - 1 / self.beta)
        wanted = water_fill(floor + score * (free / self.beta * len(score)), score, prompt - self.least)
        return (largest_remainder(wanted, free * len(score)) + self.least).view(num_layers, num_kv_heads)

    def surplus(self, *, num_layers: int, num_kv_heads: int) -> int:
        """Half a token per head if published rounding is asked for."""
        return num_layers * num_kv_heads // 2 if self.compat else 0

    def of_layers(self, layers: Sequence[int]) -> HeadImportance:
        """The importance of these layers' heads among each other."""
        return replace(self, importance_LN=self.importance_LN[list(layers)])


@dataclass(frozen=True, kw_only=True)
class Pyramid:
    """PyramidKV's allocation: the same for all heads of a layer, falling from layer to layer in equal steps.

    With b = budget - least, the last layer has b/beta and the first 2b - b/beta. No layer gets more than the
    prompt: what the first cannot use makes the slope less steep. Totals are exact (largest remainder).

    Args:
        beta: >= 1; larger is steeper, 1 is uniform.
        least: tokens that every head gets, whatever it deserves: room for sinks and recent ones.
        compat: the published code's arithmetic: b // beta, a step of whole tokens, totals only up to rounding, and
            uniform budgets for prompts of fewer than 2b tokens.

    Raises:
        ValueError: beta is below 1.

    Source:
        Cai et al., PyramidKV, 2024.

    Example:
        >>> share = Pyramid(beta=10, least=2)
        >>> share(budget=12, prompt=100, num_layers=3, num_kv_heads=1).tolist()
        [[21], [12], [3]]
    """

    beta: float
    least: int
    compat: bool = False

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 1)

    def __call__(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """Share the budget out."""
        free, ceiling = budget - self.least, prompt - self.least
        if prompt <= budget or num_layers == 1 or (self.compat and prompt < 2 * free):
            return Uniform()(budget=budget, prompt=prompt, num_layers=num_layers, num_kv_heads=num_kv_heads)
        last = free // self.beta if self.compat else free / self.beta
        first = min(2 * free - last, ceiling)
        step = (2 * first - 2 * free) / (num_layers - 1)
        share = first - (step // 1 if self.compat else step) * torch.arange(num_layers, dtype=torch.float64)
        keep = share.long() if self.compat else largest_remainder(share, free * num_layers)
        return (keep + self.least)[:, None].repeat(1, num_kv_heads)

    def surplus(self, *, num_layers: int, num_kv_heads: int) -> int:
        """What the steps' fractions come to if published rounding is asked for."""
        return num_kv_heads * num_layers * max(0, num_layers - 2) // 2 if self.compat else 0

    def of_layers(self, layers: Sequence[int]) -> Pyramid:
        """The same: only a layer's rank counts."""
        return self


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerErrors:
    """CompressKV's allocation: the same for all heads of a layer, more where compressing does more harm.

    With budget C, T = C L for L layers, errors e that add up to 1, floor m and ceiling M, layer l has
    clip(m + round(e_l (T - m L)), m, M). What the total T still lacks goes to layers below M one token at a time, the
    largest error first, again and again; what is too much is taken from layers above m, the smallest error first.
    Totals are exact.

    Args:
        error_L: harm done by compressing each layer, >= 0; all zero means uniform.
        floor: m, tokens that every layer keeps, at least `least` in effect and never more than the budget.
        ceiling: M in budgets, >= 1; no layer gets more than the prompt either.
        least: tokens that every head gets, whatever it deserves: room for sinks and recent ones.

    Raises:
        ValueError: a ceiling below 1, **or** a negative floor.

    Source:
        CompressKV, 2025, section on error-aware layer budgets.

    Example:
        >>> share = LayerErrors(error_L=torch.tensor([0.1, 0.6, 0.3]), floor=8, ceiling=3.0, least=4)
        >>> share(budget=18, prompt=100, num_layers=3, num_kv_heads=1).tolist()
        [[11], [26], [17]]
    """

    error_L: Tensor
    floor: int
    ceiling: float
    least: int

    def __post_init__(self) -> None:
        check_range("floor", self.floor, 0)
        check_range("ceiling", self.ceiling, 1)

    def __call__(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """Share the budget out; the errors must be those of a model with as many layers.

        Raises:
            ValueError: they are not.
        """
        if len(self.error_L) != num_layers:
            raise ValueError(f"layer errors are for {len(self.error_L)} layers, the model has {num_layers}")
        if prompt <= budget:
            return torch.full((num_layers, num_kv_heads), prompt)
        least = min(max(self.floor, self.least), budget)
        most = int(min(self.ceiling * budget, prompt))
        error_L = self.error_L.double()
        error_L = error_L / error_L.sum() if error_L.sum() > 0 else torch.full_like(error_L, 1 / num_layers)
        keep_L = (least + (error_L * (budget - least) * num_layers).round()).clamp(least, most).long()
        missing = budget * num_layers - int(keep_L.sum())
        order = error_L.argsort(stable=True, descending=missing > 0)
        if missing > 0:
            keep_L[order] += in_turns(missing, most - keep_L[order])
        else:
            keep_L[order] -= in_turns(-missing, keep_L[order] - least)
        return keep_L[:, None].repeat(1, num_kv_heads)

    def surplus(self, *, num_layers: int, num_kv_heads: int) -> int:
        """None."""
        return 0

    def of_layers(self, layers: Sequence[int]) -> LayerErrors:
        """The errors of these layers among each other."""
        return replace(self, error_L=self.error_L[list(layers)])


@dataclass(frozen=True, kw_only=True)
class LayerTopK:
    """Ada-KV's allocation: the best tokens of a layer, whichever heads they are in, and some of every head.

    Every layer has the same total. With b = budget - least, each head is given its best alpha b tokens first; what
    is left of the layer's total goes to the best of all others. Protected tokens are kept on top. Equal scores are
    settled by place, then by head.

    Args:
        alpha: share of the budget that no head can lose, 0 to 1; 1 is uniform.
        least: tokens that every head gets, whatever it deserves: room for sinks and recent ones.
        compat: the published code's arithmetic: the best H b tokens of the layer are counted per head first, and a head
            with c of them keeps round((1 - alpha) c + floor(alpha b)); totals only up to rounding.

    Raises:
        ValueError: alpha is not between 0 and 1.

    Source:
        Feng et al., Ada-KV, NeurIPS 2025.

    Example:
        >>> score, filled = torch.tensor([[[9.0, 8, 7, 6], [5, 1, 1, 1]]]), torch.ones(1, 2, 4, dtype=torch.bool)
        >>> LayerTopK(alpha=0.5, least=0).share(torch.tensor([[2, 2]]), score, filled).tolist()
        [[3, 1]]
    """

    alpha: float
    least: int
    compat: bool = False

    def __post_init__(self) -> None:
        check_range("alpha", self.alpha, 0, 1)

    def __call__(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """Give every layer the same total: that of equal heads, and room for published rounding."""
        keep = Uniform()(budget=budget, prompt=prompt, num_layers=num_layers, num_kv_heads=num_kv_heads)
        if self.compat and prompt > budget:
            keep[:, : num_kv_heads // 2] += 1
        return keep

    def surplus(self, *, num_layers: int, num_kv_heads: int) -> int:
        """Half a token per head if published rounding is asked for."""
        return num_layers * (num_kv_heads // 2) if self.compat else 0

    def of_layers(self, layers: Sequence[int]) -> LayerTopK:
        """The same: every layer is treated alike."""
        return self

    def share(self, keep_BH: Tensor, score_BHS: Tensor, filled_BHS: Tensor) -> Tensor:
        """Share a layer's total out."""
        H, device = keep_BH.shape[1], keep_BH.device
        budget_B1 = keep_BH[:, -1:]  # the last head's number has no room for rounding
        free_B1 = (budget_B1 - self.least).clamp(min=0)
        floor_B1 = (self.alpha * free_B1.double()).floor().long()
        protected_BH, held_BH = (score_BHS.isposinf() & filled_BHS).sum(-1), filled_BHS.sum(-1)
        safe_BH = torch.maximum(protected_BH, torch.minimum(protected_BH + floor_B1, budget_B1))
        total_B1 = keep_BH.sum(1, keepdim=True)
        if self.compat:
            safe_BH, total_B1 = protected_BH, protected_BH.sum(1, keepdim=True) + free_B1 * H

        # All places of the layer (X = S H), best first, and in what order each head's own are among them.
        order_BX = score_BHS.transpose(1, 2).flatten(1).argsort(dim=1, descending=True, stable=True)
        filled_BX = filled_BHS.transpose(1, 2).flatten(1).gather(1, order_BX)
        mine_BHX = (order_BX[:, None] % H == torch.arange(H, device=device)[:, None]) & filled_BX[:, None]
        safe_BHX = mine_BHX & (mine_BHX.cumsum(-1) <= safe_BH[..., None])
        rest_BX = filled_BX & ~safe_BHX.any(1)
        won_BX = rest_BX & (rest_BX.cumsum(-1) <= total_B1 - safe_BHX.sum((1, 2))[:, None])
        count_BH = (safe_BHX | mine_BHX & won_BX[:, None]).sum(-1)
        if not self.compat:
            return count_BH
        mixed_BH = ((1 - self.alpha) * (count_BH - protected_BH).double() + floor_B1).round().long() + protected_BH
        fits_B1 = held_BH.sum(1, keepdim=True) <= budget_B1 * H
        return torch.where(fits_B1, held_BH, torch.minimum(mixed_BH, held_BH))


@dataclass(frozen=True, kw_only=True)
class LayerPreference:
    """CAKE's allocation: the same for all heads of a layer, more for layers with dispersed and shifting attention.

    The preference of a layer is P = H^(1/tau1) V^(1/tau2). H = -sum A ln A and V = sum_j Var_i A_ij go over the
    attention A of the last queries i to all tokens j that are not protected, of all query heads. Beyond its protected
    tokens a layer gets a part of the model's total in proportion to P, at most the tokens there are; what it cannot use
    goes to the others in proportion to theirs. So every budget is min(cap, x P) with one x for all layers, which only
    falls as layers join: cutting layers early changes nothing. Totals are exact (largest remainder).

    Args:
        window: last queries that observe, >= 1.
        tau1: temperature of the dispersion, >= 0.1; larger makes layers more equal.
        tau2: temperature of the shift, >= 0.1.
        cascade: cut layers as soon as later ones claim their part; otherwise everything is held until the last layer.
        compat: the published code's arithmetic: parts are cut to whole tokens, what is beyond the cap is shared equally
            in a single round, and so is what is missing in the end. A layer may be left with more than there is, and
            one that was cut may be given back what it has lost: then fewer tokens are kept than the total.

    Raises:
        ValueError: the window or a temperature is too small.

    Source:
        Qin et al., CAKE, ICLR 2025.

    Example:
        >>> spreading, one = LayerPreference(), torch.ones(1, 3, dtype=torch.int64)
        >>> wants = torch.tensor([[6.0, 3.0, 1.0]], dtype=torch.float64)
        >>> spreading.spread(wants, total_B=torch.tensor([23]), least_BL=one, most_BL=11 * one).tolist()
        [[11, 9, 3]]
    """

    window: int = 32
    tau1: float = 1.0
    tau2: float = 1.0
    cascade: bool = True
    compat: bool = False

    def __post_init__(self) -> None:
        check_range("window", self.window, 1)
        check_range("tau1", self.tau1, 0.1)
        check_range("tau2", self.tau2, 0.1)

    def __call__(self, *, budget: int, prompt: int, num_layers: int, num_kv_heads: int) -> Tensor:
        """Give every head the same: only the total counts."""
        return Uniform()(budget=budget, prompt=prompt, num_layers=num_layers, num_kv_heads=num_kv_heads)

    def surplus(self, *, num_layers: int, num_kv_heads: int) -> int:
        """None, nor with published rounding, which gives out too little."""
        return 0

    def of_layers(self, layers: Sequence[int]) -> LayerPreference:
        """The same: what a layer wants is seen in a prompt."""
        return self

    def preference(self, seen: Observation) -> Tensor:
        """Dispersion and shift of the layer's attention."""
        group = seen.q_BTND.shape[2] // seen.k_BHSD.shape[1]
        # In float64, as the powers would leave fp32's range.
        dispersion_B, shift_B = (
            group * seen.attention(self.window, rows=rows).sum((1, 2), dtype=torch.float64)
            for rows in ("entropy", "variance")
        )
        return dispersion_B ** (1 / self.tau1) * shift_B ** (1 / self.tau2)

    def spread(self, preference_BL: Tensor, *, total_B: Tensor, least_BL: Tensor, most_BL: Tensor) -> Tensor:
        """Spread a total over layers."""
        rows = zip(preference_BL, total_B.tolist(), least_BL, most_BL, strict=True)
        return torch.stack([self._spread_row(*row) for row in rows])

    def _spread_row(self, preference_L: Tensor, total: int, least_L: Tensor, most_L: Tensor) -> Tensor:
        free, ceiling_L = total - int(least_L.sum()), most_L - least_L
        if free >= int(ceiling_L.sum()):
            return most_L
        weight_L = preference_L if preference_L.sum() > 0 else torch.ones_like(preference_L)
        wanted_L = weight_L / weight_L.sum() * free
        if not self.compat:
            return least_L + largest_remainder(water_fill(wanted_L, weight_L, ceiling_L), free)
        share_L = wanted_L.long().minimum(ceiling_L)
        has_room_L = share_L < ceiling_L
        share_L[has_room_L] += _evenly(int((wanted_L.long() - share_L).sum()), int(has_room_L.sum()))
        share_L += _evenly(free - int(share_L.sum()), len(share_L))
        return least_L + share_L.minimum(ceiling_L)


def _evenly(total: int, parts: int) -> Tensor:
    """A total in equal whole parts, the first ones larger by 1 where it does not divide."""
    return total // parts + (torch.arange(parts) < total % parts).long()


def water_fill(wanted: Tensor, weight: Tensor, ceiling: float | Tensor) -> Tensor:
    """Cap shares at a ceiling and hand the excess to the rest in proportion to their weights.

    When every weight left is zero the excess is shared equally.

    Args:
        wanted: (n,) float64 shares, >= 0.
        weight: (n,) float64, >= 0.
        ceiling: largest share, of all or (n,) of each; the total must fit: wanted.sum() <= n * ceiling.

    Returns:
        (n,) float64 with the same sum, none above the ceiling.

    Example:
        >>> water_fill(torch.tensor([9.0, 2.0, 1.0]), torch.tensor([3.0, 2.0, 1.0]), 6.0).tolist()
        [6.0, 4.0, 2.0]
    """
    share = wanted.clone()
    most = torch.as_tensor(ceiling, dtype=share.dtype)
    while (excess := (share - most).clamp(min=0).sum()) > 1e-9:
        share = share.minimum(most)
        is_open = share < most
        open_weight = weight * is_open if (weight * is_open).sum() > 0 else is_open.double()
        share = share + excess * open_weight / open_weight.sum()
    return share


def largest_remainder(share: Tensor, total: int) -> Tensor:
    """Round shares to integers with an exact total; equal remainders favour the earlier share.

    Args:
        share: (n,) float64, >= 0, whose sum is `total` up to rounding error.
        total: what the integers add up to.

    Returns:
        (n,) int64, each the floor or the ceiling of its share.

    Example:
        >>> largest_remainder(torch.tensor([1.5, 1.25, 1.25], dtype=torch.float64), 4).tolist()
        [2, 1, 1]
    """
    share = (share * 2**20).round() / 2**20
    whole = share.floor()
    missing = total - int(whole.sum())
    first = (share - whole).argsort(descending=True, stable=True)[:missing]
    whole[first] += 1
    return whole.long()


def in_turns(count: int, room: Tensor) -> Tensor:
    """Deal out tokens one at a time, round after round, to everyone who still has room.

    Args:
        count: tokens, at most `room.sum()`.
        room: (n,) int64, the most that each can take, >= 0.

    Returns:
        (n,) int64, `count` in total; in an unfinished round the first have one more.

    Example:
        >>> in_turns(6, torch.tensor([1, 5, 3])).tolist()
        [1, 3, 2]
    """
    given = torch.zeros_like(room)
    while count:
        takers = (given < room).nonzero().flatten()[:count]
        rounds = min(count // len(takers), int((room - given)[takers].min()))
        given[takers] += rounds
        count -= rounds * len(takers)
    return given
