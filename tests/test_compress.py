"""The parts of compression against naive loops written from the papers' formulas."""

import importlib
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ragged_compact import ragged_compact
from kernels.ragged_prefill import ragged_prefill, ragged_prefill_lse
from layers.budget import parse_budget
from layers.cache.arena import ArenaCache
from layers.cache.prompt import PromptPass
from layers.compress.allocators import HeadImportance, LayerErrors, LayerPreference, LayerTopK, Pyramid, Uniform
from layers.compress.refiners import ProjectedValues, norm_bounds, projected_norms
from layers.compress.scorers import AttentionSums, ExpectedAttention, KeyDifference, Observation, WindowAttention
from layers.compress.sentences import SentenceEnds, spread_within_sentences
from layers.linear import Linear
from layers.methods import allocator_names, build_method, describe, method_names, needs_importance
from layers.plan import ArenaShape, offsets
from layers.quantize import quantize_weights


def naive_window_attention(q_WND, k_HSD, positions_S, position_W, sliding=None):
    """softmax(q k / sqrt(D)) row by row with a causal mask, as lists."""
    W, N, D = q_WND.shape
    H, S = k_HSD.shape[:2]
    out = torch.zeros(W, N, S, dtype=torch.float64)
    for w in range(W):
        for n in range(N):
            visible = [
                s
                for s in range(S)
                if 0 <= positions_S[s] <= position_W[w]
                and (sliding is None or positions_S[s] > position_W[w] - sliding)
            ]
            logits = [float(q_WND[w, n].double() @ k_HSD[n // (N // H), s].double()) / math.sqrt(D) for s in visible]
            total = sum(math.exp(x - max(logits)) for x in logits)
            for s, x in zip(visible, logits, strict=True):
                out[w, n, s] = math.exp(x - max(logits)) / total
    return out


@pytest.mark.parametrize("rows", ["mean", "max"])
@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2)])
@pytest.mark.parametrize("sliding", [None, 6])
def test_window_attention_is_the_formula(rows, group, heads, sliding):
    torch.manual_seed(0)
    (N, H), D, W = heads, 8, 4
    lengths, S, ahead, behind = [17, 9, 3], 17, 2, 1
    q, k = torch.randn(3, W, N, D), torch.randn(3, H, S, D)
    pos = torch.arange(S, dtype=torch.int32).expand(3, S).clone()
    pos[pos >= torch.tensor(lengths)[:, None]] = -1
    position = (torch.tensor(lengths)[:, None] - W + torch.arange(W)).int()
    right = torch.tensor([[max(0, W - n) + w for w in range(W)] for n in lengths]).clamp(max=W - 1)  # padding follows
    protected = ((pos < 1) | (pos >= torch.tensor(lengths)[:, None] - 2))[:, None].expand(3, H, S)
    scorer = WindowAttention(window=W, rows=rows, group=group, ahead=ahead, behind=behind)
    seen = Observation(
        q_BTND=torch.stack([row[order] for row, order in zip(q, right, strict=True)]),
        position_BT=torch.stack([row[order] for row, order in zip(position, right, strict=True)]).where(
            torch.arange(W) < torch.tensor(lengths)[:, None], -1
        ),
        k_BHSD=k,
        v_BHSD=k,
        pos_BHS=pos[:, None].expand(3, H, S),
        protected_BHS=protected,
        sliding=sliding,
        layer=0,
    )
    got = scorer(seen)
    for row, length in enumerate(lengths):
        first = max(0, W - length)
        weights = naive_window_attention(
            q[row, first:], k[row], pos[row].tolist(), position[row, first:].tolist(), sliding
        )
        per_query = weights.mean(0) if rows == "mean" else weights.amax(0)
        for h in range(H):
            members = per_query[h * (N // H) : (h + 1) * (N // H)]
            score = (members.mean(0) if group == "mean" else members.amax(0)).tolist()
            score = [0.0 if protected[row, h, s] else x for s, x in enumerate(score)]
            for s in range(length):
                want = max(score[max(0, s - ahead) : s + behind + 1])
                assert got[row, h, s] == pytest.approx(want, abs=1e-6)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_scores_spread_up_to_the_end_of_their_sentence(data):
    S = data.draw(st.integers(1, 40))
    ahead, behind, always = (data.draw(st.integers(0, most)) for most in (45, 6, 50))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    score, ends = torch.rand(2, 3, S) ** 9, torch.rand(2, 3, S) < data.draw(st.sampled_from([0, 0.1, 0.5]))
    got = spread_within_sentences(score, ends, ahead=ahead, behind=behind, always=always)
    for row in range(2):
        for head in range(3):
            of, last = score[row, head].tolist(), ends[row, head].tolist()
            for j in range(S):
                before = [of[i] for i in range(j + 1) if j - i <= always or (j - i <= ahead and not any(last[i:j]))]
                after = [of[i] for i in range(j, S) if i - j <= behind and not any(last[j:i])]
                assert got[row, head, j] == max(before + after)


def test_the_last_token_of_a_chunk_ends_a_sentence_as_if_space_followed():
    ends = SentenceEnds.from_texts(["<s>", "a", " a", ".", '."', "。", " \n", "x\ny", "!)"], special={0})
    rows = [[1, 3, 1, 3], [2, 3, 2, 0], [4, 2, 8, 1], [5, 1, 6, 0], [3, 0, 7, 4]]
    want = [[0, 0, 0, 1], [0, 1, 0, None], [1, 0, 0, 0], [1, 0, 1, None], [1, 1, 1, 1]]
    got = ends(torch.tensor(rows), [4, 3, 4, 3, 4]).int().tolist()
    for flags, wanted in zip(got, want, strict=True):
        assert all(b in (a, None) for a, b in zip(flags, wanted, strict=True))


def test_window_scores_ignore_what_empty_places_hold():
    q, k = torch.randn(1, 2, 2, 4), torch.randn(1, 1, 5, 4)
    pos, position = torch.tensor([[[0, 1, 2, 3, -1]]], dtype=torch.int32), torch.tensor([[2, 3]], dtype=torch.int32)
    scorer, tokens = WindowAttention(window=2), {"k_BHSD": k, "v_BHSD": k, "pos_BHS": pos, "protected_BHS": pos > 9}
    seen = Observation(q_BTND=q, position_BT=position, sliding=None, layer=0, **tokens)
    clean = scorer(seen)
    k[:, :, 4] = float("nan")
    assert torch.equal(scorer(seen), clean)


@pytest.mark.parametrize("sliding", [None, 9])
def test_sums_of_attention_take_what_the_prompts_attention_knows(sliding):
    q, k, lengths = torch.randn(2, 20, 4, 8), torch.randn(2, 2, 20, 8), torch.tensor([20, 13])
    position = torch.arange(20, dtype=torch.int32).expand(2, 20)
    position = position.masked_fill(position >= lengths[:, None], -1)
    pos = position[:, None].expand(2, 2, 20)
    lse = ragged_prefill_lse(q, k, k, pos, position, sliding)[1].masked_fill(position[..., None] < 0, float("nan"))
    tokens = {"k_BHSD": k, "v_BHSD": k, "pos_BHS": pos, "protected_BHS": pos > 99}
    seen = Observation(q_BTND=q, position_BT=position, sliding=sliding, layer=0, **tokens)
    sums = AttentionSums()(seen)
    assert torch.allclose(sums.sum(-1), lengths[:, None].float())
    assert torch.allclose(AttentionSums()(replace(seen, lse_BTN=lse)), sums, atol=1e-5)
    assert not torch.allclose(AttentionSums()(replace(seen, lse_BTN=lse + 0.1)), sums, atol=1e-2)


def test_logarithms_come_with_the_same_attention_wherever_numbers_lie():
    q, k, v = (
        torch.randn(2, 8, 5, 7).permute(0, 3, 2, 1)[:, :, :4],
        torch.randn(2, 2, 8, 7).mT,
        torch.randn(2, 2, 8, 7).mT,
    )
    position = torch.arange(7, dtype=torch.int32).expand(2, 7)
    pos = position[:, None].expand(2, 2, 7)
    with torch.inference_mode():
        out, lse = ragged_prefill_lse(q, k, v, pos, position)
        assert torch.allclose(out, ragged_prefill(q, k, v, pos, position), atol=1e-6)
    score = torch.einsum("bthgd,bhsd->bthgs", q.unflatten(2, (2, 2)) / math.sqrt(8), k)
    score = score.masked_fill(position[0] > position[0, :, None, None, None], -math.inf)
    assert torch.allclose(lse, score.logsumexp(-1).flatten(2), atol=1e-6)
    nothing = ragged_prefill_lse(q[:, :0], k[:, :, :0], v[:, :, :0], pos[..., :0], position[:, :0])
    assert [x.shape for x in nothing] == [(2, 0, 4, 8), (2, 0, 4)]


def test_only_a_first_chunk_knows_the_sums_of_its_attention():
    """A later one attends to what is stored too, and narrow windows need a mask: it would cost more than it saves."""
    shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=1, head_dim=4, slots=9, dtype=torch.float32)
    method = build_method("h2o")
    cache, known = ArenaCache(replace(shape, evict=method.evict), "cpu"), []

    class Watching(PromptPass):
        def scores(self, seen):
            known.append(seen.lse_BTN is not None)
            return super().scores(seen)

    for window, is_first in [(None, True), (None, False), (3, True), (5, True)]:
        if is_first:
            cache.reset()
        chunk = Watching(cache, method, keep_BLH=torch.full((1, 1, 1), 8), room=[1], new_tokens=[5])
        x = torch.randn(1, 5, 1, 4)
        chunk.attend(torch.tensor([0]), x, x, x, window)
        chunk.finish()
    assert known == [True, False, False, True]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**31))
