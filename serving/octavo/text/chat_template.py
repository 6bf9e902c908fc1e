"""The model's chat template: jinja2 in a sandbox, with the globals that templates of Hugging Face models expect.

Templates come from the model folder only; still a render has limits: iterations, time, size of the result and of
what operators may build. Used by the intake thread and by the offline API; a render is single-threaded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from octavo.protocol.errors import InvalidRequest

MAX_SOURCE = 1 << 20  # characters of a template
MAX_OUTPUT = 1 << 24  # characters of a rendered prompt
MAX_ITERATIONS = 1_000_000
MAX_SECONDS = 5.0
MAX_BUILT = 1 << 20  # items or characters that an operator may build
JOINT = "\n\n"  # between messages that are merged

Messages = Sequence[Mapping[str, str]]
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class TemplateLimit(jinja2.TemplateError):
    """A render went over a limit."""


class _GenerationTag(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Budget:
    """What is left of one render."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.start()

    def start(self) -> None:
        self._iterations = MAX_ITERATIONS
        self._deadline = self._clock() + MAX_SECONDS

    def spend(self, iterable: Iterable[Any]) -> Collection[Any]:
        """Pay for a loop before it begins."""
        items = iterable if isinstance(iterable, Collection) else list(islice(iterable, self._iterations + 1))
        self._iterations -= len(items) + 1
        if self._iterations < 0 or self._clock() > self._deadline:
            raise TemplateLimit("the chat template takes too many steps")
        return items


def _spend_from(budget: _Budget) -> Callable[[Any, Iterable[Any]], Collection[Any]]:
    @jinja2.pass_context  # which also keeps jinja2 from folding it at compile time
    def spend(context: Any, iterable: Iterable[Any]) -> Collection[Any]:
        return budget.spend(iterable)

    return spend


class _Environment(ImmutableSandboxedEnvironment):
    """Loops are paid for; operators cannot build huge values."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "spend", [], [], None, None, lineno=loop.lineno)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _builds_much(operator, left, right):
            raise TemplateLimit("the chat template builds too large a value")
        return super().call_binop(context, operator, left, right)


def _builds_much(operator: str, left: Any, right: Any) -> bool:
    if operator == "*":
        collections = [side for side in (left, right) if isinstance(side, Collection)]
        sizes = [len(side) if isinstance(side, Collection) else side for side in (left, right)]
        return bool(collections) and sizes[0] * sizes[1] > MAX_BUILT
    if operator == "**":
        return bool(abs(left) > MAX_BUILT or abs(right) > 64)
    return isinstance(left, str) and any(len(run) > 5 for run in _digits(left))


def _digits(text: str) -> list[str]:
    return "".join(character if character.isdigit() else " " for character in text).split()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled template. `special_tokens`: bos_token, eos_token and their like."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any], *, clock: Callable[[], float] = time.monotonic,
                 now: Callable[[], datetime] = datetime.now) -> None:
        """Raises ValueError if the template is too large or does not compile."""
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are allowed")
        self._special_tokens = dict(special_tokens)
        self._budget = _Budget(clock)
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.filters["spend"] = _spend_from(self._budget)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template does not compile: {error}") from None

    def render(self, messages: Messages, *, add_generation_prompt: bool = True, continue_final_message: bool = False,
               variables: Mapping[str, Any] | None = None) -> str:
        """The prompt. If the template refuses the order of messages, it gets them in order. Raises InvalidRequest."""
        if continue_final_message and messages[-1]["role"] != "assistant":
            raise InvalidRequest("continue_final_message needs a last message of the assistant", field="messages")
        add = add_generation_prompt and not continue_final_message
        try:
            text = self._render(messages, add, variables or {})
        except TemplateLimit as error:
            raise InvalidRequest(str(error), field="messages") from None
        except _FAILURES as refusal:
            text = self._render_in_order(messages, add, variables or {}, refusal)
        return _up_to_final(text, messages[-1]["content"]) if continue_final_message else text

    def _render_in_order(self, messages: Messages, add: bool, variables: Mapping[str, Any], refusal: Exception) -> str:
        ordered = in_order(messages)
        if list(ordered) != [dict(message) for message in messages]:
            try:
                return self._render(ordered, add, variables)
            except _FAILURES:
                pass  # the first refusal is about what the user sent
        raise InvalidRequest(f"the chat template refuses the messages: {str(refusal)[:300]}", field="messages")

    def _render(self, messages: Messages, add: bool, variables: Mapping[str, Any]) -> str:
        given = {**variables, **self._special_tokens, "tools": None, "documents": None}
        self._budget.start()
        parts, size = [], 0
        copies = [dict(message) for message in messages]
        for part in self._template.generate({**given, "messages": copies, "add_generation_prompt": add}):
            parts.append(part)
            size += len(part)
            if size > MAX_OUTPUT:
                raise TemplateLimit("the chat template makes too long a prompt")
        return "".join(parts)


def in_order(messages: Messages) -> list[dict[str, str]]:
    """System messages joined and put first; neighbours of one role merged."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    out = [{"role": "system", "content": JOINT.join(system)}] if system else []
    for message in messages:
        if message["role"] == "system":
            continue
        if out and out[-1]["role"] == message["role"]:
            out[-1]["content"] += JOINT + message["content"]
        else:
            out.append({"role": message["role"], "content": message["content"]})
    return out


def _up_to_final(text: str, final: str) -> str:
    """Cut what the template put after the last message."""
    at = text.rfind(final.strip())
    if at < 0 or not final.strip():
        raise InvalidRequest("continue_final_message: the template does not show the last message", field="messages")
    whole = text.rfind(final)
    return text[: whole + len(final)] if whole >= 0 else text[: at + len(final.strip())]
