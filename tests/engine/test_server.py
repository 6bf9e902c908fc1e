"""The engine's socket over real ZeroMQ, with the fake runner: attach, fence, abort, heartbeat, loading, loss."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import zmq

from octavo.engine.core import EngineCore, make_scheduler
from octavo.engine.interface import RunnerError
from octavo.engine.server import Link, LoadFailed, Server
from octavo.protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    Attach,
    Attached,
    Heartbeat,
    Loading,
    Ping,
    Refused,
    Shutdown,
    StepOutputs,
    encoder,
    frontend_decoder,
)
from octavo.scheduling.plan import StepPlan
from scheduling.factories import submit, tokens
from scheduling.fake_runner import FakeRunner, expected, make_info

KEY = "k" * 64
SECONDS = 5.0  # no test waits longer for one thing


class Peer:
    """A front end of few words."""

    def __init__(self, context: zmq.Context, port: int) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{port}")
        self.encode, self.decode = encoder().encode, frontend_decoder().decode

    def send(self, *messages: msgspec.Struct) -> None:
        for message in messages:
            self.socket.send(self.encode(message))

    def attach(self, epoch: int = 1, *, key: str = KEY, fingerprint: str = "", version: int = PROTOCOL_VERSION):
        self.send(Attach(version, key, epoch, fingerprint))
        return self.expect(Attached, Refused)

    def receive(self, seconds: float = SECONDS):
        return self.decode(self.socket.recv()) if self.socket.poll(int(seconds * 1000)) else None

    def expect(self, *kinds: type):
        """The next message of these kinds; others are passed over."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            message = self.receive()
            if isinstance(message, kinds):
                return message
        raise AssertionError(f"no {kinds} came")

    def outputs_until_finished(self, *seq_ids: int) -> dict[int, list]:
        outputs: dict[int, list] = {}
        waiting = set(seq_ids)
        while waiting:
            for output in self.expect(StepOutputs).outputs:
                outputs.setdefault(output.seq_id, []).append(output)
                if output.finish_reason is not None:
                    waiting.discard(output.seq_id)
        return outputs


class Running:
    """A server in a thread, and the peers of a test."""

    def __init__(
        self, *, load: Callable | None = None, before_step=lambda plan: None, num_blocks: int = 16, **args
    ) -> None:
        runner = FakeRunner(make_info(num_blocks), before_step=before_step)
        scheduler = make_scheduler(runner.info, max_num_batched_tokens=256, prefix_cache=True)
        self.core = EngineCore(scheduler, runner, time.monotonic)
        self.link = Link(port=0)
        self.server = Server(self.link, KEY, load or (lambda progress: self.core), time.monotonic, **args)
        self.context = zmq.Context()
        self.result: list[object] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result.append(self.server.run())
        except Exception as error:
            self.result.append(error)

    def peer(self) -> Peer:
        return Peer(self.context, self.link.port)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it did not come to pass"
            time.sleep(0.005)

    def close(self) -> None:
        self.server.request_stop()
        self.thread.join(SECONDS)
        self.context.destroy(linger=0)
        assert not self.thread.is_alive(), "the server does not end"
        self.link.close()


@pytest.fixture
def run() -> Iterator[Callable[..., Running]]:
    servers: list[Running] = []

    def start(**args) -> Running:
        servers.append(Running(**{"heartbeat_seconds": 0.05, **args}))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_front_end_attaches_and_learns_of_the_model(run):
    attached = run().peer().attach(fingerprint="print")
    assert isinstance(attached, Attached)
    assert attached.info.num_blocks == 16
    assert attached.stats.num_free_blocks == 16


@pytest.mark.parametrize(
    ("args", "code"),
    [({"key": "wrong"}, "key"), ({"version": 99}, "version"), ({"fingerprint": "other"}, "fingerprint")],
)
def test_a_front_end_that_does_not_fit_is_refused(run, args, code):
    refused = run().peer().attach(**args)
    assert isinstance(refused, Refused)
    assert refused.code == code


