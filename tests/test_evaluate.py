"""The adapter for lm-eval gives what lm-eval's own backend gives, as long as the cache keeps everything."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from checkpoints.resolve import DEFAULT_MODEL
from kernels import native
from recipes import check_evaluate
from tests import tiny_chat
from zoo.evaluate import main
from zoo.harness import ZooLM

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 256
SMALL = "snapkv:window=2,recent=2,sinks=1"
TASKS = {
    "t_choice": """
output_type: multiple_choice
doc_to_text: "{{text}} Question: {{question}} "
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "t_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "t_answer": """
output_type: generate_until
doc_to_text: "{{text}} Question: {{question}}"
doc_to_target: "a fox"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and tasks with their documents."""
    base = tmp_path_factory.mktemp("evaluate")
    tiny_chat.write(base / "model", max_position_embeddings=LENGTH)
    choices = ["a fox", "a dog", "b", "a lazy dog that barks"]
    docs = [
        {
            "text": f"{i} " + "the quick fox " * (1 + 5 * (i % 3)),
            "question": f"Who is {i}?",
            "choices": choices,
            "answer": i % 4,
        }
        for i in range(4)
    ] + [{"text": "over the dog " * 9, "question": "Who?", "choices": choices, "answer": 0}]
    (base / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (base / "tasks").mkdir()
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {base / 'docs.jsonl'}}}\ntest_split: train\n"
        (base / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{data}{text.lstrip()}")
    return base


@pytest.fixture(scope="module")
def scores(folder):
    """Evaluates a model on the tasks; its responses per document, and the tasks' metrics."""

    def evaluated(lm, *tasks):
        manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
        got = evaluate(lm, manager.load(list(tasks or TASKS)), bootstrap_iters=0)
        responses = {name: [doc["filtered_resps"] for doc in docs] for name, docs in got["samples"].items()}
        return responses, got["results"]

    return evaluated


@pytest.fixture(scope="module")
def theirs(folder):
    """lm-eval's own backend."""
    from lm_eval.models.huggingface import HFLM

    options = {"device": "cpu", "dtype": "float32", "batch_size": 2}
    return lambda **more: HFLM(pretrained=str(folder / "model"), **options, **more)


@pytest.fixture(scope="module")
def model(folder):
    return lambda **options: ZooLM(str(folder / "model"), **options)


@pytest.fixture(scope="module")
def full(model, scores):
    return scores(model(cache="full", batch_size=4))


def requests(kind, *arguments, task="task"):
    return [Instance(kind, {}, args, 0, metadata=(task, i, 1)) for i, args in enumerate(arguments)]


def close(got, want):
    """The same responses, log-likelihoods to 1e-3 each."""
    assert got.keys() == want.keys()
    for task in got:
        if task == "t_answer":
            assert got[task] == want[task]
            continue
        for mine, other in zip(got[task], want[task], strict=True):
            for a, b in zip(mine, other, strict=True):
                likelihoods = (a[0], b[0]) if isinstance(a, tuple) else (a, b)
                assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-3)
                assert not isinstance(a, tuple) or a[1] == b[1]


# -- the same as lm-eval's own backend ---------------------------------------------------------------------------------


def test_a_full_cache_equals_lm_evals_own_backend(full, theirs, scores):
    responses, metrics = scores(theirs())
    close(full[0], responses)
    assert full[1]["t_choice"]["acc,none"] == metrics["t_choice"]["acc,none"]
    perplexity = metrics["t_rolling"]["word_perplexity,none"]
    assert full[1]["t_rolling"]["word_perplexity,none"] == pytest.approx(perplexity)


def test_what_is_too_long_is_treated_as_lm_evals_own_backend_does(model, theirs):
    """Texts are scored in several windows; contexts are cut off at their beginning, which here has to be asked for."""
    text = "the quick brown fox jumps over the lazy dog and sleeps"
    mine, other = model(cache="full", max_length=24, truncate="left", batch_size=2), theirs(max_length=24)
    rolling = requests("loglikelihood_rolling", (text,), (text[:30],))
    assert mine.loglikelihood_rolling(rolling) == pytest.approx(other.loglikelihood_rolling(rolling), abs=1e-3)
    kept = model(cache=SMALL, budget=24, max_length=24, stride=5, batch_size=4)
    assert kept.loglikelihood_rolling(rolling) == pytest.approx(mine.loglikelihood_rolling(rolling), abs=1e-3)
    assert mine.truncated == 0
    cut = requests("loglikelihood", (text, " well"), (text[:20], " well"))
    for (score, greedy), (want, want_greedy) in zip(mine.loglikelihood(cut), other.loglikelihood(cut), strict=True):
        assert score == pytest.approx(want, abs=1e-3) and greedy == want_greedy
    written = requests("generate_until", (text, {"until": [], "max_gen_toks": 6}))
    assert mine.generate_until(written) == other.generate_until(written)
    assert mine.truncated == 1  # the same text twice


