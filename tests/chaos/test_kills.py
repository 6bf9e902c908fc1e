"""kill -9 of any one process with 32 streams in flight: twice in a row, and once more while it recovers.

Streams whose connection lives go on by themselves; through the client library also those whose gateway died. All end
with the tokens and the text of an undisturbed run.
"""

from __future__ import annotations

import json
import queue
import time

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from chaos.conftest import House
from chaos.prober import probing
from chaos.scoreboard import Row
from chaos.streams import Crowd

pytestmark = pytest.mark.server

ENGINE_SECONDS, TRITON_SECONDS, GATEWAY_SECONDS = 5.0, 5.0, 2.0
LATE_SECONDS = 15.0


def kill(house: House, row: Row, name: str, *, bound: float) -> None:
    """Kill it and wait until all is well again, within the bound."""
    old = house.victim.signal(name)
    row.faults += 1
    row.recovery.append(house.victim.recover(name, old, seconds=30))
    assert row.recovery[-1] <= bound, f"{name} took {row.recovery[-1]:.1f} s"


def kill_while_recovering(house: House, row: Row, name: str, *, bound: float) -> None:
    """Kill it, and the one that comes next as soon as it is there; then the bound holds again."""
    first = house.victim.signal(name)
    house.victim.wait_reborn(name, first, seconds=20)
    second = house.victim.signal(name)
    row.faults += 2
    row.recovery.append(house.victim.recover(name, second, seconds=30))
    assert row.recovery[-1] <= bound, f"{name} took {row.recovery[-1]:.1f} s"


def go_on(crowd: Crowd) -> None:
    """Tokens come again, and most streams are still there for the next fault."""
    crowd.wait_tokens(100)
    assert crowd.num_in_flight >= len(crowd.streams) / 2


@pytest.mark.parametrize(
    ("name", "bound"), [("engine", ENGINE_SECONDS), ("stub", TRITON_SECONDS), ("triton", TRITON_SECONDS)]
)
def test_kill(house: House, row: Row, name: str, bound: float) -> None:
    load = float(house.victim.health()["model"]["load_seconds"])
    with house.ordeal(row, late_seconds=LATE_SECONDS) as crowd:
        kill(house, row, name, bound=bound + load)
        go_on(crowd)
        kill_while_recovering(house, row, name, bound=bound + load)


def test_kill_gateways(house: House, row: Row) -> None:
    """One of two, then both at once, twice."""
    with house.ordeal(row, late_seconds=LATE_SECONDS, through_client=True, cuts=True) as crowd:
        kill(house, row, "gateway-1", bound=GATEWAY_SECONDS)
        go_on(crowd)
        for _ in range(2):
            old = {name: house.victim.signal(name) for name in house.victim.gateways}
            row.faults += len(old)
            began = time.monotonic()
            crowd.wait_tokens(100, seconds=20)
            row.recovery.append(time.monotonic() - began)
            for name, pid in old.items():
                house.victim.wait_reborn(name, pid, seconds=5)
        assert max(row.recovery) <= GATEWAY_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bound"), [("engine", ENGINE_SECONDS), ("stub", TRITON_SECONDS), ("triton", TRITON_SECONDS)]
)
def test_kill_again_and_again(house: House, row: Row, name: str, bound: float) -> None:
    """Four recoveries on end: requests run alone for a while, and all of them go on.

    A short request ends well between the second and the third: five deaths without one are a crash loop, and the server
    would end.
    """
    load = float(house.victim.health()["model"]["load_seconds"])
    with house.ordeal(row, late_seconds=4 * LATE_SECONDS) as crowd:
        for number in range(4):
            kill(house, row, name, bound=bound + load)
            if number == 1:
                house.victim.serve_one()
            crowd.wait_tokens(20)
            assert crowd.num_in_flight >= len(crowd.streams) / 2
        kill_while_recovering(house, row, name, bound=bound + load)


@pytest.mark.parametrize("name", ["triton", "stub"])
def test_grpc_clients_of_a_dead_triton(house: House, row: Row, name: str) -> None:
    """A raw stream ends with an error at once; through our client it goes on."""
    server = house.victim.server
    reference = house.reference[:8]
    failed: queue.Queue = queue.Queue()
    with (
        probing(server, row),
        Crowd(f"grpc://{server.grpc}", count=8, num_tokens=house.num_tokens, through_client=True) as crowd,
        grpcclient.InferenceServerClient(server.grpc) as raw,
    ):
        raw.start_stream(lambda result, error: failed.put(error) if error is not None else None)
        tensor = grpcclient.InferInput("IN", [1], "BYTES")
        body = {"text": "hello, llm", "req_id": "raw", "max_dec_len": 7900, "min_dec_len": 7900}
        tensor.set_data_from_numpy(np.array([json.dumps([body])], dtype=np.object_))
        raw.async_stream_infer("model", [tensor], request_id="raw")
        crowd.wait_all_started()
        kill(house, row, name, bound=TRITON_SECONDS)
        assert "StatusCode" in str(failed.get(timeout=2))
        crowd.wait_end()
        raw.stop_stream(cancel_requests=True)
    crowd.judge(row, reference, late_seconds=LATE_SECONDS)
    house.victim.wait_idle()
    row.check()