def test_sequences_run_and_their_outputs_are_exact(run):
    peer = run().peer()
    peer.attach()
    submits = [submit(seq_id, 60, max_tokens=20, seed=seq_id) for seq_id in range(6)]
    peer.send(*submits)
    outputs = peer.outputs_until_finished(*range(6))
    for one in submits:
        want, reason = expected(one.prompt_token_ids, one.params)
        assert [token for output in outputs[one.seq_id] for token in output.token_ids] == want
        assert outputs[one.seq_id][-1].finish_reason == reason


def test_the_outputs_of_one_step_come_in_one_message(run):
    peer = run(before_step=lambda plan: time.sleep(0.01)).peer()
    peer.attach()
    peer.send(submit(1, max_tokens=20), submit(2, max_tokens=20))
    sizes = [len(peer.expect(StepOutputs).outputs) for _ in range(10)]
    assert sizes.count(2) >= 8


def test_nobody_speaks_without_having_attached(run):
    server = run()
    server.peer().send(submit(1), Shutdown(), Ping(1))
    peer = server.peer()
    peer.attach()
    peer.send(Ping(7))
    assert peer.expect(Heartbeat).stats.steps == 0
    assert not server.server.stopping


def test_malformed_messages_are_dropped(run):
    peer = run().peer()
    peer.attach()
    peer.socket.send(b"\xc1 nonsense")
    peer.socket.send(msgspec.msgpack.encode({"type": "submit", "seq_id": "x"}))
    peer.socket.send_multipart([b"two", b"frames"])
    peer.send(submit(1))
    assert peer.outputs_until_finished(1)[1][-1].finish_reason == "length"


def test_a_ping_is_answered_by_the_loop(run):
    peer = run().peer()
    peer.attach()
    peer.send(Ping(42))
    while (heartbeat := peer.expect(Heartbeat)).nonce != 42:
        pass
    assert heartbeat.stats.step_deadline == 0.0


def test_an_idle_engine_sends_heartbeats_by_itself(run):
    peer = run(heartbeat_seconds=0.02).peer()
    peer.attach()
    first, second = peer.expect(Heartbeat), peer.expect(Heartbeat)
    assert second.stats.last_progress > first.stats.last_progress


def test_the_deadline_of_a_first_step_is_known_while_it_runs(run):
    release = threading.Event()
    peer = run(before_step=lambda plan: release.wait(SECONDS)).peer()
    peer.attach()
    peer.send(submit(1))
    while peer.expect(Heartbeat).stats.step_deadline == 0.0:
        pass
    release.set()
    peer.outputs_until_finished(1)


def test_an_abort_is_answered_and_frees_the_blocks(run):
    server = run(before_step=lambda plan: time.sleep(0.002))
    peer = server.peer()
    peer.attach()
    peer.send(submit(1, 100, max_tokens=800))
    peer.expect(StepOutputs)
    peer.send(Abort([1, 5]))
    assert peer.outputs_until_finished(1)[1][-1].finish_reason == "cancelled"
    server.wait_for(lambda: server.core.scheduler.pool.num_used == 0)


def test_a_waiting_sequence_is_aborted_without_a_step(run):
    entered, release = threading.Event(), threading.Event()

    def hold(plan: StepPlan) -> None:
        entered.set()
        release.wait(SECONDS)

    peer = run(before_step=hold).peer()
    peer.attach()
    peer.send(submit(1, max_tokens=1))
    assert entered.wait(SECONDS)
    peer.send(submit(2), Abort([2]))
    time.sleep(0.3)  # both must be there when the loop looks again; the link delivers them behind our back
    release.set()
    outputs = peer.outputs_until_finished(1, 2)
    assert (outputs[2][0].token_ids, outputs[2][0].finish_reason) == ([], "cancelled")


def test_what_can_never_run_is_answered_without_a_step(run):
    peer = run(num_blocks=1).peer()
    peer.attach()
    peer.send(submit(1, 100))
    (output,) = peer.expect(StepOutputs).outputs
    assert output.finish_reason == "error"


