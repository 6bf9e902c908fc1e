"""The small dataclasses in which the scheduler (integers and lists) and the runner (tensors) meet.

A `StepPlan` says what one forward pass computes; a `StepResult` what came out. Plans are made one step ahead: when
step n+1 is planned, the tokens that step n will sample are not known yet; they stand as `PENDING` and the runner puts
them in.

Drafts are guesses of what comes next. The runner draws a token at the newest known one and at every draft, as if the
drafts before it had come true. Those drawn up to and with the first that differs from its draft are what one step for
each would have drawn: tokens depend on (seed, number of outputs) and the tokens before alone.

    token_ids   [ newest | draft 1 | draft 2 | draft 3 ]      num_drafts 3
    drawn          t1 ==     t2 ==     t3 !=     -            Sampled(t1, more=[t2, t3]), cache good up to draft 2
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from octavo.protocol.messages import SamplingParams, TokenLogprobs

PENDING = -1  # stands for the token that the step before samples for the same slot


@dataclass(slots=True)
class SequenceStep:
    """The part of one sequence in one step."""

    seq_id: int
    slot: int  # row of the runner's per-sequence state, 0 <= slot < BATCH_SIZE; held while the sequence runs
    fresh: bool  # first step in this slot: the runner builds the slot's state (params, token counts) from `history`
    start: int  # absolute position of token_ids[0]; tokens before it are in the cache
    token_ids: Seq[int]  # tokens to compute, at start, start+1, …; the newest known one may be PENDING
    block_table: Seq[int]  # blocks that hold tokens 0 .. start+len(token_ids)-1, in order
    sample: bool  # the last token computed is the newest known one: draw the next token
    num_outputs: int  # output tokens before the one drawn: the random position
    prompt_len: int
    params: SamplingParams
    history: Seq[int] = ()  # with fresh: all known token ids, prompt then outputs (none PENDING)
    num_drafts: int = 0  # with sample: the last tokens are guesses; one token is drawn before each and one after all

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def drafts(self) -> Seq[int]:
        return self.token_ids[len(self.token_ids) - self.num_drafts :]

    @property
    def end(self) -> int:
        """Tokens in the cache once the step is over, if all drafts come true."""
        return self.start + len(self.token_ids)


@dataclass(slots=True)
class StepPlan:
    """One forward pass: sequences in slot-independent order, decodes first."""

    step_id: int
    sequences: list[SequenceStep] = field(default_factory=list)
    evicted_slots: list[int] = field(default_factory=list)  # slots given back since the last plan

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)


@dataclass(slots=True)
class Sampled:
    """The token drawn for one sequence of a plan with `sample`; `more`: one after it for each draft that came true."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    more: Seq[Sampled] = ()


@dataclass(slots=True)
class StepResult:
    """What a plan computed. `sampled[i]` belongs to `plan.sequences[i]`; None where nothing was to be sampled.

    `prompt_logprobs[i]` holds the entries for the prompt positions start+1 .. end of that chunk (those below
    prompt_len), or None if not asked for.
    """

    step_id: int
    sampled: list[Sampled | None]
    prompt_logprobs: list[list[TokenLogprobs] | None]
    seconds: float = 0.0
