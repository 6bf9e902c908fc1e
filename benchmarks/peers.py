"""Octavo against other engines on the same model, machine and hour: interleaved runs, medians, ratios.

    python benchmarks/peers.py --peer vllm=/path/to/venv/bin/python --peer openvino=/path/to/venv/bin/python …
                               [--folder L1B] [--work DIR] [--minutes 33] [--runs 5] [--json FILE]

Peers: vllm, openvino, llama, transformers, ctranslate2; each runs in the environment whose Python is given, in a
process of its own that is stopped (SIGSTOP) while it is not its turn. `NAME=PYTHON,PREPARE_PYTHON` gives another Python
for making the peer's model folder, once, before the clock starts. Octavo itself runs in this environment.

Every figure runs `--runs` times, all peers in turn, the machine's ceilings before each turn of all. Long ones (prompts
of 2 048, serving) go on after the first time with those that reached half of the best. Decode over a context of 2 048
is asked of each peer at the batches that it can fill within `FILL_SECONDS`. What was left out is said.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from meter import Ceilings, Rates, processor
from peer_process import OURS, PEERS, Peer, PeerError, prepare
from peer_report import medians, ratios, shares, table

HERE = Path(__file__).resolve().parent
PARTS = ("decodes", "prompts", "long_decodes", "serves")


@dataclass(frozen=True)
class Ladder:
    """A batch that is filled once and shrinks: the prompts would take longer than all the steps."""

    context: int  # behind each sequence at first
    batches: tuple[tuple[int, int], ...]  # and the steps of one run
    suffix: str = ""


SHORT = Ladder(200, ((32, 8), (16, 8), (4, 12), (1, 16)))  # to about 420 tokens
LONG = Ladder(1880, ((32, 5), (16, 5), (4, 8), (1, 12)), "_at_2048")  # to about 2050
SERVE = {"op": "serve", "requests": 32, "at_once": 16, "prompt": 256, "output": 64}
FILL_SECONDS = 75.0
MOST_SECONDS = 300.0  # of one question
MOST_REPEATED = 30.0  # a question that took longer is not asked again


# ---- a session


@dataclass
class Session:
    """All peers, and the time that is left."""

    peers: list[Peer]
    threads: int
    deadline: float
    ceilings: Ceilings
    probes: dict[str, list[Rates]] = field(default_factory=dict)
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
        self._descend(SHORT, {peer.name: SHORT.batches[0][0] for peer in self.living()}, runs)

    def long_decodes(self, runs: int) -> None:
        filled = {peer.name: self.affordable(peer, LONG) for peer in self.living()}
        self.left_out += [
            f"{peer.name} decode_{batch}{LONG.suffix}: it takes too long to fill, or more memory than it was given"
            for peer in self.living()
            for batch, _ in LONG.batches
            if batch > filled[peer.name]
        ]
        self._descend(LONG, filled, runs)

    def prompts(self, runs: int) -> None:
        for index in range(runs):
            self._round("prompt_512", {"op": "prompt", "tokens": 512}, index, self.living())
            self._round("prompt_2048", {"op": "prompt", "tokens": 2048}, index, self.contenders("prompt_2048"))

    def serves(self, runs: int) -> None:
        """Whoever decodes 16 at less than a third of the best's speed would take minutes and change nothing."""
        best = max((peer.rate("decode_16") or 0.0 for peer in self.living()), default=0.0)
        slow = [peer for peer in self.living() if (peer.rate("decode_16") or best) < best / 3]
        self.left_out += [f"{peer.name} serve_16: less than a third of the best's speed at batch 16" for peer in slow]
        for index in range(runs):
            self._round("serve_16", SERVE, index, [one for one in self.contenders("serve_16") if one not in slow])

    def affordable(self, peer: Peer, ladder: Ladder) -> int:
        """The largest batch that it fills in time, and has room for; 0 if none."""
        rate = peer.rate("prompt_2048") or 0.0
        room = peer.figures["load"][0].get("room", float("inf"))
        fits = [
            batch
            for batch, _ in ladder.batches
            if batch * ladder.context <= FILL_SECONDS * rate and batch * 2048 <= room
        ]
        return max(fits, default=0)

    def contenders(self, name: str) -> list[Peer]:
        """All that were not measured yet or reached half of the best."""
        best = max((peer.rate(name) or 0.0 for peer in self.living()), default=0.0)
        return [peer for peer in self.living() if peer.rate(name) is None or peer.rate(name) >= best / 2]

    def living(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.gone is None]

    def end(self) -> None:
        for peer in self.peers:
            if hasattr(peer, "_process"):
                peer.end()

    def _descend(self, ladder: Ladder, filled: dict[str, int], runs: int) -> None:
        """`filled` says how many sequences each peer begins with."""
        for peer in self.living():
            if filled[peer.name]:
                self._ask(peer, None, {"op": "fill", "batch": filled[peer.name], "context": ladder.context})
        for batch, steps in ladder.batches:
            for peer in self.living():
                if filled[peer.name] >= batch:
                    self._ask(peer, None, {"op": "shrink", "batch": batch})
            for index in range(runs):
                taking_part = [peer for peer in self.living() if filled[peer.name] >= batch]
                message = {"op": "decode", "tokens": steps}
                self._round(f"decode_{batch}{ladder.suffix}", message, index, taking_part)
        for peer in self.living():
            if filled[peer.name]:
                self._ask(peer, None, {"op": "shrink", "batch": 0})

    def _round(self, name: str, message: dict[str, object], index: int, peers: list[Peer]) -> None:
        """One question to all, in an order that changes: nobody is always first."""
        first = index % len(peers) if peers else 0
        self.probes.setdefault(name, []).append(self.ceilings.measure())
        for peer in peers[first:] + peers[:first]:
            before = peer.figures.get(name)
            expected = before[-1]["seconds"] if before else 0.0
            if expected > MOST_REPEATED or time.monotonic() + expected > self.deadline:
                self.left_out.append(f"{peer.name} {name}, run {index + 1}: for time")
            else:
                self._ask(peer, name, message)

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


