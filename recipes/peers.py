"""Programs that run the same model as we do: transformers, kvpress and llama.cpp, given the weights that we hold.

Each is a `Contender`: it prefills a prompt and decodes the tokens that it is told. transformers and kvpress compute on
our own tensors, without a copy; llama.cpp maps a GGUF file of the same precision, which is written here.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from checkpoints import ModelConfig, weights
from zoo import Engine, Loaded

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # llama.cpp's names


@dataclass(frozen=True, kw_only=True)
class Point:
    """What every contender does.

    Args:
        context: tokens of each prompt.
        batch: prompts.
        new_tokens: tokens to be decoded after each prompt.
        budget: tokens per KV head that compressed caches keep of a prompt.
        threads: CPU threads.
    """

    context: int
    batch: int
    new_tokens: int
    budget: int
    threads: int

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return self.context + self.new_tokens


class Unsuitable(Exception):
    """A peer has nothing to show at this point."""


class Contender(Protocol):
    """One program at one point.

    Attributes:
        lossless: it keeps every token, so that what it computes can be compared after the prompt too.
        note: the settings that are its own.
    """

    lossless: bool
    note: str

    def prefill(self, ids_BT: Tensor) -> Tensor:
        """Forget everything, take prompts in, give the (B, V) logits of the token after each."""

    def step(self, token_B: Tensor) -> Tensor:
        """Decode one token per row, give (B, V) logits that are good until the next call."""


class Ours:
    """This project's engine.

    Args:
        loaded: the model.
        point: what will be done.
        cache: a method's name with options.
        compile: compile blocks for decoding.
    """

    def __init__(self, loaded: Loaded, point: Point, *, cache: str, compile: bool) -> None:
        self._engine = Engine(
            loaded,
            cache=cache,
            budget=point.budget,
            max_new_tokens=point.new_tokens,
            max_context=point.tokens,
            batch=point.batch,
            compile=compile,
            allow_overflow=True,
        )
        self.lossless = self._engine.budget is None
        self.note = "compiled" if compile else "not compiled"

    def prefill(self, ids_BT: Tensor) -> Tensor:
        """See `Contender`."""
        return self._engine.prefill(ids_BT.tolist())

    def step(self, token_B: Tensor) -> Tensor:
        """See `Contender`."""
        return self._engine.step(token_B)


class Shared:
    """A model of ours as other programs want it, converted when first asked for and then held once.

    Args:
        loaded: the model.

    Raises:
        ValueError: it has something that not all of the programs are told about here.
    """

    def __init__(self, loaded: Loaded) -> None:
        config = loaded.config
        if config.rope.kind != "default" or any(config.layer_windows):
            raise ValueError(
                f"{loaded.name} has scaled RoPE or sliding windows, which are not handed on to other programs: "
                "compare with a model without"
            )
        self.loaded = loaded

    @cached_property
    def transformers(self) -> Any:
        """The model of transformers; its parameters are views of our tensors."""
        return transformers_model(self.loaded)

    @cached_property
    def llama_cpp(self) -> LlamaModel:
        """The model of llama.cpp."""
        return LlamaModel(self.loaded)


# -- transformers and kvpress ------------------------------------------------------------------------------------------


def transformers_model(loaded: Loaded) -> Any:
    """Build transformers' model of the same family over our tensors.

    Args:
        loaded: a model with unscaled RoPE and without sliding windows.

    Returns:
        A PreTrainedModel with SDPA attention.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = loaded.config
    theirs = AutoConfig.for_model(
        config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tie_embeddings,
        attention_bias=config.qkv_bias,
        mlp_bias=config.mlp_bias,
        sliding_window=None,
    )
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(theirs, attn_implementation="sdpa")
    state = {name: tensor for _, name, tensor in _unfused(loaded, weights.HUGGINGFACE_NAMES)}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=theirs)  # computed, so not among the weights
    return model.eval().requires_grad_(False)


