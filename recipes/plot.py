"""Pictures of what was measured, and one HTML page that shows them all.

    python -m recipes.plot --scores recipes/results/leaderboard.jsonl --peers recipes/results/bench_peers.jsonl

Quality against bytes for every cache, needles by depth, and decoding time by context beside other programs. The page
needs no other file. `--heads recipes/results/heads.png` adds a picture of `recipes.plot_heads`.
"""

from __future__ import annotations

import base64
import html
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.standings import best_first, pool_beside_full, read_rows, read_scores
from zoo import cli

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS = 5
TIMES = ("decode_ms", "decode_ms_p10", "decode_ms_p90")
SPEED = ("model", "dtype", "batch", "contender", "cache", "budget", "context", "threads", "machine", *TIMES)
MARKERS = "osD^v<>PX*phd"


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: run `pip install -c constraints.txt -e '.[plot]'`") from None
    return Figure(figsize=(width, height), layout="constrained")


def _style(number: int) -> dict[str, Any]:
    return {
        "color": f"C{number % 10}",
        "alpha": 1.0 if number < 10 else 0.55,
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
    }


def quality(rows: list[dict[str, Any]]) -> Figure:
    """Accuracy and log-likelihood against the bytes of the cache, a line per method, the full cache as a dotted line.

    Args:
        rows: of `recipes.leaderboard`, all of one length and one way of asking.
    """
    (full, cells), first = pool_beside_full(rows), rows[0]
    caches = best_first(full, cells, first["tokens"])
    figure = _figure(17, max(6.5, 1 + 0.19 * len(caches)))  # so that the legend fits
    left, right = figure.subplots(1, 2)
    for number, cache in enumerate(caches):
        line = [cell for (_, name), cell in sorted(cells.items()) if name == cache]
        apart = 1 + 0.14 * (number / len(caches) - 0.5)
        sizes = [cell.mebibytes * apart for cell in line]
        for axes, values in ((left, [c.accuracy() for c in line]), (right, [c.more_nll(full) for c in line])):
            middle, low, high = zip(*values, strict=True)
            dashes = "--" if cache.startswith("kvpress:") else "-"
            hides = " (hides tokens, frees none)" if cache.startswith("kvpress:adakv") else ""
            axes.plot(sizes, middle, label=cache + hides, linewidth=1.4, linestyle=dashes, **_style(number))
            axes.vlines(sizes, low, high, color=_style(number)["color"], alpha=0.35, linewidth=1)
    left.axhline(full.accuracy()[0], color="black", linestyle=":", label="full")
    right.axhline(0, color="black", linestyle=":")
    left.set_title("accuracy")
    right.set_title("ΔNLL, nats per token (logarithmic beyond 0.1)")
    right.set_yscale("symlog", linthresh=0.1)
    ticks: list[float] = []
    for size in sorted(cell.mebibytes for cell in cells.values()):
        if not ticks or size > 1.15 * ticks[-1]:  # labels that do not touch
            ticks.append(size)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{x:.1f}" for x in ticks], rotation=60, fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("MiB of cache with room for the answer (points moved apart)")
        axes.grid(alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(
        f"{first['model']}, {first['tokens']:,} tokens, question {first['question']}, split {first['split']}, "
        f"{len(full.results)} questions; vertical lines: 95 % intervals",
        x=0.37,
    )
    return figure


def depths(rows: list[dict[str, Any]], budget: int) -> Figure:
    """Accuracy by depth of the needle and length of the prompt, a panel per cache.

    Args:
        rows: of `recipes.leaderboard`, all of one way of asking, with needles among them.
        budget: tokens per KV head.
    """
    cells: dict[tuple[str, int], list[list[int]]] = {}
    for row in rows:
        for cache, by_budget in row["results"].items():
            wanted = str(row["tokens"]) if cache == "full" else str(budget)
            if wanted in by_budget and row["depth"] is not None:
                line = cells.setdefault((cache, row["tokens"]), [[] for _ in range(DEPTHS)])
                line[min(int(row["depth"] * DEPTHS), DEPTHS - 1)].append(by_budget[wanted][0])
    caches = sorted({cache for cache, _ in cells}, key=lambda cache: (cache != "full", cache))
    lengths = sorted({tokens for _, tokens in cells})
    across = min(4, len(caches))
    down = math.ceil(len(caches) / across)
    figure = _figure(1.5 + 2.8 * across, 1 + (0.6 + 0.3 * len(lengths)) * down)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    for number, (axes, cache) in enumerate(zip(panels, caches, strict=False)):
        lines = [cells.get((cache, tokens), [[]] * DEPTHS) for tokens in lengths]
        share = [[sum(hits) / len(hits) if hits else float("nan") for hits in line] for line in lines]
        image = axes.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, line in enumerate(lines):
            for x, hits in enumerate(line):
                color = "white" if abs(share[y][x] - 0.5) > 0.4 else "black"  # both ends of the colors are dark
                text = f"{sum(hits):g}/{len(hits)}" if hits else ""
                axes.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
        axes.set_title(cache, fontsize=8)
        axes.set_xticks(range(DEPTHS), [f"{i / DEPTHS:.0%} …" for i in range(DEPTHS)], fontsize=8)
        axes.tick_params(labelbottom=number + across >= len(caches))  # the lowest of its column
        axes.set_yticks(range(len(lengths)), [f"{tokens:,}" for tokens in lengths], fontsize=8)
    for axes in panels[len(caches) :]:
        axes.set_axis_off()
    figure.supxlabel("depth of the needle in the context, from … on", fontsize=9)
    figure.supylabel("tokens", fontsize=9)
    figure.suptitle(f"Right answers at {budget} tokens per KV head, question {rows[0]['question']}, {rows[0]['model']}")
    figure.colorbar(image, ax=panels, label="accuracy")
    return figure


def speed(rows: list[dict[str, Any]]) -> Figure:
    """Decoding time against context, ours and other programs', a panel per dtype.

    Args:
        rows: of `bench_peers`.
    """

    def name_of(row: dict[str, Any]) -> str:
        return f"{row['contender']} {row['cache']}" + (f", {row['budget']}" if row["budget"] else "")

    dtypes, names = (list(dict.fromkeys(x)) for x in ((row["dtype"] for row in rows), map(name_of, rows)))
    figure = _figure(6.5 * len(dtypes), 5)
    panels = figure.subplots(1, len(dtypes), squeeze=False)
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["dtype"] == dtype and row["batch"] == 1:
                lines.setdefault(name_of(row), []).append(row)
        for name, line in lines.items():
            style = _style(2 * names.index(name))
            line.sort(key=lambda row: row["context"])
            context, middle = [row["context"] for row in line], [row["decode_ms"] for row in line]
            axes.plot(context, middle, label=name, **style)
            low, high = ([row[f"decode_ms_{end}"] for row in line] for end in ("p10", "p90"))
            axes.fill_between(context, low, high, color=style["color"], alpha=0.12)
        axes.set_xscale("log", base=2)
        axes.set_xticks(context := sorted({row["context"] for row in rows}), [f"{n:,}" for n in context])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of context")
        axes.set_ylabel("ms per token (median; band: 10 to 90 %)")
        axes.set_title(f"{dtype}, {rows[0]['threads']} threads of {rows[0]['machine']['cpu']}")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(f"Decoding {rows[0]['model']}, batch 1")
    return figure


def figures(scores: Path | None, peers: Path | None, budget: int) -> Iterator[tuple[str, Figure]]:
    """All pictures that the files have numbers for, with their names.

    Raises:
        ValueError: a file has no rows, a line that is none (says which), or rows that cannot be told together.
    """
    rows = read_scores(scores) if scores else []
    for question in sorted({row["question"] for row in rows}):
        asked = [row for row in rows if row["question"] == question]
        for tokens in sorted({row["tokens"] for row in asked}):
            yield f"quality_{tokens}_{question}", quality([row for row in asked if row["tokens"] == tokens])
        if any(row["depth"] is not None for row in asked):
            yield f"depths_{budget}_{question}", depths(asked, budget)
    if peers:
        measured = read_rows(peers, SPEED)
        if not measured:
            raise ValueError(f"there are no rows in {peers}: python -m recipes.bench_peers makes them")
        yield "speed", speed(measured)


def page(pictures: dict[str, Path]) -> str:
    """One HTML page with the pictures inside."""
    parts = [
        f'<h2>{html.escape(name.replace("_", " "))}</h2>\n<img alt="{html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for name, path in pictures.items()
    ]
    style = "body{font-family:sans-serif;max-width:1300px;margin:auto}img{max-width:100%}"
    head = f'<meta charset="utf-8"><title>headkv-zoo: what was measured</title><style>{style}</style>'
    return f"<!doctype html>\n{head}\n<h1>headkv-zoo: what was measured</h1>\n" + "\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return cli.run("recipes.plot", lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m recipes.plot", description=__doc__.splitlines()[0])
    parser.add_argument("--scores", type=Path, help="jsonl file of recipes.leaderboard")
    parser.add_argument("--peers", type=Path, help="jsonl file of recipes.bench_peers")
    parser.add_argument("--heads", type=Path, help="PNG of recipes.plot_heads, for the page")
    parser.add_argument(
        "--budget", type=cli.whole_number(1), default=64, help="tokens per KV head in the picture of depths"
    )
    parser.add_argument("--output", type=Path, default=Path("plots"), help="folder for the pictures and report.html")
    args = parser.parse_args(argv)
    if not (given := [path for path in (args.scores, args.peers, args.heads) if path]):
        raise ValueError("there is nothing to plot: give --scores, --peers or --heads")
    for path in given:
        if not path.exists():
            raise ValueError(f"there is no file {path}")
    if args.heads and not args.heads.read_bytes().startswith(b"\x89PNG"):
        raise ValueError(f"{args.heads} is no PNG: python -m recipes.plot_heads --output heads.png makes one")
    args.output.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in figures(args.scores, args.peers, args.budget):
        pictures[name] = args.output / f"{name}.png"
        figure.savefig(pictures[name], dpi=110)
    if args.heads:
        pictures["heads"] = args.heads
    report = args.output / "report.html"
    report.write_text(page(pictures))
    print(f"{len(pictures)} pictures: {report}")


if __name__ == "__main__":
    sys.exit(main())
