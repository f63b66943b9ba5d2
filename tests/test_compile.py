"""Compiled decoding: one compilation for all layers, prompts, turns and budgets, and the numbers of eager decoding."""

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters

from kernels import native
from kernels.registry import use
from tests.test_engine import close, importance, make_loaded, tokens  # noqa: F401 (importance is an autouse fixture)
from zoo.engine import Engine

PROMPTS = [tokens(n, seed=n) for n in (90, 17, 200, 41, 130)]


def conversation(engine, prompt, turns=3, steps=14):
    logits = [engine.prefill(prompt)]
    for turn in range(turns):
        if turn:
            logits.append(engine.extend(tokens(*[11] * len(prompt), seed=turn)))
        for step in range(steps):
            logits.append(engine.step([(7 * step + turn) % 97] * len(prompt)))
    return torch.stack(logits)


@pytest.mark.parametrize(
    "cache", ["headkv:window=4,recent=4", "adakv:window=4,recent=4", "cake:window=4,recent=4", "full", "h2o", "tova"]
)
@pytest.mark.parametrize("windows", [(None, None, None), (24, 24, 24)], ids=["full", "sliding"])
def test_one_compilation_serves_everything(cache, windows):
    torch._dynamo.reset()
    counters.clear()
    loaded = make_loaded(windows=windows)
    options = {"cache": cache, "budget": 24, "max_new_tokens": 10, "max_context": 400}
    compiled, eager = Engine(loaded, compile="inductor", **options), Engine(loaded, **options)
    compiled.prefill(tokens(40))
    compiled.step([1])
    assert counters["stats"]["unique_graphs"] == 1, "one graph for the blocks of all layers"
    pointers = {name: t.data_ptr() for name, t in vars(compiled.cache).items() if isinstance(t, torch.Tensor)}
    with dynamo_config.patch(error_on_recompile="inductor"):
        for prompt in PROMPTS:
            close(conversation(compiled, prompt), conversation(eager, prompt))
        other_budget = Engine(loaded, compile="inductor", **{**options, "budget": 48})
        other_budget.prefill(tokens(300))
        other_budget.step([1])
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert all(getattr(compiled.cache, name).data_ptr() == pointer for name, pointer in pointers.items())


def test_layers_of_two_kinds_take_two_compilations():
    torch._dynamo.reset()
    counters.clear()
    loaded = make_loaded(windows=(None, 24, 24))
    engine = Engine(loaded, cache="full", max_context=200, compile="inductor")
    close(engine.prefill(PROMPTS[0]), Engine(loaded, cache="full", max_context=200).prefill(PROMPTS[0]))
    for _ in range(5):
        engine.step([1])
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("cache", ["snapkv:window=4,recent=4", "h2o", "tova"])
def test_a_ragged_batch_compiles_once_too(cache):
    torch._dynamo.reset()
    loaded = make_loaded()
    options = {"cache": cache, "budget": 24, "max_new_tokens": 10, "max_context": 400}
    compiled, eager = Engine(loaded, compile="inductor", **options), Engine(loaded, **options)
    first = tokens(50, 90, 20)
    close(conversation(compiled, first), conversation(eager, first))
    with dynamo_config.patch(error_on_recompile="inductor"):
        second = tokens(10, 190, 120, seed=9)
        close(conversation(compiled, second), conversation(eager, second))


CACHES = [
    "headkv:window=4,recent=4",
    "adakv:window=4,recent=4",
    "cake:window=4,recent=4",
    "full",
    "streaming",
    "streaming:positions=in-cache",
]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("windows", [(None, None, None), (24, None, 24)], ids=["full", "sliding"])
def test_fused_blocks_give_the_numbers_of_plain_ones(cache, windows):
    native.load()
    loaded = make_loaded(windows=windows)
    options = {"cache": cache, "budget": 24, "max_new_tokens": 10, "max_context": 400}
    fused, plain = Engine(loaded, compile=True, **options), Engine(loaded, **options)
    fused.prefill(tokens(40))
    pointers = {name: t.data_ptr() for name, t in vars(fused.cache).items() if isinstance(t, torch.Tensor)}
    for prompt in (*PROMPTS, tokens(50, 90, 20)):
        out = conversation(fused, prompt)
        with use("reference"):
            close(out, conversation(plain, prompt))
        if len(prompt) == 1:
            assert all(getattr(fused.cache, name).data_ptr() == pointer for name, pointer in pointers.items())


def test_many_rows_are_compiled_by_torch():
    loaded, many = make_loaded(), tokens(*range(10, 20))
    compiled, plain = (Engine(loaded, cache="full", max_context=50, compile=compile) for compile in (True, False))
    torch._dynamo.reset()
    counters.clear()
    close(compiled.prefill(many), plain.prefill(many))
    close(compiled.step([1] * 10), plain.step([1] * 10))
    assert counters["stats"]["unique_graphs"] == 1
    compiled.prefill(many[:8])
    compiled.step([1] * 8)
    assert counters["stats"]["unique_graphs"] == 1, "few rows need no torch.compile"


@pytest.mark.parametrize("cache", ["h2o", "tova"])
def test_what_evicts_while_decoding_is_compiled_by_torch(cache):
    loaded, options = make_loaded(), {"cache": cache, "budget": 24, "max_context": 100}
    compiled, plain = (Engine(loaded, compile=compile, **options) for compile in (True, False))
    torch._dynamo.reset()
    counters.clear()
    close(conversation(compiled, PROMPTS[3], turns=2), conversation(plain, PROMPTS[3], turns=2))
    assert counters["stats"]["unique_graphs"] == 1


def test_what_compile_may_be():
    with pytest.raises(ValueError, match='compile must be True, False or "inductor"'):
        Engine(make_loaded(), compile="inductr")
