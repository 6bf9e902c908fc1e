"""The GPU runner's own logic, without a card: reference kernels on a queue that does everything at once.

Whatever it fills up, stages, replays or takes over from the device must leave the tokens of the plain runner.
"""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine_runner.plans import Driver, params, step
from models.tiny_checkpoints import VOCAB
from octavo.engine import decode_graphs, gpu_runner
from octavo.engine.core import EngineCore, make_scheduler
from octavo.engine.decode_graphs import batch_buckets, table_buckets
from octavo.engine.device_queue import Body, ImmediateQueue
from octavo.engine.gpu_runner import ADVICE, GpuRunner, attempt
from octavo.engine.gpu_steps import LOGPROB_ROWS, GpuSteps, Queued
from octavo.engine.interface import DeviceLost, Runner, RunnerError, StepOutOfMemory
from octavo.engine.kv_cache import _logit_rows, cache_specs, make_caches
from octavo.engine.load import load_runner
from octavo.engine.staging import Download, Staging
from octavo.kernels.interface import Kernels
from octavo.kernels.reference import ReferenceKernels
from octavo.models.config import load_config
from octavo.models.decoder import Decoder
from octavo.models.loader import LoadOptions, load_decoder
from octavo.parallel.group import make_group
from octavo.protocol.messages import SamplingParams, SequenceOutput, Submit
from octavo.quantization.formats.reader import ReaderInputs
from octavo.quantization.formats.source import TensorSource
from octavo.scheduling.plan import StepPlan, StepResult
from octavo.settings import Settings

CPU = torch.device("cpu")
LONGEST = 384
PROMPT = torch.randint(3, VOCAB, (70,), generator=torch.Generator().manual_seed(8)).tolist()


