"""How much each stored token matters to each KV head."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rope import apply_rope
from kernels.window_scores import window_scores
from layers.compress.sentences import spread_within_sentences
from layers.linear import Linear
from layers.options import check_range

_FARTHEST = 2**20  # beyond all contexts, and angles are still numbers


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one layer shows of a prompt, or of a chunk or later turn of one, to whoever judges its tokens.

    Args:
        q_BTND: queries of the new tokens, after RoPE.
        position_BT: int32 absolute positions of the new tokens, -1 where there is none; padding is on the right.
        k_BHSD: keys of all tokens, stored and new, after RoPE, in order of position.
        v_BHSD: their values.
        pos_BHS: int32 absolute positions of all tokens, -1 where empty.
        protected_BHS: bool; tokens that are kept whatever their score, so that it must not spread to their neighbours.
        sliding: the model's sliding window in tokens, or None.
        layer: index of the layer.
        out: the layer's output projection; None where nobody gave it.
        frequencies_Bd: angular frequencies of RoPE in radians per token; None where nobody gave them.
        sums_BHS: fp32, what decoding has added up for each stored token, 0 for new ones; None where nothing is.
        ends_BHS: bool, tokens that end a sentence; None where nobody said.
        lse_BTN: fp32, logarithms of the new queries' sums of exponentials, see `ragged_prefill_lse`; None where nobody
            kept them.

    Example:
        >>> x, pos = torch.arange(3.0).view(1, 3, 1, 1), torch.arange(3, dtype=torch.int32)[None]
        >>> seen = {"k_BHSD": x, "v_BHSD": x, "pos_BHS": pos[None], "protected_BHS": pos[None] > 1, "sliding": None}
        >>> q, position = Observation(q_BTND=x, position_BT=pos, layer=0, **seen).last(2)
        >>> q.flatten().tolist(), position.tolist()
        ([1.0, 2.0], [[1, 2]])
    """

    q_BTND: Tensor
    position_BT: Tensor
    k_BHSD: Tensor
    v_BHSD: Tensor
    pos_BHS: Tensor
    protected_BHS: Tensor
    sliding: int | None
    layer: int
    out: Linear | None = None
    frequencies_Bd: Tensor | None = None
    sums_BHS: Tensor | None = None
    ends_BHS: Tensor | None = None
    lse_BTN: Tensor | None = None
    _known: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def last(self, window: int) -> tuple[Tensor, Tensor]:
        """The last new queries of every row, fewer if there are fewer.

        Args:
            window: how many, W.

        Returns:
            Queries (B, W, N, D), and their positions (B, W), -1 where a row has none.
        """
        rows, tokens = self.position_BT.shape
        window = min(window, tokens)
        new_B1 = (self.position_BT >= 0).sum(1, keepdim=True)
        index_BW = new_B1 - window + torch.arange(window, device=new_B1.device)
        row_B1 = torch.arange(rows, device=new_B1.device)[:, None]
        position_BW = self.position_BT.gather(1, index_BW.clamp(min=0)).masked_fill(index_BW < 0, -1)
        return self.q_BTND[row_B1, index_BW.clamp(min=0)], position_BW

    def attention(
        self, window: int, *, rows: str = "mean", group: str = "mean", ahead: int = 0, behind: int = 0
    ) -> Tensor:
        """How the last queries attend to each token, 0 for protected ones; see `kernels.window_scores`.

        Computed once, as scores and budgets may both ask: whoever changes the result copies it first.

        Args:
            window: how many queries, W.
            rows: how their weights are reduced.
            group: "mean" or "max" over the query heads that share a KV head.
            ahead: tokens after a hot one that share its score.
            behind: tokens before a hot one that share its score.

        Returns:
            (B, H, S) fp32.
        """
        asked = window, rows, group, ahead, behind
        if asked not in self._known:
            q_BWND, position_BW = self.last(window)
            self._known[asked] = window_scores(
                q_BWND,
                self.k_BHSD,
                self.pos_BHS,
                position_BW,
                rows=rows,
                group=group,
                ahead=ahead,
                behind=behind,
                protected_BHS=self.protected_BHS,
                window=self.sliding,
            )
        return self._known[asked]


