"""Configurations against transformers' own classes, GGUF metadata, Meta's params.json, and damaged ones."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints.config import ModelConfig, RopeConfig, config_hash, load_config
from checkpoints.errors import CheckpointError
from checkpoints.resolve import DEFAULT_MODEL, resolve

DIMS = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-all": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    "yarn-attention": {**YARN, "attention_factor": 1.25},
    "longrope": LONGROPE,
    "longrope-factor": {**LONGROPE, "factor": 3.0, "attention_factor": 1.5},
}


def write(directory: Path, data: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return directory


def theirs(directory: Path) -> ModelConfig:
    """What transformers' configuration and modules make of the same file, spelt as ours."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = model.model.layers
    attention, mlp = layers[0].self_attn, layers[0].mlp
    rope = dict(config.rope_parameters)
    kind = rope["rope_type"]
    given = {"factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "truncate"}
    known = {key: value for key, value in rope.items() if key in given | {"mscale", "mscale_all_dim"}}
    original = rope.get("original_max_position_embeddings")
    if kind == "dynamic":
        original = config.max_position_embeddings
    if kind == "longrope":
        known.setdefault("factor", config.max_position_embeddings / original)
        known |= {key: tuple(rope[key]) for key in ("short_factor", "long_factor")}
    assert kind == "default" or kind in ROPE_INIT_FUNCTIONS
    windows = [
        config.sliding_window if config.model_type == "mistral" else getattr(layer.self_attn, "sliding_window", None)
        for layer in layers
    ]
    extends = kind in ("dynamic", "yarn")
    return ModelConfig(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=len(layers),
        num_heads=attention.q_proj.out_features // attention.head_dim,
        num_kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_dim=attention.head_dim,
        max_position=max(config.max_position_embeddings, int(rope["factor"] * original))
        if extends
        else config.max_position_embeddings,
        rms_norm_eps=layers[0].input_layernorm.variance_epsilon,
        rope=RopeConfig(kind=kind, theta=rope["rope_theta"], original_max_position=original, **known),
        tie_embeddings=config.tie_word_embeddings,
        qkv_bias=attention.q_proj.bias is not None,
        output_bias=attention.o_proj.bias is not None,
        mlp_bias=mlp.down_proj.bias is not None,
        qk_norm=hasattr(attention, "q_norm"),
        layer_windows=tuple(windows),
        dtype=str(config.dtype or "float32").removeprefix("torch."),
    )


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling", "type"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_parity_with_transformers(tmp_path: Path, rope: str, form: str) -> None:
    parameters = dict(ROPES[rope])
    data = {"model_type": "llama", **DIMS}
    if form == "rope_parameters":
        data["rope_parameters"] = {**parameters, "rope_theta": 5e5}
    else:
        data["rope_theta"] = 5e5
        if form == "type":
            parameters["type"] = parameters.pop("rope_type")
        data["rope_scaling"] = parameters
    write(tmp_path, data)
    ours = load_config(tmp_path)
    assert ours == theirs(tmp_path)
    assert ours.rope.theta == 5e5 and ours.rope.kind == rope.split("-")[0]


def variants(count: int) -> list[dict]:
    """Random configurations over everything a config.json of the four families may say, leave out or null."""
    choices: dict[str, list] = {
        "rms_norm_eps": [1e-5, 1e-6],
        "tie_word_embeddings": [True, False],
        "attention_bias": [True, False],
        "mlp_bias": [True, False],
        "head_dim": [8, 32],
        "num_key_value_heads": [1, 4, None],
        "sliding_window": [16, 100, None],
        "use_sliding_window": [True, False],
        "max_window_layers": [0, 2, 4, 9],
        "rope_theta": [1e4, 1e6],
        "rope_scaling": [None, ROPES["linear"], ROPES["dynamic"], LLAMA3, YARN],
        "torch_dtype": ["bfloat16", "float16", "float32"],
        "hidden_act": ["silu"],
        "original_max_position_embeddings": [64],
        "layer_types": [["full_attention", "sliding_attention"] * 2, ["full_attention"] * 4],
    }
    rng = random.Random(0)
    found = []
    while len(found) < count:
        model_type = rng.choice(["llama", "mistral", "qwen2", "qwen3"])
        data = {"model_type": model_type, **DIMS}
        data |= {key: rng.choice(values) for key, values in choices.items() if rng.random() < 0.5}
        if model_type in ("llama", "mistral"):
            data.pop("layer_types", None)
        if model_type == "qwen2" and "head_dim" in data:  # not in its class: there as an extra attribute
            data["head_dim"] = 32
        windowed = data.get("use_sliding_window") and data.get("sliding_window", 4096)
        if "sliding_attention" in (data.get("layer_types") or []) and not windowed:
            continue  # transformers only fails when it runs; ours is refused, tested below
        found.append(data)
    return found


@pytest.mark.parametrize("data", variants(60), ids=lambda data: data["model_type"])
def test_parity_with_transformers(tmp_path: Path, data: dict) -> None:
    write(tmp_path, data)
    assert load_config(tmp_path) == theirs(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_are_those_of_transformers(tmp_path: Path, model_type: str) -> None:
    dims = {key: value for key, value in DIMS.items() if key != "num_key_value_heads"}
    write(tmp_path, {"model_type": model_type, **dims, "num_attention_heads": 32, "hidden_size": 128})
    assert load_config(tmp_path) == theirs(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_transformers_saves(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoConfig

    parameters = {**LLAMA3, "rope_theta": 1e6}
    AutoConfig.for_model(model_type, **DIMS, rope_parameters=parameters).save_pretrained(tmp_path)
    assert load_config(tmp_path) == theirs(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3"}, r"'gemma3' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": ["llama"]}, "not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported is silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "'su' is not supported; supported are default, linear"),
        ({"rope_scaling": {"type": ["x"]}}, "not supported"),
        ({"rope_scaling": "linear"}, "one flat object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one flat object"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor must be a number"),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0]}}, "short_factor must be a list of 8"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [0.0] * 8}}, "long_factor must be a list of 8"),
        ({"rope_theta": 0.5}, "RoPE base 0.5"),
        ({"rope_theta": 10**400}, "rope_theta must be a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"hidden_size": -64}, "hidden_size must be an integer"),
        ({"hidden_size": 64.0}, "hidden_size must be an integer"),
        ({"num_hidden_layers": 10**9}, "from 1 to 10000"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "4 query heads on 3 KV heads"),
        ({"head_dim": 15}, "must be even"),
        ({"head_dim": None, "hidden_size": 3}, "head dimension 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 4"),
        ({"layer_types": ["chunked_attention"] * 4}, "'chunked_attention', which is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "not supported for llama"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "no sliding_window is in use"),
        ({"model_type": "qwen3", "max_window_layers": "2"}, "max_window_layers"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window must be an integer"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, change: dict, message: str) -> None:
    write(tmp_path, {"model_type": "llama", **DIMS, **change})
    with pytest.raises(CheckpointError, match=message) as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "nul", "\x00", '"llama"', "[" * 100_000, "9" * 5000])
def test_damaged_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError):
        load_config(write(tmp_path, text))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError):
        load_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*DIMS, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "hidden_act",
    "sliding_window", "use_sliding_window", "max_window_layers", "torch_dtype", "rms_norm_eps", "attention_bias",
    "quantization_config", "tie_word_embeddings", "model_type"])  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]), st.dictionaries(KEYS, JSON, min_size=1, max_size=3))
