"""From a model's name to everything that is needed to run it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints import CheckpointError, LayerSharing, read_sharing
from checkpoints.config import ModelConfig, config_hash, load_config
from checkpoints.importance import read_all_importance
from checkpoints.resolve import DEFAULT_MODEL, resolve

# torch takes seconds to import: whoever only wants `--help` does not wait for it.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from checkpoints.chat import Chat
    from checkpoints.tokenizer import Tokenizer
    from layers.compress.sentences import SentenceEnds
    from zoo.family import Decoder

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("int8",)
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that can be run.

    Args:
        name: as the user wrote it.
        model: the decoder, on its device, in its dtype.
        tokenizer: text to ids and back.
        chat: messages to text and ids.
        config: the model's numbers.
    """

    name: str
    model: Decoder
    tokenizer: Tokenizer
    chat: Chat
    config: ModelConfig

    @cached_property
    def sentences(self) -> SentenceEnds:
        """Which token ids end a sentence, for cache methods that ask; made from the vocabulary when first asked for.

        Raises:
            ValueError: there is no tokenizer.
        """
        from layers.compress.sentences import SentenceEnds

        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} has no tokenizer to say where sentences end: load one with it, or choose a cache without "
                "stop=sentence (all presets but adaptive)"
            )
        special = frozenset(self.tokenizer.special_tokens.values())
        device = self.model.embed.weight.device
        return SentenceEnds.from_texts(self.tokenizer.texts(), special=special, device=device)


def load(
    name: str = DEFAULT_MODEL,
    *,
    dtype: str = "float32",
    weights: str | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Loaded:
    """Load a model.

    Args:
        name: an alias, a checkpoint directory, a .gguf file or a hub id.
        dtype: "float32", "bfloat16" or "float16".
        weights: "int8" stores matrices in 8 bits, with a scale per row (`layers.quantize`); None stores them in dtype.
        device: where the model runs, e.g. "cpu" or "cuda".
        progress: show progress bars on stderr.

    Returns:
        Model, tokenizer, chat template and configuration.

    Raises:
        CheckpointError: the checkpoint cannot be found or used.
        ValueError: unknown dtype or kind of weights, **or** a device that is not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: choose from {', '.join(DTYPES)}")
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights {weights!r} are not supported: choose from {', '.join(WEIGHTS)}, or leave it out")
    import torch

    from checkpoints.chat import load_chat
    from checkpoints.tokenizer import load_tokenizer
    from checkpoints.weights import load_state
    from layers.quantize import quantize_weights
    from zoo.family import Decoder

    place = checked_device(device)
    path = resolve(name, progress=progress)
    config = load_config(path)
    tokenizer = load_tokenizer(path)
    chat = load_chat(path, tokenizer, config.model_type)
    with torch.device("meta"):
        model = Decoder(config)
    state = load_state(path, config, dtype=getattr(torch, dtype), device=str(place), progress=progress)
    model.load_state_dict(state, assign=True)
    model = model.to(place).eval().requires_grad_(False)
    if weights == "int8":
        quantize_weights(model)
    return Loaded(name=name, model=model, tokenizer=tokenizer, chat=chat, config=config)


def checked_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: torch knows no such device, **or** it is not there.
    """
    import torch

    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here ({reason}): try cpu") from None
    if place.type == "meta":
        raise ValueError("device 'meta' holds no numbers: try cpu")
    return place


def head_importance(loaded: Loaded, path: str | Path | None = None) -> dict[str, Tensor]:
    """Head-importance scores of a model: from a file, or from those that ship with the package.

    Args:
        loaded: the model.
        path: an importance file; None searches the package for one of the same model and tokenizer.

    Returns:
        fp32 scores by kind, those that the file has: (L, N) of query heads ("r", "r2", "semantic") and (L,) of layers
        ("layer_errors").

    Raises:
        CheckpointError: the file is not one, **or** belongs to another model, **or** none ships for this model.
    """
    import torch

    path = path or _shipped("importance", loaded.config)
    if path is None:
        raise CheckpointError(
            f"no head importance ships for {loaded.name}: make a file with `python -m recipes.calibrate_heads "
            f"--model {loaded.name} --output importance.json`, then pass --importance importance.json"
        )
    found = read_all_importance(Path(path), config=loaded.config, tokenizer_hash=loaded.tokenizer.fingerprint())
    tensors = {kind: torch.tensor(scores.scores_LN) for kind, scores in found.items()}
    return {kind: scores.squeeze(1) if kind == "layer_errors" else scores for kind, scores in tensors.items()}


def layer_sharing(loaded: Loaded, path: str | Path | None = None) -> LayerSharing:
    """Which layers of a model can read another's cache: from a file, or from those that ship with the package.

    Args:
        loaded: the model.
        path: a layer-sharing file; None searches the package for one of the same model and tokenizer.

    Raises:
        CheckpointError: the file is not one, **or** belongs to another model, **or** none ships for this model.
    """
    path = path or _shipped("sharing", loaded.config)
    if path is None:
        raise CheckpointError(
            f"nothing ships that says which layers of {loaded.name} can share: make a file with `python -m "
            f"recipes.search_sharing --model {loaded.name} --layers {max(1, loaded.config.num_layers // 4)} --output "
            "sharing.json`, then pass --sharing sharing.json"
        )
    return read_sharing(Path(path), config=loaded.config, tokenizer_hash=loaded.tokenizer.fingerprint())


def _shipped(folder: str, config: ModelConfig) -> Path | None:
    """The file of the package that was made for a model of this configuration."""
    files, mine = sorted((_PACKAGE / folder).glob("*.json")), config_hash(config)
    return next((file for file in files if json.loads(file.read_text()).get("config_hash") == mine), None)
