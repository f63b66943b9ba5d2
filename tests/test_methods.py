"""Every method against a naive loop over its paper's formulas: what each head keeps and what it then answers.

The loops below know lists, Python's floats and the published numbers, and none of our parts. A conversation of random
queries, keys and values runs through a prompt, 50 steps and a second turn.
"""

from __future__ import annotations

import cmath
import itertools
import math
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from kernels.rope import apply_rope
from layers.cache.arena import ArenaCache
from layers.cache.prompt import PromptPass
from layers.linear import Linear
from layers.methods import build_method, method_names
from layers.plan import ArenaShape

L, H, D, E, STEPS, ROOM = 4, 2, 4, 6, 50, 7
TUNED = {"window": 32, "rows": max, "group": max, "pool": max, "ahead": 12, "behind": 0, "sinks": 4, "recent": 4}
ADAPTIVE = TUNED | {"ahead": 24, "always": 4}


def mean(numbers):
    return sum(numbers) / len(numbers)


def published(window):
    numbers = {"window": window, "ahead": 3, "behind": 3, "sinks": 0, "recent": window}
    return {"rows": mean, "group": mean, "pool": max, **numbers}


# -- the formulas ------------------------------------------------------------------------------------------------------


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def attention(q, keys):
    """softmax(q k / sqrt(d)) over a list of keys."""
    logits = [dot(q, key) / math.sqrt(D) for key in keys]
    powers = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(powers) for x in powers]


def answer(q, keys, values):
    weights = attention(q, keys)
    return [sum(w * value[d] for w, value in zip(weights, values, strict=True)) for d in range(D)]


def observed(turn, head, setting):
    """What a query head attends to from the last queries, as a number per candidate of its KV head."""
    h = head // turn.G
    places = turn.candidates[h]
    rows = range(max(turn.first, turn.end - setting["window"]), turn.end)
    seen = [[j for j in places if j <= i] for i in rows]
    weights = [attention(turn.q[i][head], [turn.k[j][h] for j in js]) for i, js in zip(rows, seen, strict=True)]
    weights = [w + [0.0] * (len(places) - len(w)) for w in weights]
    return [setting["rows"]([w[c] for w in weights]) for c in range(len(places))]


def pooled(votes, places, setting, protected, ends):
    """The largest or the mean of each number and its neighbours; protected ones and those beyond the ends are 0."""
    votes = [0.0 if j in protected else vote for j, vote in zip(places, votes, strict=True)]
    if "always" in setting:
        return up_to_ends(votes, [ends[j] for j in places], setting["ahead"], setting["always"])
    padded = [0.0] * setting["ahead"] + votes + [0.0] * setting["behind"]
    return [setting["pool"](padded[c : c + setting["ahead"] + setting["behind"] + 1]) for c in range(len(places))]


def up_to_ends(votes, ends, ahead, always):
    """A vote holds for what follows until its sentence ends."""
    scores = list(votes)
    for i, vote in enumerate(votes):
        for j in range(i + 1, min(i + ahead, len(votes) - 1) + 1):
            if j <= i + always or not any(ends[i:j]):
                scores[j] = max(scores[j], vote)
    return scores


def window_scores(turn, h, setting, protected):
    """SnapKV, section 4: what the last queries attend to, averaged over the group, then pooled."""
    places = turn.candidates[h]
    of_heads = [observed(turn, head, setting) for head in range(h * turn.G, (h + 1) * turn.G)]
    votes = [setting["group"]([of_head[c] for of_head in of_heads]) for c in range(len(places))]
    return pooled(votes, places, setting, protected, turn.ends)