class CountingQueue(ImmediateQueue):
    """Counts what was recorded and how often it ran again."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.captures = 0
        self.replays = 0

    def capture(self, body: Body) -> Body:
        self.captures += 1
        body()

        def replay() -> None:
            self.replays += 1
            body()

        return replay


@pytest.fixture
def plain(tiny_folder: Path) -> Iterator[Runner]:
    environ = {
        "MODEL_DIR": str(tiny_folder), "MAX_SEQ_LEN": "256", "MAX_DEC_LEN": "128", "BATCH_SIZE": "6",
        "KERNELS": "reference", "NUM_THREADS": "1",
    }  # fmt: skip
    runner = load_runner(Settings.from_environ(environ), lambda stage, fraction: None)
    yield runner
    runner.close()


@pytest.fixture
def device_queue() -> CountingQueue:
    return CountingQueue()


@pytest.fixture
def runner(tiny_folder: Path, plain: Runner, device_queue: CountingQueue) -> Iterator[GpuRunner]:
    """The same model and cache size as `plain`."""
    made = make_runner(load_model(tiny_folder, ReferenceKernels()), plain, device_queue)
    yield made
    made.close()


def load_model(folder: Path, kernels: Kernels) -> Decoder:
    config = load_config(folder)
    inputs = ReaderInputs(
        source=TensorSource(folder),
        quantization=config.quantization,
        weight_quant=Settings.from_environ({}).weight_quant,
    )
    options = LoadOptions(max_positions=LONGEST + 1, int8_cache=True)
    return load_decoder(config, inputs, kernels, make_group(1), options=options, progress=lambda *_: None)


def make_runner(model: Decoder, plain: Runner, queue: ImmediateQueue) -> GpuRunner:
    """Its decode steps are recorded."""
    specs = cache_specs(model.config, model.cache_schemes, dtype=torch.int8, device=CPU)
    caches = make_caches(model.kernels, specs, plain.info.num_blocks + 1)
    return GpuRunner(model, caches, plain.info, lambda: queue, longest=LONGEST, report=lambda fraction: None)


def generate(runner: Runner, requests: list[Submit]) -> dict[int, list[SequenceOutput]]:
    """All outputs of requests that come one after the other, two turns apart, through the real scheduler."""
    scheduler = make_scheduler(runner.info, max_num_batched_tokens=48, prefix_cache=True)
    core = EngineCore(scheduler, runner, clock=lambda: 0.0)
    outputs: dict[int, list[SequenceOutput]] = {request.seq_id: [] for request in requests}
    waiting = list(requests)
    turn = 0
    while waiting or core.has_work:
        if waiting and turn % 2 == 0:
            request = waiting.pop(0)
            for output in core.add(request):
                outputs[output.seq_id].append(output)
        for output in core.turn():
            outputs[output.seq_id].append(output)
        turn += 1
    return outputs


def mixed_requests() -> list[Submit]:
    kinds = [
        SamplingParams(max_tokens=20, temperature=0.0),
        SamplingParams(max_tokens=17, temperature=1.0, top_p=0.9, seed=7, repetition_penalty=1.3),
        SamplingParams(max_tokens=9, temperature=0.8, top_k=5, seed=2**64 - 3, logprobs=2, min_tokens=9),
        SamplingParams(max_tokens=12, temperature=0.0, prompt_logprobs=1, logprobs=0),
        SamplingParams(max_tokens=25, temperature=1.2, seed=11, frequency_penalty=0.5, presence_penalty=0.2),
        SamplingParams(max_tokens=30, temperature=0.0, logit_bias={5: 4.0, 9: -3.0}, min_tokens=5, end_token_ids=(5,)),
        SamplingParams(max_tokens=1, temperature=0.0),
        SamplingParams(max_tokens=16, temperature=0.5, seed=3),
    ]
    return [Submit(i, PROMPT[: 10 + 7 * i], kind) for i, kind in enumerate(kinds)]


def test_tokens_are_those_of_the_plain_runner(runner: GpuRunner, plain: Runner) -> None:
    mine, theirs = generate(runner, mixed_requests()), generate(plain, mixed_requests())
    assert mine == theirs
    assert all(outputs[-1].finish_reason for outputs in mine.values())


def test_a_step_behind_takes_its_token_from_the_device(runner: GpuRunner, plain: Runner) -> None:
    wanted = params(temperature=1.0, seed=5, repetition_penalty=1.2)
    tokens = Driver(runner, slot=2).run(PROMPT, wanted, count=24)
    assert tokens == Driver(plain, slot=2).run(PROMPT, wanted, count=24)
    assert len(set(tokens)) > 5


def test_decode_steps_are_recorded_once_for_each_size(runner: GpuRunner, device_queue: CountingQueue) -> None:
    assert device_queue.captures == 4
    Driver(runner).run(PROMPT, params(), count=20)
    assert (device_queue.captures, device_queue.replays) == (4, 19)  # the prompt's step ran by operations
    Driver(runner, slot=1).run(PROMPT, params(), count=5)
    assert (device_queue.captures, device_queue.replays) == (4, 23)


class SlowMark:
    """Passed only some time after it was made."""

    def __init__(self) -> None:
        self._at = time.monotonic() + 0.03

    def passed(self) -> bool:
        return time.monotonic() >= self._at

    def wait(self) -> None:
        time.sleep(max(0.0, self._at - time.monotonic()))


def test_a_step_is_queued_before_the_one_ahead_is_waited_for(
    runner: GpuRunner, device_queue: CountingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a device that takes its time: the host plans and queues meanwhile, one copy in and one out a step."""
    log: list[tuple[str, int]] = []
    real_queue, real_finish, real_put, real_lists = GpuSteps.queue, GpuSteps.finish, Staging.put, Download.lists

    def queue(self: GpuSteps, plan: StepPlan, now: float) -> Queued:
        log.append(("queue", plan.step_id))
        queued = real_queue(self, plan, now)
        log.append(("queued", plan.step_id))
        return queued

    def finish(self: GpuSteps, queued: Queued) -> StepResult:
        log.append(("finish", queued.plan.step_id))
        return real_finish(self, queued)

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            log.append((name, 0))
            return real(*arguments)

        return call

    monkeypatch.setattr(device_queue, "mark", SlowMark)
    monkeypatch.setattr(GpuSteps, "queue", queue)
    monkeypatch.setattr(GpuSteps, "finish", finish)
    monkeypatch.setattr(Staging, "put", counted("in", real_put))
    monkeypatch.setattr(Download, "lists", counted("out", real_lists))
    generate(runner, [Submit(1, PROMPT[:20], SamplingParams(max_tokens=15, temperature=1.0, seed=1))])
    steps = [step_id for name, step_id in log if name == "queue"]
    assert len(steps) >= 15
    for step_id, following in pairwise(steps):
        assert log.index(("queued", following)) < log.index(("finish", step_id))
    names = [name for name, _ in log]
    assert names.count("in") == names.count("out") == len(steps)


def test_rows_that_fill_up_a_batch_change_nothing(
    runner: GpuRunner, plain: Runner, device_queue: CountingQueue
) -> None:
    """Three sequences run in the recording for four."""
    found = []
    for each in (runner, plain):
        each.submit(StepPlan(1, [step(s, PROMPT[s:], params=params(), history=PROMPT[s:]) for s in (0, 1, 2)]))
        first = [entry.token_id for entry in each.collect().sampled if entry is not None]
        later = [
            step(s, [token], params=params(), start=len(PROMPT) - s, prompt_len=len(PROMPT) - s, num_outputs=1)
            for s, token in zip((0, 1, 2), first)
        ]
        each.submit(StepPlan(2, later))
        found.append([entry.token_id for entry in each.collect().sampled if entry is not None])
    assert found[0] == found[1]
    assert device_queue.replays == 1


