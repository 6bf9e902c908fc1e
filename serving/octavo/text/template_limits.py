"""The sandbox that chat templates run in: jinja2's, with a price for every loop and call and a bound on every value.

jinja2's sandbox keeps a template away from Python; it does not keep it from running for ever or from filling the
memory. A template comes with the model, its input from users. One environment per template, used by one thread at a
time. Knows nothing of messages or prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from typing import Any

import jinja2
from jinja2 import filters, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT = 1 << 24  # characters of a rendered prompt, and of any value on the way to it
MAX_TOTAL = 1 << 27  # characters of all values on the way
MAX_STEPS = 1_000_000  # loop iterations and calls
MAX_SECONDS = 5.0
MAX_BUILT = 1 << 20  # items or characters that an operator may build
MAX_INDENT = 64
REMOVED_FILTERS = ("center", "pprint", "urlize", "wordwrap", "xmlattr")  # slow or large for small inputs
REMOVED_GLOBALS = ("lipsum",)


class TemplateLimit(jinja2.TemplateError):
    """A render went over a limit."""


class Budget:
    """What is left of one render."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.start()

    def start(self) -> None:
        self._steps = MAX_STEPS
        self._characters = MAX_TOTAL
        self._deadline = self._clock() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        """Pay for iterations or a call."""
        self._steps -= count
        if self._steps < 0 or self._clock() > self._deadline:
            raise TemplateLimit("the chat template takes too many steps")

    def build(self, size: int) -> None:
        """Pay for a value of that many characters or items, before it is made."""
        self._characters -= size
        if size > MAX_OUTPUT or self._characters < 0:
            raise TemplateLimit("the chat template builds too large a value")

    def spend(self, iterable: Iterable[Any]) -> Collection[Any]:
        """Pay for a loop before it begins."""
        items = iterable if isinstance(iterable, Collection) else list(islice(iterable, self._steps + 1))
        self.step(len(items) + 1)
        return items

    def text(self, value: Any) -> str:
        """The value as text, paid for; a container is weighed first, for it may hold itself many times over."""
        if not isinstance(value, (str, int, float, bool, type(None), jinja2.Undefined)):
            self.build(_weight(value, {}))
        text = str(value)
        self.build(len(text))
        return text


def _weight(value: Any, known: dict[int, int]) -> int:
    """About how many characters a value has as text. `known` holds those that were weighed, by id."""
    if isinstance(value, str):
        return len(value) + 4
    if not isinstance(value, (Mapping, list, tuple, set, frozenset)):
        return 32
    if id(value) not in known:
        entries = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else list(value)
        known[id(value)] = 0  # a value that holds itself prints as dots
        known[id(value)] = 2 + sum(_weight(entry, known) for entry in entries)
    return known[id(value)]


class _GenerationTag(Extension):
    """{% generation %} … {% endgeneration %} marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(ImmutableSandboxedEnvironment):
    """Loops, calls and whatever makes a value larger go through the budget."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], finalize=self._finalize
        )
        self._budget = budget
        self.concat = self._concat  # type: ignore[method-assign]
        for name in REMOVED_FILTERS:
            del self.filters[name]
        for name in REMOVED_GLOBALS:
            del self.globals[name]
        self.filters.update(_filters(budget))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "spend")
        for joint in list(tree.find_all(nodes.Concat)):  # a ~ b: every part becomes text that was paid for
            joint.nodes = [_filtered(part, "as_text") for part in joint.nodes]
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call costs a step; those that make strings longer, the length too."""
        __self._budget.step()
        owner, name = _bound(__obj)
        if isinstance(owner, str):
            __self._budget.build(_size_of_call(owner, name, args, kwargs))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            sides = [len(side) for side in (left, right) if isinstance(side, Collection)]
            self._budget.build(sum(sides))
        elif _builds_much(operator, left, right):
            raise TemplateLimit("the chat template builds too large a value")
        return super().call_binop(context, operator, left, right)

    def _concat(self, parts: Iterable[str]) -> str:
        pieces = list(parts)
        self._budget.build(sum(map(len, pieces)))
        return "".join(pieces)

    def _finalize(self, value: Any) -> Any:
        """What {{ … }} puts out."""
        return value if isinstance(value, (str, int, float, jinja2.Undefined)) else self._budget.text(value)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _bound(method: Any) -> tuple[Any, str]:
    """The object that a method belongs to, and its name; the sandbox wraps str.format."""
    method = getattr(method, "__wrapped__", method)
    return getattr(method, "__self__", None), getattr(method, "__name__", "")


def _size_of_call(owner: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """About how long the result of a string's method is."""
    numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
    texts = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
    if name in ("ljust", "rjust", "center", "zfill"):
        return max([len(owner), *numbers])
    if name == "expandtabs":
        return len(owner) * max([8, *numbers])
    if name == "replace" and len(texts) > 1:
        return len(owner) + (owner.count(texts[0]) if texts[0] else len(owner) + 1) * len(texts[1])
    if name == "join" and args and isinstance(args[0], Collection):
        return len(owner) * len(args[0]) + sum(len(part) for part in args[0] if isinstance(part, str))
    if name == "translate":
        return MAX_OUTPUT + 1 if len(owner) > MAX_BUILT else len(owner)
    if name in ("format", "format_map"):
        return MAX_OUTPUT + 1 if _wide(owner) else len(owner) + _weight([*args, kwargs], {})
    return len(owner)


