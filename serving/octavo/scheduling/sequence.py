"""The token state of one sequence: what is known, what is computed, what is under way.

Owned by the scheduler, on the engine thread. Only primary facts are stored; the rest are properties. It knows nothing
of other sequences, of the block pool's accounting or of tensors.

    token_ids    |<------ prompt ------>|<-- outputs known -->| pending |
    num_computed  ...................................^  (includes what submitted plans will compute)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import msgspec

from octavo.protocol.messages import SamplingParams, Submit, TokenLogprobs
from octavo.scheduling.speculation import Speculation


class State(enum.Enum):
    """Where a sequence is. A preempted one waits again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence from `Submit` to its finish. `num_computed` chases `num_tokens`; there are no phases."""

    seq_id: int
    params: SamplingParams
    priority: int
    arrival: int  # running number: the order within a priority, kept over preemptions
    prompt_len: int
    token_ids: list[int]  # known tokens: prompt, then outputs (those of a resume included)
    limit: int  # most tokens, prompt and outputs: max_tokens, the context or the whole cache
    state: State = State.WAITING
    slot: int = -1  # row of the runner's state; -1 while it holds none
    blocks: list[int] = field(default_factory=list)
    block_view: tuple[int, ...] = ()  # `blocks` as plans see it: replaced, never changed
    num_computed: int = 0  # tokens in the cache once all submitted plans are over
    num_pending: int = 0  # tokens that submitted plans sample and that are not known yet
    digests: list[bytes] = field(default_factory=list)  # of the full blocks of known tokens, chained
    num_registered: int = 0  # full blocks of this run that the prefix cache has seen
    last_step: int = 0  # the newest plan that refers to its blocks and slot
    scheduled_at: float = 0.0  # when it first left the queue
    cached_tokens: int = -1  # prompt tokens found in the prefix cache when it first ran; -1: not yet
    announced: bool = False  # its first output was made
    prompt_logprobs: list[TokenLogprobs] | None = None  # collected over the chunks of the prompt
    tenant: str = ""  # whose turn it takes while it waits
    speculation: Speculation | None = None  # None: its tokens are drawn one a step

    @property
    def order(self) -> tuple[int, int]:
        """Smaller runs first and is preempted last."""
        return (self.priority, self.arrival)

    @property
    def num_tokens(self) -> int:
        """Tokens known or being sampled."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_known_outputs(self) -> int:
        return len(self.token_ids) - self.prompt_len

    @property
    def has_run(self) -> bool:
        """Whether it ever left the queue; if it waits, it was preempted."""
        return self.cached_tokens >= 0

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs >= 0

    def finish_of(self, token_id: int) -> str | None:
        """The finish reason once `token_id` is the newest known token, or None to go on."""
        if token_id in self.params.end_token_ids and self.num_known_outputs >= self.params.min_tokens:
            return "stop"
        return "length" if len(self.token_ids) >= self.limit else None

    def grow(self, blocks: list[int]) -> None:
        self.blocks.extend(blocks)
        self.block_view = tuple(self.blocks)

    def rewind(self) -> list[int]:
        """Forget what was computed (preemption); returns the blocks, which the caller gives back. Tokens stay."""
        blocks, self.blocks, self.block_view = self.blocks, [], ()
        self.num_computed = self.num_registered = 0
        if not self.num_pending:  # else the plan under way completes the list
            self.prompt_logprobs = [] if self.wants_prompt_logprobs else None
        return blocks

    def take_prompt_logprobs(self) -> list[TokenLogprobs] | None:
        """The prompt's log probabilities, once; later runs of this sequence do not ask for them again."""
        entries, self.prompt_logprobs = self.prompt_logprobs, None
        if entries is not None:
            self.params = msgspec.structs.replace(self.params, prompt_logprobs=-1)
        return entries


def from_submit(submit: Submit, *, arrival: int, max_tokens_total: int, speculates: bool = False) -> Sequence:
    """A waiting sequence. `max_tokens_total` bounds prompt + outputs by context and cache."""
    params = submit.params
    if submit.generated_token_ids and params.prompt_logprobs >= 0:
        params = msgspec.structs.replace(params, prompt_logprobs=-1)  # went out with the first token, before the resume
    prompt_len = len(submit.prompt_token_ids)
    return Sequence(
        seq_id=submit.seq_id,
        params=params,
        priority=submit.priority,
        arrival=arrival,
        prompt_len=prompt_len,
        token_ids=[*submit.prompt_token_ids, *submit.generated_token_ids],
        limit=min(prompt_len + params.max_tokens, max_tokens_total),
        prompt_logprobs=[] if params.prompt_logprobs >= 0 else None,
        tenant=submit.tenant,
        speculation=Speculation() if speculates else None,
    )
