"""Two caches on the same prompts: which answers only one of them has right, and whether that can be chance.

    python -m recipes.compare headkv snapkv:preset=tuned

McNemar's test asks how often a fair coin would divide those answers as unevenly. Where answers can be right in part, as
RULER's, it counts who has more of each and not by how much, and so is a sign test. The likelihood of the gold answer
says more about fewer prompts, as it differs everywhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recipes.standings import SCORES, Pooled, bootstrap, parts, pool, read_scores
from zoo import cli


def mcnemar(one: int, other: int) -> float:
    """Exact two-sided p-value of answers that only one of two caches has right being divided like this.

    Args:
        one: answers that only one has right.
        other: answers that only the other has right.

    Returns:
        The chance of a division at least as uneven if both were alike.

    Source:
        McNemar, Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages, 1947; the
        exact form is the binomial test of `one` out of `one + other`.

    Example:
        >>> mcnemar(6, 0), mcnemar(0, 5), mcnemar(3, 3)
        (0.03125, 0.0625, 1.0)
    """
    count = one + other
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(min(one, other) + 1)) * 0.5**count)


def line(a: Pooled, b: Pooled) -> str:
    """What two caches did on the prompts that both have, as cells of a table."""
    shared = [(a.results[prompt], b.results[prompt]) for prompt in a.results if prompt in b.results]
    only_a, only_b = sum(x > y for (x, _), (y, _) in shared), sum(x < y for (x, _), (y, _) in shared)
    less = [x - y for (_, x), (_, y) in shared]
    low, high = bootstrap(less)
    change = f"{sum(less) / len(less):+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{len(shared)} | {only_a} | {only_b} | {mcnemar(only_a, only_b):.2g} | {change}"


def tables(rows: Iterable[dict[str, Any]], a: str, b: str) -> str:
    """Compare two caches at every budget that both have.

    Args:
        rows: of `recipes.leaderboard`.
        a: name of a cache.
        b: name of the other.

    Returns:
        Markdown, a table for each length of prompts and way of asking.

    Raises:
        ValueError: the rows have nothing to compare.
    """
    lines, names = [], set()
    for (tokens, question), part in parts(rows).items():
        cells = pool(part)
        names |= {cache for _, cache in cells}
        budgets = sorted(
            budget
            for budget, cache in cells
            if cache == a and (budget, b) in cells and cells[budget, a].results.keys() & cells[budget, b].results.keys()
        )
        if budgets:
            lines += ["", f"## {tokens:,} tokens, question {question}", ""]
            lines += ["| tokens per KV head | prompts | only A right | only B right | p (McNemar) | NLL, A - B |"]
            lines += ["|---" * 6 + "|"]
            lines += [f"| {budget} | {line(cells[budget, a], cells[budget, b])} |" for budget in budgets]
    if unknown := {a, b} - names:
        raise ValueError(f"no row has {' or '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    if not lines:
        raise ValueError(f"{a} and {b} have no prompt in common at a budget that both have")
    head = [
        f"A is `{a}`, B `{b}`. An answer that is right in part counts for who has more of it, by however little: p is",
        "then that of a sign test. NLL: nats per token of the gold answer, negative where A is better, with a 95 %",
        "bootstrap interval over prompts. p is not corrected for how many comparisons are looked at.",
    ]
    return "\n".join([*head, *lines]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return cli.run("recipes.compare", lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m recipes.compare", description=__doc__.splitlines()[0])
    parser.add_argument("a", metavar="A", help="cache, as its rows name it")
    parser.add_argument("b", metavar="B", help="cache to compare it with")
    parser.add_argument("--scores", type=Path, default=SCORES, help="jsonl file of recipes.leaderboard")
    args = parser.parse_args(argv)
    print(tables(read_scores(args.scores), args.a, args.b), end="")


if __name__ == "__main__":
    sys.exit(main())
