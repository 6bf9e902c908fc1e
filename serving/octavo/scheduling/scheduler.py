"""Which tokens of which sequences the next step computes. Pure bookkeeping on the engine thread; no runner in sight.

One rule: every step brings each sequence's `num_computed` closer to its `num_tokens` under one token budget:
sequences that lack one token first, then prompts in chunks, then new ones. Plans are made one step ahead: `schedule`
may be called while one plan is not committed; tokens that it samples count as pending. A plan with drafts is the last
one until it is committed, since nobody knows how many of them come true. In this order:

    schedule   grow tables, preempt (newest first), admit, build the plan, add drafts
    commit     fill in tokens, decide finishes, register full blocks, then give back what no other plan refers to

Blocks and slots of a sequence that ended or was preempted go back when the last plan that refers to them is committed.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from octavo.protocol.messages import EngineStats, SequenceOutput, Submit, TokenLogprobs
from octavo.scheduling.block_pool import BLOCK_SIZE, BlockPool, extend_digests, num_blocks_for
from octavo.scheduling.drafting import Drafting
from octavo.scheduling.holdings import Holdings
from octavo.scheduling.idle_chunk import IdleChunk
from octavo.scheduling.plan import PENDING, Sampled, SequenceStep, StepPlan, StepResult
from octavo.scheduling.sequence import Sequence, State, from_submit
from octavo.scheduling.waiting import WaitingQueue

MOST_BLOCKS_CHECKED = 1 << 14  # while idle; a request that comes meanwhile waits
MAX_IN_FLIGHT = 2  # plans not committed: one running, one waiting behind it


@dataclass(frozen=True)
class Limits:
    """What the scheduler may hand out."""

    batch_size: int  # sequences running at once: slots
    max_num_batched_tokens: int  # tokens of one step
    context_length: int  # tokens of prompt + output
    vocab_size: int
    speculation: bool = False  # of sequences that do not say it themselves
    max_draft_tokens: int = 8
    max_idle_tokens: int = 0  # of a step in which nobody waits for a next token, if that is more


@dataclass(slots=True)
class _InFlight:
    """A plan that is not committed. `members[i]` belongs to `plan.sequences[i]`: ids may be reused, objects are not."""

    plan: StepPlan
    members: list[Sequence]
    has_drafts: bool = False
    is_uniform: bool = False  # one token for each sequence, and drafts: its time says what rows cost


@dataclass(slots=True)
class _Counters:
    steps: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


class Scheduler:
    """Owns all sequences, their blocks and their slots."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self._max_running = min(limits.batch_size, limits.max_num_batched_tokens)
        self._sequences: dict[int, Sequence] = {}  # all that have not finished
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # sorted by Sequence.order: the last one is preempted first
        self._holdings = Holdings(pool, num_slots=limits.batch_size)
        self._in_flight: deque[_InFlight] = deque()
        self._step_id = 0
        self._arrivals = 0
        self._num_passed_over = 0  # sequences that the last plan left waiting
        self._counters = _Counters()
        self._drafting = Drafting(pool, most=limits.max_draft_tokens)
        self._idle_chunk = IdleChunk(least=limits.max_num_batched_tokens, most=limits.max_idle_tokens)
        self._num_speculating = 0  # of the sequences that have not finished

    # ---- coming and going

    @property
    def has_unfinished(self) -> bool:
        return bool(self._sequences)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def unfinished_ids(self) -> list[int]:
        return list(self._sequences)

    def add(self, submit: Submit) -> SequenceOutput | None:
        """Queue a sequence. Returns its finish if it ends at once (it can never run, or its resumed tokens end it).

        ValueError if the id is in use.
        """
        if submit.seq_id in self._sequences:
            raise ValueError(f"sequence {submit.seq_id} exists already")
        error = self._why_impossible(submit)
        if error is not None:
            return SequenceOutput(submit.seq_id, [], "error", error=error)
        self._arrivals += 1
        total = min(self.limits.context_length, self.pool.num_blocks * BLOCK_SIZE + 1)  # the last token is not computed
        asked = submit.params.speculation
        speculates = self.limits.speculation if asked is None else asked
        seq = from_submit(submit, arrival=self._arrivals, max_tokens_total=total, speculates=speculates)
        reason = seq.finish_of(seq.token_ids[-1]) if seq.num_known_outputs else None
        if reason is None and len(seq.token_ids) >= seq.limit:
            reason = "length"
        if reason is not None:
            return SequenceOutput(submit.seq_id, [], reason)
        self._sequences[seq.seq_id] = seq
        self._num_speculating += speculates
        self._waiting.push(seq)
        return None

    def _why_impossible(self, submit: Submit) -> str | None:
        prompt, outputs = submit.prompt_token_ids, submit.generated_token_ids
        if not prompt:
            return "the prompt is empty"
        lowest, highest = min(prompt), max(prompt)
        if outputs:
            lowest, highest = min(lowest, min(outputs)), max(highest, max(outputs))
        if lowest < 0 or highest >= self.limits.vocab_size:
            return f"a token id is outside 0 .. {self.limits.vocab_size - 1}"
        if len(prompt) >= self.limits.context_length:
            return f"{len(prompt)} prompt tokens leave no room in the context of {self.limits.context_length}"
        if num_blocks_for(len(prompt)) > self.pool.num_blocks:
            return f"{len(prompt)} prompt tokens exceed the cache of {self.pool.num_blocks * BLOCK_SIZE} tokens"
        return None

    def abort(self, seq_id: int, *, reason: str = "cancelled", error: str | None = None) -> SequenceOutput | None:
        """End a sequence now; None if it has ended already. Tokens still being sampled are dropped."""
        seq = self._sequences.get(seq_id)
        if seq is None:
            return None
        self._finish(seq)
        return self._output(seq, [], reason, error=error)

    def _finish(self, seq: Sequence) -> None:
        before, seq.state = seq.state, State.FINISHED
        del self._sequences[seq.seq_id]
        self._num_speculating -= seq.speculation is not None
        if before is State.RUNNING:
            self._running.remove(seq)
            self._release(seq)
        else:
            self._waiting.discard(seq)

    def _release(self, seq: Sequence) -> None:
        slot, seq.slot = seq.slot, -1
        self._holdings.release(seq.rewind(), slot, last_step=seq.last_step)

    # ---- planning

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can be computed before an earlier plan is committed (or at all)."""
        assert len(self._in_flight) < MAX_IN_FLIGHT, "commit the oldest plan first"
        if self._in_flight and self._in_flight[-1].has_drafts:
            return None
        plan = StepPlan(self._step_id + 1)
        current = _InFlight(plan, [])
        prompts, short = self._plan_decodes(current)
        num_decodes = len(current.members)
        budget = self.limits.max_num_batched_tokens - num_decodes if num_decodes else self._idle_chunk.tokens
        for seq in prompts:
            if budget and seq.state is State.RUNNING:
                budget -= self._plan(current, seq, most=budget)
        if not short:
            self._admit(current, budget, now)
        if not current.members:
            return None
        current.is_uniform = num_decodes == len(current.members)
        if current.is_uniform and self._num_speculating:
            current.has_drafts = self._drafting.lengthen(
                current.members, plan.sequences, room=budget, spare=len(self._running)
            )
        self._step_id += 1
        self._num_passed_over = len(self._waiting)
        self._in_flight.append(current)
        fresh = {step.slot for step in plan.sequences if step.fresh}
        plan.evicted_slots = self._holdings.hand_over_evicted(but=fresh)
        return plan

    def _plan_decodes(self, current: _InFlight) -> tuple[list[Sequence], bool]:
        """Plan all that lack one token. Returns those that lack more, and whether blocks ran short."""
        prompts: list[Sequence] = []
        running = self._running
        num_stalled = num_preempted = index = 0
        while index < len(running):
            seq = running[index]
            index += 1
            num_tokens = len(seq.token_ids) + seq.num_pending
            if num_tokens - seq.num_computed > 1:
                prompts.append(seq)
                continue
            if seq.num_pending and num_tokens >= seq.limit:
                continue  # the plan under way will end it
            if seq.num_computed == len(seq.blocks) * BLOCK_SIZE:
                victims = self._grow(seq, num_stalled)
                num_preempted += victims
                if seq.state is not State.RUNNING or seq.num_computed == len(seq.blocks) * BLOCK_SIZE:
                    num_stalled += 1
                    continue
            self._plan(current, seq, most=1)
        return prompts, bool(num_stalled or num_preempted)

    def _grow(self, seq: Sequence, num_stalled: int) -> int:
        """Try to add a block, preempting from the end of `running`; returns how many, maybe `seq` itself.

        If commits under way will free enough, the sequence just sits out this step.
        """
        victims = 0
        while (blocks := self.pool.allocate(1)) is None:
            if self._holdings.num_coming > num_stalled:
                return victims
            victim = self._running.pop()
            self._preempt(victim)
            victims += 1
            if victim is seq:
                return victims
        seq.grow(blocks)
        return victims

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue, to be computed again. A pending token joins `token_ids` when its plan is committed."""
        self._counters.preemptions += 1
        seq.state = State.WAITING
        self._release(seq)
        self._waiting.push(seq)

    def _plan(self, current: _InFlight, seq: Sequence, *, most: int, fresh: bool = False) -> int:
        """Put the next tokens of a running sequence, at most `most`, into the plan; returns how many."""
        known = seq.token_ids
        start, num_tokens = seq.num_computed, len(known) + seq.num_pending
        end = min(num_tokens, start + most)
        tokens = known[start:end]
        if end > len(known):
            tokens.append(PENDING)
        sample = end == num_tokens
        step = SequenceStep(
            seq.seq_id, seq.slot, fresh, start, tokens, seq.block_view, sample, num_tokens - seq.prompt_len,
            seq.prompt_len, seq.params, tuple(known) if fresh else (),
        )  # fmt: skip
        seq.num_computed = end
        seq.num_pending += sample
        seq.last_step = current.plan.step_id
        current.plan.sequences.append(step)
        current.members.append(seq)
        return end - start

    def _admit(self, current: _InFlight, budget: int, now: float) -> None:
        """Start waiting sequences in order while slots, blocks and budget last. Nobody overtakes the first one."""
        while budget and self._holdings.has_slot and len(self._running) < self._max_running:
            seq = self._waiting.peek()
            if seq is None or seq.num_pending or not self._allocate(seq):
                return
            self._waiting.pop()
            seq.state = State.RUNNING
            if not seq.has_run:
                seq.cached_tokens = min(seq.num_computed, seq.prompt_len)
            seq.slot = self._holdings.take_slot()
            seq.scheduled_at = seq.scheduled_at or now
            insort(self._running, seq, key=lambda other: other.order)
            budget -= self._plan(current, seq, most=budget, fresh=True)

    def _allocate(self, seq: Sequence) -> bool:
        """Blocks for all known tokens, from the prefix cache as far as it goes. False, and no change, when short."""
        num_tokens = len(seq.token_ids)
        hits = self._find_prefix(seq, num_tokens)
        wanted = num_blocks_for(num_tokens) - len(hits)
        spare = min(len(self._running), self.pool.num_blocks // 16)  # room to grow for those that run
        if not self.pool.can_allocate(wanted, hits=hits, spare=spare):
            return False
        blocks = self.pool.allocate(wanted, hits=hits)
        assert blocks is not None
        seq.grow(blocks)
        seq.num_registered = len(hits)
        seq.num_computed = len(hits) * BLOCK_SIZE
        if self.pool.prefix_cache:
            self._counters.prefix_query_tokens += num_tokens
            self._counters.prefix_hit_tokens += seq.num_computed
        return True

    def _find_prefix(self, seq: Sequence, num_tokens: int) -> list[int]:
        """Cached blocks of the sequence's beginning; never all of it, since the last token's logits are needed."""
        if not self.pool.prefix_cache or seq.wants_prompt_logprobs:
            return []
        usable = (num_tokens - 1) // BLOCK_SIZE
        extend_digests(seq.digests, seq.token_ids, upto=usable)
        return self.pool.match(seq.digests[:usable])

    # ---- results

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceOutput]:
        """Fill in what the oldest plan sampled; outputs in plan order. Sequences that ended meanwhile are skipped."""
        oldest = self._take_oldest(plan)
        members = oldest.members
        assert len(result.sampled) == len(result.prompt_logprobs) == len(members), "the result does not fit the plan"
        outputs: list[SequenceOutput] = []
        self._counters.steps += 1
        self._idle_chunk.measured(plan.num_tokens, result.seconds)
        if oldest.is_uniform and self._num_speculating:
            self._drafting.measured(plan.num_tokens, result.seconds)
        for seq, step, sampled, entries in zip(members, plan.sequences, result.sampled, result.prompt_logprobs):
            if seq.state is State.FINISHED:
                continue
            if step.start < step.prompt_len:
                self._commit_prompt(seq, step, entries)
            if step.num_drafts:
                assert sampled is not None, "the runner did not sample"
                outputs.append(self._verify(seq, step, sampled))
                continue
            if step.end // BLOCK_SIZE > seq.num_registered:
                self._register(seq, step, step.end)
            if step.sample:
                assert sampled is not None, "the runner did not sample"
                outputs.append(self._append(seq, sampled))
        self._holdings.end_commit()
        return outputs

    def _commit_prompt(self, seq: Sequence, step: SequenceStep, entries: list[TokenLogprobs] | None) -> None:
        self._counters.prompt_tokens += min(step.end, step.prompt_len) - step.start
        computed_again = seq.state is State.WAITING and not step.sample
        if entries is not None and seq.prompt_logprobs is not None and not computed_again:
            seq.prompt_logprobs.extend(entries)

    def fail(self, plan: StepPlan, message: str) -> list[SequenceOutput]:
        """The oldest plan failed as a whole: its sequences end with an error, the others go on."""
        members = self._take_oldest(plan).members
        living = [seq for seq in members if seq.state is not State.FINISHED]
        for seq in living:
            self._finish(seq)
        self._holdings.end_commit()
        return [self._output(seq, [], "error", error=message) for seq in living]

    def _take_oldest(self, plan: StepPlan) -> _InFlight:
        oldest = self._in_flight.popleft()
        assert oldest.plan is plan, "plans are committed in order"
        self._holdings.begin_commit(plan.step_id)
        return oldest

    def _register(self, seq: Sequence, step: SequenceStep, end: int) -> None:
        """Full blocks that this step completed become findable; also those of a sequence preempted since."""
        num_full = end // BLOCK_SIZE
        if self.pool.prefix_cache:
            extend_digests(seq.digests, seq.token_ids, upto=num_full)
            for index in range(seq.num_registered, num_full):
                self.pool.register(step.block_table[index], seq.digests[index])
        seq.num_registered = num_full

    def _append(self, seq: Sequence, sampled: Sampled) -> SequenceOutput:
        seq.num_pending -= 1
        seq.token_ids.append(sampled.token_id)
        self._counters.output_tokens += 1
        reason = seq.finish_of(sampled.token_id)
        logprobs = None if sampled.logprobs is None else [sampled.logprobs]
        output = self._output(seq, [sampled.token_id], reason, logprobs=logprobs)
        if reason is not None:
            self._finish(seq)
        return output

    def _verify(self, seq: Sequence, step: SequenceStep, sampled: Sampled) -> SequenceOutput:
        """Take the tokens drawn at a draft, up to one that ends the sequence. What the cache holds of them is good."""
        assert seq.speculation is not None
        assert seq.state is State.RUNNING, "nothing is preempted while a draft is under way"
        drawn = [sampled, *sampled.more]
        seq.num_pending -= 1
        token_ids: list[int] = []
        reason = None
        while reason is None and len(token_ids) < len(drawn):
            token_ids.append(drawn[len(token_ids)].token_id)
            seq.token_ids.append(token_ids[-1])
            reason = seq.finish_of(token_ids[-1])
        accepted = len(token_ids) - 1
        seq.num_computed += accepted
        seq.speculation.learn(drafted=step.num_drafts, accepted=len(sampled.more))
        self._count_drafts(step.num_drafts, accepted)
        if seq.num_computed // BLOCK_SIZE > seq.num_registered:
            self._register(seq, step, seq.num_computed)
        entries = [one.logprobs for one in drawn[: len(token_ids)] if one.logprobs is not None]
        output = self._output(seq, token_ids, reason, logprobs=entries or None)
        if reason is not None:
            self._finish(seq)
        return output

    def _count_drafts(self, drafted: int, accepted: int) -> None:
        counters = self._counters
        counters.output_tokens += accepted + 1
        counters.drafts += 1
        counters.draft_tokens += drafted
        counters.accepted_tokens += accepted

    def _output(
        self,
        seq: Sequence,
        token_ids: list[int],
        reason: str | None,
        *,
        error: str | None = None,
        logprobs: list[TokenLogprobs] | None = None,
    ) -> SequenceOutput:
        if seq.announced:
            return SequenceOutput(seq.seq_id, token_ids, reason, logprobs=logprobs, error=error)
        seq.announced = True
        return SequenceOutput(
            seq.seq_id,
            token_ids,
            reason,
            logprobs=logprobs,
            prompt_logprobs=seq.take_prompt_logprobs() if token_ids else None,
            error=error,
            scheduled_at=seq.scheduled_at,
            cached_tokens=max(seq.cached_tokens, 0),
        )

    # ---- looking in

    def stats(self, *, last_progress: float = 0.0, step_deadline: float = 0.0) -> EngineStats:
        """Counters and gauges.

        Nobody counts as waiting whom no plan passed over: asked between a submit and the next plan, that would be a
        whole burst for which there may be slots, and new requests would be refused for it.
        """
        counters, pool = self._counters, self.pool
        return EngineStats(
            steps=counters.steps,
            num_running=len(self._running),
            num_waiting=min(len(self._waiting), self._num_passed_over),
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_used_blocks=pool.num_used,
            num_preemptions=counters.preemptions,
            prefix_query_tokens=counters.prefix_query_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            prompt_tokens=counters.prompt_tokens,
            output_tokens=counters.output_tokens,
            num_drafts=counters.drafts,
            draft_tokens=counters.draft_tokens,
            accepted_tokens=counters.accepted_tokens,
            last_progress=last_progress,
            step_deadline=step_deadline,
        )

    def check_idle(self) -> None:
        """AssertionError if the books of a scheduler without sequences do not show that nothing is held.

        Looks at every block only where that takes milliseconds.
        """
        assert not self._sequences and not self._in_flight, "not idle"  # noqa: PT018
        self.pool.check_idle()
        if self.pool.num_blocks <= MOST_BLOCKS_CHECKED:
            self.check_integrity()

    def check_integrity(self) -> None:
        """AssertionError if blocks, slots and sequences do not add up. Looks at every block."""
        self._holdings.check_integrity([seq.blocks for seq in self._running], [seq.slot for seq in self._running])
        waiting = sum(1 for seq in self._sequences.values() if seq.state is State.WAITING)
        assert waiting == len(self._waiting), "the queue's length is wrong"
        assert waiting + len(self._running) == len(self._sequences), "a sequence is lost"
        assert all(not seq.blocks and seq.slot < 0 for seq in self._sequences.values() if seq.state is State.WAITING)
