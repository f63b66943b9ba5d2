"""Layers that read another layer's cache: the search, its file, and an engine against a loop that knows no cache.

The loop below is the model written out: every layer over all positions, with a mask of what each KV head has kept. It
takes from `tests.test_methods` what HeadKV keeps, by its formulas.
"""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

import recipes.search_sharing as search_sharing
from checkpoints import CheckpointError, LayerSharing, config_hash, read_sharing, write_sharing
from checkpoints.config import ModelConfig, RopeConfig
from kernels import native
from layers.cache.arena import ArenaCache
from layers.cache.prompt import PromptPass
from layers.methods import build_method
from layers.plan import ArenaShape
from recipes.replay import Record, Replay
from tests import test_methods, tiny, tiny_chat
from tests.test_recipes import CHAT, Words
from zoo import Loaded, chat
from zoo import engine as engine_module
from zoo.engine import Engine
from zoo.family import Decoder
from zoo.load import layer_sharing

L, H, D, V, ROOM = 6, test_methods.H, test_methods.D, 61, test_methods.ROOM
PAIRS = ((5, 1), (4, 2), (2, 1))
SOURCE = (0, 1, 2, 3, 2, 1)
OWNERS = (0, 1, 2, 3)
SPEC = "headkv:preset=published,beta=1.01"


def found(loaded: Loaded) -> LayerSharing:
    return LayerSharing(
        model_id=loaded.name,
        config_hash=config_hash(loaded.config),
        tokenizer_hash="none",
        num_layers=L,
        pairs=PAIRS,
        similarity=(0.9, 0.8, 0.7),
    )


def make(G: int, seed: int = 3) -> Loaded:
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_layers=L,
        num_heads=G * H,
        num_kv_heads=H,
        head_dim=D,
        max_position=400,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=True,
        layer_windows=(None,) * L,
        qk_norm=True,
    )
    torch.manual_seed(seed)
    model = Decoder(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        torch.nn.init.uniform_(weight, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(weight, std=0.4)
    return Loaded(name="tiny", model=model, tokenizer=None, chat=SimpleNamespace(stop_ids=frozenset()), config=config)


def importance_of(loaded: Loaded) -> torch.Tensor:
    return torch.rand(L, loaded.config.num_heads, generator=torch.Generator().manual_seed(5)) ** 3


@pytest.fixture(autouse=True)
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "layer_sharing", lambda loaded, path: found(loaded))

    def importance(loaded: Loaded, path: object) -> dict[str, torch.Tensor]:
        return dict.fromkeys(("r", "r2", "semantic"), importance_of(loaded)) | {
            "layer_errors": torch.arange(1.0, L + 1)
        }

    monkeypatch.setattr(engine_module, "head_importance", importance)


def tokens(*lengths: int, seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (n,), generator=g).tolist() for n in lengths]


# -- the loop ----------------------------------------------------------------------------------------------------------


