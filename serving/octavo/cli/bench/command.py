"""The flags of `octavo bench` and the order of things: make the work, look at the server, warm up, run, show.

Exit codes: 0 all requests were answered, 1 some failed (they are counted by kind), 2 nothing was measured, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from octavo.cli.bench import show, target
from octavo.cli.bench.client import Address, Http
from octavo.cli.bench.drive import Plan, Run, drive, planned_tokens
from octavo.cli.bench.figures import summarize
from octavo.cli.bench.target import BenchError
from octavo.cli.bench.work import Item, Shape, WorkError, arrivals, random_items, read_dataset
from octavo.settings import SettingsError, with_overrides

DEFAULT_CONCURRENCY = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `octavo bench`."""
    parser.add_argument("url", nargs="?", metavar="URL", help="http(s)://host:port of any OpenAI-compatible server")
    parser.add_argument("--engine", action="store_true", help="no server: the engine in this process, with MODEL_DIR")
    parser.add_argument("--model-dir", metavar="DIR", help="with --engine: instead of MODEL_DIR")
    parser.add_argument("--api", choices=("completions", "chat", "native"), default="completions")
    parser.add_argument("--model", help="name to ask for; else the first one that the server lists")
    parser.add_argument("--api-key")
    parser.add_argument("--insecure", action="store_true", help="https: do not check the certificate")
    load = parser.add_argument_group("load")
    load.add_argument("--request-rate", type=positive, default=math.inf, metavar="R", help="a second, Poisson arrivals")
    load.add_argument(
        "--concurrency", type=count, metavar="N", help="most requests at once (16; with a rate: no bound)"
    )
    load.add_argument("--num-requests", type=count, metavar="N", help="100; with --dataset: all of it")
    load.add_argument("--warmup", type=natural, default=4, metavar="N", help="requests before that do not count (4)")
    load.add_argument("--timeout", type=positive, default=600.0, metavar="S", help="seconds of one request (600)")
    load.add_argument("--seed", type=int, default=0, help="of prompts, lengths and arrivals (0)")
    _add_work_arguments(parser.add_argument_group("what is asked"))
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    shown.add_argument("--details", action="store_true", help="with --json: every request's times too")
    shown.add_argument("--png", type=Path, metavar="FILE", help="a picture; needs matplotlib")
    shown.add_argument("--no-progress", action="store_true")