def test_compaction_keeps_the_best(S, H, keep, seed):
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 5, (1, H, S), generator=g).float()
    pos = torch.arange(S, dtype=torch.int32).expand(1, H, S).clone()
    holes = torch.rand(1, H, S, generator=g) < 0.3
    holes[..., int(torch.randint(0, S, (), generator=g))] = False
    pos[holes] = -1
    keep_BH = torch.randint(1, keep + 1, (1, H), generator=g)
    k = torch.randn(1, H, S, 2, generator=g)
    k[holes] = float("nan")
    offset = offsets(keep_BH[:, None])[:, 0]
    arena = torch.full((1, int(keep_BH.sum()), 2), 7.0)
    v_arena, places = arena.clone(), torch.full(arena.shape[:2], -1, dtype=torch.int32)
    kept = ragged_compact(arena, v_arena, places, offset, keep_BH, keep, k, 2 * k, pos, score)
    for h in range(H):
        candidates = sorted((s for s in range(S) if not holes[0, h, s]), key=lambda s: (-float(score[0, h, s]), s))
        want = sorted(candidates[: int(keep_BH[0, h])])
        start = int(offset[0, h])
        assert int(kept[0, h]) == len(want)
        assert places[0, start : start + len(want)].tolist() == want
        assert torch.equal(arena[0, start : start + len(want)], k[0, h, want])
        assert torch.equal(v_arena[0, start : start + len(want)], 2 * k[0, h, want])
        assert (places[0, start + len(want) : start + int(keep_BH[0, h])] == -1).all()


shares = st.builds(
    lambda L, H, G, seed, zeros: torch.where(
        torch.rand(L, H * G, generator=torch.Generator().manual_seed(seed)) < zeros,
        0.0,
        torch.rand(L, H * G, generator=torch.Generator().manual_seed(seed + 1)) ** 4,
    ),
    st.integers(1, 6),
    st.just(2),
    st.sampled_from([1, 4]),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=300, deadline=None)
@given(
    shares, st.sampled_from([1.0, 1.001, 1.1, 1.5, 3, 100]), st.integers(0, 8), st.integers(0, 300), st.integers(1, 600)
)
def test_head_budgets_are_exact(importance, beta, protected, free, prompt):
    L, H = importance.shape[0], 2
    budget = protected + free
    if budget < 1:
        return
    cap = HeadImportance(importance_LN=importance, beta=beta, least=protected)(
        budget=budget, prompt=prompt, num_layers=L, num_kv_heads=H
    )
    assert int(cap.sum()) == min(budget, prompt) * L * H
    assert int(cap.max()) <= prompt
    if prompt > budget:
        assert int(cap.min()) >= protected + math.floor(free * (1 - 1 / beta))