def test_a_budget_that_holds_everything_equals_the_full_cache(model, scores, full):
    lm = model(cache="snapkv", budget=LENGTH, batch_size=3, stride=16)
    close(scores(lm)[0], full[0])
    assert lm.get_model_info()["zoo"]["budget"] == str(LENGTH)


def test_four_tokens_change_every_kind_of_score(model, scores, full):
    got, _ = scores(model(cache=SMALL, budget=4, batch_size=4, stride=16))
    for task, responses in full[0].items():
        assert got[task] != responses
    changed = [abs(few[0] - every[0]) > 1e-2 for few, every in zip(got["t_rolling"], full[0]["t_rolling"], strict=True)]
    assert changed == [False, True, True, False, True]  # the first 16 tokens of a text see everything


def test_scores_do_not_depend_on_the_batch(model, scores):
    options = {"cache": SMALL, "budget": 4, "stride": 16}
    close(scores(model(batch_size=4, **options))[0], scores(model(batch_size=1, **options))[0])


def test_greedy_is_what_the_model_would_say(model):
    lm = model(cache=SMALL, budget=4)
    context = "the quick brown fox jumps over"
    (answer,) = lm.generate_until(requests("generate_until", (context, {"until": [], "max_gen_toks": 3})))
    wrong = "~~~" if answer != "~~~" else "}}}"
    got = lm.loglikelihood(
        requests("loglikelihood", (context, answer), (context, answer[:2] + wrong), (context, wrong))
    )
    assert [greedy for _, greedy in got] == [True, False, False]


def test_the_split_is_lm_evals(model):
    """Spaces at the end of a context belong to the continuation, and an empty context is BOS, or EOS."""
    lm = model(cache="full")
    moved, whole = lm.loglikelihood(requests("loglikelihood", ("a fox ", "runs"), ("a fox", " runs")))
    assert moved == whole
    (alone,) = lm.loglikelihood(requests("loglikelihood", ("", "runs")))
    (rolled,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("runs",)))
    assert alone[0] == pytest.approx(rolled, abs=1e-4)
    assert lm.prefix_token_id == lm.eot_token_id == lm.loaded.tokenizer.eos_id


# -- shared contexts ---------------------------------------------------------------------------------------------------


def spying(calls, name, method):
    def spy(self, *args):
        calls.append((name, args[0]))
        return method(self, *args)

    return spy


@pytest.fixture
def spied(monkeypatch):
    """What engines were asked to do, with the ids that they were given."""
    from zoo.engine import Engine

    calls = []
    for name in ("prefill", "extend", "restore", "step"):
        monkeypatch.setattr(Engine, name, spying(calls, name, getattr(Engine, name)))
    return calls


def test_a_shared_context_is_compressed_once(model, spied):
    lm = model(cache=SMALL, budget=4, batch_size=2)
    pairs = [
        (context, last) for last in ("xy", "b", "c", "xz", "longer") for context in ("the fox sat", "one two three")
    ]
    got = lm.loglikelihood(requests("loglikelihood", *pairs))
    calls = [name for name, _ in spied]
    assert calls.count("prefill") == 1
    assert (
        calls.count("restore") == 2
    )  # after "longer" come "xy" and "xz" together, then "b" and "c", which need no step
    assert calls.count("step") == 5 + 1
    alone = [lm.loglikelihood(requests("loglikelihood", pair))[0] for pair in pairs]
    for (score, greedy), (want, want_greedy) in zip(got, alone, strict=True):
        assert score == pytest.approx(want, abs=1e-4) and greedy == want_greedy


