"""A run of smoothing, GPTQ and a budget for sensitive layers, killed at any place of its work: the same command goes on
from the last finished layer and ends in the same bits.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from models.tiny_checkpoints import BASE, make_model
from octavo.quantization.export import sweep
from quantize.killed import run_killed
from quantize.making import make, report, tensors, write_float, write_text

NUM_LAYERS = 3
NUM_THREADS = 2
FLAGS = ("--keep-float", "30", "--no-ablation")
EXPORT = "octavo.quantization.export"
# function, the call that kills, layers that are finished then; before it all layers are read once for their sensitivity
PLACES = {
    "while sensitivity is measured": (f"{EXPORT}.sweep:unit_errors", 2, 0),
    "before the first layer": (f"{EXPORT}.sweep:_Sweep._embedded", 2, 0),
    "between two layers": (f"{EXPORT}.sweep:read_layer", NUM_LAYERS + 2, 1),
    "while a layer is smoothed": (f"{EXPORT}.recipe:search_channels", 3, 1),
    "between two products of a layer": (f"{EXPORT}.recipe:round_gptq", 5, 1),
    "while rows behind a layer are written": (f"{EXPORT}.sweep:run_layer", 7, 1),
    "between the rows behind a layer and its file": (f"{EXPORT}.sweep:_Sweep._tensors", 2, 1),
    "between a layer's file and the notes of it": (f"{EXPORT}.state:State.save_notes", 3, 1),
    "while rows before a finished layer are removed": ("pathlib:Path.unlink", 3, 2),
    "while the report is written": (f"{EXPORT}.finish:write_report", 1, 3),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "float"
    write_float(folder, model=make_model(transformers.LlamaConfig(**{**BASE, "num_hidden_layers": NUM_LAYERS})))
    return folder


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    return write_text(model.parent / "text.jsonl")


@pytest.fixture(scope="module")
def whole(model: Path, text: Path) -> Path:
    """What a run makes that nobody disturbs."""
    with threads(NUM_THREADS):
        return make(model, *FLAGS, text=text, out="whole")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_anywhere_ends_in_the_same_bits(
    model: Path, text: Path, whole: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, count, num_finished = PLACES[place]
    out = f"cut {place}"
    arguments = ["quantize", str(model), "--scheme", "a8w8c8", "--calibration", str(text), "--quiet", *FLAGS]
    arguments += ["--out", str(model.parent / out)]
    assert run_killed(function, count, *arguments, num_threads=NUM_THREADS) == -signal.SIGKILL
    notes = model.parent / f"{out}.partial" / "notes.json"
    assert (json.loads(notes.read_text())["next_layer"] if notes.exists() else 0) == num_finished
    assert not (model.parent / out).exists()
    made_layers = _count(monkeypatch)
    with threads(1 if notes.exists() else NUM_THREADS):  # it takes as many as it had before
        cut = make(model, *FLAGS, text=text, out=out)
    assert len(made_layers) == NUM_LAYERS - num_finished
    assert report(cut) == report(whole)
    assert report(cut)["kept_float"]
    mine, theirs = tensors(cut), tensors(whole)
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)
    assert not notes.parent.exists()


def _count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each layer that is made from now on."""
    whole, made = sweep.make_layer, list[int]()

    def counted(*arguments: Any, **named: Any) -> Any:
        made.append(len(made))
        return whole(*arguments, **named)

    monkeypatch.setattr(sweep, "make_layer", counted)
    return made
