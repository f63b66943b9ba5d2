"""Pictures and tables are made of the rows that recipes write."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

import recipes.compare as compare
import recipes.plot as plot
import recipes.report as report
import recipes.standings as standings

RESULTS = Path(__file__).parents[1] / "recipes" / "results"
PEERS, HEADS = RESULTS / "bench_peers.jsonl", RESULTS / "heads.png"


@pytest.fixture
def needles(tmp_path):
    rows = [
        {
            "tokens": tokens,
            "question": question,
            "prompt_sha256": f"{tokens}/{index}",
            "model": "some",
            "dtype": "float32",
            "split": "tune",
            "seed": 0,
            "index": index,
            "commit": "abc",
            "command": "python -m recipes.leaderboard",
            "task": "noise",
            "kind": "number",
            "depth": (index + 0.5) / 6,
            "mebibytes": {"full": {str(tokens): 9.0}, "headkv": {"32": 1.0, "64": 2.0}},
            "results": {"full": {str(tokens): [1, 0.1]}, "headkv": {"32": [index % 2, 0.5], "64": [1, 0.2]}},
        }
        for tokens in (100, 200)
        for question in ("seen", "unseen")
        for index in range(6)
    ]
    file = tmp_path / "needles.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_report_holds_all_pictures(needles, tmp_path, capsys):
    arguments = ["--scores", str(needles), "--peers", str(PEERS), "--heads", str(HEADS), "--budget", "64"]
    assert plot.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    names = [f"quality_{n}_{q}" for q in ("seen", "unseen") for n in (100, 200)]
    names += ["depths_64_seen", "depths_64_unseen", "speed"]
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == set(names)
    report = (tmp_path / "out" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == len(names) + 1 and "http" not in report
    assert base64.b64encode(HEADS.read_bytes()).decode() in report
    assert "8 pictures" in capsys.readouterr().out


def test_quality_shows_the_numbers(needles):
    rows = [row for row in plot.read_rows(needles) if row["tokens"] == 100 and row["question"] == "seen"]
    left, right = plot.quality(rows).axes
    accuracy, more_nll = (axes.lines[0].get_ydata().tolist() for axes in (left, right))
    assert accuracy == [0.5, 1.0] and more_nll == pytest.approx([0.4, 0.1])
    figure = plot.depths(plot.read_rows(needles)[:6] + plot.read_rows(needles)[12:18], 32)
    full, headkv, _ = figure.axes
    assert [axes.get_title() for axes in (full, headkv)] == ["full", "headkv"]
    assert [text.get_text() for text in full.texts] == 2 * ["1/1", "1/1", "2/2", "1/1", "1/1"]
    assert [text.get_text() for text in headkv.texts] == 2 * ["0/1", "1/1", "1/2", "0/1", "1/1"]
    assert [text.get_color() for text in headkv.texts[:3]] == ["white", "white", "black"]
    assert [label.get_text() for label in full.get_yticklabels()] == ["100", "200"]


def test_without_needles_there_are_no_depths(needles):
    needles.write_text("".join(json.dumps({**row, "depth": None}) + "\n" for row in plot.read_rows(needles)))
    assert all(name.startswith("quality") for name, _ in plot.figures(needles, None, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to plot"),
        (["--scores", "/nowhere.jsonl"], "no file /nowhere.jsonl"),
        (["--heads", str(PEERS)], "bench_peers.jsonl is no PNG"),
    ],
)
def test_what_cannot_be_plotted_is_said(arguments, message, capsys):
    assert plot.main(arguments) == 2
    assert message in capsys.readouterr().err


README = "Text.\n<!-- quality: begin -->\nold\n<!-- quality: end -->\nMore.\n"


def test_the_report_writes_tables_and_pictures(needles, tmp_path):
    """The best first, who was asked less behind, peers marked, a column for each budget, RULER's tasks left out."""
    rows = plot.read_rows(needles)
    for index, row in enumerate(rows):
        if (row["tokens"], row["question"]) == (100, "seen"):
            row["results"] |= {"kvpress:tova": {"128": [1, 0.098]}, **{f"none{i}": {"32": [0, 9]} for i in range(7)}}
            if index == 0:
                del row["results"]["headkv"]["64"]
            row["mebibytes"] |= {name: dict.fromkeys(budgets, 3.0) for name, budgets in row["results"].items()}
    other = rows[0] | {"task": "vt", "prompt_sha256": "vt", "results": {**rows[0]["results"], "headkv": {"32": [1, 0]}}}
    needles.write_text("".join(json.dumps(row) + "\n" for row in [*rows, other]))
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert report.main(["--scores", str(needles), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("Text.\n<!-- quality: begin -->\n**100 tokens, question seen**; the full cache has 6 of 6")
    assert text.endswith("<!-- quality: end -->\nMore.\n") and "old" not in text
    table, folded = text.split("<details><summary>1 more</summary>")
    assert table.splitlines()[2].endswith(
        " in 3.0 MiB ([picture](./quality_100_seen.png)). 95 % intervals: 3 of 6 right is 19 to 81 %, "
        "6 of 6 right is 61 to 100 % ([all](needles.md)):"
    )
    assert table.splitlines()[4:9] == [
        "| `--cache` | 32 | 64 | 128 | MiB at 128 |",
        "|---|---|---|---|---|",
        "| `kvpress:tova` † |  |  | 6, +0.00 | 3.0 |",
        "| `none0` | 0, +8.90 |  |  |  |",
        "| `none1` | 0, +8.90 |  |  |  |",
    ]
    assert folded.count("| `headkv` | 3, +0.40 | 5/5, +0.10 |  |  |") == 1
    assert folded.count("| `headkv` | 3, +0.40 | 6, +0.10 | 2.0 |") == 3
    assert "† A press of kvpress" in folded
    assert needles.with_suffix(".md").read_text().count("## ") == 4
    pictures = {f"quality_{n}_{q}.png" for q in ("seen", "unseen") for n in (100, 200)}
    assert {path.name for path in tmp_path.glob("*.png")} == pictures and all(f"/{name})" in text for name in pictures)
    readme.write_text(text.replace("3, +0.40", "4, +0.40"))
    assert report.texts(needles, readme)[readme] == text  # how tests/test_readme.py finds a number that was edited


def test_caches_are_ranked_by_the_budgets_that_all_have(needles):
    """Nor by how many budgets they have; one that was asked less, or keeps everything, does not compete."""
    rows = [row for row in report.read_scores(needles) if row["tokens"] == 100 and row["question"] == "seen"]
    right = {
        "many": {"32": 0, "64": 0.6, "92": 1, "128": 1},
        "kvpress:adakv": {"64": 0.8},
        "few": {"32": 1, "64": 0.7},
        "everything": {"100": 0.65},
    }
    for row in rows:
        row["results"] = {name: {b: [x, 1] for b, x in line.items()} for name, line in right.items()}
        row["results"]["full"] = {"100": [1, 0.1]}
        row["mebibytes"] = {name: dict.fromkeys(line, 1.0) for name, line in row["results"].items()}
    full, cells = standings.pool_beside_full(rows)
    assert standings.best_first(full, cells, 100) == ["kvpress:adakv", "few", "many", "everything"]
    labels = [line.get_label() for line in plot.quality(rows).axes[0].lines[:2]]
    assert labels == ["kvpress:adakv (hides tokens, frees none)", "few"]
    del cells[64, "kvpress:adakv"]
    cells[16, "kvpress:adakv"] = cells[32, "many"]
    assert standings.best_first(full, cells, 100) == ["few", "many", "kvpress:adakv", "everything"]
    for budget in (32, 64):
        cells[budget, "few"].results.popitem()
    assert standings.best_first(full, cells, 100) == ["many", "kvpress:adakv", "few", "everything"]


def test_reports_that_cannot_be_made_say_why(needles, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no comments")
    arguments = ["--scores", str(needles), "--readme", str(readme)]
    assert report.main(arguments) == 2 and "quality: begin" in capsys.readouterr().err
    needles.write_text(needles.read_text().replace("float32", "bfloat16", 1))
    assert report.main(arguments) == 2 and "mixes bfloat16 and float32 in dtype" in capsys.readouterr().err
    needles.write_text("")
    assert report.main(arguments) == 2 and "no rows in" in capsys.readouterr().err
    assert readme.read_text() == "no comments" and not needles.with_suffix(".md").exists()


@pytest.mark.parametrize(
    ("one", "other", "p"), [(0, 0, 1), (5, 0, 2 / 32), (0, 6, 2 / 64), (1, 8, 2 * 10 / 512), (10, 2, 2 * 79 / 4096)]
)
def test_mcnemar_equals_coins_counted_by_hand(one, other, p):
    assert compare.mcnemar(one, other) == pytest.approx(p)


def test_two_caches_are_compared_on_the_prompts_that_both_have(needles, capsys):
    """Of 10 shared prompts A alone has 8 right and B alone 1; likelihoods differ by .1 and by .1 or .3 nats."""
    arguments = ["a", "headkv", "--scores", str(needles)]
    first, rows = plot.read_rows(needles)[0], []

    def add(tokens, index, **results):
        mebibytes = {name: dict.fromkeys(budgets, 3.0) for name, budgets in results.items()}
        prompt = {"tokens": tokens, "index": index, "prompt_sha256": f"{tokens}/{index}"}
        rows.append(first | prompt | {"results": results, "mebibytes": mebibytes})

    for index in range(10):
        add(100, index, a={"32": [int(index < 8), 0.6], "16": [1, 1]}, headkv={"32": [int(index == 8), 0.5]})
    add(100, 10, a={"32": [1, 5]})
    for index in range(2):
        add(300, index, a={"64": [0.5, 0.6 + 0.2 * index]}, headkv={"64": [0.25, 0.5]})
    needles.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.main(arguments) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "sign test" in text
    assert [line for line in lines if line.startswith(("## ", "| 1", "| 3", "| 6"))] == [
        "## 100 tokens, question seen",
        "| 32 | 10 | 8 | 1 | 0.039 | +0.100 [+0.100, +0.100] |",
        "## 300 tokens, question seen",
        "| 64 | 2 | 2 | 0 | 0.5 | +0.200 [+0.100, +0.300] |",
    ]


def test_what_cannot_be_compared_is_said(needles, tmp_path, capsys):
    for names, message in (
        (("headkv", "nobody"), "no row has nobody; there are full, headkv"),
        (("headkv", "full"), "no prompt in common at a budget that both have"),
    ):
        assert compare.main([*names, "--scores", str(needles)]) == 2
        assert message in capsys.readouterr().err
    assert compare.main(["headkv", "full", "--scores", str(tmp_path / "none.jsonl")]) == 2
    assert "no rows in" in capsys.readouterr().err


def changed(needles, **changes):
    """Change the last row, or remove what is None."""
    *lines, last = needles.read_text().splitlines()
    row = {name: value for name, value in {**json.loads(last), **changes}.items() if value is not None}
    needles.write_text("".join(line + "\n" for line in (*lines, json.dumps(row))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "mixes bfloat16 and float32 in dtype"),
        ({"seed": 1}, "mixes 0 and 1 in seed"),
        ({"template_sha256": "t"}, "mixes None and t in template_sha256"),
        ({"importance_sha256": "i"}, "mixes None and i in importance_sha256"),
        ({"sharing_sha256": "s"}, "mixes None and s in sharing_sha256"),
        ({"index": 4}, "question 4 of noise at 200 tokens is not always the same, as with different --prompts"),
        ({"model": None, "question": None}, "line 24: not a row with model and question"),
    ],
)
def test_rows_that_cannot_be_told_together_are_refused(needles, tmp_path, capsys, changes, message):
    readme = tmp_path / "README.md"
    readme.write_text(README)
    changed(needles, **changes)
    scores = ["--scores", str(needles)]
    commands = [
        (plot, [*scores, "--output", str(tmp_path / "out")]),
        (report, [*scores, "--readme", str(readme)]),
        (compare, ["headkv", "full", *scores]),
    ]
    for module, arguments in commands:
        assert module.main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def test_old_rows_that_lack_what_could_not_be_set_yet_are_told_with_new_ones(needles, capsys):
    rows = report.read_scores(needles)
    needles.write_text("".join(json.dumps({**row, "sharing_sha256": None}) + "\n" for row in rows[:5]))
    with needles.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[5:])
    assert len(report.read_scores(needles)) == len(rows)


def test_files_that_hold_nothing_to_show_are_refused(needles, tmp_path, capsys):
    empty, out = tmp_path / "empty.jsonl", ["--output", str(tmp_path / "out")]
    empty.write_text("")
    for option in ("--scores", "--peers"):
        assert plot.main([option, str(empty), *out]) == 2
        assert "no rows in" in capsys.readouterr().err
    needles.write_bytes(needles.read_bytes() + b"\xff\xfe\n")
    assert plot.main(["--scores", str(needles), *out]) == 2
    assert "line 25: not a row" in capsys.readouterr().err
    changed_results = json.loads(needles.read_bytes().splitlines()[0])
    del changed_results["results"]["full"]
    needles.write_text(json.dumps(changed_results) + "\n")
    assert plot.main(["--scores", str(needles), *out]) == 2
    assert "no row of the full cache for 1 prompts, e.g. 100/0" in capsys.readouterr().err


def test_caches_without_a_prompt_in_common_are_not_compared(needles, capsys):
    rows = report.read_scores(needles)
    for row in rows:
        name = "a" if row["index"] < 3 else "b"
        row["results"], row["mebibytes"] = ({name: of["headkv"]} for of in (row["results"], row["mebibytes"]))
    needles.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.main(["a", "b", "--scores", str(needles)]) == 2
    assert "no prompt in common" in capsys.readouterr().err
