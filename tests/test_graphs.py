"""The decode step can be a graph: the same work on the same memory, and no waiting, with every cache.

Machines without a GPU take a stand-in for its graphs: it records which operators the step calls on which tensors, and
replays just that, without the step's Python, each result going to where it went first. What a CUDA graph would get
wrong, it gets wrong as well: a number that Python took from somewhere is replayed as it was.
"""

import ctypes
import gc
import weakref
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoints.config import RopeConfig
from kernels.language import INTERPRETED
from kernels.registry import use
from layers.sampler import sample
from tests.test_engine import SPECS, close, importance, make_loaded, small, tokens  # noqa: F401 (an autouse fixture)
from zoo.engine import Engine
from zoo.graphs import CudaGraphs, GraphedStep, GraphError, places

OPTIONS = {"budget": 24, "max_new_tokens": 6, "max_context": 300}
DYNAMIC = RopeConfig(kind="dynamic", factor=4.0, original_max_position=32)
LONGROPE = RopeConfig(
    kind="longrope", factor=4.0, original_max_position=32, short_factor=(1.0,) * 4, long_factor=(1.0, 1.5, 2.0, 4.0)
)
every_cache = pytest.mark.parametrize("spec", SPECS)


# -- the stand-in ------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Calls of operators. One that a GPU would be waited for, or that takes numbers from the host, is an error."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits(func, args):
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and storage(old) != storage(new):
                    old.copy_(new)


def waits(func, args):
    name = func.name().partition(".")[0]
    if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    values_decide = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    others = ("aten::item", "aten::is_nonzero", "aten::lift_fresh", "aten::repeat_interleave")
    return bool(values_decide) or name in others


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def record(run):
    run()
    run()
    with Recorder() as recorder:
        run()
    return recorder


def graphed(engine):
    engine._capture = lambda: record
    return engine


# -- the step ----------------------------------------------------------------------------------------------------------


def described(calls, held):
    """Operators with the shapes and places of their tensors, and with their numbers."""

    def leaf(x):
        if not isinstance(x, torch.Tensor):
            return repr(x)
        place = (held[storage(x)], x.storage_offset()) if storage(x) in held else None
        return x.dtype, tuple(x.shape), x.stride(), place

    return [(func.name(), *map(leaf, tree_leaves((args, kwargs, out)))) for func, args, kwargs, out in calls]


@every_cache
@pytest.mark.parametrize("windows", [(None, None, None), (None, 24, 24)], ids=["full", "sliding"])
def test_every_step_is_the_same_work_on_the_same_memory(spec, windows):
    engine = Engine(make_loaded(windows=windows), cache=small(spec), batch=2, **OPTIONS)
    token_B, active_B = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    fixed = {place.name: place.table[place.key] for place in places(engine.model, cache=engine.cache)}
    fixed |= {"tokens": token_B, "active": active_B, "frequencies": engine._frequencies_Bd}
    held = {storage(tensor): name for name, tensor in fixed.items()}
    assert len(held) == len(fixed), "no two of them share memory"
    seen = []

    def step(token, active):
        token_B.fill_(token)
        active_B.copy_(torch.tensor(active))
        with torch.inference_mode(), Recorder() as recorder:
            engine._decode_step(token_B, active_B)
        seen.append(described(recorder.calls, held))

    for turn, prompt in enumerate([tokens(90, 17), tokens(5, 200, seed=1), tokens(41, 41, seed=2)]):
        engine.prefill(prompt)
        for token in range(9):  # beyond the room
            step(token, (True, token < 6))
        engine.extend(tokens(11, 60, seed=turn + 3))
        step(7, (True, True))
    assert len(seen) == 30 and all(step == seen[0] for step in seen)
    places_touched = {x[-1][0] for call in seen[0] for x in call[1:] if isinstance(x, tuple) and x[-1]}
    unused = set(held.values()) - places_touched
    unused -= {"cache.ring_start"} if engine.method.evict else set()
    unused -= {"cache.ends"} if engine.method.sentences else set()
    assert unused == {"rope.frequencies_d", "cache._span"}, "what a step does not touch"
    assert {storage(place.table[place.key]) for place in places(engine.model, cache=engine.cache)} <= set(held)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}], ids=["greedy", "sampled"]
)
def test_the_choice_of_a_token_does_not_wait(sampling):
    logits_BV, seed_B, position_B = torch.randn(2, 97), torch.arange(2), torch.tensor([3, 9], dtype=torch.int32)
    with torch.inference_mode(), Recorder() as recorder:
        sample(logits_BV, seed_B, position_B, **sampling)
    assert recorder.calls


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: int(x.max()),
        lambda x: bool((x > 0).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
        lambda x: torch.equal(x, x),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    ],
)
def test_the_recorder_sees_waiting(wait):
    with pytest.raises(RuntimeError, match="waits"), torch.inference_mode(), Recorder():
        wait(torch.ones(3))