def _unfused(loaded: Loaded, names: Mapping[str, str]) -> Iterator[tuple[str, str, Tensor]]:
    """The parts of our fused tensors: what they are ("q", "gate", …), the name that a format has for it, the rows."""
    state = loaded.model.state_dict()
    for ours, parts in weights.layout(loaded.config).items():
        rows = state[ours].split([part.shape[0] for part in parts])
        for part, tensor in zip(parts, rows, strict=True):
            yield part.key, f"{names[part.key].format(part.layer)}.{part.suffix}", tensor


class Transformers:
    """A transformers model and a cache.

    Args:
        model: transformers' model.
        empty_cache: makes or empties the cache.
        step_model: decodes, e.g. a compiled `model`; None takes `model`.
        press: given the model, a context in which prefilling compresses the cache.
        note: see `Contender`.
    """

    def __init__(
        self,
        model: Any,
        empty_cache: Callable[[], Any],
        *,
        step_model: Any = None,
        press: Callable[[Any], AbstractContextManager[Any]] | None = None,
        note: str,
    ) -> None:
        self._model, self._empty_cache = model, empty_cache
        self._step_model = step_model or model
        self._press = press or nullcontext
        self._cache: Any = None
        # Where its forward takes this, only so does a compiled model know where in a static cache to write.
        self._tell_place = step_model is not None and "cache_position" in inspect.signature(model.forward).parameters
        self.lossless, self.note = press is None, note

    @torch.inference_mode()
    def prefill(self, ids_BT: Tensor) -> Tensor:
        """See `Contender`."""
        self._cache = None  # the old one's memory is free before there is a new one
        self._cache = self._empty_cache()
        self._position = torch.arange(ids_BT.shape[1])
        with self._press(self._model):
            return self._run(self._model, ids_BT)

    @torch.inference_mode()
    def step(self, token_B: Tensor) -> Tensor:
        """See `Contender`."""
        self._position = self._position[-1:] + 1
        # A copy has the same strides whatever the tokens are a view of: a compiled model is compiled for those.
        return self._run(self._step_model, token_B.clone()[:, None])

    def _run(self, model: Any, ids_BT: Tensor) -> Tensor:
        place = {"cache_position": self._position} if self._tell_place else {}
        position_BT = self._position.expand_as(ids_BT)
        out = model(ids_BT, position_ids=position_BT, past_key_values=self._cache, logits_to_keep=1, **place)
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV


def _transformers(shared: Shared, point: Point) -> Contender:
    from transformers import DynamicCache

    model = shared.transformers
    return Transformers(model, lambda: DynamicCache(config=model.config), note="DynamicCache, sdpa")


def _static(shared: Shared, point: Point) -> Contender:
    from transformers import StaticCache

    model = shared.transformers
    cache: Any = StaticCache(config=model.config, max_cache_len=point.tokens)

    def empty_cache() -> Any:
        cache.reset()  # the same tensors again: others would be compiled for anew
        return cache

    step_model = torch.compile(model.forward, dynamic=False)
    return Transformers(model, empty_cache, step_model=step_model, note="StaticCache, sdpa, steps compiled")


