"""The README's promises: its Python example, its script, and that its commands are the ones that the tests run."""

import importlib
import re
import shlex
from contextlib import suppress
from pathlib import Path

import pytest

from recipes import lean_generate, report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line
]


def test_the_python_example_runs(one_thread, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    answer, figures = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert answer.strip() and re.fullmatch(r"\d+ bytes of cache", figures)


def test_the_lean_script_generates(one_thread):
    assert "Paris" in lean_generate.main("The capital of France is", new_tokens=4)


@pytest.mark.parametrize("command", [c for part in COMMANDS for c in part.split("&&") if "python -m" in c])
def test_commands_parse(command, monkeypatch, capsys):
    """Every command is one of ours and takes the options that the README shows."""
    words = shlex.split(command)
    module = importlib.import_module(words[2])
    monkeypatch.setattr("sys.stdin", None)
    with suppress(SystemExit):
        module.main([*words[3:], "--help"])
    assert "usage" in capsys.readouterr().out


def test_tables_are_what_the_rows_give():
    """`python -m recipes.report` mends what differs."""
    for path, text in report.texts(report.SCORES, ROOT / "README.md").items():
        assert path.read_text() == text, f"{path.name} is not what the rows give: run python -m recipes.report"


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_ci_runs_the_test_command():
    command = next(c for c in COMMANDS if c.endswith("pytest"))
    install, test = (part.strip() for part in command.split("&&"))
    script = (ROOT / ".ci" / "run").read_text()
    assert install.replace("pip install", "pip install -q") in script and f"\n{test}\n" in script
