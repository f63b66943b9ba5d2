"""The invariants of engine and cache, on a small random model and every method."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from checkpoints import LayerSharing
from checkpoints.config import ModelConfig, RopeConfig
from kernels.ragged_decode import ragged_decode
from kernels.rope import apply_rope
from layers.cache.arena import ArenaCache
from layers.cache.prompt import PromptPass
from layers.cache.staging import Staging
from layers.linear import Linear
from layers.methods import build_method, method_names
from layers.plan import ArenaShape
from layers.quantize import quantize_weights
from recipes.search_sharing import SharedLayers
from zoo import engine as engine_module
from zoo.engine import Engine
from zoo.family import Decoder
from zoo.load import Loaded

V = 97


def make_loaded(
    *, windows=(None, None, None), heads=(4, 2), model_type="mistral", max_position=512, tied=False, rope=None
):
    config = ModelConfig(
        model_type=model_type,
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_layers=len(windows),
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=8,
        max_position=max_position,
        rms_norm_eps=1e-5,
        rope=rope or RopeConfig(),
        tie_embeddings=tied,
        layer_windows=windows,
    )
    torch.manual_seed(0)
    model = Decoder(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        torch.nn.init.ones_(weight) if "norm" in name else torch.nn.init.normal_(weight, std=0.3)
    texts = [" a", "b", "c", " d", "."] * V
    signs = SimpleNamespace(special_tokens={"<end>": 0}, texts=lambda: texts[:V])
    return Loaded(name="tiny", model=model, tokenizer=signs, chat=SimpleNamespace(stop_ids=frozenset()), config=config)


@pytest.fixture(scope="module")
def loaded():
    return make_loaded()


@pytest.fixture(autouse=True)
def importance(monkeypatch):
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(5)) ** 3
    kinds = {"r": scores, "r2": scores.flip(0), "semantic": scores.flip(1), "layer_errors": scores[:, 0]}
    monkeypatch.setattr(engine_module, "head_importance", lambda loaded, path: kinds)
    hashes = {"model_id": "tiny", "config_hash": "", "tokenizer_hash": ""}
    found = LayerSharing(**hashes, num_layers=3, pairs=((2, 0),), similarity=(0.9,))
    monkeypatch.setattr(engine_module, "layer_sharing", lambda loaded, path: found)


def tokens(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (n,), generator=g).tolist() for n in lengths]


def dense(loaded, ids, spec="full"):
    model, source = loaded.model, [0, 1, 0] if spec.startswith("kvsharer") else [0, 1, 2]
    ids_1T = torch.tensor([ids])
    x_1TE = model.hidden(ids_1T, model.rope(torch.arange(len(ids))[None], len(ids)), SharedLayers(source))
    return model.logits(x_1TE[0, -1])


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-4)


WITHOUT_WINDOW = ("full", "streaming", "keydiff", "expected-attention", "h2o", "tova", "kvsharer")
EVICTING = ("h2o", "tova")


def variants(name):
    if name in (*WITHOUT_WINDOW, "criticalkv", "cake"):
        return [name]
    return [name, f"{name}:preset=tuned", f"{name}:preset=published"]


SPECS = [spec for name in method_names() for spec in variants(name)] + [
    "snapkv:preset=adaptive",
    "headkv:scores=r,beta=1.01",
    "headkv:compat=true",
    "adakv:compat=true,alpha=0.5",
    "pyramidkv:compat=true",
    "snapkv:allocator=headkv",
    "keydiff:allocator=adakv",
    "criticalkv+adakv:preset=tuned",
    "criticalkv:alpha=0.25+headkv",
    "streaming:allocator=headkv",
    "streaming:positions=in-cache",
    "streaming:positions=in-cache,allocator=headkv",
    "h2o:ratio=0.2",
    "h2o:allocator=adakv",
    "compresskv:allocator=adakv",
    "cake:cascade=false",
    "cake:compat=true,tau1=1.6,tau2=0.4",
    "snapkv:preset=tuned,allocator=cake",
    "keydiff:allocator=cake",
    "streaming:allocator=cake,window=4",
    "kvsharer+headkv",
    "kvsharer+adakv",
    "kvsharer+h2o",
    "kvsharer+h2o:allocator=adakv",
    "kvsharer+tova",
    "kvsharer+streaming:positions=in-cache",
    "kvsharer+compresskv:preset=tuned",
    "kvsharer+criticalkv+snapkv",
    "kvsharer+cake",
]
SMALL = "window=4,recent=4"


def evicts(spec):
    return spec.rpartition("+")[2].startswith(EVICTING)


def small(spec):
    """The same method with a window that small budgets can hold."""
    spec = "criticalkv+snapkv" if spec == "criticalkv" else spec
    last = spec.rpartition("+")[2]
    if last.startswith(WITHOUT_WINDOW):
        return spec
    return spec + ("," if ":" in last else ":") + SMALL


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("windows", [(None, None, None), (None, 24, 24)], ids=["full", "sliding"])
def test_a_budget_that_holds_everything_changes_nothing(spec, windows):
    loaded = make_loaded(windows=windows)
    engine = Engine(loaded, cache=spec, budget=120, max_new_tokens=30, max_context=400)
    prompts = tokens(60, 1, 33)
    texts = [list(ids) for ids in prompts]
    logits = engine.prefill(prompts)
    for turn in range(2):
        for row, text in enumerate(texts):
            close(logits[row], dense(loaded, text, spec))
        for _ in range(4):
            new = logits.argmax(-1)
            texts = [[*text, int(token)] for text, token in zip(texts, new, strict=True)]
            logits = engine.step(new)
        for row, text in enumerate(texts):
            close(logits[row], dense(loaded, text, spec))
        more = tokens(7, 20, 1, seed=turn + 1)
        texts = [text + extra for text, extra in zip(texts, more, strict=True)]
        logits = engine.extend(more)
    assert engine.stats().tokens_seen == [len(text) for text in texts]
    assert engine.stats().kept.amin((1, 2)).tolist() == engine.stats().tokens_seen


@pytest.mark.parametrize("spec", SPECS)
def test_a_snapshot_repeats_to_the_bit(loaded, spec):
    engine = Engine(loaded, cache=small(spec), budget=24, max_new_tokens=3, max_context=300)

    def go_on(logits):
        outputs = []
        for _ in range(5):  # more than there is room for, so that tokens are replaced
            outputs.append(logits := engine.step(logits.argmax(-1), [True, False]))
        outputs.append(engine.extend(tokens(70, 9, seed=1)))
        return [*outputs, engine.step([1, 2]), engine.stats().kept]

    engine.prefill(tokens(50, 90))
    logits = engine.step([3, 4])
    places = engine.cache.k.data_ptr(), engine.cache.offset.data_ptr()
    before = engine.snapshot()
    first = go_on(logits)
    for _ in range(2):
        engine.restore(before)
        assert engine.stats().tokens_seen == [51, 91]
        assert all(map(torch.equal, go_on(logits), first))
    assert (engine.cache.k.data_ptr(), engine.cache.offset.data_ptr()) == places


def test_a_snapshot_is_of_one_engine_and_number_of_rows(loaded):
    engine = Engine(loaded, cache="full", max_context=64)
    with pytest.raises(ValueError, match="call prefill first"):
        engine.snapshot()
    engine.prefill(tokens(5))
    before = engine.snapshot()
    with pytest.raises(ValueError, match="another engine"):
        Engine(loaded, cache="full", max_context=64).restore(before)
    engine.prefill(tokens(5, 6))
    with pytest.raises(ValueError, match="number of rows"):
        engine.restore(before)


def test_a_snapshot_ends_answers_and_knows_pending_tokens(loaded):
    engine = Engine(loaded, cache="full", max_context=64)
    answer = engine.stream(tokens(9)[0], max_new_tokens=4)
    said = next(answer)  # handed out, not yet in the cache
    before = engine.snapshot()
    want = engine.extend(tokens(3, seed=1))
    engine.restore(before)
    with pytest.raises(ValueError, match="cannot go on"):
        next(answer)
    assert torch.equal(engine.extend(tokens(3, seed=1)), want)
    close(want[0], dense(loaded, [*tokens(9)[0], said, *tokens(3, seed=1)[0]]))


@pytest.mark.parametrize("spec", SPECS)
def test_a_ragged_batch_equals_each_row_alone(loaded, spec):
    options = {"cache": small(spec), "budget": 24, "max_new_tokens": 6, "max_context": 300}
    prompts, more = tokens(150, 9, 61), tokens(5, 40, 17, seed=1)
    together = Engine(loaded, **options)
    outputs = [together.prefill(prompts)]
    for _ in range(9):
        outputs.append(together.step(outputs[-1].argmax(-1)))
    outputs.append(together.extend(more))
    outputs.append(together.step(outputs[-1].argmax(-1)))
    alone = Engine(loaded, **options)
    for row in range(3):
        mine = [alone.prefill([prompts[row]])]
        mine += [alone.step(together_out[row : row + 1].argmax(-1)) for together_out in outputs[:9]]
        mine.append(alone.extend([more[row]]))
        mine.append(alone.step(outputs[10][row : row + 1].argmax(-1)))
        for got, want in zip(outputs, mine, strict=True):
            close(got[row], want[0])
        assert torch.equal(together.stats().kept[row], alone.stats().kept[0])


@pytest.mark.parametrize("spec", SPECS)
def test_budgets_are_promises(loaded, spec):
    engine = Engine(loaded, cache=small(spec), budget=24, max_new_tokens=6, max_context=300)
    before = engine.stats().nbytes
    for prompts in (tokens(200), tokens(10), tokens(25)):
        engine.prefill(prompts)
        planned = 24 if engine.budget else 300
        own = sorted(set(engine.cache.source))
        total = min(planned, len(prompts[0])) * 2 * len(own)
        if spec.startswith("cake:compat"):  # a layer may be given what it has lost
            assert total / 2 < int(engine.cache.kept.sum()) <= total
        elif "compat" in spec:
            assert total - 6 <= int(engine.cache.kept.sum()) <= total + 3
        else:
            assert int(engine.cache.kept[:, own].sum()) == total
        for _ in range(20):
            engine.step([1])
            generated = int(engine.cache.generated[0])
            if evicts(spec):  # until the budget and the next token's slot are full
                assert torch.equal(
                    engine.stats().kept, (engine.cache.kept + generated).clamp(max=engine.cache.capacity)
                )
                assert int(engine.stats().kept[:, own].sum()) <= 25 * 2 * len(own)
                continue
            room = min(generated, 6) if engine.budget else generated
            assert torch.equal(engine.stats().kept, engine.cache.kept + room)
    assert engine.stats().nbytes == before == engine.cache.shape.nbytes
    owned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in storage_tensors(engine.cache)}
    assert sum(owned.values()) == before


def storage_tensors(cache):
    return [t for name, t in vars(cache).items() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("cache", method_names())
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("budget", [40, "25%", "60KB", 10_000])
def test_bytes_are_the_plan(loaded, cache, batch, budget):
    engine = Engine(loaded, cache=small(cache), budget=budget, max_new_tokens=5, max_context=256, batch=batch)
    stats = engine.stats()
    assert stats.nbytes == engine.cache.shape.nbytes == sum(t.nbytes for t in storage_tensors(engine.cache))
    if budget == "60KB" and engine.budget:
        slot = engine.cache.shape.slot_bytes * 6 * batch
        assert 60_000 - slot < stats.nbytes <= 60_000
    engine.prefill(tokens(*[100] * batch))
    assert engine.stats().nbytes == stats.nbytes
    if budget == "25%" and engine.budget:
        assert int(engine.cache.kept.sum()) == 25 * 6 * batch


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_depends_on_unused_slots_or_slot_order(loaded, spec):
    engine = Engine(loaded, cache=small(spec), budget=24, max_new_tokens=6, max_context=300)
    prompts = tokens(80, 12)

    def run(disturb):
        out = [engine.prefill(prompts)]
        with torch.inference_mode():
            disturb(engine.cache)
        for _ in range(8):
            out.append(engine.step(out[-1].argmax(-1)))
        out.append(engine.extend(tokens(9, 3, seed=4)))
        return torch.stack(out)

    def poison(cache):
        used = torch.zeros_like(cache.pos, dtype=torch.bool)
        for row, layer, head in torch.cartesian_prod(*map(torch.arange, cache.kept.shape)).tolist():
            start = int(cache.offset[row, layer, head])
            used[row, start : start + int(cache.kept[row, layer, head])] = True
        assert torch.equal(used, cache.pos >= 0)
        for tensor in (cache.k, cache.v, cache.stat):
            if tensor is not None:
                tensor[~used] = float("nan")

    def shuffle(cache):
        if engine.method.ring_over_prompt:
            return
        for row, layer, head in torch.cartesian_prod(*map(torch.arange, cache.kept.shape)).tolist():
            start, kept = int(cache.offset[row, layer, head]), int(cache.kept[row, layer, head])
            here = slice(start, start + kept)
            order = torch.randperm(kept, generator=torch.Generator().manual_seed(layer))  # one for equal heads
            for tensor in (cache.k, cache.v, cache.pos, cache.stat):
                if tensor is not None:
                    tensor[row, here] = tensor[row, here][order]

    plain = run(lambda cache: None)
    assert plain.isfinite().all()
    close(run(poison), plain)
    close(run(shuffle), plain)


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if not s.startswith(("full", "kvsharer", *EVICTING)) and "in-cache" not in s]
)
@pytest.mark.parametrize("heads", [(2, 2), (8, 2)], ids=["G1", "G4"])
def test_decoding_equals_dense_attention_masked_to_the_kept_sets(spec, heads):
    """50 steps against a loop that recomputes everything densely and hides what the cache dropped."""
    torch.manual_seed(1)
    (N, H), D, room, sliding = heads, 8, 7, 30
    importance = {kind: torch.rand(1, N) for kind in ("r", "r2", "semantic")} | {"layer_errors": torch.rand(1)}
    method = build_method(small(spec), importance)
    lengths, T = [70, 25, 9], 70
    keep = torch.stack([method.allocator(budget=16, prompt=n, num_layers=1, num_kv_heads=H) for n in lengths])
    slots = int((keep + room).sum((1, 2)).max())
    shape = ArenaShape(batch=3, num_layers=1, num_kv_heads=H, head_dim=D, slots=slots, dtype=torch.float32)
    cache = ArenaCache(replace(shape, context=T if method.sentences else 0), "cpu")
    layer = torch.tensor([0])
    q, k, v = torch.randn(3, T + 50, N, D), torch.randn(3, T + 50, H, D), torch.randn(3, T + 50, H, D)
    out = Linear(N * D, 16)
    torch.nn.init.normal_(out.weight)
    looked_at = {"outputs": [out], "frequencies_Bd": torch.rand(3, D // 2)}
    if method.sentences:
        looked_at["ends_BT"] = torch.rand(3, T) < 0.2
    prompt = PromptPass(cache, method, keep_BLH=keep, room=[room] * 3, new_tokens=lengths, **looked_at)
    prompt.attend(layer, q[:, :T], k[:, :T], v[:, :T], sliding)
    prompt.finish()

    stored = [[[] for _ in range(H)] for _ in range(3)]
    keys = [{} for _ in range(3)]
    for b, n in enumerate(lengths):
        keys[b] = {p: (k[b, p], v[b, p]) for p in range(n)}
        for h in range(H):
            start, kept = int(cache.offset[b, 0, h]), int(cache.kept[b, 0, h])
            stored[b][h] = cache.pos[b, start : start + kept].tolist()
            assert stored[b][h] == sorted(set(stored[b][h]))
            assert method.sharing is not None or kept == min(int(keep[b, 0, h]), n)
            assert set(range(min(method.sinks, n))) <= set(stored[b][h])
            assert set(range(max(0, n - method.recent), n)) <= set(stored[b][h])
    prompt_sets = [[set(head) for head in row] for row in stored]
    for step in range(50):
        cache.begin_step(torch.ones(3, dtype=torch.bool))
        out = cache.attend(layer, q[:, T + step, None], k[:, T + step, None], v[:, T + step, None], sliding)
        cache.end_step()
        for b, n in enumerate(lengths):
            now = n + step
            keys[b][now] = (k[b, T + step], v[b, T + step])
            for h in range(H):
                held = stored[b][h]
                if len(held) == int(cache.capacity[b, 0, h]):
                    may_go = [
                        p for p in held if p >= method.sinks and (method.ring_over_prompt or p not in prompt_sets[b][h])
                    ]
                    held.remove(min(may_go))
                held.append(now)
                visible = [p for p in held if p > now - sliding]
                for g in range(N // H):
                    head = h * (N // H) + g
                    logits = torch.stack([q[b, T + step, head] @ keys[b][p][0][h] for p in visible]) / D**0.5
                    values = torch.stack([keys[b][p][1][h] for p in visible])
                    torch.testing.assert_close(out[b, 0, head], logits.softmax(0) @ values, rtol=1e-4, atol=1e-5)


class Stream:
    """StreamingLLM as published, a row: keys are stored before RoPE, and all of a cache is rotated by its places."""

    def __init__(self, loaded, spec, *, sinks, budget, room):
        self.model, self.source = loaded.model, [0, 1, 0] if spec.startswith("kvsharer") else [0, 1, 2]
        self.sinks, self.budget, self.room, self.seen = sinks, budget, room, 0
        self.stored, self.size = {}, None

    def turn(self, ids):
        """A turn sees everything that is held, and then the cache is cut to its budget."""
        self.size, self.seen = None, self.seen + len(ids)
        logits = self.run(ids)
        self.size = self.budget
        self.stored = {layer: self.cut(both) for layer, both in self.stored.items()}
        self.size = min(self.budget, self.seen) + self.room
        return logits

    def step(self, token):
        self.seen += 1
        return self.run([token])

    def run(self, ids):
        unturned = torch.ones(1, len(ids), 4), torch.zeros(1, len(ids), 4)
        return self.model.logits(self.model.hidden(torch.tensor([ids]), unturned, self)[0, -1])

    def cut(self, both):
        if self.size is None or both.shape[2] <= self.size:
            return both
        return torch.cat((both[:, :, : self.sinks], both[:, :, both.shape[2] - self.size + self.sinks :]), 2)

    def attend(self, layer_1, q_1TND, k_1THD, v_1THD, window):
        layer, T = int(layer_1), q_1TND.shape[1]
        if self.source[layer] == layer:
            both, past = torch.stack((k_1THD, v_1THD)), self.stored.get(layer)
            self.stored[layer] = self.cut(both if past is None else torch.cat((past, both), 2))
        k, v = self.stored[self.source[layer]]
        S, G = k.shape[1], q_1TND.shape[2] // k.shape[2]
        cos, sin = self.model.rope(torch.arange(S)[None])
        q, k = apply_rope(q_1TND, cos[:, S - T :], sin[:, S - T :]), apply_rope(k, cos, sin)
        q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(G, 1) for x in (k, v))
        causal = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=causal).transpose(1, 2)


@pytest.mark.parametrize("lengths", [(50,), (50, 21, 5)], ids=["alone", "ragged"])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2)], ids=["G1", "G4"])
@pytest.mark.parametrize(("outer", "sinks"), [("", 0), ("", 4), ("kvsharer+", 4)])
def test_a_stream_without_end_is_the_published_loop(outer, sinks, heads, lengths):
    """Over three turns and beyond twice the model's context."""
    loaded, room = make_loaded(heads=heads, max_position=64), 7
    spec = f"{outer}streaming:positions=in-cache,sinks={sinks}"
    engine = Engine(loaded, cache=spec, budget=16, decode_room=room)
    rows = [Stream(loaded, spec, sinks=sinks, budget=16, room=room) for _ in lengths]
    engine.prefill([[1]] * len(rows))  # of another conversation nothing is left
    engine.reset()
    nbytes = engine.cache.nbytes
    for turn, (length, steps) in enumerate([(lengths, 55), ((30, 1, 12), 21), ((2, 40, 40), 21)]):
        prompts = tokens(*length[: len(rows)], seed=turn)
        logits = engine.extend(prompts) if turn else engine.prefill(prompts)
        close(logits, torch.stack([row.turn(ids) for row, ids in zip(rows, prompts, strict=True)]))
        for step in range(steps):
            new = [(7 * step + 5 * row + turn) % V for row in range(len(rows))]
            close(engine.step(new), torch.stack([row.step(token) for row, token in zip(rows, new, strict=True)]))
            if step == 20:
                saved = engine.snapshot()
                engine.step([3] * len(rows))
                engine.restore(saved)
    assert min(engine.tokens_seen) > 2 * 64 and not engine.is_full(0)
    assert engine.cache.nbytes == nbytes == engine.cache.shape.nbytes == engine.stats().nbytes


