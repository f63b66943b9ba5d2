"""kvpress's presses get our questions: the same weights, as many tokens, the same judgement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import recipes.leaderboard as leaderboard
import recipes.worker as worker
from recipes.peers import Shared
from recipes.press_scores import PRESSES, compress, evaluate, make_press, names, parse
from recipes.questions import Question
from recipes.replay import Record
from tests import tiny
from tests.test_bench_peers import tiny_model
from tests.test_recipes import CHAT, Words
from zoo import Engine

CONTEXT = tiny.tokens(90)
QUESTION = Question(
    task="noise",
    kind="number",
    depth=0.5,
    context=CONTEXT,
    question=tiny.tokens(7, "question"),
    lead=tiny.tokens(3, "lead"),
    gold=tiny.tokens(4, "gold"),
)
SNAPKV, ADAKV = "kvpress:snapkv(window_size=8)", "kvpress:adakv(window_size=8,alpha_safeguard=1.0)"
PYRAMID = "kvpress:pyramidkv(window_size=4,beta=3)"


@pytest.fixture(params=["llama/plain", "qwen3/wide-heads"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Shared:
    pytest.importorskip("kvpress")
    return Shared(tiny_model(request.param, tmp_path, max_position_embeddings=400))


@pytest.mark.parametrize("mode", ["seen", "unseen"])
def test_without_compression_scores_are_those_of_our_full_cache(shared: Shared, mode: str) -> None:
    engine = Engine(shared.loaded, cache="full", max_new_tokens=16)
    record = Record(shared.loaded, CONTEXT + QUESTION.question)
    (ours,) = worker.evaluate(record, QUESTION, mode=mode, engines={"full": {97: engine}})["full"].values()
    presses = {"kvpress:full": [97], "kvpress:adakv": [16], "kvpress:snapkv": [97, 200]}
    theirs = evaluate(shared, QUESTION, mode=mode, presses=presses, room=5).results
    assert theirs["kvpress:full"]["97"] == pytest.approx(ours, abs=1e-4)
    assert theirs["kvpress:snapkv"]["97"] == theirs["kvpress:snapkv"]["200"] == theirs["kvpress:full"]["97"]
    assert theirs["kvpress:adakv"]["16"][1] != pytest.approx(ours[1], abs=1e-3)


def test_one_prefill_leaves_every_press_what_it_leaves_alone(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where presses have a state, and where caches take turns in being read from."""
    import kvpress
    from transformers import DynamicCache

    class Stateful(kvpress.StreamingLLMPress):  # type: ignore[misc, name-defined]
        def post_init_from_model(self, model: Any) -> None:
            self.passed = 0.0

        def score(self, module: Any, hidden_states: Any, keys: Tensor, *rest: Any) -> Tensor:
            self.passed = self.passed + keys.mean(2, keepdim=True)
            return (keys * self.passed).sum(-1)

    monkeypatch.setattr(kvpress, "StatefulPress", Stateful, raising=False)
    monkeypatch.setitem(PRESSES, "stateful", "StatefulPress")
    model, tokens = shared.transformers, [5, 6, 7]
    presses = {name: [16, 70] for name in (*names(["kvpress"]), SNAPKV, ADAKV, PYRAMID)} | {"kvpress:full": [90]}

    @torch.inference_mode()
    def alone(name: str, budget: int) -> tuple[list[Tensor], list[Any], list[Tensor]]:
        cache = DynamicCache(config=model.config)
        with make_press(name, ratio=max(0.0, 1 - (budget + 1e-6) / 90))(model):
            logits = [model(torch.tensor([CONTEXT]), past_key_values=cache, logits_to_keep=1).logits[0, 0]]
        held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        masks = [layer.self_attn.masked_key_indices for layer in model.model.layers]
        for place, token in enumerate(tokens, start=90):
            place_11 = torch.tensor([[place]])
            out = model(torch.tensor([[token]]), position_ids=place_11, past_key_values=cache)
            logits.append(out.logits[0, 0])
        return held, masks, logits

    expected = [alone(name, budget) for name, budgets in presses.items() for budget in budgets]
    prefills: list[int] = []
    counter = model.register_forward_pre_hook(lambda _, args: prefills.append(args[0].shape[1]))
    prompts = compress(shared, CONTEXT, presses)
    counter.remove()
    assert prefills == [90] and len(prompts) == len(expected) == 23
    kept = [[x for layer in prompt._cache.layers for x in (layer.keys, layer.values)] for prompt in prompts]
    logits = [[prompt.read([])[-1]] for prompt in prompts]
    for token in tokens:
        for prompt, after in zip(prompts, logits, strict=True):
            after.append(prompt.read([token])[-1])
    for prompt, ours, after, (held, masks, theirs) in zip(prompts, kept, logits, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip([*ours, *after], [*held, *theirs], strict=True)), prompt.name
        for mask, their_mask in zip(prompt._masks, masks, strict=True):
            assert (mask is None) == (their_mask is None) == ("adakv" not in prompt.name)
            assert all(torch.equal(x, y) for x, y in zip(mask or (), their_mask or (), strict=True))
        if "adakv" not in prompt.name:  # nothing keeps the dense tensors in memory
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in ours)
    hidden = {kept[prompts.index(prompt)][0].data_ptr() for prompt in prompts if "adakv" in prompt.name}
    assert len(hidden) == 1  # AdaKV's caches share them, as nothing is dropped


