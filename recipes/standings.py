"""What the leaderboard's rows say: read, pooled by cache and budget, ranked, as a table.

A row is one question, asked in one way, and what every cache made of it; `recipes.leaderboard` writes them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

KEY = ("model", "dtype", "template_sha256", "importance_sha256", "sharing_sha256")  # what rows must share to be one run
RESULT = ("results", "prompt_sha256")  # what a row must have to be added to
SCORE = (
    *RESULT,
    "model",
    "dtype",
    "split",
    "seed",
    "tokens",
    "question",
    "task",
    "kind",
    "index",
    "depth",
    "mebibytes",
    "commit",
    "command",
)  # and to be told
SCORES = Path(__file__).with_name("results") / "leaderboard.jsonl"

PEERS_NOTE = [
    "Presses of kvpress keep as many tokens of what they compress; a question that comes later stays whole on top.",
    "Their MiB are what their caches take, for the first prompt: AdaKV hides tokens, but holds them all.",
    "",
]


def read_rows(path: Path, columns: tuple[str, ...] = RESULT) -> list[dict[str, Any]]:
    """Rows of a results file, each with at least some columns; none if there is no file.

    Raises:
        ValueError: a line is no row; says which.
    """
    return _rows(path, path.read_bytes() if path.exists() else b"", columns)


def _rows(path: Path, text: bytes, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if lacking := [column for column in columns if not isinstance(row, dict) or column not in row]:
            raise ValueError(f"{path}, line {number}: not a row with {' and '.join(lacking)}; mend or remove it")
        rows.append(row)
    return rows


def resume(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that more are to be added to; a last line that a kill cut off is dropped from the file.

    Raises:
        ValueError: another line is no row; says which.
    """
    text = path.read_bytes() if path.exists() else b""
    whole = text[: text.rfind(b"\n") + 1]
    last = text[len(whole) :]
    try:
        json.loads(last or b"{}")
        cut = False
    except (ValueError, RecursionError):
        cut = last.startswith(b"{")
    rows = _rows(path, whole if cut else text, RESULT)  # a file that is not ours is refused before it is changed
    if cut:
        os.truncate(path, len(whole))
        print(f"{path}: the last line was cut off and is dropped; its question is asked again", file=sys.stderr)
    elif last:
        with path.open("ab") as file:
            file.write(b"\n")
    return rows


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Rows that can be told together.

    Raises:
        ValueError: there are none, a line is damaged, or they are of several runs or sets of prompts.
    """
    rows = read_rows(path, SCORE)
    if not rows:
        raise ValueError(f"there are no rows in {path}: python -m recipes.leaderboard makes them")
    for name in (*KEY, "split", "seed"):
        if len(found := {str(row.get(name)) for row in rows}) > 1:  # old rows lack what was not there to be set
            raise ValueError(f"{path} mixes {' and '.join(sorted(found))} in {name}: give each a file of its own")
    prompts: dict[tuple[Any, ...], str] = {}
    for row in rows:
        place = tuple(row[name] for name in ("tokens", "task", "index"))
        if prompts.setdefault(place, row["prompt_sha256"]) != row["prompt_sha256"]:
            raise ValueError(
                f"{path} mixes sets of prompts: question {row['index']} of {row['task']} at {row['tokens']} tokens is "
                "not always the same, as with different --prompts: give each a file of its own"
            )
    return rows


def parts(rows: Iterable[dict[str, Any]]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Rows by length of the prompt and way of asking, in this order: what a table or a picture shows."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["tokens"], row["question"]), []).append(row)
    return dict(sorted(found.items()))


def pool(rows: Iterable[dict[str, Any]]) -> dict[tuple[int, str], Pooled]:
    """What every cache did, by budget and name, on prompts of one length and one way of asking."""
    cells: dict[tuple[int, str], Pooled] = {}
    for row in rows:
        for cache, by_budget in row["results"].items():
            for budget, (score, nll) in by_budget.items():
                cell = cells.setdefault((int(budget), cache), Pooled(row["mebibytes"][cache][budget]))
                cell.add(row, score, nll)
    return cells


def pool_beside_full(rows: Sequence[dict[str, Any]]) -> tuple[Pooled, dict[tuple[int, str], Pooled]]:
    """`pool`, the full cache apart.

    Raises:
        ValueError: the full cache lacks a prompt that another has.
    """
    cells = pool(rows)
    full = cells.pop((rows[0]["tokens"], "full"), Pooled(0))
    if missing := {row["prompt_sha256"] for row in rows} - full.results.keys():
        raise ValueError(f"there is no row of the full cache for {len(missing)} prompts, e.g. {min(missing)}")
    return full, cells


def common_budgets(cells: Mapping[tuple[int, str], Pooled], tokens: int) -> set[int]:
    """Budgets that every cache has which has any; none in common may be left.

    Args:
        cells: of `pool`.
        tokens: length of the prompts, which is the budget of a cache that keeps everything.
    """
    found: dict[str, set[int]] = {}
    for budget, cache in cells:
        if budget != tokens:
            found.setdefault(cache, set()).add(budget)
    return set.intersection(*found.values()) if found else set()


def best_first(full: Pooled, cells: Mapping[tuple[int, str], Pooled], tokens: int) -> list[str]:
    """Caches by accuracy, then likelihood: means over the budgets that all have, or else over those that each has.

    Those that were asked fewer questions than the full cache follow, and last those that keep every token.

    Args:
        full: the full cache.
        cells: of the others, see `pool`.
        tokens: length of the prompts.
    """
    common = common_budgets(cells, tokens)

    def place(cache: str) -> tuple[bool, bool, float, float, str]:
        line = {budget: cell for (budget, name), cell in cells.items() if name == cache}
        told = [cell for budget, cell in line.items() if budget in common] or list(line.values())
        fewer = any(len(cell.results) < len(full.results) for cell in told)
        wrong = round(sum(1 - cell.accuracy()[0] for cell in told) / len(told), 9)
        return set(line) == {tokens}, fewer, wrong, sum(cell.more_nll(full)[0] for cell in told) / len(told), cache

    return sorted({cache for _, cache in cells}, key=place)


class Pooled:
    """What a cache did on several prompts.

    Args:
        mebibytes: that the cache takes.

    Attributes:
        results: whether the answer was right and its negative log-likelihood in nats per token, by prompt.
    """

    def __init__(self, mebibytes: float) -> None:
        self.mebibytes = mebibytes
        self.results: dict[str, tuple[float, float]] = {}
        self._groups: dict[str, dict[str, list[float]]] = {"task": {}, "kind": {}}

    def add(self, row: dict[str, Any], score: float, nll: float) -> None:
        """Count a prompt, once."""
        if row["prompt_sha256"] not in self.results:
            self.results[row["prompt_sha256"]] = score, nll
            for name, group in self._groups.items():
                group.setdefault(row[name], []).append(score)

    @property
    def right(self) -> float:
        """Right answers, those that are right in part counted in part."""
        return sum(score for score, _ in self.results.values())

    def accuracy(self) -> tuple[float, float, float]:
        """Mean score and its 95 % interval."""
        scores = [score for score, _ in self.results.values()]
        whole = all(score in (0, 1) for score in scores)
        return self.right / len(scores), *(wilson(round(self.right), len(scores)) if whole else bootstrap(scores))

    def more_nll(self, full: Pooled) -> tuple[float, float, float]:
        """Nats per token above the full cache on the same prompts, and their 95 % interval."""
        more = [nll - full.results[prompt][1] for prompt, (_, nll) in self.results.items()]
        return sum(more) / len(more), *bootstrap(more)

    def brief(self, full: Pooled) -> str:
        """Right answers, of how many where not all were asked, and nats per token above the full cache."""
        asked = "" if len(self.results) == len(full.results) else f"/{len(self.results)}"
        change = round(self.more_nll(full)[0], 2) + 0.0  # no minus before a zero
        return f"{self.right:g}{asked}, {change:+.2f}"

    def line(self, budget: str, cache: str, full: Pooled) -> str:
        """A row of the table."""
        share, low, high = self.accuracy()
        accuracy = f"{self.right:g}/{len(self.results)} = {share:.2f} [{low:.2f}, {high:.2f}]"
        if self is full:
            change = f"(NLL {sum(nll for _, nll in self.results.values()) / len(self.results):.3f})"
        else:
            change = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*self.more_nll(full))
        of_full = sum(full.results[prompt][0] for prompt in self.results)
        part = f"{self.right / of_full:.0%}" if of_full else "-"
        fractions = (
            " ".join(f"{round(sum(x), 2):g}/{len(x)}" for x in group.values()) for group in self._groups.values()
        )
        cells = budget, f"{self.mebibytes:.1f}", f"`{cache}`", accuracy, part, change, *fractions
        return f"| {' | '.join(cells)} |"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Results as Markdown: one table per length of prompts and way of asking."""
    rows = list(rows)
    first = rows[0]
    commits = sorted({row["commit"] for row in rows})
    lines = [
        f"# Leaderboard: {first['model']}, {first['dtype']}, split `{first['split']}`, seed {first['seed']}",
        "",
        f"At {', '.join(commits)} (+: and what was not committed).",
        "",
        "Question seen: it is in the prompt, which is prefilled whole and compressed once;",
        "unseen: the context is compressed before the question comes, as a second turn. Accuracy: needles whose value",
        "is the most likely in every token, RULER's generated answers by string match; above the full cache it is not",
        "fidelity, as fewer tokens distract less. ΔNLL: nats per token of the gold answer above the full cache.",
        "Brackets: 95 % intervals (Wilson, bootstrap). The columns with fractions count by task and kind of fact.",
        "",
        *(PEERS_NOTE if any("versions" in row for row in rows) else []),
        *(f"    {command}" for command in sorted({row["command"] for row in rows})),
    ]
    for (tokens, question), part in parts(rows).items():
        full, cells = pool_beside_full(part)
        tasks, kinds = (" ".join(dict.fromkeys(row[name] for row in part)) for name in ("task", "kind"))
        lines += ["", f"## {tokens:,} tokens, question {question}, {len(full.results)} questions", ""]
        lines += [f"| tokens per KV head | MiB | cache | accuracy | of full | ΔNLL | {tasks} | {kinds} |"]
        lines += ["|---" * 8 + "|", full.line("all", "full", full)]
        lines += [cell.line(str(budget), cache, full) for (budget, cache), cell in sorted(cells.items())]
        lines += _refusals(part)
    return "\n".join(lines) + "\n"


def _refusals(rows: list[dict[str, Any]]) -> list[str]:
    reasons: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        for cache, by_budget in row.get("refused", {}).items():
            for budget, reason in by_budget.items():
                reasons.setdefault((cache, int(budget)), []).append(reason)
    return [
        f"\n`{cache}` at {budget} is left out in {len(found)}, e.g. as it {found[0]}"
        for (cache, budget), found in sorted(reasons.items())
    ]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share.

    Source:
        Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.

    Example:
        >>> [round(x, 3) for x in wilson(18, 24)]
        [0.551, 0.88]
    """
    z = 1.959964
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % confidence interval of a mean, by drawing the values anew; always the same for the same values.

    Example:
        >>> low, high = bootstrap([0.0, 1.0] * 12)
        >>> low < 0.5 < high
        True
    """
    rng = np.random.RandomState(0)  # numpy keeps what it draws from one version to the next
    low, high = np.quantile(rng.choice(values, (draws, len(values))).mean(1), [0.025, 0.975])
    return float(low), float(high)
