"""A start with a model that cannot be served: one clear error, never ready meanwhile, nothing left behind."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest

from models.tiny_checkpoints import family_configs, make_model, save_model
from octavo.quantization.formats.source import SINGLE
from quantization.format_fixtures import SMOOTH_QUANT, smooth_quant_linear, write_model
from quantization.test_malformed import Spoil, cut, index_entry, value
from quantize.making import with_tokenizer
from server.conftest import Server, make_server
from server.looking import looking
from server.test_start_stop import shared_memory

pytestmark = pytest.mark.server

Q = "model.layers.0.self_attn.q_proj"
START_SECONDS = 60.0  # ten times what it takes: an error must not wait for a deadline
CASES: dict[str, tuple[str, Spoil, str]] = {
    "cut off": ("int8", cut(SINGLE, keep=0.9), "model.safetensors: cannot be read as safetensors"),
    "a scale is NaN": ("int8", value(f"{Q}.scale", float("nan")), f"{Q}.scale: every scale must be finite"),
    "the index leaves the folder": (
        "sharded",
        index_entry(f"{Q}.weight", "../model.safetensors"),
        "model.safetensors.index.json: '../model.safetensors' is not the name of a safetensors file in the folder",
    ),
    "half a tokenizer": ("int8", cut("tokenizer.json", keep=0.5), "tokenizer.json: "),
    "no tokenizer": ("int8", lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
}


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("int8", "sharded")}
    with_tokenizer(folders["int8"], write_model(folders["int8"], smooth_quant_linear, SMOOTH_QUANT))
    model = make_model(family_configs()["llama2"])
    save_model(model, folders["sharded"], max_shard_size="100KB")
    with_tokenizer(folders["sharded"], model)
    return folders


@dataclass
class Onlooker:
    """What readiness says while a server starts, and the name of its shared memory."""

    server: Server
    statuses: set[int] = field(default_factory=set)
    prefixes: set[str] = field(default_factory=set)

    def look(self) -> None:
        self.statuses.add(self._status())
        with suppress(OSError, ValueError):
            self.prefixes.add(json.loads((self.server.run_dir / "node.json").read_text())["shm_prefix"])

    def _status(self) -> int:
        try:
            return int(urlopen(f"{self.server.health}/v2/health/ready", timeout=5).status)
        except HTTPError as error:
            return error.code
        except (URLError, OSError):
            return 0


def running(run_dir: Path) -> list[int]:
    """Processes that were started with this run directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"RUN_DIR={run_dir}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_spoilt_model_stops_the_start_with_one_error(masters: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, spoil, words = CASES[case]
    folder = Path(shutil.copytree(masters[kind], tmp_path / kind))
    spoil(folder)
    server = make_server(tmp_path / "run", MODEL_DIR=str(folder))
    onlooker = Onlooker(server)
    with looking(onlooker.look):
        result = server.script("start_server.sh", timeout=START_SECONDS)
    assert result.returncode == 2
    said = result.stdout + result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("octavo: error: ")]
    assert len(errors) == 1, said
    assert words in errors[0]
    assert said.count(errors[0].removeprefix("octavo: error: ")) == 1, said
    assert "Traceback" not in said
    assert 503 in onlooker.statuses
    assert 200 not in onlooker.statuses
    assert not running(server.run_dir)
    assert not (server.run_dir / "node.pid").exists()
    assert len(onlooker.prefixes) == 1
    assert not any(map(shared_memory, onlooker.prefixes))


def test_a_spoilt_model_is_read_once(masters: dict[str, Path], tmp_path: Path) -> None:
    """The engine is not started again for what would end the same way, and its log has no traceback."""
    folder = Path(shutil.copytree(masters["int8"], tmp_path / "int8"))
    value(f"{Q}.scale", 0.0)(folder)
    server = make_server(tmp_path / "run", MODEL_DIR=str(folder))
    assert server.script("start_server.sh", timeout=START_SECONDS).returncode == 2
    log = (server.run_dir / "log" / "engine.log").read_text()
    assert log.count("octavo: error: ") == 1
    assert "Traceback" not in log
    assert "starting it again" not in (server.run_dir / "log" / "node.log").read_text()