class Written:
    """One row of a conversation, in float64."""

    def __init__(self, loaded: Loaded, budget: int | None) -> None:
        self.model, self.config, self.budget = loaded.model.double(), loaded.config, budget
        N = loaded.config.num_heads
        self.q, self.k, self.v = ([torch.empty(0, heads, D).double() for _ in range(L)] for heads in (N, H, H))
        self.held: list[list[list[int]]] = [[[] for _ in range(H)] for _ in range(L)]
        self.importance = {"r2": importance_of(loaded)[list(OWNERS)].double().tolist()}
        self.frequencies = tuple(loaded.config.rope.theta ** (-2 * d / D) for d in range(D // 2))
        self.seen = 0

    def turn(self, ids: list[int]) -> torch.Tensor:
        """A prompt or a later turn; what its last token predicts."""
        before = [[list(head) for head in layer] for layer in self.held]
        logits = self.run(ids, lambda layer, h: [*before[layer][h], *range(self.seen, self.seen + len(ids))])
        end, first = self.seen + len(ids), self.seen
        for rank, layer in enumerate(OWNERS):
            if self.budget is None:
                self.held[layer] = [list(range(end)) for _ in range(H)]
            else:
                lists = (x[layer].tolist() for x in (self.q, self.k, self.v))
                out = self.model.blocks[layer].attention.out.weight.tolist()
                seen = test_methods.Turn(*lists, None, out, self.frequencies, self.held[layer], first, end)
                self.held[layer] = seen.keep(test_methods.ORACLES[SPEC], rank, self.budget, self.importance, None)
        self.kept = [[list(head) for head in layer] for layer in self.held]
        if self.budget is not None:
            oracle = test_methods.ORACLES[SPEC]
            self.shares = oracle["budgets"](end, self.budget, oracle["scores"]["recent"], self.importance)
        self.seen = end
        return logits

    def step(self, token: int) -> torch.Tensor:
        for rank, layer in enumerate(OWNERS):
            for h, (held, kept) in enumerate(zip(self.held[layer], self.kept[layer], strict=True)):
                if self.budget is not None and len(held) == self.shares[rank][h] + ROOM:
                    held.remove(min(j for j in held if j not in kept))
                held.append(self.seen)
        logits = self.run([token], lambda layer, h: self.held[layer][h])
        self.seen += 1
        return logits

    def run(self, ids: list[int], visible) -> torch.Tensor:
        x = self.model.embed.weight[ids]
        at = torch.arange(self.seen, self.seen + len(ids))
        for layer, block in enumerate(self.model.blocks):
            source, part = SOURCE[layer], block.attention
            heads = (self.norm(x, block.attention_norm.weight) @ part.qkv.weight.T).view(len(ids), -1, D)
            N = self.config.num_heads
            q = self.turned(self.norm(heads[:, :N], part.q_norm.weight), at)
            if source == layer:
                k = self.turned(self.norm(heads[:, N : N + H], part.k_norm.weight), at)
                self.q[layer] = torch.cat((self.q[layer], q))
                self.k[layer] = torch.cat((self.k[layer], k))
                self.v[layer] = torch.cat((self.v[layer], heads[:, N + H :]))
            hidden = torch.ones(H, len(ids), len(self.k[source]), dtype=torch.bool)
            for h in range(H):
                hidden[h][:, visible(source, h)] = False
            hidden |= torch.arange(hidden.shape[-1]) > at[:, None]
            logits = torch.einsum("thgd,phd->hgtp", q.unflatten(1, (H, -1)), self.k[source]) / D**0.5
            weights = logits.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
            out = torch.einsum("hgtp,phd->thgd", weights, self.v[source])
            x = x + out.flatten(1) @ part.out.weight.T
            gate, up = (self.norm(x, block.mlp_norm.weight) @ block.mlp.gate_up.weight.T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ block.mlp.down.weight.T
        return self.norm(x[-1], self.model.norm.weight) @ self.model.embed.weight.T

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turned(self, x_THD: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        angle = at[:, None, None] * self.config.rope.theta ** (-torch.arange(0, D, 2).double() / D)
        turned = torch.complex(x_THD[..., : D // 2], x_THD[..., D // 2 :]) * torch.complex(angle.cos(), angle.sin())
        return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("lengths", [[80], [80, 45, 11]], ids=["alone", "ragged"])
@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("inner", ["", f"+{SPEC}"], ids=["full", "headkv"])
def test_an_engine_that_shares_is_the_model_written_out(inner, G, lengths):
    """Uncompiled, and as one C++ operator where there is a compiler."""
    loaded, budget = make(G), 24 if inner else None
    options = {"cache": f"kvsharer:share=0.3{inner}", "budget": budget, "max_context": 300, "decode_room": ROOM}
    compiles = [False, True] if native.compiler() else [False]
    engines = [Engine(loaded, compile=compile, **options) for compile in compiles]
    rows = [Written(make(G), budget) for _ in lengths]

    def compare(outs, wanted):
        for logits in outs:
            torch.testing.assert_close(logits.double(), torch.stack(wanted), rtol=1e-4, atol=2e-4)

    for turn, prompts in enumerate((tokens(*lengths), tokens(*(30, 12, 3)[: len(lengths)], seed=1))):
        outs = [engine.extend(prompts) if turn else engine.prefill(prompts) for engine in engines]
        compare(outs, [row.turn(ids) for row, ids in zip(rows, prompts, strict=True)])
        kept = [[[len(row.held[source][h]) for h in range(H)] for source in SOURCE] for row in rows]
        for engine in engines:
            assert engine.stats().kept.tolist() == kept, "a layer that reads holds what its source holds"
        for step in range(50):
            new = [(7 * step + 5 * row + turn) % V for row in range(len(rows))]
            outs = [engine.step(new) for engine in engines]
            compare(outs, [row.step(token) for row, token in zip(rows, new, strict=True)])


def test_chunks_of_a_prompt_are_read_by_other_layers_too():
    whole, parts = (Engine(make(2), cache="kvsharer:share=0.5", max_context=200, chunk_tokens=n) for n in (500, 16))
    torch.testing.assert_close(parts.prefill(tokens(100, 31)), whole.prefill(tokens(100, 31)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.step([1, 2]), whole.step([1, 2]), rtol=1e-4, atol=1e-4)


def test_keys_that_nobody_reads_any_more_are_let_go():
    shape = ArenaShape(batch=1, num_layers=3, num_kv_heads=1, head_dim=4, slots=40, dtype=torch.float32)
    cache, layers = ArenaCache(shape, "cpu", source=[0, 0, 0]), [torch.tensor([i]) for i in range(3)]
    keep = torch.full((1, 3, 1), 9)
    chunk = PromptPass(cache, build_method("streaming"), keep_BLH=keep, room=[3], new_tokens=[20])
    x, q = torch.randn(1, 20, 1, 4), torch.randn(1, 20, 1, 4)
    held = weakref.ref(x)
    out = chunk.attend(layers[0], q, x, x, None)
    del x
    torch.testing.assert_close(chunk.read(layers[1], q, None), out)
    gc.collect()
    assert held() is not None
    torch.testing.assert_close(chunk.read(layers[2], q, None), out)
    gc.collect()
    assert held() is None
    chunk.finish()
    assert cache.kept.flatten().tolist() == [9, 9, 9] and cache.offset.flatten().tolist() == [0, 0, 0]


# -- what the owners decide --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_what_goes_is_chosen_by_its_owner_s_attention_alone(name):
    method, keep = build_method(name), torch.tensor([[[6], [0], [6]]])
    shape = ArenaShape(batch=1, num_layers=3, num_kv_heads=1, head_dim=4, slots=14, dtype=torch.float32)
    shape = replace(shape, evict=method.evict)
    read = ArenaCache(shape, "cpu", source=[0, 0, 2])
    alone = ArenaCache(replace(shape, num_layers=2), "cpu")
    g = torch.Generator().manual_seed(4)

    def attend(caches, tokens: int) -> None:
        for owner, layer in enumerate((0, 2)):
            q, k, v, other = (torch.randn(1, tokens, 1, 4, generator=g) for _ in range(4))
            caches[0].attend(torch.tensor([layer]), q, k, v, None)
            caches[1].attend(torch.tensor([owner]), q, k, v, None)
            if not owner:
                caches[0].read(torch.tensor([1]), 5 * other, None)

    for tokens_before in (0, 15):  # a prompt, and a later turn
        passes = [
            PromptPass(cache, method, keep_BLH=kept, room=[1], new_tokens=[7])
            for cache, kept in ((read, keep), (alone, keep[:, [0, 2]]))
        ]
        attend(passes, 7)
        for chunk in passes:
            chunk.finish()
        for _ in range(8):
            for cache in (read, alone):
                cache.begin_step(torch.ones(1, dtype=torch.bool))
            attend((read, alone), 1)
            for cache in (read, alone):
                cache.end_step()
            assert torch.equal(read.stat, alone.stat) and torch.equal(read.pos, alone.pos)
            assert torch.equal(read.next_slot[:, [0, 2]], alone.next_slot)
        assert int(read.position) == tokens_before + 15


def test_scorers_know_a_layer_by_its_place_in_the_model():
    engine = Engine(make(2), cache="kvsharer:share=0.5+compresskv:preset=tuned", budget=64, max_new_tokens=4)
    seen, scorer = [], engine.method.scorer

    def watched(observation):
        seen.append((observation.layer, observation.out))
        return scorer(observation)

    engine.method = replace(engine.method, scorer=watched)
    engine.prefill(tokens(100))
    assert [layer for layer, _ in seen] == [0, 1, 3]
    assert all(out is engine.model.blocks[layer].attention.out for layer, out in seen)
    kept = engine.stats().kept[0, :, 0]
    assert kept[0] < kept[1] < kept[3] and int(kept[[0, 1, 3]].sum()) == 3 * 64


def test_only_layers_that_store_compete_for_the_total():
    runs = []
    for cascade in ("true", "false"):
        cache = f"kvsharer:share=0.5+cake:cascade={cascade},window=4,recent=4"
        engine = Engine(make(2), cache=cache, budget=24, max_new_tokens=4, max_context=400)
        runs.append([engine.prefill(tokens(90, 31)), engine.step([3, 4]), engine.extend(tokens(9, 20))])
        kept = engine.cache.kept[:, :, 0]
        assert kept[:, [0, 1, 3]].sum(1).tolist() == [3 * 24, 3 * 24]
        assert torch.equal(kept[:, [2, 4, 5]], kept[:, [1, 1, 1]]) and not torch.equal(kept[:, 0], kept[:, 3])
    for waited, cascaded in zip(*runs, strict=True):
        assert torch.equal(waited, cascaded)


def test_criticalkv_and_kvsharer_wrap_in_either_order():
    outs = []
    for cache in ("kvsharer:share=0.5+criticalkv+snapkv", "criticalkv+kvsharer:share=0.5+snapkv"):
        engine = Engine(make(2), cache=f"{cache}:window=4,recent=4", budget=24, max_new_tokens=4)
        assert engine.method.refine is not None and engine.cache.owners == [0, 1, 3]
        assert engine.method.name == cache.replace(":share=0.5", "")
        outs.append(torch.cat([engine.prefill(tokens(90)), engine.step([3])]))
    assert torch.equal(*outs)


# -- bytes, weights, compilations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_fall_by_what_the_readers_do_not_store(batch):
    loaded = make(2)
    full = Engine(loaded, cache="full", max_context=300, batch=batch)
    shared = Engine(loaded, cache="kvsharer:share=0.3", max_context=300, batch=batch)
    slot = full.cache.shape.slot_bytes
    assert full.stats().nbytes - shared.stats().nbytes == batch * 2 * H * 300 * slot
    tensors = [x for x in vars(shared.cache).values() if isinstance(x, torch.Tensor)]
    assert sum(x.nbytes for x in tensors) == shared.stats().nbytes
    engines = [
        Engine(loaded, cache=cache, budget=32, max_new_tokens=10, batch=batch)
        for cache in ("snapkv:preset=tuned", "kvsharer:share=0.3+snapkv:preset=tuned")
    ]
    plain, both = (engine.stats().nbytes for engine in engines)
    assert plain - both == batch * 2 * H * (32 + 10) * slot


def test_the_owners_share_out_the_whole_budget():
    engine = Engine(make(2), cache=f"kvsharer:share=0.3+{SPEC}", budget=24, max_new_tokens=10)
    engine.prefill(tokens(200))
    kept = engine.stats().kept[0]
    assert kept[list(OWNERS)].sum() == 24 * len(OWNERS) * H
    assert len(kept[list(OWNERS)].unique()) > 2
    assert torch.equal(kept, kept[list(SOURCE)])


def test_no_weight_is_copied_and_the_model_stays_as_it_is():
    loaded = make(2)
    before = {name: x.data_ptr() for name, x in loaded.model.named_parameters()}
    engine = Engine(loaded, cache="kvsharer:share=0.3", max_context=100)
    memory = {x.untyped_storage().data_ptr() for x in loaded.model.parameters()}
    blocks = torch.nn.ModuleList(engine.blocks)
    assert {x.untyped_storage().data_ptr() for x in blocks.parameters()} <= memory
    assert blocks[5].attention.qkv.weight.shape[0] == loaded.config.num_heads * D
    assert {name: x.data_ptr() for name, x in loaded.model.named_parameters()} == before
    assert sum(p.numel() for p in loaded.model.blocks[5].parameters()) > sum(p.numel() for p in blocks[5].parameters())


def test_sharing_nothing_is_the_full_cache_bit_for_bit():
    engines = [Engine(make(2), cache=cache, max_context=100) for cache in ("full", "kvsharer:share=0")]
    ((a, b), (c, d)) = [(engine.prefill(tokens(50)), engine.step([3])) for engine in engines]
    assert torch.equal(a, c) and torch.equal(b, d)


def test_two_compilations_serve_all_layers_and_prompts():
    torch._dynamo.reset()
    counters.clear()
    options = {"cache": "kvsharer:share=0.3", "max_context": 300}
    compiled, eager = Engine(make(2), compile="inductor", **options), Engine(make(2), **options)
    compiled.prefill(tokens(40))
    compiled.step([1])
    assert counters["stats"]["unique_graphs"] == 2, "a block with keys and values, and one without"
    with dynamo_config.patch(error_on_recompile="inductor"):
        for length in (90, 17, 200):
            torch.testing.assert_close(compiled.prefill(tokens(length)), eager.prefill(tokens(length)))
            for step in range(5):
                outs = compiled.step([step]), eager.step([step])
                torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kvsharer:share=1", "share must be at least 0 and below 1, not "),
        ("kvsharer:share=-0.1", "share must be at least 0 and below 1, not "),
        ("kvsharer:share=nan", "share must be at least 0 and below 1, not "),
        ("kvsharer:share=few", "takes a number"),
        ("kvsharer:layers=3", "no option"),
        ("kvsharer+nosuch", "no cache method is called 'nosuch'"),
        ("kvsharer+", "lacks a method on one side of the plus"),
        ("kvsharer+kvsharer", "write kvsharer once"),
        ("snapkv+kvsharer", "changes no other method"),
        ("kvsharer:share=0.9", "let 5 of 6 layers read another's cache, but the search for tiny found 3: lower"),
    ],
)
def test_what_cannot_be_composed_is_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        Engine(make(2), cache=spec)


@pytest.mark.parametrize("source", [[0, 2, 2], [0, 0, 1], [-1, 1, 2]], ids=["later", "chain", "negative"])
def test_a_cache_refuses_sources_that_cannot_be(source):
    shape = ArenaShape(batch=1, num_layers=3, num_kv_heads=1, head_dim=4, slots=4, dtype=torch.float32)
    with pytest.raises(ValueError, match="a source must be an earlier layer that reads no other"):
        ArenaCache(shape, "cpu", source=source)


def test_a_replay_cannot_share_layers():
    with pytest.raises(ValueError, match="kvsharer cannot be replayed"):
        Replay(Record(make(2), tokens(20)[0]), build_method("kvsharer"), [8], room=4)


def test_the_full_cache_with_shared_layers_reads_no_budget():
    options = {"cache": "kvsharer:share=0.3", "max_context": 100}
    assert Engine(make(2), budget=8, **options).stats().nbytes == Engine(make(2), **options).stats().nbytes


def test_options_that_do_not_go_together(tmp_path, capsys):
    model = ["--model", str(tiny_chat.write(tmp_path / "tiny")), "--prompt", "Hello"]
    for options, message in (
        (["--cache", "kvsharer", "--budget", "8"], "kvsharer keeps everything: drop --budget 8"),
        (["--cache", "snapkv", "--sharing", "x.json"], "shares no layers: drop --sharing x.json"),
    ):
        assert chat.main([*model, *options]) == 2
        assert message in capsys.readouterr().err


# -- the file ----------------------------------------------------------------------------------------------------------


def test_pairs_become_sources_step_by_step():
    pairs = found(make(1))
    assert [pairs.sources(count) for count in range(4)] == [
        (0, 1, 2, 3, 4, 5),
        (0, 1, 2, 3, 4, 1),
        SOURCE,
        (0, 1, 1, 3, 1, 1),
    ]
    with pytest.raises(ValueError, match="4 layers cannot share: the search for tiny found 3"):
        pairs.sources(4)


def test_a_file_is_read_as_it_was_written_and_only_for_its_model(tmp_path):
    loaded, path = make(1), tmp_path / "sharing.json"
    wanted = replace(found(loaded), provenance={"threshold": 0.5})
    write_sharing(path, wanted)
    assert read_sharing(path, config=loaded.config) == wanted
    assert read_sharing(path, config=loaded.config, tokenizer_hash="none") == wanted
    for options in ({"config": make(2).config}, {"config": loaded.config, "tokenizer_hash": "another"}):
        with pytest.raises(CheckpointError, match="of another model: it was made for 'tiny'"):
            read_sharing(path, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=2), "supported is 1"),
        (lambda data: data.pop("pairs"), "not a layer-sharing file"),
        (lambda data: data["pairs"][0].pop("source"), "damaged"),
        (
            lambda data: data["pairs"][0].update(layer=0),
            "layer 0 of 6 cannot read layer 1: a source must be an earlier",
        ),
        (lambda data: data["pairs"][0].update(layer=6), "layer 6 of 6 cannot read"),
        (lambda data: data["pairs"][0].update(source=-1), "cannot read layer -1"),
        (lambda data: data["pairs"][0].update(layer=4), "layer 4 has two sources"),
        (lambda data: data["pairs"][0].update(layer="5"), "whole numbers"),
        (lambda data: data["pairs"].append(3), "damaged"),
        (lambda data: data["pairs"][0].update(similarity=None), "damaged"),
    ],
)
def test_files_that_are_refused(tmp_path, change, message):
    loaded, path = make(1), tmp_path / "sharing.json"
    write_sharing(path, found(loaded))
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message) as error:
        read_sharing(path, config=loaded.config)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    config, path = make(1).config, tmp_path / "sharing.json"
    with pytest.raises(CheckpointError, match="cannot read"):
        read_sharing(path, config=config)
    for text, message in (("{", "not valid json"), ("[]", "not a layer-sharing file")):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_sharing(path, config=config)


def test_a_model_without_a_file_is_told_how_to_make_one():
    with pytest.raises(CheckpointError, match=r"search_sharing --model tiny --layers 1 .* --sharing sharing.json"):
        layer_sharing(make(1))


def test_what_ships_is_a_search_of_the_default_model():
    data = json.loads((Path(__file__).parents[1] / "zoo" / "sharing" / "smollm2-135m.json").read_text())
    notes = data["provenance"]
    assert data["model_id"] == "smollm2-135m" and notes["command"].startswith("python -m recipes.search_sharing")
    assert len(data["pairs"]) == notes["layers"] >= 8
    assert all(pair["similarity"] > notes["threshold"] == 0.5 for pair in data["pairs"])


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "qwen2-window-mixed"])
def searched(request, tmp_path_factory) -> Loaded:
    family, _, feature = request.param.partition("-")
    config = tiny.config_json(family, feature or "plain") | {"num_hidden_layers": 5}
    if "layer_types" in config:
        config["layer_types"] = [*config["layer_types"], "full_attention", "sliding_attention"]
    model = tiny.load(tiny.write(tmp_path_factory.mktemp(family), config))
    return replace(model, name=family, tokenizer=Words(), chat=CHAT)


