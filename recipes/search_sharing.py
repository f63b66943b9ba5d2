"""Find out which layers can read another layer's keys and values instead of their own (KVSharer).

    python -m recipes.search_sharing --model smollm2-135m --output zoo/sharing/smollm2-135m.json --layers 8

Every layer's keys and values are averaged over short texts. Pairs of layers are tried in the order of their distance,
the most dissimilar first: the later layer reads the earlier one's cache. A pair is accepted if the model's final hidden
states stay similar to its own, together with the pairs that were accepted before. If too few pairs pass, the file
holds fewer than were asked for, and that is said.

Source:
    Yang et al., KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing, 2024, section 3.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from checkpoints import LayerSharing, config_hash, write_sharing
from checkpoints.resolve import DEFAULT_MODEL
from checkpoints.storage import atomic_file
from layers.cache.base import NoCache
from recipes.needles import SPLITS, filler_sentence
from zoo import Loaded, cli, load
from zoo.load import DTYPES

THRESHOLD = 0.5  # as published


class SharedLayers:
    """Dense attention in which a layer may attend to the keys and values of an earlier one; keeps all of them.

    Args:
        source: per layer, whose keys and values it reads.
    """

    def __init__(self, source: Sequence[int]) -> None:
        self.source = source
        self.kept: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer_1: Tensor, q_BTND: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, window: int | None) -> Tensor:
        """Attend within the sequence; see `layers.cache.base.KVCache`. Layers come in their order."""
        self.kept.append((k_BTHD, v_BTHD))
        return NoCache().attend(layer_1, q_BTND, *self.kept[self.source[len(self.kept) - 1]], window)


def calibration_ids(loaded: Loaded, *, texts: int, tokens: int, seed: int, file: Path | None = None) -> Tensor:
    """Short texts: lines of a file, or prose of the calibration split of `recipes.needles`.

    Args:
        loaded: the model whose tokenizer reads them.
        texts: how many, B.
        tokens: length of each, T; what is longer is cut off.
        seed: of the prose.
        file: UTF-8 text, whose lines of fewer tokens are passed over; None makes prose.

    Returns:
        (B, T) token ids.

    Raises:
        ValueError: the file has too few lines of that many tokens.
        OSError: the file cannot be read.
    """
    if file is None:
        rng, split = random.Random(f"sharing/{seed}"), SPLITS["calibrate"]
        # A token is at least a character, and every sentence has more than ten.
        lines = [" ".join(filler_sentence(rng, split, "prose") for _ in range(1 + tokens // 4)) for _ in range(texts)]
    else:
        lines = file.read_text(encoding="utf-8").splitlines()
    rows = [ids[:tokens] for line in lines if len(ids := loaded.tokenizer.encode(line)) >= tokens][:texts]
    if len(rows) < texts:
        raise ValueError(f"{len(rows)} lines have {tokens} tokens, {texts} are wanted: lower --texts or --tokens")
    return torch.tensor(rows, device=loaded.model.embed.weight.device)


@torch.inference_mode()
def run(loaded: Loaded, ids_BT: Tensor, source: Sequence[int]) -> tuple[Tensor, SharedLayers]:
    """Final hidden states (B, T, E), after the norm, and the keys and values of every layer."""
    cache = SharedLayers(source)
    position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    x_BTE = loaded.model.hidden(ids_BT, loaded.model.rope(position_BT, ids_BT.shape[1]), cache)
    normed_BTE: Tensor = loaded.model.norm(x_BTE)
    return normed_BTE, cache


def distances(mean_LTHD: Tensor, *, compat: bool = False) -> Tensor:
    """Euclidean distance between layers' mean keys (or values).

    Args:
        mean_LTHD: per layer.
        compat: the published code's mean of the distances per token and head, instead of the distance of all at once.

    Returns:
        (L, L).

    Example:
        >>> distances(torch.tensor([[[[0.0]], [[0.0]]], [[[3.0]], [[4.0]]]]))[0, 1]
        tensor(5.)
        >>> distances(torch.tensor([[[[0.0]], [[0.0]]], [[[3.0]], [[4.0]]]]), compat=True)[0, 1]
        tensor(3.5000)
    """
    square_LLTHD = (mean_LTHD[:, None] - mean_LTHD).square()
    return square_LLTHD.sum(-1).sqrt().mean((-1, -2)) if compat else square_LLTHD.sum((-1, -2, -3)).sqrt()


def similarity(x_BTE: Tensor, y_BTE: Tensor) -> float:
    """Cosine between two runs' hidden states, flattened text by text, and averaged over texts."""
    return float(F.cosine_similarity(x_BTE.flatten(1).float(), y_BTE.flatten(1).float()).mean())


def candidates(kept: Sequence[tuple[Tensor, Tensor]], *, compat: bool = False) -> list[tuple[int, int]]:
    """All pairs of a layer and an earlier one, the most dissimilar first."""
    k_LTHD, v_LTHD = (torch.stack([pair[i].float().mean(0) for pair in kept]) for i in (0, 1))
    distance_LL = distances(k_LTHD, compat=compat) + distances(v_LTHD, compat=compat)
    pairs = [(layer, source) for layer in range(len(kept)) for source in range(layer)]
    return sorted(pairs, key=lambda pair: float(distance_LL[pair]), reverse=True)