def test_head_budgets_follow_equation_4():
    torch.manual_seed(3)
    L, N, H, budget, protected, beta = 4, 8, 2, 64, 8, 1.3
    importance = torch.rand(L, N)
    cap = HeadImportance(importance_LN=importance, beta=beta, least=protected)(
        budget=budget, prompt=100_000, num_layers=L, num_kv_heads=H
    )
    total = sum(float(importance[i, n]) for i in range(L) for n in range(N)) / (N // H)
    for layer in range(L):
        for h in range(H):
            score = sum(float(importance[layer, n]) for n in range(h * 4, h * 4 + 4)) / 4 / total
            b = budget - protected
            want = (b - b / beta) + score * (b / beta) * L * H + protected
            assert abs(int(cap[layer, h]) - want) < 1


def test_head_budgets_extremes_and_equivariance():
    importance = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))

    def capacities(scores, beta, prompt=10_000):
        share = HeadImportance(importance_LN=scores, beta=beta, least=4)
        return share(budget=104, prompt=prompt, num_layers=3, num_kv_heads=4)

    assert (capacities(importance, 1e9) - 104).abs().max() <= 1
    assert torch.equal(capacities(importance.flip(0), 1.2), capacities(importance, 1.2).flip(0))
    more = importance.clone()
    more[1, 2] += 0.5
    assert capacities(more, 1.2)[1, 2] > capacities(importance, 1.2)[1, 2]


@pytest.mark.parametrize("beta", [1.005, 1.01, 1.1, 1.2, 1.5, 2, 5, 10])
@pytest.mark.parametrize("budget", [64, 128, 1024])
def test_compat_is_the_published_arithmetic(beta, budget):
    importance = torch.rand(5, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    cap = HeadImportance(importance_LN=importance.float(), beta=beta, least=8, compat=True)(
        budget=budget, prompt=4000, num_layers=5, num_kv_heads=6
    )
    scores = importance.float().double().flatten().tolist()
    b = budget - 8
    q = b // beta
    pool, floor = q * 30, b - q
    for i, score in enumerate(scores):
        want = round(score / math.fsum(scores) * pool + floor)
        assert int(cap.flatten()[i]) == min(want, 4000 - 8) + 8


BETAS = st.floats(1, 100)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), BETAS, st.integers(0, 40), st.integers(0, 300), st.integers(1, 900))
def test_pyramids_are_exact(L, H, beta, protected, free, prompt):
    budget = max(1, protected + free)
    protected = min(protected, budget)
    keep = Pyramid(beta=beta, least=protected)(budget=budget, prompt=prompt, num_layers=L, num_kv_heads=H)
    assert keep.shape == (L, H) and int(keep.sum()) == min(budget, prompt) * L * H
    assert int(keep.max()) <= prompt
    assert (keep == keep[:, :1]).all(), "no head of a layer has more than another"
    if prompt > budget:
        assert (keep.diff(dim=0) <= 0).all()
        assert int(keep.min()) >= protected + math.floor((budget - protected) / beta)
        assert beta > 1 or (keep == budget).all()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), BETAS, st.integers(0, 9), st.integers(1, 300), st.integers(1, 900))
def test_published_pyramids_stay_within_their_surplus(L, H, beta, protected, free, prompt):
    share, budget = Pyramid(beta=beta, least=protected, compat=True), protected + free
    keep = share(budget=budget, prompt=prompt, num_layers=L, num_kv_heads=H)
    over = int(keep.sum()) - min(budget, prompt) * L * H
    assert 0 <= over <= share.surplus(num_layers=L, num_kv_heads=H)
    assert int(keep.max()) <= prompt and int(keep.min()) >= min(protected, prompt)


@st.composite
def scored_layers(draw, levels=(1, 3, 1000)):
    """Scores of a layer's tokens, with empty places before them, as later turns have, and few or many equal ones."""
    B, H, S = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    score = torch.randint(0, draw(st.sampled_from(levels)), (B, H, S), generator=g).float() - 1
    filled = torch.arange(S) >= torch.randint(0, S, (B, H, 1), generator=g)
    protected = draw(st.integers(1, 4))
    score[..., -protected:] = math.inf
    budget = protected + draw(st.integers(0, 40))
    return score, filled, protected, budget


def share(allocator, score, filled, budget):
    """Both stages, for a prompt as long as the longest head."""
    B, H, S = score.shape
    keep = torch.stack([allocator(budget=budget, prompt=S, num_layers=1, num_kv_heads=H)[0]] * B)
    return keep, allocator.share(keep, score, filled)


@settings(max_examples=300, deadline=None)
@given(scored_layers(), st.floats(0, 1))
def test_shared_layers_are_exact(layer, alpha):
    score, filled, protected, budget = layer
    keep, shared = share(LayerTopK(alpha=alpha, least=protected), score, filled, budget)
    held = filled.sum(-1)
    assert torch.equal(shared.sum(1), torch.minimum(keep.sum(1), held.sum(1)))
    assert (shared <= held).all()
    least = (filled & score.isposinf()).sum(-1) + math.floor(alpha * max(0, int(keep.max()) - protected))
    assert (shared >= torch.minimum(least, held)).all()


@settings(max_examples=300, deadline=None)
@given(scored_layers(), st.floats(0, 1))
def test_shared_layers_in_published_rounding_stay_within_their_surplus(layer, alpha):
    score, filled, protected, budget = layer
    allocator = LayerTopK(alpha=alpha, least=protected, compat=True)
    keep, shared = share(allocator, score, filled, budget)
    H = score.shape[1]
    over = int(keep.sum(1).max()) - min(budget, score.shape[2]) * H
    assert 0 <= over <= allocator.surplus(num_layers=1, num_kv_heads=H)
    assert (shared.sum(1) <= keep.sum(1)).all() and (shared <= filled.sum(-1)).all() and (shared >= 1).all()