def _kvpress(shared: Shared, point: Point) -> Contender:
    from kvpress import SnapKVPress
    from transformers import DynamicCache

    if point.budget >= point.context:
        raise Unsuitable(f"the budget {point.budget} keeps all of {point.context} tokens: there is nothing to compress")
    model = shared.transformers
    # It keeps int(tokens * (1 - ratio)); the half token keeps rounding errors from taking one away.
    ratio = 1 - (point.budget + 0.5) / point.context
    press = SnapKVPress(compression_ratio=ratio, window_size=min(64, point.budget // 2))
    note = f"SnapKVPress, window {press.window_size}, DynamicCache, sdpa"
    return Transformers(model, lambda: DynamicCache(config=model.config), press=press, note=note)


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


def write_gguf(loaded: Loaded, path: Path) -> None:
    """Write our weights as a GGUF file of the same precision, without a tokenizer.

    Args:
        loaded: a float32 or bfloat16 model with unscaled RoPE and without sliding windows.
        path: the file.
    """
    import gguf

    config: ModelConfig = loaded.config
    architecture = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, name, tensor in _unfused(loaded, weights.GGUF_NAMES):
        if key in ("q", "k") and architecture == "llama":  # there, dimensions that turn together are neighbours
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).reshape(tensor.shape)
        if tensor.dim() == 1:
            tensor = tensor.float()  # llama.cpp has norms and biases in no other type
        if tensor.dtype == torch.bfloat16:  # numpy has none
            bytes_ = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bytes_, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaModel:
    """Our weights in llama.cpp.

    Args:
        loaded: see `write_gguf`.

    Attributes:
        pointer: llama.cpp's handle.
        vocab_size: V.
        dtype: of the weights.
    """

    def __init__(self, loaded: Loaded) -> None:
        import llama_cpp

        self.vocab_size, self.dtype = loaded.config.vocab_size, loaded.model.embed.weight.dtype
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it calls warnings errors
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "model.gguf"
            write_gguf(loaded, file)
            # The file stays mapped when its name is gone.
            self.pointer = llama_cpp.llama_model_load_from_file(bytes(file), llama_cpp.llama_model_default_params())
        if not self.pointer:
            raise RuntimeError("llama.cpp cannot load our weights")
        weakref.finalize(self, llama_cpp.llama_model_free, self.pointer)


class LlamaCpp:
    """llama.cpp through its C functions, as its own programs use them.

    Its flash attention is off: on a CPU the other path decodes about twice as fast at 2,000 tokens, and in float32
    flash attention is off by more than rounding (0.04 in the default model's logits). It would prefill faster.

    Args:
        shared: has the weights.
        point: what will be done.
    """

    lossless = True

    def __init__(self, shared: Shared, point: Point) -> None:
        import llama_cpp

        self._c, self._model = llama_cpp, shared.llama_cpp
        half = self._model.dtype != torch.float32
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = point.batch * -(-point.tokens // 256) * 256
        settings.n_batch = point.batch * point.context
        settings.n_seq_max = point.batch
        settings.n_threads = settings.n_threads_batch = point.threads
        settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F16 if half else llama_cpp.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model.pointer, settings)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        weakref.finalize(self, llama_cpp.llama_free, self._context)
        cpu = llama_cpp.llama_print_system_info().decode()
        features = " ".join(
            word.split("=")[0].strip() for word in cpu.removeprefix("CPU :").split("|") if "= 1" in word
        )
        self.note = f"no flash attention, {'f16' if half else 'f32'} cache, built with {features}"

    def prefill(self, ids_BT: Tensor) -> Tensor:
        """See `Contender`."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), False)
        self._tokens = 0
        return self._decode(ids_BT)

    def step(self, token_B: Tensor) -> Tensor:
        """See `Contender`."""
        return self._decode(token_B[:, None])

    def _decode(self, ids_BT: Tensor) -> Tensor:
        rows, new = ids_BT.shape
        batch = self._c.llama_batch_init(rows * new, 0, 1)
        batch.n_tokens = rows * new
        for i, token in enumerate(ids_BT.flatten().tolist()):
            row, column = divmod(i, new)
            batch.token[i] = token
            batch.pos[i] = self._tokens + column
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = column == new - 1
        status = self._c.llama_decode(self._context, batch)
        self._c.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        self._tokens += new
        logits = self._c.llama_get_logits(self._context)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (rows, self._model.vocab_size)))


# -- which there are ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another program.

    Args:
        module: what must be importable.
        extra: our extra that installs it.
        make: a contender for a point; raises `Unsuitable`, or whatever the program does.
        cache: what it keeps.
    """

    module: str
    extra: str
    make: Callable[[Shared, Point], Contender]
    cache: str = "full"

    def is_installed(self) -> bool:
        """Whether Python would find it."""
        return importlib.util.find_spec(self.module) is not None


PEERS = {
    "transformers": Peer(module="transformers", extra="peers", make=_transformers),
    "static": Peer(module="transformers", extra="peers", make=_static),
    "kvpress": Peer(module="kvpress", extra="peers", make=_kvpress, cache="snapkv"),
    "llama.cpp": Peer(module="llama_cpp", extra="llama-cpp", make=LlamaCpp),
}
