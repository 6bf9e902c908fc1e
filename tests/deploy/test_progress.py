"""How a start tells how far it is: on the health pages, on the metrics page and in the log, and that small things in a
text do not make another line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.node.health import Monitor, Process, health_pages
from octavo.node.logs import LogFile, progress_step
from octavo.node.metrics import NodeMetrics
from octavo.node.ready import main as ready

PROCESSES = [Process("engine", "running", 10, 0, 1.0), Process("triton", "running", 11, 0, 1.0)]


class Nobody:
    async def ask(self, body: dict[str, object], *, seconds: float) -> dict[str, object]:
        raise NotImplementedError


@pytest.fixture
def monitor() -> Monitor:
    """Of a server whose front end says that 43 % of the weights are loaded."""
    one = Monitor(Nobody(), gateway=None, processes=lambda: PROCESSES, clock=lambda: 100.0)
    one.seen.info = {"state": "loading", "progress": {"stage": "weights", "fraction": 0.43}}
    one.seen.info_at, one.seen.info_from = 100.0, (10, 11)
    return one


async def test_the_pages_tell_how_far_loading_is(monitor: Monitor) -> None:
    pages = health_pages(monitor, processes=lambda: PROCESSES, about={})
    page = await pages["/v2/health/ready"]()
    assert (page.status, page.body) == (503, "loading: loading weights 43 %\n")
    body = json.loads((await pages["/v2/health"]()).body)
    assert body["state"] == "loading"
    assert body["progress"] == {"stage": "weights", "fraction": 0.43}
    assert (await pages["/v2/health/live"]()).status == 200


def test_the_metrics_tell_it_too(monitor: Monitor) -> None:
    text = NodeMetrics(model="demo", max_waiting=128).page(monitor, PROCESSES)
    assert "octavo_load_progress 0.43" in text
    assert 'octavo_state{state="loading"} 1.0' in text
    assert 'octavo_state{state="ready"} 0.0' in text


def test_the_log_has_a_line_for_each_stage_and_tenth() -> None:
    said = [f"loading weights {percent} %" for percent in range(100)] + ["loading warm-up 5 %"]
    assert len({progress_step(line) for line in said}) == 11


@pytest.mark.parametrize("everything", [True, False])
def test_in_an_image_every_line_of_a_child_is_repeated(tmp_path: Path, everything: bool) -> None:
    path, heard = tmp_path / "engine.log", []
    path.write_text("an old line\n")
    log = LogFile("engine", path, echo=heard.append, everything=everything)
    with open(path, "a") as child:
        child.write("INFO request 7: 12 tokens\nERROR \x1b[31mno memory\nhalf a li")
    log.look()
    with open(path, "a") as child:
        child.write("ne\n")
    log.look()
    lines = ["[engine] INFO request 7: 12 tokens", "[engine] ERROR  [31mno memory", "[engine] half a line"]
    assert heard == (lines if everything else lines[1:2])


def test_the_health_check_of_a_server_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unused_tcp_port_factory: Callable[[], int]
) -> None:
    monkeypatch.setenv("HTTP_PORT", str(unused_tcp_port_factory()))
    assert ready() == 1
    assert capsys.readouterr().out.startswith("no answer: ")
