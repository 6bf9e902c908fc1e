"""Builds the messages of a request from the state of its sequences. Delivery thread only; sends nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import msgspec
from msgspec import UNSET

from octavo.frontend.state import RequestState, SequenceState
from octavo.protocol.answers import Logprob, PromptTokensDetails, TokenOut, TopLogprob, Usage
from octavo.protocol.messages import TokenLogprobs

PIECE_BYTES = 24 << 10
TOKEN_BYTES = 12  # of a message, for each token, ...
LISTED_BYTES = 64  # ... and for each one whose log probability is listed there

encode_logprobs = msgspec.msgpack.Encoder().encode  # a tenth of the memory while they wait
_decode_logprobs = msgspec.msgpack.Decoder(TokenLogprobs).decode


class Composer:
    """`text_of` shows one token; with `last_only` a choice has one message, its last."""

    def __init__(self, *, text_of: Callable[[int], str], last_only: bool, clock: Callable[[], float]) -> None:
        self._text_of = text_of
        self._last_only = last_only
        self._clock = clock

    def is_bare(self, state: RequestState) -> bool:
        """Whether a message in the middle of the output says nothing but its tokens."""
        return len(state.sequences) == 1 and state.request.logprobs is None and not self._last_only

    def piece_tokens(self, state: RequestState) -> int:
        """How many tokens make about PIECE_BYTES of messages."""
        if self._last_only:
            return sys.maxsize
        num_listed = 0 if state.request.logprobs is None else 1 + state.request.logprobs
        return max(1, PIECE_BYTES // (TOKEN_BYTES + num_listed * LISTED_BYTES))

    def next_message(self, state: RequestState, sequence: SequenceState, *, limit: int | None = None
                     ) -> TokenOut | None:
        """What a choice has to say now, if anything. With `finish` set it is its last message, unless there are more
        tokens than `limit`.
        """
        finish, output = sequence.finish, sequence.output
        if sequence.closed or (finish is None and (self._last_only or not output.has_free)):
            return None
        text, token_ids, _ = output.take(limit)
        message = TokenOut(state.req_id, text, token_ids, sequence.send_idx, 0, state.seed)
        sequence.send_idx += 1
        if len(state.sequences) > 1:
            message.index = sequence.index
        if state.request.logprobs is not None:
            entries = [_decode_logprobs(entry) for entry in sequence.logprobs[: len(token_ids)]]
            del sequence.logprobs[: len(token_ids)]
            message.logprobs = self.logprobs(entries)
        if message.send_idx == 0:
            self._add_prompt(state, sequence, message)
        if finish is not None and not output.has_free:
            self._add_totals(state, sequence, message)
        return message

    def _add_prompt(self, state: RequestState, sequence: SequenceState, message: TokenOut) -> None:
        message.fingerprint = state.fingerprint
        if state.request.return_prompt:
            message.prompt = state.prompt_text or ""
            message.prompt_token_ids = state.prompt_ids
        if state.request.prompt_logprobs is not None and sequence.prompt_logprobs is not None:
            message.prompt_logprobs = [None, *self.logprobs(sequence.prompt_logprobs)]
            sequence.prompt_logprobs = None

    def _add_totals(self, state: RequestState, sequence: SequenceState, message: TokenOut) -> None:
        finish, output = sequence.finish, sequence.output
        assert finish is not None
        sequence.closed = True
        if self._last_only:
            message.token, message.token_ids = output.text, output.token_ids
        message.is_end = 1
        message.finish_reason = finish.reason
        message.stop_reason = UNSET if finish.stop_reason is None else finish.stop_reason
        message.tokens_all = output.text
        message.tokens_all_num = len(output.token_ids)
        message.tokens_all_ids = output.token_ids if state.request.return_all_tokens else UNSET
        message.usage = _usage(state, sequence)
        message.fingerprint = state.fingerprint
        if state.request.benchmark:
            message.times = self._times(state, sequence)

    def _times(self, state: RequestState, sequence: SequenceState) -> dict[str, float]:
        now = self._clock()
        first = sequence.first_sent_at or now
        later = max(1, len(sequence.output.token_ids) - 1)
        return {
            "queue_s": max(0.0, sequence.scheduled_at - state.arrival) if sequence.scheduled_at else 0.0,
            "ttft_s": first - state.arrival,
            "itl_s": (now - first) / later,
            "e2e_s": now - state.arrival,
        }

    def logprobs(self, entries: Sequence[TokenLogprobs]) -> list[Logprob]:
        """Token ids with their text."""
        text_of = self._text_of
        return [
            Logprob(entry.token_id, text_of(entry.token_id), entry.logprob, entry.rank, [
                TopLogprob(token_id, text_of(token_id), logprob)
                for token_id, logprob in zip(entry.top_ids, entry.top_logprobs)
            ])
            for entry in entries
        ]


def _usage(state: RequestState, sequence: SequenceState) -> Usage:
    sampled = sequence.output.num_sampled + (sequence.end_token is not None)
    num_prompt = len(state.prompt_ids)
    return Usage(num_prompt, sampled, num_prompt + sampled, PromptTokensDetails(sequence.cached_tokens))
