"""Dashboards and alert rules ask for nothing that the running server's page does not have; Prometheus answers them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.conftest import REPOSITORY, Server, free_ports

pytestmark = pytest.mark.server

FOLDER = REPOSITORY / "deploy" / "observability"
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "octavo.json").read_text())
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
PANEL_QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
QUERIES = [*PANEL_QUERIES, *(rule["expr"] for rule in RULES)]
NAME = re.compile(r"\b(?:octavo_\w+|nv_\w+|vllm:\w+|max_batch_size|max_block_num|batch_size|block_num)\b")
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian package prometheus)"
)


def placed(query: str) -> str:
    """A panel's query as Grafana sends it."""
    return query.replace("$__rate_interval", "1m").replace("$instance", ".*")


@pytest.fixture(scope="module")
def used(server: Server) -> Server:
    """The server after one request of each dialect, one refusal and one repeated prompt."""
    url = f"{server.gateway}/v1/chat/completions"
    for _ in range(2):
        httpx.post(url, json={"text": "hello, llm " * 40, "max_dec_len": 8, "ignore_eos": True}, timeout=60)
    messages = [{"role": "user", "content": "hello"}]
    httpx.post(url, json={"model": "default", "messages": messages, "max_tokens": 8}, timeout=60)
    assert httpx.post(url, json={"input_ids": [10**9]}, timeout=60).status_code == 400
    return server


@pytest.fixture(scope="module")
def samples(used: Server) -> dict[str, list[dict[str, str]]]:
    """Labels of every sample of the page, by name."""
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(httpx.get(used.metrics, timeout=10).text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_every_metric_that_is_asked_for_is_on_the_page(samples: dict[str, list[dict[str, str]]], query: str) -> None:
    names = set(NAME.findall(query))
    assert names or query.startswith("up{")
    assert not names - set(samples)


@pytest.mark.parametrize("query", QUERIES)
def test_every_label_that_is_asked_for_is_there(samples: dict[str, list[dict[str, str]]], query: str) -> None:
    """Prometheus itself adds job and instance, histograms have le."""
    labels = {name for name in NAME.findall(query) for sample in samples[name] for name in sample}
    asked = {name.strip() for group in re.findall(r"(?:by|on) \(([^)]*)\)", query) for name in group.split(",")}
    asked |= set(re.findall(r"[{,](\w+)=", query))
    assert not asked - labels - {"job", "instance"}


def test_traffic_is_counted_by_dialect_and_code(samples: dict[str, list[dict[str, str]]]) -> None:
    seen = {(labels["dialect"], labels["code"]) for labels in samples["octavo_requests_total"]}
    assert {("native", "200"), ("openai", "200"), ("native", "400")} <= seen


def test_the_page_has_the_limit_of_the_queue(used: Server) -> None:
    page = httpx.get(used.metrics, timeout=10).text
    assert "octavo_requests_waiting_limit 128.0" in page


def test_every_variable_of_a_metric_is_explained(samples: dict[str, list[dict[str, str]]]) -> None:
    """docs/observability.md names each of our metrics."""
    page = (REPOSITORY / "docs" / "observability.md").read_text()
    ours = [name for name in sorted(samples) if name.startswith("octavo_")]
    assert not [name for name in ours if re.sub(r"_(total|bucket|sum|count|created|info)$", "", name) not in page]


def test_the_dashboard_is_the_generated_one() -> None:
    command = [sys.executable, str(FOLDER / "dashboard.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "python deploy/observability/dashboard.py"


def test_panels_do_not_overlap() -> None:
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_the_compose_file_mounts_what_there_is() -> None:
    services = yaml.safe_load((FOLDER / "docker-compose.yml").read_text())["services"]
    assert set(services) == {"octavo", "prometheus", "grafana"}
    for service in services.values():
        for volume in service.get("volumes", ()):
            assert (FOLDER / volume.partition(":")[0]).exists()
    assert (FOLDER / services["octavo"]["build"]["context"] / services["octavo"]["build"]["dockerfile"]).is_file()
    scraped = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scraped["static_configs"] == [{"targets": ["octavo:8722"]}]


@needs_prometheus
def test_prometheus_accepts_the_rules_and_its_configuration() -> None:
    for what, file in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        done = subprocess.run(["promtool", "check", what, FOLDER / file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_alerts_fire_when_they_should_and_not_before() -> None:
    cases = Path(__file__).with_name("alert_cases.yml")
    done = subprocess.run(["promtool", "test", "rules", cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = yaml.safe_load(cases.read_text())["tests"]
    named = {case["alertname"] for test in tests for case in test["alert_rule_test"]}
    assert named == {rule["alert"] for rule in RULES}


@pytest.fixture(scope="module")
def prometheus(used: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that scrapes the server with the rules loaded; its address, once it has scraped for a while."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / "alerts.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{used.port('METRICS_PORT')}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    storage = f"--storage.tsdb.path={folder / 'data'}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", storage, f"--web.listen-address={address}"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not asked(address, "octavo_state offset 4s") and time.monotonic() < deadline:
            time.sleep(0.5)
        url = f"{used.gateway}/v1/chat/completions"
        httpx.post(url, json={"text": "hello, llm", "max_dec_len": 20, "ignore_eos": True}, timeout=60)
        time.sleep(3)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def asked(address: str, query: str) -> list[object]:
    """What Prometheus answers; nothing while it starts. Fails if it does not take the query."""
    try:
        answer = httpx.get(f"http://{address}/api/v1/query", params={"query": query}, timeout=10)
    except httpx.HTTPError:
        return []
    if answer.status_code == 503:
        return []
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"]["result"])


@needs_prometheus
def test_prometheus_answers_every_panel_with_numbers(prometheus: str) -> None:
    silent = [query for query in PANEL_QUERIES if not asked(prometheus, placed(query))]
    assert not silent


@needs_prometheus
def test_no_alert_fires_on_a_server_that_is_well(prometheus: str) -> None:
    rules = httpx.get(f"http://{prometheus}/api/v1/rules", timeout=10).json()["data"]["groups"][0]["rules"]
    assert [rule["health"] for rule in rules] == ["ok"] * len(RULES)
    assert [rule["name"] for rule in rules if rule["state"] != "inactive"] == []
