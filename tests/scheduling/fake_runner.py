"""A runner without a model. Its token is a pure function of (all tokens so far, number of outputs, seed).

It keeps, for every block, the token ids written to it, and checks that each position a step attends to holds the right
token: a wrong prefix hit, a block reused too early or a lost token cannot pass. It computes at `collect`, so plans wait
as they do in reality.
"""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.engine.interface import RunnerError
from octavo.protocol.messages import EngineInfo, SamplingParams, TokenLogprobs
from octavo.scheduling.plan import PENDING, Sampled, SequenceStep, StepPlan, StepResult

BLOCK = 64
VOCAB = 1000


COPYING = 1000  # seeds from here on mostly repeat what stood PERIOD tokens before
PERIOD = 9
NOISE = 2000  # and from here on draw from twelve tokens: n-grams repeat, what follows them does not


def draw(history: list[int], num_outputs: int, seed: int) -> int:
    """The token after `history`."""
    if seed >= NOISE:
        return zlib.crc32(repr((len(history), seed)).encode()) % 12
    if seed >= COPYING and len(history) >= PERIOD and zlib.crc32(repr((len(history), seed)).encode()) % 12:
        return history[-PERIOD]
    return zlib.crc32(repr((history, num_outputs, seed)).encode()) % VOCAB


def expected(
    prompt: list[int], params: SamplingParams, *, context: int = 10**9, capacity: int = 10**9
) -> tuple[list[int], str]:
    """Output tokens and finish reason of a sequence, computed directly."""
    tokens = list(prompt)
    while True:
        tokens.append(draw(tokens, len(tokens) - len(prompt), params.seed))
        num_outputs = len(tokens) - len(prompt)
        if tokens[-1] in params.end_token_ids and num_outputs >= params.min_tokens:
            return tokens[len(prompt) :], "stop"
        if num_outputs >= params.max_tokens or len(tokens) >= min(context, capacity + 1):
            return tokens[len(prompt) :], "length"


def make_info(num_blocks: int = 16, *, context: int = 4096, batch_size: int = 8) -> EngineInfo:
    return EngineInfo(
        model_name="fake",
        architecture="Fake",
        context_length=context,
        vocab_size=VOCAB,
        num_blocks=num_blocks,
        block_size=BLOCK,
        batch_size=batch_size,
        end_token_ids=(),
        fingerprint="print",
        weight_scheme="none",
        cache_scheme="list",
        kernels="none",
    )


@dataclass
class FakeRunner:
    """Implements `octavo.engine.interface.Runner`. `before_step` may sleep or raise RunnerError."""

    info: EngineInfo
    before_step: Callable[[StepPlan], None] = lambda plan: None
    closed: bool = False
    num_steps: int = 0
    cache: list[list[int]] = field(default_factory=list)
    slots: dict[int, list[int]] = field(default_factory=dict)  # all tokens of the sequence in a slot
    queue: deque[tuple[StepPlan, StepPlan]] = field(default_factory=deque)
    seconds_of: Callable[[StepPlan], float] = lambda plan: 0.001

    def __post_init__(self) -> None:
        self.cache = [[-7] * BLOCK for _ in range(self.info.num_blocks)]

    def submit(self, plan: StepPlan) -> None:
        assert len(self.queue) < 2, "three plans in flight"
        self._check_plan(plan)
        self.queue.append((plan, copy.deepcopy(plan)))

    def collect(self) -> StepResult:
        plan, as_submitted = self.queue.popleft()
        assert plan == as_submitted, "a plan was changed while it was under way"
        try:
            self.before_step(plan)
        except RunnerError:
            for step in plan.sequences:
                self.slots.pop(step.slot, None)
            raise
        self.num_steps += 1
        for slot in plan.evicted_slots:
            self.slots.pop(slot, None)
        results = [self._run(step) for step in plan.sequences]
        return StepResult(
            plan.step_id, [token for token, _ in results], [entries for _, entries in results], self.seconds_of(plan)
        )

    def close(self) -> None:
        self.closed = True

    def _check_plan(self, plan: StepPlan) -> None:
        assert plan.sequences, "an empty plan"
        slots = [step.slot for step in plan.sequences]
        assert len(set(slots)) == len(slots), "two sequences in one slot"
        assert all(0 <= slot < self.info.batch_size for slot in slots)
        written: set[int] = set()
        for step in plan.sequences:
            self._check_step(step)
            mine = set(step.block_table[step.start // BLOCK :])
            assert not mine & written, "two sequences write one block"
            written |= mine
            for earlier, _ in self.queue:
                for other in earlier.sequences:
                    assert not other.num_drafts, "a plan after one with drafts"
                    if other.seq_id != step.seq_id:
                        assert not mine & set(other.block_table), "a block in flight is written"
                        assert other.slot != step.slot, "a slot in flight is taken"

    def _check_step(self, step: SequenceStep) -> None:
        assert step.token_ids, "nothing to compute"
        newest = len(step.token_ids) - 1 - step.num_drafts
        assert all(token != PENDING for place, token in enumerate(step.token_ids) if place != newest)
        assert not step.num_drafts or (step.sample and not step.fresh)
        assert len(step.block_table) * BLOCK >= step.end, "the table is too short"
        assert len(set(step.block_table)) == len(step.block_table)
        assert bool(step.history) == step.fresh
        assert PENDING not in step.history
        if step.sample:
            assert step.num_outputs == step.end - step.num_drafts - step.prompt_len

    def _run(self, step: SequenceStep) -> tuple[Sampled | None, list[TokenLogprobs] | None]:
        if step.fresh:
            self.slots[step.slot] = list(step.history)
        known = self.slots.setdefault(step.slot, [])
        garbage = not known  # its sequence ended with a failed step
        first_draft = len(step.token_ids) - step.num_drafts
        for index, token in enumerate(step.token_ids):
            position = step.start + index
            if token == PENDING:
                token = known[-1] if known else 0
                assert garbage or position == len(known) - 1, "PENDING is not the newest token"
            assert garbage or index >= first_draft or known[position] == token, f"wrong token at {position}"
            self.cache[step.block_table[position // BLOCK]][position % BLOCK] = token
        if garbage:
            return (Sampled(0) if step.sample else None), None
        for position in range(step.end - step.num_drafts):
            held = self.cache[step.block_table[position // BLOCK]][position % BLOCK]
            assert held == known[position], f"sequence {step.seq_id}: the cache is wrong at {position}"
        return self._sample(step, known), self._prompt_logprobs(step, known)

    def _sample(self, step: SequenceStep, known: list[int]) -> Sampled | None:
        if not step.sample:
            return None
        assert len(known) == step.end - step.num_drafts
        drawn = [self._draw(step, known)]
        for draft in step.drafts:
            if drawn[-1].token_id != draft:
                break
            drawn.append(self._draw(step, known))
        drawn[0].more = drawn[1:]
        return drawn[0]

    def _draw(self, step: SequenceStep, known: list[int]) -> Sampled:
        token = draw(known, len(known) - step.prompt_len, step.params.seed)
        known.append(token)
        return Sampled(token, TokenLogprobs(token, -1.0, 1) if step.params.logprobs >= 0 else None)

    def _prompt_logprobs(self, step: SequenceStep, known: list[int]) -> list[TokenLogprobs] | None:
        if step.params.prompt_logprobs < 0:
            return None
        positions = range(step.start + 1, min(step.end + 1, step.prompt_len))
        return [TokenLogprobs(known[position], float(-position), 1) for position in positions]