@pytest.mark.parametrize("mode", ["seen", "unseen"])
def test_every_press_keeps_the_budget(shared: Shared, mode: str) -> None:
    budgets = [16, 70]
    presses = {name: budgets for name in [*names(["kvpress"]), SNAPKV, ADAKV, PYRAMID]}
    scores = evaluate(shared, QUESTION, mode=mode, presses=presses, room=5)
    config, later = shared.loaded.config, 0 if mode == "seen" else 7
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    for name in presses:
        for budget in budgets:
            kept, mebibytes = scores.kept[name][str(budget)], scores.mebibytes[name][str(budget)]
            if name == PYRAMID:
                assert kept == pytest.approx(budget, abs=0.5)
            else:
                assert kept == budget
            nbytes = (kept + later + 5) * token
            if "adakv" in name:  # which holds what it hides, and three indices for each
                heads, hidden = config.num_layers * config.num_kv_heads, 97 - later - budget
                nbytes += hidden * (token + 24 * heads)
            assert mebibytes == pytest.approx(nbytes / 2**20, abs=0.0051)
    # Where every head is guaranteed its share, hiding tokens is as good as dropping them.
    for budget in ("16", "70"):
        assert scores.results[ADAKV][budget] == pytest.approx(scores.results[SNAPKV][budget], abs=1e-4)


@pytest.mark.parametrize("name", [SNAPKV, PYRAMID, "kvpress:adakv(window_size=8)"])
def test_reading_on_is_the_same_token_by_token_and_after_going_back(shared: Shared, name: str) -> None:
    (prompt,) = compress(shared, CONTEXT, {name: [24]})
    assert prompt._alike == (name == SNAPKV)
    together = prompt.read([5, 6, 7])
    prompt.forget(3)
    singly = [prompt.read([token])[-1] for token in (5, 6, 7)]
    for expected, logits in zip(together[1:], singly, strict=True):
        assert logits.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert prompt.read([]).shape == (1, shared.loaded.config.vocab_size)


def test_the_leaderboard_has_presses_beside_our_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("kvpress")
    loaded = tiny_model("llama/plain", tmp_path, max_position_embeddings=400)
    loaded = replace(loaded, tokenizer=Words(), chat=CHAT)
    monkeypatch.setattr(worker, "load", lambda name, **_: loaded)
    output = tmp_path / "out.jsonl"
    arguments = ["--tasks", "noise", "vt", "--tokens", "380", "--question", "seen", "unseen", "--prompts", "1"]
    arguments += ["--caches", "streaming", "--budgets", "16", "24", "--output", str(output)]

    def rows(*peers: str) -> list[dict[str, Any]]:
        assert leaderboard.main([*arguments, "--peers", *peers]) == 0
        return [json.loads(line) for line in output.read_text().splitlines()]

    first = rows("kvpress:streamingllm")
    assert len(first) == 4 and all(list(r["results"]) == ["full", "streaming", "kvpress:streamingllm"] for r in first)
    assert all(r["kept"] == {"kvpress:streamingllm": {"16": 16, "24": 24}} and r["seconds"] for r in first)
    assert len(rows("kvpress:streamingllm")) == 4
    more = rows("kvpress:streamingllm", "kvpress:full", SNAPKV)[4:]
    assert len(more) == 4 and all(list(row["results"]) == ["kvpress:full", SNAPKV] for row in more)
    assert f"--peers kvpress:streamingllm kvpress:full '{SNAPKV}'" in more[0]["command"]
    for old, new in zip(first, more, strict=True):
        assert new["results"]["kvpress:full"]["380"] == pytest.approx(old["results"]["full"]["380"], abs=1e-4)
    text = capsys.readouterr().out
    assert f"`{SNAPKV}`" in text and "AdaKV hides tokens" in text

    wide = "kvpress:snapkv(window_size=400)"
    last = rows("kvpress:streamingllm", wide)[8:]
    captured = capsys.readouterr()
    assert len(last) == 4 and not any(row["results"] for row in last)
    assert all(
        "greater than the window size 400" in row["refused"][wide][budget] for row in last for budget in ("16", "24")
    )
    assert captured.err.count("is left out where it fails") == 1
    assert f"`{wide}` at 24 is left out in 2, e.g. as it cannot compress" in captured.out
    assert len(rows("kvpress:streamingllm", wide)) == 12


