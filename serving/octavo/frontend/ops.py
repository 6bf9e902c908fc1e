"""Ops: questions that are no generation, each with one answer. info, metrics, drain and abort answer in every state.

Those four run on the caller's thread; tokenize and detokenize on the intake thread. Holds no state of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from octavo.frontend.admission import Registry
from octavo.frontend.engine_view import Phase
from octavo.frontend.lowering import check_range, make_prompt
from octavo.frontend.metrics import Page
from octavo.frontend.sink import Sink
from octavo.frontend.state import TokenizerSlot
from octavo.protocol.errors import Cancelled, InvalidRequest
from octavo.protocol.fields import token_ids as token_ids_kind
from octavo.protocol.native import MAX_TOKENS, parse_request
from octavo.settings import Settings
from octavo.text.tokenizer import Tokenizer

MAX_REASON = 1000
QUICK = ("info", "metrics", "drain", "abort")
_TOKEN_IDS = token_ids_kind(MAX_TOKENS)


class Ops:
    """Answers ops with what registry, metrics and tokenizer know."""

    def __init__(self, settings: Settings, *, registry: Registry, page: Page, slot: TokenizerSlot,
                 clock: Callable[[], float]) -> None:
        self._settings = settings
        self._registry = registry
        self._page = page
        self._slot = slot
        self._clock = clock

    def answer(self, body: Mapping[str, Any], req_id: str | None, sink: Sink) -> None:
        """Run one op and send its answer. Raises OctavoError, SinkClosed."""
        name = body["op"]
        runs: dict[str, Callable[[Mapping[str, Any], str | None], dict[str, Any]]] = {
            "info": lambda body, req_id: self.info(),
            "metrics": lambda body, req_id: {"text": self._page.text()},
            "drain": self._drain,
            "abort": self._abort,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
        }
        if not isinstance(name, str) or name not in runs:
            raise InvalidRequest(f"op must be one of {', '.join(runs)}", field="op")
        answer = runs[name](body, req_id)
        if req_id is not None:
            answer.setdefault("req_id", req_id)
        sink.send(msgspec.json.encode(answer), True)

    def info(self) -> dict[str, Any]:
        """The state of the front end and what it knows of the engine."""
        registry, settings = self._registry, self._settings
        engine = registry.engine
        running, waiting = registry.counts()
        state = self._state()
        limits = {"max_seq_len": settings.max_seq_len, "max_dec_len": settings.max_dec_len,
                  "max_queue": settings.max_cached_task_num, "batch_size": settings.batch_size}
        tokenizer = self._slot.tokenizer
        return {
            "state": state,
            "reason": self._slot.failure or engine.reason,
            "progress": {"stage": engine.stage, "fraction": engine.fraction},
            "model": None if engine.info is None else msgspec.to_builtins(engine.info),
            "engine": None if engine.stats is None else msgspec.structs.asdict(engine.stats),
            "engine_age": self._clock() - engine.heard_at if engine.heard_at else None,
            "engine_times": {"heard_at": engine.heard_at, "attached_at": engine.attached_at},
            "limits": limits,
            "frontend": {"pid": os.getpid(), "running": running, "waiting": waiting, "unread": registry.num_unread(),
                         "accepted": registry.num_accepted, "finished": registry.num_finished,
                         "epoch": engine.epoch, "failure": self._slot.failure},
            "defaults": tokenizer.defaults if tokenizer is not None else {},
        }

    def _state(self) -> str:
        phase = self._registry.engine.phase
        if self._registry.draining:
            return "draining"
        if self._slot.failure is not None or phase in (Phase.DOWN, Phase.CLOSED):
            return "down"
        return "ready" if phase is Phase.READY and self._slot.tokenizer is not None else "loading"

    def _drain(self, body: Mapping[str, Any], req_id: str | None) -> dict[str, Any]:
        """Close admission; with `end` also end what runs, with 503 and the `reason`."""
        reason = body.get("reason")
        reason = reason[:MAX_REASON] if isinstance(reason, str) and reason else "the server is draining"
        if body.get("end") is True:
            self._registry.end_all(reason)
        else:
            self._registry.drain(reason)
        running, waiting = self._registry.counts()
        return {"state": "draining", "running": running, "waiting": waiting}

    def _abort(self, body: Mapping[str, Any], req_id: str | None) -> dict[str, Any]:
        if req_id is None:
            raise InvalidRequest("req_id is needed", field="req_id")
        state = self._registry.find(req_id)
        if state is not None and any(
            body.get(name) not in (None, getattr(state.request, name)) for name in ("owner", "key")
        ):
            state = None  # the sender's own request is gone or was refused; this one is another's
        if state is not None:
            self._registry.post(state, Cancelled("the request was aborted"))
        return {"req_id": req_id, "aborted": state is not None}

    def _tokenize(self, body: Mapping[str, Any], req_id: str | None) -> dict[str, Any]:
        tokenizer = self._slot.get()
        add = body.get("add_special_tokens", True)
        if not isinstance(add, bool):
            raise InvalidRequest("add_special_tokens must be true or false", field="add_special_tokens")
        request = parse_request({key: value for key, value in body.items() if key != "req_id"})
        if request.text is not None:
            ids = tokenizer.encode(request.text, add_special_tokens=add)
        else:
            ids = make_prompt(request, tokenizer).token_ids
        return {"tokens": ids, "token_strs": tokenizer.token_strings(ids), "count": len(ids),
                "max_model_len": self._max_model_len()}

    def _max_model_len(self) -> int:
        info = self._registry.engine.info
        return info.context_length if info is not None else self._settings.max_seq_len

    def _detokenize(self, body: Mapping[str, Any], req_id: str | None) -> dict[str, Any]:
        tokenizer: Tokenizer = self._slot.get()
        ids = _TOKEN_IDS.parse("tokens", body.get("tokens"))
        info = self._registry.engine.info
        if info is not None:
            check_range("tokens", ids, info.vocab_size)
        return {"text": tokenizer.decode(ids)}