def _builds_much(operator: str, left: Any, right: Any) -> bool:
    if operator == "*":
        collections = [side for side in (left, right) if isinstance(side, Collection)]
        if collections:
            sizes = [len(side) if isinstance(side, Collection) else side for side in (left, right)]
            return bool(sizes[0] * sizes[1] > MAX_BUILT)
        return any(isinstance(side, int) and abs(side) > 1 << 256 for side in (left, right))
    if operator == "**":
        return bool(abs(left) > MAX_BUILT or abs(right) > 64)
    return isinstance(left, str) and (_wide(left) or _weight(right, {}) > MAX_BUILT)


def _wide(form: str) -> bool:
    """Whether a format asks for a width of more than five digits."""
    return any(len(run) > 5 for run in "".join(c if c.isdigit() else " " for c in form).split())


def _filters(budget: Budget) -> dict[str, Callable[..., Any]]:
    """All filters that have a price."""
    return _text_filters(budget) | _list_filters(budget)


def _text_filters(budget: Budget) -> dict[str, Callable[..., Any]]:
    """Those that could build much text; and the one that the environment itself puts in."""

    @jinja2.pass_context
    def as_text(context: Any, value: Any) -> str:
        return budget.text(value)

    @jinja2.pass_eval_context
    def replace(eval_ctx: Any, value: Any, old: str, new: str, count: int | None = None) -> str:
        text = budget.text(value)
        budget.build(len(text) + (text.count(str(old)) if old else len(text) + 1) * len(str(new)))
        return filters.do_replace(eval_ctx, text, old, new, count)

    @jinja2.pass_eval_context
    def join(eval_ctx: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = budget.spend(value)
        budget.build(len(items) * len(d) + _weight(list(items), {}))
        return filters.sync_do_join(eval_ctx, items, d, attribute)

    def indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        wide = len(width) if isinstance(width, str) else abs(width)
        budget.build(len(s) + (s.count("\n") + 2) * wide)
        return filters.do_indent(s, width, first, blank)

    def form(value: str, *args: Any, **kwargs: Any) -> str:
        if _wide(str(value)):
            raise TemplateLimit("the chat template builds too large a value")
        budget.build(len(str(value)) + _weight([args, kwargs], {}))
        return filters.do_format(str(value), *args, **kwargs)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= MAX_INDENT):
            raise TemplateLimit("the chat template indents JSON too far")
        budget.build(_weight(value, {}) * (1 + (indent or 0)))
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def text_of(value: Any) -> str:
        return value if isinstance(value, str) else budget.text(value)

    return {
        "as_text": as_text,
        "replace": replace,
        "join": join,
        "indent": indent,
        "format": form,
        "tojson": tojson,
        "string": text_of,
    }


def _list_filters(budget: Budget) -> dict[str, Callable[..., Any]]:
    """Those that go through something, each item paid for; and the one that the environment itself puts in."""

    @jinja2.pass_context  # which also keeps jinja2 from folding them at compile time
    def spend(context: Any, iterable: Iterable[Any]) -> Collection[Any]:
        return budget.spend(iterable)

    def batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Any:
        budget.build(linecount)
        return filters.do_batch(budget.spend(value), linecount, fill_with)

    def slices(value: Iterable[Any], slices: int, fill_with: Any = None) -> Any:
        budget.step(slices)
        return filters.sync_do_slice(budget.spend(value), slices, fill_with)

    def items_of(value: Iterable[Any]) -> list[Any]:
        return list(budget.spend(value))

    return {"spend": spend, "batch": batch, "slice": slices, "list": items_of}
