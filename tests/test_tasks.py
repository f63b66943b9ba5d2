"""Generated tasks keep their promises (length, splits, gold); answers are judged as published; files read or not."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from inspect import signature
from pathlib import Path

import pytest

from checkpoints.resolve import DEFAULT_MODEL, resolve
from checkpoints.tokenizer import load_tokenizer
from recipes.needles import SPLITS as NEEDLE_SPLITS
from recipes.tasks import hooks, prose, words
from recipes.tasks.example import largest
from recipes.tasks.jsonl import read_longbench, read_scbench
from recipes.tasks.metrics import METRICS, string_match
from recipes.tasks.ruler import FAMILIES, make_example

TASKS = Path(hooks.__file__).parent


def pieces(text: str) -> list[str]:
    """A tokenizer for tests: words of at most four letters, digits and signs."""
    return re.findall(r" ?[^\W\d]{1,4}|\s|.", text)


def made(family, *, split="test", seed=0, length=1500, encode=pieces, reserve=0):
    return make_example(encode, family=family, split=split, seed=seed, length=length, reserve=reserve)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_fills_its_length_and_holds_its_answers(family):
    unit = {"niah_multikey_lines": 60, "niah_multikey_uuid": 130}.get(family, 12)
    for length in (1100, 1501):
        example = made(family, length=length, reserve=30)
        whole = len(pieces(example.prompt)) + example.max_new_tokens + 30
        apart = len(pieces(example.context)) + len(pieces(example.prompt[len(example.context) :]))
        assert whole <= example.tokens <= length and apart + example.max_new_tokens + 30 <= length
        assert length - example.tokens < unit
        assert all(answer in example.context for answer in example.answers)
        assert not any(answer in example.question + example.answer_prefix for answer in example.answers)
        assert len(pieces(", ".join(example.answers))) <= example.max_new_tokens


@pytest.mark.parametrize("family", ["niah_single_prose", "cwe", "qa_hop"])
def test_lengths_hold_for_a_real_tokenizer(family):
    tokenizer = load_tokenizer(resolve(DEFAULT_MODEL))
    example = made(family, length=4096, encode=tokenizer.encode)
    assert len(tokenizer.encode(example.prompt)) + example.max_new_tokens <= 4096
    assert 4096 - example.tokens < 12
    assert len(tokenizer.encode(", ".join(example.answers))) <= example.max_new_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_examples_repeat_and_differ_by_seed_and_split(family):
    assert made(family) == made(family)
    prompts = {made(family, split=split, seed=seed).sha256 for split in prose.SPLITS for seed in range(3)}
    assert len(prompts) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_answer_and_no_key(family):
    def facts(split):
        examples = [made(family, split=split, seed=seed) for seed in range(6)]
        keys = re.findall(r"[a-z]+-[a-z]+(?= in the text)", " ".join(example.question for example in examples))
        return {*keys, *(answer for example in examples for answer in example.answers)}

    assert not facts("tune") & facts("test")


def test_splits_share_no_material():
    tune, test = (set(prose.paragraphs(split)) for split in ("tune", "test"))
    assert not tune & test and min(len(tune), len(test)) > 100
    assert not set(prose.vocabulary("tune")) & set(prose.vocabulary("test"))
    assert not set(NEEDLE_SPLITS["tune"].noise) & set(NEEDLE_SPLITS["test"].noise)
    a, b = words.WORDS["tune"], words.WORDS["test"]
    for field in ("adjectives", "nouns", "letters", "given", "roots", "crafts"):
        assert len(set(getattr(a, field))) == len(getattr(a, field))
        assert not set(getattr(a, field)) & set(getattr(b, field)), field


def test_prose_repeats_only_when_all_of_it_has_been_there():
    count = len(prose.paragraphs("test"))
    stream = prose.stream("test", random.Random(0))
    first, second = ([next(stream) for _ in range(count)] for _ in range(2))
    assert sorted(first) == sorted(second) and first != second and len(set(first)) == count


def test_depths_are_spread_and_true():
    depths = sorted(made("niah_single_noise", seed=seed).depth for seed in range(10))
    assert all(b - a < 0.2 for a, b in zip([0, *depths], [*depths, 1], strict=True))
    for seed in range(5):
        example = made("niah_single_prose", seed=seed)
        where = example.context.index(example.answers[0]) / len(example.context)
        assert abs(where - example.depth) < 0.1


def test_variables_form_one_chain():
    example = made("vt", seed=4)
    links = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", example.context)
    value = {name: source for name, source in links}
    assert len(links) == 5 and set(value) == set(example.answers)
    for name in example.answers:
        while name in value:
            name = value[name]
        assert name in example.question


@pytest.mark.parametrize("length", [1200, 9000])
def test_word_counts_have_the_asked_order(length):
    common = made("cwe", length=length)
    counts = Counter(re.findall(r"\d+\. (\w+)", common.context))
    top = counts.most_common(10)
    assert {word for word, _ in top} == set(common.answers)
    assert top[-1][1] >= 10 * counts.most_common(11)[-1][1] > 0
    coded = made("fwe", length=length)
    ranks = Counter(coded.context.split("\n\n")[1].split()).most_common(5)
    assert ranks[0][0] == "..." and tuple(word for word, _ in ranks[1:4]) == coded.answers
    assert ranks[1][1] > ranks[2][1] > ranks[3][1] > ranks[4][1]


def test_facts_are_stated_once_and_follow_their_hops():
    single, hop = made("qa_single", seed=2), made("qa_hop", seed=2)
    for example, name in (
        (single, re.search(r"was (.+) born", single.question)[1]),
        (hop, re.search(r"whom (.+) learnt", hop.question)[1]),
    ):
        if example is hop:
            name = re.search(rf"{name} learnt the trade from (\w+ \w+)", hop.context)[1]
        assert re.findall(rf"{name} was born in (\w+) in", example.context) == list(example.answers)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match=r"no family 'needle'.*niah_single_noise"):
        made("needle")
    with pytest.raises(ValueError, match="no split 'train'"):
        made("vt", split="train")
    with pytest.raises(ValueError, match=r"at least \d+ tokens more"):
        made("cwe", length=300)


def test_largest_is_the_last_that_fits():
    sizes = [3 + 2 * n + n % 7 // 6 * 5 for n in range(5000)]
    for limit in (40, 41, 500, 7777):
        best = largest(sizes.__getitem__, limit, 3)
        assert sizes[best] <= limit < sizes[best + 1]


# --- metrics


@pytest.mark.parametrize(
    ("metric", "answer", "golds", "classes", "score"),
    [
        ("f1", "The cat sat, there.", ["a cat sat down"], (), 2 * 2 / (3 + 3)),
        ("f1", "no", ["yes", "no"], (), 1.0),
        ("f1", "", ["yes"], (), 0.0),
        ("classification", "It is Color or Animal", ["Color"], ("Color", "Animal", "Food"), 0.5),
        ("classification", "Dog food", ["Dog food"], ("food", "Dog food", "Cat"), 1.0),
        ("classification", "Food", ["Color"], ("Color", "Food"), 0.0),
        ("counting", "7 or 8", ["7"], (), 0.5),
        ("counting", "seven", ["7"], (), 0.0),
        ("retrieval", "Paragraph 12", ["Paragraph 12"], (), 1.0),
        ("retrieval", "Paragraph 1", ["Paragraph 12"], (), 0.0),
        ("code-similarity", "# so\n\nabcd\nxyz", ["abxd"], (), 2 * 3 / 8),
        ("code-similarity", "// only a comment", ["abxd"], (), 0.0),
        ("contains-all", "Has ONE thing", ["one", "two"], (), 0.5),
        ("contains-any", "Has ONE thing", ["one", "two"], (), 1.0),
        ("choice", "The answer is B.", ["B"], (), 1.0),
        ("choice", "C, not B", ["B"], (), 0.0),
        ("first-number", "about -3.0 or 4", ["-3"], (), 1.0),
        ("first-number", "none", ["-3"], (), 0.0),
    ],
)
def test_metrics_give_hand_computed_values(metric, answer, golds, classes, score):
    assert METRICS[metric](answer, golds, classes) == pytest.approx(score)


def test_rouge_gives_hand_computed_values():
    pytest.importorskip("rouge_score")
    # "the cat sat" of 4 and 6 words is the longest common subsequence: 2 * 3 / (4 + 6)
    assert METRICS["rouge-l"]("The cat sat down", ["the cat quickly sat on mats"], ()) == pytest.approx(0.6)
    assert METRICS["rouge-l-sum"]("b c\na d", ["a d\nb c"], ()) == pytest.approx(1.0)
    assert METRICS["rouge-l"]("b c\na d", ["a d\nb c"], ()) == pytest.approx(0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_scores_one_and_another_examples_gold_nothing(family):
    example, other = made(family), made(family, seed=1)
    assert string_match(f"It is {' and '.join(example.answers)}.", example.answers, example.metric) == 1
    assert string_match("I cannot say.", example.answers, example.metric) == 0
    if family != "cwe":  # whose words come from one list
        assert string_match(" ".join(other.answers), example.answers, example.metric) == 0


# --- lm-eval


def test_lm_eval_runs_every_task_file_and_scores_gold():
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    given = {"tokenizer": DEFAULT_MODEL, "length": 1024, "examples": 1, "seed": 7}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=given)

    def scores(model):
        results = simple_evaluate(model, tasks=["zoo_ruler"], task_manager=manager, bootstrap_iters=0)
        return {task: row["string_match,none"] for task, row in results["results"].items()}, results["samples"]

    nothing, samples = scores("dummy")
    names = {f"zoo_ruler_{family}" for family in FAMILIES}
    assert set(nothing) == {*names, "zoo_ruler"} and set(nothing.values()) == {0}
    for name in names:
        for row, example in zip(samples[name], hooks.examples(family=name[10:], **given), strict=True):
            prompt, settings = row["arguments"][0]
            assert prompt == example.prompt and settings["max_gen_toks"] == example.max_new_tokens

    class Oracle(LM):
        def generate_until(self, requests, disable_tqdm=False):
            return [" " + ", ".join(request.doc["answers"]) for request in requests]

        def loglikelihood(self, requests, disable_tqdm=False):
            raise AssertionError("these tasks generate")

        loglikelihood_rolling = loglikelihood

    right, _ = scores(Oracle())
    assert set(right.values()) == {1}


def test_a_task_without_tokenizer_or_with_wrong_numbers_is_refused():
    with pytest.raises(ValueError, match="give --metadata tokenizer=MODEL"):
        hooks.examples(family="vt")
    with pytest.raises(ValueError, match="length must be a whole number from 1 on, not '4k'"):
        hooks.examples(family="vt", tokenizer=DEFAULT_MODEL, length="4k")


def test_misspelt_metadata_is_refused_and_a_models_arguments_are_not():
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from zoo.harness import ZooLM

    given = {"family": "vt", "tokenizer": DEFAULT_MODEL, "length": 1000, "examples": 1}
    for key, meant in {"lenght": "length", "example": "examples", "num_examples": "examples", "seeds": "seed"}.items():
        with pytest.raises(ValueError, match=f"--metadata has no {key}: write {meant}"):
            hooks.examples(**given, **{key: 3})
    theirs = {**signature(HFLM).parameters, **signature(ZooLM).parameters, "version": None, "max_seq_lengths": None}
    (example,) = hooks.examples(**given, **{key: None for key in theirs if key not in (*given, "seed")})
    assert example.length == 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_blank_line_of_a_prompt_parts_context_and_question(family):
    example = made(family)
    before, line, question = example.prompt.rpartition("\n\n")
    assert before + line == example.context and question.startswith(example.question)


# --- files

LONG = {
    "_id": "a1", "input": "Who?", "context": "Ada did.", "answers": ["Ada"], "length": 2, "dataset": "hotpotqa",
    "language": "en", "all_classes": None,
}  # fmt: skip
SHARED = {"id": 3, "context": "{...}", "multi_turns": [{"input": "Key 1?", "answer": "v"}]}


def write(tmp_path, *rows, name="scbench_kv.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_longbench_rows_are_read(tmp_path):
    few = LONG | {"dataset": "trec", "all_classes": ["Food", "Color"], "answers": ["Food"], "input": "Type:"}
    qa, trec = read_longbench(write(tmp_path, LONG, "", few))
    assert (qa.id, qa.context, len(qa.turns)) == ("a1", "Ada did.", 1)
    (turn,) = qa.turns
    assert "Who?" in turn.question and turn.max_new_tokens == 32
    assert (turn.score("It was Ada"), turn.score("Bob")) == (0.5, 0)
    assert trec.turns[0].score("\nFood\nColor") == 1  # only the first line counts


def test_scbench_rows_are_read(tmp_path):
    pytest.importorskip("rouge_score")
    two = {"input": "Key 2?", "answer": ["v", "w"]}
    mixed = {"input": "Sum up.", "answer": "all good", "task": "scbench_summary"}
    (shared,) = read_scbench(write(tmp_path, SHARED | {"multi_turns": [*SHARED["multi_turns"], two, mixed]}))
    assert shared.id == "3" and [turn.task for turn in shared.turns] == ["scbench_kv"] * 2 + ["scbench_summary"]
    assert [turn.score("the v") for turn in shared.turns] == [1, 0.5, 0]
    choice = {"input": "Which?", "answer": "blue", "options": ["red", "blue", "green", "grey"]}
    (shared,) = read_scbench(write(tmp_path, SHARED | {"multi_turns": [choice]}), task="scbench_choice_eng")
    assert "B. blue" in shared.turns[0].question and shared.turns[0].score("B. blue") == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", "line 2: is no JSON object"),
        (LONG | {"answers": []}, "line 2: answers must be a list of at least one text"),
        ({**LONG, "context": 7}, "line 2: context must be a text, not 7"),
        (LONG | {"dataset": "dureader"}, r"line 2: the task 'dureader' has no metric here: choose from narrativeqa"),
        ({**LONG, "context": ""}, "line 2: context is empty"),
        (LONG | {"dataset": "trec"}, "line 2: all_classes must list the classes of trec"),
        (LONG | {"dataset": "passage_retrieval_en"}, "line 2: .* must read \"Paragraph NUMBER\", not 'Ada'"),
    ],
)
def test_malformed_longbench_lines_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=r"rows\.jsonl, " + message):
        read_longbench(write(tmp_path, LONG, row, name="rows.jsonl"))


@pytest.mark.parametrize(
    ("changes", "task", "message"),
    [
        ({"context": ""}, None, "context is empty"),
        ({"multi_turns": []}, None, "multi_turns must be a list of at least one object"),
        ({"multi_turns": [{"input": "Key?"}]}, None, "answer must be a text, not None"),
        ({}, "scbench_repoqa", "'scbench_repoqa' has no metric here"),
        ({}, "scbench_mf", "could not convert string to float: 'v'"),
        ({}, "scbench_choice_eng", "options must be a list"),
    ],
)
def test_malformed_scbench_lines_are_named(tmp_path, changes, task, message):
    with pytest.raises(ValueError, match=rf"scbench_kv\.jsonl, line 1: .*{message}"):
        read_scbench(write(tmp_path, SHARED | changes), task)


def test_files_that_are_none_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read: No such file"):
        read_scbench(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"scbench_kv\.jsonl is empty"):
        read_scbench(write(tmp_path))
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1: 'utf-8' codec"):
        read_scbench(path)
