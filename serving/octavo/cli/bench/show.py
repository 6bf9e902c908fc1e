"""What people see of a run: a table, a JSON file, a picture, a bar while it goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from octavo.cli.bench.drive import OnDone
from octavo.cli.bench.figures import Outcome

LATENCIES = (
    ("ttft", "time to first token"),
    ("itl", "gap between messages"),
    ("tpot", "per token after the first"),
    ("e2e", "whole answer"),
)
NO_MATPLOTLIB = 'no picture: matplotlib is not installed (pip install "octavo[bench]")'


@contextmanager
def bar(title: str, count: int, *, shown: bool) -> Iterator[OnDone]:
    """A progress bar on stderr; redrawn twice a second, since the generator's CPU is part of what is measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    text = TextColumn("{task.fields[note]}")
    console = Console(stderr=True)
    with Progress(*columns, text, console=console, disable=not shown, refresh_per_second=2) as progress:
        task = progress.add_task(title, total=count, note="")
        done = {"tokens": 0, "failed": 0}

        def on_done(outcome: Outcome) -> None:
            done["tokens"] += outcome.output_tokens
            done["failed"] += outcome.error is not None
            failed = f" · {done['failed']} failed" if done["failed"] else ""
            progress.update(task, advance=1, note=f"{done['tokens']} tokens{failed}")

        yield on_done


def table(summary: Mapping[str, object], *, title: str, notes: Sequence[str] = ()) -> str:
    """The figures as text."""
    lines = [f"{title}", ""]
    lines += [f"  {name:34} {value}" for name, value in _totals(summary)]
    lines += ["", f"  {'milliseconds':26} {'mean':>10} {'p50':>10} {'p90':>10} {'p99':>10} {'max':>10}"]
    for key, name in LATENCIES:
        row = summary[key]
        if isinstance(row, Mapping):
            cells = (row[f"{column}_ms"] for column in ("mean", "p50", "p90", "p99", "max"))
            lines.append(f"  {name:26} " + " ".join(f"{cell:10.1f}" for cell in cells))
        else:
            lines.append(f"  {name:26} {'-':>10}")
    errors = summary["errors"]
    if isinstance(errors, Mapping) and errors:
        lines += ["", f"  {summary['failed']} of {summary['requests']} requests failed:"]
        lines += [f"    {entry['count']} × {kind}: {entry['first']}" for kind, entry in errors.items()]
    return "\n".join([*lines, *(["", *(f"  note: {note}" for note in notes)] if notes else [])])


def _totals(summary: Mapping[str, object]) -> list[tuple[str, str]]:
    def number(name: str) -> float:
        return float(str(summary[name] or 0))

    share = summary["generator_cpu_share"]
    rows = [
        ("requests completed / failed", f"{summary['completed']} / {summary['failed']}"),
        ("seconds", f"{number('seconds'):.2f}"),
        ("input / output tokens", f"{summary['input_tokens']} / {summary['output_tokens']}"),
        ("requests a second", f"{number('requests_per_s'):.2f}"),
        ("output tokens a second", f"{number('output_tok_per_s'):.1f}"),
        ("all tokens a second", f"{number('total_tok_per_s'):.1f}"),
        ("most requests at once", f"{summary['most_at_once']}"),
    ]
    if summary["tokens_per_message"]:
        rows.append(("tokens a message", f"{number('tokens_per_message'):.2f}"))
    if share is not None:
        rows.append(("CPU of this process, share of a core", f"{number('generator_cpu_share'):.1%}"))
    return rows


def notes_of(summary: Mapping[str, object], *, open_loop: bool, in_process: bool) -> list[str]:
    """What a reader must know to read the figures right."""
    notes = []
    counted, late, share = summary["tokens_counted_by"], summary["sent_late"], summary["generator_cpu_share"]
    if isinstance(counted, Mapping) and counted.get("chunks"):
        notes.append("the server gave no usage: output tokens are counted by chunks, one each")
    if open_loop and isinstance(late, Mapping) and late["p99_ms"] > 100:
        notes.append(f"requests were sent late: {late['p99_ms']:.0f} ms at p99; the rate was not reached")
    long_enough = float(str(summary["seconds"])) > 1  # CPU time of less says nothing
    if not in_process and long_enough and isinstance(share, float) and share > 0.7:
        notes.append("this process used most of a core: it may be the limit itself; run it elsewhere or more of them")
    return notes


def note_of_words(asked: int, counted: int) -> list[str]:
    """Random prompts of words have as many tokens as the server's tokenizer makes of them."""
    if not asked or 0.8 <= counted / asked <= 1.25:
        return []
    return [f"prompts are words, {counted / asked:.1f} tokens each here: {counted} tokens in all, not {asked}"]


def write_json(path: Path, report: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def rows_of(outcomes: Sequence[Outcome], began: float) -> list[dict[str, object]]:
    """One object a request, times in seconds from the run's start."""
    return [
        {
            "index": one.index,
            "due": round(one.due - began, 6),
            "sent": round(one.sent - began, 6),
            "arrivals": [round(at - began, 6) for at in one.arrivals],
            "ended": round(one.ended - began, 6),
            "input_tokens": one.input_tokens,
            "output_tokens": one.output_tokens,
            "error": one.error,
            "detail": one.detail,
        }
        for one in sorted(outcomes, key=lambda one: one.index)
    ]


def can_draw() -> bool:
    """Whether matplotlib is here; says so if not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(NO_MATPLOTLIB, file=sys.stderr)
        return False
    return True


def draw(path: Path, outcomes: Sequence[Outcome], *, began: float, title: str) -> None:
    """Shares of requests over each latency, and messages over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [one for one in outcomes if one.error is None]
    series = (
        ("time to first token", [one.ttft for one in good]),
        ("gap between messages", [gap for one in good for gap in one.gaps]),
        ("whole answer", [one.e2e for one in good]),
    )
    figure, axes = pyplot.subplots(1, 4, figsize=(17, 3.8))
    for axis, (name, values) in zip(axes, series):
        ordered = [value * 1e3 for value in sorted(values)]
        axis.plot(ordered, [(index + 1) / len(ordered) for index in range(len(ordered))])
        axis.set(title=name, xlabel="ms", ylabel="share", ylim=(0, 1.02))
        axis.set_xlim(left=0)
    moments = [at - began for one in good for at in one.arrivals]
    span = max(moments, default=1.0)
    bins = max(10, min(100, int(span)))
    axes[3].hist(moments, bins=bins, weights=[bins / span] * len(moments), histtype="step")
    axes[3].set(title="messages with tokens", xlabel="s", ylabel="a second")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
