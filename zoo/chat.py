"""`python -m zoo.chat`: talk to a model; the cache stays from turn to turn."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from checkpoints.storage import atomic_file, cache_home
from zoo import cli
from zoo.answer import Answer, cache_figures, show
from zoo.cli import note
from zoo.load import Loaded

if TYPE_CHECKING:
    from zoo.engine import Engine

_DESCRIPTION = """Chat with a model whose KV cache has a budget.

Without --prompt the chat is interactive: Ctrl-C stops an answer, Ctrl-D or /exit leaves, /help shows the commands.
With --prompt or --prompt-file the reply alone goes to standard output, everything else to standard error."""
_EXAMPLES = """examples:
  python -m zoo.chat --cache headkv --budget 128
  python -m zoo.chat --prompt "Why is the sky blue?" --temperature 0
  python -m zoo.chat --prompt-file report.txt --cache snapkv --budget 12.5% --stats
"""
_HISTORY_LINES = 1000

Message = dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its options; None takes those of the process.

    Returns:
        The exit status; see `zoo.cli.run`.
    """
    return cli.run("zoo.chat", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> None:
    parser = cli.parser("python -m zoo.chat", _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "--system", type=cli.text, metavar="S", help="system prompt (default: that of the model's template)"
    )
    args = parser.parse_args(argv)
    if args.list:
        return cli.print_choices()
    prompt = cli.read_prompt(args)
    if prompt is None:
        _interactive(args)
    else:
        _one_reply(args, prompt)


def _one_reply(args: argparse.Namespace, prompt: str) -> None:
    loaded = cli.load_model(args)
    ids = loaded.chat.encode([*_opening(args.system), {"role": "user", "content": prompt}])
    engine = cli.make_engine_for(args, loaded, ids)
    answer = Answer(engine, ids, cli.sampling(args))
    show(answer)
    if answer.is_cut:
        note(f"the answer was cut after {answer.tokens} tokens: raise --max-new-tokens for more")
    if args.stats:
        note(f"{cache_figures(engine)}; {answer.speed}")


def _opening(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


# -- a conversation ----------------------------------------------------------------------------------------------------


class Conversation:
    """Messages, and an engine whose cache holds them.

    Args:
        engine: makes the answers; this conversation's alone.
        system: system prompt; None leaves it to the model's template.
        sampling: how tokens are chosen, as `Engine.stream` takes it.

    Attributes:
        messages: what was said: an optional system prompt, then user and assistant in turn.
    """

    def __init__(self, engine: Engine, *, system: str | None, sampling: dict[str, Any]) -> None:
        self.engine, self.sampling = engine, sampling
        self.messages = _opening(system)
        self._last: Answer | None = None

    def begin(self, messages: list[Message]) -> None:
        """Forget what was said and take these messages as said; they are read with the next turn."""
        self.messages = messages
        self.engine.reset()
        self._last = None

    @property
    def system(self) -> str | None:
        """The system prompt."""
        return next((message["content"] for message in self.messages if message["role"] == "system"), None)

    def ask(self, text: str) -> Iterator[str]:
        """Answer piece by piece.

        What was said before the caller stops is part of the conversation. When the reading of the question is interrupted,
        or an answer from within, the cache is lost, and the next turn reads the whole conversation again.

        Args:
            text: what the user says.

        Yields:
            Text, possibly empty.

        Raises:
            ValueError: the turn and its answer do not fit into the context, **or** the template refuses it.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self._last = Answer(self.engine, self._new_ids(asked), self.sampling)
        is_whole = False
        try:
            yield from answer
            is_whole = True
        except (Exception, KeyboardInterrupt):
            self.engine.reset()
            raise
        finally:
            if is_whole or answer.tokens:
                self.messages = [*asked, {"role": "assistant", "content": answer.text}]
