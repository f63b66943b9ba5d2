"""What the commands share: their options, the way from options to an engine, one clear line for every error."""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from checkpoints.importance import METHODS
from checkpoints.resolve import DEFAULT_MODEL
from kernels import native
from layers.budget import parse_budget
from zoo.load import DTYPES, WEIGHTS, Loaded, load

# torch takes seconds to import: `--help` and wrong options do not wait for it.
if TYPE_CHECKING:
    from layers.methods.base import Method
    from zoo.engine import Engine

DEFAULT_MAX_NEW_TOKENS = 512
_LARGEST = 2**31 - 1  # positions are int32
_PATIENCE_S = 2.0


# -- errors ------------------------------------------------------------------------------------------------------------


def run(program: str, body: Callable[[], None]) -> int:
    """Run a command; whatever goes wrong becomes one line on stderr.

    Args:
        program: begins the line.
        body: the command.

    Returns:
        The exit status: 0, 2 when something outside the program is wrong, 1 for an error of our own. With
        HEADKV_ZOO_DEBUG=1 a traceback comes before the line.
    """
    if sys.stderr is None:  # closed: `print(file=None)` would write to stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)
    try:
        if sys.stdout is None:
            raise ValueError("standard output is closed: there is nowhere to write to")
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks
        with suppress(SystemExit):  # how argparse leaves after printing the help
            body()
        sys.stdout.flush()
        return 0
    except BaseException as error:
        status, line = _explain(error)
        with suppress(OSError):
            if os.environ.get("HEADKV_ZOO_DEBUG") == "1":
                traceback.print_exc()
            note(f"{program}: {line}")
        _drop_unwritable_output()
        return status


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return 2, "interrupted"
    if isinstance(error, BrokenPipeError):
        return 2, "whoever read the output has closed it: the rest is lost"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return 2, f"{where}{error.strerror or error}: check the path, its permissions and the free space"
    if isinstance(error, ImportError):
        return 2, f"{error}: run `pip install -c constraints.txt -e .` in the project's folder"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return 2, "out of memory: use a smaller model, a smaller --dtype, or a lower --budget or --max-context"
    if isinstance(error, ValueError):
        return 2, str(error)
    return 1, f"{type(error).__name__}: {error}: this is a bug, please report what HEADKV_ZOO_DEBUG=1 prints"