@settings(max_examples=100, deadline=None)
@given(scored_layers([1000]), st.booleans(), st.randoms())
def test_heads_that_change_places_take_their_share_along(layer, compat, random):
    score, filled, protected, budget = layer
    score = score.double() + torch.arange(score.numel()).view(score.shape) / 2**20  # no two are equal
    order = list(range(score.shape[1]))
    random.shuffle(order)
    allocator = LayerTopK(alpha=0.2, least=protected, compat=compat)
    _, shared = share(allocator, score, filled, budget)
    _, again = share(allocator, score[:, order], filled[:, order], budget)
    assert torch.equal(again, shared[:, order])


@st.composite
def competing_layers(draw):
    """What layers want, have to keep and have, and a total that holds at least what is protected."""
    L, seed = draw(st.integers(1, 12)), draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    wants = torch.rand(L, generator=g, dtype=torch.float64) ** draw(st.integers(1, 60))
    least = torch.randint(1, 9, (L,), generator=g)
    most = least + torch.randint(0, draw(st.sampled_from([1, 30, 1000])), (L,), generator=g)
    return wants, least, most, int(least.sum()) + draw(st.integers(0, 3000))


def spread(allocator, wants, least, most, total):
    (keep,) = allocator.spread(wants[None], total_B=torch.tensor([total]), least_BL=least[None], most_BL=most[None])
    return keep


@settings(max_examples=300, deadline=None)
@given(competing_layers(), st.booleans(), st.randoms())
def test_spread_totals_are_exact(layers, nobody_wants, random):
    wants, least, most, total = layers
    wants = wants * (not nobody_wants)
    keep = spread(LayerPreference(), wants, least, most, total)
    assert int(keep.sum()) == min(total, int(most.sum()))
    assert (least <= keep).all() and (keep <= most).all()
    order = list(range(len(wants)))
    random.shuffle(order)
    again = spread(LayerPreference(), wants[order], least[order], most[order], total)
    if nobody_wants:  # equals among layers are settled by their order
        assert (again - keep[order]).abs().max() <= 1
    else:
        assert torch.equal(again, keep[order])


@settings(max_examples=300, deadline=None)
@given(competing_layers())
def test_budgets_only_shrink_as_layers_join(layers):
    """So a cascade keeps what waiting for the last layer keeps, caps or not."""
    wants, least, most, total = layers
    last = spread(LayerPreference(), wants, least, most, total)
    for seen in range(1, len(wants)):
        left = total - int(least[seen:].sum())
        assert (last[:seen] <= spread(LayerPreference(), wants[:seen], least[:seen], most[:seen], left) + 1).all()


@settings(max_examples=300, deadline=None)
@given(competing_layers())
def test_published_spreading_never_exceeds_the_total(layers):
    wants, least, most, total = layers
    keep = spread(LayerPreference(compat=True), wants, least, most, total)
    assert (least <= keep).all() and (keep <= most).all() and int(keep.sum()) <= total
    free = total - int(least.sum())
    if ((wants / wants.sum() * free).floor() + 1 < most - least).all():
        assert int(keep.sum()) == total
        assert (keep - spread(LayerPreference(), wants, least, most, total)).abs().max() <= 1


def test_published_spreading_gives_back_what_a_cascade_has_lost():
    """Two layers want most of 100 tokens, then a third wants more than there are: its excess is shared equally."""
    wants = torch.tensor([0.01, 50, 50, 1000], dtype=torch.float64)
    least, most = torch.zeros(4, dtype=torch.int64), torch.full((4,), 60)
    budgets = {
        compat: [spread(LayerPreference(compat=compat), wants[:n], least[:n], most[:n], 100).tolist() for n in (3, 4)]
        for compat in (True, False)
    }
    assert budgets == {True: [[1, 50, 49], [11, 15, 14, 60]], False: [[0, 50, 50], [0, 20, 20, 60]]}


def test_preferences_are_those_of_each_row():
    """Copies of a row, padded or with another row beside it, want the same; a row without new tokens wants nothing."""
    q, k, lengths = torch.randn(3, 12, 4, 8), torch.randn(3, 2, 12, 8), torch.tensor([12, 7, 0])
    pos = torch.arange(12, dtype=torch.int32).expand(3, 12).clone()
    pos[pos >= lengths[:, None]] = -1

    def wants(rows, tokens):
        pos_BHS = pos[rows, None, :tokens].expand(-1, 2, -1)
        protected_BHS = pos_BHS >= lengths[rows, None, None] - 2
        held = {"k_BHSD": k[rows, :, :tokens], "v_BHSD": k[rows, :, :tokens], "pos_BHS": pos_BHS}
        new = {"q_BTND": q[rows, :tokens], "position_BT": pos[rows, :tokens], "protected_BHS": protected_BHS}
        seen = Observation(**held, **new, sliding=None, layer=0)
        return LayerPreference(window=4, tau1=0.5).preference(seen)

    together = wants([0, 1, 2], 12)
    torch.testing.assert_close(together[:2], torch.cat((wants([0], 12), wants([1], 7))), rtol=1e-5, atol=0)
    assert together[0] > 0 and together[2] == 0


def test_a_layer_without_a_safeguard_keeps_its_best_tokens():
    score = torch.tensor([[[0.9, 0.8, 0.7, math.inf], [0.1, 0.2, 0.3, math.inf]]])
    keep, filled = torch.tensor([[3, 3]]), torch.ones(1, 2, 4, dtype=torch.bool)
    shares = [LayerTopK(alpha=alpha, least=1).share(keep, score, filled).tolist() for alpha in (0, 0.5, 1)]
    assert shares == [[[4, 2]], [[4, 2]], [[3, 3]]]
    score[0, 1] -= 1  # worse than any other, and negative
    assert LayerTopK(alpha=0.0, least=1).share(keep - 1, score, filled).tolist() == [[3, 1]]


def test_key_difference_ignores_lengths_and_empty_places():
    k = torch.randn(2, 3, 9, 4)
    pos = torch.arange(9, dtype=torch.int32).repeat(2, 3, 1)
    pos[:, :, :2] = pos[0, :, 7:] = -1
    others = {"q_BTND": k, "position_BT": pos[:, 0], "v_BHSD": k, "pos_BHS": pos, "protected_BHS": pos < 0}
    score = KeyDifference()(Observation(k_BHSD=k, sliding=None, layer=0, **others))
    k[pos < 0] = math.nan
    again = KeyDifference()(Observation(k_BHSD=k * torch.rand(2, 3, 9, 1), sliding=None, layer=0, **others))
    torch.testing.assert_close(again[pos >= 0], score[pos >= 0])
    assert again.isfinite().all()