# -- graphs of the step ------------------------------------------------------------------------------------------------


def conversation(engine, prompts, active):
    """Logits of rows that take part, over two turns in which rows come to their end one after the other."""
    logits = [engine.prefill(prompts)]
    for turn in range(2):
        if turn:
            logits.append(engine.extend(tokens(*[11] * len(prompts), seed=turn)))
        for step, flags in enumerate(active):
            out = engine.step([(7 * step + row) % 97 for row in range(len(prompts))], flags)
            logits += [out[row] for row, flag in enumerate(flags) if flag]
    return logits


@every_cache
def test_replaying_gives_the_numbers_of_the_step(spec):
    loaded = make_loaded(windows=(None, 24, None))
    eager, replayed = (Engine(loaded, cache=small(spec), **OPTIONS) for _ in range(2))
    graphed(replayed)
    active = [(True,) * 3] * 3 + [(True, True, False)] * 2 + [(False, True, False), (True, False, False)] * 3
    made = []
    for prompts in (tokens(150, 9, 61), tokens(5, 40, 17, seed=1), tokens(33, 90, 61, seed=2)):
        got, want = (conversation(engine, prompts, active) for engine in (replayed, eager))
        for a, b in zip(got, want, strict=True):
            close(a, b)
        for name, tensor in vars(eager.cache).items():
            if isinstance(tensor, torch.Tensor) and name not in ("_slot", "_active_B"):
                close(getattr(replayed.cache, name), tensor)
        assert replayed.tokens_seen == eager.tokens_seen and replayed.stats().prefill == "whole"
        made.append(replayed._graphs)
    assert made[0] is made[1] is made[2], "captured once"


@pytest.mark.skipif(not INTERPRETED, reason="Triton's operators run on CPU tensors where they are interpreted")
@pytest.mark.parametrize("cache", ["full", "snapkv:window=4,recent=4", "h2o", "tova"])
def test_replaying_gives_the_numbers_of_the_step_in_triton(cache):
    loaded = make_loaded(windows=(None, 24, None))
    eager, replayed = (Engine(loaded, cache=cache, **OPTIONS) for _ in range(2))
    graphed(replayed)
    for prompts in (tokens(40, 9), tokens(5, 70, seed=1)):
        for engine in (eager, replayed):
            engine.prefill(prompts)
        for flags in ((True, True), (True, False)):
            with use("triton"):
                got = replayed.step([3, 5], flags)
            close(got[: sum(flags)], eager.step([3, 5], flags)[: sum(flags)])


@pytest.mark.parametrize("rope", [DYNAMIC, LONGROPE], ids=lambda rope: rope.kind)
def test_frequencies_that_depend_on_the_prompt_are_not_captured(rope):
    loaded = make_loaded(rope=rope)
    eager, replayed = (Engine(loaded, cache="full", max_context=300) for _ in range(2))
    graphed(replayed)
    for prompts in (tokens(150, 9), tokens(5, 70, seed=1), tokens(250, 33, seed=2)):
        got, want = (conversation(engine, prompts, [(True, True)] * 4) for engine in (replayed, eager))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_generated_text_is_the_same():
    loaded = make_loaded()
    loaded.chat.stop_ids = frozenset(range(0, 97, 7))
    settings = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95}
    eager, replayed = (Engine(loaded, cache="snapkv:window=4,recent=4", **OPTIONS) for _ in range(2))
    graphed(replayed)
    prompts, ended = tokens(50, 90, 20, 33), set()
    for seed in range(8):
        texts = eager.generate(prompts, seed=seed, **settings)
        assert replayed.generate(prompts, seed=seed, **settings) == texts
        ended |= set(map(len, texts))
    assert len(ended) > 3, "rows ended at different times"
    for engine in (replayed, eager):
        engine.reset()
    assert list(replayed.stream([1, 2, 3], **settings)) == list(eager.stream([1, 2, 3], **settings))


def test_logits_stay_what_they_were():
    engine = graphed(Engine(make_loaded(), cache="full", max_context=100))
    engine.prefill(tokens(20))
    first = engine.step([1])
    before = first.clone()
    assert not torch.equal(engine.step([2]), first)
    assert torch.equal(first, before)


def test_most_rows_are_captured_first_and_the_fewest_that_do_are_replayed():
    captured, replays = [], []

    def capture(run):
        rows, recorder = run.args[1], record(run)
        captured.append(rows)
        return SimpleNamespace(replay=lambda: (replays.append(rows), recorder.replay()))

    engine = Engine(make_loaded(), cache="full", max_context=100)
    engine._capture = lambda: capture
    engine.prefill(tokens(5, 9, 12, 4, 7, 8))
    for flags in ("111111", "111110", "000100", "101000", "010000", "100000"):
        engine.step([1] * 6, [flag == "1" for flag in flags])
    assert captured == [6, 4, 2, 1] and replays == [6, 6, 4, 4, 2, 1]
    engine.prefill(tokens(5, 9))
    engine.step([1, 1])
    assert captured[4:] == [2, 1], "another number of rows is another cache"