class Scorer(Protocol):
    """Gives every stored token of every KV head a number; higher is kept."""

    def __call__(self, seen: Observation) -> Tensor:
        """Score.

        Args:
            seen: a layer's tokens and what it knows of them.

        Returns:
            (B, H, S) fp32; what it says of empty places and protected tokens does not matter.

        Raises:
            ValueError: the observation lacks what this needs.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class WindowAttention:
    """Attention from the observation window, spread over neighbours by pooling.

    A token's score is the largest, or the mean, of what is found from `ahead` tokens before it to `behind` tokens after
    it: a hot token protects `ahead` tokens that follow it. A centred kernel of 7 is ahead = behind = 3. A mean counts
    protected tokens and those beyond the ends as zeros. If spreading stops with the sentence, a hot token protects at
    most what follows up to the sentence's end, and at least `always` tokens.

    Args:
        window: queries that observe, >= 1.
        rows: "mean" or "max" over the observing queries.
        group: "mean" or "max" over the query heads that share a KV head.
        ahead: tokens after a hot one that share its score, >= 0.
        behind: tokens before a hot one that share its score, >= 0.
        pooling: "max" or "mean" over neighbours.
        stop: "sentence" if scores do not spread beyond a sentence's end; otherwise "none".
        always: tokens after a hot one that share its score even if a sentence ends in between, >= 0.

    Source:
        Li et al., SnapKV, 2024, section 4; stopping with the sentence is ours.

    Example:
        >>> k, pos = torch.tensor([9.0, 0, 0, 0]).view(1, 1, 4, 1), torch.arange(4, dtype=torch.int32).view(1, 1, 4)
        >>> new = {"q_BTND": torch.ones(1, 1, 1, 1), "position_BT": pos[0, :, 3:], "protected_BHS": pos >= 3}
        >>> seen = Observation(k_BHSD=k, v_BHSD=k, pos_BHS=pos, sliding=None, layer=0, **new)
        >>> (WindowAttention(window=1, ahead=1, behind=0)(seen) > 0.9).tolist()
        [[[True, True, False, False]]]
    """

    window: int
    rows: Literal["mean", "max"] = "mean"
    group: Literal["mean", "max"] = "mean"
    ahead: int = 3
    behind: int = 3
    pooling: Literal["max", "mean"] = "max"
    stop: Literal["none", "sentence"] = "none"
    always: int = 0

    def __call__(self, seen: Observation) -> Tensor:
        """Score by attention.

        Raises:
            ValueError: spreading stops with the sentence, and nobody said where sentences end.
        """
        stops = self.stop == "sentence"
        if stops and seen.ends_BHS is None:
            raise ValueError(
                "stop=sentence needs to know where sentences end: give PromptPass ends_BT, as SentenceEnds makes them "
                "from token ids (see layers/compress/sentences.py), or take a preset other than adaptive"
            )
        pools_max = self.pooling == "max" and not stops
        score_BHS = seen.attention(
            self.window,
            rows=self.rows,
            group=self.group,
            ahead=self.ahead if pools_max else 0,
            behind=self.behind if pools_max else 0,
        )
        if stops and seen.ends_BHS is not None:
            reach = {"ahead": self.ahead, "behind": self.behind, "always": self.always}
            return spread_within_sentences(score_BHS, seen.ends_BHS, **reach)
        if pools_max:
            return score_BHS
        padded = torch.nn.functional.pad(score_BHS, (self.ahead, self.behind))
        return torch.nn.functional.avg_pool1d(padded, self.ahead + 1 + self.behind, stride=1)


@dataclass(frozen=True, kw_only=True)
class LayerMean:
    """One score for all KV heads of a layer: the mean of another scorer's.

    Args:
        scorer: scores each head.

    Example:
        >>> k, pos = torch.tensor([[9.0, 0], [0, 0]])[..., None].unsqueeze(0), torch.tensor([[[0, 1], [0, 1]]]).int()
        >>> seen = {"k_BHSD": k, "v_BHSD": k, "pos_BHS": pos, "protected_BHS": pos < 0, "sliding": None, "layer": 0}
        >>> seen = Observation(q_BTND=torch.ones(1, 1, 2, 1), position_BT=torch.tensor([[1]]).int(), **seen)
        >>> LayerMean(scorer=WindowAttention(window=1, ahead=0, behind=0))(seen).round(decimals=2).tolist()
        [[[0.75, 0.25], [0.75, 0.25]]]
    """

    scorer: Scorer

    def __call__(self, seen: Observation) -> Tensor:
        """Score by the mean."""
        score_BHS = self.scorer(seen)
        return score_BHS.mean(1, keepdim=True).expand_as(score_BHS)


@dataclass(frozen=True)
class AttentionSums:
    """The attention that all queries together pay to a token, as a mean over the query heads of a group.

    A stored token begins with what the cache has added up for it.

    Source:
        Zhang et al., H2O, 2023.

    Example:
        >>> k, pos = torch.zeros(1, 1, 2, 1), torch.tensor([[[0, 1]]]).int()
        >>> seen = {"k_BHSD": k, "v_BHSD": k, "pos_BHS": pos, "protected_BHS": pos < 0, "sliding": None, "layer": 0}
        >>> AttentionSums()(Observation(q_BTND=k.transpose(1, 2), position_BT=pos[0], **seen)).tolist()
        [[[1.5, 0.5]]]
    """

    def __call__(self, seen: Observation) -> Tensor:
        """Score by sums."""
        T, S = seen.q_BTND.shape[1], seen.k_BHSD.shape[2]
        sum_BHS = torch.zeros(seen.pos_BHS.shape, dtype=torch.float32, device=seen.q_BTND.device)
        nowhere_BHS = torch.zeros_like(seen.pos_BHS, dtype=torch.bool)
        for start in range(0, T, _QUERIES):
            new, sees = slice(start, start + _QUERIES), slice(S - T + min(start + _QUERIES, T))  # none sees newer keys
            position_BW = seen.position_BT[:, new]
            mean_BHS = window_scores(
                seen.q_BTND[:, new],
                seen.k_BHSD[:, :, sees],
                seen.pos_BHS[:, :, sees],
                position_BW,
                rows="mean",
                group="mean",
                ahead=0,
                behind=0,
                protected_BHS=nowhere_BHS[:, :, sees],
                window=seen.sliding,
                lse_BWN=None if seen.lse_BTN is None else seen.lse_BTN[:, new],
            )
            sum_BHS[:, :, sees] += mean_BHS * (position_BW >= 0).sum(1)[:, None, None]
        return sum_BHS if seen.sums_BHS is None else sum_BHS + seen.sums_BHS


_QUERIES = 1024
"""How many queries `AttentionSums` looks at together: what PyTorch holds of their weights stays bounded."""


@dataclass(frozen=True, kw_only=True)
class VaryingAttention:
    """Attention from the observation window and how much it varies there, averaged over neighbours.

    Args:
        window: queries that observe, >= 1.
        gamma: weight of the variance, >= 0.
        pool: tokens over which scores are averaged, odd; places beyond either end count as 0.

    Raises:
        ValueError: one of them is out of range.

    Source:
        Qin et al., CAKE, ICLR 2025, equation of the eviction indicator.

    Example:
        >>> k, pos = torch.tensor([9.0, 0, 0]).view(1, 1, 3, 1), torch.arange(3, dtype=torch.int32).view(1, 1, 3)
        >>> q = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)  # the second query looks at the first token alone
        >>> new = {"q_BTND": q, "position_BT": pos[0, :, 1:], "protected_BHS": pos >= 2}
        >>> seen = Observation(k_BHSD=k, v_BHSD=k, pos_BHS=pos, sliding=None, layer=0, **new)
        >>> [VaryingAttention(window=2, gamma=gamma, pool=1)(seen)[0, 0, 0].item() for gamma in (0, 8)]  # mean, .75
        [0.749..., 1.748...]
    """

    window: int
    gamma: float = 200.0
    pool: int = 5

    def __post_init__(self) -> None:
        check_range("window", self.window, 1)
        check_range("gamma", self.gamma, 0, below=math.inf)
        check_range("pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be odd, not {self.pool}")

    def __call__(self, seen: Observation) -> Tensor:
        """Score by attention and its variance."""
        mean_BHS, variance_BHS = (seen.attention(self.window, rows=rows) for rows in ("mean", "variance"))
        score_BHS = mean_BHS + self.gamma * variance_BHS
        return F.avg_pool1d(score_BHS, self.pool, stride=1, padding=self.pool // 2)


@dataclass(frozen=True)
class Position:
    """The later, the better.

    Source:
        Xiao et al., StreamingLLM, 2023: with protected sinks, only recency decides.

    Example:
        >>> k, pos = torch.zeros(1, 1, 3, 1), torch.tensor([[[0, 1, 2]]])
        >>> seen = {"k_BHSD": k, "v_BHSD": k, "pos_BHS": pos, "protected_BHS": pos < 0, "sliding": None, "layer": 0}
        >>> Position()(Observation(q_BTND=k.transpose(1, 2), position_BT=pos[0], **seen)).tolist()
        [[[0.0, 1.0, 2.0]]]
    """

    def __call__(self, seen: Observation) -> Tensor:
        """Score by position."""
        return seen.pos_BHS.float()


@dataclass(frozen=True)
class KeyDifference:
    """The less a key resembles the others of its head, the better.

    The score is minus the cosine between a key and the anchor, the mean of the head's normalised keys. It looks at no
    query. Keys are those that are stored, after RoPE, protected ones included.

    Source:
        Park et al., KeyDiff, 2025.

    Example:
        >>> k, pos = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]).view(1, 1, 3, 2), torch.tensor([[[0, 1, 2]]])
        >>> seen = {"k_BHSD": k, "v_BHSD": k, "pos_BHS": pos, "protected_BHS": pos < 0, "sliding": None, "layer": 0}
        >>> KeyDifference()(Observation(q_BTND=k.transpose(1, 2), position_BT=pos[0], **seen)).argmax().item()
        2
    """

    def __call__(self, seen: Observation) -> Tensor:
        """Score by difference."""
        # Anything may be in an empty place, NaN included.
        k_BHSD = seen.k_BHSD.masked_fill((seen.pos_BHS < 0)[..., None], 0)
        unit_BHSD = torch.nn.functional.normalize(k_BHSD.float(), dim=-1)
        # The cosine does not care whether the anchor is a mean or a sum.
        anchor_BHD = torch.nn.functional.normalize(unit_BHSD.sum(2), dim=-1)
        return -(unit_BHSD @ anchor_BHD[..., None]).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class ChosenHeads:
    """What a few query heads of each layer attend to, one score for all of its KV heads.

    Every chosen head scores tokens by itself, then its scores are reduced over the chosen heads. A token that a chosen
    head does not hold any more gets 0 from it.

    Args:
        heads: of each layer, its chosen query heads.
        attention: how one of them scores.
        group: "mean" or "max" over the chosen heads.

    Source:
        CompressKV, 2025, section on token selection by semantic retrieval heads.

    Example:
        >>> k = torch.tensor([[9.0, 0, 0], [0, 9, 0]]).view(1, 2, 3, 1)
        >>> pos = torch.arange(3, dtype=torch.int32).expand(1, 2, 3)
        >>> new = {"q_BTND": torch.ones(1, 1, 2, 1), "position_BT": pos[:, 0, 2:], "protected_BHS": pos >= 2}
        >>> seen = Observation(k_BHSD=k, v_BHSD=k, pos_BHS=pos, sliding=None, layer=0, **new)
        >>> (ChosenHeads(heads=((1,),), attention=WindowAttention(window=1, ahead=0, behind=0))(seen) > 0.9).tolist()
        [[[False, True, False], [False, True, False]]]
    """

    heads: tuple[tuple[int, ...], ...]
    attention: WindowAttention
    group: Literal["mean", "max"] = "mean"

    def __call__(self, seen: Observation) -> Tensor:
        """Score by the chosen heads' attention."""
        heads, group = self.heads[seen.layer], seen.q_BTND.shape[2] // seen.k_BHSD.shape[1]

        def of_chosen(x_BH: Tensor) -> Tensor:
            return torch.stack([x_BH[:, head // group] for head in heads], dim=1)

        alone = replace(
            seen,
            q_BTND=torch.stack([seen.q_BTND[:, :, head] for head in heads], dim=2),
            k_BHSD=of_chosen(seen.k_BHSD),
            v_BHSD=of_chosen(seen.v_BHSD),
            pos_BHS=of_chosen(seen.pos_BHS),
            protected_BHS=of_chosen(seen.protected_BHS),
            ends_BHS=None if seen.ends_BHS is None else of_chosen(seen.ends_BHS),
        )
        vote_BKS = self.attention(alone)
        if seen.pos_BHS.stride(1) == 0:  # all KV heads hold the same tokens
            return self._together(vote_BKS)[:, None].expand_as(seen.pos_BHS)
        return self._together(_at(seen.pos_BHS.flatten(1), vote_BKS, alone.pos_BHS)).view_as(seen.pos_BHS)

    def _together(self, vote_BKX: Tensor) -> Tensor:
        return vote_BKX.amax(1) if self.group == "max" else vote_BKX.mean(1)


def _at(wanted_BX: Tensor, number_BKS: Tensor, pos_BKS: Tensor) -> Tensor:
    """What each of K rows says at X positions, (B, K, X): its number at the same position, 0 if it has none there."""
    ordered_BKS = pos_BKS.cummax(-1).values  # but for empty places behind the last token, positions are in order
    wanted_BKX = wanted_BX[:, None].expand(-1, pos_BKS.shape[1], -1).contiguous()
    at_BKX = torch.searchsorted(ordered_BKS, wanted_BKX).clamp(max=pos_BKS.shape[-1] - 1)
    return number_BKS.gather(-1, at_BKX).masked_fill(ordered_BKS.gather(-1, at_BKX) != wanted_BKX, 0.0)


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention:
    """The attention that queries to come will pay if they are like those so far, times the size of the value.

    Queries of a head, before rotation, are taken for samples of a normal distribution. Those to come are turned by the
    average of the rotations at the next positions. What multiplies RoPE's sines and cosines in some scalings is in the
    queries at hand already, so it needs no mention.

    Args:
        sinks: first tokens of the sequence, whose queries are not like others and do not count.
        future: positions to come that rotations are averaged over, 1 to 2**20.
        epsilon: added to the expected attention before it is multiplied.
        use_vnorm: multiply by the value's length.
        compat: the published code: the first tokens do not share in the softmax.

    Raises:
        ValueError: `future` is out of range, **or** `epsilon` is not a number from 0 on.

    Source:
        Devoto et al., Expected Attention, 2025.

    Example:
        >>> k, pos = torch.tensor([[0.0, 1], [0, 9]]).view(1, 1, 2, 2), torch.tensor([[[0, 1]]])
        >>> seen = {"k_BHSD": k, "v_BHSD": k, "pos_BHS": pos, "protected_BHS": pos < 0, "sliding": None, "layer": 0}
        >>> new = {"q_BTND": k.transpose(1, 2), "position_BT": pos[0], "frequencies_Bd": torch.zeros(1, 1)}
        >>> ExpectedAttention(sinks=0)(Observation(**new, **seen)).argmax().item()
        1
    """

    sinks: int = 4
    future: int = 512
    epsilon: float = 0.0
    use_vnorm: bool = True
    compat: bool = False

    def __post_init__(self) -> None:
        check_range("future", self.future, 1, _FARTHEST)
        check_range("epsilon", self.epsilon, 0, below=math.inf)

    def __call__(self, seen: Observation) -> Tensor:
        """Score by expected attention."""
        (_, _, N, D), (B, H, S) = seen.q_BTND.shape, seen.pos_BHS.shape
        counted_BT1 = (seen.position_BT >= self.sinks)[..., None].float()
        count_B11 = counted_BT1.sum(1, keepdim=True).clamp(min=1)
        q_BTND = apply_rope(seen.q_BTND.float(), *self._turn(seen, counted_BT1))
        next_B11 = seen.pos_BHS.amax((1, 2))[:, None, None] + 1
        hidden_BHS = seen.pos_BHS < (self.sinks if self.compat else 0)
        if seen.sliding is not None:
            hidden_BHS |= seen.pos_BHS <= next_B11 - seen.sliding
        score_BHS = torch.empty(B, H, S, dtype=torch.float32, device=seen.k_BHSD.device)
        for head in range(H):
            q_BTGD = q_BTND[:, :, head * N // H : (head + 1) * N // H]
            mean_BGD = (counted_BT1.mT @ q_BTGD.flatten(2)).view(B, -1, D) / count_B11
            apart_BGTD = q_BTGD.addcmul_(counted_BT1[..., None], mean_BGD[:, None], value=-1).transpose(1, 2)
            covariance_BGDD = apart_BGTD.mT @ apart_BGTD / count_B11[..., None]
            k_BSD = seen.k_BHSD[:, head].float().contiguous()
            spread_BGSD = (k_BSD[:, None] @ covariance_BGDD).mul_(k_BSD[:, None])
            logit_BGS = spread_BGSD.sum(-1) / (2 * D) + mean_BGD @ k_BSD.mT / D**0.5
            # The lowest number rather than -inf: where nothing is visible, no NaN.
            logit_BGS.masked_fill_(hidden_BHS[:, head, None], torch.finfo(torch.float32).min)
            score_BHS[:, head] = logit_BGS.softmax(-1).mean(1)
        if self.use_vnorm:
            score_BHS = (score_BHS + self.epsilon) * torch.linalg.vector_norm(seen.v_BHSD.float(), dim=-1)
        return score_BHS.masked_fill(seen.pos_BHS < 0, 0)

    def _turn(self, seen: Observation, counted_BT1: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, T, d) that turn a query back to position 0 and on by the average turn to come.

        Both are 0 for queries that do not count.
        """
        if seen.frequencies_Bd is None:
            raise ValueError("expected attention turns queries back: give PromptPass `frequencies_Bd`")
        f_B1d, next_B1 = seen.frequencies_Bd[:, None], seen.pos_BHS.amax((1, 2))[:, None] + 1
        # The mean of turns by 0, f, 2 f ... is one turn, half as far as the last of them, and a factor.
        distance_BT1 = (next_B1 - seen.position_BT)[..., None] + (self.future - 1) / 2
        factor_B1d = torch.sinc(f_B1d * (self.future / math.tau)) / torch.sinc(f_B1d / math.tau)
        angle_BTd, length_BTd = distance_BT1 * f_B1d, factor_B1d * counted_BT1
        return angle_BTd.cos() * length_BTd, angle_BTd.sin() * length_BTd
