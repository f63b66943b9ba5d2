"""`python -m zoo.chat`: talk to a model in a terminal, or have one reply printed."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

from checkpoints.storage import cache_home
from zoo import cli, listing
from zoo.answer import Answer, cache_figures, show
from zoo.cli import note
from zoo.conversation import Conversation, opening, read_messages, write_messages

_DESCRIPTION = """Chat with a model whose KV cache has a budget.

Without a prompt the chat is interactive: Ctrl-C stops an answer, Ctrl-D leaves, /help shows the commands.
With a prompt the reply alone goes to standard output, everything else to standard error."""
_EXAMPLES = """examples:
  python -m zoo.chat --cache headkv --budget 128
  python -m zoo.chat --prompt "Why is the sky blue?" --temperature 0
  python -m zoo.chat --prompt-file report.txt --cache snapkv --budget 12.5% --stats
"""
_HISTORY_LINES = 1000
_PROMPT = ">>> "


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
        "--system", type=cli.utf8_text, metavar="S", help="system prompt (default: what the model's template has)"
    )
    args = parser.parse_args(argv)
    if args.list is not None:
        listing.show(args.list)
    elif (prompt := cli.read_prompt(args)) is not None:
        _reply(args, prompt)
    else:
        _interact(args)


def _reply(args: argparse.Namespace, prompt: str) -> None:
    loaded = cli.load_model(args)
    ids = loaded.chat.encode([*opening(args.system), {"role": "user", "content": prompt}])
    engine = cli.make_engine(args, loaded, prompt=ids)
    answer = Answer(engine, ids, cli.sampling(args))
    show(answer)
    if answer.is_cut:
        note(f"the reply was cut after {answer.tokens} tokens: raise --max-new-tokens for more")
    if args.stats:
        note(cache_figures(engine))
        note(answer.speed)


def _interact(args: argparse.Namespace) -> None:
    if sys.stdin is None:
        raise ValueError("standard input is closed: chat in a terminal, pipe lines in, or pass --prompt TEXT")
    if args.allow_overflow and args.max_context is None:
        raise ValueError("--allow-overflow needs --max-context N here: say how long the chat may become")
    loaded = cli.load_model(args)
    engine = cli.make_engine(args, loaded)
    loop = _Loop(Conversation(engine, system=args.system, sampling=cli.sampling(args)), with_figures=args.stats)
    if not sys.stdin.isatty():
        return loop.run()
    budget = "" if engine.budget is None else f" at a budget of {engine.budget}"
    context = "no end" if engine.endless else f"context {engine.max_context:,} tokens"
    note(f"{loaded.name}, {engine.method.name} cache{budget}, {context}; /help for help")
    with _line_editing():
        loop.run()


@contextmanager
def _line_editing() -> Iterator[None]:
    """Give `input` a history and editing keys, where Python was built with them."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.parse_and_bind("set enable-bracketed-paste on")  # lines that are pasted together are one message
    path = cache_home() / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):  # a chat does not fail because its history cannot be kept
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


class _Stop:
    """Ctrl-C as a wish that is granted between two tokens; before the first, or pressed again, as an interrupt."""

    def __init__(self) -> None:
        self.has_begun = self.is_wanted = False

    def __enter__(self) -> _Stop:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.is_wanted or not self.has_begun:
            raise KeyboardInterrupt
        self.is_wanted = True


class _Loop:
    """Reads lines, and answers or obeys them."""

    def __init__(self, conversation: Conversation, *, with_figures: bool) -> None:
        self._conversation, self._with_figures = conversation, with_figures
        self._is_terminal = sys.stdin.isatty()
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/reset": (self._reset, "forget the conversation; the system prompt stays"),
            "/stats": (self._stats, "what the cache holds, and the speed of the last answer"),
            "/system": (self._system, "show the system prompt; /system TEXT sets another and begins anew"),
            "/save": (self._save, "/save FILE keeps the conversation"),
            "/load": (self._load, "/load FILE goes on with one that was kept"),
            "/help": (self._help, "this list"),
            "/exit": (self._exit, "leave, as Ctrl-D does"),
        }

    def run(self) -> None:
        """Go on until the input ends or the user leaves."""
        with suppress(EOFError):
            while True:
                try:
                    self._obey_or_answer(self._read())
                except KeyboardInterrupt:
                    if not self._is_terminal:
                        raise
                    print(file=sys.stderr)
                    note("(interrupted; Ctrl-D or /exit leaves)")

    def _read(self) -> str:
        if not self._is_terminal:
            data = sys.stdin.buffer.readline()
            if not data:
                raise EOFError
            return cli.decoded(data, "standard input").rstrip("\r\n")
        try:
            if sys.stdout.isatty():
                return input(_PROMPT)
            print(_PROMPT, end="", file=sys.stderr, flush=True)
            return input()
        except UnicodeDecodeError:
            note("that line is not valid UTF-8: set the terminal to UTF-8")
            return ""
        except EOFError:
            print(file=sys.stderr)
            raise

    def _obey_or_answer(self, line: str) -> None:
        name, _, argument = line.strip().partition(" ")
        try:
            if not line.startswith("/"):
                self._answer(line.strip())
            elif name in self._commands:
                self._commands[name][0](argument.strip())
            else:
                raise ValueError(
                    f"there is no command {name}: /help lists them, and a space before / makes it a message"
                )
        except ValueError as error:
            note(str(error))

    def _answer(self, text: str) -> None:
        if not text:
            return
        with _Stop() as stop, closing(self._conversation.ask(text)) as pieces:
            for piece in pieces:
                stop.has_begun = True
                sys.stdout.write(piece)
                sys.stdout.flush()
                if stop.is_wanted:
                    break
        print(flush=True)
        if stop.is_wanted:
            note("(stopped)")
        elif self._conversation.is_cut:
            note("(cut: --max-new-tokens allows no longer answer)")
        if self._with_figures:
            self._stats("")

    def _reset(self, _: str) -> None:
        self._conversation.begin(opening(self._conversation.system))
        note("(a new conversation)")

    def _stats(self, _: str) -> None:
        for line in self._conversation.figures():
            note(line)

    def _system(self, text: str) -> None:
        if text:
            self._conversation.begin(opening(text))
            note("(a new conversation with this system prompt)")
        else:
            note(self._conversation.system or "there is no system prompt but what the model's template has")

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        try:
            write_messages(path, self._conversation.messages)
        except OSError as error:
            raise ValueError(f"cannot write {path} ({error.strerror or error}): choose another place") from None
        note(f"(saved to {path})")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        try:
            messages = read_messages(path)
        except OSError as error:
            raise ValueError(f"cannot read {path} ({error.strerror or error}): choose another file") from None
        self._conversation.begin(messages)
        note(f"({len(messages)} messages; the model reads them with your next one)")

    def _help(self, _: str) -> None:
        for name, (_command, summary) in self._commands.items():
            print(f"{name:8} {summary}", file=sys.stderr)
        print("Ctrl-C   stop an answer", file=sys.stderr)

    def _exit(self, _: str) -> None:
        raise EOFError


def _path(name: str, command: str) -> Path:
    if not name:
        raise ValueError(f"{command} needs the name of a file: {command} chat.json")
    return Path(name).expanduser()


if __name__ == "__main__":
    sys.exit(main())