def test_a_larger_region_is_captured_anew():
    engine = graphed(Engine(make_loaded(), cache="snapkv:window=4,recent=4", **OPTIONS))
    engine.prefill(tokens(60))
    engine.step([1])
    before = engine._graphs
    engine.cache._grow(engine.cache.most + 1)
    engine.step([1])
    assert engine._graphs is not before


def test_an_engine_with_graphs_goes_when_nobody_holds_it():
    gc.collect()
    gc.disable()
    try:
        engine = Engine(make_loaded(), cache="full", max_context=100)
        engine._capture = lambda: lambda run: SimpleNamespace(replay=lambda: None)
        engine.prefill(tokens(20))
        engine.step([1])
        cache = weakref.ref(engine.cache)
        del engine
        assert cache() is None
    finally:
        gc.enable()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def engine():
    engine = graphed(Engine(make_loaded(), cache="full", max_context=100))
    engine.prefill(tokens(20, 12))
    engine.step([1, 1])
    return engine


def test_a_weight_that_has_moved_is_refused(engine):
    block = engine.model.blocks[1]
    kept = block.mlp.down.weight
    block.mlp.down.weight = torch.nn.Parameter(kept.clone(), requires_grad=False)
    with pytest.raises(GraphError, match=r"blocks.1.mlp.down.weight is not where it was .*\(1 of \d+ .*new Engine"):
        engine.step([1, 1])
    block.mlp.down.weight = None
    with pytest.raises(GraphError, match=r"blocks.1.mlp.down.weight is not where"):
        engine.step([1, 1])
    block.mlp.down.weight = kept
    assert engine.tokens_seen == [21, 13]
    engine.step([1, 1])


def test_a_cache_tensor_that_has_moved_is_refused(engine):
    engine.cache.pos = engine.cache.pos.clone()
    with pytest.raises(GraphError, match=r"cache.pos is not where it was"):
        engine.step([1, 1])


@pytest.mark.parametrize(
    ("token_B", "active", "message"),
    [
        (torch.tensor([1]), [True, True], r"token_B has shape \(1\), it must be \(2\)"),
        (torch.tensor([1.0, 2.0]), [True, True], "token_B is float32, it must be int64 or int32"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), [True, True], "token_B is on meta, it must be on cpu"),
        (torch.tensor([1, 1]), [True], "active has 1 flags, it must have 2"),
    ],
)
def test_inputs_of_another_kind_are_refused(engine, token_B, active, message):
    with pytest.raises(ValueError, match=message):
        engine._graphs(token_B, active)


def test_a_step_that_replaces_what_it_was_given_is_refused():
    state = SimpleNamespace(count_B=torch.zeros(2))

    def step(token_B, active_B):
        state.count_B = state.count_B + 1
        return state.count_B[: len(token_B), None]

    size = {"rows": 2, "vocab_size": 1, "dtype": torch.float32, "device": torch.device("cpu")}
    with pytest.raises(GraphError, match=r"state.count_B is not where it was"):
        GraphedStep(step, **size, fixed=places(torch.nn.Module(), state=state), capture=record)


# -- what a GPU would be told ------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_guard():
    """Some functions of PyTorch switch to a tensor's device, which PyTorch cannot where it was built without CUDA.

    Then CUDA gets what the meta device has, which does nothing. Their numbers are from c10/core/DeviceType.h.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    cuda, meta, library = 1, 14, next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    registry = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(ctypes.CDLL(str(library)), registry)
    guards[cuda] = guards[meta]
    yield
    guards[cuda] = None


@contextmanager
def on_a_gpu_that_is_not_there(engine):
    """Everything that an engine's step touches, as tensors that hold nothing and say that they are on a GPU."""
    with FakeTensorMode():

        def fake(tensor):
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

        blocks = torch.nn.ModuleList(engine.blocks)  # some read the model's weights through views of their own
        for place in (*places(engine.model, cache=engine.cache), *places(blocks)):
            tensor = fake(place.table[place.key])
            is_weight = isinstance(place.table[place.key], torch.nn.Parameter)
            place.table[place.key] = torch.nn.Parameter(tensor, requires_grad=False) if is_weight else tensor
        engine._frequencies_Bd = fake(engine._frequencies_Bd)
        yield fake(torch.zeros(2, dtype=torch.int64)), fake(torch.ones(2, dtype=torch.bool))


