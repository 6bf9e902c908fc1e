"""The standard model through HTTP, gateway and Triton, against the same engine in a process of its own.

    python benchmarks/served.py [--folder L1B] [--at-once 1 4 16 32] [--runs 3] [--json FILE] [--png FILE]

Starts the real server on free ports, then for each number of concurrent requests runs `octavo bench` (native streams)
and the engine alone, in turn; the one that waits is stopped. The load generator shares the machine: its CPU is given
beside the ratio.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from checkpoints import write_tokenizer
from peer_process import OURS, Peer
from plots import Panel, draw

HERE = Path(__file__).resolve().parent
PORTS = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "INFER_QUEUE_PORT", "PUSH_MODE_HTTP_PORT")
PROMPT, OUTPUT = 256, 64


@contextmanager
def node(folder: Path) -> Iterator[tuple[str, int]]:
    """A ready server; the gateway's address and the node's pid."""
    with tempfile.TemporaryDirectory() as run_dir:
        variables = {"MODEL_DIR": str(folder), "MAX_SEQ_LEN": "4096", "BLOCK_BS": "16", "BATCH_SIZE": "32"}
        fixed = {"RUN_DIR": run_dir, "HOST": "127.0.0.1", "LOG_LEVEL": "WARNING", "PREFIX_CACHE": "0"}
        environ = {**os.environ, **free_ports(), **variables, **fixed}
        process = subprocess.Popen([sys.executable, "-m", "octavo.node"], env=environ, stderr=subprocess.DEVNULL)
        try:
            wait_ready(process, int(environ["HTTP_PORT"]))
            yield f"http://127.0.0.1:{environ['PUSH_MODE_HTTP_PORT']}", process.pid
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def free_ports() -> dict[str, str]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return {name: str(item.getsockname()[1]) for name, item in zip(PORTS, sockets)}


def wait_ready(process: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        with contextlib.suppress(OSError):
            if urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2).status == 200:
                return
        time.sleep(0.1)
    raise SystemExit("the server did not get ready")


def requests_of(at_once: int) -> int:
    return max(4, 2 * at_once)


def bench(url: str, at_once: int, *, seed: int) -> dict[str, object]:
    """One run of `octavo bench`; SystemExit if a request failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        load = {"--num-requests": requests_of(at_once), "--concurrency": at_once, "--seed": seed, "--warmup": at_once}
        shape = {"--input-len": PROMPT, "--output-len": OUTPUT, "--token-range": "256:32000", "--api": "native"}
        flags = [str(word) for pair in {**load, **shape, "--json": path}.items() for word in pair]
        command = [sys.executable, "-m", "octavo.cli.main", "bench", url, *flags, "--no-progress"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return json.loads(path.read_text())


def row_of(served: list[dict], alone: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the runs."""

    def middle(values: list[float]) -> float:
        return round(statistics.median(values), 3)

    tok_s, engine = middle([run["output_tok_per_s"] for run in served]), middle([run["tok_s"] for run in alone])
    return {
        "served_tok_s": tok_s,
        "engine_tok_s": engine,
        "ratio": round(tok_s / engine, 3),
        "generator_cpu_share": middle([run["generator_cpu_share"] for run in served]),
        "ttft_p50_ms": middle([run["ttft"]["p50_ms"] for run in served]),
        "ttft_p99_ms": middle([run["ttft"]["p99_ms"] for run in served]),
        "itl_p50_ms": middle([run["itl"]["p50_ms"] for run in served]),
        "itl_p99_ms": middle([run["itl"]["p99_ms"] for run in served]),
        "engine_itl_p50_ms": middle([run["itl_p50_ms"] for run in alone]),
        "engine_itl_p99_ms": middle([run["itl_p99_ms"] for run in alone]),
    }


def measure(folder: Path, at_once: list[int], runs: int) -> dict[str, dict[str, float]]:
    engine = Peer(OURS, sys.executable, folder, Path(tempfile.gettempdir()) / "octavo-bench-engine.log")
    engine.start()
    try:
        engine.ask({"op": "load", "folder": str(folder), "threads": len(os.sched_getaffinity(0))}, seconds=300)
        engine.ask({"op": "prompt", "tokens": 64}, seconds=60)
        with node(folder) as (url, _):
            rows = {}
            for count in at_once:
                served, alone = [], []
                for run in range(runs):
                    served.append(bench(url, count, seed=run))
                    question = {"op": "serve", "requests": requests_of(count), "at_once": count}
                    alone.append(engine.ask({**question, "prompt": PROMPT, "output": OUTPUT}, seconds=600))
                rows[str(count)] = row_of(served, alone)
                print(f"{count} at once: {rows[str(count)]}", file=sys.stderr, flush=True)
            return rows
    finally:
        engine.end()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended too
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-bench" / "l1b")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "served.json")
    parser.add_argument("--png", type=Path, default=HERE / "results" / "served.png")
    arguments = parser.parse_args()
    if not (arguments.folder / "config.json").is_file():
        from standard_model import make_model

        make_model(arguments.folder)
    write_tokenizer(arguments.folder)
    rows = measure(arguments.folder, arguments.at_once, arguments.runs)
    full = {"date": time.strftime("%Y-%m-%d"), "prompt": PROMPT, "output": OUTPUT, "at_once": rows}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(full, indent=1) + "\n")
    print("| at once | served, tok/s | engine alone | ratio | generator CPU | TTFT p50 / p99, ms | ITL p50 / p99, ms |")
    print("|---|---|---|---|---|---|---|")
    for count, row in rows.items():
        latency = (
            f"{row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f} | {row['itl_p50_ms']:.0f} / {row['itl_p99_ms']:.0f}"
        )
        rates = f"{row['served_tok_s']:.1f} | {row['engine_tok_s']:.1f} | {row['ratio']:.2f}"
        print(f"| {count} | {rates} | {row['generator_cpu_share']:.1%} | {latency} |")

    def line(key: str) -> list[tuple[float, float]]:
        return [(int(count), row[key]) for count, row in rows.items()]

    speed = Panel(
        "32 × 256 + 64 tokens", "at once", "tok/s", {key: line(key) for key in ("served_tok_s", "engine_tok_s")}
    )
    gaps = Panel("Gap between tokens", "at once", "ms", {key: line(key) for key in ("itl_p50_ms", "itl_p99_ms")})
    draw(arguments.png, [speed, gaps], title="Standard model through HTTP and Triton")


if __name__ == "__main__":
    main()
