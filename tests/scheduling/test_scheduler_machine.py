"""Random add, abort, plan, commit and failure over tiny pools: the books balance after every step, outputs are exact.

The fake runner checks at every step that the cache holds the right token at every attended position; here every output
is compared with the one computed directly, whatever was chunked, shared, preempted, resumed or cancelled on the way.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from octavo.protocol.messages import Submit
from scheduling.factories import Machine, make_scheduler, submit, tokens
from scheduling.fake_runner import COPYING, VOCAB, expected

CONTEXT = 500


class Scheduling(RuleBasedStateMachine):
    num_blocks, batch_size, budget, prefix_cache = 6, 3, 100, True

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(
            make_scheduler(
                self.num_blocks,
                batch_size=self.batch_size,
                budget=self.budget,
                context=CONTEXT,
                prefix_cache=self.prefix_cache,
            )
        )
        self.submits: dict[int, Submit] = {}
        self.aborted: set[int] = set()
        self.failed: set[int] = set()

    @rule(
        family=st.integers(0, 2),
        shared=st.sampled_from([0, 5, 64, 100, 128, 200]),
        own=st.integers(1, 70),
        max_tokens=st.sampled_from([1, 2, 10, 70, 140]),
        many_ends=st.booleans(),
        min_tokens=st.integers(1, 5),
        resumed=st.integers(0, 80),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        prompt_logprobs=st.sampled_from([-1, -1, -1, 0]),
        copies=st.booleans(),
        tenant=st.sampled_from(["", "a"]),
    )
    def add(
        self, family, shared, own, max_tokens, many_ends, min_tokens, resumed, priority, prompt_logprobs, copies, tenant
    ):
        seq_id = len(self.submits)
        prompt = tokens(shared, first=family) + tokens(own, first=seq_id * 31 + 500)
        ends = tuple(range(0, VOCAB, 12)) if many_ends else ()

        def make(resumed: list[int]) -> Submit:
            return submit(
                seq_id, prompt, max_tokens=max_tokens, end_token_ids=ends, min_tokens=min_tokens,
                seed=seq_id % 2 + copies * COPYING, speculation=copies, prompt_logprobs=prompt_logprobs,
                priority=priority, resumed=resumed, tenant=tenant,
            )  # fmt: skip

        known, _ = self.expected(make([]))
        self.submits[seq_id] = one = make(known[: min(resumed, len(known))])
        self.machine.add(one)

    def expected(self, one: Submit) -> tuple[list[int], str]:
        return expected(one.prompt_token_ids, one.params, context=CONTEXT, capacity=self.num_blocks * 64)

    @rule(back=st.integers(0, 8))
    def abort(self, back):
        seq_id = len(self.submits) - 1 - back
        if seq_id >= 0 and self.machine.finish_of(seq_id) is None:
            self.machine.abort(seq_id)
            self.aborted.add(seq_id)
            assert self.machine.finish_of(seq_id) == "cancelled"

    @precondition(lambda self: len(self.machine.plans) < 2)
    @rule()
    def plan(self):
        self.machine.plan()

    @precondition(lambda self: self.machine.plans)
    @rule()
    def commit(self):
        self.machine.commit()

    @rule(turns=st.integers(1, 80))
    def turn(self, turns):
        """Like the engine loop: plan ahead, then commit the older plan."""
        for _ in range(turns):
            plan = self.machine.plan() if len(self.machine.plans) < 2 else None
            if self.machine.plans and (plan is None or len(self.machine.plans) == 2):
                self.machine.commit()

    @precondition(lambda self: self.machine.plans)
    @rule()
    def fail(self):
        machine = self.machine
        plan = machine.plans.pop(0)
        machine.runner.queue.popleft()
        for step in plan.sequences:
            machine.runner.slots.pop(step.slot, None)
        outputs = machine.scheduler.fail(plan, "failed")
        machine.record(outputs)
        self.failed |= {output.seq_id for output in outputs}
        machine.scheduler.check_integrity()

    @invariant()
    def outputs_are_a_beginning_of_the_right_ones(self):
        for seq_id, one in self.submits.items():
            want, _ = self.expected(one)
            sent = [*one.generated_token_ids, *self.machine.tokens_of(seq_id)]
            assert sent == want[: len(sent)] or self.machine.finish_of(seq_id) == "error"

    def teardown(self):
        machine = self.machine
        machine.run()
        for seq_id, one in self.submits.items():
            reason = machine.finish_of(seq_id)
            if len(one.prompt_token_ids) > self.num_blocks * 64:
                assert reason == "error"
                continue
            if seq_id in self.aborted | self.failed:
                assert reason in ("cancelled", "error")
                continue
            want, want_reason = self.expected(one)
            assert [*one.generated_token_ids, *machine.tokens_of(seq_id)] == want
            assert reason == want_reason
            if one.params.prompt_logprobs >= 0 and not one.generated_token_ids:
                entries = machine.outputs[seq_id][0].prompt_logprobs
                assert [entry.token_id for entry in entries] == one.prompt_token_ids[1:]
        stats = machine.scheduler.stats()
        assert (stats.num_used_blocks, stats.num_running, stats.num_waiting) == (0, 0, 0)


class Roomy(Scheduling):
    num_blocks, batch_size, budget = 40, 8, 64


class Uncached(Scheduling):
    num_blocks, batch_size, budget, prefix_cache = 8, 4, 300, False


LIMITS = settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))

TestScheduling = Scheduling.TestCase
TestScheduling.settings = LIMITS
TestRoomy = Roomy.TestCase
TestRoomy.settings = LIMITS
TestUncached = Uncached.TestCase
TestUncached.settings = LIMITS
