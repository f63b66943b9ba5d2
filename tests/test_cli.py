"""The commands as users run them: every flag, every slash command, in pipes and in a terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from checkpoints import LayerSharing, config_hash, write_sharing
from layers.fused import FusedBlocks
from layers.methods import describe, method_names
from tests import tiny_chat
from zoo import Engine, chat, cli, generate, load
from zoo.conversation import Conversation

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
COMMANDS = ("/reset", "/stats", "/system", "/save", "/load", "/help", "/exit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.write(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def scores(folder):
    return tiny_chat.write_scores(folder, folder.parent / "scores.json")


@pytest.fixture(scope="module")
def loaded(folder):
    return load(str(folder), progress=False)


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADKV_ZOO_HOME", str(tmp_path / "home"))


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run a command in this process: (exit status, stdout, stderr)."""

    def run(main, *options, stdin=b"", model=folder):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        status = main(["--model", str(model), "--cache", "snapkv", "--max-new-tokens", "8", *map(str, options)])
        return status, *capsys.readouterr()

    return run


def greedy(loaded, ids, count):
    """The dense forward's most likely continuation."""
    ids = list(ids)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(loaded.model(torch.tensor([ids]))[0, -1].argmax()))
    return loaded.tokenizer.decode(ids[-count:])