def _add_work_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset", type=Path, metavar="FILE.jsonl", help="prompt, messages, input_ids a line")
    group.add_argument("--input-len", type=count, default=256, metavar="N", help="tokens of a random prompt (256)")
    group.add_argument("--output-len", type=count, default=64, metavar="N", help="tokens to make (64)")
    group.add_argument("--range-ratio", type=share, default=0.0, metavar="R", help="lengths vary by this share (0)")
    group.add_argument("--prefix-len", type=natural, default=0, metavar="N", help="of the prompt that all share (0)")
    group.add_argument("--prompts", choices=("auto", "tokens", "words"), default="auto", help="of random prompts")
    group.add_argument("--token-range", type=span, default=(256, 4000), metavar="LOW:HIGH", help="ids (256:4000)")
    group.add_argument("--temperature", type=float, default=0.0, help="0, greedy; -1: the server's default")
    group.add_argument("--stop-at-eos", action="store_true", help="do not send ignore_eos")
    group.add_argument("--extra-body", type=json_object, default={}, metavar="JSON", help="more fields of each request")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; the exit code."""
    try:
        if bool(arguments.url) == arguments.engine:
            raise BenchError("give the URL of a server, or --engine")
        if arguments.png is not None and not show.can_draw():
            arguments.png = None
        return measure_engine(arguments) if arguments.engine else measure_server(arguments)
    except (BenchError, WorkError, SettingsError) as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


@dataclass
class Asked:
    """What the flags say of a run."""

    plan: Plan
    warmup: list[Item]
    open_loop: bool
    notes: list[str] = field(default_factory=list)


def asked_of(arguments: argparse.Namespace, *, words: bool) -> Asked:
    """WorkError if there is nothing to ask."""
    low, high = arguments.token_range
    shape = Shape(
        arguments.input_len,
        arguments.output_len,
        arguments.range_ratio,
        min(arguments.prefix_len, arguments.input_len - 1),
        words=words,
        token_range=(low, high),
    )
    if arguments.dataset is not None:
        rows = read_dataset(arguments.dataset, output_len=arguments.output_len)
        total = arguments.num_requests or len(rows)
        items = [rows[index % len(rows)] for index in range(total)]
    else:
        items = random_items(arguments.num_requests or 100, shape, seed=arguments.seed)
    open_loop = math.isfinite(arguments.request_rate)
    due = arrivals(len(items), arguments.request_rate, seed=arguments.seed)
    limit = arguments.concurrency or (None if open_loop else DEFAULT_CONCURRENCY)
    warmup = random_items(max(1, arguments.warmup), shape, seed=arguments.seed + 1_000_003)
    if arguments.dataset is not None:
        warmup = [items[index % len(items)] for index in range(len(warmup))]
    return Asked(Plan(items, due, limit, arguments.timeout), warmup, open_loop)


# ---- against a server


def measure_server(arguments: argparse.Namespace) -> int:
    try:
        address = Address.parse(arguments.url)
    except ValueError as error:
        raise BenchError(str(error)) from None
    words = arguments.prompts == "words" or (arguments.prompts == "auto" and arguments.api == "chat")
    asked, finished, result = asked_of(arguments, words=words), False, Run(0.0, [])
    try:
        asked, dialect = asyncio.run(serve(arguments, address, asked, result))
        finished = True
    except KeyboardInterrupt:
        if not result.outcomes:
            raise
        dialect = None
    config = {"url": str(address), "api": arguments.api, "model": dialect.model if dialect else arguments.model}
    code = report(arguments, asked, result, config=config)
    return code if finished else 130


async def serve(
    arguments: argparse.Namespace, address: Address, asked: Asked, result: Run
) -> tuple[Asked, target.Dialect]:
    """Look at the server, warm it up, run. BenchError where it does not answer one request as it should."""
    http = Http(address, api_key=arguments.api_key, insecure=arguments.insecure)
    dialect = target.Dialect(
        arguments.api,
        model=arguments.model,
        temperature=None if arguments.temperature < 0 else arguments.temperature,
        seed=arguments.seed,
        ignore_eos=not arguments.stop_at_eos,
        extra=arguments.extra_body,
    )
    dialect.model = await target.choose_model(http, dialect)
    may_use_words = arguments.prompts == "auto" and arguments.api != "chat" and arguments.dataset is None
    found = await target.probe(http, dialect, asked.warmup[0], timeout=arguments.timeout, may_use_words=may_use_words)
    if found.use_words:
        asked = asked_of(arguments, words=True)
    asked.notes += found.notes
    shown = sys.stderr.isatty() and not arguments.no_progress
    if arguments.warmup:
        plan = Plan(asked.warmup, [0.0] * len(asked.warmup), asked.plan.limit, arguments.timeout)
        with show.bar("warm-up", len(plan.items), shown=shown) as on_done:
            await drive(http, dialect, plan, Run(0.0, []), on_done)
    with show.bar("requests", len(asked.plan.items), shown=shown) as on_done:
        await drive(http, dialect, asked.plan, result, on_done)
    http.close()
    return asked, dialect


# ---- in this process


def measure_engine(arguments: argparse.Namespace) -> int:
    overrides = {} if arguments.model_dir is None else {"model_dir": arguments.model_dir}
    settings = with_overrides(overrides)
    asked = asked_of(arguments, words=arguments.prompts == "words")
    from octavo.cli.bench import in_process

    began, result, finished = time.monotonic(), Run(0.0, []), False
    shown = sys.stderr.isatty() and not arguments.no_progress
    with in_process.load(settings) as core:
        config = {"engine": settings.model_dir, "load_seconds": round(time.monotonic() - began, 3)}
        if (asked.plan.limit or len(asked.plan.items)) > settings.batch_size:
            asked.notes.append(f"at most BATCH_SIZE ({settings.batch_size}) requests run at once; the others wait")
        driver = in_process.EngineDriver(core, temperature=arguments.temperature, seed=arguments.seed)
        encode = in_process.encoder(settings)
        try:
            if arguments.warmup:
                plan = Plan(asked.warmup, [0.0] * len(asked.warmup), asked.plan.limit, arguments.timeout)
                driver.drive(plan, Run(0.0, []), encode, lambda outcome: None)
            with show.bar("requests", len(asked.plan.items), shown=shown) as on_done:
                driver.drive(asked.plan, result, encode, on_done)
            finished = True
        except KeyboardInterrupt:
            if not result.outcomes:
                raise
    code = report(arguments, asked, result, config=config)
    return code if finished else 130


# ---- what came of it


def report(arguments: argparse.Namespace, asked: Asked, result: Run, *, config: Mapping[str, object]) -> int:
    """Print and write everything; 1 if a request failed."""
    summary = summarize(
        result.outcomes,
        began=result.began,
        open_loop=asked.open_loop,
        cpu_seconds=None if arguments.engine else result.cpu_seconds,
    )
    notes = asked.notes + show.notes_of(summary, open_loop=asked.open_loop, in_process=arguments.engine)
    good = [one for one in result.outcomes if one.error is None]
    if arguments.dataset is None and any(item.token_ids is None for item in asked.plan.items):
        words = sum(planned_tokens(asked.plan.items[one.index]) for one in good)
        notes += show.note_of_words(words, sum(one.input_tokens for one in good))
    if len(result.outcomes) < len(asked.plan.items):
        notes.append(f"stopped after {len(result.outcomes)} of {len(asked.plan.items)} requests")
    what = config.get("url") or config.get("engine")
    rate = f"{arguments.request_rate:g} requests/s" if asked.open_loop else f"{asked.plan.limit} at once"
    title = f"{what}: {len(asked.plan.items)} requests, {rate}"
    print(show.table(summary, title=title, notes=notes))
    if arguments.json is not None:
        full = {**_header(arguments, config), "notes": notes, **summary}
        if arguments.details:
            full["rows"] = show.rows_of(result.outcomes, result.began)
        show.write_json(arguments.json, full)
    if arguments.png is not None:
        show.draw(arguments.png, result.outcomes, began=result.began, title=title)
    return 1 if summary["failed"] else 0


def _header(arguments: argparse.Namespace, config: Mapping[str, object]) -> dict[str, object]:
    hidden = ("api_key", "json", "png", "url", "engine", "details", "no_progress", "model")
    options = {name: value for name, value in vars(arguments).items() if name not in hidden}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    plain["request_rate"] = arguments.request_rate if math.isfinite(arguments.request_rate) else None
    machine = f"{platform.machine()}, {platform.system()} {platform.release()}"
    return {"date": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": machine, **config, "options": plain}


# ---- values of flags


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0 to below 1")
    return value


def span(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise argparse.ArgumentTypeError(f"{text}: must be LOW:HIGH, whole numbers")
    return int(low), int(high)


def json_object(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