@pytest.mark.parametrize(("budget", "prompt"), [(8, 100), (100, 8), (1, 1)])
def test_uniform(budget, prompt):
    assert Uniform()(budget=budget, prompt=prompt, num_layers=2, num_kv_heads=3).unique().tolist() == [
        min(budget, prompt)
    ]


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        (128, "tokens", 128),
        ("64", "tokens", 64),
        ("12.5%", "share", 0.125),
        ("100 %", "share", 1),
        ("64MiB", "bytes", 2**26),
    ],
)
def test_budgets_are_read(text, kind, amount):
    budget = parse_budget(text)
    assert (budget.kind, budget.amount) == (kind, amount)
    assert parse_budget(str(budget)) == budget


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=12)
    | st.integers(max_value=0)
    | st.sampled_from(["0", "-1", "1.5", "101%", "0%", "1e3", "١٢", "nan", "5TB"])
)
def test_no_other_budget_is_read(text):
    try:
        budget = parse_budget(text)
    except ValueError as error:
        assert "\n" not in str(error) and "budget" in str(error)
    else:
        assert budget.amount > 0


def test_plan_bytes_are_invertible():
    shape = ArenaShape(batch=3, num_layers=4, num_kv_heads=2, head_dim=8, slots=77, dtype=torch.bfloat16)
    assert shape.slots_within(shape.nbytes) == 77
    assert shape.slots_within(shape.nbytes - 1) == 76


@settings(max_examples=200, deadline=None)
@given(
    errors=st.lists(st.floats(0, 1) | st.just(0.0), min_size=1, max_size=40),
    floor=st.integers(0, 64),
    ceiling=st.floats(1, 5),
    protected=st.integers(1, 40),
    free=st.integers(0, 200),
    prompt=st.integers(1, 3000),
)
def test_layer_budgets_are_exact(errors, floor, ceiling, protected, free, prompt):
    L, H, budget = len(errors), 2, protected + free
    share = LayerErrors(error_L=torch.tensor(errors), floor=floor, ceiling=ceiling, least=protected)
    keep = share(budget=budget, prompt=prompt, num_layers=L, num_kv_heads=H)
    assert keep.shape == (L, H) and torch.equal(keep[:, 0], keep[:, 1])
    assert int(keep.sum()) == min(budget, prompt) * L * H
    assert share.surplus(num_layers=L, num_kv_heads=H) == 0
    if prompt <= budget:
        assert (keep == prompt).all()
        return
    assert keep.min() >= min(max(floor, protected), budget) and keep.max() <= min(ceiling * budget, prompt)
    order = sorted(range(L), key=lambda layer: errors[layer])
    given = keep[order, 0]
    assert (given.diff() >= -1).all()  # more error, no less budget; but for the last single token


def test_layer_budgets_refuse_another_model():
    with pytest.raises(ValueError, match="for 3 layers, the model has 4"):
        LayerErrors(error_L=torch.ones(3), floor=1, ceiling=3.0, least=1)(
            budget=8, prompt=100, num_layers=4, num_kv_heads=1
        )


@pytest.mark.parametrize("name", allocator_names())
def test_budgets_of_some_layers_are_those_of_a_model_without_the_others(name):
    g, layers = torch.Generator().manual_seed(2), [0, 1, 3]
    found = {kind: torch.rand(5, 4, generator=g) for kind in ("r", "r2", "semantic")}
    found["layer_errors"] = torch.rand(5, generator=g)
    spec, sizes = f"snapkv:allocator={name}", {"budget": 100, "prompt": 150, "num_layers": 3, "num_kv_heads": 2}
    part = build_method(spec, found).allocator.of_layers(layers)
    alone = build_method(spec, {kind: scores[layers] for kind, scores in found.items()}).allocator
    assert type(part) is type(alone) and torch.equal(part(**sizes), alone(**sizes))


IMPORTANCE = {kind: torch.rand(2, 4) for kind in ("r", "r2", "semantic")} | {"layer_errors": torch.rand(2)}


@pytest.mark.parametrize("name", method_names())
def test_methods_build_and_describe_themselves(name):
    method = build_method(name, IMPORTANCE)
    assert method.name.partition("+")[0] == name and method.summary and method.paper
    if needs_importance(name):
        with pytest.raises(ValueError, match="needs head importance"):
            build_method(name)


def test_methods_with_presets_know_when_they_need_sentences():
    modules = {name: importlib.import_module(f"layers.methods.{name.replace('-', '_')}") for name in method_names()}
    offer = [name for name, module in modules.items() if hasattr(module, "PRESETS")]
    assert {"snapkv", "headkv", "adakv", "pyramidkv", "compresskv"} <= set(offer)
    for name in [f"{name}:" for name in offer] + ["criticalkv+snapkv:"]:
        assert build_method(f"{name}preset=adaptive", IMPORTANCE).sentences
        assert build_method(f"{name}stop=sentence,pooling=max", IMPORTANCE).sentences
        assert not build_method(f"{name}preset=tuned", IMPORTANCE).sentences