def search(
    loaded: Loaded,
    ids_BT: Tensor,
    *,
    layers: int,
    threshold: float = THRESHOLD,
    compat: bool = False,
    settings: dict[str, Any] | None = None,
    journal: Path | None = None,
) -> LayerSharing:
    """Search for layers that can share.

    Args:
        loaded: the model.
        ids_BT: calibration texts.
        layers: layers that are to read another's cache; the search ends when they are found.
        threshold: the similarity of the final hidden states must be above it.
        compat: distances as the published code has them.
        settings: noted in the file; an interrupted search goes on only if they are the same.
        journal: what was tried so far, kept after every pair, so that a search that is interrupted can go on.

    Returns:
        The pairs, maybe fewer than asked for.

    Raises:
        ValueError: more layers than can share, **or** the journal is damaged.
    """
    L = loaded.config.num_layers
    if not 1 <= layers < L:
        raise ValueError(f"{layers} of {L} layers cannot share: ask for 1 to {L - 1}")
    settings = {**(settings or {}), "layers": layers, "threshold": threshold, "compat": compat}
    key = {"config_hash": config_hash(loaded.config), **settings}
    key.pop("command", None)
    tried: list[float | None] = []  # per candidate: its similarity, None where its layer shared already
    if journal is not None and journal.exists():
        try:
            noted = json.loads(journal.read_text())
            tried = noted["tried"] if noted["key"] == key else []
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{journal}, what an interrupted search left, is damaged: remove it") from None
    own_BTE, cache = run(loaded, ids_BT, range(L))
    pairs = candidates(cache.kept, compat=compat)
    columns = TextColumn("Sharing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=layers)
        found = _found(loaded, [], [], key)
        for index, pair in enumerate(pairs):
            if index == len(tried):
                tried.append(None)
                if pair[0] not in dict(found.pairs):
                    more = _found(loaded, [*found.pairs, pair], [*found.similarity, 0.0], key)
                    shared_BTE, _ = run(loaded, ids_BT, more.sources(len(more.pairs)))
                    tried[-1] = similarity(shared_BTE, own_BTE)
                if journal is not None:
                    with atomic_file(journal) as partial:
                        partial.write_text(json.dumps({"key": key, "tried": tried}))
            score = tried[index]
            if score is not None and score > threshold:
                found = _found(loaded, [*found.pairs, pair], [*found.similarity, round(score, 6)], key)
            progress.update(bar, completed=len(found.pairs), description=f"{index + 1} of {len(pairs)} pairs tried")
            if len(found.pairs) == layers:
                break
    notes = settings | {"candidates": len(pairs), "tried": sum(score is not None for score in tried)}
    return _found(loaded, found.pairs, found.similarity, notes)


def _found(
    loaded: Loaded, pairs: Sequence[tuple[int, int]], scores: Sequence[float], notes: dict[str, Any]
) -> LayerSharing:
    return LayerSharing(
        model_id=loaded.name,
        config_hash=config_hash(loaded.config),
        tokenizer_hash=loaded.tokenizer.fingerprint(),
        num_layers=loaded.config.num_layers,
        pairs=tuple(pairs),
        similarity=tuple(scores),
        provenance=notes,
    )


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return cli.run("recipes.search_sharing", lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m recipes.search_sharing", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias, directory, .gguf file or hub id")
    parser.add_argument("--output", type=Path, required=True, help="json file to write")
    parser.add_argument("--layers", type=int, required=True, help="layers that are to read another's cache")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="published: %(default)s")
    parser.add_argument("--text", type=Path, help="texts, one per line (default: generated prose)")
    parser.add_argument("--texts", type=int, default=30, help="published: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="of each text; published: %(default)s")
    parser.add_argument("--compat", action="store_true", help="distances as the published code has them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args(argv)
    cli.check_writable("--output", args.output)
    command = "python -m recipes.search_sharing " + " ".join(sys.argv[1:] if argv is None else argv)
    journal = args.output.with_suffix(".partial.json")
    if args.threads:
        torch.set_num_threads(args.threads)
    loaded = load(args.model, dtype=args.dtype, device=args.device)
    ids_BT = calibration_ids(loaded, texts=args.texts, tokens=args.tokens, seed=args.seed, file=args.text)
    found = search(
        loaded,
        ids_BT,
        layers=args.layers,
        threshold=args.threshold,
        compat=args.compat,
        settings={
            "command": command,
            "text": "prose" if args.text is None else args.text.name,
            "texts": args.texts,
            "tokens": args.tokens,
            "seed": args.seed,
            "dtype": args.dtype,
        },
        journal=journal,
    )
    write_sharing(args.output, found)
    journal.unlink(missing_ok=True)
    for (layer, source), score in zip(found.pairs, found.similarity, strict=True):
        print(f"layer {layer} reads layer {source}: similarity {score:.3f}")
    tried, threshold = found.provenance["tried"], args.threshold
    print(f"{len(found.pairs)} of {args.layers} layers share, {tried} pairs tried, similarity above {threshold}")
    if len(found.pairs) < args.layers:
        print(f"fewer than asked for: no other pair stays above {threshold}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