def test_an_id_submitted_twice_does_not_disturb_the_first(run):
    peer = run().peer()
    peer.attach()
    one = submit(1, 30, max_tokens=20)
    peer.send(one, submit(1, 5, max_tokens=2))
    outputs = peer.outputs_until_finished(1)[1]
    assert [token for output in outputs for token in output.token_ids] == expected(one.prompt_token_ids, one.params)[0]


def test_a_higher_epoch_fences_the_older_front_end(run):
    server = run(before_step=lambda plan: time.sleep(0.002))
    old, new = server.peer(), server.peer()
    old.attach(epoch=1)
    old.send(submit(1, 100, max_tokens=800))
    old.expect(StepOutputs)
    assert isinstance(new.attach(epoch=2), Attached)
    assert old.expect(Refused).code == "epoch"
    one = submit(1, tokens(40, first=77), max_tokens=10)  # ids start anew with an epoch
    new.send(one)
    outputs = new.outputs_until_finished(1)[1]
    assert [token for output in outputs for token in output.token_ids] == expected(one.prompt_token_ids, one.params)[0]
    old.send(Abort([1]))
    assert old.expect(Refused).code == "epoch"


@pytest.mark.parametrize("epoch", [3, 2])
def test_an_equal_or_lower_epoch_is_refused(run, epoch):
    server = run()
    server.peer().attach(epoch=3)
    refused = server.peer().attach(epoch=epoch)
    assert isinstance(refused, Refused)
    assert refused.code == "epoch"


def test_attaching_twice_in_one_epoch_keeps_the_sequences(run):
    server = run(before_step=lambda plan: time.sleep(0.002))
    peer = server.peer()
    peer.attach()
    peer.send(submit(1, max_tokens=40))
    peer.expect(StepOutputs)
    peer.send(Attach(PROTOCOL_VERSION, KEY, 1))
    assert peer.outputs_until_finished(1)[1][-1].finish_reason == "length"


def test_a_failed_step_is_an_error_and_the_engine_goes_on(run):
    def fail_first(plan: StepPlan) -> None:
        if plan.step_id == 1:
            raise RunnerError("out of luck")

    peer = run(before_step=fail_first).peer()
    peer.attach()
    peer.send(submit(1))
    (output,) = peer.outputs_until_finished(1)[1]
    assert output.finish_reason == "error"
    assert "out of luck" not in output.error
    peer.send(submit(2))
    assert peer.outputs_until_finished(2)[2][-1].finish_reason == "length"


def test_an_unknown_failure_ends_the_engine_and_no_sequence(run):
    """Its front end has the tokens and replays them in the next engine: nobody gets an error that is not theirs."""

    def crash(plan: StepPlan) -> None:
        if len(plan.sequences) == 2:
            raise KeyError("bug")

    server = run(before_step=crash)
    peer = server.peer()
    peer.attach()
    peer.send(submit(1, max_tokens=900), submit(2, max_tokens=900))
    server.thread.join(SECONDS)
    assert isinstance(server.result[0], KeyError)
    while (message := peer.receive(0.5)) is not None:
        assert not any(output.finish_reason for output in getattr(message, "outputs", ()))
    assert server.core.runner.closed


def test_shutdown_cancels_and_ends(run):
    server = run(before_step=lambda plan: time.sleep(0.002))
    peer = server.peer()
    peer.attach()
    peer.send(submit(1, 100, max_tokens=800))
    peer.expect(StepOutputs)
    peer.send(Shutdown())
    assert peer.outputs_until_finished(1)[1][-1].finish_reason == "cancelled"
    server.thread.join(SECONDS)
    assert server.result == [0]
    assert server.core.runner.closed


def test_one_who_was_refused_for_the_fingerprint_may_end_the_engine(run):
    server = run()
    peer = server.peer()
    peer.attach(fingerprint="other")
    peer.send(Shutdown())
    server.thread.join(SECONDS)
    assert server.result == [0]


# ---- loading


def test_progress_is_told_while_the_model_loads(run):
    release = threading.Event()
    server = None

    def load(progress):
        progress("weights", 0.5)
        release.wait(SECONDS)
        return server.core

    server = run(load=load, heartbeat_seconds=0.02)
    peer, stranger = server.peer(), server.peer()
    stranger.send(Attach(PROTOCOL_VERSION, "wrong", 9))
    assert stranger.expect(Refused).code == "key"
    peer.send(Attach(PROTOCOL_VERSION, KEY, 1, "print"))
    while peer.expect(Loading) != Loading("weights", 0.5):
        pass
    release.set()
    assert isinstance(peer.expect(Attached), Attached)