def test_any_value_loads_or_is_refused(tmp_path: Path, model_type: str, change: dict) -> None:
    write(tmp_path, {"model_type": model_type, **DIMS, **change})
    try:
        config = load_config(tmp_path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert config.num_heads % config.num_kv_heads == 0 and len(config.layer_windows) == config.num_layers


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.gguf file, nor a directory with config.json or params.json"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_config(tmp_path / "absent.gguf")


def test_hash_is_of_what_is_computed(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, {"model_type": "llama", **DIMS}))
    same = replace(config, dtype="bfloat16", max_position=9, model_type="mistral")
    assert config_hash(same) == config_hash(config) and re.fullmatch("[0-9a-f]{64}", config_hash(config))
    changes: dict = {
        "rope": RopeConfig(theta=9.0), "rms_norm_eps": 0.5, "layer_windows": (8,) * 4,
        **{name: 3 for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                                "num_kv_heads", "head_dim")},
        **{name: True for name in ("tie_embeddings", "qkv_bias", "output_bias", "mlp_bias", "qk_norm")},
    }  # fmt: skip
    assert changes.keys() | {"dtype", "max_position", "model_type"} == {field.name for field in fields(ModelConfig)}
    hashes = {config_hash(replace(config, **{name: value})) for name, value in changes.items()}
    assert len(hashes | {config_hash(config)}) == len(changes) + 1


# GGUF