def naive_search(loaded: Loaded, ids: torch.Tensor, layers: int, threshold: float, compat: bool) -> list[tuple]:
    """Section 3 of the paper, pair by pair."""

    def pieces(kept, part, layer):
        """To the paper, a layer is one vector; to its code, one per token and head."""
        mean = sum(kept[layer][part][row] for row in range(len(ids))) / len(ids)
        return list(mean.flatten(0, 1)) if compat else [mean.flatten()]

    own, cache = search_sharing.run(loaded, ids, range(loaded.config.num_layers))
    order = []
    for i in range(loaded.config.num_layers):
        for j in range(i):
            distance = 0.0
            for part in (0, 1):
                both = list(zip(pieces(cache.kept, part, i), pieces(cache.kept, part, j), strict=True))
                distance += sum(float((a - b).square().sum().sqrt()) for a, b in both) / len(both)
            order.append((distance, i, j))
    assert all(a - b > 1e-5 for (a, *_), (b, *_) in pairwise(sorted(order, reverse=True)))
    shared: dict[int, int] = {}
    accepted = []
    for _, i, j in sorted(order, reverse=True):
        if len(shared) == layers or i in shared:
            continue
        tentative = {**shared, i: j}
        for layer in sorted(tentative):
            while tentative[layer] in tentative:
                tentative[layer] = tentative[tentative[layer]]
        source = [tentative.get(layer, layer) for layer in range(loaded.config.num_layers)]
        other, _ = search_sharing.run(loaded, ids, source)
        cosines = [float(a.flatten() @ b.flatten() / a.norm() / b.norm()) for a, b in zip(own, other, strict=True)]
        if sum(cosines) / len(cosines) > threshold:
            shared = tentative
            accepted.append((i, j, sum(cosines) / len(cosines)))
    return accepted


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 0.8])
def test_the_search_is_the_papers(searched, threshold, compat):
    ids = search_sharing.calibration_ids(searched, texts=4, tokens=12, seed=0)
    got = search_sharing.search(searched, ids, layers=3, threshold=threshold, compat=compat)
    wanted = naive_search(searched, ids, 3, threshold, compat)
    assert [(i, j) for i, j, _ in wanted] == list(got.pairs)
    assert got.similarity == pytest.approx([score for *_, score in wanted], abs=1e-5)
    assert len(got.pairs) == 3 or threshold > 0


