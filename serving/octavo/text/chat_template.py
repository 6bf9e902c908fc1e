"""The model's chat template: jinja2 in a sandbox, with the globals that templates of Hugging Face models expect.

Templates come from the model folder only; still a render has limits, which template_limits.py holds. Used by the
intake thread and by the offline API; a render is single-threaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from octavo.protocol.errors import InvalidRequest
from octavo.text.template_limits import MAX_OUTPUT, Budget, Environment, TemplateLimit

MAX_SOURCE = 1 << 20  # characters of a template
MAX_DATE_FORMAT = 256
JOINT = "\n\n"  # between messages that are merged

Messages = Sequence[Mapping[str, str]]
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """One compiled template. `special_tokens`: bos_token, eos_token and their like."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any], *, clock: Callable[[], float] = time.monotonic,
                 now: Callable[[], datetime] = datetime.now) -> None:
        """Raises ValueError if the template is too large or does not compile."""
        if len(source) > MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are allowed")
        self._special_tokens = dict(special_tokens)
        self._budget = Budget(clock)
        environment = Environment(self._budget)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form[:MAX_DATE_FORMAT])
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
