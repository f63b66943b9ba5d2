"""Tiny checkpoints in Hugging Face's layout, one per family and feature, with weights that follow from a formula.

Random number generators change from one torch to the next. The golden files hold results for these weights, so these
are a hash of the tensor's name and the element's index.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from checkpoints.config import load_config
from checkpoints.weights import load_state
from zoo.family import Decoder
from zoo.load import Loaded

TRAINED = 32  # context before RoPE scaling
CONTEXT = 64  # and after
WINDOW = 8

_BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_SHARED = {
    "plain": {},
    "gqa-1": {"num_key_value_heads": 4},
    "gqa-4": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "theta": {"rope_theta": 500_000.0},
    "wide-heads": {"head_dim": 24},
}
_WINDOWS = {
    "window": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    "window-above": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "window-mixed": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "window-unused": {"use_sliding_window": False, "sliding_window": WINDOW, "max_window_layers": 0},
}
_FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        **_SHARED,
        "attention-bias": {"attention_bias": True},
        "mlp-bias": {"mlp_bias": True},
        "both-biases": {"attention_bias": True, "mlp_bias": True},
    },
    "mistral": {
        **{name: {"sliding_window": None, **changes} for name, changes in _SHARED.items()},
        "window": {"sliding_window": WINDOW},
    },
    "qwen2": {**_SHARED, **_WINDOWS},
    "qwen3": {**_SHARED, **_WINDOWS, "attention-bias": {"attention_bias": True}},
}


def _scalings(head_dim: int) -> dict[str, dict[str, Any]]:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": TRAINED}
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(head_dim // 2)],
        "long_factor": [1.5 + 0.4 * i for i in range(head_dim // 2)],
        "original_max_position_embeddings": TRAINED,
    }
    return {
        "linear": {"rope_type": "linear", "factor": 2.0},
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": TRAINED,
        },
        "yarn": yarn,
        "yarn-betas": {**yarn, "beta_fast": 4.0, "beta_slow": 0.5},
        "yarn-exact": {**yarn, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
        "yarn-mscale": {**yarn, "mscale": 1.0, "mscale_all_dim": 0.5},
        "yarn-mscale-alone": {**yarn, "factor": 4.0, "mscale": 0.5},
        "yarn-attention": {**yarn, "attention_factor": 1.3},
        "longrope": longrope,
        "longrope-factor": {**longrope, "factor": 4.0},
        "longrope-attention": {**longrope, "attention_factor": 1.3},
    }


def features(family: str) -> list[str]:
    """Names of a family's checkpoints."""
    return [*_FEATURES.get(family, ["plain"]), *(f"rope-{name}" for name in _scalings(2))]


def config_json(family: str, feature: str = "plain") -> dict[str, Any]:
    """What the config.json of a checkpoint says, in the form that published checkpoints have."""
    assert family in _FEATURES, (
        f"the family {family!r} is compared with nothing: list its features in _FEATURES in tests/tiny.py, "
        "let tensor_shapes know its tensors, then run `python -m tests.make_golden`"
    )
    config = {"model_type": family, **_BASE}
    if family == "qwen3":  # its default is 128, not hidden_size / num_attention_heads
        config["head_dim"] = 16
    if not feature.startswith("rope-"):
        return config | _FEATURES[family][feature]
    config |= _FEATURES[family]["plain"]
    scaling = _scalings(head_dim(config))[feature.removeprefix("rope-")]
    if scaling["rope_type"] == "dynamic":  # it states the context before scaling
        config["max_position_embeddings"] = TRAINED
    return config | {"rope_scaling": scaling}


def head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names, as Hugging Face has them, and shapes of all tensors."""
    family, width, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    q_rows, kv_rows = (config[f"num_{kind}_heads"] * head_dim(config) for kind in ("attention", "key_value"))
    output_bias = config.get("attention_bias", False)
    linears = {
        "self_attn.q_proj": (q_rows, width, output_bias or family == "qwen2"),
        "self_attn.k_proj": (kv_rows, width, output_bias or family == "qwen2"),
        "self_attn.v_proj": (kv_rows, width, output_bias or family == "qwen2"),
        "self_attn.o_proj": (width, q_rows, output_bias),
        "mlp.gate_proj": (inner, width, config.get("mlp_bias", False)),
        "mlp.up_proj": (inner, width, config.get("mlp_bias", False)),
        "mlp.down_proj": (width, inner, config.get("mlp_bias", False)),
    }
    norms = {"input_layernorm": width, "post_attention_layernorm": width}
    if family == "qwen3":
        norms |= {"self_attn.q_norm": head_dim(config), "self_attn.k_norm": head_dim(config)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        for name, (rows, columns, bias) in linears.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"model.layers.{i}.{name}.bias"] = (rows,)
        for name, size in norms.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (size,)
    return shapes


def hashed(name: str, count: int) -> np.ndarray:
    """The first 64-bit integers of the sequence that a name stands for (the mixing function of SplitMix64)."""
    x = np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that keeps activations near 1: uniform, around 1 for norms, else around 0."""
    uniform = (hashed(name, math.prod(shape)) >> np.uint64(40)).astype(np.float32) / 2**23 - 1
    tensor = torch.from_numpy(uniform).reshape(shape)
    if "norm" in name:
        return 1 + tensor / 4
    return tensor / 2 if name.endswith("bias") else tensor * math.sqrt(3 / shape[1])


def tokens(count: int, name: str = "tokens") -> list[int]:
    return (hashed(name, count) % np.uint64(_BASE["vocab_size"])).tolist()


def write(directory: Path, config: dict[str, Any]) -> Path:
    """Write config.json and model.safetensors."""
    (directory / "config.json").write_text(json.dumps(config))
    state = {name: weights(name, shape) for name, shape in tensor_shapes(config).items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def load(directory: Path) -> Loaded:
    """Load a checkpoint that has no tokenizer; it never stops."""
    config = load_config(directory)
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(load_state(directory, config, dtype=torch.float32, progress=False), assign=True)
    model.eval().requires_grad_(False)
    return Loaded(
        name=directory.name, model=model, tokenizer=None, chat=SimpleNamespace(stop_ids=frozenset()), config=config
    )
