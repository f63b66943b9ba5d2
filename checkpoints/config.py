"""One frozen description of a model, whatever file it was read from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from checkpoints.errors import CheckpointError

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions turn into rotation angles.

    Args:
        kind: which published scaling; decides which of the other fields are read.
        theta: base of the geometric series of wavelengths, > 1.
        factor: context extension factor, >= 1 (all kinds but default).
        original_max_position: trained context in tokens before scaling (llama3, yarn, dynamic, longrope).
        low_freq_factor: wavelengths above original / low are divided by `factor` (llama3).
        high_freq_factor: wavelengths below original / high are kept (llama3).
        beta_fast: rotations at which extrapolation ends (yarn).
        beta_slow: rotations at which interpolation is complete (yarn).
        attention_factor: multiplies cos and sin; None takes the method's own formula (yarn, longrope).
        mscale: numerator of yarn's attention factor, as DeepSeek ships it.
        mscale_all_dim: denominator of yarn's attention factor.
        truncate: whether yarn's correction range is rounded to whole dimensions.
        short_factor: D/2 divisors used up to the original context (longrope).
        long_factor: D/2 divisors used beyond it (longrope).
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every number needed to build one of our models.

    Args:
        model_type: Hugging Face's name of the family; also the name of its file in zoo/models.
        vocab_size: rows of the embedding, V.
        hidden_size: model width, E.
        intermediate_size: width of the gated MLP, F.
        num_layers: L.
        num_heads: query heads, N.
        num_kv_heads: key/value heads, H; divides num_heads.
        head_dim: D.
        max_position: context in tokens that the model takes.
        rms_norm_eps: epsilon inside the RMS norm.
        rope: rotary embedding.
        tie_embeddings: the output head is the embedding.
        qkv_bias: the q, k and v projections have a bias.
        output_bias: the attention output projection has a bias.
        mlp_bias: the MLP projections have a bias.
        qk_norm: q and k are RMS-normalised per head before RoPE.
        layer_windows: per layer, the sliding window in tokens or None for full attention; length L.
        dtype: the dtype in which the checkpoint stores most weights, e.g. "bfloat16".
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int | None, ...]
    dtype: str = "float32"


MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def load_config(path: Path) -> ModelConfig:
    """Read a model's numbers from config.json, from a GGUF file's metadata or from Meta's params.json.

    Values that a config.json leaves out are those of the transformers library; the dimensions must be there.

    Args:
        path: a .gguf file, or a directory with config.json or params.json, as `resolve` returns it.

    Returns:
        The configuration. Its `max_position` includes the extension by dynamic and yarn scaling.

    Raises:
        CheckpointError: no or damaged configuration; a model type, RoPE scaling, activation, quantisation or feature
            that we do not support.

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> _ = (directory / "config.json").write_text('''{"model_type": "llama", "vocab_size": 49152,
        ...     "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        ...     "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000}''')
        >>> load_config(directory).head_dim
        64
    """
    from checkpoints import config_gguf, config_huggingface, config_meta

    if path.suffix == ".gguf" and path.is_file():
        config = config_gguf.read(path)
    elif (path / "config.json").is_file():
        config = config_huggingface.read(path / "config.json")
    elif (path / "params.json").is_file():
        config = config_meta.read(path / "params.json")
    else:
        raise CheckpointError(
            f"{path} is not a checkpoint: no .gguf file, nor a directory with config.json or params.json"
        )
    for wrong, what in (
        (config.num_heads % config.num_kv_heads, f"{config.num_heads} query heads on {config.num_kv_heads} KV heads"),
        (config.head_dim % 2 or not config.head_dim, f"the head dimension {config.head_dim}, which must be even"),
        (config.rope.theta <= 1, f"the RoPE base {config.rope.theta}, which must be above 1"),
        (config.rope.factor < 1, f"the RoPE scaling factor {config.rope.factor}, which must be at least 1"),
    ):
        if wrong:
            raise CheckpointError(f"{path} is damaged: it states {what}")
    return config


def config_hash(config: ModelConfig) -> str:
    """Fingerprint what a model computes: the same for the same model in another file format.

    Args:
        config: any configuration.

    Returns:
        sha256 in hex of every field but the name of the family, the stored dtype and the context limit.

    Example:
        >>> import tempfile
        >>> from dataclasses import replace
        >>> config = ModelConfig(
        ...     model_type="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
        ...     num_kv_heads=1, head_dim=4, max_position=64, rms_norm_eps=1e-5, rope=RopeConfig(), tie_embeddings=True,
        ...     layer_windows=(None,))
        >>> config_hash(config) == config_hash(replace(config, dtype="bfloat16"))
        True
        >>> config_hash(config) == config_hash(replace(config, num_heads=1))
        False
    """
    fields = asdict(config)
    for name in ("model_type", "dtype", "max_position"):
        del fields[name]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
