"""What the offline API takes and gives: sampling options, prompts, completions; and the text state of one sequence.

Used by `llm.py` on the caller's thread. Knows the tokenizer and the text rules that the server uses, but no scheduler
and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from octavo.protocol.errors import ContextLengthExceeded, InvalidRequest
from octavo.protocol.messages import SamplingParams, SequenceOutput, Submit, TokenLogprobs
from octavo.text.output import OutputText
from octavo.text.stop import StopStrings
from octavo.text.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages | Sequence[int]


@dataclass(frozen=True)
class Sampling:
    """How to answer. None: the model's generation_config.json, else the neutral value."""

    max_tokens: int | None = None  # None: MAX_DEC_LEN or what the context leaves
    min_tokens: int = 1
    temperature: float | None = None  # 0: greedy
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()  # besides the model's own
    ignore_eos: bool = False
    seed: int | None = None  # None: a new one for every prompt; Completion.seed says which
    logprobs: int | None = None  # also of the k most probable tokens; 0: of the sampled one only
    prompt_logprobs: int | None = None
    speculation: bool | None = None  # guess tokens and verify several a step; None: as SPECULATION says

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int  # as sampled, an end token included
    cached_tokens: int  # prompt tokens found in the prefix cache

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Completion:
    """One whole answer. Neither text nor token_ids hold the end token or a stop string."""

    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str  # stop, length, cancelled or error
    stop_reason: str | int | None  # the stop string or end token that ended it
    usage: Usage
    seed: int
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    prompt_logprobs: list[TokenLogprobs] | None = None  # one for each prompt token but the first
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """Some more of an answer. The last one has `completion`."""

    text: str
    token_ids: list[int]
    completion: Completion | None = None


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt (a text, a list of messages, a list of token ids) or many of them, as a list."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and isinstance(items[0], (int, Mapping)):
        return [cast(Prompt, items)]
    return cast("list[Prompt]", items)


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer, *, raw: bool) -> list[int]:
    """Token ids: text through the chat template if the model has one, unless `raw`; ids as they are. InvalidRequest."""
    if not isinstance(prompt, str):
        if not prompt or isinstance(prompt[0], int):
            return list(cast("Sequence[int]", prompt))
        if tokenizer.chat_template is None:
            raise InvalidRequest("the model has no chat template; give a text or token ids", field="messages")
        return tokenizer.encode_chat(cast(Messages, prompt))[1]
    if raw or tokenizer.chat_template is None:
        return tokenizer.encode(prompt, add_special_tokens=True)
    return tokenizer.encode_chat([{"role": "user", "content": prompt}])[1]


def sampling_params(
    sampling: Sampling, *, seed: int, room: int, end_token_ids: Sequence[int], defaults: Mapping[str, float]
) -> SamplingParams:
    """What the engine gets. `room`: most output tokens if the options do not say."""

    def pick(name: str, neutral: float) -> float:
        given = getattr(sampling, name)
        return defaults.get(name, neutral) if given is None else given

    ends = () if sampling.ignore_eos else end_token_ids
    return SamplingParams(
        max_tokens=room if sampling.max_tokens is None else sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=pick("temperature", 1.0),
        top_p=pick("top_p", 1.0),
        top_k=max(int(pick("top_k", 0)), 0),
        min_p=pick("min_p", 0.0),
        repetition_penalty=pick("repetition_penalty", 1.0),
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=dict(sampling.logit_bias),
        end_token_ids=tuple(sorted({*ends, *sampling.stop_token_ids})),
        seed=seed % (1 << 64),
        logprobs=-1 if sampling.logprobs is None else sampling.logprobs,
        prompt_logprobs=-1 if sampling.prompt_logprobs is None else sampling.prompt_logprobs,
        speculation=sampling.speculation,
    )


def check_lengths(num_prompt: int, params: SamplingParams, *, context: int, max_seq_len: int) -> None:
    """Raises InvalidRequest or ContextLengthExceeded, as the server does."""
    if not num_prompt:
        raise InvalidRequest("the prompt is empty", field="prompt")
    if params.max_tokens < 1:
        raise InvalidRequest(f"max_tokens ({params.max_tokens}) must be at least 1", field="max_tokens")
    if num_prompt > max_seq_len:
        raise ContextLengthExceeded(f"prompt ({num_prompt} tokens) exceeds MAX_SEQ_LEN ({max_seq_len})", field="prompt")
    if num_prompt + params.max_tokens > context:
        total = f"prompt ({num_prompt} tokens) + max_tokens ({params.max_tokens})"
        raise ContextLengthExceeded(f"{total} exceeds the model's context ({context})", field="max_tokens")


class Answer:
    """An answer that is being made: engine outputs in, text out."""

    def __init__(self, submit: Submit, tokenizer: Tokenizer, *, stop: Sequence[str], plain: bool) -> None:
        """`plain`: the output goes on from the prompt's text, without a chat template between."""
        self.submit = submit
        self.completion: Completion | None = None
        self._text = OutputText(
            tokenizer.new_detokenizer(continues_text=plain),
            stops=StopStrings(stop) if stop else None,
            min_tokens=submit.params.min_tokens,
        )
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] | None = None
        self._cached_tokens = 0
        self._num_sampled = 0

    @property
    def num_sampled(self) -> int:
        return self._num_sampled

    def take(self, output: SequenceOutput) -> bool:
        """Take what the engine says. True: a stop string ended the answer, so the sequence has no use any more."""
        if self.completion is not None:
            return False
        self._logprobs += output.logprobs or []
        self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs
        self._cached_tokens = self._cached_tokens or output.cached_tokens
        ended_by = output.token_ids[-1] if output.finish_reason == "stop" and output.token_ids else None
        tokens = output.token_ids if ended_by is None else output.token_ids[:-1]
        stopped = False
        for token_id in tokens:  # what follows a stop string was not asked for
            self._num_sampled += 1
            stopped = self._text.feed(token_id)
            if stopped:
                break
        else:
            self._num_sampled += ended_by is not None
        if not stopped and output.finish_reason is not None:
            stopped = self._text.finish()
        if stopped:
            self._complete("stop", self._text.stopped_by)
            return output.finish_reason is None
        if output.finish_reason is not None:
            self._complete(output.finish_reason, ended_by, error=output.error)
        return False

    def _complete(self, reason: str, stop_reason: str | int | None, *, error: str | None = None) -> None:
        self._last = self._text.take()
        prompt = self.submit.prompt_token_ids
        token_ids = self._text.token_ids
        wanted = self.submit.params.logprobs >= 0
        self.completion = Completion(
            prompt_token_ids=prompt,
            text=self._text.text,
            token_ids=token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            usage=Usage(len(prompt), self._num_sampled, self._cached_tokens),
            seed=self.submit.params.seed,
            logprobs=self._logprobs[: len(token_ids)] if wanted else None,
            prompt_logprobs=self._prompt_logprobs,
            error=error,
        )

    def delta(self) -> Delta | None:
        """What is new since the last call, or None."""
        if self.completion is not None:
            text, token_ids, _ = self._last
            return Delta(text, token_ids, self.completion)
        if not self._text.has_free:
            return None
        text, token_ids, _ = self._text.take()
        return Delta(text, token_ids)