def test_a_stream_that_does_not_fit_into_the_context_is_refused():
    loaded = make_loaded(max_position=64)
    spec = "streaming:positions=in-cache"
    with pytest.raises(ValueError, match="would hold up to 66 tokens, the context is 64"):
        Engine(loaded, cache=spec, budget=60, decode_room=6)
    engine = Engine(loaded, cache=spec, budget=16, decode_room=6)
    with pytest.raises(ValueError, match="65 tokens at once after the 0 that are held, the context is 64: lower chunk"):
        engine.prefill(tokens(65))
    engine.prefill(tokens(64))
    with pytest.raises(ValueError, match="43 tokens at once after the 22 that are held"):
        engine.extend(tokens(43))
    chunked = Engine(loaded, cache=spec, budget=16, decode_room=6, chunk_tokens=42)
    assert chunked.prefill(tokens(900)).isfinite().all() and chunked.extend(tokens(100)).isfinite().all()
    ended = Engine(loaded, cache=spec, budget=16, decode_room=6, max_context=64)
    ended.prefill(tokens(64))
    assert ended.is_full(0)


def test_far_into_a_stream_distances_are_exact():
    """Four million tokens on, where an angle in fp32 is good for nothing, the same tokens give the same answer."""
    engine = Engine(make_loaded(), cache="streaming:positions=in-cache,sinks=0", budget=16, decode_room=6)

    def answer(first):
        engine.reset()
        with torch.inference_mode():
            engine.cache.position.fill_(first)
            engine._take_in(tokens(30))
        return [engine.step([token]) for token in range(20)]

    for near, far in zip(answer(0), answer(4_000_000), strict=True):
        close(far, near)