# -- options -----------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_whole():
    code = (
        "import sys\nfrom zoo import chat\nchat.main(['--help'])\n"
        "heavy = {'torch', 'rich', 'tokenizers', 'gguf'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for option in _options():
        assert option in done.stdout
    assert done.stdout.count("python -m zoo.chat --") >= 2  # examples


def _options():
    parser = cli.parser("p", "d", "e")
    return [*parser._option_string_actions, "--system"]


def test_every_option_and_command_is_tried_here():
    source = re.sub(r"^COMMANDS = .*$", "", Path(__file__).read_text(), flags=re.MULTILINE)
    for option in set(_options()) - {"-h"}:
        assert re.search(rf"""["']{option}["']""", source), f"no test runs {option}"
    for command in COMMANDS:
        assert re.search(rf"^{command}\b", source, re.MULTILINE), f"no test runs {command}"


@pytest.mark.parametrize("main", [chat.main, generate.main])
@pytest.mark.parametrize(
    "options",
    [
        ("--cache", "full"),
        ("--cache", "streaming"),
        ("--cache", "streaming:sinks=2", "--budget", "9"),
        ("--cache", "snapkv:preset=tuned", "--budget", "50%"),
        ("--budget", "1MiB"),
        ("--temperature", "1.5", "--top-k", "7", "--top-p", "0.5", "--min-p", "0.05", "--seed", "3"),
        ("--dtype", "bfloat16", "--device", "cpu"),
        ("--weights", "int8"),
        ("--no-compile",),
        ("--max-context", "300"),
        ("--allow-overflow",),
        ("--stats",),
    ],
    ids=" ".join,
)
def test_options_give_an_answer(run, main, options):
    status, out, err = run(main, "--prompt", "Tell me something.", *options)
    assert status == 0, err
    assert len(out) == 9 and out.endswith("\n")
    assert ("tokens seen" in err) == ("--stats" in options)


def test_headkv_takes_an_importance_file_and_options(run, scores):
    prompt = ("--prompt", "word " * 60, "--max-new-tokens", "3", "--stats")
    _, _, even = run(chat.main, *prompt, "--cache", "snapkv", "--budget", "64")
    _, _, ragged = run(chat.main, *prompt, "--cache", "headkv:beta=1.1", "--budget", "64", "--importance", scores)
    kept = [
        [float(n) for n in re.search(r"kept per head (\S+) min, (\S+) mean, (\S+) max", e).groups()]
        for e in (even, ragged)
    ]
    assert kept[0] == [66.0, 66.0, 66.0]  # the budget and two generated tokens
    assert kept[1][1] == 66.0 and kept[1][0] < 66 < kept[1][2]


def test_kvsharer_takes_a_file_of_layers_that_share(run, loaded, tmp_path):
    layers = loaded.config.num_layers
    hashes = {"config_hash": config_hash(loaded.config), "tokenizer_hash": loaded.tokenizer.fingerprint()}
    found = LayerSharing(model_id="tiny", **hashes, num_layers=layers, pairs=((2, 0),), similarity=(0.9,))
    write_sharing(tmp_path / "sharing.json", found)
    options = ("--prompt", "word " * 600, "--max-new-tokens", "3", "--stats")
    outs = [
        run(chat.main, *options, "--cache", "full"),
        run(chat.main, *options, "--cache", "kvsharer", "--sharing", tmp_path / "sharing.json"),
    ]
    assert [status for status, *_ in outs] == [0, 0]
    assert outs[0][1] != outs[1][1], "the layer reads other keys"
    full, shared = (float(re.search(r"([\d.]+) MiB", err)[1]) for _, _, err in outs)
    assert 0.5 < shared / full < 0.8  # two layers of three have slots, tables are as they were


def test_threads(run, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert run(chat.main, "--prompt", "x", "--threads", "2")[0] == 0
    assert asked == [2]


def test_dtype_halves_the_cache(run):
    def full_bytes(dtype):
        _, _, err = run(chat.main, "--prompt", "x" * 900, "--stats", "--dtype", dtype)
        return float(re.search(r"a full cache: ([\d.]+) MiB", err)[1])

    assert full_bytes("bfloat16") == pytest.approx(full_bytes("float32") / 2, abs=0.1)


def test_seed_decides_the_answer(run):
    def answer(seed):
        return run(chat.main, "--prompt", "x", "--temperature", "5", "--top-p", "1", "--seed", seed)[1]

    assert answer(1) == answer(1) != answer(2)


def test_system_prompt_is_said(run, loaded):
    _, out, _ = run(chat.main, "--prompt", "x", "--system", "Be brief.", "--temperature", "0")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    assert out == greedy(loaded, loaded.chat.encode(messages), 8) + "\n"


def test_prompts_from_options_files_and_pipes_are_the_same(run, tmp_path):
    text = "Zwölf Boxkämpfer\njagen 🥊\n"
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    answers = {
        run(chat.main, "--prompt", text.removesuffix("\n"))[1],
        run(chat.main, "--prompt-file", file)[1],
        run(chat.main, "--prompt-file", "-", stdin=text.encode())[1],
    }
    assert len(answers) == 1


def test_generate_continues_raw_text(run, loaded):
    _, out, _ = run(generate.main, "--prompt", "Once", "--temperature", "0")
    assert out == greedy(loaded, loaded.tokenizer.encode("Once"), 8) + "\n"


def test_prompt_prints_the_reply_alone(run, loaded):
    status, out, err = run(chat.main, "--prompt", "Hello?", "--temperature", "0", "--stats", "--cache", "full")
    assert status == 0
    assert out == greedy(loaded, loaded.chat.encode([{"role": "user", "content": "Hello?"}]), 8) + "\n"
    assert "cut after 8 tokens" in err and "tok/s" in err


def test_list_shows_every_choice(run):
    status, out, err = run(chat.main, "--list")
    assert status == 0 and not err
    for name in ("smollm2-135m", "qwen3", "headkv", "full", "snapkv", "streaming", "arXiv 2410.19258", "bfloat16"):
        assert name in out
    rows = {tuple(re.split(r"\s{2,}", line.strip())) for line in out.splitlines()}
    assert ("headkv", "window attention", "head importance", "yes", "-") in rows
    assert ("compresskv", "chosen heads", "layer errors", "yes", "-") in rows
    assert ("streaming", "position", "uniform", "-", "yes") in rows
    assert ("criticalkv", "window attention,", "uniform", "-", "-") in rows
    assert ("expected-attention", "expected attention", "uniform", "-", "-") in rows
    assert ("adakv", "window attention", "layer top k", "-", "-") in rows
    assert "projected values" in out and "--list snapkv" in out
    assert ("cake", "varying attention", "layer preference", "-", "-") in rows
    assert ("kvsharer", "position", "uniform", "yes", "-") in rows
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("main", [chat.main, generate.main])
@pytest.mark.parametrize("name", method_names())
def test_list_shows_what_may_be_set_of_a_method(run, name, main):
    status, out, err = run(main, "--list", name)
    about = describe(name)
    assert status == 0 and not err and max(map(len, out.splitlines())) <= 100
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    for option, what in about.options.items():
        presets = [str(getattr(scoring, option)) for scoring in about.presets.values() if option in about.scoring]
        shown = [row for row in rows if row[0] == option]  # cake's budgets and scores both have a window
        assert len(shown) == (option in about.budgets) + (option in {**about.choices, **about.own, **about.scoring})
        assert all(row[1:-1] == (presets or [what.written]) for row in shown)
        assert any(what.meaning.startswith(row[-1]) for row in shown)
    for preset in about.presets:
        assert re.search(rf"^ option.* {preset} ", out, re.MULTILINE)
    if about.options:
        assert cli.described(re.search(r"--cache (\S+)$", out, re.MULTILINE)[1])
    else:
        assert "It has no options" in out


def test_list_shows_what_may_be_set_of_others_budgets_and_of_what_is_changed(run):
    _, out, _ = run(chat.main, "--list", "kvsharer+criticalkv+h2o:allocator=adakv")
    shares, alpha, own, budgets = (out.index(f"\n {x} ") for x in ("share ", "alpha ", "ratio ", "alpha   0.2"))
    assert shares < alpha < own < budgets
    status, _, err = run(chat.main, "--list", "snapkw")
    assert status == 2 and "no cache method is called 'snapkw': choose from adakv" in err


def test_the_context_is_a_limit_unless_overflow_is_allowed(run, tmp_path):
    small = tiny_chat.write(tmp_path / "small", max_position_embeddings=64)
    long = ("--prompt", "a" * 100)
    for options in ((), ("--max-context", "128")):
        status, out, err = run(chat.main, *long, *options, model=small)
        assert status == 2 and not out
        assert re.search(r"prompt has \d{3} tokens and its answer may have 8.* context is 64|128 is beyond the 64", err)
    assert run(chat.main, *long, "--allow-overflow", model=small)[0] == 0
    assert run(chat.main, "--allow-overflow", "--max-context", "128", "--no-compile", model=small, stdin=b"x")[0] == 0


def test_answers_are_short_where_the_context_is(tmp_path, run):
    small = tiny_chat.write(tmp_path / "small", max_position_embeddings=64)
    status = chat.main(["--model", str(small), "--cache", "full", "--prompt", "hi"])
    assert status == 0


def test_compile_gives_the_same_answer(run):
    options = ("--prompt", "Hello?", "--temperature", "0")
    assert run(chat.main, *options, "--compile")[:2] == run(chat.main, *options, "--no-compile")[:2]


@pytest.mark.parametrize(("options", "compile"), [((), True), (("--compile",), True), (("--no-compile",), False)])
def test_the_decode_step_is_compiled_by_default(run, monkeypatch, options, compile):
    made, allocate = [], Engine._allocate
    monkeypatch.setattr(Engine, "_allocate", lambda engine, batch: (allocate(engine, batch), made.append(engine))[0])
    for call in ({"stdin": b"hi\n"}, {}):
        assert run(chat.main, *options, *(() if call else ("--prompt", "hi")), **call)[0] == 0
    assert {isinstance(block, FusedBlocks) for engine in made for block in engine._blocks} == {compile}


def test_a_broken_compiler_is_not_the_end(run, without_native):
    status, out, err = run(chat.main, stdin=b"hi\n")
    assert status == 0 and len(out) == 9
    assert re.match(r"/bin/false cannot build kernels/cpp \(status 1\): running uncompiled.*\n\(cut", err)
    assert "uncompiled" not in run(chat.main, "--no-compile", stdin=b"hi\n")[2]


@pytest.mark.parametrize("call", [("--prompt", "hi"), ()], ids=["reply", "chat"])
def test_compile_that_was_asked_for_must_work(run, without_native, call):
    status, out, err = run(chat.main, "--compile", *call, stdin=b"hi\n")
    assert status == 2 and not out
    assert re.match(r"zoo.chat: compiling failed \(/bin/false .*\): repair that, or pass --no-compile\n$", err)


def test_without_a_compiler_the_chat_runs_uncompiled(run, without_native, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    status, out, err = run(chat.main, stdin=b"hi\n")
    assert status == 0 and len(out) == 9
    assert err.splitlines()[0].startswith("there is no C++ compiler (install g++): running uncompiled")
    status, out, err = run(chat.main, "--compile", stdin=b"hi\n")
    assert (status, out) == (2, "") and err.startswith("zoo.chat: --compile needs a C++ compiler and there is none")


# -- conversations -----------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(loaded, scores):
    return Engine(loaded, cache="headkv", budget=1024, max_new_tokens=12, max_context=1024, importance=scores)


def ids_of(loaded, conversation):
    return loaded.chat.encode(conversation.messages[:-1])


def test_turns_keep_the_cache_and_equal_a_fresh_dense_run(loaded, engine, capsys, monkeypatch):
    calls = []

    def counted(name, method):
        return lambda rows: (calls.append(name), method(rows))[1]

    for name in ("prefill", "extend"):
        monkeypatch.setattr(engine, name, counted(name, getattr(engine, name)))
    conversation = Conversation(engine, system="Be brief.", sampling={})
    for text in ("Hello <|im_end|> there", "And then?", "Why, 🥊?"):
        reply = "".join(conversation.ask(text))
        ids = ids_of(loaded, conversation)
        assert reply == greedy(loaded, ids, 12)
        assert engine.tokens_seen == [len(ids) + 11]  # the last token is not in the cache yet
        assert conversation.is_cut
    assert calls == ["prefill", "extend", "extend"]
    assert not capsys.readouterr().err


def test_a_stopped_answer_is_part_of_the_conversation(loaded, engine):
    conversation = Conversation(engine, system=None, sampling={})
    with closing(conversation.ask("Hello")) as pieces:
        said = "".join(next(pieces) for _ in range(5))
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    assert "".join(conversation.ask("Go on")) == greedy(loaded, ids_of(loaded, conversation), 12)
    assert engine.tokens_seen[0] == len(ids_of(loaded, conversation)) + 11


def test_an_interrupted_reading_costs_the_cache_alone(loaded, engine, capsys, monkeypatch):
    conversation = Conversation(engine, system=None, sampling={})
    "".join(conversation.ask("Hello"))
    before = conversation.messages
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.model, "logits", lambda x: signal.raise_signal(signal.SIGINT))
        "".join(conversation.ask("lost"))
    assert conversation.messages == before and engine.tokens_seen == [0]
    assert "".join(conversation.ask("Again")) == greedy(loaded, ids_of(loaded, conversation), 12)
    assert capsys.readouterr().err.startswith("(reading the whole conversation again")


def test_a_template_that_rewrites_the_past_is_read_anew(tmp_path, capsys):
    loaded = load(str(tiny_chat.write(tmp_path / "m", template=tiny_chat.REWRITING_TEMPLATE)), progress=False)
    engine = Engine(loaded, cache="full", max_new_tokens=6, max_context=512)
    conversation = Conversation(engine, system=None, sampling={})
    for text in ("Hello", "And then?"):
        assert "".join(conversation.ask(text)) == greedy(loaded, ids_of(loaded, conversation), 6)
    assert capsys.readouterr().err.count("reading the whole conversation again") == 1


def test_a_turn_that_does_not_fit_is_refused_and_changes_nothing(loaded, engine):
    conversation = Conversation(engine, system=None, sampling={})
    "".join(conversation.ask("Hello"))
    before, seen = conversation.messages, engine.tokens_seen
    with pytest.raises(
        ValueError, match=r"the prompt has 1\d{3} tokens after \d+ earlier .* context is 1024: .*/reset"
    ):
        "".join(conversation.ask("a" * 1000))
    assert conversation.messages == before and engine.tokens_seen == seen
    assert "".join(conversation.ask("b")) == greedy(loaded, ids_of(loaded, conversation), 12)


# -- slash commands ----------------------------------------------------------------------------------------------------


def test_piped_lines_are_answered_and_obeyed(run, tmp_path, loaded):
    saved = tmp_path / "chat.json"
    script = f"""Hello
/stats
/save {saved}
/reset
/system Be brief.
/system
/load {saved}
Go on
/save {saved}
/help
/nonsense
/load {tmp_path}/none.json
/save /nowhere/chat.json
/save {__file__}
/save
 /etc/hosts?

/exit
never said"""
    status, out, err = run(chat.main, "--cache", "full", "--temperature", "0", "--no-compile", stdin=script.encode())
    assert status == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert out.splitlines()[:2] == [messages[1]["content"], messages[3]["content"]]
    assert len(out.splitlines()) == 3
    assert messages[3]["content"] == greedy(loaded, loaded.chat.encode(messages[:3]), 8)
    for text in (
        "full: ",
        "(a new conversation)",
        "(a new conversation with this system prompt)",
        "Be brief.",
        "(2 messages; the model reads them with your next one)",
        "(reading the whole conversation again",
        "there is no command /nonsense: /help",
        "none.json (No such file or directory): choose another file",
        "cannot write /nowhere/chat.json",
        "test_cli.py is not a conversation",
        "/save needs the name of a file",
        *COMMANDS,
    ):
        assert text in err, text


def test_a_full_context_does_not_end_the_chat(run):
    script = b"Hello\n" + b"a" * 200 + b"\nGo on\n"
    status, out, err = run(chat.main, "--max-context", "200", "--no-compile", stdin=script)
    assert status == 0 and len(out.splitlines()) == 2
    assert re.search(r"the prompt has 2\d\d tokens after \d+ earlier ones .* context is 200: .*/reset", err)


def test_stats_after_each_answer(run):
    _, _, err = run(chat.main, "--stats", "--no-compile", stdin=b"Hello\nAgain\n")
    seen = [int(n) for n in re.findall(r"(\d+) tokens seen", err)]
    assert len(seen) == 2 and seen[1] > seen[0] + 8
    assert re.search(
        r"kept per head \d+ min, [\d.]+ mean, \d+ max; [\d.]+ MiB \(.* MiB\)\nprefill [\d,]+ tok/s, decode", err
    )


# -- a terminal --------------------------------------------------------------------------------------------------------


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, folder, home, *options):
        command = ["-m", "zoo.chat", "--model", folder, "--cache", "full", "--no-compile", "--threads", "1", *options]
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.chdir(ROOT)
            environment = {**os.environ, "TERM": "xterm", "HEADKV_ZOO_HOME": str(home), "OMP_NUM_THREADS": "1"}
            os.execve(sys.executable, [sys.executable, *map(str, command)], environment)
        self._text, self.status = "", None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self._fd)  # hangs up on a chat that is still there
        if self.status is None:
            os.waitpid(self._pid, 0)

    def type(self, text):
        os.write(self._fd, text.encode())

    def until(self, pattern, seconds=90):
        """What appears up to a match, or all the rest for None."""
        end = time.monotonic() + seconds
        while pattern is None or not re.search(pattern, self._text):
            assert select.select([self._fd], [], [], max(0, end - time.monotonic()))[0], self._text
            try:
                self._text += os.read(self._fd, 4096).decode(errors="replace")
                self._text = re.sub(r"\r|\x1b\[[?\d;]*[A-Za-z]", "", self._text)
            except OSError:  # the chat has ended
                assert pattern is None, self._text
                self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
                return self._text
        end = re.search(pattern, self._text).end()
        text, self._text = self._text[:end], self._text[end:]
        return text