def write_gguf(
    path: Path, architecture: str = "llama", *, drop: str = "", tensors: dict | None = None, **extra
) -> Path:
    """A file with every needed key, minus `drop`, plus `extra` ("__" for "."), and the tensors that are looked at."""
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "embedding_length": 64, "feed_forward_length": 96, "block_count": 4, "context_length": 512,
        "attention__head_count": 4, "attention__head_count_kv": 2, "attention__layer_norm_rms_epsilon": 1e-5,
        "rope__freq_base": 5e5, "rope__dimension_count": 16, **extra,
    }  # fmt: skip
    for key, value in keys.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if key == drop or value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_string(name, value)
    shapes = {"token_embd.weight": (320, 64), "blk.0.attn_q.weight": (64, 64), "output.weight": (320, 64)}
    tensors = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()} | (tensors or {})
    for name, tensor in tensors.items():
        if tensor is not None:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EXPECTED = ModelConfig(
    model_type="llama", vocab_size=320, hidden_size=64, intermediate_size=96, num_layers=4, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=512, rms_norm_eps=1e-5, rope=RopeConfig(theta=5e5),
    tie_embeddings=False, layer_windows=(None,) * 4, dtype="float16",
)  # fmt: skip
DIVISORS = np.array([1.0, 1.5, 2, 2.5, 3, 4, 8, 8], np.float32)
YARN_GGUF = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 128}
YARN_ROPE = RopeConfig(kind="yarn", theta=5e5, factor=4.0, original_max_position=128)