def test_the_highest_epoch_that_waited_is_attached_after_the_load(run):
    release = threading.Event()
    server = None

    def load(progress):
        release.wait(SECONDS)
        return server.core

    server = run(load=load)
    new, old = server.peer(), server.peer()
    for peer, epoch in ((new, 2), (old, 1)):
        peer.send(Attach(PROTOCOL_VERSION, KEY, epoch))
        peer.expect(Loading)
    release.set()
    assert isinstance(new.expect(Attached), Attached)
    assert old.expect(Refused).code == "epoch"


def test_a_load_that_fails_is_told_and_raised(run):
    begin = threading.Event()

    def load(progress):
        begin.wait(SECONDS)
        raise ValueError("no config.json")

    server = run(load=load)
    peer = server.peer()
    peer.send(Attach(PROTOCOL_VERSION, KEY, 1))
    peer.expect(Loading)
    begin.set()
    refused = peer.expect(Refused)
    assert refused.code == "load"
    assert "no config.json" in refused.reason
    server.thread.join(SECONDS)
    assert isinstance(server.result[0], LoadFailed)


def test_a_load_may_be_cut_short(run):
    release = threading.Event()
    server = run(load=lambda progress: release.wait(SECONDS))
    peer = server.peer()
    peer.send(Attach(PROTOCOL_VERSION, KEY, 1), Shutdown())
    server.thread.join(SECONDS)
    release.set()
    assert server.result == [0]


# ---- losing the front end


def test_a_silent_front_end_loses_its_sequences_and_the_engine_ends_after_a_while(run):
    server = run(lost_seconds=0.1, linger_seconds=0.2, before_step=lambda plan: time.sleep(0.002))
    peer = server.peer()
    peer.attach()
    peer.send(submit(1, 100, max_tokens=900))
    server.wait_for(lambda: server.server.peers.attached is None)
    server.wait_for(lambda: server.core.scheduler.pool.num_used == 0)
    server.thread.join(SECONDS)
    assert server.result == [0]


def test_pings_keep_the_link(run):
    server = run(lost_seconds=0.2, linger_seconds=0.1)
    peer = server.peer()
    peer.attach()
    for nonce in range(12):
        time.sleep(0.05)
        peer.send(Ping(nonce))
    assert server.thread.is_alive()


def test_a_front_end_that_comes_back_attaches_with_a_higher_epoch(run):
    server = run(lost_seconds=0.05, linger_seconds=SECONDS)
    peer = server.peer()
    peer.attach(epoch=1)
    server.wait_for(lambda: server.server.peers.attached is None)
    peer.send(Ping(1))
    assert peer.expect(Refused).code == "detached"
    assert isinstance(peer.attach(epoch=2), Attached)


def test_under_node_the_engine_stays(run):
    server = run(lost_seconds=0.05, linger_seconds=0.05, managed_by_node=True, heartbeat_seconds=0.02)
    server.peer().attach()
    server.wait_for(lambda: server.server.peers.attached is None)
    time.sleep(0.3)
    assert server.thread.is_alive()


def test_an_engine_that_nobody_ever_asks_ends(run):
    server = run(linger_seconds=0.1, heartbeat_seconds=0.02)
    server.thread.join(SECONDS)
    assert server.result == [0]


def test_wrong_books_end_the_engine(run):
    server = run(heartbeat_seconds=0.02)
    peer = server.peer()
    peer.attach()
    peer.send(submit(1))
    peer.outputs_until_finished(1)
    server.core.scheduler.pool._free.pop()
    server.thread.join(SECONDS)
    assert isinstance(server.result[0], AssertionError)


def test_a_taken_port_is_an_error():
    first = Link(port=0)
    with pytest.raises(zmq.ZMQError):
        Link(port=first.port)
    first.close()