def test_a_question_that_was_not_seen_comes_after_compressing(model, scores, full, spied):
    unseen = {"question": "unseen", "separator": " Question:"}
    tasks = "t_choice", "t_answer"
    close(scores(model(cache="full", batch_size=4, **unseen), *tasks)[0], {task: full[0][task] for task in tasks})
    spied.clear()
    lm = model(cache=SMALL, budget=4, batch_size=2, **unseen)
    shared = [
        (f"the quick brown fox jumps over the dog Question: {word}?", "a") for word in ("who", "where", "what else")
    ]
    apart = [("another text, all of its own Question: why?", "a")]
    got = lm.loglikelihood(requests("loglikelihood", *shared, *apart))
    assert [name for name, _ in spied] == ["prefill", "extend", "restore", "extend", "restore", "extend"]
    decode = lm.loaded.tokenizer.decode
    assert [decode(ids) for ids in spied[0][1]] == [
        "the quick brown fox jumps over the dog",
        "another text, all of its own",
    ]
    assert decode(spied[1][1][0]) == " Question: what else?"
    seen = model(cache=SMALL, budget=4).loglikelihood(requests("loglikelihood", *shared, *apart))
    for request, score, other in zip([*shared, *apart], got, seen, strict=True):
        assert score[0] == pytest.approx(lm.loglikelihood(requests("loglikelihood", request))[0][0], abs=1e-4)
        assert score[0] != pytest.approx(other[0], abs=1e-4)
    assert lm.get_model_info()["zoo"]["mode"] == "question unseen while compressing"


def test_what_was_finished_is_kept_when_a_run_is_interrupted(model, monkeypatch):
    kept = []
    lm = model(cache="full")
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda kind, texts, result: kept.append((kind, texts)))
    real = type(lm._engine).prefill

    def prefill(engine, rows):
        if len(rows[0]) < 4:
            raise KeyboardInterrupt
        return real(engine, rows)

    monkeypatch.setattr(type(lm._engine), "prefill", prefill)
    with pytest.raises(KeyboardInterrupt):
        lm.loglikelihood(requests("loglikelihood", ("one", "a"), ("longer", "b")))
    with pytest.raises(KeyboardInterrupt):
        lm.generate_until(requests("generate_until", ("one", {"max_gen_toks": 1}), ("longer", {"max_gen_toks": 1})))
    assert kept == [("loglikelihood", ("longer", "b")), ("generate_until", ("longer", {"max_gen_toks": 1}))]


def test_texts_are_kept_when_their_last_window_is_done(model, monkeypatch):
    kept = []
    lm = model(cache="full", max_length=8)
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda kind, texts, result: kept.append((kind, texts, result)))
    real = lm._roll

    def roll(engine, windows, stride):
        if windows[0].name.endswith("document 1") and len(windows[0].continuation) < 8:
            raise KeyboardInterrupt  # in the second text's last window, which is the shortest of all
        return real(engine, windows, stride)

    texts = requests("loglikelihood_rolling", ("eight by",), ("the quick f",))
    want = lm.loglikelihood_rolling(texts)
    kept.clear()
    monkeypatch.setattr(lm, "_roll", roll)
    with pytest.raises(KeyboardInterrupt):
        lm.loglikelihood_rolling(texts)
    assert kept == [("loglikelihood_rolling", ("eight by",), want[0])]


# -- answers -----------------------------------------------------------------------------------------------------------


def answers(lm, *arguments, context="a text that goes on"):
    return lm.generate_until(requests("generate_until", *((context, a) for a in arguments)))


def test_stop_texts_end_answers_across_tokens(model):
    lm = model(cache="full", batch_size=4)
    (whole,) = answers(lm, {"max_gen_toks": 20})
    stop, one = whole[9:12], whole[5]  # a token is a byte
    got = answers(
        lm,
        {"max_gen_toks": 20, "until": [stop]},
        {"max_gen_toks": 20, "until": one},
        {"max_gen_toks": 20, "until": ["never said", ""]},
        {"max_new_tokens": 7},
        {"until": ["<|im_end|>"], "max_gen_toks": 20, "num_beams": 1},
    )
    assert got == [whole.split(stop)[0], whole.split(one)[0], whole, whole[:7], whole]


def test_a_stop_token_ends_an_answer(model, monkeypatch):
    lm = model(cache="full")
    (whole,) = answers(lm, {"max_gen_toks": 20})
    said = lm.loaded.tokenizer.encode(whole[6])[0]
    monkeypatch.setattr(type(lm), "eot_token_id", said)
    assert answers(lm, {"max_gen_toks": 20}) == [whole.split(whole[6])[0]]


def test_sampling_depends_on_seed_and_document_alone(model):
    sampled = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 8}
    contexts = [("one text", sampled), ("another text, which is longer", sampled)]
    options = {"cache": "full", "batch_size": 2}
    together = model(**options).generate_until(requests("generate_until", *contexts))
    assert together == model(**options | {"batch_size": 1}).generate_until(requests("generate_until", *contexts))
    assert together != model(**options, seed=1).generate_until(requests("generate_until", *contexts))
    twice = model(**options).generate_until(2 * requests("generate_until", contexts[0]))
    assert twice[0] == together[0] != twice[1]


# -- chat templates ----------------------------------------------------------------------------------------------------


