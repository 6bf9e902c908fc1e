"""A tiny model in a folder and runners on it; closed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models.tiny_checkpoints import family_configs, make_model, save_model
from octavo.engine.interface import Runner
from octavo.engine.load import load_runner
from octavo.settings import Settings

LoadRunner = Callable[..., Runner]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model(family_configs()["llama2"]), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def load(tiny_folder: Path) -> Iterator[LoadRunner]:
    """Load a runner with environment variables on top of small defaults."""
    runners: list[Runner] = []

    def make(folder: Path = tiny_folder, **environ: str) -> Runner:
        small = {
            "MAX_SEQ_LEN": "256",
            "MAX_DEC_LEN": "128",
            "BATCH_SIZE": "4",
            "KERNELS": "reference",
            "NUM_THREADS": "1",
        }
        settings = Settings.from_environ({"MODEL_DIR": str(folder), **small, **environ})
        runners.append(load_runner(settings, lambda stage, fraction: None))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()
