"""Runs a chat template, which is a program that a stranger wrote: sandboxed, and for a limited time."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoints.errors import CheckpointError

Message = Mapping[str, str]

_SECONDS = 2.0  # of processor time; honest templates take milliseconds
_LARGEST = 10_000_000  # a product, and characters of a repeated text


class ChatTemplate:
    r"""A compiled Jinja template.

    Args:
        text: the template.
        origin: where it comes from, for messages.
        variables: what it can read besides the messages, e.g. bos_token.

    Raises:
        CheckpointError: the template is not valid Jinja.

    Example:
        >>> template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "here", {})
        >>> template.render([{"role": "user", "content": "Hi"}], generate=True)
        'user: Hi\n'
    """

    def __init__(self, text: str, origin: str, variables: Mapping[str, str]) -> None:
        self.text, self._origin, self._variables = text, origin, dict(variables)
        try:
            with _deadline():
                self._template = _environment().from_string(text)
        except Exception as error:  # constant expressions are evaluated already here
            raise CheckpointError(
                f"the chat template of {origin} cannot be compiled ({_line(error)}): get the file again or correct it"
            ) from error

    def render(self, messages: Sequence[Message], *, generate: bool) -> str:
        """Write messages as one text.

        Args:
            messages: each with a role and a content.
            generate: end with what makes the model answer.

        Raises:
            ValueError: the template refuses these messages.
            CheckpointError: the template tries to leave its sandbox or does not come to an end.
        """
        try:
            with _deadline():
                return self._template.render(
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=generate,
                    **self._variables,
                )
        except (SecurityError, OverflowError, RecursionError, MemoryError, TimeoutError) as error:
            raise CheckpointError(
                f"the chat template of {self._origin} is not safe to run ({_line(error)}): do not trust this checkpoint"
            ) from error
        except Exception as error:  # it can fail as any program can
            raise ValueError(f"the chat template of {self._origin} refuses these messages: {_line(error)}") from error


def _line(error: Exception) -> str:
    # A syntax error's str holds the line, which can be the whole template.
    return textwrap.shorten(getattr(error, "message", None) or str(error), 300) or type(error).__name__


@contextmanager
def _deadline() -> Iterator[None]:
    """Raise TimeoutError in the middle of Python code that runs too long; a sandbox alone lets loops nest."""
    end = time.thread_time() + _SECONDS

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if time.thread_time() > end:
            raise TimeoutError(f"it was not done after {_SECONDS:g} s")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, stricter: nothing forbidden passes silently, and no operator makes things huge."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def unsafe_undefined(self, obj: object, attribute: str) -> Any:
        raise SecurityError(f"it reads the attribute {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and _size(left) * _size(right) > _LARGEST:
            raise SecurityError(f"it makes something larger than {_LARGEST} with the operator *")
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"it uses the operator {operator}, which can make huge things")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> Any:
    return len(value) if hasattr(value, "__len__") else abs(value)


class _Generation(Extension):
    """Templates mark what the assistant says with {% generation %}, for training; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Environment:
    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        # Jinja's own filter writes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