@pytest.mark.parametrize("allocator", allocator_names())
@pytest.mark.parametrize(
    "name", [name for name in method_names() if name not in ("full", "criticalkv", "kvsharer", "tova")]
)
def test_any_scores_go_with_any_budgets(name, allocator):
    spec = f"{name}:allocator={allocator}"
    if (name, allocator) == ("h2o", "cake"):
        with pytest.raises(ValueError, match="needs each layer's budget at once"):
            build_method(spec, IMPORTANCE)
        return
    method, plain = build_method(spec, IMPORTANCE), build_method(name, IMPORTANCE)
    assert method.scorer == plain.scorer and method.least == plain.least
    source = build_method("snapkv" if allocator == "uniform" else allocator, IMPORTANCE)
    assert type(method.allocator) is type(source.allocator)
    assert getattr(method.allocator, "least", method.least) == method.least
    assert needs_importance(spec) == (allocator.startswith(("headkv", "compresskv")) or name == "compresskv")
    if allocator == name:
        assert repr(method) == repr(plain)
    if allocator == "cake":
        with pytest.raises(ValueError, match=r"needs each layer's budget at once|does not score by attention"):
            build_method(f"criticalkv+{spec}", IMPORTANCE)
    elif name not in ("streaming", "keydiff"):
        changed = build_method(f"criticalkv:alpha=0.3+{spec}", IMPORTANCE)
        assert changed.refine == ProjectedValues(alpha=0.3) and changed.name == f"criticalkv+{name}"
        assert repr(
            replace(changed, **{x: getattr(method, x) for x in ("name", "paper", "summary", "refine")})
        ) == repr(method)


@pytest.mark.parametrize("spec", [*method_names(), *(f"snapkv:allocator={name}" for name in allocator_names())])
def test_every_option_is_explained_and_its_default_may_be_written_out(spec):
    about, plain = describe(spec), build_method(spec, IMPORTANCE)
    for name, option in about.options.items():
        assert len(option.meaning) > 10, name
        written = f"{about.name}:{name}={option.written}"
        if name != "allocator" and about.allocator:
            written += f",allocator={about.allocator}"
        same = build_method(written, IMPORTANCE)
        assert repr(same) == repr(plain if name != "allocator" else build_method(about.name, IMPORTANCE))
    for preset, scoring in about.presets.items():
        all_of_it = ",".join(f"{name}={getattr(scoring, name)}" for name in about.scoring)
        written, short = (build_method(f"{about.name}:{x}", IMPORTANCE) for x in (all_of_it, f"preset={preset}"))
        assert repr(written) == repr(short)


def test_what_users_may_set_is_what_functions_take():
    assert list(describe("full").options) == list(describe("tova").options) == []
    assert (
        list(describe("criticalkv+headkv").options) == ["alpha"] and describe("criticalkv+headkv").changes == "headkv"
    )
    assert list(describe("h2o").options) == ["allocator", "ratio"]
    assert list(describe("h2o:allocator=headkv").budgets) == ["scores", "beta", "compat"]
    assert (describe("headkv").choices["preset"].default, describe("snapkv").choices["preset"].default) == (
        "tuned",
        "published",
    )


@pytest.mark.parametrize(
    "spec", [*method_names(), "snapkv:preset=tuned", "kvsharer+headkv", "kvsharer+keydiff:sinks=9"]
)
def test_a_budget_that_is_too_small_is_said_to_be_so_by_options_that_there_are(spec):
    method, known = build_method(spec, IMPORTANCE), describe(spec.partition("+")[2] or spec)
    if known.changes:
        known = describe(known.changes)
    said = method.too_small("raise it")
    named = dict(re.findall(r"(\w+)=(\d+)", said))
    assert {*named} <= {*known.options} and sum(map(int, named.values())) + ("the last one" in said) <= method.least
    assert said.endswith(f"raise it{', or lower ' * bool(named)}{' or '.join(named)}")
    if not method.evict:
        assert sum(map(int, named.values())) + ("the last one" in said) == method.least


def test_headkv_r2_is_headkv_with_other_settings():
    for one, other in [
        ("headkv-r2", "headkv:preset=published,beta=1.01"),
        ("headkv-r2:preset=tuned,beta=3", "headkv"),
        ("snapkv:allocator=headkv-r2", "snapkv:allocator=headkv,beta=1.01"),
    ]:
        a, b = build_method(one, IMPORTANCE), build_method(other, IMPORTANCE)
        assert (repr(a.scorer), repr(a.allocator), a.least) == (repr(b.scorer), repr(b.allocator), b.least)