def gpu_engine(spec, **options):
    engine = Engine(make_loaded(**options), cache=small(spec), batch=2, **OPTIONS)
    engine.prefill(tokens(60, 9))
    return engine


@every_cache
@pytest.mark.parametrize("windows", [(None, None, None), (None, 24, 24)], ids=["full", "sliding"])
def test_a_step_on_a_gpu_waits_for_nothing(spec, windows, cuda_guard):
    """Tensors without numbers cannot be waited for: whoever asks for one is refused."""
    engine = gpu_engine(spec, windows=windows)
    with on_a_gpu_that_is_not_there(engine) as (token_B, active_B), torch.inference_mode():
        for rows in (2, 1):
            logits_BV = engine._decode_step(token_B[:rows], active_B[:rows])
            assert logits_BV.shape == (rows, 97) and logits_BV.device.type == "cuda"
            assert sample(logits_BV, token_B[:rows], engine.cache.position[:rows], temperature=0.7).shape == (rows,)


@every_cache
def test_the_whole_step_is_one_graph_for_a_compiler(spec, cuda_guard):
    engine = gpu_engine(spec)
    torch._dynamo.reset()
    counters.clear()
    traced = []

    def keep(graph, example_inputs):
        traced.append(graph)
        return graph.forward

    with on_a_gpu_that_is_not_there(engine) as (token_B, active_B), torch.inference_mode():
        step = torch.compile(engine._decode_step, fullgraph=True, backend=keep)
        assert step(token_B, active_B).shape == (2, 97)
    assert len(traced) == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x[x > 0], lambda x: x.cpu().numpy()]
)
def test_tensors_without_numbers_see_waiting(wait, cuda_guard):
    with FakeTensorMode(), pytest.raises(Exception), torch.inference_mode():  # noqa: B017
        wait(torch.ones(3, device="cuda"))


# -- CUDA's graphs, and what stands for them ---------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """What `CudaGraphs` asks of torch.cuda, written down in the order of asking."""
    said, mode = [], [0]

    @contextmanager
    def within(*words):
        said.append(("enter", *words))
        yield
        said.append(("leave", *words))

    def set_mode(value):
        said.append(("mode", value))
        mode[0] = value

    def stream(name):
        return SimpleNamespace(name=name, wait_stream=lambda other: said.append((name, "waits for", other.name)))

    for name, stand_in in {
        "graph_pool_handle": lambda: "pool",
        "Stream": lambda device: stream("side"),
        "current_stream": lambda: stream("main"),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: said.append("replay")),
        "device": lambda device: within("device"),
        "stream": lambda stream: within(stream.name),
        "graph": lambda graph, pool, stream: within("graph", pool, stream.name),
        "get_sync_debug_mode": lambda: mode[0],
        "set_sync_debug_mode": set_mode,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return said


def test_what_is_asked_of_cuda(cuda):
    CudaGraphs(torch.device("cuda"))(lambda: cuda.append("run")).replay()
    assert cuda == [
        ("enter", "device"),
        ("side", "waits for", "main"),
        ("enter", "side"),
        "run",
        ("mode", "error"),
        "run",
        ("mode", 0),
        ("leave", "side"),
        ("main", "waits for", "side"),
        ("enter", "graph", "pool", "side"),
        ("mode", "error"),
        "run",
        ("mode", 0),
        ("leave", "graph", "pool", "side"),
        ("leave", "device"),
        "replay",
    ]


def test_a_step_that_waits_is_not_captured(cuda):
    def run():
        if torch.cuda.get_sync_debug_mode() == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nat some place")

    with pytest.raises(GraphError, match=r"cannot be captured \(called a synchronizing CUDA operation\)"):
        CudaGraphs(torch.device("cuda"))(run)
    assert torch.cuda.get_sync_debug_mode() == 0


def test_an_engine_whose_step_cannot_be_captured_says_so(cuda):
    """It does not decode in another way."""
    engine = Engine(make_loaded(), cache="full", max_context=100)
    engine._capture = partial(CudaGraphs, torch.device("cuda"))
    engine.prefill(tokens(20))
    engine.model.rope.rotation = lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no"))
    with pytest.raises(GraphError, match=r"cannot be captured \(no\)"):
        engine.step([1])
    assert engine.tokens_seen == [20]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("compile", [True, "inductor"])
def test_graphs_on_a_gpu(compile):
    loaded = make_loaded()
    loaded.model.cuda()
    eager, replayed = (Engine(loaded, cache="snapkv:window=4,recent=4", compile=c, **OPTIONS) for c in (False, compile))
    active = [(True,) * 3] * 3 + [(True, True, False), (True, False, False)] * 3
    for prompts in (tokens(150, 9, 61), tokens(5, 40, 17, seed=1)):
        for got, want in zip(*(conversation(e, prompts, active) for e in (replayed, eager)), strict=True):
            close(got, want)