def test_shared_layers_are_what_the_engine_computes():
    loaded = make(2)
    ids = torch.tensor(tokens(40, 40))
    hidden, _ = search_sharing.run(loaded, ids, SOURCE)
    logits = hidden[:, -1] @ loaded.model.embed.weight.T
    engine = Engine(loaded, cache="kvsharer:share=0.3", max_context=100)
    torch.testing.assert_close(engine.prefill(ids.tolist()), logits, rtol=1e-4, atol=1e-4)


def test_an_interrupted_search_goes_on(searched, tmp_path, monkeypatch):
    ids, journal = search_sharing.calibration_ids(searched, texts=2, tokens=12, seed=0), tmp_path / "journal.json"
    whole = search_sharing.search(searched, ids, layers=4, threshold=-1.0)
    run, calls = search_sharing.run, []

    def counted(*args, stop=None):
        calls.append(args)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(search_sharing, "run", lambda *args: counted(*args, stop=4))
    with pytest.raises(KeyboardInterrupt):
        search_sharing.search(searched, ids, layers=4, threshold=-1.0, journal=journal)
    calls.clear()
    monkeypatch.setattr(search_sharing, "run", counted)
    assert search_sharing.search(searched, ids, layers=4, threshold=-1.0, journal=journal) == whole
    assert len(calls) == 1 + 2, "the model itself, and the two pairs that were still to be tried"
    calls.clear()
    search_sharing.search(searched, ids, layers=4, threshold=-0.9, journal=journal)
    assert len(calls) == 1 + 4, "another threshold is another search"
    journal.write_text(journal.read_text()[:-5])
    with pytest.raises(ValueError, match="damaged: remove it"):
        search_sharing.search(searched, ids, layers=4, threshold=-0.9, journal=journal)


