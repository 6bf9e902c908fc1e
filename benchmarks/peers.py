"""Octavo against other engines on the same model, machine and hour: interleaved runs, medians, ratios.

    python benchmarks/peers.py --peer vllm=/path/to/venv/bin/python --peer openvino=/path/to/venv/bin/python …
                               [--folder L1B] [--work DIR] [--minutes 25] [--runs 5] [--json FILE]

Peers: vllm, openvino, llama, transformers, ctranslate2; each runs in the environment whose Python is given, in a
process of its own that is stopped (SIGSTOP) while it is not its turn. `NAME=PYTHON,PREPARE_PYTHON` gives another Python
for making the peer's model folder, once, before the clock starts. Octavo itself runs in this environment.

Short figures (decode, a prompt of 512) run `--runs` times in turn. Long ones (a prompt of 2 048, serving) run once for
all, then again, while the minutes last, for those that reached half of the best. What was left out is said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS = "octavo"
PARTS = ("decodes", "prompts", "long")
PEERS = ("vllm", "openvino", "llama", "transformers", "ctranslate2")


CONTEXT = 200  # of the batch at first; its decode runs bring it to about 420
DECODES = ((32, 8), (16, 8), (4, 12), (1, 16))  # batch, steps of one run
SERVE = {"op": "serve", "requests": 32, "at_once": 16, "prompt": 256, "output": 64}
LONG = {"serve_16": SERVE, "prompt_2048": {"op": "prompt", "tokens": 2048}}
MOST_SECONDS = 300.0  # of one question
LOWER_IS_BETTER = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "load_s", "resident_mib")


class PeerError(Exception):
    """The peer did not do it; one sentence."""


@dataclass
class Peer:
    """A driver's process. Its whole group sleeps but for the time of a question."""

    name: str
    python: str
    folder: Path
    log: Path
    gone: str | None = None  # why it is out of the session
    figures: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def start(self) -> None:
        driver = HERE / "peers" / f"drive_{self.name}.py"
        self._process = subprocess.Popen(
            [self.python, str(driver)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("wb"),
            start_new_session=True,
        )

    def ask(self, message: dict[str, object], *, seconds: float) -> dict[str, float]:
        """PeerError if it says so, dies or takes longer."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], seconds)
            line = process.stdout.readline() if ready else b""
        except OSError as error:
            raise PeerError(f"its process ended: {error}") from None
        finally:
            self._signal(signal.SIGSTOP)
        if not ready:
            raise PeerError(f"no answer within {seconds:.0f} s")
        if not line:
            raise PeerError(f"its process ended; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def resident_mib(self) -> float:
        """Proportional resident memory of its processes."""
        total = 0
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, StopIteration):
                if os.getsid(int(folder.name)) == self._process.pid:
                    lines = (folder / "smaps_rollup").read_text().splitlines()
                    total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024

    def end(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGKILL)
        self._process.wait(30)

    def reached(self, name: str) -> float:
        """Of the first run; infinite if there is none."""
        return self.figures[name][0]["tok_s"] if name in self.figures else float("inf")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


# ---- model folders


def prepare(name: str, python: str, *, source: Path, work: Path) -> Path:
    """The folder that a peer loads, made by its driver the first time. PeerError if it cannot be made."""
    bf16, float_head = work / "bf16", work / "vllm"
    flags = ["--float-head", str(float_head)] if name == "vllm" else ["--bf16", str(bf16)]
    subprocess.run([sys.executable, str(HERE / "checkpoints.py"), str(source), *flags], check=True)
    if name == "vllm":
        return float_head
    if name == "transformers":
        return bf16
    target = work / name
    if not (target / ".complete").is_file():
        print(f"{name}: making {target}", file=sys.stderr, flush=True)
        command = [python, str(HERE / "peers" / f"drive_{name}.py"), "prepare", str(bf16), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PeerError(f"its model folder cannot be made: {(done.stderr or done.stdout)[-400:].strip()}")
        (target / ".complete").touch()
    return target


# ---- a session


@dataclass
class Session:
    """All peers, and the time that is left."""

    peers: list[Peer]
    threads: int
    deadline: float
    left_out: list[str] = field(default_factory=list)

    def load(self) -> None:
        for peer in self.living():
            peer.start()
            self._ask(peer, "load", {"op": "load", "folder": str(peer.folder), "threads": self.threads})
            # the first work of some is slow: kernels are made, pages touched
            for message in ({"op": "prompt", "tokens": 64}, {"op": "fill", "batch": 2, "context": 64}):
                self._ask(peer, None, message)
            for message in ({"op": "decode", "tokens": 4}, {"op": "shrink", "batch": 0}):
                self._ask(peer, None, message)

    def decodes(self, runs: int) -> None:
        """One batch is filled once and shrinks: the prompts would take longer than all the steps."""
        for peer in self.living():
            self._ask(peer, None, {"op": "fill", "batch": DECODES[0][0], "context": CONTEXT})
        for batch, steps in DECODES:
            for peer in self.living():
                self._ask(peer, None, {"op": "shrink", "batch": batch})
            self._rounds(f"decode_{batch}", {"op": "decode", "tokens": steps}, runs)
        for peer in self.living():
            self._ask(peer, None, {"op": "shrink", "batch": 0})

    def prompts(self, runs: int) -> None:
        self._rounds("prompt_512", {"op": "prompt", "tokens": 512}, runs)

    def long(self, runs: int) -> None:
        for index in range(runs):
            for name, message in LONG.items():
                self._round(name, message, index, self.contenders(name))

    def contenders(self, name: str) -> list[Peer]:
        """All that were not measured yet or reached half of the best."""
        best = max((peer.figures[name][0]["tok_s"] for peer in self.living() if name in peer.figures), default=0.0)
        return [peer for peer in self.living() if peer.reached(name) >= best / 2]

    def _rounds(self, name: str, message: dict[str, object], runs: int) -> None:
        for index in range(runs):
            self._round(name, message, index, self.living())

    def _round(self, name: str, message: dict[str, object], index: int, peers: list[Peer]) -> None:
        first = index % len(peers) if peers else 0  # nobody is always first
        for peer in peers[first:] + peers[:first]:
            before = peer.figures.get(name)
            expected = before[-1]["seconds"] if before else 0.0
            if time.monotonic() + expected > self.deadline:
                self.left_out.append(f"{peer.name} {name}, run {index + 1}")
            else:
                self._ask(peer, name, message)

    def living(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.gone is None]

    def _ask(self, peer: Peer, name: str | None, message: dict[str, object]) -> None:
        """The answer becomes a figure if it has a name. A peer that fails is out."""
        if peer.gone is not None:
            return
        began = time.monotonic()
        try:
            answer = peer.ask(message, seconds=MOST_SECONDS)
        except PeerError as error:
            peer.gone = f"{name or message['op']}: {error}"
            print(f"{peer.name}: {peer.gone}", file=sys.stderr, flush=True)
            return
        answer["seconds"] = time.monotonic() - began
        text = ", ".join(f"{key} {value:.1f}" for key, value in answer.items())
        print(f"{peer.name} {name or message['op']}: {text}", file=sys.stderr, flush=True)
        if name is not None:
            answer["resident_mib"] = peer.resident_mib()
            peer.figures.setdefault(name, []).append(answer)

    def end(self) -> None:
        for peer in self.peers:
            if hasattr(peer, "_process"):
                peer.end()


# ---- what came of it


def medians(peer: Peer) -> dict[str, dict[str, float]]:
    """name -> column -> median over the runs."""
    out = {}
    for name, rows in peer.figures.items():
        columns = [key for key in rows[0] if key not in ("seconds", "resident_mib")]
        out[name] = {key: statistics.median(row[key] for row in rows) for key in columns}
        out[name]["runs"] = len(rows)
    out["memory"] = {"resident_mib": max(row["resident_mib"] for rows in peer.figures.values() for row in rows)}
    return out


def ratios(ours: dict[str, dict[str, float]], others: dict[str, dict[str, dict[str, float]]]) -> dict[str, object]:
    """Each figure's ratio to the best peer, above 1 where ours is better whichever way is up."""
    out = {}
    for name, row in ours.items():
        for column, value in row.items():
            found = {peer: figures[name][column] for peer, figures in others.items() if column in figures.get(name, {})}
            if column == "runs" or not found or not value:
                continue
            lower = column in LOWER_IS_BETTER
            best = (min if lower else max)(found, key=lambda peer: found[peer])
            ratio = found[best] / value if lower else value / found[best]
            out[f"{name}.{column}"] = {"ours": value, "best": found[best], "peer": best, "ratio": ratio}
    return out


def table(names: Sequence[str], figures: dict[str, dict[str, dict[str, float]]], compared: dict[str, object]) -> str:
    lines = ["| figure | " + " | ".join(names) + " | ours / best |", "|---|" + "---|" * (len(names) + 1)]
    keys: dict[str, None] = {}
    for name in names:
        keys |= {f"{task}.{key}": None for task, row in figures.get(name, {}).items() for key in row if key != "runs"}
    for key in keys:
        task, column = key.rsplit(".", 1)
        cells = []
        for name in names:
            value = figures.get(name, {}).get(task, {}).get(column)
            cells.append("-" if value is None else f"{value:.1f}")
        entry = compared.get(key)
        ratio = f"{entry['ratio']:.2f} ({entry['peer']})" if isinstance(entry, dict) else "-"
        lines.append(f"| {task} {column} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines)


def parse_peer(text: str) -> tuple[str, str, str]:
    """NAME=PYTHON[,PREPARE_PYTHON]"""
    name, _, rest = text.partition("=")
    python, _, other = rest.partition(",")
    if name not in PEERS or not python:
        raise argparse.ArgumentTypeError(f"{text}: must be NAME=PYTHON with a name of {', '.join(PEERS)}")
    return name, python, other or python


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", dest="peers", action="append", type=parse_peer, default=[], metavar="NAME=PYTHON")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "octavo-bench" / "l1b")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "octavo-bench" / "peers")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--runs", type=int, default=5, help="of each figure, at most")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=25.0, help="for everything, loading included")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "peers.json")
    return parser.parse_args()