def test_the_chat_template_is_the_models(model):
    lm = model(cache="full")
    history = [{"role": "user", "content": "Hi"}]
    assert lm.apply_chat_template(history) == lm.loaded.chat.render(history)
    begun = [*history, {"role": "assistant", "content": "Sure: "}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert text == lm.loaded.chat.render(history) + "Sure:"
    assert lm.tok_encode(text)[0] == lm.loaded.tokenizer.special_tokens["<|im_start|>"]
    assert lm.chat_template(True) == tiny_chat.TEMPLATE and lm.chat_template() is None
    with pytest.raises(ValueError, match="by name"):
        lm.chat_template("tools")
    assert lm.tokenizer_name == lm.loaded.tokenizer.fingerprint()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "nothing"}, "nothing"),
        ({"budgets": 3}, "unknown model argument budgets: there are pretrained, cache, budget,"),
        ({"budget": "64MiB"}, "shared by the rows"),
        ({"budget": "many"}, "not understood"),
        ({"cache": "snapkv", "budget": 2}, "always keeps"),
        ({"batch_size": "auto"}, "batch_size must be a whole number"),
        ({"max_length": LENGTH + 1}, "beyond the"),
        ({"stride": 0}, "stride must be"),
        ({"seed": -1}, "seed must be"),
        ({"truncate": "right"}, "truncate must be"),
        ({"question": "unseen"}, "go together"),
        ({"separator": "Q"}, "go together"),
        ({"question": "later"}, "question must be"),
        ({"dtype": "float8"}, "float8"),
    ],
)
def test_arguments_that_cannot_be(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(**{"cache": "full"} | options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2}, "task, document 0 asks for num_beams"),
        ({"max_gen_toks": 0}, "from 1"),
        ({"until": [3]}, "texts in until"),
        ({"do_sample": True}, "without a temperature"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 2.0}, "document 0: top_k must be"),
        ({"max_gen_toks": LENGTH}, "nothing can be left"),
    ],
)
def test_generations_that_cannot_be(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        answers(model(cache="full"), arguments)


@pytest.mark.parametrize(("context", "continuation"), [("a", ""), ("", ""), ("", "<|im_end|>")])
def test_empty_continuations_are_refused(model, context, continuation):
    with pytest.raises(ValueError, match=r"task, document 1 has .*continuation.*: nothing can be scored"):
        model(cache="full").loglikelihood(requests("loglikelihood", ("a", "b"), (context, continuation)))


def test_long_contexts_are_refused_or_cut(model):
    long, end = "x" * 70 + "the end of a text", "of it"
    options = {"cache": "full", "max_length": 40}
    asked = requests("loglikelihood", (long, end), (long[-36:], end), (long[-37:], end))
    with pytest.raises(
        ValueError, match=r"document 0 has 87 tokens of context and 4 more, of 40 .*: truncate=left would"
    ):
        model(**options).loglikelihood(asked)
    lm = model(**options, truncate="left")
    got = lm.loglikelihood(asked)
    assert lm.truncated == lm.get_model_info()["zoo"]["truncated"] == 2
    assert got[0] == pytest.approx(got[1]) and got[2] == pytest.approx(got[1])
    with pytest.raises(ValueError, match="nothing can be left"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b" * 41)))
    lm = model(**options, truncate="left")
    lm.loglikelihood(requests("loglikelihood", *((long, choice) for choice in ("a", "b", "c", "d"))))
    assert lm.truncated == 1


def test_a_context_of_spaces_is_named(model):
    with pytest.raises(ValueError, match="task, document 1 has a context of no tokens"):
        model(cache="full").loglikelihood(requests("loglikelihood", ("a", "b"), (" ", "b")))


def test_without_a_compiler_that_is_said(model, monkeypatch, capsys):
    def load():
        raise RuntimeError("there is no C++ compiler (install g++)")

    monkeypatch.setattr(native, "load", load)
    model(cache="full")
    assert "without the C++ operators, so slower (there is no C++ compiler (install g++))" in capsys.readouterr().err


def test_a_context_without_the_separator_is_named(model):
    lm = model(cache="full", question="unseen", separator="Q:")
    for context in ("a text", "Q: who?", ""):
        with pytest.raises(ValueError, match="document 0 has n"):
            lm.loglikelihood(requests("loglikelihood", (context, "b")))
    with pytest.raises(ValueError, match="means nothing"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("a text",)))


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_takes_lm_evals_options(folder, tmp_path, capsys):
    arguments = (
        f'pretrained={folder / "model"},cache="{SMALL}",budget=4,batch_size=2,question=unseen,separator=" Question:"'
    )
    options = ["--tasks", "t_choice", "t_answer", "--include_path", str(folder / "tasks"), "--apply_chat_template"]
    options += ["--output_path", str(tmp_path), "--log_samples", "--limit", "2", "--model_args", arguments]
    assert main(options) == 0
    printed = capsys.readouterr()
    assert "t_choice" in printed.out and "question unseen while compressing" in printed.err
    (file,) = tmp_path.rglob("results_*.json")
    config = json.loads(file.read_text())["config"]
    assert config["model"] == "zoo" and config["zoo"]["mode"] == "question unseen while compressing"
    assert config["zoo"]["budget"] == "4" and config["zoo"]["truncated"] == 0 and config["zoo"]["batch_size"] == 2
    assert len(list(tmp_path.rglob("samples_*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "no_such_task"], "evaluate: Tasks not found: no_such_task"),
        (["--tasks", "t_choice", "--model_args", "cache=nothing"], "nothing"),
        (["--tasks", "t_choice", "--no_such_option"], "lm-eval does not take these options"),
    ],
)
def test_the_command_says_what_is_wrong(folder, options, message, capsys):
    model = ["--model_args", f"pretrained={folder / 'model'}"]
    assert main([*options, "--include_path", str(folder / "tasks"), *model]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_file_of_results_belongs_to_one_setting(model, tmp_path, spied):
    path = str(tmp_path / "results")
    asked = requests("loglikelihood", ("the quick brown fox jumps over the dog", "a"))

    def cached(**options):
        lm = CachingLM(model(**{"cache": SMALL, "budget": 8} | options), path)
        got = lm.loglikelihood(asked)
        lm.dbdict.close()
        return got

    first, count = cached(), len(spied)
    assert cached(batch_size=2) == first and len(spied) == count
    for options, said in (
        ({"budget": 6}, "{'budget': '8'}, not of {'budget': '6'}"),
        ({"cache": "full", "budget": None}, "'cache': 'full'"),
        ({"dtype": "bfloat16"}, "{'dtype': 'float32'"),
        ({"truncate": "left"}, "{'truncate': 'error'}, not of {'truncate': 'left'}"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            cached(**options)
    assert cached() == first


def test_a_file_of_results_knows_what_files_hold(model, tmp_path):
    scores, path, lm = tmp_path / "heads.json", str(tmp_path / "results"), model(cache="full")
    scores.write_text("one")
    lm._files["importance"] = str(scores)
    for _ in range(2):
        CachingLM(lm, path).dbdict.close()
    scores.write_text("two")
    with pytest.raises(ValueError, match=r"holds results of \{'importance'"):
        CachingLM(lm, path)
    scores.write_text("one")
    lm.loaded.model.embed.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"holds results of \{'weights_hash'"):
        CachingLM(lm, path)


def test_tasks_see_the_default_model(monkeypatch):
    from lm_eval._cli import HarnessCLI

    seen = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, args: seen.append(args.model_args))
    assert main(["--tasks", "t", "--model_args", "budget=64"]) == 0
    assert main(["--tasks", "t"]) == 0
    assert main(["--tasks", "t", "--model_args", "pretrained=mine"]) == 0
    assert main(["--tasks", "t", "--model", "dummy"]) == 0
    default = {"pretrained": DEFAULT_MODEL}
    assert seen == [default | {"budget": 64}, default, {"pretrained": "mine"}, None]


def test_a_place_that_cannot_be_written_is_refused_before_loading(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zoo.harness.load", None)
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "results.json"):
        assert main(["--tasks", "t_choice", "--include_path", str(folder / "tasks"), "--output_path", str(output)]) == 2
        assert f"--output_path {output} cannot be written" in capsys.readouterr().err.splitlines()[-1]


def test_help_does_not_wait_for_torch():
    code = "import sys\nfrom zoo import evaluate\nevaluate.main(['--help'])\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "question=unseen" in done.stdout and "--include_path" in done.stdout


def test_both_backends_are_compared_by_a_command(folder, tmp_path, capsys):
    output = tmp_path / "out.json"
    sizes = ["--texts", "2", "--tokens", "60", "--new-tokens", "4", "--rounds", "1"]
    assert check_evaluate.main(["--model", str(folder / "model"), *sizes, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["full"]["loglikelihood"]["largest"] < 1e-3 and found["full"]["loglikelihood_rolling"]["largest"] < 1e-3
    assert found["full"]["generate_until"] == {"requests": 2, "same": 2}
    assert found["batches"]["same"] == found["batches"]["answers"] == 2 and found["batches"]["ratio"] > 0
    assert "| loglikelihood | " in capsys.readouterr().out
