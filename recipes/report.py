"""README's quality tables, the leaderboard's own table and the pictures, all from the committed rows.

    python -m recipes.report

writes `leaderboard.md` and `quality_*.png` beside the rows, and README between its two `quality` comments.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes import plot, standings
from recipes.needles import TASKS as NEEDLES
from recipes.standings import SCORES, best_first, common_budgets, parts, pool_beside_full, read_scores
from zoo import cli

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"(?<=<!-- quality: begin -->\n).*(?=<!-- quality: end -->)", re.DOTALL)
OPEN = 8  # caches that a table shows without being unfolded


def quality(rows: Sequence[dict[str, Any]], pictures: str, table: str) -> str:
    """README's tables: right answers and likelihoods by cache and budget, the best caches first; see `best_first`.

    Args:
        rows: of `recipes.leaderboard`.
        pictures: folder of the pictures, from where README is.
        table: the file with all intervals, from there too.

    Returns:
        Markdown, a table for each length of prompts and way of asking; what is not among the best is folded.
    """
    blocks = []
    for (tokens, question), part in needles(rows).items():
        full, cells = pool_beside_full(part)
        budgets = sorted({budget for budget, _ in cells})
        size = max(common_budgets(cells, tokens), default=max(budgets, default=tokens))
        ranked = []
        for cache in best_first(full, cells, tokens):
            line = [cells.get((budget, cache)) for budget in budgets]
            sized = cells.get((size, cache)) or cells.get((tokens, cache))
            mark = " †" if cache.startswith("kvpress:") else ""
            briefs = (cell.brief(full) if cell else "" for cell in line)
            mebibytes = f"{sized.mebibytes:.1f}" if sized else ""
            ranked.append(f"| `{cache}`{mark} | {' | '.join([*briefs, mebibytes])} |")
        names = ("all" if budget == tokens else f"{budget:,}" for budget in budgets)
        head = [f"| `--cache` | {' | '.join(names)} | MiB at {size:,} |", "|---" * (2 + len(budgets)) + "|"]
        asked = len(full.results)
        blocks += [
            f"**{tokens:,} tokens, question {question}**; the full cache has {full.right:g} of {asked} right in "
            f"{full.mebibytes:.1f} MiB ([picture]({pictures}/{picture(tokens, question)})). 95 % intervals: "
            f"{interval(asked // 2, asked)}, {interval(round(full.right), asked)} ([all]({table})):",
            "",
            *(*head, *ranked[:OPEN], ""),
        ]
        if rest := ranked[OPEN:]:
            blocks += [f"<details><summary>{len(rest)} more</summary>", "", *head, *rest, "", "</details>", ""]
    if any("†" in line for line in blocks):
        blocks += ["† A press of kvpress. A question that it has not seen stays whole, on top of these tokens.", ""]
    return "\n".join([*blocks, ""])


def interval(right: int, asked: int) -> str:
    """Right answers with the share that they can stand for.

    Example:
        >>> interval(20, 40)
        '20 of 40 right is 35 to 65 %'
    """
    low, high = standings.wilson(right, asked)
    return f"{right} of {asked} right is {100 * low:.0f} to {100 * high:.0f} %"


def needles(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """What is shown: rows of needles by length and way of asking."""
    return parts(row for row in rows if row["task"] in NEEDLES)


def picture(tokens: int, question: str) -> str:
    """Name of the file that shows one table."""
    return f"quality_{tokens}_{question}.png"


def texts(scores: Path, readme: Path) -> dict[Path, str]:
    """What the rows make of the files that hold tables.

    Raises:
        ValueError: rows are missing, damaged or of several runs that do not compare; README lacks the comments.
    """
    rows = read_scores(scores)
    table = scores.with_suffix(".md")
    section = quality(rows, *(os.path.relpath(path, readme.parent) for path in (scores.parent, table)))
    text, count = SECTION.subn(lambda _: section, readme.read_text())
    if count != 1:
        raise ValueError(f"{readme} needs the lines <!-- quality: begin --> and <!-- quality: end --> for its tables")
    return {readme: text, table: standings.table(rows)}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return cli.run("recipes.report", lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m recipes.report", description=__doc__.splitlines()[0])
    parser.add_argument("--scores", type=Path, default=SCORES, help="jsonl file of recipes.leaderboard")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the quality comments")
    args = parser.parse_args(argv)
    for path, text in texts(args.scores, args.readme).items():
        path.write_text(text)
    for (tokens, question), part in needles(read_scores(args.scores)).items():
        plot.quality(part).savefig(args.scores.parent / picture(tokens, question), dpi=110)


if __name__ == "__main__":
    sys.exit(main())
