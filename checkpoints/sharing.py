"""Which layers can read another layer's keys and values: what a search found, and only for the model it saw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.artefact import check_model, read_object
from checkpoints.config import ModelConfig
from checkpoints.errors import CheckpointError
from checkpoints.storage import atomic_file

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerSharing:
    """Pairs of layers in the order in which a search accepted them, so that the first c share c layers.

    Args:
        model_id: the model they were found on, as the user calls it.
        config_hash: `config_hash` of its configuration.
        tokenizer_hash: fingerprint of its tokenizer.
        num_layers: L.
        pairs: a layer, and the earlier layer that it is to read; a layer reads at most one.
        similarity: per pair, cosine similarity of the final hidden states to the model's own, with this pair and all
            before it.
        provenance: free notes, e.g. command, text, threshold, pairs tried.

    Raises:
        ValueError: a source is not an earlier layer, **or** a layer is in two pairs, **or** similarities are not as
            many as pairs.

    Source:
        KVSharer, arXiv 2410.18517.
    """

    model_id: str
    config_hash: str
    tokenizer_hash: str
    num_layers: int
    pairs: tuple[tuple[int, int], ...]
    similarity: tuple[float, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layer, source in self.pairs:
            if not 0 <= source < layer < self.num_layers:
                raise ValueError(
                    f"layer {layer} of {self.num_layers} cannot read layer {source}: a source must be an earlier layer"
                )
        layers = [layer for layer, _ in self.pairs]
        if twice := {layer for layer in layers if layers.count(layer) > 1}:
            raise ValueError(f"layer {min(twice)} has two sources: it can read only one")
        if len(self.similarity) != len(self.pairs):
            raise ValueError(f"{len(self.pairs)} pairs have {len(self.similarity)} similarities, there must be as many")

    def sources(self, count: int) -> tuple[int, ...]:
        """Whose keys and values every layer reads, its own or those of an earlier one, when `count` layers share.

        A source that comes to share hands its readers on, so nobody reads from a layer that has nothing.

        Args:
            count: 0 to the number of pairs.

        Returns:
            L layer indices.

        Raises:
            ValueError: fewer pairs were found.

        Example:
            >>> found = LayerSharing(model_id="m", config_hash="c", tokenizer_hash="t", num_layers=4,
            ...     pairs=((3, 2), (2, 0)), similarity=(0.9, 0.8))
            >>> found.sources(1), found.sources(2)
            ((0, 1, 2, 2), (0, 1, 0, 0))
        """
        if not 0 <= count <= len(self.pairs):
            raise ValueError(f"{count} layers cannot share: the search for {self.model_id} found {len(self.pairs)}")
        table = list(range(self.num_layers))
        for layer, source in self.pairs[:count]:
            root = table[source]
            table = [root if reads == layer else reads for reads in table]
        return tuple(table)


def read_sharing(path: Path, *, config: ModelConfig, tokenizer_hash: str | None = None) -> LayerSharing:
    """Read what `recipes.search_sharing` wrote.

    Args:
        path: a json file.
        config: of the model that will share layers.
        tokenizer_hash: of the same model; None leaves it unchecked.

    Returns:
        The pairs.

    Raises:
        CheckpointError: no such file; not valid json; not such a file; made for another model; pairs that cannot be.
    """
    data = read_object(path, what="layer-sharing file", holds="pairs", recipe="search_sharing")
    if not isinstance(data.get("pairs"), list):
        raise CheckpointError(f"{path} is not a layer-sharing file: it must hold a json object with pairs")
    check_model(path, data, version=_VERSION, config=config, tokenizer_hash=tokenizer_hash, again="search")
    try:
        pairs = [(pair["layer"], pair["source"], pair["similarity"]) for pair in data["pairs"]]
        if any(type(layer) is not int or type(source) is not int for layer, source, _ in pairs):
            raise TypeError("layers must be whole numbers")
        provenance = data.get("provenance", {})
        return LayerSharing(
            model_id=str(data.get("model_id")),
            config_hash=data["config_hash"],
            tokenizer_hash=str(data.get("tokenizer_hash")),
            num_layers=config.num_layers,
            pairs=tuple((layer, source) for layer, source, _ in pairs),
            similarity=tuple(float(similarity) for *_, similarity in pairs),
            provenance=provenance if isinstance(provenance, dict) else {},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): search again") from error


def write_sharing(path: Path, sharing: LayerSharing) -> None:
    """Write the file that `read_sharing` reads; a crash leaves the old file or the new.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "sharing.json"
        >>> write_sharing(path, LayerSharing(
        ...     model_id="m", config_hash="c", tokenizer_hash="t", num_layers=2, pairs=((1, 0),), similarity=(0.9,)))
        >>> json.loads(path.read_text())["pairs"]
        [{'layer': 1, 'source': 0, 'similarity': 0.9}]
    """
    data = {
        "version": _VERSION,
        "model_id": sharing.model_id,
        "config_hash": sharing.config_hash,
        "tokenizer_hash": sharing.tokenizer_hash,
        "pairs": [
            {"layer": layer, "source": source, "similarity": similarity}
            for (layer, source), similarity in zip(sharing.pairs, sharing.similarity, strict=True)
        ],
        "provenance": sharing.provenance,
    }
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
