"""Every operator of the registry, in every form, with every case that it names, and what it refuses."""

import importlib
import inspect
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from kernels import decode_blocks, few_rows_linear, native, ragged_compact, ragged_decode, ragged_prefill, rope
from kernels.language import INSTALLED, INTERPRETED
from kernels.registry import all_kernels, use
from kernels.testing import check, each_tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [(kernel, case) for kernel in all_kernels().values() for case in kernel.cases()]
ids = [f"{kernel.name}-{case.name}" for kernel, case in CASES]
every_case = pytest.mark.parametrize("kernel, case", CASES, ids=ids)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on(device, arguments):
    return each_tensor(lambda x: x.to(device), arguments)


@every_dtype
@every_case
def test_triton_form(kernel, case, dtype):
    """Interpreted on a CPU, where kernels take bf16 operands of products to fp32: the interpreter's are wrong."""
    if kernel.launch is None:
        pytest.skip("other libraries do this better on a GPU")
    if not INSTALLED:
        pytest.skip("Triton is not installed")
    assert (DEVICE == "cpu") == INTERPRETED
    check(kernel, on(DEVICE, case.make(dtype)), kernel.launch)


@every_dtype
@every_case
def test_form_on_a_cpu(kernel, case, dtype):
    if native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    native.load()
    check(kernel, case.make(dtype), getattr(torch.ops.headkv, kernel.name))


@every_case
def test_fake_form(kernel, case):
    """What a compiler believes about results and about what is written is so."""
    torch.library.opcheck(
        getattr(torch.ops.headkv, kernel.name).default,
        case.make(torch.float32),
        test_utils=("test_schema", "test_faketensor"),
    )


DECODE = {case.name: case for case in ragged_decode.KERNEL.cases()}
LAYER = 6  # its place among the arguments; all other tensors have a row per row of the batch
launch_decode = ragged_decode.KERNEL.launch


def decode_arguments(name, dtype=torch.float16):
    return on(DEVICE, DECODE[name].make(dtype))


def each_row(arguments, change):
    """The arguments with every tensor but the layer changed."""
    return [change(x) if isinstance(x, torch.Tensor) and i != LAYER else x for i, x in enumerate(arguments)]


def changed_lengths(arguments, change):
    """The arguments with the tables (offset, length) changed."""
    return [*arguments[:4], *change(*arguments[4:6]), *arguments[6:]]


@pytest.mark.parametrize(
    "name",
    ["lengths=[[65, 0], [257, 1], [0, 0]], D=80, G=4, window=0", "4 bits, D=80, lengths=[[65, 0], [7, 64]]"],
)
def test_a_row_is_decoded_to_the_same_bits_in_any_company(name):
    arguments = decode_arguments(name)
    together = launch_decode(*arguments)
    rows = len(arguments[0])
    for order in ([0], [rows - 1, 0], list(range(rows))[::-1]):
        apart = launch_decode(*each_row(arguments, lambda x, order=order: x[order].contiguous()))
        assert all(torch.equal(x, whole[order]) for x, whole in zip(apart, together, strict=True))


def test_without_a_merge_decoding_gives_the_same_bits():
    arguments = decode_arguments("a tile holds every head")
    merged = launch_decode(*arguments[:9], 1000, *arguments[10:])
    assert all(torch.equal(x, y) for x, y in zip(launch_decode(*arguments), merged, strict=True))


@pytest.mark.parametrize("name", ["merged and empty slots", "lengths=[[63, 300]], D=96, G=3, window=40"])
def test_the_order_of_slots_changes_only_rounding(name):
    arguments = decode_arguments(name, torch.float32)
    order = torch.arange(arguments[1].shape[1], device=DEVICE)
    for first, length in zip(arguments[4][0, 1].tolist(), arguments[5][0, 1].tolist(), strict=True):
        order[first : first + length] = order[first : first + length].flip(0)
    slots = len(order)
    shuffled = each_row(arguments, lambda x: x[:, order] if x.shape[1:2] == (slots,) else x)
    for x, y in zip(launch_decode(*shuffled), launch_decode(*arguments), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ["merged and empty slots", "8 bits, window and bias"])