def compresskv_scores(turn, setting, protected, semantic):
    """CompressKV: the layer's best heads are pooled first, then averaged, and all KV heads share the result."""
    best_heads = sorted(range(len(semantic)), key=lambda head: (-semantic[head], head))[: setting["voters"]]
    by_place = []
    for head in best_heads:
        places = turn.candidates[head // turn.G]
        votes = pooled(observed(turn, head, setting), places, setting, protected, turn.ends)
        by_place.append(dict(zip(places, votes, strict=True)))
    return [[setting["group"]([vote.get(j, 0.0) for vote in by_place]) for j in places] for places in turn.candidates]


def window_rows(turn, h, W):
    """A of the last W queries over the candidates, per query head of the group."""
    places, rows = turn.candidates[h], range(max(turn.first, turn.end - W), turn.end)
    of_heads = []
    for head in range(h * turn.G, (h + 1) * turn.G):
        seen = [[j for j in places if j <= i] for i in rows]
        weights = [attention(turn.q[i][head], [turn.k[j][h] for j in js]) for i, js in zip(rows, seen, strict=True)]
        of_heads.append([w + [0.0] * (len(places) - len(w)) for w in weights])
    return of_heads


def variance(numbers):
    return sum((x - mean(numbers)) ** 2 for x in numbers) / (len(numbers) - 1) if len(numbers) > 1 else 0.0


def cake_scores(turn, h, setting, protected):
    """CAKE: mean + gamma Var of what a token gets, averaged over 5 neighbours (0 beyond the ends) and the group."""
    places, of_heads = turn.candidates[h], []
    for rows in window_rows(turn, h, setting["window"]):
        columns = list(zip(*rows, strict=True))
        votes = [mean(c) + setting["gamma"] * variance(c) for c in columns]
        votes = [0.0, 0.0, *(0.0 if j in protected else x for j, x in zip(places, votes, strict=True)), 0.0, 0.0]
        of_heads.append([sum(votes[c : c + 5]) / 5 for c in range(len(places))])
    return [mean([of_head[c] for of_head in of_heads]) for c in range(len(places))]


def cake_preference(turn, W, protected, tau1, tau2):
    """P = H^(1/tau1) V^(1/tau2), from the attention to tokens that are not protected."""
    dispersion = shift = 0.0
    for h in range(H):
        for rows in window_rows(turn, h, W):
            for j, column in zip(turn.candidates[h], zip(*rows, strict=True), strict=True):
                if j not in protected:
                    dispersion -= sum(a * math.log(a) for a in column if a > 0)
                    shift += variance(column)
    return dispersion ** (1 / tau1) * shift ** (1 / tau2)


def cake(wants, least, most, total):
    """min(cap, x P) beyond the protected tokens; x is found by halving, then largest remainder."""
    free, caps = total - sum(least), [b - a for a, b in zip(least, most, strict=True)]
    if free >= sum(caps):
        return most
    wants = wants if sum(wants) > 0 else [1.0] * len(wants)
    low, high = 0.0, 1e3 * free / min(p for p in wants if p > 0)
    for _ in range(200):
        x = (low + high) / 2
        low, high = (x, high) if sum(min(c, x * p) for c, p in zip(caps, wants, strict=True)) < free else (low, x)
    shares = [min(c, x * p) for c, p in zip(caps, wants, strict=True)]
    return [a + b for a, b in zip(least, rounded(shares, free), strict=True)]


def cake_code(wants, least, most, total):
    """The published code: whole parts, one equal round for what is beyond the cap, one for what is missing."""
    free, caps = total - sum(least), [b - a for a, b in zip(least, most, strict=True)]
    if free >= sum(caps):
        return most
    parts = [int(p / sum(wants) * free) for p in wants]
    over = sum(max(0, n - c) for n, c in zip(parts, caps, strict=True))
    parts = [min(n, c) for n, c in zip(parts, caps, strict=True)]
    below = [layer for layer, n in enumerate(parts) if n < caps[layer]]
    for rank, layer in enumerate(below):
        parts[layer] += over // len(below) + (rank < over % len(below))
    missing = free - sum(parts)
    parts = [n + missing // len(parts) + (layer < missing % len(parts)) for layer, n in enumerate(parts)]
    return [a + min(n, c) for a, n, c in zip(least, parts, caps, strict=True)]


def keydiff_scores(turn, h):
    """KeyDiff: minus the cosine between a key and the mean of the normalised keys."""
    unit = [[x / math.sqrt(dot(k, k)) for x in k] for k in (turn.k[j][h] for j in turn.candidates[h])]
    anchor = [mean([k[d] for k in unit]) for d in range(D)]
    return [-dot(k, anchor) / math.sqrt(dot(anchor, anchor)) for k in unit]


def turned(x, position, frequencies):
    """RoPE: the halves of a vector are the parts of complex numbers, each turned at a pace of its own."""
    half = D // 2
    parts = [complex(x[d], x[d + half]) * cmath.exp(1j * position * f) for d, f in enumerate(frequencies)]
    return [c.real for c in parts] + [c.imag for c in parts]


@cache
def rotation_to_come(first, frequencies):
    """The mean of the rotation matrices at the next 512 positions, by rows."""
    units = [[float(a == b) for a in range(D)] for b in range(D)]
    images = [[turned(unit, p, frequencies) for unit in units] for p in range(first, first + 512)]
    return [[mean([image[b][a] for image in images]) for b in range(D)] for a in range(D)]


def times(matrix, x):
    return [dot(row, x) for row in matrix]


def expected_scores(turn, h, sinks=4, epsilon=0.0, use_vnorm=True, compat=False):
    """Expected Attention: queries before RoPE have mu and Sigma, those to come are turned by the mean rotation."""
    places, R = turn.candidates[h], rotation_to_come(turn.end, turn.frequencies)
    places_in = [j for j in places if j >= (sinks if compat else 0)]
    votes = []
    for head in range(h * turn.G, (h + 1) * turn.G):
        back = [turned(turn.q[i][head], -i, turn.frequencies) for i in range(max(turn.first, sinks), turn.end)]
        mu = [mean([x[d] for x in back]) for d in range(D)]
        sigma = [[mean([(x[a] - mu[a]) * (x[b] - mu[b]) for x in back]) for b in range(D)] for a in range(D)]
        logits = []
        for k in (turn.k[j][h] for j in places_in):
            k_back = [dot([R[a][b] for a in range(D)], k) for b in range(D)]  # R^T k
            logits.append(dot(k, times(R, mu)) / math.sqrt(D) + dot(k_back, times(sigma, k_back)) / (2 * D))
        powers = [math.exp(z - max(logits)) for z in logits]
        weight = dict(zip(places_in, (x / sum(powers) for x in powers), strict=True))
        votes.append([weight.get(j, 0.0) for j in places])
    scores = [mean(of_token) for of_token in zip(*votes, strict=True)]
    if not use_vnorm:
        return scores
    values = [turn.v[j][h] for j in places]
    return [(s + epsilon) * math.sqrt(dot(v, v)) for s, v in zip(scores, values, strict=True)]


def rounded(shares, total):
    """Largest remainder; the earlier one among equals."""
    whole = [math.floor(x + 1e-9) for x in shares]
    order = sorted(range(len(shares)), key=lambda i: (-round(shares[i] - whole[i], 9), i))
    return [n + (i in order[: total - sum(whole)]) for i, n in enumerate(whole)]


def uniform(seen, budget, protected, importance):
    return [[min(budget, seen)] * H for _ in range(L)]


def headkv(beta):
    """HeadKV, equation 4, capped at the prompt; what a head cannot use goes to the others by their scores."""

    def budgets(seen, budget, protected, importance):
        if seen <= budget:
            return uniform(seen, budget, protected, importance)
        r2 = importance["r2"]
        G = len(r2[0]) // H
        score = [mean(r2[layer][h * G : (h + 1) * G]) for layer in range(L) for h in range(H)]
        score = [x / sum(score) for x in score]
        b = budget - protected
        share = [b * (1 - 1 / beta) + x * (b / beta) * L * H for x in score]
        while (excess := sum(max(0.0, x - (seen - protected)) for x in share)) > 1e-12:
            share = [min(x, seen - protected) for x in share]
            weight = sum(s for s, x in zip(score, share, strict=True) if x < seen - protected)
            share = [x + excess * s / weight if x < seen - protected else x for s, x in zip(score, share, strict=True)]
        exact = rounded(share, b * L * H)
        return [[exact[layer * H + h] + protected for h in range(H)] for layer in range(L)]

    return budgets


def pyramidkv(seen, budget, protected, importance):
    """PyramidKV: layers fall from 2b - b/beta to b/beta in equal steps, beta = 20."""
    if seen <= budget:
        return uniform(seen, budget, protected, importance)
    b = budget - protected
    top = min(2 * b - b / 20, seen - protected)
    step = (top - (2 * b - top)) / (L - 1)
    exact = rounded([top - layer * step for layer in range(L)], b * L)
    return [[n + protected] * H for n in exact]


def pyramidkv_code(seen, budget, protected, importance):
    """The published code: whole numbers only, uniform for prompts of less than two budgets."""
    b = budget - protected
    if seen < 2 * b or seen <= budget:
        return uniform(seen, budget, protected, importance)
    least = b // 20
    most = 2 * b - least
    if most >= seen - protected:
        most = seen - protected
        least = 2 * b - most
    step = (most - least) // (L - 1)
    return [[most - layer * step + protected] * H for layer in range(L)]


def compresskv(floor=32, ceiling=3.0):
    """CompressKV: floor + e (T - floor L), clipped, then single tokens in turns until the total is right."""

    def budgets(seen, budget, protected, importance):
        if seen <= budget:
            return uniform(seen, budget, protected, importance)
        errors = importance["layer_errors"]
        least, most, total = min(max(floor, protected), budget), min(int(ceiling * budget), seen), budget * L
        share = [round(e / sum(errors) * (total - least * L)) + least for e in errors]
        share = [max(least, min(most, n)) for n in share]
        while sum(share) != total:
            step = 1 if sum(share) < total else -1
            for layer in sorted(range(L), key=lambda layer: (-step * errors[layer], layer)):
                if sum(share) != total and least <= share[layer] + step <= most:
                    share[layer] += step
        return [[n] * H for n in share]

    return budgets


def best(scores, places, protected, count):
    """The protected ones, then the best; the earlier one among equals."""
    order = sorted(range(len(places)), key=lambda c: (places[c] not in protected, -scores[c], c))
    return sorted(places[c] for c in order[:count])


def per_head(turn, layer_budgets, scores, protected, budget):
    return [best(scores[h], turn.candidates[h], protected, layer_budgets[h]) for h in range(H)]


def flat(alpha=0.2):
    """Ada-KV, safeguard first: each head's best alpha b, then the best of all heads together."""

    def choose(turn, layer_budgets, scores, protected, budget):
        b = max(0, layer_budgets[0] - budget["protected"])
        kept = [
            best(s, places, protected, sum(j in protected for j in places) + math.floor(alpha * b))
            for s, places in zip(scores, turn.candidates, strict=True)
        ]
        rest = [
            (-scores[h][c], c - len(turn.candidates[h]), h, j)
            for h in range(H)
            for c, j in enumerate(turn.candidates[h])
            if j not in kept[h]
        ]
        for _, _, h, j in sorted(rest)[: sum(layer_budgets) - sum(map(len, kept))]:
            kept[h].append(j)
        return [sorted(head) for head in kept]

    return choose


def flat_code(alpha):
    """The published code: winners of a plain flat top-k, mixed with the floor, rounded; no safeguard before."""

    def choose(turn, layer_budgets, scores, protected, budget):
        C = min(budget["tokens"], turn.end)
        if sum(map(len, turn.candidates)) <= H * C:
            return [list(places) for places in turn.candidates]
        b = C - budget["protected"]
        free = [
            (-scores[h][c], c - len(turn.candidates[h]), h)
            for h in range(H)
            for c, j in enumerate(turn.candidates[h])
            if j not in protected
        ]
        winners = [h for _, _, h in sorted(free)[: H * b]]
        kept = []
        for h, places in enumerate(turn.candidates):
            count = round((1 - alpha) * winners.count(h) + math.floor(alpha * b))
            kept.append(best(scores[h], places, protected, count + sum(j in protected for j in places)))
        return kept

    return choose


def critical(choose=per_head, alpha=0.5):
    """CriticalKV: of what another choice keeps, a part by score, the rest by score times what a value adds."""

    def chosen(turn, layer_budgets, scores, protected, budget):
        kept = []
        for h, held in enumerate(choose(turn, layer_budgets, scores, protected, budget)):
            places = turn.candidates[h]
            first = best(scores[h], places, protected, math.floor(alpha * len(held)))
            weighed = []
            for j, score in zip(places, scores[h], strict=True):
                adds = [
                    sum(abs(dot(turn.v[j][h], row[head * D : (head + 1) * D])) for row in turn.out)
                    for head in range(h * turn.G, (h + 1) * turn.G)
                ]
                weighed.append((score + 1e-4) * mean(adds))
            kept.append(best(weighed, places, {*protected, *first}, len(held)))
        return kept

    return chosen


def window(setting, budgets=uniform, choose=per_head):
    return {"scores": setting, "budgets": budgets, "choose": choose, "ring": False}


def expected(choose=per_head, **options):
    scores = {"scores": "expected", "options": options, "sinks": options.get("sinks", 4), "recent": 1}
    return {**scores, "budgets": uniform, "choose": choose, "ring": False}


SHARED = published(8) | {"pool": mean, "ahead": 2, "behind": 2, "voters": 4}


def spread(rule, W, tau1=1.0, tau2=1.0):
    """All layers are looked at before any of them is cut."""
    return {"rule": rule, "window": W, "taus": (tau1, tau2)}


CAKE = {"window": 32, "gamma": 200.0, "sinks": 0, "recent": 32}
STREAM = {"scores": "position", "sinks": 4, "recent": 1, "budgets": uniform, "choose": per_head, "ring": True}
ORACLES = {
    "full": {"scores": "position", "sinks": 0, "recent": 1, "budgets": uniform, "choose": per_head, "ring": False},
    "streaming": STREAM,
    "streaming:positions=in-cache": STREAM | {"in_cache": True},
    "streaming:positions=in-cache,sinks=0": STREAM | {"in_cache": True, "sinks": 0},
    "snapkv": window(published(32)),
    "snapkv:preset=tuned": window(TUNED),
    "headkv": window(TUNED, headkv(3.0)),
    "snapkv:preset=adaptive": window(ADAPTIVE),
    "headkv:preset=adaptive,beta=1.01": window(ADAPTIVE, headkv(1.01)),
    "headkv:preset=published,beta=1.01": window(published(8), headkv(1.01)),
    "adakv": window(published(32), choose=flat()),
    "adakv:preset=tuned": window(TUNED, choose=flat()),
    "adakv:preset=tuned,alpha=0.5": window(TUNED, choose=flat(0.5)),
    "adakv:preset=tuned,compat=true": window(TUNED, choose=flat_code(0.2)),
    "adakv:preset=tuned,compat=true,alpha=0.5": window(TUNED, choose=flat_code(0.5)),
    "pyramidkv": window(published(8), pyramidkv),
    "pyramidkv:preset=tuned": window(TUNED, pyramidkv),
    "pyramidkv:compat=true": window(published(8), pyramidkv_code),
    "snapkv:preset=tuned,pooling=mean": window(TUNED | {"pool": mean}),
    "compresskv": window(SHARED, compresskv()),
    "compresskv:preset=tuned": window(TUNED | {"voters": 4}, compresskv()),
    "compresskv:preset=adaptive": window(ADAPTIVE | {"voters": 4}, compresskv()),
    "compresskv:floor=10,ceiling=1.4,heads=2": window(SHARED | {"voters": 2}, compresskv(10, 1.4)),
    "compresskv:allocator=headkv,beta=1.01": window(SHARED, headkv(1.01)),
    "compresskv:preset=tuned,allocator=adakv": window(TUNED | {"voters": 4}, choose=flat()),
    "snapkv:preset=tuned,allocator=compresskv,floor=5": window(TUNED, compresskv(5)),
    "keydiff": {"scores": "keydiff", "sinks": 0, "recent": 1, "budgets": uniform, "choose": per_head, "ring": False},
    "cake": window(CAKE) | {"spread": spread(cake, 32)},
    "cake:cascade=false": window(CAKE) | {"spread": spread(cake, 32)},
    "cake:window=8,recent=8,tau1=1.6,tau2=0.4": window(CAKE | {"window": 8, "recent": 8})
    | {"spread": spread(cake, 8, 1.6, 0.4)},
    "cake:window=8,recent=8,compat=true,cascade=false": window(CAKE | {"window": 8, "recent": 8})
    | {"spread": spread(cake_code, 8)},
    "snapkv:preset=tuned,allocator=cake": window(TUNED) | {"spread": spread(cake, 32)},
    "snapkv:preset=tuned,allocator=headkv,beta=1.01": window(TUNED, headkv(1.01)),
    "headkv:allocator=uniform": window(TUNED),
    "h2o": {"evicts": "sums", "recent_share": 0.5},
    "h2o:ratio=0.2": {"evicts": "sums", "recent_share": 0.2},
    "tova": {"evicts": "last weights", "recent_share": 0},
    "headkv-r2": window(published(8), headkv(1.01)),
    "criticalkv": window(published(32), choose=critical()),
    "criticalkv:alpha=0.25+snapkv:preset=tuned": window(TUNED, choose=critical(alpha=0.25)),
    "criticalkv+headkv:preset=published,beta=2": window(published(8), headkv(2.0), critical()),
    "criticalkv+adakv:preset=tuned": window(TUNED, choose=critical(flat())),
    "criticalkv+expected-attention:use_vnorm=false": expected(critical(), use_vnorm=False),
    "expected-attention": expected(),
    "expected-attention:compat=true": expected(compat=True),
    "expected-attention:sinks=0": expected(sinks=0),
    "expected-attention:allocator=adakv,epsilon=0.01": expected(flat(), epsilon=0.01),
    "keydiff:allocator=adakv": {
        "scores": "keydiff",
        "sinks": 0,
        "recent": 1,
        "budgets": uniform,
        "choose": flat(),
        "ring": False,
    },
}


# -- a conversation ----------------------------------------------------------------------------------------------------


class Turn:
    """A layer of one row: new tokens from `first` to `end`, and what each head has of the past."""

    def __init__(self, q, k, v, ends, out, frequencies, held, first, end):
        self.q, self.k, self.v, self.ends, self.out, self.frequencies = q, k, v, ends, out, frequencies
        self.first, self.end, self.G = first, end, len(q[0]) // H
        self.candidates = [[*sorted(head), *range(first, end)] for head in held]

    def protected(self, oracle):
        setting = oracle["scores"] if isinstance(oracle["scores"], dict) else oracle
        return {*range(setting["sinks"]), *range(self.end - setting["recent"], self.end)}

    def keep(self, oracle, layer, budget, importance, spread_budgets):
        setting = oracle["scores"] if isinstance(oracle["scores"], dict) else oracle
        sinks, recent, protected = setting["sinks"], setting["recent"], self.protected(oracle)
        if oracle["scores"] == "position":
            scores = [[float(j) for j in places] for places in self.candidates]
        elif oracle["scores"] == "keydiff":
            scores = [keydiff_scores(self, h) for h in range(H)]
        elif "voters" in setting:
            scores = compresskv_scores(self, setting, protected, importance["semantic"][layer])
        elif oracle["scores"] == "expected":
            scores = [expected_scores(self, h, **oracle["options"]) for h in range(H)]
        elif "gamma" in setting:
            scores = [cake_scores(self, h, setting, protected) for h in range(H)]
        else:
            scores = [window_scores(self, h, setting, protected) for h in range(H)]
        budgets = (spread_budgets or oracle["budgets"](self.end, budget, sinks + recent, importance))[layer]
        numbers = {"tokens": budget, "protected": sinks + recent}
        return oracle["choose"](self, budgets, scores, protected, numbers)


class Loop:
    """What a conversation's rows hold, position by position, and what they answer."""

    def __init__(self, oracle, q, k, v, ends, outputs, frequencies, budget, room, importance):
        self.outputs = [out.weight.double().tolist() for out in outputs]  # [layer][width][head and d]
        self.frequencies = [tuple(row) for row in frequencies.double().tolist()]
        self.oracle, self.budget, self.room, self.importance = oracle, budget, room, importance
        self.q, self.k, self.v = ([row.tolist() for row in x.double()] for x in (q, k, v))  # [layer][row][t][head][d]
        self.ends = ends.tolist()
        self.rows = range(q.shape[1])
        self.held = [[[[] for _ in range(H)] for _ in self.rows] for _ in range(L)]
        self.seen = [0 for _ in self.rows]

    def take_in(self, lengths):
        for row in self.rows:
            first, end = self.seen[row], self.seen[row] + lengths[row]
            turns = []
            for layer in range(L):
                tensors = (x[layer][row] for x in (self.q, self.k, self.v))
                others = self.ends[row], self.outputs[layer], self.frequencies[row]
                turns.append(Turn(*tensors, *others, self.held[layer][row], first, end))
            budgets = self.spread(turns)
            for layer, turn in enumerate(turns):
                self.held[layer][row] = turn.keep(self.oracle, layer, self.budget, self.importance, budgets)
            self.seen[row] = end
        self.kept = [[[list(head) for head in row] for row in layer] for layer in self.held]
        self.generated = 0

    def spread(self, turns):
        """Budgets of all layers where they compete for one total; the heads of a layer hold equally many tokens."""
        if (how := self.oracle.get("spread")) is None:
            return None
        protected = turns[0].protected(self.oracle)
        wants = [cake_preference(turn, how["window"], protected, *how["taus"]) for turn in turns]
        least = [len(protected & {*turn.candidates[0]}) for turn in turns]
        most = [len(turn.candidates[0]) for turn in turns]
        return [[n] * H for n in how["rule"](wants, least, most, min(self.budget, turns[0].end) * L)]

    def store(self):
        """A generated token; beyond the room, the oldest generated one goes, or the oldest that is no sink."""
        self.generated += 1
        for layer in range(L):
            for row in self.rows:
                self.ends[row][self.seen[row]] = False  # nobody looks at generated tokens
                for held, kept in zip(self.held[layer][row], self.kept[layer][row], strict=True):
                    if self.generated > self.room:
                        sinks = self.oracle.get("sinks")
                        may_go = [j for j in held if (j >= sinks if self.oracle["ring"] else j not in kept)]
                        held.remove(min(may_go))
                    held.append(self.seen[row])
        self.seen = [n + 1 for n in self.seen]

    def evict(self):
        """Nothing goes because of what a step attended to."""

    def answer(self, layer, row, head, held):
        """Of the last query, from tokens that are held in this order."""
        h = head // (len(self.q[layer][row][0]) // H)
        q, k, v = self.q[layer][row][self.seen[row] - 1][head], self.k[layer][row], self.v[layer][row]
        keys = [k[j][h] for j in held]
        if self.oracle.get("in_cache"):
            q = turned(q, len(held) - 1, self.frequencies[row])
            keys = [turned(key, place, self.frequencies[row]) for place, key in enumerate(keys)]
        return answer(q, keys, [v[j][h] for j in held])


class EvictingLoop(Loop):
    """Append, attend, evict: at once after a prompt, one by one while decoding."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sums = [[[{} for _ in range(H)] for _ in self.rows] for _ in range(L)]
        self.last = [[[{} for _ in range(H)] for _ in self.rows] for _ in range(L)]

    def attend(self, layer, row, i):
        """What query i pays to each token that a head holds and that is not newer."""
        q, k = self.q[layer][row][i], self.k[layer][row]
        G = len(q) // H
        for h in range(H):
            seen = [j for j in self.held[layer][row][h] if j <= i]
            of_heads = [attention(q[h * G + g], [k[j][h] for j in seen]) for g in range(G)]
            self.last[layer][row][h] = {j: mean(weights) for j, *weights in zip(seen, *of_heads, strict=True)}
            for j, weight in self.last[layer][row][h].items():
                self.sums[layer][row][h][j] = self.sums[layer][row][h].get(j, 0.0) + weight

    def shrink(self, layer, row):
        """Keep the last R, and of the others the best; the newer one among equals."""
        R = math.floor(self.oracle["recent_share"] * self.budget)
        for h, held in enumerate(self.held[layer][row]):
            if len(held) > self.budget:
                held.sort()
                old, recent = held[: len(held) - R], held[len(held) - R :]
                if self.oracle["evicts"] == "sums":
                    score = self.sums[layer][row][h]
                else:
                    score = {j: mean([head[j] for head in self.last[layer][row]]) for j in old}
                order = sorted(old, key=lambda j, score=score: (score[j], j))
                held[:] = [*sorted(order[len(old) - (self.budget - R) :]), *recent]

    def take_in(self, lengths):
        for row in self.rows:
            first, end = self.seen[row], self.seen[row] + lengths[row]
            for layer in range(L):
                for held in self.held[layer][row]:
                    held.extend(range(first, end))
                for i in range(first, end):
                    self.attend(layer, row, i)
                self.shrink(layer, row)
            self.seen[row] = end

    def store(self):
        for layer in range(L):
            for row in self.rows:
                for held in self.held[layer][row]:
                    held.append(self.seen[row])
        self.seen = [n + 1 for n in self.seen]

    def evict(self):
        for layer in range(L):
            for row in self.rows:
                self.attend(layer, row, self.seen[row] - 1)
                self.shrink(layer, row)


def held_by(cache, row, layer, h):
    start, length = int(cache.offset[row, layer, h]), int(cache.length[row, layer, h])
    return cache.pos[row, start : start + length].tolist()


def take_in(cache, method, tensors, ends, outputs, frequencies_Bd, seen, lengths, budget, room):
    """One turn through our parts; returns the outputs of every layer."""
    keep_BLH = torch.stack(
        [
            method.shares(budget=budget, prompt=n + new, num_layers=L, num_kv_heads=H)
            for n, new in zip(seen, lengths, strict=True)
        ]
    )
    sizes = {"keep_BLH": keep_BLH, "room": [method.room(room)] * len(seen), "new_tokens": lengths}
    most = max(lengths)
    if method.sentences:
        sizes["ends_BT"] = torch.stack([ends[row, n : n + most] for row, n in enumerate(seen)])
    chunk = PromptPass(cache, method, **sizes, outputs=outputs, frequencies_Bd=frequencies_Bd)
    out = []
    for layer in range(L):
        q, k, v = (torch.stack([x[layer, row, n : n + most] for row, n in enumerate(seen)]) for x in tensors)
        out.append(chunk.attend(torch.tensor([layer]), q, k, v, None))
    chunk.finish()
    return out


def at_positions(x_LBTHD, frequencies_Bd):
    """RoPE as a model does it."""
    angle_BTd = torch.arange(x_LBTHD.shape[2])[:, None] * frequencies_Bd[:, None]
    return torch.stack([apply_rope(x_BTHD, angle_BTd.cos(), angle_BTd.sin()) for x_BTHD in x_LBTHD])


@pytest.mark.parametrize("lengths", [[80], [80, 45, 11]], ids=["alone", "ragged"])
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("spec", ORACLES)
def test_a_method_is_its_papers_formulas(spec, G, lengths):
    torch.manual_seed(len(spec) + G)
    B, total = len(lengths), 300
    q, k, v = (torch.randn(L, B, total, heads, D) for heads in (G * H, H, H))
    importance = {kind: torch.rand(L, G * H) ** 3 for kind in ("r2", "semantic")}
    importance["layer_errors"] = torch.rand(L) ** 3
    outputs, frequencies_Bd = [Linear(G * H * D, E) for _ in range(L)], torch.rand(B, D // 2)
    for out in outputs:
        torch.nn.init.normal_(out.weight)
    ends = torch.rand(B, total) < 0.1
    budget, room = (1000, 2 * STEPS) if spec == "full" else (40, ROOM)
    method = build_method(spec, importance)
    more = [30, 12, 23 if method.in_cache else 3][:B]  # who is asked to go on after it has filled its budget again
    slots = (200 + room) * L * H if spec == "full" else (budget + room) * L * H + 10  # what published rounding adds
    shape = ArenaShape(batch=B, num_layers=L, num_kv_heads=H, head_dim=D, slots=slots, dtype=torch.float32)
    context = total if method.sentences else 0
    cache = ArenaCache(replace(shape, evict=method.evict, context=context, sinks=method.turned_sinks), "cpu")
    loop = EvictingLoop if method.evict else Loop
    as_lists = {kind: scores.double().tolist() for kind, scores in importance.items()}
    loop = loop(ORACLES[spec], q, k, v, ends, outputs, frequencies_Bd, budget, room, as_lists)

    if method.in_cache:  # the loop stores what has not been rotated
        q, k = (at_positions(x, frequencies_Bd) for x in (q, k))

    def compare(when):
        for layer in range(L):
            for row in range(B):
                for h in range(H):
                    got, want = held_by(cache, row, layer, h), loop.held[layer][row][h]
                    assert sorted(got) == sorted(want), f"{when}: layer {layer}, row {row}, head {h}"

    for turn, new in enumerate((lengths, more)):
        answers = take_in(cache, method, (q, k, v), ends, outputs, frequencies_Bd, loop.seen, new, budget, room)
        before = [[[list(head) for head in row] for row in layer] for layer in loop.held]
        loop.take_in(new)
        compare(f"turn {turn}")
        for layer in range(L):
            for row, n in enumerate(new):
                for head in range(G * H):  # the last new token attends to all of the past and of the turn
                    held = [*before[layer][row][head // G], *range(loop.seen[row] - n, loop.seen[row])]
                    want = loop.answer(layer, row, head, held)
                    assert answers[layer][row, n - 1, head].tolist() == pytest.approx(want, abs=1e-5)
        if turn == 1 and not method.in_cache:
            break
        for step in range(STEPS):
            cache.begin_step(torch.ones(B, dtype=torch.bool))
            here = [(row, loop.seen[row]) for row in range(B)]
            loop.store()
            for layer in range(L):
                now = [torch.stack([x[layer, row, at] for row, at in here])[:, None] for x in (q, k, v)]
                out = cache.attend(torch.tensor([layer]), *now, None)
                if step in (0, ROOM, STEPS - 1):  # room left, the first that makes place, the last
                    for row in range(B):
                        for head in range(G * H):
                            want = loop.answer(layer, row, head, loop.held[layer][row][head // G])
                            assert out[row, 0, head].tolist() == pytest.approx(want, abs=1e-5)
            compare(f"step {step}")
            loop.evict()
            cache.end_step()


def test_places_count_whatever_a_conversation_goes_through():
    """Prompts shorter than the sinks, rows that pause, steps that are interrupted, and turns: from what is held."""
    torch.manual_seed(0)
    B, total, frequencies_Bd = 3, 150, torch.rand(3, D // 2)
    raw = torch.randn(2, B, total, H, D)
    (q, k), v = at_positions(raw, frequencies_Bd), torch.randn(B, total, H, D)
    method = build_method("streaming:positions=in-cache")
    shape = ArenaShape(batch=B, num_layers=1, num_kv_heads=H, head_dim=D, slots=19 * H, dtype=torch.float32, sinks=4)
    cache, layer, seen = ArenaCache(shape, "cpu"), torch.tensor([0]), [0] * B

    def want(row, h, i, held):
        place_1S = torch.arange(len(held))[None]
        angle_1Sd = place_1S[..., None] * frequencies_Bd[row]
        keys = apply_rope(raw[1, row, held, h][None, :, None], angle_1Sd.cos(), angle_1Sd.sin())[0, :, 0]
        query = apply_rope(raw[0, row, i, h].view(1, 1, 1, D), angle_1Sd[:, -1:].cos(), angle_1Sd[:, -1:].sin())
        return (keys @ query.flatten() / D**0.5).softmax(0) @ v[row, held, h]

    def at(tensor, length=1):
        return torch.stack([tensor[row, n : n + length] for row, n in enumerate(seen)])

    for lengths in ([2, 1, 9], [3, 1, 2], [1, 30, 4]):
        held = [
            [[j for j in sorted(held_by(cache, row, 0, h)) if 0 <= j < n] for h in range(H)]
            for row, n in enumerate(seen)
        ]
        keep = torch.stack(
            [
                method.shares(budget=12, prompt=n + new, num_layers=1, num_kv_heads=H)
                for n, new in zip(seen, lengths, strict=True)
            ]
        )
        sizes = {"keep_BLH": keep, "room": [7] * B, "new_tokens": lengths, "frequencies_Bd": frequencies_Bd}
        chunk = PromptPass(cache, method, **sizes)
        out = chunk.attend(layer, *(at(x, max(lengths)) for x in (q, k, v)), None)
        chunk.finish()
        for row, n in enumerate(lengths):
            for h, i in itertools.product(range(H), range(seen[row], seen[row] + n)):
                got, tokens = out[row, i - seen[row], h], [*held[row][h], *range(seen[row], i + 1)]
                torch.testing.assert_close(got, want(row, h, i, tokens), rtol=1e-4, atol=1e-4)
        seen = [n + new for n, new in zip(seen, lengths, strict=True)]
        for step in range(30):
            active = torch.tensor([True, step % 3 > 0, step % 4 > 1])
            if step % 5 == 0:
                cache.begin_step(~active)
                cache.attend(layer, *(torch.randn(B, 1, H, D) for _ in range(3)), None)
            cache.begin_step(active)
            out = cache.attend(layer, at(q), at(k), at(v), None)
            cache.end_step()
            for row, h in itertools.product(range(B), range(H)):
                if active[row]:
                    tokens = sorted(held_by(cache, row, 0, h))
                    assert tokens[-1] == seen[row]
                    torch.testing.assert_close(out[row, 0, h], want(row, h, seen[row], tokens), rtol=1e-4, atol=1e-4)
            seen = [n + flag for n, flag in zip(seen, active.tolist(), strict=True)]


def test_every_method_has_an_oracle():
    of_layers = {"kvsharer"}  # a question of the whole model: tests/test_sharing.py
    assert {re.split("[:+]", spec)[0] for spec in ORACLES} | of_layers == set(method_names())