def note(text: str) -> None:
    """Print one line on stderr, whatever the text holds."""
    line = " ".join(text.split())
    print("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line), file=sys.stderr)


def _drop_unwritable_output() -> None:
    """What cannot be written now must not be tried, and complained about, again when the interpreter exits."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -- options -----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse's, with errors raised as everywhere else."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message}; see --help")

    def print_help(self, file: Any = None) -> None:
        """Print the help text; argparse's own says nothing when that fails."""
        print(self.format_help(), end="", file=file)


def parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with the options of every command.

    Args:
        program: as the user calls it.
        description: what it does.
        examples: shown below the options.

    Returns:
        The parser; add what is the command's own.
    """
    made = Parser(
        prog=program,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    prompt = made.add_argument_group("prompt").add_mutually_exclusive_group()
    prompt.add_argument("--prompt", type=utf8_text, metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", metavar="P", help="a UTF-8 file with the prompt; - is standard input")

    model = made.add_argument_group("model")
    model.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="M",
        help="an alias, a checkpoint directory, a .gguf file or a hub id (default: %(default)s)",
    )
    model.add_argument("--dtype", default="float32", metavar="D", help=f"{', '.join(DTYPES)} (default: %(default)s)")
    model.add_argument(
        "--weights", choices=WEIGHTS, help="int8: matrices in 8 bits, a scale per row (default: as --dtype)"
    )
    model.add_argument(
        "--device", default="cpu", metavar="D", help="where to run, e.g. cpu or cuda (default: %(default)s)"
    )
    model.add_argument(
        "--threads", type=whole_number(1, 1024), metavar="N", help="CPU threads (default: torch decides)"
    )

    cache = made.add_argument_group("cache")
    cache.add_argument(
        "--cache",
        default="headkv",
        metavar="METHOD",
        help="headkv (default), full, snapkv, streaming and what else --list shows; options follow a colon: "
        "headkv:beta=1.2, snapkv:allocator=adakv (--list snapkv shows them)",
    )
    cache.add_argument(
        "--budget",
        type=budget_text,
        metavar="B",
        help="tokens of the prompt kept per KV head (128), a share of it (12.5%%) or bytes for everything (64MiB); the "
        "method decides unless given",
    )
    cache.add_argument(
        "--importance", metavar="FILE", help="head importance if it is needed (default: what ships for the model)"
    )
    cache.add_argument(
        "--sharing", metavar="FILE", help="layers that share, for kvsharer (default: what ships for the model)"
    )
    cache.add_argument(
        "--max-context",
        type=whole_number(1),
        metavar="N",
        help="tokens of prompts and answers at most (default: what the model was trained for)",
    )
    cache.add_argument(
        "--allow-overflow", action="store_true", help="go beyond the context that the model was trained for"
    )

    answer = made.add_argument_group("answer")
    answer.add_argument(
        "--max-new-tokens",
        type=whole_number(1),
        metavar="N",
        help=f"tokens per answer at most; room is reserved (default: {DEFAULT_MAX_NEW_TOKENS}, less in a short "
        "context or after a long prompt)",
    )
    answer.add_argument(
        "--temperature",
        type=_real(0, 100),
        default=0.2,
        metavar="T",
        help="0 always takes the likeliest token (default: %(default)s)",
    )
    answer.add_argument(
        "--top-k", type=whole_number(0), default=0, metavar="K", help="among the K likeliest; 0 is all (default)"
    )
    answer.add_argument(
        "--top-p",
        type=_real(0, 1, above=True),
        default=0.9,
        metavar="P",
        help="among the likeliest with mass P (default: %(default)s)",
    )
    answer.add_argument(
        "--min-p",
        type=_real(0, 1),
        default=0.0,
        metavar="M",
        help="among those at least M times as likely as the likeliest (default: %(default)s)",
    )
    answer.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="the same seed repeats an answer (default: %(default)s)",
    )

    running = made.add_argument_group("running")
    running.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="decode through compiled code (default: where there is a C++ compiler; on a GPU only in a chat)",
    )
    running.add_argument("--stats", action="store_true", help="after each answer, what the cache held and the speed")
    running.add_argument(
        "--list",
        nargs="?",
        const="",
        metavar="METHOD",
        help="show models, cache methods and dtypes, or one method's options and presets (--list snapkv), and leave",
    )
    return made


def check_writable(option: str, path: Path | None) -> None:
    """Refuse a file before the work whose results it is for.

    Args:
        option: that named it.
        path: the file, which need not exist; None passes.

    Raises:
        ValueError: it cannot be written; says why.
    """
    if path is None:
        return
    if path.is_dir():
        why = "it is a folder"
    elif not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        why = "you may not"
    else:
        return
    raise ValueError(f"{option} {path} cannot be written: {why}")


def utf8_text(argument: str) -> str:
    """Read an option that is a text.

    Raises:
        ArgumentTypeError: it is not valid UTF-8.
    """
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not valid UTF-8: put it in a file and convert that") from None
    return argument


def budget_text(text: str) -> str:
    """Read an option that is a budget, and leave it as it is.

    Raises:
        ArgumentTypeError: see `layers.budget.parse_budget`.
    """
    try:
        parse_budget(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def whole_number(least: int, most: int = _LARGEST) -> Callable[[str], int]:
    """How an option that is a whole number is read.

    Args:
        least: smallest that is allowed.
        most: largest; positions in a context are below 2**31.

    Returns:
        Text to number; raises `ArgumentTypeError` for any other text.
    """

    def read(text: str) -> int:
        with suppress(ValueError):
            if least <= (number := int(text)) <= most:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")

    return read


def _real(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    def read(text: str) -> float:
        with suppress(ValueError):
            if least <= (number := float(text)) <= most and not (above and number == least):
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {'above' if above else 'from'} {least} to {most}")

    return read


def read_prompt(args: argparse.Namespace) -> str | None:
    """The prompt that the options give, or None.

    Raises:
        ValueError: the file cannot be read or is not UTF-8, **or** standard input is closed, **or** the prompt is
            empty.
    """
    if args.prompt_file is None:
        prompt: str | None = args.prompt
    else:
        name = "standard input" if args.prompt_file == "-" else args.prompt_file
        if args.prompt_file == "-" and sys.stdin is None:
            raise ValueError("standard input is closed: pipe the prompt in, or use --prompt TEXT")
        try:
            data = sys.stdin.buffer.read() if args.prompt_file == "-" else Path(args.prompt_file).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"cannot read the prompt from {name} ({reason}): give a text file, or - for a pipe"
            ) from None
        prompt = decoded(data, name).removesuffix("\n")
    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is empty: write something after --prompt or into --prompt-file")
    return prompt


def decoded(data: bytes, name: str) -> str:
    r"""Text of UTF-8 bytes, with or without a byte order mark.

    Raises:
        ValueError: they are not UTF-8.

    Example:
        >>> decoded(b"caf\xc3\xa9", "menu.txt")
        'café'
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): convert it, e.g. with iconv"
        ) from None


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The options that say how tokens are chosen, as `Engine.stream` takes them."""
    return {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}


# -- model and engine --------------------------------------------------------------------------------------------------


@contextmanager
def starting() -> Iterator[None]:
    """Import and compile without looking for garbage, which takes 15 % longer and finds none among what stays."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@starting()