def test_halves_of_heads_merge_by_their_lse_to_the_whole(name):
    arguments = decode_arguments(name, torch.float32)
    halves = (
        (lambda offset, length: (offset, length // 2)),
        (lambda offset, length: (offset + length // 2, (length + 1) // 2)),
    )
    (o_a, lse_a), (o_b, lse_b) = (launch_decode(*changed_lengths(arguments, half)) for half in halves)
    whole, lse = launch_decode(*arguments)
    torch.testing.assert_close(torch.logaddexp(lse_a, lse_b), lse)
    share_a, share_b = ((part - lse).exp().nan_to_num(0.0)[..., None] for part in (lse_a, lse_b))
    torch.testing.assert_close(share_a * o_a + share_b * o_b, whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"q_BND": lambda q: q[..., :40]}, "q_BND has heads of 40 numbers"),
        ({"q_BND": lambda q: q[:, :3]}, "q_BND has 3 heads"),
        ({"q_BND": lambda q: q.double()}, "q_BND is float64"),
        ({"k_arena": lambda k: k.half()}, "k_arena is float16"),
        ({"k_arena": lambda k: k.mT.contiguous().mT}, "k_arena has strides"),
        ({"v_arena": lambda v: v[:, 1:]}, "v_arena has shape"),
        ({"pos": lambda pos: pos.long()}, "pos is int64"),
        ({"offset_BLH": lambda offset: offset[..., 0]}, "offset_BLH has shape"),
        ({"length_BLH": lambda length: length[:, :1]}, "length_BLH has shape"),
        ({"position_B": lambda position: position.to("meta")}, "position_B is on meta"),
        ({"bias": lambda _: torch.zeros(1, 3)}, "bias has shape"),
        ({"k_scale": lambda _: torch.zeros(1, 3, 2)}, "k_arena is float32, it must be uint8"),
        ({"most": lambda _: 0}, "most is 0"),
        ({"window": lambda _: -1}, "window -1"),
    ],
)
def test_what_decoding_would_read_wrongly_is_refused(change, says):
    names = [x.split(" ")[-1] for x in ragged_decode.KERNEL.schema.split(") ->")[0].split(", ")]
    arguments = dict(zip(names, DECODE["lengths=[[63, 300]], D=96, G=3, window=40"].make(torch.float32), strict=True))
    decode = partial(ragged_decode.ragged_decode, **arguments)
    assert decode()[0].isfinite().all()
    ((name, changed),) = change.items()
    with pytest.raises(ValueError, match=says):
        decode(**{name: changed(arguments[name])})


def test_decoding_past_the_most_slots_is_refused_on_a_cpu():
    arguments = DECODE["lengths=[[63, 300]], D=96, G=3, window=40"].make(torch.float32)
    for decode in (ragged_decode.reference, torch.ops.headkv.ragged_decode):
        with pytest.raises(RuntimeError, match="a head has 300 filled slots, most is 299"):
            decode(*arguments[:9], 299, *arguments[10:])


def named(kernel):
    """Arguments by name, of the case that leaves out the fewest tensors."""
    made = [case.make(torch.float32) for case in kernel.cases()]
    fullest = max(made, key=lambda arguments: sum(map(torch.is_tensor, arguments)))
    schema = getattr(torch.ops.headkv, kernel.name).default._schema
    return {argument.name: x for argument, x in zip(schema.arguments, fullest, strict=True)}


def call(kernel, arguments):
    """What people call, with an operator's arguments by name."""
    if kernel is decode_blocks.KERNEL:
        return decode_blocks.decode_blocks(*arguments.values())
    module = importlib.import_module(f"kernels.{kernel.name}")
    function = module.apply_rope if module is rope else getattr(module, kernel.name)
    given = arguments | {"window": arguments.get("window") or None, "rows": "mean", "group": "max"}
    return function(**{name: given[name] for name in inspect.signature(function).parameters if name in given})


ARGUMENTS = {name: named(kernel) for name, kernel in all_kernels().items()}
SPOILT = {
    "dtype": lambda x: x.to(torch.complex64),
    "device": lambda x: x.to("meta"),
    "dimensions": lambda x: x[None, None],
    "last size": lambda x: torch.cat((x, x[..., :1]), dim=-1),
    "strides": lambda x: torch.stack((x, x), dim=-1)[..., 0],
}
ALLOWED = {
    ("rms_norm", "x", "dimensions"),
    ("few_rows_linear", "x", "dimensions"),
    ("silu_mul", "gate_up", "dimensions"),
    ("silu_mul", "gate_up", "device"),
    ("quantize_kv", "x", "dimensions"),
    ("quantize_kv", "x", "device"),
    ("quantize_kv", "x", "last size"),
}
SPOILABLE = [
    (op, name, what)
    for op, arguments in ARGUMENTS.items()
    for name, x in arguments.items()
    for what in SPOILT
    if torch.is_tensor(x) and (op, name, what) not in ALLOWED
    if what != "strides" or name in ("k_arena", "v_arena", "pos")
]


@pytest.mark.parametrize("op, name, what", SPOILABLE)
def test_a_tensor_that_would_be_read_wrongly_is_refused(op, name, what):
    """The message names it, or the one that it no longer fits."""
    kernel, arguments = all_kernels()[op], ARGUMENTS[op]
    call(kernel, arguments)
    with pytest.raises(ValueError) as error:
        call(kernel, arguments | {name: SPOILT[what](arguments[name])})
    assert re.match(r"\w+ (is|has) .+ must (be|have) ", str(error.value))


@pytest.mark.parametrize("what", ["dtype", "dimensions", "last size", "strides"])
@pytest.mark.parametrize("place", range(decode_blocks.PER_BLOCK))
def test_a_weight_that_would_be_read_wrongly_is_refused(place, what):
    """In the second of two blocks."""
    cases = (case.make(torch.float32) for case in decode_blocks.cases())
    before, weights, after = next(
        (x[:3], x[3], x[4:]) for x in cases if x[3][decode_blocks.PER_BLOCK + place] is not None
    )
    decode_blocks.decode_blocks(*before, weights, *after)
    spoilt = [SPOILT[what](x) if i == decode_blocks.PER_BLOCK + place else x for i, x in enumerate(weights)]
    with pytest.raises(ValueError, match=r"^\w+ (is|has) .+ must (be|have) "):
        decode_blocks.decode_blocks(*before, spoilt, *after)


@pytest.mark.parametrize("op", [op for op, arguments in ARGUMENTS.items() if "k_arena" in arguments])
def test_more_slots_than_int32_counts_are_refused(op):
    arguments = {name: x.to("meta") if torch.is_tensor(x) else x for name, x in ARGUMENTS[op].items()}
    for part in {"k_arena", "v_arena", "pos"} & set(arguments):
        x = arguments[part]
        arguments[part] = x.new_empty(len(x), 2**31, *x.shape[2:])
    with pytest.raises(ValueError, match="k_arena has 2147483648 slots"):
        call(all_kernels()[op], arguments)


@pytest.mark.parametrize("form", ["reference", "C++"])
def test_slots_outside_the_arena_are_refused(form):
    if form == "C++" and native.compiler() is None:
        pytest.skip("there is no C++ compiler")
    native.load()
    kernels = all_kernels()

    def run(name, **changed):
        kernel = kernels[name]
        run = kernel.reference if form == "reference" else getattr(torch.ops.headkv, name)
        return run(*(ARGUMENTS[name] | changed).values())

    append, decode = ARGUMENTS["ragged_append"], ARGUMENTS["ragged_decode"]
    slots = append["k_arena"].shape[1]
    for slot in (-1, slots, 2**28):
        spoilt = append["slot_BLHT"].clone()
        spoilt[:, int(append["layer_1"])] = slot
        with pytest.raises((RuntimeError, IndexError), match="outside the arena"):
            run("ragged_append", slot_BLHT=spoilt, active_B=torch.ones_like(append["active_B"]))
        run("ragged_append", slot_BLHT=spoilt, active_B=torch.zeros_like(append["active_B"]))
    slots = decode["k_arena"].shape[1]
    for offset in (-1, slots - 1, 2**30):
        with pytest.raises((RuntimeError, IndexError), match="outside the arena"):
            run("ragged_decode", offset_BLH=torch.full_like(decode["offset_BLH"], offset))
    with pytest.raises((RuntimeError, IndexError), match="outside the arena"):
        run("ragged_decode", length_BLH=torch.full_like(decode["length_BLH"], -1))


@pytest.mark.parametrize("form", ["reference", "triton"])
def test_padding_at_the_end_of_a_prompt_does_not_count(form):
    """Of queries that are padding themselves nothing is said."""
    if form == "triton" and not INSTALLED:
        pytest.skip("Triton is not installed")
    run = partial(ragged_prefill.reference if form == "reference" else ragged_prefill.launch, window=0, lse=False)
    q, k, v = (torch.randn(2, 33, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 1))
    v = v.expand_as(k)
    position = torch.arange(33, dtype=torch.int32).expand(2, 33)
    pos, real = position[:, None].expand(2, 2, 33).clone(), 16
    pos[1, :, real:] = -1
    k, v = (x.transpose(1, 2).masked_fill((pos < 0)[..., None], float("nan")) for x in (k, v))
    arguments = on(DEVICE, (q, k, v, pos, position))
    q, k, v, pos, position = arguments
    alone = run(q[1:, :real], k[1:, :, :real], v[1:, :, :real], pos[1:, :, :real], position[1:, :real])
    torch.testing.assert_close(run(*arguments)[0][1:, :real], alone[0])


@pytest.mark.parametrize("window", [2**31, 2**33, sys.maxsize])
def test_a_window_wider_than_positions_is_no_window(window):
    prefill = {case.name: case for case in ragged_prefill.KERNEL.cases()}["G=3, sliding past"].make(torch.float32)[:5]
    expected = ragged_prefill.ragged_prefill(*prefill)
    assert torch.equal(ragged_prefill.ragged_prefill(*prefill, window=window), expected)
    for name, case in (("ragged_decode", "merged and empty slots"), ("window_scores", "S=64, G=8, means")):
        made = {case.name: case for case in all_kernels()[name].cases()}[case].make(torch.float32)
        arguments = dict(zip(ARGUMENTS[name], made, strict=True))
        with torch.inference_mode(), use("reference"):
            plain, wide = (call(all_kernels()[name], arguments | {"window": given}) for given in (0, window))
        assert all(torch.equal(x, y) for x, y in zip(plain, wide, strict=True))


def test_costs_are_what_a_hand_counts():
    q, k = torch.empty(1, 4, 8), torch.empty(1, 10, 8)
    pos, table = torch.zeros(1, 10, dtype=torch.int32), torch.tensor([[[3, 5]]], dtype=torch.int32)
    decode = q, k, k, pos, table, table, torch.tensor([0]), table[0, 0, :1], 0, 5
    assert ragged_decode.bytes_moved(*decode) == 8 * (2 * 8 * 4) + 2 * (4 * 8 * 4) + 4 * 4
    assert ragged_decode.flops(*decode) == 8 * 2 * (2 * 8 + 2 * 8)
    x, weight = torch.empty(3, 16), torch.empty(16)
    norm = all_kernels()["rms_norm"]
    assert norm.bytes_moved(x, weight, 1e-6) == 2 * 3 * 16 * 4 + 16 * 4


def test_numbers_that_do_not_fit_are_refused():
    for name in ("rms_norm", "add_rms_norm", "silu_mul", "few_rows_linear", "quantize_kv"):
        for x in (torch.ones(3, 0), torch.ones(())):
            first = next(iter(ARGUMENTS[name]))
            with pytest.raises(ValueError, match="its rows must have at least 1 number"):
                call(all_kernels()[name], ARGUMENTS[name] | {first: x})
    with pytest.raises(ValueError, match="it must have a multiple of offset_BLH's 0"):
        empty = dict.fromkeys(("offset_BLH", "length_BLH"), ARGUMENTS["ragged_decode"]["offset_BLH"][..., :0])
        call(ragged_decode.KERNEL, ARGUMENTS["ragged_decode"] | empty)
    with pytest.raises(ValueError, match="x_BTHD has a head dim of 3, it must be even"):
        rope.apply_rope(torch.ones(1, 1, 1, 3), torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match="max_keep is 0, it must be at least 1"):
        call(ragged_compact.KERNEL, ARGUMENTS["ragged_compact"] | {"max_keep": 0})
    x, weight, scale = torch.ones(1, 4), torch.ones(3, 4), torch.ones(3)
    with pytest.raises(ValueError, match="weight is int8, it must be float32"):
        few_rows_linear.few_rows_linear(x, weight.to(torch.int8))
    with pytest.raises(ValueError, match="weight is float32, it must be int8"):
        few_rows_linear.few_rows_linear(x, weight, None, scale)


WITHOUT_TRITON = """
import contextlib
import io
import sys

class NotThere:
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotThere())
import torch
from kernels import aot
from kernels.registry import all_kernels
from tests.test_engine import make_loaded, tokens
from zoo.engine import Engine

for kernel in all_kernels().values():
    arguments = next(iter(kernel.cases())).make(torch.float32)
    kernel.reference(*arguments)
    if kernel.launch is not None:
        try:
            kernel.launch(*arguments)
        except ValueError as error:
            assert "pip install triton" in str(error), error
        else:
            raise AssertionError(f"{kernel.name} ran without Triton")
engine = Engine(make_loaded(), cache="snapkv:window=4,recent=4", budget=24, max_new_tokens=4, max_context=100)
engine.prefill(tokens(60))
assert engine.step([1]).isfinite().all()
errors = io.StringIO()
with contextlib.redirect_stderr(errors):
    assert aot.main([]) == 2
assert "Triton is not installed" in errors.getvalue(), errors.getvalue()
assert "triton" not in sys.modules
print(len(all_kernels()), "operators")
"""


def test_without_triton_everything_but_its_forms_works():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.stdout == f"{len(all_kernels())} operators\n", done.stderr