def test_the_command_says_when_it_found_fewer(searched, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search_sharing, "load", lambda name, **options: replace(searched, name=name))
    path, text = tmp_path / "out.json", tmp_path / "text.txt"
    text.write_text("too short\n" + "one two three four five six seven eight nine ten eleven twelve\n" * 3)
    options = ["--model", "some", "--output", str(path), "--texts", "3", "--tokens", "12"]
    assert search_sharing.main([*options, "--layers", "4", "--threshold", "0.999999", "--text", str(text)]) == 0
    out, err = capsys.readouterr()
    made = read_sharing(path, config=searched.config, tokenizer_hash="words")
    assert f"{len(made.pairs)} of 4 layers share" in out and "fewer than asked for" in err
    assert made.model_id == "some" and made.provenance["threshold"] == 0.999999 and len(made.pairs) < 4
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []
    assert search_sharing.main([*options, "--layers", "2", "--threshold", "-1"]) == 0
    assert "2 of 2 layers share" in capsys.readouterr().out
    for wrong, message in (
        (["--layers", "5"], "ask for 1 to 4"),
        (["--layers", "2", "--text", str(text), "--texts", "9"], "3 lines have 12 tokens, 9 are wanted"),
        (["--layers", "2", "--text", "nowhere.txt"], "nowhere.txt"),
    ):
        assert search_sharing.main([*options, *wrong]) == 2
        assert message in capsys.readouterr().err
