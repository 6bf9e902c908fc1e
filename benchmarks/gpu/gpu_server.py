"""48 streams through HTTP, gateway and Triton on the card, where everything that the server needs is installed.

The server is a process of its own over the same checkpoint; `octavo bench` asks. Used by bench.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from measure import ROOT, Bench

NEEDED = ("msgspec", "zmq", "fastapi", "uvicorn", "tritonclient", "grpc", "tokenizers", "jinja2")
NEEDED_BY_FRONT_END = ("msgspec", "zmq", "tokenizers", "jinja2", "prometheus_client")  # without gateway and Triton
SECONDS = 80


@dataclass(frozen=True)
class Node:
    """Where a running server is found."""

    url: str  # of the gateway
    metrics: str


def absent(names: Sequence[str]) -> list[str]:
    """Modules that are not installed."""
    return [name for name in names if not _is_installed(name)]


def missing() -> list[str]:
    """What the server needs and this machine has not."""
    lacking = absent(NEEDED)
    if not Path("/opt/tritonserver").is_dir():
        try:
            version("nvidia-pytriton")  # its binaries are no module
        except PackageNotFoundError:
            lacking.append("nvidia-pytriton")
        if int(version("numpy").split(".")[0]) > 1:  # its stub reads strings wrongly with that
            lacking.append("numpy below 2")
    return lacking


def _is_installed(name: str) -> bool:
    """The stand-in for msgspec, which has no wire, does not count."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def server_part(bench: Bench, folder: Path) -> None:
    """Tokens per second of 48 streams, three requests each."""
    lacking = missing()
    if lacking:
        bench.lacks("server", f"not installed: {' '.join(lacking)}")
        return
    vocab = add_tokenizer(folder)
    sizes, streams = bench.sizes, bench.sizes.of("batch", 48)
    with node(folder, device=bench.device.type, batch_size=streams, longest=sizes.of("context", 4352)) as server:
        shape = {"--input-len": sizes.of("rows", 512), "--output-len": sizes.of("rows", 128)}
        load = {"--num-requests": 3 * streams, "--concurrency": streams, "--warmup": streams, "--api": "native"}
        found = _ask(server.url, {**shape, **load, "--token-range": f"300:{min(vocab, 32000)}"})
    bench.note("server 48 streams", found["output_tok_per_s"], "tok/s")
    for name, figure, share in (("first token", "ttft", "p50_ms"), ("late gap (p99)", "itl", "p99_ms")):
        if found[figure] is not None:  # answers of one message have no gap
            bench.note(f"server 48 streams, {name}", found[figure][share], "ms")


def add_tokenizer(folder: Path) -> int:
    """A made-up tokenizer beside the weights, for a server needs one; the number of its tokens."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from checkpoints import write_tokenizer

    vocab = int(json.loads((folder / "config.json").read_text())["vocab_size"])
    write_tokenizer(folder, vocab=vocab)
    return vocab


@contextmanager
def node(folder: Path, *, device: str, batch_size: int, longest: int) -> Iterator[Node]:
    """A ready server on free ports."""
    from served import free_ports, wait_ready

    ports = free_ports()
    with tempfile.TemporaryDirectory() as run_dir:
        mine = {
            "MODEL_DIR": str(folder), "DEVICE": device, "BATCH_SIZE": str(batch_size), "MAX_SEQ_LEN": str(longest),
            "RUN_DIR": run_dir, "HOST": "127.0.0.1", "LOG_LEVEL": "WARNING", "PREFIX_CACHE": "0",
            "PYTHONPATH": f"{ROOT / 'serving'}:{ROOT / 'client'}",
        }  # fmt: skip
        process = subprocess.Popen([sys.executable, "-m", "octavo.node"], env={**os.environ, **ports, **mine})
        try:
            wait_ready(process, int(ports["HTTP_PORT"]))
            here = "http://127.0.0.1"
            yield Node(f"{here}:{ports['PUSH_MODE_HTTP_PORT']}", f"{here}:{ports['METRICS_PORT']}/metrics")
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _ask(url: str, options: dict[str, object]) -> dict[str, Any]:
    """One run of `octavo bench`."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "out.json"
        words = [str(word) for pair in {**options, "--json": path}.items() for word in pair]
        command = [sys.executable, "-m", "octavo.cli.main", "bench", url, *words, "--no-progress"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            raise RuntimeError(f"octavo bench failed: {done.stdout[-500:]}{done.stderr[-500:]}")
        return json.loads(path.read_text())