def test_a_cache_and_a_method_that_disagree_on_sinks_are_refused():
    shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=1, head_dim=8, slots=9, dtype=torch.float32)
    method = build_method("streaming:positions=in-cache")
    sizes = {"keep_BLH": torch.full((1, 1, 1), 5), "room": [1], "new_tokens": [8]}
    with pytest.raises(ValueError, match="planned to turn 0 sinks, streaming turns 4"):
        PromptPass(ArenaCache(shape, "cpu"), method, **sizes)
    with pytest.raises(ValueError, match="give PromptPass `frequencies_Bd`"):
        PromptPass(ArenaCache(replace(shape, sinks=4), "cpu"), method, **sizes)
    with pytest.raises(ValueError, match='"absolute" or "in-cache", not \'relative\''):
        build_method("streaming:positions=relative")


@pytest.mark.parametrize("lengths", [(200,), (150, 9, 61), (30, 26)])
def test_a_cascade_keeps_what_waiting_keeps_and_holds_no_more_than_the_budget(lengths, monkeypatch):
    """Also where a layer would get more than there are tokens (the shortest prompts), over turns and in chunks."""
    loaded, held = make_loaded(windows=(None,) * 6), []
    add = Staging.add

    def watched(staging, *args, **kwargs):
        add(staging, *args, **kwargs)
        held.append(sum(tokens.pos_BHS.shape[2] for _, tokens in staging._layers))

    monkeypatch.setattr(Staging, "add", watched)
    options = {"budget": 24, "max_new_tokens": 6, "max_context": 300, "chunk_tokens": 120}
    for changes in ("", ",tau1=0.2", ",compat=true"):
        spec = f"cake:window=4,recent=4{changes}"
        cascade, waiting = (Engine(loaded, cache=spec + more, **options) for more in ("", ",cascade=false"))
        prompt, more = tokens(*lengths), tokens(*[40] * len(lengths), seed=1)
        for call in ("prefill", "extend"):
            held.clear()
            got = getattr(cascade, call)(prompt if call == "prefill" else more)
            if len(lengths) == 1:
                assert max(held) <= (24 * 6 + 6) / 0.75
            want = getattr(waiting, call)(prompt if call == "prefill" else more)
            if "compat" not in changes:
                close(got, want)
                assert torch.equal(cascade.cache.pos, waiting.cache.pos)
                assert torch.equal(cascade.stats().kept, waiting.stats().kept)
            elif call == "prefill":
                assert (cascade.stats().kept <= waiting.stats().kept).all()