def make_session(given: argparse.Namespace) -> Session:
    """Model folders first: they are made once and do not count."""
    if not (given.folder / "config.json").is_file():
        from standard_model import make_model

        make_model(given.folder)
    given.work.mkdir(parents=True, exist_ok=True)
    peers = [Peer(OURS, sys.executable, given.folder, given.work / f"{OURS}.log")]
    for name, python, other in given.peers:
        peer = Peer(name, python, given.folder, given.work / f"{name}.log")
        try:
            peer.folder = prepare(name, other, source=given.folder, work=given.work)
        except (PeerError, OSError) as error:
            peer.gone = str(error)
        peers.append(peer)
    return Session(peers, given.threads, time.monotonic() + given.minutes * 60)


def main() -> int:
    given = arguments()
    session = make_session(given)
    load_before = os.getloadavg()[0]
    try:
        session.load()
        for part in given.parts:
            getattr(session, part)(given.runs)
    finally:
        session.end()
    figures = {peer.name: medians(peer) for peer in session.peers if peer.figures}
    compared = ratios(figures.get(OURS, {}), {name: rows for name, rows in figures.items() if name != OURS})
    names = [peer.name for peer in session.peers if peer.figures]
    print(table(names, figures, compared))
    gone = {peer.name: peer.gone for peer in session.peers if peer.gone}
    for name, why in gone.items():
        print(f"{name}: not measured: {why}")
    for text in session.left_out:
        print(f"left out for time: {text}")
    machine = {"processor": platform.processor() or platform.machine(), "threads": given.threads}
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {**machine, "load_average": [load_before, os.getloadavg()[0]]},
        "medians": figures,
        "runs": {peer.name: peer.figures for peer in session.peers},
        "ratios": compared,
        "gone": gone,
        "left_out": session.left_out,
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if not gone else 1


if __name__ == "__main__":
    sys.exit(main())
