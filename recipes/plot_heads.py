"""Heat maps of head importance, and of the tokens that every way to share a budget gives to each KV head.

    python -m recipes.plot_heads --model smollm2-135m --budget 128 --output heads.png

The upper row is what `recipes.calibrate_heads` found: a map of layers and query heads per kind, and what compressing
each layer alone does to its attention output. The lower row is one prompt, compressed with the same scores and with the
budgets of every allocator: a map of layers and KV heads each, on one scale.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from checkpoints.resolve import DEFAULT_MODEL
from layers.methods import allocator_names, build_method
from recipes.needles import make_prompt
from recipes.replay import Record, Replay
from zoo import Loaded, cli, load
from zoo.load import DTYPES, head_importance

KINDS = {
    "r": "R: copies the answer",
    "r2": "R2: attends to the answer",
    "semantic": "semantic: attends to\nthe answer and the words around it",
}


@torch.inference_mode()
def budgets(
    loaded: Loaded, ids: list[int], *, cache: str, allocators: Sequence[str], budget: int, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tokens of a prompt that each KV head keeps under each allocator.

    Args:
        loaded: the model.
        ids: the prompt.
        cache: the method, with options, whose scores decide; its own budgets are not used.
        allocators: names, of `layers.methods.allocator_names()`.
        budget: mean tokens per KV head.
        scores: head importance by kind.

    Returns:
        (L, H) int32 by allocator.

    Raises:
        ValueError: as `layers.methods.build_method`, **or** a budget below what the method always keeps.
    """
    joint = "," if ":" in cache else ":"
    methods = [build_method(f"{cache}{joint}allocator={name}", scores) for name in allocators]
    if budget < methods[0].least:
        raise ValueError(methods[0].too_small(f"raise --budget from {budget}"))
    record = Record(loaded, ids)
    kept = [Replay(record, method, [budget], room=1).cache.kept[0].cpu() for method in methods]
    return dict(zip(allocators, kept, strict=True))


def draw(
    output: Path,
    scores: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    *,
    budget: int,
    title: str,
    subtitle: str,
) -> None:
    """Draw both rows.

    Args:
        output: picture to write.
        scores: head importance by kind, (L, N) each, and if there are any "layer_errors", (L,).
        kept: (L, H) tokens of each KV head by allocator.
        budget: mean of the tokens.
        title: of the picture.
        subtitle: of the lower row.

    Raises:
        ValueError: matplotlib is not installed, **or** it knows no pictures with such a suffix.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, ScalarFormatter
    except ImportError:
        raise ValueError("plots need matplotlib: run `pip install -c constraints.txt -e '.[plot]'`") from None

    figure = Figure(figsize=(13, 13), layout="constrained")
    figure.suptitle(title, fontsize=15)
    above, below = cast("tuple[Any, Any]", figure.subfigures(2, 1, hspace=0.04))
    above.suptitle("What calibration found", fontsize=12)
    below.suptitle(subtitle, fontsize=12)

    def layout(axes: Any, name: str, columns: str) -> None:
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(columns)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))

    kinds = [kind for kind in KINDS if kind in scores]
    errors = scores.get("layer_errors")
    panels = above.subplots(1, len(kinds) + (errors is not None), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=False):
        image = axes.imshow(scores[kind].numpy(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        above.colorbar(image, ax=axes, label="score", fraction=0.08, aspect=40)
        layout(axes, KINDS[kind], "query head")
    if errors is not None:
        panels[-1].barh(range(len(errors)), errors.tolist(), color="tab:orange")
        layout(panels[-1], "layer errors: harm done by\ncompressing the layer alone", "share of all layers' error")
        panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=4))
        panels[-1].set_ylim(len(errors) - 0.5, -0.5)
    panels[0].set_ylabel("layer")

    octaves = max(1.0, *(float((kept_LH.double() / budget).log2().abs().max()) for kept_LH in kept.values()))
    scale = LogNorm(budget / 2**octaves, budget * 2**octaves)
    panels = below.subplots(1, len(kept), sharey=True, squeeze=False)[0]
    for axes, (name, kept_LH) in zip(panels, kept.items(), strict=True):
        image = axes.imshow(kept_LH.numpy(), aspect="auto", cmap="RdBu_r", norm=scale, interpolation="nearest")
        layout(axes, f"{name}\n{int(kept_LH.min())} to {int(kept_LH.max())} tokens", "KV head")
    panels[0].set_ylabel("layer")
    bar = below.colorbar(image, ax=list(panels), label="tokens kept, white: the mean (log scale)", fraction=0.03)
    bar.set_ticks([budget * 2**step for step in range(-int(octaves), int(octaves) + 1)])
    bar.ax.minorticks_off()
    bar.ax.yaxis.set_major_formatter(ScalarFormatter())
    figure.savefig(output, dpi=80)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe.

    Args:
        argv: its options; None takes those of the process.

    Returns:
        The exit status; see `zoo.cli.run`.
    """
    return cli.run("recipes.plot_heads", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    parser = cli.Parser(prog="python -m recipes.plot_heads", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="M", help="as for zoo.chat (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    add("--importance", type=Path, metavar="FILE", help="head-importance file (default: the one that ships)")
    add("--cache", default="snapkv:preset=tuned", metavar="C", help="whose scores decide (default: %(default)s)")
    add("--allocators", nargs="+", default=allocator_names(), choices=allocator_names(), help="default: all")
    add(
        "--budget", type=cli.whole_number(1), default=128, metavar="N", help="tokens per KV head (default: %(default)s)"
    )
    add("--prompt-file", metavar="P", help="a UTF-8 file to compress (default: a needle in prose)")
    add("--tokens", type=cli.whole_number(1), default=2000, help="of the needle prompt (default: %(default)s)")
    add("--output", type=Path, required=True, help="picture to write: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    cli.check_writable("--output", args.output)

    loaded = load(args.model, dtype=args.dtype)
    scores = head_importance(loaded, args.importance)
    if args.prompt_file:
        text = cli.decoded(Path(args.prompt_file).read_bytes(), args.prompt_file)
        ids = loaded.chat.encode([{"role": "user", "content": text}])
        what = Path(args.prompt_file).name
    else:
        where = {"split": "tune", "task": "prose", "kind": "code", "seed": "plot"}
        ids = make_prompt(loaded.tokenizer, loaded.chat, tokens=args.tokens, depth=0.5, **where).ids
        what = "a needle in prose"
    if len(ids) > loaded.config.max_position:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, {loaded.name} takes {loaded.config.max_position}: shorten it"
        )
    with cli.waiting("Compressing"):
        kept = budgets(loaded, ids, cache=args.cache, allocators=args.allocators, budget=args.budget, scores=scores)
        subtitle = f"Tokens kept of {len(ids):,} ({what}), {args.budget} per KV head on average, scores of {args.cache}"
        draw(args.output, scores, kept, budget=args.budget, title=f"Heads of {loaded.name}", subtitle=subtitle)


if __name__ == "__main__":
    sys.exit(main())