def test_finished_rows_keep_their_state(loaded):
    engine = Engine(loaded, cache="snapkv:window=4,recent=4", budget=16, max_new_tokens=8, max_context=200)
    engine.prefill(tokens(40, 30))
    first = engine.step([3, 4])
    before = [t[1].clone() for t in (engine.cache.k, engine.cache.pos, engine.cache.position, engine.cache.length)]
    for _ in range(15):
        engine.step([5, 6], active_B=[True, False])
    after = [t[1] for t in (engine.cache.k, engine.cache.pos, engine.cache.position, engine.cache.length)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert engine.tokens_seen == [56, 31]
    again = Engine(loaded, cache="snapkv:window=4,recent=4", budget=16, max_new_tokens=8, max_context=200)
    again.prefill([tokens(40, 30)[1]])
    close(first[1], again.step([4])[0])
    close(engine.step([1, 9])[1], again.step([9])[0])


def test_chunked_prefill_equals_whole_prefill_when_nothing_is_dropped(loaded):
    prompts = tokens(100, 31)
    for cache in ("full", "snapkv"):
        whole = Engine(loaded, cache=cache, budget=128, max_context=200)
        parts = Engine(loaded, cache=cache, budget=128, max_context=200, chunk_tokens=16)
        close(parts.prefill(prompts), whole.prefill(prompts))
        close(parts.step([1, 2]), whole.step([1, 2]))
        assert (whole.stats().prefill, parts.stats().prefill) == ("whole", "chunked")


def test_generate_and_stream_agree_and_continue(loaded):
    engine = Engine(loaded, cache="full", max_new_tokens=12, max_context=300)
    first, more = tokens(20)[0], tokens(6, seed=2)[0]
    (batch,) = engine.generate([first])
    engine.reset()
    streamed = list(engine.stream(first))
    assert streamed == batch and len(batch) == 12
    continued = list(engine.stream(more))
    (fresh,) = engine.generate([first + streamed + more])
    assert continued == fresh


def test_an_interrupted_answer_is_still_part_of_the_conversation(loaded):
    engine = Engine(loaded, cache="full", max_new_tokens=12, max_context=300)
    first, more = tokens(20)[0], tokens(6, seed=2)[0]
    seen = []
    for token in engine.stream(first):
        seen.append(token)
        if len(seen) == 5:
            break
    continued = list(engine.stream(more))
    (fresh,) = engine.generate([first + seen + more])
    assert continued == fresh


def test_generation_stops_at_stop_ids_and_at_the_context(loaded):
    engine = Engine(loaded, cache="full", max_new_tokens=30, max_context=40)
    (ids,) = engine.generate(tokens(20))
    assert len(ids) == 20
    stopping = replace(loaded, chat=SimpleNamespace(stop_ids=frozenset({ids[4]})))
    (short,) = Engine(stopping, cache="full", max_new_tokens=30, max_context=40).generate(tokens(20))
    assert short == ids[: ids.index(ids[4])]


def test_sampling_repeats_with_its_seed_and_ignores_the_batch(loaded):
    engine = Engine(loaded, cache="full", max_new_tokens=10, max_context=100)
    sampling = {"temperature": 1.0, "top_p": 0.9}
    together = engine.generate(tokens(20, 7), seed=5, **sampling)
    assert engine.generate([tokens(20, 7)[1]], seed=6, **sampling) == together[1:]
    assert engine.generate([tokens(20, 7)[1]], seed=7, **sampling) != together[1:]


@pytest.mark.parametrize("cache", ["headkv:window=4,recent=4", "adakv:window=4,recent=4", "cake:window=4,recent=4"])
def test_no_new_memory_while_decoding(loaded, cache):
    engine = Engine(loaded, cache=cache, budget=24, max_new_tokens=6, max_context=300)
    engine.prefill(tokens(30))
    engine.step([1])
    pointers = {name: t.data_ptr() for name, t in vars(engine.cache).items() if isinstance(t, torch.Tensor)}
    for prompts in (tokens(100), tokens(14)):
        engine.prefill(prompts)
        for _ in range(100):
            engine.step([1])
        engine.extend(tokens(50, seed=3))
    assert all(getattr(engine.cache, name).data_ptr() == pointer for name, pointer in pointers.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "snap"}, "choose from"),
        ({"budget": "many"}, "not understood"),
        ({"budget": 3, "cache": "snapkv"}, "keeps 32 .*recent=32.: raise .* least 32 tokens, or lower recent$"),
        ({"budget": 31, "cache": "adakv"}, "keeps 32 .*recent=32.: raise .* least 32 tokens, or lower recent$"),
        ({"budget": 7, "cache": "pyramidkv"}, "keeps 8 .*recent=8.: raise .* least 8 tokens, or lower recent$"),
        ({"budget": 4, "cache": "keydiff:sinks=4"}, "keeps 5 .*sinks=4 and the last one.: .* or lower sinks$"),
        ({"budget": 31, "cache": "cake"}, "keeps 32 .*recent=32.: raise .* least 32 tokens, or lower recent$"),
        ({"budget": "1KiB"}, "leaves 0 tokens"),
        ({"budget": 0}, "positive"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"max_context": 513}, "513 is beyond the 512"),
        ({"cache": "full", "max_context": 10**13, "allow_overflow": True}, "MiB are free"),
    ],
)
def test_impossible_engines_are_refused(loaded, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(loaded, **options)


def test_wrong_calls_are_refused(loaded):
    engine = Engine(loaded, cache="full", max_context=50)
    for call, message in [
        (lambda: engine.step([1]), "call prefill first"),
        (lambda: engine.extend([[1]]), "call prefill first"),
        (lambda: engine.prefill([]), "no prompt"),
        (lambda: engine.prefill([[1], []]), "row 1 is empty"),
        (lambda: engine.prefill([[V]]), "97 is outside 0..96"),
        (lambda: engine.prefill([1, 2]), "one sequence per row"),
        (lambda: engine.prefill([[1.5]]), "whole numbers"),
        (lambda: engine.prefill("text"), "whole numbers"),
        (lambda: engine.generate([[1]], temperature=-1), "temperature must be"),
        (lambda: engine.generate([[1]], max_new_tokens=0), "max_new_tokens must be"),
        (lambda: engine.generate([[1]], seed=-1), "seed must be"),
        (lambda: engine.prefill([[1] * 51]), "has 51 tokens, the context is 50"),
        (lambda: engine.prefill([[1] * 50]) is None or engine.step([1]), "context of 50 tokens is full"),
        (lambda: engine.extend([[1]]), "1 tokens after 50 earlier ones"),
        (lambda: engine.extend([[1], [2]]), "got 2 rows"),
        (lambda: engine.step([1, 2]), "got 2 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    overflowing = Engine(loaded, cache="streaming", budget=20, max_context=600, allow_overflow=True)
    assert overflowing.prefill(tokens(590)).isfinite().all()


def test_prompts_may_be_arrays_or_tensors(loaded):
    engine = Engine(loaded, cache="full", max_context=50)
    ids = tokens(12)[0]
    want = engine.prefill([ids])
    assert torch.equal(engine.prefill(torch.tensor([ids])), want)
    assert torch.equal(engine.prefill(torch.tensor([ids]).numpy()), want)


def test_an_old_answer_cannot_go_on_in_a_new_conversation(loaded):
    engine = Engine(loaded, cache="full", max_context=50)
    answer = engine.stream(tokens(5)[0])
    next(answer)
    engine.prefill(tokens(7))
    with pytest.raises(ValueError, match="another turn"):
        next(answer)
    assert engine.tokens_seen == [7]


def test_a_token_stepped_by_hand_is_not_taken_twice(loaded):
    engine = Engine(loaded, cache="full", max_context=50)
    said = list(engine.stream(tokens(5)[0], max_new_tokens=3))
    engine.step(said[-1:])
    engine.extend([[7]])
    assert engine.tokens_seen == [9]


def test_a_refused_batch_leaves_the_engine_as_it_was(loaded):
    engine = Engine(loaded, cache="snapkv:window=4,recent=4", budget="30KiB", max_new_tokens=8, max_context=200)
    want = engine.prefill(tokens(60))
    with pytest.raises(ValueError, match=r"raise the budget to at least \d+ bytes"):
        engine.prefill(tokens(60) * 40)
    assert torch.equal(engine.prefill(tokens(60)), want)


@pytest.mark.parametrize(
    "cache", ["headkv:compat=true,beta=1.01", "adakv:compat=true", "pyramidkv:compat=true", "cake:compat=true"]
)
@pytest.mark.parametrize("budget", [20, "30%", "40KB"])
def test_published_rounding_fits_its_arena_at_every_length(loaded, cache, budget):
    engine = Engine(loaded, cache=f"{cache},window=4,recent=4", budget=budget, max_new_tokens=20, max_context=64)
    assert budget != "40KB" or engine.stats().nbytes <= 40_000
    for length in range(1, 65):
        engine.prefill(tokens(length))
        if length <= 20 and budget == 20:
            assert (engine.stats().kept == length).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_in_low_precision_is_as_exact_as_sdpa(dtype):
    torch.manual_seed(0)
    S, N, H, D = 200, 8, 2, 64
    q, k, v = 8 * torch.randn(1, N, D), 3 * torch.randn(1, H, S, D), torch.randn(1, H, S, D)
    low = [x.to(dtype) for x in (q, k, v)]
    arena = [x.reshape(1, H * S, D) for x in low[1:]]
    offset, length = (torch.tensor([[x]], dtype=torch.int32) for x in ([0, S], [S, S]))
    pos, here = torch.arange(S, dtype=torch.int32).repeat(H)[None], torch.tensor([S - 1], dtype=torch.int32)
    got, _ = ragged_decode(low[0], *arena, pos, offset, length, torch.tensor([0]), here, most=S)

    def sdpa(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    exact = sdpa(*(x.double() for x in low))
    assert (got - exact).abs().max() <= 2 * (sdpa(*low) - exact).abs().max() + 1e-3
    huge = torch.full((1, 1, 64), 60.0, dtype=dtype)
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    out, lse = ragged_decode(huge, huge, huge, one[0], one - 1, one, torch.tensor([0]), one[0, 0], most=1)
    assert out.isfinite().all() and lse.isfinite().all()


def test_a_step_by_hand_ends_an_answer(loaded):
    engine = Engine(loaded, cache="full", max_context=50)
    answer = engine.stream(tokens(5)[0])
    engine.step([next(answer)])
    with pytest.raises(ValueError, match="another turn"):
        next(answer)
    assert engine.tokens_seen == [6]


@pytest.mark.parametrize("cache", ["full", "streaming"])
@pytest.mark.parametrize("said", [2, 9], ids=["room left", "ring full"])
def test_an_interrupted_step_leaves_nothing_behind(loaded, cache, said):
    """The token that was being stored is taken in again with the next turn, and only once."""
    options = {"cache": cache, "budget": 24, "max_new_tokens": 40, "decode_room": 6, "max_context": 100}
    engine, calm = Engine(loaded, **options), Engine(loaded, **options)
    prompt, more = tokens(40, 5)
    heard = []
    for token in engine.stream(prompt):
        heard.append(token)
        if len(heard) == said:
            break
    calm.prefill([prompt])
    for token in heard[:-1]:
        calm.step([token])

    blocks = engine._blocks

    def interrupted(*args):
        raise KeyboardInterrupt

    engine._blocks = [*blocks[:2], interrupted]
    with pytest.raises(KeyboardInterrupt):
        engine.step(heard[-1:])
    engine._blocks = blocks
    if cache == "full":
        close(engine.extend([more]), calm.extend([[heard[-1], *more]]))
    else:
        engine.extend([more])
    for layer, head in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        start, kept = int(engine.cache.offset[0, layer, head]), int(engine.cache.kept[0, layer, head])
        held = engine.cache.pos[0, start : start + kept].tolist()
        assert held == sorted(set(held)) and min(held) == 0


@pytest.mark.parametrize("said", [2, 30], ids=["room left", "full"])
@pytest.mark.parametrize("cache", EVICTING)
def test_an_interrupted_step_leaves_no_token_behind_where_decoding_evicts(loaded, cache, said):
    options = {"cache": cache, "budget": 24, "max_context": 100}
    engine, calm = Engine(loaded, **options), Engine(loaded, **options)
    prompt, more = tokens(12, 5)
    for made in (engine, calm):
        made.prefill([prompt])
        for token in range(said):
            made.step([token])
    blocks = engine._blocks

    def interrupted(*args):
        raise KeyboardInterrupt

    engine._blocks = [*blocks[:2], interrupted]
    with pytest.raises(KeyboardInterrupt):
        engine.step([50])
    engine._blocks = blocks
    if cache == "tova":  # the sums of h2o have seen the step
        close(engine.step([51]), calm.step([51]))
        close(engine.extend([more]), calm.extend([more]))
    else:
        engine.step([51])
    for layer, head in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        start, length = int(engine.cache.offset[0, layer, head]), int(engine.cache.length[0, layer, head])
        held = engine.cache.pos[0, start : start + length].tolist()
        assert len(held) == len(set(held)) and min(held) >= 0


@pytest.mark.parametrize("cache", EVICTING)
def test_a_budget_is_reached_whatever_the_prompt_and_never_exceeded(loaded, cache):
    """The cache of a short prompt grows; until then it is the full cache."""
    engine = Engine(loaded, cache=cache, budget=24, max_context=300)
    full = Engine(loaded, cache="full", max_context=300)
    close(engine.prefill(tokens(10)), full.prefill(tokens(10)))
    for step in range(40):
        got, want = engine.step([step]), full.step([step])
        if step < 15:  # 25 tokens: nothing had to go before this step
            close(got, want)
        assert engine.stats().kept.unique().tolist() == [min(11 + step, 25)]
    assert (got - want).abs().max() > 1e-2
    assert engine.stats().nbytes == engine.cache.shape.nbytes


def test_a_rule_and_a_cache_must_fit(loaded):
    shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=1, head_dim=8, slots=9, dtype=torch.float32)
    keep = {"keep_BLH": torch.full((1, 1, 1), 4), "room": [1], "new_tokens": [9]}
    with pytest.raises(ValueError, match=r"planned for None, tova needs ReplaceWorst\(accumulate=False"):
        PromptPass(ArenaCache(shape, "cpu"), build_method("tova"), **keep)
    with pytest.raises(ValueError, match="one set of tokens for all heads of a layer"):
        replace(build_method("tova"), allocator=build_method("pyramidkv").allocator)
    with pytest.raises(ValueError, match="needs no decode_room: leave it out"):
        Engine(loaded, cache="h2o", decode_room=5)


def test_where_sentences_end_is_forgotten_with_the_conversation(loaded):
    """Position by position: prompts from the tokenizer, generated tokens as if they ended nothing."""
    engine = Engine(loaded, cache="snapkv:preset=adaptive", budget=40, max_new_tokens=8, max_context=90, chunk_tokens=7)
    dots, words = [1, 4, 3] * 8, [1, 2, 6]
    engine.prefill([dots, words])
    for _ in range(3):
        engine.step([4, 4])
    engine.extend([[4, 3, 0], [4, 1, 9]])
    row = [False, True, False] * 8 + [False] * 3 + [True, False, True]
    assert engine.cache.ends[0].tolist() == row + [False] * (90 - len(row))
    assert engine.cache.ends[1].nonzero().flatten().tolist() == [8]  # "." before "b" ends nothing, but the last does
    kept = engine.prefill([words * 9]), engine.cache.pos.clone()
    assert not engine.cache.ends.any()
    fresh = Engine(loaded, cache="snapkv:preset=adaptive", budget=40, max_new_tokens=8, max_context=90, chunk_tokens=7)
    assert torch.equal(fresh.prefill([words * 9]), kept[0]) and torch.equal(fresh.cache.pos, kept[1])


def test_without_knowing_where_sentences_end(loaded):
    mute = replace(loaded, tokenizer=None)
    with pytest.raises(ValueError, match="tiny has no tokenizer to say where sentences end: load one"):
        Engine(mute, cache="snapkv:preset=adaptive", budget=40).prefill(tokens(50))
    shape = ArenaShape(batch=1, num_layers=1, num_kv_heads=1, head_dim=8, slots=90, dtype=torch.float32, context=40)
    sizes = {"keep_BLH": torch.full((1, 1, 1), 40), "room": [1], "new_tokens": [50]}
    method, x = build_method("snapkv:preset=adaptive"), torch.randn(1, 50, 1, 8)
    with pytest.raises(ValueError, match="needs to know where sentences end: give PromptPass ends_BT"):
        PromptPass(ArenaCache(shape, "cpu"), method, **sizes).attend(torch.tensor([0]), x, x, x, None)
    with pytest.raises(ValueError, match="for 40 tokens of each row, and there are 50: plan"):
        PromptPass(ArenaCache(shape, "cpu"), method, **sizes, ends_BT=torch.zeros(1, 50, dtype=torch.bool))


def test_a_failed_allocation_leaves_the_engine_as_it_was(loaded, monkeypatch):
    engine = Engine(loaded, cache="streaming", budget="60KiB", max_new_tokens=5, max_context=400, batch=4)
    want = engine.prefill(tokens(300, 300, 300, 300))

    def fails(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "ArenaCache", fails)
        with pytest.raises(MemoryError):
            engine.prefill(tokens(9))
    assert torch.equal(engine.prefill(tokens(300, 300, 300, 300)), want)


def test_the_last_token_may_end_the_conversation(loaded):
    engine = Engine(loaded, cache="full", max_context=50)
    for _ in engine.stream(tokens(5)[0], max_new_tokens=1):
        engine.reset()


def test_an_iterator_of_prompts_is_as_good_as_a_list(loaded):
    engine = Engine(loaded, cache="full", max_context=50, max_new_tokens=3)
    assert engine.generate(iter(tokens(5, 9))) == engine.generate(tokens(5, 9))


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 4.0}, {"top_k": 2.0, "temperature": 1.0}, {"seed": 0.5}])
def test_wrong_settings_are_refused_before_anything_is_lost(loaded, wrong):
    engine = Engine(loaded, cache="full", max_context=50)
    engine.prefill(tokens(7))
    with pytest.raises(ValueError, match="whole number"):
        engine.generate([[1]], **wrong)
    assert engine.tokens_seen == [7]


