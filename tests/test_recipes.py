"""Recipes compute what they say: scores as the formulas, replay as the engine; splits stay apart; every flag works."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

import recipes.bench_compression as bench_compression
import recipes.calibrate_heads as calibrate_heads
import recipes.leaderboard as leaderboard
import recipes.perplexity as perplexity
import recipes.plot_heads as plot_heads
import recipes.worker as worker
from checkpoints import CheckpointError, config_hash, read_importance
from checkpoints.sharing import LayerSharing, write_sharing
from layers.methods import build_method
from recipes.needles import SPLITS, TASKS, NeedlePrompt, make_prompt, make_prompts
from recipes.questions import make_questions
from recipes.replay import Record, Replay, answer, generate
from tests import tiny, tiny_chat
from zoo import Engine, Loaded, load
from zoo.load import head_importance

LENGTH = 200


class Words:
    """A tokenizer for tests: one id per word, digit or sign, and a space belongs to the word behind it."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [sum(piece.encode()) % 97 for piece in re.findall(r" ?[^\W\d]+|\s|.", text)]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    special_tokens = MappingProxyType({"<user>": 0})

    def texts(self) -> list[str]:
        return [" word", "word", ".", "\n"] * 24 + [" last"]

    def fingerprint(self) -> str:
        return "words"


CHAT = SimpleNamespace(
    render=lambda messages: f"<user>{messages[0]['content']}<bot>",
    encode=lambda messages: Words().encode(messages[0]["content"]),
    stop_ids=frozenset(),
    template_hash="none",
)


