"""What one request measured and the arithmetic over all of them. Pure functions of times; no clock, no sockets.

Times are seconds of one monotonic clock. A failed request counts in `errors`, never in a latency or a throughput.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Outcome:
    """One request: when it was due, sent and answered, and what came of it."""

    index: int
    due: float
    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of messages with at least one token
    ended: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    counted: str = "chunks"  # usage: by the server; ids: token ids in the messages; chunks: messages
    error: str | None = None  # the kind of failure
    detail: str = ""  # what the server or the system said

    @property
    def ttft(self) -> float:
        """From sending to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:])]

    @property
    def e2e(self) -> float:
        return self.ended - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean seconds of an output token after the first; None with one token."""
        if self.output_tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    def fail(self, kind: str, detail: str, *, now: float) -> None:
        self.error, self.detail, self.ended = kind, detail, now


def percentile(values: Sequence[float], share: float) -> float:
    """Of any values, linear between the two nearest, as numpy's default. ValueError if there are none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * share / 100
    low = int(position)
    if low + 1 == len(ordered):
        return ordered[low]
    return ordered[low] + (ordered[low + 1] - ordered[low]) * (position - low)


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and extremes in milliseconds; None without values."""
    if not seconds:
        return None
    out = {"mean_ms": sum(seconds) / len(seconds) * 1e3}
    out |= {f"p{share}_ms": percentile(seconds, share) * 1e3 for share in PERCENTILES}
    return out | {"max_ms": max(seconds) * 1e3}


def summarize(
    outcomes: Sequence[Outcome], *, began: float, open_loop: bool = False, cpu_seconds: float | None = None
) -> dict[str, object]:
    """All figures of a run that began at `began` and ends with its last answer. With a rate, also how late it sent."""
    good = [one for one in outcomes if one.error is None]
    seconds = max((one.ended for one in outcomes), default=began) - began
    return {
        "requests": len(outcomes),
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "errors": errors(outcomes),
        "seconds": seconds,
        "input_tokens": sum(one.input_tokens for one in good),
        "output_tokens": sum(one.output_tokens for one in good),
        **rates(good, seconds),
        "tokens_counted_by": dict(Counter(one.counted for one in good)),
        "tokens_per_message": _tokens_per_message(good),
        "most_at_once": most_at_once(outcomes),
        "ttft": spread([one.ttft for one in good if one.arrivals]),
        "itl": spread([gap for one in good for gap in one.gaps]),
        "tpot": spread([value for one in good if (value := one.tpot) is not None]),
        "e2e": spread([one.e2e for one in good]),
        "sent_late": spread([one.sent - one.due for one in outcomes]) if open_loop else None,
        "generator_cpu_share": cpu_seconds / seconds if cpu_seconds is not None and seconds > 0 else None,
    }


def rates(good: Sequence[Outcome], seconds: float) -> dict[str, float]:
    """Per second of the whole run."""
    if seconds <= 0:
        return {"requests_per_s": 0.0, "output_tok_per_s": 0.0, "total_tok_per_s": 0.0}
    output = sum(one.output_tokens for one in good)
    total = output + sum(one.input_tokens for one in good)
    return {
        "requests_per_s": len(good) / seconds,
        "output_tok_per_s": output / seconds,
        "total_tok_per_s": total / seconds,
    }


def errors(outcomes: Sequence[Outcome]) -> dict[str, dict[str, object]]:
    """Failures by kind: how many, and what the first one said."""
    found: dict[str, dict[str, object]] = {}
    for one in outcomes:
        if one.error is not None:
            entry = found.setdefault(one.error, {"count": 0, "first": one.detail})
            entry["count"] = int(str(entry["count"])) + 1
    return found


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """The largest number of requests in flight at one time."""
    changes = sorted([(one.ended, -1) for one in outcomes] + [(one.sent, 1) for one in outcomes])
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


def _tokens_per_message(good: Sequence[Outcome]) -> float | None:
    messages = sum(len(one.arrivals) for one in good)
    return sum(one.output_tokens for one in good) / messages if messages else None