def test_names_that_are_none() -> None:
    for wrong in ("kvpress:nothing", "presses"):
        with pytest.raises(ValueError, match="no peer"):
            parse(wrong)
    for wrong in ("kvpress:full(a=1)", "kvpress:tova(1)", "kvpress:tova(", "kvpress:tova()()"):
        with pytest.raises(ValueError, match="not a press with options"):
            parse(wrong)


def test_who_lacks_kvpress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="kvpress is not installed"):
        names(["kvpress"])


def test_wrong_options_are_refused_at_once(shared: Shared) -> None:
    assert names(["kvpress", "kvpress:tova"]) == [f"kvpress:{name}" for name in PRESSES]
    with pytest.raises(ValueError, match=r"snapkv.window=8.: .*unexpected keyword argument 'window'"):
        names(["kvpress:snapkv(window=8)"])


def test_what_fails_fails_alone(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    import kvpress.attention_patch

    def find_none(queries: Tensor) -> Tensor:
        raise ValueError("no fake keys")

    odd, kvpress_adakv = "kvpress:snapkv(window_size=8,kernel_size=4)", "kvpress:adakv(window_size=8)"
    presses = {"kvpress:snapkv": [8, 60], kvpress_adakv: [8], odd: [8], "kvpress:full": [40, 67], SNAPKV: [8]}
    question = replace(QUESTION, context=CONTEXT[:60])
    alone = evaluate(shared, question, mode="unseen", presses={SNAPKV: [8]}, room=5)
    monkeypatch.setattr(kvpress.attention_patch, "search_hyperplane", find_none)
    scores = evaluate(shared, question, mode="unseen", presses=presses, room=5)
    assert {name: list(found) for name, found in scores.results.items()} == {
        "kvpress:snapkv": ["60"],
        "kvpress:full": ["67"],
        SNAPKV: ["8"],
    }
    assert scores.results[SNAPKV] == alone.results[SNAPKV]
    reasons = {name: " ".join(found.values()) for name, found in scores.refused.items()}
    assert list(reasons) == ["kvpress:snapkv", kvpress_adakv, odd, "kvpress:full"]
    assert "cannot compress: AssertionError: Query length 60 should be greater" in reasons["kvpress:snapkv"]
    assert reasons[kvpress_adakv] == "cannot be read: ValueError: no fake keys"
    assert "cannot compress: RuntimeError" in reasons[odd]
    assert reasons["kvpress:full"] == "kept 60.0 of 60 tokens per KV head, not 40"


def test_a_press_and_our_method_of_the_same_settings_agree(shared: Shared) -> None:
    ours, presses = "snapkv:window=8,recent=8,ahead=2,behind=2,pooling=mean", {SNAPKV: [16, 40]}
    engines = {ours: {budget: Engine(shared.loaded, cache=ours, budget=budget) for budget in (16, 40)}}
    record = Record(shared.loaded, CONTEXT + QUESTION.question)
    expected = worker.evaluate(record, QUESTION, mode="seen", engines=engines)[ours]
    theirs = evaluate(shared, QUESTION, mode="seen", presses=presses, room=5).results[SNAPKV]
    assert theirs["16"] == pytest.approx(expected["16"], abs=1e-4)
    assert theirs["40"] == pytest.approx(expected["40"], abs=1e-4)
