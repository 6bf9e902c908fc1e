"""The whole server on a card over an 8B shape with random weights: the engine's own process behind a front end in this
one, then all of it through gateway and Triton. Each where what it needs is installed (see docs/gpu.md).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpu.server_checks import InProcess, OverHttp, ServerChecks, front_end, gateway
from gpu.steps import ROOM_FOR_8B

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

from gpu_model import TINY, make_model
from gpu_server import NEEDED_BY_FRONT_END, absent, add_tokenizer, missing


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An 8B shape, or a tiny one on a card that has no room for it."""
    gc.collect()
    torch.cuda.empty_cache()  # the engines are other processes
    if torch.cuda.mem_get_info()[0] >= ROOM_FOR_8B:
        made: Path = request.getfixturevalue("large_folder")
    else:
        made = make_model(tmp_path_factory.mktemp("served"), TINY)
    add_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def in_process(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    lacking = absent(NEEDED_BY_FRONT_END)
    if lacking:
        pytest.skip(f"the front end needs what is not installed here: {' '.join(lacking)}")
    with front_end(request.getfixturevalue("folder"), tmp_path_factory.mktemp("run"), DEVICE="cuda") as ready:
        yield ready


@pytest.fixture(scope="module")
def over_http(request: pytest.FixtureRequest) -> Iterator[OverHttp]:
    lacking = missing()
    if lacking:
        pytest.skip(f"the server needs what is not installed here: {' '.join(lacking)}")
    with gateway(request.getfixturevalue("folder"), device="cuda") as ready:
        yield ready


class TestFrontEndAndEngine(ServerChecks):
    """Over the ZeroMQ link, without Triton."""

    @pytest.fixture
    def service(self, in_process: InProcess) -> InProcess:
        return in_process

    def test_the_engine_runs_on_the_card(self, service: InProcess) -> None:
        assert service.op("info")["model"]["kernels"] == "gpu"


class TestThroughTriton(ServerChecks):
    """node, tritonserver and gateway."""

    @pytest.fixture
    def service(self, over_http: OverHttp) -> OverHttp:
        return over_http