def test_terminal_chat_with_history(folder, tmp_path):
    home = tmp_path / "home"
    with Terminal(folder, home, "--max-new-tokens", "8", "--temperature", "0") as terminal:
        assert "full cache, context 4,096 tokens" in terminal.until(r"\n>>> ")
        terminal.type("Hello\n")
        first = terminal.until(r"\n>>> ")
        terminal.type("/reset\n")
        terminal.until(r"\(a new conversation\)\n>>> ")
        terminal.type("\x10\x10\n")  # the line before the last, as the terminal's editing keys have it
        again = terminal.until(r"\n>>> ")
        assert again.split("\n", 1)[1] == first.split("\n", 1)[1]
        terminal.type("\x1b[200~pasted\nlines\x1b[201~\n")
        terminal.until(r"\n>>> ")
        terminal.type(f"/save {tmp_path}/chat.json\n")
        terminal.until(r"\(saved to .*\)\n>>> ")
        terminal.type("/exit\n")
        assert "Traceback" not in terminal.until(None)
        assert terminal.status == 0
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["Hello", "pasted\nlines"]
    history = (home / "chat_history").read_text().split()
    assert history == ["Hello", "/reset", "Hello", "pasted", "lines", "/save", f"{tmp_path}/chat.json", "/exit"]


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(folder, tmp_path):
    with Terminal(folder, tmp_path / "home", "--max-new-tokens", "2000") as terminal:
        terminal.until(r"\n>>> ")
        terminal.type("\x03")
        terminal.type("\n")  # Python notices a Ctrl-C that comes just before it waits for keys only then
        terminal.until(r"Ctrl-D or /exit leaves\)\n>>> ")
        terminal.type("Hello\n")
        terminal.until(r"Hello\n.{5}")
        terminal.type("\x03")
        assert "Traceback" not in terminal.until(r"\(stopped\)\n>>> ")
        terminal.type("/stats\n")
        assert 0 < int(re.search(r"([\d,]+) tokens seen", terminal.until(r"\n>>> "))[1].replace(",", "")) < 2000
        terminal.type("Go on\n")
        assert "whole conversation" not in terminal.until(r"Go on\n.{5}")
        terminal.type("\x03")
        terminal.until(r"\(stopped\)\n>>> ")
        terminal.type("\x04")
        assert "Traceback" not in terminal.until(None)
        assert terminal.status == 0
