"""Writes grafana/dashboards/octavo.json: `python deploy/observability/dashboard.py [--check]`.

The panels are a table here, because a dashboard's JSON is mostly positions. Standard library only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TARGET = Path(__file__).with_name("grafana") / "dashboards" / "octavo.json"
WIDTH, HEIGHT, COLUMNS = 8, 7, 3
RATE = "$__rate_interval"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """One graph: pairs of (legend, query)."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    about: str = ""


def rate(metric: str, *, by: str) -> str:
    return f'sum by ({by}) (rate({metric}{{instance=~"$instance"}}[{RATE}]))'


def gauge(metric: str) -> str:
    return f'sum({metric}{{instance=~"$instance"}})'


def percentiles(metric: str) -> tuple[tuple[str, str], ...]:
    buckets = rate(f"octavo_{metric}_seconds_bucket", by="le")
    return tuple((f"p{share * 100:g}", f"histogram_quantile({share}, {buckets})") for share in (0.5, 0.9, 0.99))


PANELS = (
    Panel("State", (("{{instance}} {{state}}", 'octavo_state{instance=~"$instance"} == 1'),), about="1: in this state"),
    Panel("Loaded", (("{{instance}}", 'octavo_load_progress{instance=~"$instance"}'),), unit="percentunit"),
    Panel(
        "Restarts in the last hour",
        (("{{process}}", 'sum by (process) (increase(octavo_restarts_total{instance=~"$instance"}[1h]))'),),
        about="Processes that node had to start again",
    ),
    Panel(
        "Requests by dialect and code",
        (("{{dialect}} {{code}}", rate("octavo_requests_total", by="dialect, code")),),
        unit="reqps",
    ),
    Panel(
        "Ends by reason",
        (("{{finished_reason}}", rate("octavo_request_success_total", by="finished_reason")),),
        unit="reqps",
    ),
    Panel("Refused or failed, by code", (("{{code}}", rate("octavo_errors_total", by="code")),), unit="reqps"),
    Panel(
        "Queue",
        (("waiting", gauge("octavo_requests_waiting")), ("limit", gauge("octavo_requests_waiting_limit"))),
        about="MAX_CACHED_TASK_NUM is the limit; beyond it requests are refused with 429",
    ),
    Panel("Time in the queue", percentiles("request_queue_time"), unit="s"),
    Panel("Batch", (("running", gauge("octavo_requests_running")), ("BATCH_SIZE", gauge("max_batch_size")))),
    Panel(
        "Cache blocks",
        (
            ("used", gauge("octavo_blocks_used")),
            ("reusable prefixes", gauge("octavo_blocks_cached")),
            ("all", gauge("octavo_blocks_total")),
        ),
    ),
    Panel(
        "Preemptions",
        (("a second", rate("octavo_preemptions_total", by="job")),),
        about="Sequences put back because the cache was full: more than now and then means too little cache",
    ),
    Panel(
        "Prefix cache",
        (
            (
                "share of prompt tokens found",
                f"{rate('octavo_prefix_cache_hits_total', by='job')} / "
                f"{rate('octavo_prefix_cache_queries_total', by='job')}",
            ),
        ),
        unit="percentunit",
    ),
    Panel("Time to first token", percentiles("time_to_first_token"), unit="s"),
    Panel("Gap between tokens", percentiles("inter_token_latency"), unit="s"),
    Panel("End to end", percentiles("e2e_request_latency"), unit="s"),
    Panel(
        "Tokens",
        (
            ("generated", rate("octavo_generation_tokens_total", by="job")),
            ("prompts", rate("octavo_prompt_tokens_total", by="job")),
        ),
        unit="short",
        about="A second",
    ),
    Panel("Steps of the engine", (("a second", rate("octavo_engine_steps_total", by="job")),)),
    Panel("Processes that run", (("{{process}}", 'sum by (process) (octavo_process_up{instance=~"$instance"})'),)),
)


def dashboard() -> dict[str, object]:
    """What Grafana imports."""
    return {
        "uid": "octavo",
        "title": "Octavo",
        "tags": ["octavo", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": list(_variables())},
        "panels": [_panel(number, panel) for number, panel in enumerate(PANELS)],
    }


def _variables() -> Iterator[dict[str, object]]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    yield {
        "name": "instance",
        "label": "Server",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(octavo_state, instance)", "refId": "instance"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, panel: Panel) -> dict[str, object]:
    row, column = divmod(number, COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend, "datasource": SOURCE}
            for index, (legend, query) in enumerate(panel.queries)
        ],
    }


def main() -> int:
    """Write the file; with --check say whether it is up to date."""
    text = json.dumps(dashboard(), indent=1) + "\n"
    if sys.argv[1:] == ["--check"]:
        return int(not TARGET.is_file() or TARGET.read_text() != text)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