def test_an_empty_turn_is_refused_also_while_a_token_is_pending(loaded):
    engine = Engine(loaded, cache="full", max_context=50)
    next(engine.stream(tokens(5)[0]))
    with pytest.raises(ValueError, match="empty"):
        engine.extend([[]])


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_int8_weights_are_the_rounded_ones(tied, compile):
    """Everywhere that a weight is used: table, head, prompts, steps, plain and fused."""
    quantised, rounded = make_loaded(tied=tied), make_loaded(tied=tied)
    quantize_weights(quantised.model)
    scales, state = dict(quantised.model.named_buffers()), quantised.model.state_dict()
    for name, weight in rounded.model.named_parameters():
        if (scale := scales.get(name.replace("weight", "scale"))) is not None:
            assert state[name].dtype == torch.int8 and (weight - state[name] * scale[:, None]).abs().max() > 0
            weight.copy_(state[name] * scale[:, None])
    engines = [Engine(made, cache="full", max_context=60, compile=compile) for made in (quantised, rounded)]
    got, wanted = ([engine.prefill(tokens(40, 30)), engine.step([1, 2])] for engine in engines)
    close(torch.stack(got), torch.stack(wanted))
    close(quantised.model(torch.tensor(tokens(20))), rounded.model(torch.tensor(tokens(20))))