@pytest.mark.parametrize(
    ("architecture", "extra", "change"),
    [
        ("llama", {}, {}),
        ("llama", {"attention__head_count_kv": None}, {"num_kv_heads": 4}),
        ("llama", {"attention__head_count_kv": [2, 2, 2, 2]}, {}),
        ("llama", {"rope__freq_base": None}, {"rope": RopeConfig()}),
        ("llama", {"tensors": {"output.weight": None}}, {"tie_embeddings": True}),
        ("llama", {"attention__sliding_window": 32}, {"model_type": "mistral", "layer_windows": (32,) * 4}),
        ("llama", {"attention__key_length": 32, "attention__value_length": 32, "rope__dimension_count": 32},
         {"head_dim": 32}),
        ("qwen2", {"tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, {"qkv_bias": True}),
        ("qwen3", {}, {"qk_norm": True}),
        ("qwen3", {"attention__sliding_window": 32}, {"qk_norm": True}),
        ("llama", {"rope__scaling__type": "none", "rope__scaling__factor": 1.0}, {}),
        ("llama", {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0},
         {"rope": RopeConfig(kind="linear", theta=5e5, factor=2.0)}),
        ("llama", {"rope__scale_linear": 2.0}, {"rope": RopeConfig(kind="linear", theta=5e5, factor=2.0)}),
        ("qwen2", YARN_GGUF, {"rope": YARN_ROPE}),
        ("qwen2", {**YARN_GGUF, "rope__scaling__yarn_beta_fast": 16.0, "rope__scaling__attn_factor": 0.5},
         {"rope": replace(YARN_ROPE, beta_fast=16.0, attention_factor=0.5 * (1 + 0.1 * 1.3862943611198906))}),
        ("llama", {"tensors": {"rope_freqs.weight": DIVISORS}},
         {"rope": RopeConfig(kind="longrope", theta=5e5, original_max_position=512, attention_factor=1.0,
                             short_factor=tuple(DIVISORS.tolist()), long_factor=tuple(DIVISORS.tolist()))}),
        ("llama", {"rope__scaling__type": "longrope", "rope__scaling__original_context_length": 128,
                   "rope__scaling__attn_factor": 1.25,
                   "tensors": {"rope_factors_short.weight": DIVISORS, "rope_factors_long.weight": 2 * DIVISORS}},
         {"rope": RopeConfig(kind="longrope", theta=5e5, factor=4.0, original_max_position=128, attention_factor=1.25,
                             short_factor=tuple(DIVISORS.tolist()), long_factor=tuple((2 * DIVISORS).tolist()))}),
    ],
)  # fmt: skip
def test_gguf(tmp_path: Path, architecture: str, extra: dict, change: dict) -> None:
    expected = replace(EXPECTED, **{"model_type": architecture, **change})
    assert load_config(write_gguf(tmp_path / "model.gguf", architecture, **extra)) == expected


@pytest.mark.parametrize(
    ("architecture", "extra", "message"),
    [
        ("gemma3", {}, "'gemma3' is not supported; supported are llama, qwen2, qwen3"),
        ("mistral3", {}, "'mistral3' is not supported"),
        ("llama", {"expert_count": 8}, "expert_count = 8 is not supported"),
        ("llama", {"drop": "block_count"}, "block_count is missing"),
        ("llama", {"drop": "attention__layer_norm_rms_epsilon"}, "rms_epsilon is missing"),
        ("llama", {"attention__head_count_kv": [2, 2, 1, 2]}, "head_count_kv must be an integer"),
        ("llama", {"rope__dimension_count": 8}, "rope.dimension_count = 8"),
        ("llama", {"attention__value_length": 8}, "value_length = 8"),
        ("llama", {"rope__scaling__type": "ntk"}, "'ntk' is not supported; supported are none, linear, yarn, longrope"),
        ("llama", {"rope__scaling__type": "longrope"}, "needs the tensor rope_factors_short.weight"),
        ("llama", {"rope__scaling__attn_factor": 2.0}, "attention factor"),
        ("llama", {**YARN_GGUF, "rope__scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ("llama", {**YARN_GGUF, "tensors": {"rope_freqs.weight": DIVISORS}}, "beside the tensor rope_freqs"),
        ("llama", {"tensors": {"rope_freqs.weight": DIVISORS[:3]}}, "rope_freqs.weight with 8 values"),
        ("llama", {"tensors": {"rope_freqs.weight": 0 * DIVISORS}}, "must hold positive numbers"),
        ("llama", {"tensors": {"token_embd.weight": None}}, "no matrix token_embd.weight"),
    ],
)  # fmt: skip
def test_gguf_refused(tmp_path: Path, architecture: str, extra: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load_config(write_gguf(tmp_path / "model.gguf", architecture, **extra))
    assert "\n" not in str(error.value) and "model.gguf" in str(error.value)


def test_default_model_is_the_published_one(tmp_path: Path) -> None:
    ours = load_config(resolve(DEFAULT_MODEL))
    published = {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000, "rope_scaling": None, "tie_word_embeddings": True, "vocab_size": 49152,
        "attention_bias": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    theirs = load_config(write(tmp_path, published))
    assert asdict(ours) == asdict(replace(theirs, dtype="float32"))
    assert config_hash(ours) == config_hash(theirs)


# Meta


def write_meta(directory: Path, params: dict, *, rows: int = 320, tied: bool = False, shards: int = 1) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params))
    tensors = {"tok_embeddings.weight": torch.zeros(rows // shards, 64, dtype=torch.bfloat16)}
    if not tied:
        tensors["output.weight"] = torch.zeros(rows // shards, 64, dtype=torch.bfloat16)
    for shard in range(shards):
        torch.save(tensors, directory / f"consolidated.{shard:02}.pth")
    return directory


PARAMS = {"dim": 64, "n_layers": 4, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
META = replace(EXPECTED, num_kv_heads=4, intermediate_size=192, max_position=4096, rope=RopeConfig(), dtype="bfloat16")
LLAMA31 = RopeConfig(kind="llama3", theta=5e5, factor=8.0, original_max_position=8192)


@pytest.mark.parametrize(
    ("params", "options", "change"),
    [
        ({}, {}, {}),
        ({}, {"shards": 2}, {}),
        ({"vocab_size": 320}, {}, {}),
        ({}, {"tied": True}, {"tie_embeddings": True}),
        ({"n_kv_heads": 2, "rope_theta": 5e5}, {},
         {"num_kv_heads": 2, "rope": RopeConfig(theta=5e5), "max_position": 8192}),
        ({"rope_theta": 5e5, "use_scaled_rope": True}, {}, {"rope": LLAMA31, "max_position": 131_072}),
        ({"ffn_dim_multiplier": 1.5, "multiple_of": 8}, {}, {"intermediate_size": 256}),
    ],
)  # fmt: skip
def test_meta(tmp_path: Path, params: dict, options: dict, change: dict) -> None:
    assert load_config(write_meta(tmp_path, PARAMS | params, **options)) == replace(META, **change)


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple_of", "width"),
    [(4096, None, 256, 11008), (8192, 1.3, 4096, 28672), (4096, 1.3, 1024, 14336), (2048, 1.5, 256, 8192),
     (5120, None, 256, 13824), (3072, 1.0, 256, 8192)],
)  # fmt: skip
def test_meta_mlp_widths_of_the_published_models(
    tmp_path: Path, dim: int, multiplier: float | None, multiple_of: int, width: int
) -> None:
    directory = write_meta(
        tmp_path, PARAMS | {"dim": dim, "ffn_dim_multiplier": multiplier, "multiple_of": multiple_of}
    )
    assert load_config(directory).intermediate_size == width


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"moe": {"num_experts": 8}}, "moe is not supported; supported are dim,"),
        ({"dim": None}, "dim is missing"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope must be true or false"),
        ({"n_kv_heads": 3}, "4 query heads on 3 KV heads"),
        ({"vocab_size": -2}, "vocab_size must be an integer"),
    ],
)
def test_meta_refused(tmp_path: Path, params: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_config(write_meta(tmp_path, PARAMS | params))


def test_meta_without_weights(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(CheckpointError, match=r"must hold consolidated.00.pth"):
        load_config(tmp_path)
