"""What the server shows on a card (tests/gpu/test_server.py), walked through without one, at toy sizes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu.server_checks import InProcess, OverHttp, ServerChecks, front_end, gateway

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

from gpu_model import TOY, make_model
from gpu_server import NEEDED_BY_FRONT_END, absent, add_tokenizer, missing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_model(tmp_path_factory.mktemp("served"), TOY, device="cpu")
    assert add_tokenizer(made) == TOY.vocab
    return made


@pytest.fixture(scope="module")
def in_process(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    lacking = absent(NEEDED_BY_FRONT_END)
    if lacking:
        pytest.skip(f"the front end needs what is not installed here: {' '.join(lacking)}")
    small = {"DEVICE": "cpu", "KERNELS": "reference", "NUM_THREADS": "1", "BLOCK_BS": "2"}
    with front_end(folder, tmp_path_factory.mktemp("run"), **small) as ready:
        yield ready


@pytest.fixture(scope="module")
def over_http(folder: Path) -> Iterator[OverHttp]:
    lacking = missing()
    if lacking:
        pytest.skip(f"the server needs what is not installed here: {' '.join(lacking)}")
    with gateway(folder, device="cpu") as ready:
        yield ready


class TestFrontEndAndEngine(ServerChecks):
    @pytest.fixture
    def service(self, in_process: InProcess) -> InProcess:
        return in_process

    def test_the_engine_is_the_one_that_was_asked_for(self, service: InProcess) -> None:
        model = service.op("info")["model"]
        assert (model["kernels"], model["vocab_size"]) == ("reference", TOY.vocab)


@pytest.mark.server
class TestThroughTriton(ServerChecks):
    @pytest.fixture
    def service(self, over_http: OverHttp) -> OverHttp:
        return over_http