# ---- the command


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
    parser.add_argument("--minutes", type=float, default=33.0, help="for everything, loading included")
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
    ceilings = Ceilings.build(given.work, given.threads)
    return Session(peers, given.threads, time.monotonic() + given.minutes * 60, ceilings)


def report(session: Session, load_before: float) -> dict[str, object]:
    """Everything of the session, for the JSON."""
    figures = {peer.name: medians(peer) for peer in session.peers if peer.figures}
    others = {name: rows for name, rows in figures.items() if name != OURS}
    machine = {name: Rates.middle(probes) for name, probes in session.probes.items()}
    rates = Rates.middle([probe for probes in session.probes.values() for probe in probes] or [Rates(0.0, 0.0, 0.0)])
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {
            "processor": processor(),
            "threads": session.threads,
            "load_average": [load_before, os.getloadavg()[0]],
            "ceilings": {**asdict(rates), "instruction": rates.instruction},
        },
        "medians": figures,
        "ratios": ratios(figures.get(OURS, {}), others),
        "shares": {name: shares(rows, machine) for name, rows in figures.items()},
        "ceilings": {name: asdict(rates) for name, rates in machine.items()},
        "gone": {peer.name: peer.gone for peer in session.peers if peer.gone},
        "left_out": session.left_out,
        "runs": {peer.name: peer.figures for peer in session.peers},
    }


def main() -> int:
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no peer is left behind
    session = make_session(given)
    load_before = os.getloadavg()[0]
    try:
        session.load()
        for part in given.parts:
            getattr(session, part)(given.runs)
    finally:
        session.end()
    full = report(session, load_before)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(full, indent=1) + "\n")
    names = [peer.name for peer in session.peers if peer.figures]
    print(table(names, full["medians"], full["ratios"], full["shares"].get(OURS, {})))
    print(json.dumps(full["machine"]))
    for name, why in full["gone"].items():
        print(f"{name}: not measured: {why}")
    for text in session.left_out:
        print(f"left out: {text}")
    return 0 if not full["gone"] else 1


if __name__ == "__main__":
    sys.exit(main())