def test_all_sizes_are_recorded_beforehand(tiny_folder: Path, plain: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """All widths of tables as well: no sequence is long enough to find one that is not."""
    monkeypatch.setattr(decode_graphs, "SMALL_TABLE", 1)
    assert table_buckets(7) == [1, 4, 7]
    queue, shares = CountingQueue(), []
    model = load_model(tiny_folder, ReferenceKernels())
    caches = make_caches(
        model.kernels,
        cache_specs(model.config, model.cache_schemes, dtype=torch.int8, device=CPU),
        plain.info.num_blocks + 1,
    )
    runner = GpuRunner(model, caches, plain.info, lambda: queue, longest=LONGEST, report=shares.append)
    recorded = queue.captures
    assert recorded == len(batch_buckets(6)) * 3 == len(shares)
    for length in (50, 150, 300):
        assert Driver(runner).run(long_prompt(length), params(), count=6)
    assert (queue.captures, queue.replays) == (recorded, 15)
    runner.close()


def long_prompt(length: int) -> list[int]:
    return (PROMPT * 5)[:length]


class OneAtATime(CountingQueue):
    """A device that takes its time, and notices what is recorded beside a step under way: that would wait for it."""

    under_way = waited = 0

    def mark(self) -> SlowMark:
        return SlowMark()

    def capture(self, body: Body) -> Body:
        self.waited += self.under_way
        return super().capture(body)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real_queue, real_finish = GpuSteps.queue, GpuSteps.finish

        def queue(steps: GpuSteps, plan: StepPlan, now: float) -> Queued:
            self.under_way += 1
            return real_queue(steps, plan, now)

        def finish(steps: GpuSteps, queued: Queued) -> StepResult:
            result = real_finish(steps, queued)
            self.under_way -= 1
            return result

        monkeypatch.setattr(GpuSteps, "queue", queue)
        monkeypatch.setattr(GpuSteps, "finish", finish)


@pytest.fixture
def unfinished(
    tiny_folder: Path, plain: Runner, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[GpuRunner, OneAtATime]]:
    """A start that had no time for tables of more than four blocks."""
    monkeypatch.setattr(decode_graphs, "SMALL_TABLE", 1)
    monkeypatch.setattr(decode_graphs, "RECORD_SECONDS", -1.0)
    monkeypatch.setattr(gpu_runner, "IDLE_SECONDS", 1000.0)
    queue = OneAtATime()
    runner = make_runner(load_model(tiny_folder, ReferenceKernels()), plain, queue)
    queue.watch(monkeypatch)
    yield runner, queue
    runner.close()


def test_what_the_start_left_out_runs_unrecorded_and_is_recorded_while_idle(
    unfinished: tuple[GpuRunner, OneAtATime], plain: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, queue = unfinished
    narrow, sizes = 2 * len(batch_buckets(6)), len(batch_buckets(6))
    assert queue.captures == narrow
    wide, short = long_prompt(300), long_prompt(100)
    for count in (6, 7):
        assert Driver(runner).run(wide, params(), count=count) == Driver(plain).run(wide, params(), count=count)
    assert (queue.captures, queue.replays) == (narrow, 0)
    Driver(runner).run(short, params(), count=3)
    assert (queue.captures, queue.replays) == (narrow, 2)
    monkeypatch.setattr(gpu_runner, "IDLE_SECONDS", 0.01)
    Driver(runner).run(short, params(), count=1)  # from here on it waits for as long only
    limit = time.monotonic() + 20
    while queue.captures < narrow + sizes:
        assert time.monotonic() < limit
        time.sleep(0.01)
    before = queue.replays
    assert Driver(runner).run(wide, params(), count=6) == Driver(plain).run(wide, params(), count=6)
    assert (queue.captures, queue.replays) == (narrow + sizes, before + 5)
    assert queue.waited == 0


def test_nothing_is_recorded_beside_a_step_under_way(
    unfinished: tuple[GpuRunner, OneAtATime], plain: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is never patient, and sequences that come and go: recording waits for the last step all the same."""
    runner, queue = unfinished
    monkeypatch.setattr(gpu_runner, "IDLE_SECONDS", 0.0)
    submits = [
        Submit(place, long_prompt(230 + 20 * place), SamplingParams(max_tokens=12, temperature=1.0, seed=place))
        for place in range(4)
    ]
    assert generate(runner, submits) == generate(plain, submits)
    assert queue.waited == 0


def test_a_recording_that_fails_while_idle_costs_no_step(
    unfinished: tuple[GpuRunner, OneAtATime], plain: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, queue = unfinished
    tried: list[bool] = []

    def fails(body: Body) -> Body:
        tried.append(True)
        raise RuntimeError("no recording today")

    monkeypatch.setattr(queue, "capture", fails)
    monkeypatch.setattr(gpu_runner, "IDLE_SECONDS", 0.01)
    Driver(runner).run(long_prompt(100), params(), count=1)
    limit = time.monotonic() + 20
    while len(tried) < len(batch_buckets(6)):
        assert time.monotonic() < limit
        time.sleep(0.01)
    wide = long_prompt(300)
    assert Driver(runner).run(wide, params(), count=6) == Driver(plain).run(wide, params(), count=6)
    assert len(tried) == len(batch_buckets(6))  # not again


def test_a_failed_step_is_one_error_and_the_next_works(
    runner: GpuRunner, plain: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Driver(plain).run(PROMPT, params(), count=3)
    for error, kind, text in (
        (ValueError("bad"), RunnerError, "bad"),
        (torch.OutOfMemoryError("2 GiB"), StepOutOfMemory, ADVICE),
        (RuntimeError("Triton Error [CUDA]: out of memory"), StepOutOfMemory, ADVICE),
        (RuntimeError("CUDA error: an illegal memory access"), DeviceLost, "illegal"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(ReferenceKernels, "sample", failing(error))
            with pytest.raises(kind, match=text):
                Driver(runner).run(PROMPT, params(), count=1)
    assert Driver(runner).run(PROMPT, params(), count=3) == expected


def test_steps_run_unrecorded_where_a_recording_finds_no_memory(
    tiny_folder: Path, plain: Runner, device_queue: CountingQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[bool] = []

    def no_memory(body: Body) -> Body:
        body()
        device_queue.captures += 1
        raise torch.OutOfMemoryError("a graph's pool")

    monkeypatch.setattr(device_queue, "capture", no_memory)
    monkeypatch.setattr(device_queue, "release_memory", lambda: released.append(True))
    runner = make_runner(load_model(tiny_folder, ReferenceKernels()), plain, device_queue)
    assert Driver(runner).run(PROMPT, params(), count=6) == Driver(plain).run(PROMPT, params(), count=6)
    assert device_queue.captures == len(released) == len(batch_buckets(6))  # tried once each
    runner.close()


def test_a_step_without_memory_gives_its_tensors_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the allocator is asked to give back what nobody holds."""
    made: list[weakref.ref[torch.Tensor]] = []
    held: list[torch.Tensor | None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(made[0]()))

    def part() -> None:
        activations = torch.zeros(8)
        made.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("2 GiB")

    assert isinstance(attempt(part), StepOutOfMemory)
    assert held == [None]


def failing(error: Exception) -> object:
    def sample(*_: object) -> None:
        raise error

    return sample


def test_making_it_reports_what_went_wrong(tiny_folder: Path, plain: Runner) -> None:
    def no_device() -> ImmediateQueue:
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        GpuRunner(load_model(tiny_folder, ReferenceKernels()), [], plain.info, no_device, longest=LONGEST)


def test_no_more_logits_are_in_memory_than_were_counted(
    runner: GpuRunner, plain: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt and decodes, all with log probabilities; seen wherever those are computed."""
    found: list[int] = []
    real = ReferenceKernels.logprobs

    def rows_of_logits() -> dict[int, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from other libraries' objects that are looked at
            tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
        wide = [one for one in tensors if one.dtype == torch.float32 and one.dim() == 2 and one.shape[1] == VOCAB]
        return {one.untyped_storage().data_ptr(): one.shape[0] for one in wide}

    def logprobs(*arguments: object) -> object:
        now = rows_of_logits()
        found.append(sum(rows for place, rows in now.items() if place not in before))
        return real(*arguments)  # type: ignore[arg-type]

    gc.collect()
    before = rows_of_logits()
    monkeypatch.setattr(ReferenceKernels, "logprobs", logprobs)
    wanted = params(logprobs=2, prompt_logprobs=2, repetition_penalty=1.2)
    prompts = [step(s, PROMPT * 3, params=wanted, history=PROMPT * 3) for s in (0, 1)]
    runner.submit(StepPlan(1, prompts))
    runner.collect()
    batch_size, rows = plain.info.batch_size, 6 * len(PROMPT)
    assert len(found) > 6
    assert max(found) >= LOGPROB_ROWS
    assert max(found) + 2 * batch_size <= _logit_rows(rows=rows, batch_size=batch_size, drafts=0)


def test_buckets_cover_every_batch_and_length() -> None:
    assert batch_buckets(1) == [1]
    assert batch_buckets(6) == [1, 2, 4, 6]
    assert batch_buckets(100)[-4:] == [64, 80, 96, 100]
    assert table_buckets(7) == [16]
    assert table_buckets(17) == [16, 17]
    assert table_buckets(2049) == [16, 64, 256, 1024, 2049]
