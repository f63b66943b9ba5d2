"""Questions on a shared context: each way of asking is what the engine does step by step; runs go on after a stop."""

from __future__ import annotations

import json

import pytest

from recipes import longcontext
from recipes.tasks.jsonl import SharedContext, Turn
from tests import tiny_chat
from zoo import Engine, load

CONTEXT = "The lamp is red and the door is blue. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.write(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def engine(folder):
    return Engine(load(str(folder)), cache="keydiff", budget=12, max_new_tokens=5, max_context=600)


def asked(*questions):
    turns = [
        Turn(task="t", question=text, answers=("x",), max_new_tokens=5, metric="contains-all") for text in questions
    ]
    return SharedContext(id="a", context=CONTEXT, turns=tuple(turns))


def by_hand(engine, question, turns):
    """The same with a prefill for everything instead of a snapshot."""
    encode, decode = engine.loaded.tokenizer.encode, engine.loaded.tokenizer.decode
    found, texts = [], [" Lamp?", " Door?", " Both?"]
    for count in range(1, 4):
        mine = [texts[count - 1]] if turns == "requests" else texts[:count]
        engine.reset()
        first, *more = [encode(text) for text in mine]
        if question == "seen":
            answer = list(engine.stream(encode(CONTEXT) + first, max_new_tokens=5))
        else:
            engine.prefill([encode(CONTEXT)])
            answer = list(engine.stream(first, max_new_tokens=5))
        for ids in more:
            answer = list(engine.stream(ids, max_new_tokens=5))
        found.append(decode(answer))
    return found


@pytest.mark.parametrize("question", longcontext.QUESTIONS)
@pytest.mark.parametrize("turns", longcontext.TURNS)
def test_answers_are_those_of_a_prefill_for_each(engine, question, turns):
    shared = asked(" Lamp?", " Door?", " Both?")
    got = [answer for _, answer in longcontext.answers(engine, shared, question=question, turns=turns)]
    assert got == by_hand(engine, question, turns)


def test_the_ways_of_asking_differ(engine):
    shared = asked(" Lamp?", " Door?", " Both?")
    ways = [(question, turns) for question in longcontext.QUESTIONS for turns in longcontext.TURNS]
    found = {
        tuple(answer for _, answer in longcontext.answers(engine, shared, question=question, turns=turns))
        for question, turns in ways
    }
    assert len(found) > 1


def run(folder, data, output, *more):
    options = ["--data", str(data), "--format", "scbench", "--model", str(folder), "--cache", "keydiff"]
    return longcontext.main([*options, "--budget", "12", "--output", str(output), *more])


def rows(*ids):
    turns = [{"input": "Key?", "answer": "v"}, {"input": "And?", "answer": "w"}]
    return "\n".join(json.dumps({"id": name, "context": CONTEXT, "multi_turns": turns}) for name in ids)


def test_a_run_goes_on_where_it_stopped(folder, tmp_path, capsys):
    data, output = tmp_path / "scbench_vt.jsonl", tmp_path / "rows.jsonl"
    data.write_text(rows("a", "b"))
    assert run(folder, data, output) == 0
    whole, said = output.read_text().splitlines(), capsys.readouterr().out
    assert "over 4 questions on 2 contexts" in said
    assert [(row["id"], row["turn"]) for row in map(json.loads, whole)] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    output.write_text("\n".join(whole[:2]) + "\n")
    assert run(folder, data, output) == 0
    again = output.read_text().splitlines()
    assert again[:2] == whole[:2]
    assert [json.loads(row)["answer"] for row in again] == [json.loads(row)["answer"] for row in whole]
    assert capsys.readouterr().out == said


def test_a_line_that_no_reader_takes_is_named(folder, tmp_path, capsys):
    data, output = tmp_path / "scbench_vt.jsonl", tmp_path / "rows.jsonl"
    for line, say in (("[" * 100_000, "nested too deeply"), (rows("a").replace(CONTEXT, "\\ud800"), "surrogate")):
        data.write_text(line)
        assert run(folder, data, output) == 2
        assert f"{data.name}, line 1: " in (err := capsys.readouterr().err) and say in err


def test_answers_that_say_nothing_are_told_of(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(longcontext, "Engine", lambda *_, **options: Mute(*_, **options))
    data, output = tmp_path / "scbench_vt.jsonl", tmp_path / "rows.jsonl"
    data.write_text(rows("a"))
    assert run(folder, data, output) == 0
    assert "no answer says anything" in capsys.readouterr().err


class Mute(Engine):
    def stream(self, ids, **options):
        return iter(())


def test_rows_belong_to_one_file_of_head_importance(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(longcontext, "Engine", lambda *_, importance, **options: Engine(*_, **options))
    monkeypatch.setattr(longcontext.cli, "check_cache", lambda args: None)
    data, output, scores = tmp_path / "scbench_vt.jsonl", tmp_path / "rows.jsonl", tmp_path / "scores.json"
    data.write_text(rows("a"))
    scores.write_text("one")
    assert run(folder, data, output, "--importance", str(scores)) == 0
    assert run(folder, data, output, "--importance", str(scores)) == 0
    scores.write_text("two")
    for more in ([], ["--importance", str(scores)]):
        assert run(folder, data, output, *more) == 2
        assert "is of a run with other settings" in capsys.readouterr().err


def test_what_cannot_run_is_refused_before_anything_is_written(folder, tmp_path, capsys):
    data, output = tmp_path / "scbench_vt.jsonl", tmp_path / "rows.jsonl"

    def refused(message, *more):
        assert run(folder, data, output, *more) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]

    data.write_text(rows("a", "a"))
    refused("contexts of the same id")
    data.write_text(rows("a").replace(CONTEXT, CONTEXT * 40))
    refused("context a takes")
    data.write_text(rows("a") + "\n{")
    refused("line 2: Expecting property name")
    data.write_text(rows("a"))
    refused("there is no folder", "--output", str(tmp_path / "none" / "rows.jsonl"))
    assert not output.exists()
    assert run(folder, data, output) == 0
    refused("line 1: is of a run with other settings", "--question", "seen")
    refused("line 1: is of a run with other settings", "--task", "scbench_kv")
    output.write_text(output.read_text().splitlines()[0] + "\n")
    refused("holds only a part of context a")
