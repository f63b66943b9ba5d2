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

from recipes import leaderboard, plot
from recipes.leaderboard import SCORES, parts, pool_beside_full, read_scores
from recipes.needles import TASKS as NEEDLES
from zoo import cli

ROOT = Path(__file__).resolve().parents[1]
SECTION = re.compile(r"(?<=<!-- quality: begin -->\n).*(?=<!-- quality: end -->)", re.DOTALL)
OPEN = 8  # caches that a table shows without being unfolded


def quality(rows: Sequence[dict[str, Any]], pictures: str) -> str:
    """README's tables: right answers and likelihoods by cache and budget, the best caches first.

    Args:
        rows: of `recipes.leaderboard`.
        pictures: folder of the pictures, from where README is.

    Returns:
        Markdown, a table for each length of prompts and way of asking; what is not among the best is folded.
    """
    blocks = []
    for (tokens, question), part in needles(rows).items():
        full, cells = pool_beside_full(part)
        budgets = sorted({budget for budget, _ in cells})
        lines = []
        for cache in {cache for _, cache in cells}:
            line = [cells.get((budget, cache)) for budget in budgets]
            right = sum(cell.right for cell in line if cell)
            more = sum(cell.more_nll(full)[0] for cell in line if cell)
            mark = " †" if cache.startswith("kvpress:") else ""
            briefs = " | ".join(cell.brief(full) if cell else "" for cell in line)
            lines.append((-right, more, f"| `{cache}`{mark} | {briefs} |"))
        ranked = [text for *_, text in sorted(lines)]
        names = ("all" if budget == tokens else f"{budget:,}" for budget in budgets)
        head = [f"| `--cache` | {' | '.join(names)} |", "|---" * (1 + len(budgets)) + "|"]
        blocks += [
            f"**{tokens:,} tokens, question {question}**; the full cache has {full.right:g} of {len(full.results)} "
            f"right ([picture]({pictures}/{picture(tokens, question)})):",
            "",
            *(*head, *ranked[:OPEN], ""),
        ]
        if rest := ranked[OPEN:]:
            blocks += [f"<details><summary>{len(rest)} more</summary>", "", *head, *rest, "", "</details>", ""]
    if any("†" in line for line in blocks):
        blocks += ["† A press of kvpress. A question that it has not seen stays whole, on top of these tokens.", ""]
    return "\n".join([*blocks, ""])


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
    section = quality(rows, os.path.relpath(scores.parent, readme.parent))
    text, count = SECTION.subn(lambda _: section, readme.read_text())
    if count != 1:
        raise ValueError(f"{readme} needs the lines <!-- quality: begin --> and <!-- quality: end --> for its tables")
    return {readme: text, scores.with_suffix(".md"): leaderboard.table(rows)}


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = cli.Parser(prog="python -m recipes.report", description=__doc__.splitlines()[0])
    parser.add_argument("--scores", type=Path, default=SCORES, help="jsonl file of recipes.leaderboard")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the quality comments")
    try:
        args = parser.parse_args(argv)
        for path, text in texts(args.scores, args.readme).items():
            path.write_text(text)
        for (tokens, question), part in needles(read_scores(args.scores)).items():
            plot.quality(part).savefig(args.scores.parent / picture(tokens, question), dpi=110)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