@pytest.fixture(scope="module", params=["llama", "qwen2-window-mixed"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    family, _, feature = request.param.partition("-")
    config = tiny.config_json(family, feature or "plain") | {"max_position_embeddings": 2 * LENGTH}
    model = tiny.load(tiny.write(tmp_path_factory.mktemp(family), config))
    return replace(model, name=family, tokenizer=Words(), chat=CHAT)


@pytest.fixture
def importance(loaded: Loaded, tmp_path: Path) -> Path:
    """Scores that differ from head to head."""
    torch.manual_seed(0)
    table = torch.rand(loaded.config.num_layers, loaded.config.num_heads).tolist()
    file = tmp_path / "importance.json"
    file.write_text(
        json.dumps(
            {
                "version": 1,
                "model_id": loaded.name,
                "config_hash": config_hash(loaded.config),
                "tokenizer_hash": "words",
                "methods": {
                    **{kind: {"trials": 9, "scores": table} for kind in ("r", "r2", "semantic")},
                    "layer_errors": {"trials": 9, "scores": [row[0] for row in table]},
                },
            }
        )
    )
    return file


def prompt(split: str = "tune", task: str = "prose", kind: str = "code", **changes: Any) -> NeedlePrompt:
    arguments = {"tokens": LENGTH, "depth": 0.5, "seed": "0"} | changes
    return make_prompt(Words(), CHAT, split=split, task=task, kind=kind, **arguments)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_prompts_hold_the_needle_where_they_say(split: str, task: str) -> None:
    for made in make_prompts(Words(), CHAT, split=split, task=task, tokens=LENGTH, count=10, seed=3):
        assert LENGTH - 40 < len(made.ids) <= LENGTH
        assert [made.ids[place] for place in made.gold] == made.value
        assert made.ids[made.gold.start - 1] == made.lead[-1]
        assert made.statement.start <= made.gold.start - len(made.lead) and made.statement.stop > made.gold.stop
        before, last = made.ids[made.statement.start - 1], made.ids[made.statement.stop - 1]
        assert before in (ord("."), ord("\n")) and last == ord(".")  # whole sentences


def test_prompts_depend_on_the_seed_alone() -> None:
    assert prompt() == prompt()
    assert prompt(seed="1").ids != prompt().ids


def test_splits_share_no_text() -> None:
    texts = [
        {*split.noise, *split.prose, *(w for words in split.words.values() for w in words)} for split in SPLITS.values()
    ]
    assert len(set().union(*texts)) == sum(map(len, texts))


def test_a_prompt_that_is_too_short_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"no room.*at least \d+"):
        prompt(tokens=10)


def test_scores_equal_a_naive_loop_over_the_formulas() -> None:
    torch.manual_seed(1)
    heads, steps, tokens, gold = 5, 4, 12, range(3, 7)
    ids = torch.randint(0, 3, (tokens,))  # few different tokens, so that copies do happen
    answer = ids[gold.start : gold.stop]
    weight = torch.rand(heads, steps, tokens).pow(4)
    weight[:, :, gold] *= 2
    weight /= weight.sum(-1, keepdim=True)
    r, r2 = [0.0] * heads, [0.0] * heads
    for head in range(heads):
        for step in range(steps):
            ranked = sorted(range(tokens), key=lambda place: -float(weight[head, step, place]))
            if ranked[0] in gold and ids[ranked[0]] == answer[step]:
                r[head] += 1 / len(gold)
            for place in ranked[: len(gold)]:
                if place in gold:
                    r2[head] += float(weight[head, step, place]) / len(gold)
    found_r, found_r2 = calibrate_heads.retrieval_scores(weight, ids, answer, gold)
    assert 0 < sum(r) < heads
    torch.testing.assert_close(found_r, torch.tensor(r))
    torch.testing.assert_close(found_r2, torch.tensor(r2))


def test_semantic_scores_equal_a_naive_loop_over_the_formula() -> None:
    torch.manual_seed(2)
    heads, steps, tokens, statement = 3, 5, 14, range(4, 10)
    ids, answer = torch.randint(0, 4, (tokens,)), torch.randint(0, 6, (steps,))  # some occur often, some not at all
    weight = torch.rand(heads, steps, tokens).softmax(-1)
    want = [0.0] * heads
    for head in range(heads):
        for step in range(steps):
            for place in statement:
                if ids[place] == answer[step]:
                    want[head] += sum(float(weight[head, step, j]) for j in statement)
    assert {sum(int(ids[place] == token) for place in statement) for token in answer} >= {0, 2}
    torch.testing.assert_close(
        calibrate_heads.semantic_scores(weight, ids, answer, statement), torch.tensor(want), atol=1e-6, rtol=1e-5
    )


def attention(q_D: torch.Tensor, k_SD: torch.Tensor) -> torch.Tensor:
    return (k_SD @ q_D / len(q_D) ** 0.5).softmax(0)


def in_sight(places: Iterable[int], row: int, sliding: int | None) -> list[int]:
    return [j for j in places if j <= row and (sliding is None or j > row - sliding)]


def test_compression_errors_equal_a_naive_loop(loaded: Loaded) -> None:
    """Step by step and head by head, from the keys and values of a plain pass."""
    made, count, heads_in_all = prompt("calibrate", kind="city"), 32, loaded.config.num_heads
    torch.manual_seed(3)
    semantic = torch.rand(loaded.config.num_layers, heads_in_all)
    method = build_method("compresskv:allocator=uniform,heads=2", {"semantic": semantic})
    got = calibrate_heads.compression_errors(loaded, made, method)
    ids, n = made.ids + made.lead + made.value[:-1], len(made.ids)
    record, group = Record(loaded, ids), heads_in_all // loaded.config.num_kv_heads
    for index, (layer, block) in enumerate(zip(record.layers, loaded.model.blocks, strict=True)):
        q, k, v = layer.q_BTND[0], layer.k_BHSD[0], layer.v_BHSD[0]
        votes = [0.0] * n
        for head in semantic[index].argsort(descending=True).tolist()[:2]:
            weights = [0.0] * n
            for row in range(n - 8, n):
                places = in_sight(range(n), row, layer.sliding)
                seen = attention(q[row, head], k[head // group, places])
                for j, weight in zip(places, seen.tolist(), strict=True):
                    weights[j] += weight * (j < n - 8)
            for j in range(n):
                votes[j] += sum(weights[max(0, j - 2) : j + 3])
        best = sorted(range(n - 8), key=lambda j: (-votes[j], j))[: count - 8]
        error = 0.0
        for row in range(n, len(ids)):
            out = []
            for kept in (range(n), [*best, *range(n - 8, n)]):
                places = in_sight([*kept, *range(n, len(ids))], row, layer.sliding)
                heads = [
                    attention(q[row, head], k[head // group, places]) @ v[head // group, places]
                    for head in range(heads_in_all)
                ]
                out.append(block.attention.out(torch.cat(heads)[None])[0])
            error += float((out[0] - out[1]).norm() / (out[0].norm() + 1e-5))
        assert float(got[index]) == pytest.approx(error, rel=1e-3, abs=1e-5)
    assert got.max() > 0.05


def test_a_trial_looks_at_the_attention_that_the_model_computes(loaded: Loaded) -> None:
    """Rebuild every head's attention from the recorded queries and keys of a plain pass, row by row."""
    made = prompt("calibrate")
    trial = calibrate_heads.run_trial(loaded, made)
    ids = made.ids + made.lead + made.value[:-1]
    record = Record(loaded, ids)
    for layer, part in enumerate(record.layers):
        group = loaded.config.num_heads // loaded.config.num_kv_heads
        for head in range(loaded.config.num_heads):
            rows = []
            for row in range(len(ids) - len(made.value), len(ids)):
                first = 0 if part.sliding is None else max(0, row + 1 - part.sliding)
                keys = part.k_BHSD[0, head // group, first : row + 1]
                weight = (keys @ part.q_BTND[0, row, head] / keys.shape[-1] ** 0.5).softmax(0)
                rows.append(torch.cat((torch.zeros(first), weight, torch.zeros(len(ids) - row - 1))))
            r, r2 = calibrate_heads.retrieval_scores(
                torch.stack(rows)[None], torch.tensor(ids), torch.tensor(made.value), made.gold
            )
            torch.testing.assert_close(trial.r2_LN[layer, head], r2[0])
            torch.testing.assert_close(trial.r_LN[layer, head], r[0])
            semantic = calibrate_heads.semantic_scores(
                torch.stack(rows)[None], torch.tensor(ids), torch.tensor(made.value), made.statement
            )
            torch.testing.assert_close(trial.semantic_LN[layer, head], semantic[0])


SPECS = [
    "headkv:window=16",
    "headkv:preset=published,beta=1.1,scores=r",
    "snapkv:window=8,recent=8",
    "snapkv:preset=adaptive",
    "streaming",
    "streaming:positions=in-cache",
    "adakv:preset=tuned",
    "pyramidkv:preset=tuned",
    "keydiff",
    "keydiff:allocator=adakv,alpha=0.1",
    "h2o",
    "h2o:allocator=headkv",
    "tova",
    "compresskv:preset=tuned",
    "headkv-r2:window=6,recent=6",
    "criticalkv+snapkv:preset=tuned",
    "criticalkv:alpha=0.2+adakv:preset=tuned",
    "expected-attention",
    "cake:window=8,recent=8",
    "cake:window=8,recent=8,cascade=false,compat=true",
]


@pytest.mark.parametrize("question", ["seen", "unseen"])
@pytest.mark.parametrize("spec", ["full", *SPECS])
def test_replay_equals_the_engine(loaded: Loaded, importance: Path, spec: str, question: str) -> None:
    made = prompt()
    ids, more = (made.ids, []) if question == "seen" else (made.ids[: made.question], made.ids[made.question :])
    said, budgets = made.lead + made.value, [LENGTH] if spec == "full" else [12, 40]
    engines = [
        Engine(loaded, cache=spec, budget=budget, max_new_tokens=len(said), importance=importance) for budget in budgets
    ]
    record = Record(loaded, made.ids).beginning(len(ids))
    replays = [
        Replay(record, engines[0].method, budgets[::order], room=len(said), later=len(more)) for order in (-1, 1)
    ]
    for replay in replays:
        if more:
            replay.extend(more)
    backwards, replayed = answer(replays, said)
    torch.testing.assert_close(backwards.flip(0), replayed)
    for engine, logits_AV in zip(engines, replayed, strict=True):
        logits = engine.prefill([ids])
        if more:
            logits = engine.extend([more])
        steps = [logits, *(engine.step([token]) for token in said[:-1])]
        torch.testing.assert_close(torch.cat(steps), logits_AV, atol=1e-5, rtol=0)
    if spec != "full":
        assert (replayed[0] - replayed[1]).abs().max() > 1e-3  # a small budget does change something


@pytest.fixture
def command_line(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    for module in (bench_compression, calibrate_heads, worker, plot_heads):
        monkeypatch.setattr(module, "load", lambda name, *, dtype, device="cpu": replace(loaded, name=name))
    return loaded


CALIBRATE = ["--model", "some", "--trials", "40", "--lengths", "150", "200", "--seed", "5", "--dtype", "float32"]


def test_calibration_writes_a_file_that_the_engine_takes(
    command_line: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The random model answers nothing, so here every trial counts."""
    monkeypatch.setattr(calibrate_heads, "ACCEPTED_SHARE", 0.0)
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        arguments = [*CALIBRATE, "--device", "cpu", "--threads", str(torch.get_num_threads()), "--output", str(file)]
        assert calibrate_heads.main(arguments) == 0
    assert "r2: 40 trials" in capsys.readouterr().out
    texts = [file.read_text().replace(file.name, "") for file in files]
    assert texts[0] == texts[1]
    assert {*tmp_path.iterdir()} == {*files}
    errors = read_importance(files[0], config=command_line.config, method="layer_errors").scores_LN
    assert sum(error for (error,) in errors) == pytest.approx(1, abs=1e-5)
    scores = read_importance(files[0], config=command_line.config, tokenizer_hash="words", method="r2")
    assert scores.trials == 40 and scores.provenance["seed"] == 5 and "--trials 40" in scores.provenance["command"]
    for cache in ("headkv:window=8", "compresskv:floor=8"):
        engine = Engine(command_line, cache=cache, budget=16, importance=files[0])
        engine.prefill([prompt().ids])
        assert len(set(engine.stats().kept.flatten().tolist())) > 1


def test_an_interrupted_calibration_goes_on(
    command_line: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate_heads, "ACCEPTED_SHARE", 0.0)
    file, whole = tmp_path / "one.json", tmp_path / "two.json"
    assert calibrate_heads.main([*CALIBRATE, "--output", str(whole)]) == 0
    count = {"run_trial": 0, "compression_errors": 0}

    def until(name: str, last: int) -> None:
        original = getattr(calibrate_heads, name)

        def limited(*arguments: Any) -> Any:
            if count[name] == last:
                raise KeyboardInterrupt
            count[name] += 1
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(calibrate_heads, name, limited)
            assert calibrate_heads.main([*CALIBRATE, "--output", str(file)]) == 2

    until("run_trial", 3)
    until("run_trial", 30)
    until("compression_errors", 2)
    assert count == {"run_trial": 30, "compression_errors": 2} and not file.exists()
    partial = tmp_path / "one.json.partial"
    left = partial.read_text()
    assert calibrate_heads.main([*CALIBRATE, "--seed", "6", "--output", str(file)]) == 2
    assert "left by a run with other settings" in capsys.readouterr().err and partial.read_text() == left
    partial.write_text(left[:-9])
    assert calibrate_heads.main([*CALIBRATE, "--output", str(file)]) == 2
    assert "damaged: remove it" in capsys.readouterr().err
    partial.write_text(left)
    assert calibrate_heads.main([*CALIBRATE, "--output", str(file)]) == 0
    assert file.read_text() == whole.read_text().replace("two.json", "one.json") and not partial.exists()


def test_plots_show_every_allocator(command_line: Loaded, importance: Path, tmp_path: Path, capsys: Any) -> None:
    picture, text = tmp_path / "heads.png", tmp_path / "text.txt"
    text.write_text("Some words. " * 60)
    arguments = ["--importance", str(importance), "--budget", "24", "--output", str(picture)]
    for more in (["--tokens", str(LENGTH)], ["--prompt-file", str(text), "--allocators", "adakv", "headkv"]):
        assert plot_heads.main([*arguments, *more, "--cache", "snapkv:window=8,recent=8"]) == 0
        assert picture.read_bytes()[:4] == b"\x89PNG"
        picture.unlink()
    capsys.readouterr()
    for wrong, message in (
        (["--budget", "7"], "always keeps 8 tokens"),
        (["--tokens", "9999"], "shorten it"),
        (["--cache", "full"], "no option"),
        (["--output", str(tmp_path / "no" / "x.png")], "there is no folder"),
        (["--output", str(tmp_path / "heads.xyz")], "not supported"),
    ):
        command = [*arguments, "--tokens", str(LENGTH), "--cache", "snapkv:window=8,recent=8", *wrong]
        assert plot_heads.main(command) == 2
        assert message in capsys.readouterr().err and not picture.exists()


def test_budgets_of_a_plot_are_those_of_the_engine(loaded: Loaded, importance: Path) -> None:
    made, cache, names = prompt(), "snapkv:window=8,recent=8", ["adakv", "compresskv", "uniform"]
    scores = head_importance(loaded, importance)
    kept = plot_heads.budgets(loaded, made.ids, cache=cache, allocators=names, budget=48, scores=scores)
    for name in names:
        engine = Engine(loaded, cache=f"{cache},allocator={name}", budget=48, importance=importance)
        engine.prefill([made.ids])
        assert torch.equal(kept[name], engine.stats().kept[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "answered only 0 plain questions in 40"),
        (["--lengths", "5000"], "5000 tokens.*shorten"),
        (["--lengths", "10"], "no room"),
    ],
)
def test_calibration_that_cannot_work_says_why(
    command_line: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    file = tmp_path / "scores.json"
    assert calibrate_heads.main([*CALIBRATE, *changes, "--output", str(file)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not file.exists()


def test_generating_equals_the_engine(loaded: Loaded, importance: Path) -> None:
    made, budgets = prompt(), [12, 40]
    engines = [Engine(loaded, cache="snapkv:preset=tuned", budget=b, max_new_tokens=9) for b in budgets]
    texts = [engine.generate([made.ids])[0] for engine in engines]
    replay = Replay(Record(loaded, made.ids), engines[0].method, budgets, room=9)
    for _ in range(2):  # the replay's own cache stays as it was
        many = [Replay(Record(loaded, made.ids[:40]), build_method("tova"), [1, 2, 3, 3], room=4) for _ in range(2)]
        assert len(answer(many, [3, 4])) == 2  # as many rows as the largest region has slots
        assert generate([replay], [], max_new_tokens=9, stop_ids=()) == [texts]
    (led,) = generate([replay], texts[1][:2], max_new_tokens=7, stop_ids=texts[1][5:6])
    assert led[1] == texts[1][2 : texts[1].index(texts[1][5], 2)]


def test_rulers_answers_are_generated(command_line: Loaded, importance: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    arguments = [*NEEDLES, "--tasks", "vt", "qa_hop", "--tokens", "380", "--caches", "streaming", "--verify", "1"]
    assert leaderboard.main([*arguments, "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["task"] for row in rows] == ["vt"] * 3 + ["qa_hop"] * 3 and rows[3]["depth"] is None
    assert all(0 <= row["results"]["streaming"]["16"][0] <= 1 < row["results"]["full"]["380"][1] for row in rows)


def test_shared_layers_go_through_engines(command_line: Loaded, importance: Path, tmp_path: Path) -> None:
    loaded, output, file = command_line, tmp_path / "out.jsonl", tmp_path / "sharing.json"
    write_sharing(
        file,
        LayerSharing(
            model_id=loaded.name,
            config_hash=config_hash(loaded.config),
            tokenizer_hash="words",
            num_layers=loaded.config.num_layers,
            pairs=((1, 0),),
            similarity=(0.9,),
        ),
    )
    caches = ["kvsharer:share=0.1", "kvsharer:share=0.1+snapkv:preset=tuned"]
    arguments = [*NEEDLES, "--tasks", "vt", "--tokens", "380", "--question", "seen", "unseen", "--caches", *caches]
    assert leaderboard.main([*arguments, "--sharing", str(file), "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [list(row["results"][cache]) for row in rows for cache in caches] == [["380"], ["16", "24"]] * 6
    question = make_questions(loaded.tokenizer, CHAT, split="test", task="vt", tokens=380, count=3, seed=7)[0]
    assert rows[0]["prompt_sha256"] == question.sha256 and question.example is not None
    engine = Engine(loaded, cache=caches[1], budget=16, max_new_tokens=64, max_context=400, sharing=file)
    logits_AV, text = worker.ask_engine(engine, question, "seen")
    expected = [round(question.score(Words().decode(text)), 4), round(question.likelihood(logits_AV)[1], 5)]
    assert rows[0]["results"][caches[1]]["16"] == expected
    _, text = worker.ask_engine(engine, replace(question, lead=[]), "seen")
    (same,) = engine.generate([question.context + question.question], max_new_tokens=question.example.max_new_tokens)
    assert text == same


NEEDLES = [
    "--model",
    "some",
    "--split",
    "test",
    "--tokens",
    str(LENGTH),
    "--prompts",
    "3",
    "--seed",
    "7",
    "--budgets",
    "16",
    "24",
]


def test_an_interrupted_leaderboard_says_where_it_goes_on(
    command_line: Loaded, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    output, rows = tmp_path / "out.jsonl", leaderboard.Worker.rows
    arguments = [*NEEDLES, "--caches", "keydiff", "--output", str(output)]

    def first(self: Any, job: Any) -> Any:
        if output.exists():
            raise KeyboardInterrupt
        return rows(self, job)

    with monkeypatch.context() as patch:
        patch.setattr(leaderboard.Worker, "rows", first)
        assert leaderboard.main(arguments) == 2
    assert f"interrupted: what is done is in {output}" in capsys.readouterr().err
    (before,) = output.read_text().splitlines()
    assert leaderboard.main(arguments) == 0
    assert output.read_text().splitlines()[0] == before and len(output.read_text().splitlines()) == 6


def test_evaluation_adds_what_is_missing_and_makes_a_table(
    command_line: Loaded, importance: Path, tmp_path: Path, capsys: Any
) -> None:
    output, table = tmp_path / "out.jsonl", tmp_path / "out.md"
    arguments = [
        *(*NEEDLES, "--question", "seen", "unseen", "--importance", str(importance), "--verify", "1"),
        *("--dtype", "float32", "--device", "cpu", "--threads", str(torch.get_num_threads())),
        *("--output", str(output), "--table", str(table)),
    ]
    assert leaderboard.main([*arguments, "--caches", "headkv:window=8", "adakv:preset=tuned"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 2 * 2 * 3
    assert {row["seed"] for row in rows} == {7} and {row["question"] for row in rows} == {"seen", "unseen"}
    assert {cache: list(row) for cache, row in rows[0]["results"].items()} == {
        "full": [str(LENGTH)],
        "headkv:window=8": ["16", "24"],
        "adakv:preset=tuned": ["16", "24"],
    }
    assert all("--verify 1" in row["command"] and row["template_sha256"] == "none" for row in rows)
    assert table.read_text().count("`headkv:window=8`") == 2 * 2
    before = table.read_text()
    assert leaderboard.main([*arguments, "--caches", "headkv:window=8", "adakv:preset=tuned"]) == 0
    assert len(output.read_text().splitlines()) == 12 and table.read_text() == before
    assert leaderboard.main([*arguments, "--caches", "headkv:window=8", "keydiff"]) == 0
    more = [json.loads(line) for line in output.read_text().splitlines()][12:]
    assert len(more) == 12 and all(list(row["results"]) == ["keydiff"] for row in more)
    assert "`keydiff`" in table.read_text() and "`full`" in table.read_text()
    output.write_text(output.read_text() + "{}\n")
    assert leaderboard.main([*arguments, "--caches", "keydiff"]) == 2
    assert "out.jsonl, line 25: not a row with results" in capsys.readouterr().err


def test_compression_is_timed_beside_its_prefill(
    command_line: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.json"
    arguments = ["--model", "some", "--tokens", "180", "--rounds", "2", "--threads", str(torch.get_num_threads())]
    arguments += ["--dtype", "float32", "--budget", "40", "--output", str(output)]
    assert bench_compression.main([*arguments, "--caches", "snapkv", "h2o"]) == 0
    made = json.loads(output.read_text())
    assert {name: len(values) for name, values in made["seconds"].items()} == {"prefill": 2, "snapkv": 2, "h2o": 2}
    assert all(value > 0 for values in made["seconds"].values() for value in values)
    assert "--budget 40" in made["command"] and "| `h2o` |" in capsys.readouterr().out
    for wrong, message in (
        (["--budget", "8"], "keeps 32 tokens per KV head (recent=32): raise --budget from 8, or lower recent"),
        (["--budget", "0"], "--budget: '0' is not a whole number from 1"),
        (["--threads", "0"], "--threads: '0' is not a whole number from 1"),
        (["--caches", "kvsharer"], "cannot be replayed"),
    ):
        assert bench_compression.main([*arguments, "--caches", "snapkv", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_prompts_that_the_model_cannot_hold_are_refused(
    command_line: Loaded, importance: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output, most = tmp_path / "out.jsonl", command_line.config.max_position
    arguments = [*NEEDLES, "--tasks", "noise", "--output", str(output), "--caches"]
    made = make_questions(Words(), CHAT, split="test", task="noise", tokens=most, count=3, seed=7)
    assert max(len(q.context) + len(q.question) for q in made) <= most  # the answer is what has no room
    with monkeypatch.context() as patch:
        patch.setattr(worker, "Record", None)
        assert leaderboard.main([*arguments, "--tokens", str(LENGTH), str(most)]) == 2
    assert re.search(rf"--tokens {most}: .* with its answer, .* trained for {most}: lower", capsys.readouterr().err)
    assert not output.exists()
    room = max(q.room for q in made)
    assert room < worker.ROOM and leaderboard.main([*arguments, "--tokens", str(most - room)]) == 0


def test_a_line_that_a_kill_cut_off_is_asked_again(
    command_line: Loaded, importance: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = [*NEEDLES, "--tasks", "noise", "--caches", "streaming", "--output", str(output)]
    assert leaderboard.main(arguments) == 0
    whole = output.read_text()
    results = [json.loads(line)["results"] for line in whole.splitlines()]
    for left, noted in ((whole[:-40], True), (whole[:-1], False)):  # in mid-row, or before its end of line
        output.write_text(left)
        capsys.readouterr()
        assert leaderboard.main(arguments) == 0
        assert ("the last line was cut off and is dropped" in capsys.readouterr().err) is noted
        assert [json.loads(line)["results"] for line in output.read_text().splitlines()] == results
    for damaged in ("not ours", whole.replace("{", "", 1)[:-40], '{\n  "other": 1\n}', '{"other": 1}'):
        output.write_text(damaged)
        assert leaderboard.main(arguments) == 2
        assert "line 1: not a row" in capsys.readouterr().err and output.read_text() == damaged


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(([f"--{name}", "0"], f"--{name}: '0' is not") for name in ("prompts", "budgets", "threads", "tokens")),
        (["--threads", "-1"], "--threads: '-1' is not a whole number"),
        (["--output", "/tmp/nodir/x"], "/tmp/nodir/x cannot be written"),
        (["--table", "/tmp/nodir/x"], "/tmp/nodir/x cannot be written"),
    ],
)
def test_a_leaderboard_that_cannot_be_made_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, wrong: list[str], message: str
) -> None:
    monkeypatch.setattr(leaderboard, "load_model", None)
    assert leaderboard.main(["--output", str(tmp_path / "out.jsonl"), *wrong]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_the_shipped_scores_are_those_of_the_default_model() -> None:
    file = Path(__file__).parents[1] / "zoo" / "importance" / "smollm2-135m.json"
    config = SimpleNamespace(num_layers=30, num_heads=9)
    data = json.loads(file.read_text())
    assert data["model_id"] == "smollm2-135m" and data["provenance"]["command"].startswith(
        "python -m recipes.calibrate_heads"
    )
    assert len(data["methods"]["layer_errors"]["scores"]) == config.num_layers
    for kind in ("r", "r2", "semantic"):
        table = data["methods"][kind]["scores"]
        assert len(table) == config.num_layers and {len(row) for row in table} == {config.num_heads}
        assert data["methods"][kind]["trials"] >= calibrate_heads.MIN_ACCEPTED
    with pytest.raises(CheckpointError, match="another model"):
        read_importance(file, config=tiny_config())


def tiny_config() -> Any:
    from checkpoints.config import ModelConfig, RopeConfig

    return ModelConfig(
        model_type="llama",
        vocab_size=9,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_position=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_embeddings=True,
        layer_windows=(None,),
    )


def test_perplexity(tmp_path, capsys):
    model, output = str(tiny_chat.write(tmp_path / "tiny")), tmp_path / "figures.json"
    options = ["--model", model, "--windows", "3", "--tokens", "20", "--output", str(output)]
    assert perplexity.main([*options, "--against", "float32"]) == 0
    same = json.loads(output.read_text())
    assert same["perplexity"] == same["other_perplexity"] > 1 and same["difference_percent"] == 0
    assert perplexity.main(options) == 0
    other = json.loads(output.read_text())
    assert other["perplexity"] == same["perplexity"] != other["other_perplexity"]
    assert other["difference_low_percent"] < other["difference_percent"] < other["difference_high_percent"]
    capsys.readouterr()
    alone = (["--windows", "1"], ["--against", "int4"], ["--bogus"], ["--output", "/nowhere/x.json"], ["--budget", "9"])
    alone += (["--importance", "x"], ["--text", "/nowhere"], ["--windows", "99999"], ["--device", "nowhere"])
    with_cache = (["--chunk", "20"], ["--against", "int8"], ["--budget", "9"], ["--sharing", "x"])
    for wrong in (*alone, *(["--cache", "full", *more] for more in with_cache)):
        assert perplexity.main([*options, *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_perplexity_with_the_context_compressed(tmp_path):
    model, output = str(tiny_chat.write(tmp_path / "tiny")), tmp_path / "figures.json"
    options = ["--model", model, "--windows", "3", "--tokens", "50", "--chunk", "8", "--output", str(output), "--cache"]
    assert perplexity.main([*options, "full"]) == 0
    full = json.loads(output.read_text())
    assert full["other_perplexity"] == pytest.approx(full["perplexity"], rel=1e-5) and full["cache"] == "full"
    assert perplexity.main([*options, "streaming:sinks=1", "--budget", "3"]) == 0
    less = json.loads(output.read_text())
    assert less["perplexity"] == full["perplexity"] and abs(less["difference_percent"]) > 0.01


def test_perplexity_of_a_text_of_ones_own(tmp_path):
    """A token is a byte here. Importance is read, and its file belongs to the model."""
    model, output, text = tiny_chat.write(tmp_path / "tiny"), tmp_path / "figures.json", tmp_path / "own.txt"
    text.write_bytes(b"\xef\xbb\xbf" + b"No two sheep are the same. " * 8)
    options = ["--model", str(model), "--windows", "4", "--tokens", "50", "--chunk", "25", "--output", str(output)]
    options += ["--text", str(text), "--cache", "headkv:window=2", "--budget", "8"]
    assert perplexity.main(options) == 2  # no importance ships for this model
    scores = tiny_chat.write_scores(model, tmp_path / "scores.json")
    assert perplexity.main([*options, "--importance", str(scores)]) == 0
    made = json.loads(output.read_text())
    loaded = load(str(model))
    texts = perplexity.windows(loaded, "No two sheep are the same. " * 8, 4, 50)
    dense = [perplexity.nll(loaded, ids, 25) for ids in texts]
    assert made["perplexity"] == pytest.approx(math.exp(sum(dense) / 4)) and abs(made["difference_percent"]) > 0.01
    assert (made["text"], made["importance"]) == (str(text), str(scores))
    text.write_bytes(b"\xff")
    assert perplexity.main([*options, "--importance", str(scores)]) == 2
