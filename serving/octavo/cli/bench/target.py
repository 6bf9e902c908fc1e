"""What a server is and takes, found out before the clock starts: its model, and whether one request goes well.

A server that refuses `ignore_eos`, `stream_options` or token ids is asked without them, and a note says so.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace

from octavo.cli.bench.client import Cut, Http, Unreachable
from octavo.cli.bench.dialects import Dialect, what_it_said
from octavo.cli.bench.drive import ask
from octavo.cli.bench.figures import Outcome
from octavo.cli.bench.work import WORDS, Item

__all__ = ["BenchError", "Dialect", "Found", "choose_model", "probe"]

NO_EOS = "the server does not take ignore_eos: answers end where the model ends them"
NO_USAGE = "the server does not take stream_options"
NO_IDS = "the server does not take token ids: prompts are words, about one token each"
PROBE_TOKENS = 4


class BenchError(Exception):
    """Nothing can be measured; one sentence."""


@dataclass
class Found:
    """What the first request taught."""

    notes: list[str] = field(default_factory=list)
    use_words: bool = False


async def list_models(http: Http) -> list[str] | None:
    """Names that the server serves; None if it does not tell. BenchError if it cannot be reached or refuses the key."""
    try:
        answer = await http.get("/v1/models")
    except (Unreachable, Cut) as error:
        raise BenchError(f"{_unreachable(http, error)}. Is the server running?") from None
    if answer.status in (401, 403):
        raise BenchError(_key_refused(answer.status, what_it_said(answer.body)))
    try:
        names = [str(entry["id"]) for entry in json.loads(answer.body)["data"]]
    except (ValueError, TypeError, KeyError):
        return None
    return names or None


async def choose_model(http: Http, dialect: Dialect) -> str | None:
    """The name to ask for. BenchError if none is given and the server does not list any."""
    names = await list_models(http)
    if dialect.model is not None:
        return dialect.model
    if dialect.api == "native":
        return None
    if names is None:
        raise BenchError(f"{http.address}/v1/models lists no model: give its name with --model")
    return names[0]


async def probe(http: Http, dialect: Dialect, item: Item, *, timeout: float, may_use_words: bool) -> Found:
    """One short request, again without what the server refuses. BenchError with what it said."""
    found, before = Found(), ""
    item = replace(item, output_len=min(item.output_len, PROBE_TOKENS))
    while True:
        outcome = Outcome(0, due=time.monotonic())
        await ask(http, dialect, dialect.body(item), outcome, timeout=timeout)
        if outcome.error is None or (outcome.error == "no tokens" and not dialect.ignore_eos):
            return found
        if outcome.error not in ("HTTP 400", "HTTP 422", "HTTP 500"):
            raise BenchError(await explain(http, dialect, outcome))
        if dialect.ignore_eos and "ignore_eos" in outcome.detail:
            dialect.ignore_eos = False
            found.notes.append(NO_EOS)
        elif dialect.usage and "stream_options" in outcome.detail:
            dialect.usage = False
            found.notes.append(NO_USAGE)
        elif may_use_words and item.token_ids is not None:
            item = Item(item.output_len, text=" ".join(WORDS[one % len(WORDS)] for one in item.token_ids))
            found.use_words = True
            found.notes.append(NO_IDS)
            before = f"{outcome.error}: {outcome.detail}"  # it may not be the ids that were wrong
        elif before:
            raise BenchError(f"the first request failed: {before}; with words for token ids: {outcome.detail}")
        else:
            raise BenchError(await explain(http, dialect, outcome))


async def explain(http: Http, dialect: Dialect, outcome: Outcome) -> str:
    """One sentence about a first request that failed."""
    status = (outcome.error or "").removeprefix("HTTP ")
    if status in ("401", "403"):
        return _key_refused(int(status), outcome.detail)
    if status == "404":
        names = await list_models(http)
        listed = f"; it serves {', '.join(names)}" if names else ""
        return f"404 for model {dialect.model!r} at {http.address}{dialect.path}: {outcome.detail}{listed}"
    return f"the first request failed: {outcome.error}: {outcome.detail}"


def _key_refused(status: int, said: str) -> str:
    return f"the server refused the key ({status}: {said}): give one with --api-key"


def _unreachable(http: Http, error: Exception) -> str:
    text = str(error)
    return text if text.startswith("cannot reach") else f"{http.address} does not speak HTTP: {text}"
