"""What the road costs: the engine alone against the same engine behind Triton and the gateway.

    python benchmarks/road.py [--parts demo stand_in model] [--model DIR] [--output benchmarks/results/road.json]

Each part runs on fresh servers on free ports. demo: the demo model, engine alone and served, at 1 and 16 streams, in
turn and five times, medians; load time and resident memory. stand_in: an engine that emits 20 000 tokens a second over
48 streams and writes down when: CPU time per delivered token, and how late each token is. model: the model in DIR (the
standard one of benchmarks/cpu.py), engine alone and served, 16 streams. The load generator shares the machine: its CPU
time is in the report, and `ratio_without_load` takes it out of the served time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from urllib.request import urlopen

import load
import stand_in
from checkpoints import write_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
PORTS = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "INFER_QUEUE_PORT", "PUSH_MODE_HTTP_PORT")
PROMPT = "写一个故事"
OUTPUT_TOKENS = 256
RUNS = 5
MODEL_RUNS = 3
PARTS = ("demo", "stand_in", "model")
NAMES = {"demo": "demo_model", "stand_in": "stand_in_engine_20000_tok_s_48_streams", "model": "standard_model"}
LATE = {"50": 0.5, "99": 0.99, "100": 1.0}  # percentiles of lateness
# The stand-in part before requests shared streams to Triton: one stream and one response a message for each request.
START = {"tritonserver": 22.7, "octavo.gateway": 18.8, "triton_python_backend_stub": 17.1}
STAND_IN = """
import sys
from octavo.node.__main__ import main
from octavo.node.programs import Programs
sys.exit(main(Programs(engine=(sys.executable, {engine!r}, "--rate", "20000", "--times", {times!r}))))
"""


def environ_of(run_dir: str) -> dict[str, str]:
    """Free ports and a run directory of its own."""
    sockets = [socket.socket() for _ in PORTS]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = {name: str(item.getsockname()[1]) for name, item in zip(PORTS, sockets)}
    for item in sockets:
        item.close()
    return {**os.environ, **ports, "RUN_DIR": run_dir, "HOST": "127.0.0.1", "BATCH_SIZE": "48", "LOG_LEVEL": "WARNING"}


@contextmanager
def server(*, times: Path | None = None, **variables: str) -> Iterator[dict[str, str]]:
    """A ready server in the foreground of a child; its environment. `times`: of the stand-in engine, if it is that."""
    with tempfile.TemporaryDirectory() as run_dir:
        environ = {**environ_of(run_dir), **variables}
        command = [sys.executable, "-m", "octavo.node"]
        if times is not None:
            engine = str(Path(__file__).with_name("stand_in.py"))
            command = [sys.executable, "-c", STAND_IN.format(engine=engine, times=str(times))]
        began = time.monotonic()
        process = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
        try:
            wait_ready(environ, process)
            yield {**environ, "LOAD_SECONDS": f"{time.monotonic() - began:.2f}", "NODE_PID": str(process.pid)}
        finally:
            process.terminate()
            process.wait(60)


def wait_ready(environ: dict[str, str], process: subprocess.Popen[bytes]) -> None:
    """Until /v2/health/ready answers 200."""
    for _ in range(1200):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            if urlopen(f"http://127.0.0.1:{environ['HTTP_PORT']}/v2/health/ready", timeout=2).status == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not get ready")


def memory_mib(pid: int) -> dict[str, float]:
    """Proportional resident memory of a process and its descendants, by command."""
    out: dict[str, float] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or not descends(int(folder.name), pid):
            continue
        try:
            rollup = (folder / "smaps_rollup").read_text()
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        pss = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        name = words[2] if len(words) > 2 and words[1] == "-m" else Path(words[0]).name
        out[name] = round(out.get(name, 0.0) + pss / 1024, 1)
    return out


def descends(pid: int, ancestor: int) -> bool:
    """True if `pid` is `ancestor` or below it."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU time used so far by a process and its descendants, by command."""
    out: dict[str, float] = {}
    tick = os.sysconf("SC_CLK_TCK")
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or not descends(int(folder.name), pid):
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        name = words[2] if len(words) > 2 and words[1] == "-m" else Path(words[0]).name
        out[name] = out.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / tick
    return out


def bodies(count: int, tokens: int) -> list[dict[str, object]]:
    """Streams of a fixed length: no end token, a seed each."""
    return [
        {
            "text": PROMPT,
            "req_id": f"{os.getpid()}-{time.monotonic_ns()}-{index}",
            "max_dec_len": tokens,
            "ignore_eos": True,
            "infer_seed": index,
        }
        for index in range(count)
    ]


def describe(result: load.Load) -> dict[str, float]:
    """The figures of one run."""
    first, gaps = result.first_token_ms(), result.gaps_ms()
    return {
        "tok_s": round(result.tokens_per_second, 1),
        "tok_s_without_load": round(result.tokens / (result.seconds - result.own_cpu_seconds), 1),
        "ttft_p50_ms": round(load.percentile(first, 0.5), 1),
        "ttft_p99_ms": round(load.percentile(first, 0.99), 1),
        "gap_p50_ms": round(load.percentile(gaps, 0.5), 2),
        "gap_p99_ms": round(load.percentile(gaps, 0.99), 2),
        "own_cpu_share": round(result.own_cpu_seconds / result.seconds, 3),
        "messages_in_order": float(all(stream.gaps_in_order for stream in result.streams)),
    }


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    """Column by column."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def engine_alone(count: int, *, tokens: int = OUTPUT_TOKENS, model: Path | None = None) -> float:
    """Tokens per second of the same loop and runner in a process of its own, without any server."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "engine_alone.py"), str(count), str(tokens)]
    command += [] if model is None else [str(model)]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(out.stdout.strip().splitlines()[-1])