def observation(lengths, *, N=4, H=2, D=4, **changes):
    """Random tokens of ragged rows; queries of padding are large, keys and values of empty places are NaN."""
    B, T = len(lengths), max(lengths)
    position = torch.arange(T, dtype=torch.int32).expand(B, T).clone()
    position[position >= torch.tensor(lengths)[:, None]] = -1
    q, k, v = torch.randn(B, T, N, D), torch.randn(B, H, T, D), torch.randn(B, H, T, D)
    q[position < 0] = 1e4
    for x in (k, v):
        x.masked_fill_((position < 0)[:, None, :, None], float("nan"))
    pos = position[:, None].expand(B, H, T)
    out = Linear(N * D, 8).requires_grad_(False)
    torch.nn.init.normal_(out.weight)
    return Observation(
        **{
            **{"q_BTND": q, "position_BT": position, "k_BHSD": k, "v_BHSD": v, "pos_BHS": pos, "sliding": None},
            **{"protected_BHS": pos == 0, "layer": 0, "out": out, "frequencies_Bd": torch.rand(B, D // 2)},
            **changes,
        }
    )


def row(seen, index):
    return replace(
        seen, **{name: x[index : index + 1] for name, x in vars(seen).items() if isinstance(x, torch.Tensor)}
    )


def test_padding_does_not_count_as_queries_to_come():
    torch.manual_seed(3)
    lengths = [30, 11, 2, 1]
    seen, scorer = observation(lengths), ExpectedAttention(sinks=1)
    score = scorer(seen)
    assert score.isfinite().all()
    for index, length in enumerate(lengths):
        alone = row(seen, index)
        short = replace(alone, q_BTND=alone.q_BTND[:, :length], position_BT=alone.position_BT[:, :length])
        torch.testing.assert_close(scorer(short)[..., :length], score[index : index + 1, :, :length])


def test_expected_attention_sees_what_the_next_query_sees():
    torch.manual_seed(4)
    scorer = ExpectedAttention(sinks=2, use_vnorm=False)
    score = scorer(observation([20], sliding=6))
    assert (score[..., :15] == 0).all() and (score[..., 15:] > 0).all()
    torch.testing.assert_close(score.sum(-1), torch.ones(1, 2))
    assert scorer(observation([1], sliding=1)).isfinite().all()  # the next query sees none of it


def test_expected_attention_is_the_mean_over_queries_that_are_normal():
    """At one position to come and without rotation, z is the logarithm of the mean of exp(q k / sqrt(D))."""
    torch.manual_seed(5)
    seen = observation([4000], N=1, H=1, frequencies_Bd=torch.zeros(1, 2))
    want = (seen.q_BTND[0, :, 0] @ seen.k_BHSD[0, 0, :50].T / 2).exp().mean(0)
    got = ExpectedAttention(sinks=0, use_vnorm=False)(seen)[0, 0, :50]
    torch.testing.assert_close(got / got.sum(), want / want.sum(), rtol=0.2, atol=0)


def test_a_scaling_of_sines_is_in_the_queries_already():
    """YaRN multiplies queries and keys after RoPE by a number; scores are those of keys and queries so long."""
    torch.manual_seed(6)
    seen = observation([25])
    longer = replace(seen, q_BTND=1.3 * seen.q_BTND, k_BHSD=1.3 * seen.k_BHSD)
    still = replace(seen, q_BTND=1.69 * seen.q_BTND)
    torch.testing.assert_close(ExpectedAttention()(longer), ExpectedAttention()(still))


@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_projected_norms_are_the_formula(dtype, int8):
    torch.manual_seed(7)
    seen, group, D = observation([19, 7], N=6, H=2, D=4), 3, 4
    values, weight = seen.v_BHSD.to(dtype), seen.out.weight
    if int8:
        quantize_weights(seen.out)
    got = projected_norms(values, seen.out)
    for b, length in enumerate([19, 7]):
        for h in range(2):
            for s in range(length):
                heads = range(h * group, (h + 1) * group)
                adds = [(weight[:, n * D : (n + 1) * D] @ values[b, h, s].float()).abs().sum() for n in heads]
                exact = dtype is torch.float32 and not int8
                assert float(got[b, h, s]) == pytest.approx(float(sum(adds)) / group, rel=1e-5 if exact else 0.02)


@pytest.mark.parametrize(("alpha", "first"), [(0.0, [1, 1]), (0.5, [3, 4]), (0.3, [2, 2]), (1.0, [7, 9])])
def test_a_second_look_chooses_some_by_score_and_weighs_the_rest(alpha, first):
    """Of budgets of 7 and 9; the protected token is among the first, or chosen where there are none."""
    torch.manual_seed(8)
    seen = observation([20])
    score = torch.rand(1, 2, 20).masked_fill(seen.protected_BHS, float("inf"))
    got = ProjectedValues(alpha=alpha)(score, torch.tensor([[7, 9]]), seen)
    assert got.isposinf().sum(-1).tolist() == [first]
    for h, count in enumerate(first):
        assert set(got[0, h].topk(count).indices.tolist()) == set(score[0, h].topk(count).indices.tolist())
    weighed = ((score + 1e-4) * projected_norms(seen.v_BHSD, seen.out)).masked_fill(got.isposinf(), float("inf"))
    looked_at = got > 0
    torch.testing.assert_close(got[looked_at], weighed[looked_at])
    for h, count in enumerate([7, 9]):
        assert set(got[0, h].topk(count).indices.tolist()) == set(weighed[0, h].topk(count).indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("misled", [False, True])
def test_tokens_that_are_not_looked_at_could_not_have_won(dtype, misled):
    """One look is as wide as the largest budget, 20; where bounds are far from the norms, it takes many."""
    torch.manual_seed(9)
    E, out = 48, Linear(24, 48).requires_grad_(False)
    torch.nn.init.normal_(out.weight)
    seen, keep = observation([400], N=6, H=2, D=4, out=out), torch.tensor([[20, 12]])
    if misled:  # every second value reaches one output only, for which the bound is sqrt(E) times the norm
        out.weight[0, ::4], out.weight[1:, ::4] = 40, 0
        seen.v_BHSD[:, :, ::2, 1:], seen.v_BHSD[:, :, 1::2, 0] = 0, 0
    seen, out.weight = replace(seen, v_BHSD=seen.v_BHSD.to(dtype)), torch.nn.Parameter(out.weight.to(dtype), False)
    norms, bounds = projected_norms(seen.v_BHSD, out), norm_bounds(seen.v_BHSD, out)
    assert (norms <= bounds).all() and (bounds <= 1.02 * (3 * E) ** 0.5 * norms).all()
    score = (0.5 + torch.rand(1, 2, 400)).masked_fill(seen.protected_BHS, float("inf"))
    got = ProjectedValues(alpha=0.25)(score, keep, seen)
    want = ((score + 1e-4) * norms).masked_fill(got.isposinf(), float("inf"))
    assert got[got > 0].equal(want[got > 0]) or dtype is torch.bfloat16
    for h, count in enumerate(keep[0].tolist()):
        assert set(got[0, h].topk(count).indices.tolist()) == set(want[0, h].topk(count).indices.tolist())
    looked_at = int((got > 0).sum(-1).max())
    assert looked_at > 120 if misled else looked_at < 100


def test_options_of_scores_and_budgets_go_together():
    method = build_method("snapkv:preset=tuned,allocator=headkv,beta=7,scores=r,recent=2", IMPORTANCE)
    assert (method.allocator.beta, method.allocator.least, method.recent) == (7, 6, 2)
    assert method.allocator.importance_LN is IMPORTANCE["r"]


@pytest.mark.parametrize(
    ("spec", "missing"),
    [
        ("compresskv", "semantic"),
        ("compresskv:allocator=uniform", "semantic"),
        ("snapkv:allocator=compresskv", "layer_errors"),
        ("headkv:scores=semantic", "semantic"),
    ],
)
def test_a_calibration_without_what_a_method_needs_says_what_makes_it(spec, missing):
    older = {kind: IMPORTANCE[kind] for kind in ("r", "r2")}
    with pytest.raises(ValueError, match=f"kind '{missing}'; at hand: r, r2; .*recipes.calibrate_heads"):
        build_method(spec, older)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snapkw", "choose from adakv, "),
        ("expected_attention", "no cache method is called 'expected_attention'"),
        ("expected-attention:future=0", "expected-attention:future=0: future must be from 1"),
        ("expected-attention:future=1000000000", "future must be from 1 to 1,048,576, not 1000000000"),
        ("snapkv:ahead=5,ahead=6", "snapkv: option ahead is given twice"),
        ("snapkv:allocator=adakv,allocator=uniform", "option allocator is given twice"),
        ("criticalkv+", "lacks a method on one side of the plus: .*as in criticalkv.snapkv"),
        ("+snapkv", "lacks a method on one side of the plus: .*as in criticalkv.snapkv"),
        ("headkv+criticalkv", "headkv is complete and changes no other .* as in criticalkv.snapkv"),
        ("snapkv:allocator=adakv,alpha=2", "snapkv:allocator=adakv,alpha=2: alpha must be from 0 to 1, not 2.0"),
        ("expected-attention:epsilon=nan", "epsilon must be at least 0"),
        ("headkv:scores=layer_errors", "shares budgets out by heads"),
        ("criticalkv:alpha=1.5", "alpha must be from 0 to 1, not "),
        ("criticalkv:alpha=nan", "alpha must be from 0 to 1, not "),
        ("criticalkv:window=8", "no option 'window=8': write name=value with alpha"),
        ("criticalkv+criticalkv", "looks twice at its tokens already"),
        ("criticalkv+keydiff", "keydiff does not score by attention"),
        ("criticalkv+full", "full does not score by attention"),
        ("snapkv+adakv", "snapkv is complete"),
        ("snapkv:pool=3", "no option"),
        ("snapkv:window=x", "takes a whole number, not 'x'"),
        ("snapkv:window", "snapkv: option window needs a value: write window=..."),
        ("snapkv:window=0", "window must be from 1 to 4,096, not 0"),
        ("snapkv:rows=sum", "must be"),
        ("snapkv:preset=best", "no preset 'best': choose from published, tuned, adaptive"),
        ("snapkv:stop=word", "stop must be"),
        ("snapkv:always=4", "it needs stop=sentence"),
        ("snapkv:stop=sentence,pooling=mean", "stop=sentence needs pooling=max"),
        ("snapkv:stop=sentence,always=-1", "always must be from 0 to 4,096, not -1"),
        ("headkv:beta=0.5", "at least 1"),
        ("headkv:scores=r3", "kind 'r3'"),
        ("headkv:compat=maybe", "takes true or false, not 'maybe'"),
        ("full:x=1", "it takes none"),
        ("streaming:sinks=-1", "streaming:sinks=-1: sinks must be at least 0, not -1$"),
        ("base", "no cache method"),
        ("snapkv:allocator=snapkv", "no allocator 'snapkv': choose from adakv, "),
        ("compresskv:heads=0", "compresskv:heads=0: heads must be at least 1, not 0"),
        ("compresskv:ceiling=0.5", "compresskv:ceiling=0.5: ceiling must be at least 1, not 0.5$"),
        ("compresskv:ceiling=nan", "ceiling must be at least 1"),
        ("compresskv:floor=-1", "floor must be at least 0, not -1"),
        ("snapkv:pooling=median", "pooling must be"),
        ("adakv:allocator", "no allocator ''"),
        ("tova:allocator=adakv", "tova has no option 'allocator=adakv': it takes none"),
        ("h2o:ratio=1.5", "h2o:ratio=1.5: ratio must be from 0 to 1, not 1.5"),
        ("full:allocator=adakv", "full has no option 'allocator=adakv': it takes none"),
        ("snapkv:beta=2", "no option 'beta=2': write name=value with allocator, preset, window"),
        ("headkv:allocator=adakv,beta=2", "with allocator, preset, alpha, compat"),
        ("keydiff:preset=tuned", "with allocator, sinks, recent"),
        ("adakv:alpha=1.5", "alpha must be from 0 to 1, not "),
        ("adakv:alpha=nan", "alpha must be from 0 to 1, not "),
        ("pyramidkv:beta=0.5", "beta must be at least 1"),
        ("keydiff:recent=0", "keydiff:recent=0: recent must be at least 1, not 0$"),
        ("cake:window=0", "cake:window=0: window must be at least 1, not 0$"),
        ("cake:gamma=-1", "cake:gamma=-1: gamma must be at least 0 and below inf, not -1.0$"),
        ("cake:gamma=inf", "gamma must be at least 0 and below inf, not inf$"),
        ("cake:pool=4", "cake:pool=4: pool must be odd, not 4$"),
        ("cake:pool=0", "cake:pool=0: pool must be at least 1, not 0$"),
        ("cake:tau1=0", "cake:tau1=0: tau1 must be at least 0.1, not 0.0$"),
        ("snapkv:allocator=cake,tau2=nan", "tau2=nan: tau2 must be at least 0.1, not nan$"),
        ("cake:cascade=no", "cascade takes true or false"),
        ("cake:preset=tuned", "no option 'preset=tuned'"),
    ],
)
def test_wrong_methods_are_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        build_method(spec, IMPORTANCE)


@pytest.mark.parametrize(
    ("spec", "missing"), [("criticalkv:alpha=0.25", "outputs"), ("expected-attention", "frequencies_Bd")]
)
def test_what_a_method_looks_at_must_be_given(spec, missing):
    shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=1, head_dim=4, slots=60, dtype=torch.float32)
    keep, x = torch.full((1, 1, 1), 40), torch.randn(1, 50, 1, 4)
    chunk = PromptPass(ArenaCache(shape, "cpu"), build_method(spec), keep_BLH=keep, room=[1], new_tokens=[50])
    with pytest.raises(ValueError, match=f"give PromptPass `{missing}`"):
        chunk.attend(torch.tensor([0]), x, x, x, None)


def test_a_layers_total_holds_however_many_tokens_are_protected():
    """As with h2o, half of whose budget is, while its allocator is told of one token."""
    score_BHS = torch.rand(2, 3, 40)
    score_BHS[..., -10:] = torch.inf
    keep_BH, filled_BHS = torch.full((2, 3), 20), torch.ones(2, 3, 40, dtype=torch.bool)
    for alpha in (0.0, 0.2, 1.0):
        shared_BH = LayerTopK(alpha=alpha, least=1).share(keep_BH, score_BHS, filled_BHS)
        assert shared_BH.sum(1).tolist() == [60, 60] and (shared_BH >= 10).all()
