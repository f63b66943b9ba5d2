"""Weights from every format against the tensors they were written from, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.config import ModelConfig, RopeConfig, load_config
from checkpoints.errors import CheckpointError
from checkpoints.gguf import GgufFile
from checkpoints.resolve import DEFAULT_MODEL, resolve
from checkpoints.weights import expected_shapes, load_state

CONFIG = ModelConfig(
    model_type="llama", vocab_size=48, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=128, rms_norm_eps=1e-5, rope=RopeConfig(), tie_embeddings=False,
    layer_windows=(None, None),
)  # fmt: skip
FAMILIES = {
    "llama": CONFIG,
    "llama-biased": replace(CONFIG, qkv_bias=True, output_bias=True, mlp_bias=True),
    "llama-tied": replace(CONFIG, tie_embeddings=True),
    "mistral": replace(CONFIG, model_type="mistral", head_dim=32),
    "qwen2": replace(CONFIG, model_type="qwen2", qkv_bias=True),
    "qwen3": replace(CONFIG, model_type="qwen3", qk_norm=True, tie_embeddings=True),
}
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def private_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request) -> Path:
    home = tmp_path_factory.mktemp("home")
    if "default_model" not in request.node.name:  # which is fetched and converted once for all tests
        monkeypatch.setenv("HEADKV_ZOO_HOME", str(home))
    return home


def hf_state(config: ModelConfig, dtype: torch.dtype = torch.float32) -> State:
    """Random weights under the names and shapes of transformers' modules, written out here on their own."""
    torch.manual_seed(0)
    n, h, d, e, f = (
        config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size, config.intermediate_size
    )  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, e)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        projections = {
            "self_attn.q_proj": (n * d, e, config.qkv_bias), "self_attn.k_proj": (h * d, e, config.qkv_bias),
            "self_attn.v_proj": (h * d, e, config.qkv_bias), "self_attn.o_proj": (e, n * d, config.output_bias),
            "mlp.gate_proj": (f, e, config.mlp_bias), "mlp.up_proj": (f, e, config.mlp_bias),
            "mlp.down_proj": (e, f, config.mlp_bias),
        }  # fmt: skip
        for name, (rows, columns, bias) in projections.items():
            shapes[f"{layer}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{layer}.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (e,)
        if config.qk_norm:
            shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (d,)
    shapes["model.norm.weight"] = (e,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, e)
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def fused(state: State, config: ModelConfig) -> State:
    """The oracle: our names, by torch.cat."""
    out = {"embed.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    for i in range(config.num_layers):
        ours, layer = f"blocks.{i}", f"model.layers.{i}"

        def take(name: str, *parts: str, ours: str = ours, layer: str = layer) -> None:
            for suffix in ("weight", "bias"):
                if f"{layer}.{parts[0]}.{suffix}" in state:
                    out[f"{ours}.{name}.{suffix}"] = torch.cat([state[f"{layer}.{part}.{suffix}"] for part in parts])

        take("attention_norm", "input_layernorm")
        take("attention.qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        take("attention.q_norm", "self_attn.q_norm")
        take("attention.k_norm", "self_attn.k_norm")
        take("attention.out", "self_attn.o_proj")
        take("mlp_norm", "post_attention_layernorm")
        take("mlp.gate_up", "mlp.gate_proj", "mlp.up_proj")
        take("mlp.down", "mlp.down_proj")
    if not config.tie_embeddings:
        out["head.weight"] = state["lm_head.weight"]
    return out


def interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder each head's rows from (x0, x1, …, y0, y1, …) to (x0, y0, x1, y1, …)."""
    order = []
    for head in range(rows.shape[0] // head_dim):
        for pair in range(head_dim // 2):
            order += [head * head_dim + pair, head * head_dim + head_dim // 2 + pair]
    return rows[order]


def same(got: State, want: State, dtype: torch.dtype = torch.float32) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == dtype, name
        torch.testing.assert_close(got[name], tensor.to(dtype), rtol=0, atol=0, msg=name)


# Writers


def write_safetensors(directory: Path, state: State) -> None:
    save_file(state, directory / "model.safetensors")


def sharded(directory: Path, state: State, name: str, save: Callable[[State, Path], None]) -> None:
    names = sorted(state)
    weight_map = {}
    for shard in range(3):
        file = name.replace(".", f"-{shard + 1:05}-of-00003.", 1)
        save({key: state[key] for key in names[shard::3]}, directory / file)
        weight_map |= dict.fromkeys(names[shard::3], file)
    (directory / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


WRITERS: dict[str, Callable[[Path, State], None]] = {
    "safetensors": write_safetensors,
    "safetensors-sharded": lambda directory, state: sharded(directory, state, "model.safetensors", save_file),
    "safetensors-other-name": lambda directory, state: save_file(state, directory / "weights.safetensors"),
    "bin": lambda directory, state: torch.save(state, directory / "pytorch_model.bin"),
    "bin-sharded": lambda directory, state: sharded(directory, state, "pytorch_model.bin", torch.save),
}


def write_hf(directory: Path, state: State, writer: str = "safetensors") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    WRITERS[writer](directory, state)
    return directory


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
}  # fmt: skip
META_NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    "model.layers": "layers",
}  # fmt: skip


def renamed(state: State, names: dict[str, str], head_dim: int, *, interleaved: bool) -> State:
    out = {}
    for name, tensor in state.items():
        if interleaved and ("q_proj" in name or "k_proj" in name):
            tensor = interleave(tensor, head_dim)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        out[name] = tensor
    return out


def write_gguf(
    path: Path, state: State, config: ModelConfig, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32
) -> State:
    """Write a GGUF file as llama.cpp's converter does, and return what its matrices hold after quantisation."""
    architecture = "llama" if config.model_type == "mistral" else config.model_type
    stored = renamed(state, GGUF_NAMES, config.head_dim, interleaved=architecture == "llama")
    back = {}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "\U0001f600", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 0.0, 3.25])
    for (name, tensor), original in zip(stored.items(), state, strict=True):
        values = tensor.float().numpy()
        if tensor.ndim == 1:
            writer.add_tensor(name, values)
            back[original] = tensor.float()
        else:
            data = gguf.quantize(values, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
            back[original] = torch.from_numpy(gguf.dequantize(data, kind).reshape(values.shape).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if architecture == "llama":  # back in transformers' row order
        for name, tensor in back.items():
            if "q_proj" in name or "k_proj" in name:
                order = interleave(torch.arange(tensor.shape[0])[:, None], config.head_dim)[:, 0]
                back[name] = torch.empty_like(tensor).index_copy_(0, order, tensor)
    return back


def write_meta(directory: Path, state: State, config: ModelConfig, *, shards: int, embed_dim: int = 1) -> Path:
    directory.mkdir()
    (directory / "params.json").write_text("{}")
    stored = renamed(state, META_NAMES, config.head_dim, interleaved=True)
    for shard in range(shards):
        part = {}
        for name, tensor in stored.items():
            stem = name.split(".")[-2]
            dim = {"wo": 1, "w2": 1, "tok_embeddings": embed_dim}.get(stem, 0) % tensor.ndim
            part[name] = tensor.clone() if "norm" in stem else tensor.chunk(shards, dim)[shard].clone()
        part["rope.freqs"] = torch.ones(config.head_dim // 2)
        torch.save(part, directory / f"consolidated.{shard:02}.pth")
    return directory


# What is right


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("writer", WRITERS)
def test_hugging_face_formats(tmp_path: Path, family: str, writer: str) -> None:
    config = FAMILIES[family]
    state = hf_state(config)
    got = load_state(write_hf(tmp_path, state, writer), config, dtype=torch.float32, progress=False)
    same(got, fused(state, config))
    assert list(got) == list(expected_shapes(config))
    assert {name: tuple(tensor.shape) for name, tensor in got.items()} == expected_shapes(config)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_saves(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    theirs = AutoConfig.for_model(
        model_type, vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=model_type == "qwen3",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(theirs)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    config = load_config(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    got = load_state(tmp_path, config, dtype=torch.float32, progress=False)
    same(got, fused(model.state_dict(), config))


QUANTISABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


@pytest.mark.parametrize("kind", QUANTISABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_gguf(tmp_path: Path, family: str, kind: str) -> None:
    config = FAMILIES[family]
    path = tmp_path / "model.gguf"
    want = fused(write_gguf(path, hf_state(config), config, gguf.GGMLQuantizationType[kind]), config)
    same(load_state(path, config, dtype=torch.float32, progress=False), want)
    same(load_state(path, config, dtype=torch.float32, progress=False), want)  # now from the conversion


def dequantisable() -> list[str]:
    kinds = []
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind.name if block else "")
    return kinds


@pytest.mark.parametrize("kind", dequantisable())
def test_every_type_that_the_library_knows(tmp_path: Path, kind: str) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantised]
    # High bytes below 0x3c keep every float inside the blocks finite.
    data = np.random.default_rng(0).integers(0, 0x3C, (6, 512 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("other", np.ones(3, np.float32))
    writer.add_tensor("it", data, raw_shape=data.shape, raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "model.gguf")
    file.check()
    assert file.shapes == {"other": (3,), "it": (6, 512)}
    got = file.read("it")
    assert got.isfinite().all()
    np.testing.assert_array_equal(got.numpy(), gguf.dequantize(data, quantised).reshape(6, 512))


def test_k_quants_are_among_them() -> None:
    assert {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS", "Q4_1"} <= set(dequantisable())


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize(("shards", "embed_dim"), [(1, 1), (2, 1), (2, 0)])
def test_meta(tmp_path: Path, family: str, shards: int, embed_dim: int) -> None:
    config = FAMILIES[family]
    state = hf_state(config)
    directory = write_meta(tmp_path / "meta", state, config, shards=shards, embed_dim=embed_dim)
    same(load_state(directory, config, dtype=torch.float32, progress=False), fused(state, config))


def test_unpermuted_rows_mean_the_same_rotation(tmp_path: Path) -> None:
    """Meta's complex rotation of its q and k rows gives the attention logits of rotate-half on ours."""
    config, d = CONFIG, CONFIG.head_dim
    directory = write_meta(tmp_path / "meta", hf_state(config), config, shards=1)
    raw = torch.load(directory / "consolidated.00.pth")
    ours = load_state(directory, config, dtype=torch.float32, progress=False)
    hidden_TE = torch.randn(7, config.hidden_size).double()
    angles_TD = torch.outer(torch.arange(7.0), 1e4 ** (-torch.arange(0, d, 2) / d)).double()

    def meta(weight: torch.Tensor) -> torch.Tensor:
        x_TN2 = torch.view_as_complex((hidden_TE @ weight.double().T).reshape(7, -1, d // 2, 2))
        return torch.view_as_real(x_TN2 * torch.polar(torch.ones(()).double(), angles_TD)[:, None]).flatten(2)

    def half(weight: torch.Tensor) -> torch.Tensor:
        x, y = (hidden_TE @ weight.double().T).reshape(7, -1, d).chunk(2, -1)
        cos, sin = angles_TD.cos()[:, None], angles_TD.sin()[:, None]
        return torch.cat([x * cos - y * sin, y * cos + x * sin], -1)

    def logits(q_TND: torch.Tensor, k_TND: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tnd,snd->nts", q_TND, k_TND.repeat_interleave(2, 1))

    q, k, _ = ours["blocks.1.attention.qkv.weight"].split([4 * d, 2 * d, 2 * d])
    want = logits(meta(raw["layers.1.attention.wq.weight"]), meta(raw["layers.1.attention.wk.weight"]))
    torch.testing.assert_close(logits(half(q), half(k)), want)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_dtypes(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    state = hf_state(CONFIG, stored)
    for writer in ("safetensors", "bin"):
        got = load_state(write_hf(tmp_path / writer, state, writer), CONFIG, dtype=wanted, progress=False)
        same(got, fused(state, CONFIG), wanted)
    want = fused(write_gguf(tmp_path / "model.gguf", hf_state(CONFIG), CONFIG), CONFIG)
    for _ in range(2):
        same(load_state(tmp_path / "model.gguf", CONFIG, dtype=wanted, progress=False), want, wanted)


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"int8 is not supported: use one of torch.float32"):
        load_state(write_hf(tmp_path, hf_state(CONFIG)), CONFIG, dtype=torch.int8)


def test_device(tmp_path: Path) -> None:
    directory = write_hf(tmp_path, hf_state(CONFIG))
    write_gguf(tmp_path / "model.gguf", hf_state(CONFIG), CONFIG)
    for path in (directory, tmp_path / "model.gguf"):
        got = load_state(path, CONFIG, dtype=torch.float32, device=torch.device("cpu"), progress=False)
        assert {tensor.device.type for tensor in got.values()} == {"cpu"}


def test_streamed_tensors_own_their_memory(tmp_path: Path) -> None:
    directory = write_hf(tmp_path, hf_state(CONFIG))
    got = load_state(directory, CONFIG, dtype=torch.float32, progress=False)
    want = fused(hf_state(CONFIG), CONFIG)
    os.truncate(directory / "model.safetensors", 100)
    same(got, want)


# The default model


def test_default_model_against_the_library(tmp_path: Path) -> None:
    path = resolve(DEFAULT_MODEL)
    config = load_config(path)
    state = load_state(path, config, dtype=torch.float32)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    file = GgufFile(path)
    assert file.shapes == {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata.keys() == metadata.keys()
    for key, value in metadata.items():
        want = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        assert file.metadata[key] == want, key

    def naive(name: str, heads: int = 0) -> torch.Tensor:
        tensor = tensors[name]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if not heads:
            return values
        order = [head * 64 + 2 * (at % 32) + at // 32 for head in range(heads) for at in range(64)]
        return values[order]

    assert len(state) == 2 + 30 * 6 and sum(tensor.numel() for tensor in state.values()) == 134_515_008
    assert torch.equal(state["embed.weight"], naive("token_embd.weight"))
    assert torch.equal(state["norm.weight"], naive("output_norm.weight"))
    for i in (0, 17, 29):
        parts = [
            naive(f"blk.{i}.attn_q.weight", 9),
            naive(f"blk.{i}.attn_k.weight", 3),
            naive(f"blk.{i}.attn_v.weight"),
        ]
        assert torch.equal(state[f"blocks.{i}.attention.qkv.weight"], torch.cat(parts))
        gate_up = torch.cat([naive(f"blk.{i}.ffn_gate.weight"), naive(f"blk.{i}.ffn_up.weight")])
        assert torch.equal(state[f"blocks.{i}.mlp.gate_up.weight"], gate_up)
        assert torch.equal(state[f"blocks.{i}.mlp.down.weight"], naive(f"blk.{i}.ffn_down.weight"))
        assert torch.equal(state[f"blocks.{i}.attention.out.weight"], naive(f"blk.{i}.attn_output.weight"))
        assert torch.equal(state[f"blocks.{i}.mlp_norm.weight"], naive(f"blk.{i}.ffn_norm.weight"))

    start = time.perf_counter()
    again = load_state(path, config, dtype=torch.float32)
    assert time.perf_counter() - start < 1
    assert again.keys() == state.keys()


# The conversion cache


def conversions(home: Path) -> list[Path]:
    return sorted((home / "converted").glob("[!.]*"))


def test_conversion_follows_its_source(tmp_path: Path, private_home: Path) -> None:
    path = tmp_path / "model.gguf"
    state = hf_state(CONFIG)
    for step in range(2):
        want = fused(write_gguf(path, {name: tensor + step for name, tensor in state.items()}, CONFIG), CONFIG)
        same(load_state(path, CONFIG, dtype=torch.float32, progress=False), want)
        assert len(conversions(private_home)) == 1  # the outdated one is gone
    (before,) = conversions(private_home)
    inode = before.stat().st_ino
    same(load_state(path, CONFIG, dtype=torch.float32, progress=False), want)
    assert before.stat().st_ino == inode
    load_state(path, CONFIG, dtype=torch.float16, progress=False)
    assert len(conversions(private_home)) == 2


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 5000),
                                    lambda path: path.write_bytes(b"\xff" * 99)])  # fmt: skip
def test_damaged_conversion_is_made_again(tmp_path: Path, private_home: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "model.gguf"
    want = fused(write_gguf(path, hf_state(CONFIG), CONFIG), CONFIG)
    load_state(path, CONFIG, dtype=torch.float32, progress=False)
    (converted,) = conversions(private_home)
    damage(converted)
    same(load_state(path, CONFIG, dtype=torch.float32, progress=False), want)


def test_conversion_is_memory_mapped(tmp_path: Path, private_home: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, hf_state(CONFIG), CONFIG)
    load_state(path, CONFIG, dtype=torch.float32, progress=False)
    state = load_state(path, CONFIG, dtype=torch.float32, progress=False)
    (converted,) = conversions(private_home)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(converted) in line]
    ranges = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in maps]
    assert all(any(low <= tensor.data_ptr() < high for low, high in ranges) for tensor in state.values())
    with torch.no_grad():
        state["norm.weight"].fill_(7)  # writing to the tensor leaves the file alone
    assert not (load_file(converted)["norm.weight"] == 7).any()


def test_failed_conversion_leaves_nothing(tmp_path: Path, private_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, hf_state(CONFIG), CONFIG)
    read = GgufFile.read

    def full_disk(self: GgufFile, name: str) -> torch.Tensor:
        if name == "blk.1.ffn_up.weight":
            raise OSError(28, "No space left on device")
        return read(self, name)

    monkeypatch.setattr(GgufFile, "read", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left on device.*set HEADKV_ZOO_HOME"):
        load_state(path, CONFIG, dtype=torch.float32, progress=False)
    assert not conversions(private_home)


KILLED = """
import sys, time, torch
from pathlib import Path
from checkpoints.gguf import GgufFile
from checkpoints.weights import load_state
sys.path.insert(0, "tests")
from test_weights import CONFIG
read = GgufFile.read
def slow(self, name):
    if name == "blk.1.ffn_up.weight":
        print("half", flush=True)
        time.sleep(60)
    return read(self, name)
GgufFile.read = slow
load_state(Path(sys.argv[1]), CONFIG, dtype=torch.float32, progress=False)
"""


def test_killed_conversion_leaves_nothing_that_counts(tmp_path: Path, private_home: Path) -> None:
    path = tmp_path / "model.gguf"
    want = fused(write_gguf(path, hf_state(CONFIG), CONFIG), CONFIG)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "half\n"
        child.kill()
    assert not conversions(private_home)
    assert list((private_home / "converted").glob(".partial-*"))
    same(load_state(path, CONFIG, dtype=torch.float32, progress=False), want)
    assert not list((private_home / "converted").glob(".partial-*"))


# Memory

PEAK = """
import gguf, sys, torch
from pathlib import Path
from checkpoints.weights import load_state
sys.path.insert(0, "tests")
from test_weights import BIG
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
state = load_state(Path(sys.argv[1]), BIG, dtype=torch.float32, progress=False)
print(sum(tensor.nbytes for tensor in state.values()), max(tensor.nbytes for tensor in state.values()), flush=True)
sys.stdin.readline()
"""
BIG = replace(
    CONFIG, vocab_size=4000, hidden_size=1024, intermediate_size=1024, num_layers=5, head_dim=256,
    layer_windows=(None,) * 5,
)  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's accounting of anonymous memory")
@pytest.mark.parametrize("form", ["safetensors", "bin", "meta", "gguf"])
def test_peak_memory(tmp_path: Path, form: str) -> None:
    """Memory that is not a mapped file, sampled by another process, never exceeds the model and about one tensor."""
    state = hf_state(BIG, torch.bfloat16)
    path = tmp_path / "model"
    if form == "meta":
        write_meta(path, state, BIG, shards=2)
    elif form == "gguf":
        path = tmp_path / "model.gguf"
        write_gguf(path, state, BIG, gguf.GGMLQuantizationType.Q8_0)
    else:
        write_hf(path, state, form)
    del state

    # Give freed tensors back at once, else the allocator's own caching is measured too.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", PEAK, str(path)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        status = Path(f"/proc/{child.pid}/status")

        def anonymous() -> int:
            (line,) = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            return int(line.split()[1]) * 1024

        assert child.stdout.readline() == "ready\n"
        before = peak = anonymous()
        child.stdin.write("go\n")
        child.stdin.flush()
        os.set_blocking(child.stdout.fileno(), False)
        while not (line := child.stdout.readline()):
            assert child.poll() is None
            peak = max(peak, anonymous())
            time.sleep(0.0005)
        model, largest = map(int, line.split())
        child.stdin.write("end\n")
        child.stdin.flush()
    slack = 12 << 20  # the interpreter, libraries imported meanwhile
    assert model > 8 * largest and largest > slack
    # The conversion streams to disk, one tensor as float32 beside its copy, and the result is mapped.
    allowed = 2 * largest if form == "gguf" else model + largest
    assert peak - before <= allowed + slack


# What is wrong


def refused(path: Path, config: ModelConfig = CONFIG) -> str:
    with pytest.raises(CheckpointError) as error:
        load_state(path, config, dtype=torch.float32, progress=False)
    message = str(error.value)
    assert "\n" not in message and str(path.name) in message
    return message


@pytest.mark.parametrize("form", ["safetensors", "bin", "gguf", "meta"])
def test_all_wrong_tensors_in_one_message(tmp_path: Path, form: str) -> None:
    state = hf_state(CONFIG)
    del state["model.layers.1.mlp.up_proj.weight"], state["model.norm.weight"]
    state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 4)
    state["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
    state["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(64, 64)
    names = {}
    path = tmp_path / "model"
    if form == "gguf":
        names, path = GGUF_NAMES, tmp_path / "model.gguf"
        write_gguf(path, state, CONFIG)
    elif form == "meta":
        names = META_NAMES
        write_meta(path, state, CONFIG, shards=1)
    else:
        write_hf(path, state, form)

    def spelt(name: str) -> str:
        (spelt,) = renamed({name: torch.zeros(16)}, names, 16, interleaved=False)
        return spelt

    message = refused(path)
    missing, unexpected, shaped = message.split(": ", 1)[1].split("; ")
    assert missing.startswith("2 missing: ") and unexpected.startswith("2 unexpected: ")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        assert spelt(name) in missing
    for name in ("model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.bias"):
        assert spelt(name) in unexpected
    want = f"1 mis-shaped: {spelt('model.layers.0.self_attn.k_proj.weight')} (64, 64) instead of (32, 64)"
    assert shaped == want


def test_long_lists_are_cut(tmp_path: Path) -> None:
    message = refused(write_hf(tmp_path, {"model.norm.weight": torch.ones(64)}))
    total = len(hf_state(CONFIG)) - 1
    assert f"{total} missing: model.embed_tokens.weight, " in message and f" and {total - 8} more" in message
    assert len(message) < 1000


def test_harmless_extras(tmp_path: Path) -> None:
    config = FAMILIES["llama-tied"]
    state = hf_state(config)
    want = fused(state, config)
    extras = {
        "lm_head.weight": state["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
    }
    same(load_state(write_hf(tmp_path, state | extras), config, dtype=torch.float32, progress=False), want)
    write_gguf(tmp_path / "model.gguf", state | {"rope_freqs.weight": torch.ones(8)}, config)
    same(load_state(tmp_path / "model.gguf", config, dtype=torch.float32, progress=False), want)


def test_tied_head_that_is_not(tmp_path: Path) -> None:
    config = FAMILIES["llama-tied"]
    state = hf_state(config) | {"lm_head.weight": torch.zeros(48, 64)}
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(write_hf(tmp_path, state), config)


def test_numbers_that_are_not_floating_point(tmp_path: Path) -> None:
    state = hf_state(CONFIG)
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)
    message = refused(write_hf(tmp_path, state))
    assert "model.layers.1.mlp.up_proj.weight holds torch.int8" in message


def test_gguf_type_that_cannot_be_dequantised(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    state = hf_state(CONFIG)
    stored = renamed(state, GGUF_NAMES, 16, interleaved=True)
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in stored.items():
        array = tensor.numpy()
        writer.add_tensor(name, array.astype(np.int32) if name == "blk.1.ffn_up.weight" else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "blk.1.ffn_up.weight has type I32" in refused(path)


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_code_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ("config.json" if file.endswith("bin") else "params.json")).write_text("{}")
    torch.save({**hf_state(CONFIG), "evil": Evil()}, tmp_path / file)
    assert "Python objects other than tensors" in refused(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 3}, {3: torch.ones(2)}, {}, torch.ones(2)])
def test_pickles_that_are_not_weights(tmp_path: Path, content: object) -> None:
    write_hf(tmp_path, {}, "bin")
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert "must hold named tensors" in refused(tmp_path)


def test_old_torch_format(tmp_path: Path) -> None:
    write_hf(tmp_path, {}, "bin")
    torch.save(hf_state(CONFIG), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "cannot be read as a PyTorch file" in refused(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b", "", 3, None])
def test_index_that_points_elsewhere(tmp_path: Path, file: object) -> None:
    save_file(hf_state(CONFIG), tmp_path / "secret.safetensors")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    assert "is not beside it" in refused(directory)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "{", '{"weight_map": [1]}']
)
def test_damaged_index(tmp_path: Path, index: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    refused(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "a", hf_state(CONFIG), "safetensors-sharded")
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refused(directory).replace(str(directory) + "/", "")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")
    assert "has no weights" in refused(tmp_path / "b")
    meta = write_meta(tmp_path / "c", hf_state(CONFIG), CONFIG, shards=2)
    (meta / "consolidated.00.pth").unlink()
    assert "without a gap; it holds consolidated.01.pth" in refused(meta)


def test_shards_that_do_not_fit_together(tmp_path: Path) -> None:
    directory = write_hf(tmp_path / "twice", hf_state(CONFIG), "safetensors-sharded")
    shutil.copy(directory / "model-00001-of-00003.safetensors", directory / "model-00002-of-00003.safetensors")
    assert "which another shard holds too" in refused(directory)
    state = hf_state(CONFIG)
    meta = write_meta(tmp_path / "lacking", state, CONFIG, shards=2)
    part = torch.load(meta / "consolidated.01.pth")
    torch.save({name: tensor for name, tensor in part.items() if "wo" not in name}, meta / "consolidated.01.pth")
    assert "consolidated.01.pth lacks layers.0.attention.wo.weight" in refused(meta)
    torch.save(part | {"norm.weight": torch.ones(3)}, meta / "consolidated.01.pth")
    assert "disagree on the shape of norm.weight" in refused(meta)
    (meta / "consolidated.01.pth").unlink()  # the last one: only the shapes tell
    assert "layers.0.attention.wq.weight (32, 64) instead of (64, 64)" in refused(meta)


def damaged_copies(data: bytes) -> list[bytes]:
    """Truncations everywhere it matters, and single bytes of the header changed."""
    rng = np.random.default_rng(0)
    cuts = [0, 1, 3, 7, 8, 9, 20, 100, 1000, len(data) // 2, len(data) - 64, len(data) - 1]
    copies = [data[:cut] for cut in cuts]
    for at in [*range(60), *rng.integers(60, 3000, 60)]:
        changed = bytearray(data)
        changed[at] ^= int(rng.integers(1, 256))
        copies.append(bytes(changed))
    return copies


@pytest.mark.parametrize("form", ["safetensors", "bin", "gguf"])
def test_damaged_files_load_or_are_refused(tmp_path: Path, form: str) -> None:
    """No damage to a header crashes, hangs, takes memory or gives another exception; truncation is always noticed."""
    config = replace(CONFIG, num_layers=1, layer_windows=(None,))
    state = hf_state(config)
    path = write_hf(tmp_path / "model", state, form if form != "gguf" else "safetensors")
    file = path / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "gguf": "model.gguf"}[form]
    if form == "gguf":
        write_gguf(file, state, config)
        path = file
    data = file.read_bytes()
    outcomes = []
    for number, copy in enumerate(damaged_copies(data)):
        file.write_bytes(copy)
        try:
            load_state(path, config, dtype=torch.float32, progress=False)
            outcomes.append(True)
        except CheckpointError as error:
            assert "\n" not in str(error)
            outcomes.append(False)
        assert number >= 12 or not outcomes[-1], "a truncated file was loaded"
    assert outcomes.count(False) > 40


def gguf_bytes(*fields: object) -> bytes:
    out = b""
    for value in fields:
        if isinstance(value, bytes):
            out += value
        elif isinstance(value, str):
            out += len(value).to_bytes(8, "little") + value.encode()
        else:
            number, size = value  # type: ignore[misc]
            out += number.to_bytes(size, "little")
    return out


HEAD = (b"GGUF", (3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGU", "is not a GGUF file"),
        (b"GGML" + b"\0" * 40, "is not a GGUF file"),
        (gguf_bytes(b"GGUF", (1, 4), (0, 8), (0, 8)), "GGUF version 1"),
        (b"GGUF\0\0\0\3" + b"\0" * 40, "GGUF version"),
        (gguf_bytes(*HEAD, (2**63, 8), (0, 8)), "goes past the end"),
        (gguf_bytes(*HEAD, (0, 8), (2**63, 8)), "goes past the end"),
        (gguf_bytes(*HEAD, (0, 8), (1, 8), (2**64 - 1, 8)), "goes past the end"),
        (gguf_bytes(*HEAD, (0, 8), (1, 8), "key", (9, 4), (8, 4), (2**60, 8)), "goes past the end"),
        (gguf_bytes(*HEAD, (0, 8), (1, 8), "key", (9, 4), (4, 4), (2**62, 8)), "goes past the end"),
        (gguf_bytes(*HEAD, (0, 8), (1, 8), "key", (9, 4), (9, 4), (1, 8)), "unknown type 9"),
        (gguf_bytes(*HEAD, (0, 8), (1, 8), "key", (77, 4)), "unknown type 77"),
        (gguf_bytes(*HEAD, (0, 8), (1, 8), "general.alignment", (4, 4), (0, 4)), "alignment is 0"),
        (gguf_bytes(*HEAD, (0, 8), (1, 8), "split.count", (2, 4), (3, 2)), "llama-gguf-split --merge"),
        (gguf_bytes(*HEAD, (1, 8), (0, 8), "t", (9, 4), b"\1" * 100), "lists 't'"),
        (gguf_bytes(*HEAD, (1, 8), (0, 8), "t", (0, 4), b"\0" * 100), "lists 't'"),
        (gguf_bytes(*HEAD, (1, 8), (0, 8), "t", (1, 4), (8, 8), (0, 4), (7, 8), b"\0" * 99), "starts at 7, unaligned"),
        (gguf_bytes(*HEAD, (1, 8), (0, 8), "t", (1, 4), (8, 8), (0, 4), (2**40, 8), b"\0" * 99), "is truncated"),
        (gguf_bytes(*HEAD, (1, 8), (0, 8), "t", (2, 4), (2**60, 8), (2**60, 8), (0, 4), (0, 8)), "is truncated"),
        (gguf_bytes(*HEAD, (1, 8), (0, 8), "t", (1, 4), (8, 8), (99, 4), (0, 8), b"\0" * 99), "unknown type 99"),
        (gguf_bytes(*HEAD, (1, 8), (0, 8), "t", (1, 4), (33, 8), (2, 4), (0, 8), b"\0" * 99), "no multiple of 32"),
    ],
)  # fmt: skip
def test_gguf_headers_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        GgufFile(path).check()
    assert "\n" not in str(error.value)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 1 / 3)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve\n")
    writer.add_array("texts", ["a", "", "é"])
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, -1.25])
    writer.add_array("flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GgufFile(path).metadata
    assert metadata == {
        "general.architecture": "llama", "u8": 200, "i8": -5, "u16": 60_000, "i16": -30_000, "u32": 4_000_000_000,
        "i32": -2_000_000_000, "u64": 2**63, "i64": -(2**62), "f32": 1e-5, "f64": 1 / 3, "yes": True,
        "text": "naïve\n", "texts": ["a", "", "é"], "ints": [1, -2, 3], "floats": [0.5, -1.25], "flags": [True, False],
    }  # fmt: skip
    assert type(metadata["yes"]) is bool and type(metadata["u8"]) is int and type(metadata["flags"][0]) is bool