def compare(engine: list[float], served: list[dict[str, float]]) -> dict[str, float]:
    """Medians of engine and server, and their ratio with and without the load generator's own time."""
    row, alone = median(served), statistics.median(engine)
    return {
        "engine_tok_s": round(alone, 1),
        "ratio": round(row["tok_s"] / alone, 3),
        "ratio_without_load": round(row["tok_s_without_load"] / alone, 3),
        **row,
    }


def measure_demo() -> dict[str, object]:
    """Engine alone and served, in turn."""
    alone: dict[int, list[float]] = {1: [], 16: []}
    served: dict[int, list[dict[str, float]]] = {1: [], 16: []}
    out: dict[str, object] = {}
    for _ in range(RUNS):
        for count in alone:
            alone[count].append(engine_alone(count))
        with server() as environ:
            port = int(environ["PUSH_MODE_HTTP_PORT"])
            load.run(port, bodies(2, 32))
            for count in served:
                served[count].append(describe(load.run(port, bodies(count, OUTPUT_TOKENS))))
            out["load_seconds"] = float(environ["LOAD_SECONDS"])
            out["memory_mib"] = memory_mib(int(environ["NODE_PID"]))
    return out | {f"streams_{count}": compare(alone[count], served[count]) for count in alone}


def measure_stand_in(runs: int = MODEL_RUNS) -> dict[str, object]:
    """48 streams from an engine that costs nothing: medians of CPU time per token, and of lateness."""
    rows = [stand_in_run() for _ in range(runs)]
    cpu = {name: statistics.median(row["cpu"][name] for row in rows) for name in rows[0]["cpu"]}
    road = {name: cpu[name] for name in START}
    return {
        **median([row["figures"] for row in rows]),
        "cpu_us_per_token": cpu,
        "cpu_us_per_token_at_start": START,
        "share_of_start": {name: round(road[name] / START[name], 2) for name in START},
        "share_of_start_in_all": round(sum(road.values()) / sum(START.values()), 2),
    }


def stand_in_run() -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder, server(times=Path(folder) / "times") as environ:
        port, pid = int(environ["PUSH_MODE_HTTP_PORT"]), int(environ["NODE_PID"])
        load.run(port, bodies(4, 64))
        before = cpu_seconds(pid)
        result = load.run(port, bodies(48, 1000))
        after = cpu_seconds(pid)
        late = lateness_ms(result, stand_in.read_times(Path(folder) / "times"))
    cpu = {name: round((after[name] - before.get(name, 0.0)) / result.tokens * 1e6, 1) for name in after}
    late_figures = {f"late_p{name}_ms": round(load.percentile(late, share), 1) for name, share in LATE.items()}
    return {"figures": {**describe(result), "tokens": result.tokens, **late_figures}, "cpu": cpu}


def lateness_ms(result: load.Load, emitted: dict[int, list[float]]) -> list[float]:
    """From the engine's step to the load generator, for each token of every stream; streams are known by their seed."""
    late = []
    for stream in result.streams:
        pairs = zip(emitted[int(str(stream.last["infer_seed"]))], stream.token_arrivals, strict=True)
        late += [(arrived - step) * 1e3 for step, arrived in pairs]
    return sorted(late)


def measure_model(model: Path, *, streams: int = 16) -> dict[str, object]:
    """Engine alone and served, in turn. The folder gets a tokenizer if it has none."""
    write_tokenizer(model)
    alone, served = [], []
    for _ in range(MODEL_RUNS):
        alone.append(engine_alone(streams, tokens=OUTPUT_TOKENS, model=model))
        with server(MODEL_DIR=str(model)) as environ:
            port = int(environ["PUSH_MODE_HTTP_PORT"])
            load.run(port, bodies(2, 8))
            served.append(describe(load.run(port, bodies(streams, OUTPUT_TOKENS))))
    return {"streams": streams, "output_tokens": OUTPUT_TOKENS, **compare(alone, served)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None, help="default: all that can be run")
    parser.add_argument("--model", type=Path, help="folder of the model part; none: no such part")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks" / "results" / "road.json")
    arguments = parser.parse_args()
    parts = arguments.parts or [part for part in PARTS if part != "model" or arguments.model]
    if "model" in parts and arguments.model is None:
        parser.error("the model part needs --model")
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name"))
    report = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    report |= {"date": date.today().isoformat(), "machine": f"{os.cpu_count()} cores, {cpu}"}
    report["command"] = "python benchmarks/road.py --model DIR"
    measures = {"demo": measure_demo, "stand_in": measure_stand_in, "model": lambda: measure_model(arguments.model)}
    for part in parts:
        report[NAMES[part]] = measures[part]()
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
