"""Answers of the OpenAI dialect: whole objects and stream chunks in the exact shapes that clients insist on.

Pure, one `Answer` per request, used on the event loop of a gateway worker. It is fed token messages and yields bytes;
it knows nothing of HTTP or of where messages come from. A plain text chunk is made from cached halves around the
encoded token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from octavo.protocol.answers import Logprob, Message
from octavo.protocol.openai import CHAT, OpenAIRequest

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


@dataclass(frozen=True)
class FirstToken:
    """The prompt's first token: nothing precedes it, so it has no log probability."""

    token: str
    logprob: None = None
    top: tuple[()] = ()


Entry = Logprob | FirstToken


@dataclass
class ChoiceState:
    """One choice as far as it has come."""

    text: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)  # logprobs of what is shown
    prompt: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    offset: int = 0  # characters that text_offset has counted
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    begun: bool = False


class Answer:
    """Turns the messages of one request into its OpenAI answer. Choices are numbered prompt * n + index."""

    def __init__(self, request: OpenAIRequest, *, answer_id: str, model: str, created: int) -> None:
        self._request = request
        self._chat = request.route == CHAT
        self._answer_id, self._model, self._created = answer_id, model, created
        self.choices = [ChoiceState() for _ in range(len(request.bodies) * request.n)]
        self._plain = request.logprobs is None and not request.continuous_usage
        usage = b',"usage":null' if request.include_usage else b""
        self._tail = (b"}" if self._chat else b"") + b',"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self._heads = [self._head(number) for number in range(len(self.choices))]

    def _envelope(self, kind: str, **more: object) -> dict[str, object]:
        return {"id": self._answer_id, "object": kind, "created": self._created, "model": self._model, **more}

    def _head(self, number: int) -> bytes:
        """Everything of a plain chunk before the encoded text."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        start = _encode(self._envelope(kind))[:-1]
        said = b'"delta":{"content":' if self._chat else b'"text":'
        return b'data: %s,"choices":[{"index":%d,%s' % (start, number, said)

    # ---- streams

    def chunks(self, prompt: int, message: Message) -> bytes:
        """The events for one message of the prompt at that place; b"" if there is nothing to say."""
        number = prompt * self._request.n + message.index
        choice = self.choices[number]
        plain = self._plain and choice.begun and not message.is_end
        if plain:
            return self._heads[number] + _encode(message.token) + self._tail if message.token else b""
        out = b""
        if self._chat and not choice.begun:
            out = self._event(number, choice, delta={"role": "assistant", "content": ""})
        text, logprobs = self._take(choice, message)
        if self._chat:
            if text or logprobs:
                out += self._event(number, choice, delta={"content": text}, logprobs=logprobs)
            if message.is_end:
                out += self._event(number, choice, delta={}, finish=True)
        elif text or logprobs or message.is_end:
            out += self._event(number, choice, text=text, logprobs=logprobs, finish=bool(message.is_end))
        return out

    def _event(
        self,
        number: int,
        choice: ChoiceState,
        *,
        delta: dict[str, str] | None = None,
        text: str | None = None,
        logprobs: object = None,
        finish: bool = False,
    ) -> bytes:
        said: dict[str, object] = {"text": text} if delta is None else {"delta": delta}
        reason = choice.finish_reason if finish else None
        entry = {"index": number, **said, "logprobs": logprobs, "finish_reason": reason}
        if finish and choice.stop_reason is not None:
            entry["stop_reason"] = choice.stop_reason
        chunk = self._envelope("chat.completion.chunk" if self._chat else "text_completion", choices=[entry])
        if self._request.continuous_usage:
            chunk["usage"] = self.usage()
        elif self._request.include_usage:
            chunk["usage"] = None
        return b"data: %s\n\n" % _encode(chunk)

    def last_chunks(self) -> bytes:
        """What ends a good stream."""
        if not self._request.include_usage:
            return DONE
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return b"data: %s\n\n" % _encode(self._envelope(kind, choices=[], usage=self.usage())) + DONE

    # ---- whole answers

    def add(self, prompt: int, message: Message) -> None:
        """Keep a message for `whole`."""
        choice = self.choices[prompt * self._request.n + message.index]
        text, _ = self._take(choice, message, keep=True)
        choice.text.append(text)

    def whole(self) -> bytes:
        """The answer once every choice has ended."""
        entries = [self._whole_choice(number, choice) for number, choice in enumerate(self.choices)]
        kind = "chat.completion" if self._chat else "text_completion"
        return bytes(_encode(self._envelope(kind, choices=entries, usage=self.usage())))

    def _whole_choice(self, number: int, choice: ChoiceState) -> dict[str, object]:
        text = "".join(choice.text)
        said: dict[str, object] = {"text": text}
        if self._chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        logprobs = self._logprobs(choice, choice.entries) if self._request.logprobs is not None else None
        entry = {"index": number, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        if choice.stop_reason is not None:
            entry["stop_reason"] = choice.stop_reason
        return entry

    def usage(self) -> dict[str, object]:
        """Counts of the whole request: a prompt counts once, however many choices it has."""
        firsts = self.choices[:: self._request.n]
        prompt = sum(choice.prompt_tokens or 0 for choice in firsts)
        completion = sum(choice.completion_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in firsts)},
        }

    # ---- one message

    def _take(self, choice: ChoiceState, message: Message, *, keep: bool = False) -> tuple[str, object]:
        """Count a message; its text and its logprobs object (None if not asked for or, with `keep`, kept for later)."""
        text = "" if self._request.only_prompt else message.token
        entries: list[Entry] = [] if self._request.only_prompt else list(message.logprobs or ())
        if not choice.begun and self._request.echo:
            choice.prompt = message.prompt or ""
            text = choice.prompt + text
            entries = _prompt_entries(message, choice.prompt) + entries
        choice.begun = True
        self._count(choice, message)
        if self._request.logprobs is None or not entries:
            return text, None
        if keep:
            choice.entries += entries
            return text, None
        return text, self._logprobs(choice, entries)

    def _count(self, choice: ChoiceState, message: Message) -> None:
        if message.prompt_token_ids is not None:
            choice.prompt_tokens = len(message.prompt_token_ids)
        choice.completion_tokens += len(message.token_ids)
        if message.usage is not None:
            choice.prompt_tokens = message.usage.prompt_tokens
            choice.completion_tokens = message.usage.completion_tokens
            choice.cached_tokens = message.usage.prompt_tokens_details.cached_tokens
        if self._request.only_prompt:
            choice.completion_tokens = 0
        if message.is_end:
            choice.finish_reason = "length" if self._request.only_prompt else message.finish_reason or "stop"
            choice.stop_reason = message.stop_reason

    def _logprobs(self, choice: ChoiceState, entries: list[Entry]) -> dict[str, object]:
        if self._chat:
            return {"content": [_chat_entry(entry) for entry in entries], "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(choice.offset)
            choice.offset += len(entry.token)
        return {
            "tokens": [entry.token for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [_text_top(entry) for entry in entries],
            "text_offset": offsets,
        }


def _prompt_entries(message: Message, prompt: str) -> list[Entry]:
    """Logprobs of the prompt's tokens. The first has none; its text is what the others leave of the prompt."""
    entries = message.prompt_logprobs or []
    rest = "".join(entry.token for entry in entries if entry is not None)
    first = prompt[: len(prompt) - len(rest)] if prompt.endswith(rest) else ""
    return [FirstToken(first) if entry is None else entry for entry in entries]


def _chat_entry(entry: Entry) -> dict[str, object]:
    top = [{"token": one.token, "logprob": one.logprob, "bytes": list(one.token.encode())} for one in entry.top]
    return {"token": entry.token, "logprob": entry.logprob, "bytes": list(entry.token.encode()), "top_logprobs": top}


def _text_top(entry: Entry) -> dict[str, float] | None:
    """The most probable tokens and the sampled one; None where nothing precedes the token."""
    if entry.logprob is None:
        return None
    top = {one.token: one.logprob for one in entry.top}
    top.setdefault(entry.token, entry.logprob)
    return top


def error_event(error: dict[str, object]) -> bytes:
    """An error in mid-stream; clients raise on it. Nothing follows but the end mark."""
    return b"data: %s\n\n" % _encode(error) + DONE


def model_object(name: str, *, created: int, max_model_len: int | None) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "octavo",
        "root": name,
        "parent": None,
        "max_model_len": max_model_len,
        "permission": [],
    }
