"""Who is in: every accepted request, its sequences, and whether the engine is there to run them.

One lock guards all of it; no method blocks or sends under it. The intake thread admits, the link thread brings the
engine's events, the delivery thread takes and releases, the sweeper and ops post verdicts. `RequestState` says which
of its fields the lock guards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from octavo.frontend.engine_view import EngineView, Phase
from octavo.frontend.key_usage import KeyUsage
from octavo.frontend.quarantine import Quarantine
from octavo.frontend.queue_bound import QueueBound
from octavo.frontend.state import RequestState, SequenceState
from octavo.protocol.errors import Conflict, InternalError, OctavoError, QueueFull, Unavailable
from octavo.protocol.messages import Abort, EngineInfo, EngineStats, SequenceOutput, StepOutputs, Submit, ToEngine
from octavo.protocol.native import Request

HOLD_SECONDS = 10.0  # how long new requests are taken in while the engine is gone
NODE = "node"  # the owner of node's own proving requests: they show that tokens come, not that users are served


Taken = tuple[RequestState, list[tuple[SequenceState, SequenceOutput]], OctavoError | None]


class Registry:
    """See the module. `send` puts a message into the link's outbox, `wake` requests into the delivery queue."""

    def __init__(self, *, batch_size: int, max_waiting: int, clock: Callable[[], float],
                 send: Callable[[ToEngine], None], wake: Callable[[list[RequestState]], None],
                 usage: KeyUsage | None = None) -> None:
        self._batch_size = batch_size
        self._bound = QueueBound(batch_size=batch_size, max_waiting=max_waiting)
        self._clock = clock
        self._send = send
        self._wake = wake
        self._lock = threading.Lock()
        self._by_req_id: dict[str, RequestState] = {}
        self._requests: dict[int, RequestState] = {}  # by id(): superseded ones too, until they end
        self._by_seq_id: dict[int, SequenceState] = {}  # sequences that the engine has not ended
        self._owner: dict[int, RequestState] = {}  # seq_id to request
        self._next_seq_id = 1
        self._quarantine = Quarantine()
        self._woken: list[RequestState] | None = None  # those of the step that is being taken in
        self._holding = False  # some sequences wait for the quarantine to end
        self._draining = ""  # why admission is closed
        self._closed = False  # also to those who come back
        self._usage = usage or KeyUsage()
        self.num_accepted = 0
        self.num_finished = 0  # ended as they should, without node's own
        self.engine = EngineView()

    # ---- intake

    def check_open(self, req_id: str, request: Request) -> None:
        """Raise what `admit` would raise: before the prompt is tokenised."""
        with self._lock:
            self._check(req_id, request, num_sequences=request.n)

    def admit(self, state: RequestState) -> None:
        """Accept and submit. Raises Conflict, QueueFull, Unavailable."""
        request = state.request
        with self._lock:
            open_sequences = [sequence for sequence in state.sequences if sequence.finish is None]
            self._check(state.req_id, request, num_sequences=len(open_sequences))
            older = self._by_req_id.get(state.req_id)
            if older is not None:
                self._post(older, Conflict(f"superseded by attempt {request.attempt} of the same req_id"))
            self._by_req_id[state.req_id] = state
            self._requests[id(state)] = state
            self.num_accepted += 1
            if not request.resume_inside:  # it was counted when it came
                used = self._usage.of(request.key)
                used.requests += 1
                used.prompt_tokens += len(state.prompt_ids)
            for sequence in open_sequences:
                self._enter(state, sequence)
            if len(open_sequences) < len(state.sequences):
                self._queue(state)

    def _check(self, req_id: str, request: Request, *, num_sequences: int) -> None:
        self._check_phase(request)
        older = self._by_req_id.get(req_id)
        if older is not None and (request.attempt <= older.request.attempt or request.key != older.request.key):
            raise Conflict(f"req_id ({_shown(req_id)}) is in flight", field="req_id")
        exempt = request.resume_inside or older is not None  # who supersedes takes no new place
        client, now = _client(request), self._clock()
        if not exempt and not self._bound.admits(client, num_sequences, told=self._told(), now=now):
            self._bound.refused(client, num_sequences, now=now)
            self._usage.of(request.key).refused += 1
            waiting, most = self._num_waiting(), self._bound.max_waiting
            raise QueueFull(f"{waiting} requests are waiting (MAX_CACHED_TASK_NUM {most})")

    def _check_phase(self, request: Request) -> None:
        engine = self.engine
        if self._closed or (self._draining and not request.resume_inside):  # that one was accepted long ago
            raise Unavailable(self._draining)
        if engine.phase is Phase.LOADING:
            raise Unavailable(f"the model is loading: {engine.stage} ({engine.fraction:.0%})")
        held_too_long = engine.phase is Phase.DOWN and self._clock() - engine.changed_at > HOLD_SECONDS
        if engine.phase is Phase.CLOSED or held_too_long:
            raise Unavailable(f"the engine is down: {engine.reason}")

    def _enter(self, state: RequestState, sequence: SequenceState) -> None:
        """Name a sequence and, if there is an engine for it, submit it."""
        sequence.seq_id, self._next_seq_id = self._next_seq_id, self._next_seq_id + 1
        self._by_seq_id[sequence.seq_id] = sequence
        self._owner[sequence.seq_id] = state
        self._bound.enter(_client(state.request))
        sequence.in_engine = False
        if self._quarantine:
            self._holding = True
        else:
            self._submit(sequence)

    def _submit(self, sequence: SequenceState) -> None:
        if self.engine.phase is Phase.READY and not sequence.in_engine:
            state = self._owner[sequence.seq_id]
            sequence.in_engine, sequence.num_at_submit = True, len(sequence.received)
            request = state.request
            self._send(Submit(sequence.seq_id, state.prompt_ids, sequence.params, list(sequence.received),
                              request.priority, _client(request)))

    def _submit_held(self) -> None:
        """After a change of the quarantine: the suspect whose turn it is, or all who had to wait for suspects."""
        if not self._holding:
            return
        self._holding = bool(self._quarantine)
        held = [self._quarantine.current] if self._quarantine else list(self._by_seq_id.values())
        for sequence in held:
            self._submit(sequence)

    def _num_waiting(self) -> int:
        return self._bound.num_waiting(self._told())

    def _told(self) -> int:
        return self.engine.stats.num_waiting if self.engine.stats is not None else 0

    # ---- link

    def on_loading(self, stage: str, fraction: float) -> None:
        with self._lock:
            self.engine.stage, self.engine.fraction = stage, fraction
            self.engine.heard_at = self._clock()

    def on_attached(self, info: EngineInfo, stats: EngineStats, epoch: int, *, same_engine: bool = False) -> None:
        """An engine is there: give it every sequence in flight, with the tokens it has.

        `same_engine`: it did not die, only the link to it was lost.
        """
        with self._lock:
            known, engine = self.engine.info, self.engine
            engine.phase, engine.reason, engine.info, engine.stats, engine.epoch = Phase.READY, "", info, stats, epoch
            engine.stage, engine.fraction = "ready", 1.0
            engine.heard_at = engine.changed_at = engine.attached_at = self._clock()
            same_model = known is None or known.fingerprint == info.fingerprint
            alive = sorted(self._by_seq_id.items())
            self._by_seq_id.clear()
            owners, self._owner = self._owner, {}
            self._bound.clear()
            if not same_engine:
                self._quarantine.count_death(self._were_running([sequence for _, sequence in alive]))
            self._quarantine.begin([sequence for _, sequence in alive])
            for seq_id, sequence in alive:
                sequence.started = sequence.in_engine = False
                self._replay(owners[seq_id], sequence, same_model=same_model)
            if self._quarantine:
                self._submit_held()

    def _were_running(self, sequences: list[SequenceState]) -> list[SequenceState]:
        """Those that ran in the engine that died, or likely so."""
        submitted = [sequence for sequence in sequences if sequence.in_engine]
        return [sequence for place, sequence in enumerate(submitted) if sequence.started or place < self._batch_size]

    def _replay(self, state: RequestState, sequence: SequenceState, *, same_model: bool) -> None:
        """Give a sequence that no engine has to the engine, with the tokens it has; or end its request."""
        if not same_model:
            self._quarantine.discard(sequence)
            self._post(state, Unavailable("the engine came back with another model"))
        elif self._quarantine.is_guilty(sequence):
            self._post(state, InternalError("the engine failed again and again on this request"))
        else:
            self._enter(state, sequence)

    def on_detached(self, reason: str, *, for_good: bool = False) -> None:
        """The engine is gone. Requests are held for the next one, or ended if there will be none."""
        with self._lock:
            if self.engine.phase is Phase.CLOSED:
                return
            if self.engine.phase is not Phase.LOADING or for_good:
                if self.engine.phase is not Phase.DOWN:
                    self.engine.changed_at = self._clock()
                self.engine.phase = Phase.CLOSED if for_good else Phase.DOWN
            self.engine.reason = self.engine.stage = reason
            self.engine.fraction = 0.0
            if for_good:
                for state in self._requests.values():
                    self._post(state, Unavailable(f"the engine is down: {reason}"))

    def on_stats(self, stats: EngineStats) -> None:
        with self._lock:
            self.engine.stats = stats
            self.engine.heard_at = self._clock()

    def on_step(self, step: StepOutputs) -> None:
        """Hand each output to its request; outputs of sequences that ended here already are dropped."""
        with self._lock:
            self.engine.stats = step.stats
            self.engine.heard_at = self._clock()
            woken = self._woken = []  # one word to the delivery thread for all of them
            for output in step.outputs:
                sequence = self._by_seq_id.get(output.seq_id)
                if sequence is not None:
                    self._take_in(sequence, output)
            self._woken = None
            if woken:
                self._wake(woken)

    def _take_in(self, sequence: SequenceState, output: SequenceOutput) -> None:
        state = self._owner[output.seq_id]
        if output.finish_reason == "cancelled":  # by nobody here: the engine is ending, or took us for gone
            self._forget(sequence)
            sequence.ended = sequence.started = False
            self._replay(state, sequence, same_model=True)
            return
        if output.token_ids:
            sequence.received += output.token_ids
            if not sequence.started:
                sequence.started = True
                self._bound.start(_client(state.request))
        if output.finish_reason is not None:
            self._forget(sequence)
            self._submit_held()
        elif self._quarantine.clears(sequence):
            self._hold(state, sequence)
        state.pending.append((sequence, output))
        self._queue(state)

    def _hold(self, state: RequestState, sequence: SequenceState) -> None:
        """A suspect proved harmless. The next one must run alone too, so this one waits."""
        if self._quarantine:
            self._send(Abort([sequence.seq_id]))
            self._forget(sequence)
            sequence.ended = sequence.started = False
            self._enter(state, sequence)
        self._submit_held()

    # ---- delivery

    def take(self, states: list[RequestState]) -> list[Taken]:
        """Of each request all outputs that came since the last time, and the verdict if there is one."""
        taken = []
        with self._lock:
            for state in states:
                taken.append((state, state.pending, state.verdict))
                state.pending, state.queued = [], False
        return taken

    def abandon(self, sequence: SequenceState) -> None:
        """A stop string ended it: the engine need not go on."""
        with self._lock:
            self._abort([sequence])

    def release(self, state: RequestState, *, finished: bool = False) -> None:
        """The request has ended (`finished`: as it should): its req_id is free, its sequences are aborted."""
        with self._lock:
            if not state.done:
                self._usage.of(state.request.key).generation_tokens += _num_generated(state)
            state.done = True
            self.num_finished += finished and state.request.owner != NODE
            if self._by_req_id.get(state.req_id) is state:
                del self._by_req_id[state.req_id]
            self._requests.pop(id(state), None)
            self._abort(state.sequences)

    def _abort(self, sequences: list[SequenceState]) -> None:
        alive = [sequence for sequence in sequences if sequence.seq_id in self._by_seq_id and not sequence.ended]
        for sequence in alive:
            self._forget(sequence)
        if alive and self.engine.phase is Phase.READY:
            self._send(Abort([sequence.seq_id for sequence in alive]))
        self._submit_held()

    def _forget(self, sequence: SequenceState) -> None:
        sequence.ended = True
        self._quarantine.discard(sequence)
        state = self._owner.pop(sequence.seq_id)
        del self._by_seq_id[sequence.seq_id]
        self._bound.leave(_client(state.request), started=sequence.started)

    # ---- sweeper and ops

    def post(self, state: RequestState, verdict: OctavoError) -> None:
        """End a request from outside; the first verdict stays."""
        with self._lock:
            self._post(state, verdict)

    def _post(self, state: RequestState, verdict: OctavoError) -> None:
        if not state.done:
            state.verdict = state.verdict or verdict
            self._queue(state)

    def _queue(self, state: RequestState) -> None:
        if not state.queued:
            state.queued = True
            if self._woken is not None:
                self._woken.append(state)
            else:
                self._wake([state])

    def find(self, req_id: str) -> RequestState | None:
        with self._lock:
            return self._by_req_id.get(req_id)

    def all_requests(self) -> list[RequestState]:
        with self._lock:
            return list(self._requests.values())

    def drain(self, reason: str = "the server is draining") -> None:
        """Close admission for good, but to requests that were accepted before and come back."""
        with self._lock:
            self._draining = self._draining or reason

    def end_all(self, reason: str) -> None:
        """Close admission to everyone and end every request with 503."""
        with self._lock:
            self._draining, self._closed = reason, True
            for state in self._requests.values():
                self._post(state, Unavailable(reason))

    @property
    def draining(self) -> bool:
        return bool(self._draining)

    def counts(self) -> tuple[int, int]:
        """Sequences (running, waiting) as seen from here."""
        with self._lock:
            waiting = self._num_waiting()
            return len(self._by_seq_id) - waiting, waiting

    def num_unread(self) -> int:
        """Requests that the engine is done with and whose last message has not left: their readers are behind."""
        with self._lock:
            return sum(state.generated for state in self._requests.values())


def _client(request: Request) -> str:
    """Whose turn it takes and whose share of the queue."""
    return request.tenant or request.key or ""


def _shown(req_id: str) -> str:
    return req_id if len(req_id) <= 64 else req_id[:64] + "…"


def _num_generated(state: RequestState) -> int:
    """Tokens of all choices that came from the engine, without those that a resumed request brought."""
    brought = sum(map(len, state.request.generated_token_ids))
    return max(0, sum(len(sequence.received) for sequence in state.sequences) - brought)
