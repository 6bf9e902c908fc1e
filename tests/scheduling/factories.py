"""Short ways to make sequences, schedulers and steps for tests."""

from __future__ import annotations

from octavo.protocol.messages import SamplingParams, SequenceOutput, Submit
from octavo.scheduling.block_pool import BlockPool
from octavo.scheduling.scheduler import Limits, Scheduler
from scheduling.fake_runner import VOCAB, FakeRunner, make_info


def tokens(count: int, *, first: int = 0) -> list[int]:
    return [(first + 7 * index) % VOCAB for index in range(count)]


def submit(
    seq_id: int,
    prompt: list[int] | int = 10,
    *,
    resumed: list[int] | None = None,
    priority: int = 0,
    tenant: str = "",
    **params,
) -> Submit:
    prompt = tokens(prompt, first=seq_id) if isinstance(prompt, int) else prompt
    sampling = SamplingParams(**{"max_tokens": 4, **params})
    return Submit(seq_id, prompt, sampling, generated_token_ids=resumed or [], priority=priority, tenant=tenant)


def make_scheduler(
    num_blocks: int = 16,
    *,
    batch_size: int = 8,
    budget: int = 256,
    context: int = 4096,
    prefix_cache: bool = True,
    speculation: bool = False,
) -> Scheduler:
    limits = Limits(
        batch_size=batch_size,
        max_num_batched_tokens=budget,
        context_length=context,
        vocab_size=VOCAB,
        speculation=speculation,
    )
    return Scheduler(BlockPool(num_blocks, prefix_cache=prefix_cache), limits)


class Machine:
    """A scheduler and a fake runner, driven by hand: `plan` and `commit` one by one, or `run` to the end."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        limits = scheduler.limits
        num_blocks = scheduler.pool.num_blocks
        self.runner = FakeRunner(make_info(num_blocks, context=limits.context_length, batch_size=limits.batch_size))
        self.plans = []
        self.outputs: dict[int, list[SequenceOutput]] = {}

    def add(self, *submits: Submit) -> None:
        for one in submits:
            self.record([self.scheduler.add(one)])

    def abort(self, seq_id: int) -> None:
        self.record([self.scheduler.abort(seq_id)])

    def record(self, outputs) -> None:
        for output in outputs:
            if output is not None:
                self.outputs.setdefault(output.seq_id, []).append(output)

    def plan(self, now: float = 0.0):
        plan = self.scheduler.schedule(now)
        if plan is not None:
            self.runner.submit(plan)
            self.plans.append(plan)
        self.scheduler.check_integrity()
        return plan

    def commit(self) -> list[SequenceOutput]:
        outputs = self.scheduler.commit(self.plans.pop(0), self.runner.collect())
        self.record(outputs)
        self.scheduler.check_integrity()
        return outputs

    def run(self, *, ahead: int = 2) -> None:
        while self.scheduler.has_unfinished or self.plans:
            plan = self.plan() if len(self.plans) < ahead else None
            if self.plans and (plan is None or len(self.plans) == ahead):
                self.commit()

    def tokens_of(self, seq_id: int) -> list[int]:
        return [token for output in self.outputs.get(seq_id, []) for token in output.token_ids]

    def finish_of(self, seq_id: int) -> str | None:
        reasons = [output.finish_reason for output in self.outputs.get(seq_id, [])]
        assert all(reason is None for reason in reasons[:-1]), "a word after the last one"
        return reasons[-1] if reasons else None
