"""One log line per finished request, without its text; ids are sanitised. Called by the delivery and intake threads."""

from __future__ import annotations

import logging

from octavo.frontend.state import RequestState
from octavo.protocol.errors import OctavoError

log = logging.getLogger("octavo.frontend")


def clean(identifier: str | None) -> str:
    """An id as it may stand in a log: printable, without spaces, at most 64 characters."""
    shown = "".join(c if c.isprintable() and not c.isspace() else f"\\x{ord(c):02x}" for c in (identifier or "-")[:64])
    return shown + ("…" if identifier and len(identifier) > 64 else "")


def finished(state: RequestState, *, error: OctavoError | None, now: float) -> None:
    """The request's one line."""
    outputs = [sequence.output for sequence in state.sequences]
    reasons = ",".join(sequence.finish.reason if sequence.finish else "-" for sequence in state.sequences)
    first = min((sequence.first_sent_at for sequence in state.sequences if sequence.first_sent_at), default=0.0)
    log.info(
        "request %s %s prompt=%d output=%d ttft=%.3f e2e=%.3f attempt=%d",
        clean(state.req_id),
        reasons if error is None else f"error={error.status}",
        len(state.prompt_ids),
        sum(output.num_sampled for output in outputs),
        first - state.arrival if first else 0.0,
        now - state.arrival,
        state.request.attempt,
    )


def refused(req_id: str | None, error: OctavoError) -> None:
    """A request that was never accepted. What is wrong with its values may quote them: for DEBUG only."""
    said = clean_message(error.message)
    log.debug("request %s: %s", clean(req_id), said)
    if error.status == 400:
        said = f"field {clean(error.field)}"
    log.info("request %s refused %d: %s", clean(req_id), error.status, said)


def clean_message(message: str) -> str:
    return "".join(c if c.isprintable() else " " for c in message[:200])