def load_model(args: argparse.Namespace) -> Loaded:
    """Load the model that the options ask for, after everything that can be refused without it.

    Raises:
        ValueError: options that contradict each other; see `zoo.load.load` and `layers.methods.build_method`.
    """
    check_cache(args)
    if args.compile and not has_compiler():
        raise ValueError("--compile needs a C++ compiler and there is none: install g++, or pass --no-compile")
    if args.compile is not False and args.device == "cpu":
        native.start()
    if args.threads is not None:
        import torch

        torch.set_num_threads(args.threads)
    return load(args.model, dtype=args.dtype, weights=args.weights, device=args.device, progress=sys.stderr.isatty())


def check_cache(args: argparse.Namespace) -> None:
    """Refuse options of a cache that would change nothing.

    Args:
        args: with `cache`, `budget`, `importance` and `sharing`.

    Raises:
        ValueError: the cache has no use for one of them; see also `layers.methods.build_method`.
    """
    from layers.methods import needs_importance

    method = described(args.cache)
    if args.budget is not None and method.default_budget is None:
        raise ValueError(
            f"--cache {method.name} keeps everything: drop --budget {args.budget}, or choose another method"
        )
    if args.importance is not None and not needs_importance(args.cache):
        raise ValueError(f"--cache {method.name} does not use head importance: drop --importance {args.importance}")
    if args.sharing is not None and not method.shared_layers:
        raise ValueError(f"--cache {method.name} shares no layers: drop --sharing {args.sharing}")


def described(spec: str) -> Method:
    """A method as it describes itself, made without the head importance of any model.

    Raises:
        ValueError: see `layers.methods.build_method`.
    """
    import torch

    from layers.methods import build_method

    return build_method(spec, {kind: torch.ones(1, 1) for kind in METHODS})


def has_compiler() -> bool:
    """Whether there is a C++ compiler."""
    return native.compiler() is not None


def compiles(args: argparse.Namespace, *, interactive: bool) -> bool:
    """Whether to decode through compiled code: as the options say, else where starting it is quick or pays.

    Raises:
        ValueError: it is wanted and the C++ compiler does not work.
    """
    if args.compile is False or (args.compile is None and args.device != "cpu" and not interactive):
        return False
    if args.device != "cpu":
        return True
    try:
        with waiting("Compiling; later starts find this done"):
            native.load()
    except RuntimeError as error:
        if args.compile:
            raise ValueError(f"compiling failed ({error}): repair that, or pass --no-compile") from error
        note(f"{error}: running uncompiled, which is slower; repair that, or silence this with --no-compile")
        return False
    return True


def make_engine(args: argparse.Namespace, loaded: Loaded, *, prompt: Sequence[int] | None = None) -> Engine:
    """An engine as the options want it: for the whole context, or for one prompt and its answer.

    Raises:
        ValueError: the prompt does not fit into the context; also see `zoo.engine.Engine`.
    """
    from zoo.engine import Engine

    trained = loaded.config.max_position
    context = args.max_context or trained
    if context > trained and not args.allow_overflow:
        raise ValueError(
            f"--max-context {context} is beyond the {trained} tokens that {loaded.name} was trained for: lower it, or "
            "pass --allow-overflow"
        )
    limit = args.max_new_tokens or min(DEFAULT_MAX_NEW_TOKENS, math.ceil(context / 4))
    if prompt is not None:
        if args.max_new_tokens is None and not args.allow_overflow:  # a default gives way to a long prompt
            limit = max(1, min(limit, context - len(prompt)))
        if args.max_context is not None:
            check_fits(len(prompt), 0, limit, context, "raise --max-context")
        elif not args.allow_overflow:
            check_fits(len(prompt), 0, limit, context, "pass --allow-overflow")
        context = len(prompt) + limit
    return Engine(
        loaded,
        cache=args.cache,
        budget=args.budget,
        max_new_tokens=limit,
        max_context=args.max_context if prompt is None else context,
        compile=compiles(args, interactive=prompt is None),
        importance=args.importance,
        sharing=args.sharing,
        allow_overflow=args.allow_overflow,
    )


def check_fits(new: int, seen: int, limit: int, context: int, remedy: str) -> None:
    """Refuse a prompt that leaves no room for its answer.

    Args:
        new: its tokens.
        seen: tokens before it.
        limit: tokens that the answer may have.
        context: tokens that there may be.
        remedy: what helps, besides a shorter prompt or answer.

    Raises:
        ValueError: it does not fit.
    """
    if seen + new + limit > context:
        earlier = f" after {seen} earlier ones" if seen else ""
        raise ValueError(
            f"the prompt has {new} tokens{earlier} and its answer may have {limit}, but the context is {context}: "
            f"shorten it, lower --max-new-tokens, or {remedy}"
        )


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Turn a spinner on a terminal's stderr when something takes longer than two seconds."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    status = Console(stderr=True).status(text)
    timer = threading.Timer(_PATIENCE_S, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        status.stop()
