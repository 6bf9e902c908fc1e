"""The command: refusals in one line, calibration text in every form, going on after a kill."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import rich.progress
import torch
import transformers

from models.tiny_checkpoints import BASE, edit_tensors, make_model
from octavo.cli.main import main
from octavo.models.config import load_config
from octavo.quantization.calibrate import read_text, split
from octavo.quantization.errors import CheckpointError
from octavo.quantization.export import sweep
from octavo.quantization.export.layer_weights import read_layer, write_layer
from octavo.quantization.export.options import Options
from octavo.quantization.export.scheme_names import parse_scheme
from octavo.quantization.formats.source import TensorSource
from octavo.text.tokenizer import Tokenizer
from quantize.killed import environ
from quantize.making import make, report, tensors, write_float, write_text

TEMPLATE = "{% for m in messages %}t7 {{ m.content }} t2 {% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "float"
    write_float(folder)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that must fail."""
    assert main(["quantize", *map(str, arguments), "--quiet"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--scheme", "w4a16"], "--scheme 'w4a16' is not known"),
        (["--scheme", "w8a16-g128"], "64 inputs are no multiple of the group 128"),
        (["--calibration", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--keep-float", "120"], "must be a percentage from 0 to 100"),
        (["--max-tokens", "9999"], "--max-tokens 9999: must be above 8, at most 512"),
        (["--samples", "1"], "--samples 1: must be at least 2"),
    ],
)
def test_bad_arguments(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    text = write_text(tmp_path / "text.jsonl")
    given = ["--scheme", "a8w8", "--calibration", text, "--out", tmp_path / "out", *flags]
    assert reason in refusal(capsys, model, *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 1: is not JSON"),
        ("[1]", 'line 1: must be an object with "text" or "messages"'),
        ('{"txt": "t5"}', 'line 1: needs "text"'),
        ('{"messages": [{"role": "user", "content": "t5"}]}', "has no chat template"),
        ('{"text": "t5 t6"}', "0 sequences of at least 8 tokens"),
    ],
)
def test_bad_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, reason: str) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(line + "\n")
    given = ["--scheme", "a8w8", "--calibration", text, "--out", tmp_path / "out"]
    assert reason in refusal(capsys, model, *given)


def test_models_that_cannot_be_made(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.jsonl")
    flags = ["--scheme", "a8w8", "--calibration", text, "--out"]
    assert "no such file" in refusal(capsys, tmp_path / "none", *flags, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "exists and is not empty" in refusal(capsys, model, *flags, tmp_path / "full")
    write_float(tmp_path / "float")
    made = make(tmp_path / "float", "--no-ablation", text=text)
    assert "is quantised already (compressed-tensors)" in refusal(capsys, made, *flags, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_values_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    folder = tmp_path / "float"
    write_float(folder)
    edit_tensors(folder, lambda stored: stored[name].fill_(float("nan")))
    text = write_text(tmp_path / "text.jsonl")
    flags = ["--scheme", "a8w8", "--calibration", text, "--out", tmp_path / "out"]
    assert f"{name}: has values that are not finite" in refusal(capsys, folder, *flags)
    assert not (tmp_path / "out").exists()


def test_smoothed_values_beyond_float16_are_refused(model: Path) -> None:
    config, source = load_config(model), TensorSource(model)
    weights = read_layer(source, config, 0)
    weights["input_norm"][3] = 70000.0  # float16 ends at 65504
    with pytest.raises(CheckpointError, match=r"input_layernorm.weight: its smoothed values do not fit into float16"):
        write_layer(config, 0, weights, {}, dtype_of=dict.fromkeys(source.names(), torch.float16))


def test_messages_go_through_the_template_and_long_texts_become_several(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    write_float(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    text = tmp_path / "text.jsonl"
    talk = {"messages": [{"role": "user", "content": "t9 t10"}, {"role": "assistant", "content": "t11"}]}
    text.write_text(json.dumps(talk) + "\n\n" + json.dumps({"text": " ".join(["t5"] * 25)}) + "\n")
    found = read_text(text, Tokenizer.load(folder), max_tokens=10)
    assert found == [[7, 9, 10, 2, 7, 11, 2], [5] * 10, [5] * 10, [5] * 5]


def test_held_out_text_is_not_calibrated_on() -> None:
    sequences = [[index] * 10 for index in range(20)]
    text = split(sequences, num_samples=10, seed=1)
    assert len(text.calibration) == 8
    assert len(text.held_out) == 2
    assert not {ids[0] for ids in text.calibration} & {ids[0] for ids in text.held_out}
    assert len(split(sequences[:2], num_samples=10, seed=0).held_out) == 1
    with pytest.raises(CheckpointError, match="two or more are needed"):
        split(sequences[:1], num_samples=10, seed=0)


def test_a_model_calibrates_on_its_own_text(tmp_path: Path) -> None:
    write_float(tmp_path / "float")
    made = make(tmp_path / "float", "--samples", "6", "--max-tokens", "24", "--no-ablation", text=Path("self"))
    assert report(made)["calibration_tokens"] > 0


def test_the_bar_tells_what_is_done_and_how_much_of_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_text(tmp_path / "text.jsonl")
    shown: list[tuple[str, float]] = []
    update = rich.progress.Progress.update

    def noted(bar: rich.progress.Progress, task: rich.progress.TaskID, **values: Any) -> None:
        update(bar, task, **values)
        shown.append((bar.tasks[task].description, bar.tasks[task].percentage))

    monkeypatch.setattr(rich.progress.Progress, "update", noted)
    command = ["quantize", model, "--scheme", "a8w8", "--calibration", text, "--keep-float", "30", "--no-ablation"]
    assert main([*map(str, command), "--out", str(tmp_path / "out")]) == 0
    assert shown == [
        ("sensitivity", 0), ("sensitivity", 50), ("layer 1 of 2", 0), ("layer 2 of 2", 50), ("measuring", 100),
    ]  # fmt: skip
    assert re.search(r"measuring .*100%", capsys.readouterr().err)


def test_a_killed_run_goes_on_and_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "float"
    write_float(folder)
    text = split(
        read_text(write_text(tmp_path / "text.jsonl"), Tokenizer.load(folder), max_tokens=64), num_samples=20, seed=0
    )
    whole = Options(folder, tmp_path / "whole", parse_scheme("a8w8c8"), "text")
    cut = Options(folder, tmp_path / "cut", parse_scheme("a8w8c8"), "text")
    sweep.quantize(whole, text, lambda stage, done: None)

    def stop(stage: str, done: float) -> None:
        if stage.startswith("layer 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.quantize(cut, text, stop)
    stages: list[str] = []
    sweep.quantize(cut, text, lambda stage, done: stages.append(stage))
    assert stages == ["layer 2 of 2", "measuring"]
    assert report(cut.out) == report(whole.out)
    mine, theirs = tensors(cut.out), tensors(whole.out)
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(theirs[name]) for name in mine)
    assert not cut.state.exists()


@pytest.mark.slow
def test_a_run_ended_by_sigkill_goes_on_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**BASE, "num_hidden_layers": 16})
    write_float(tmp_path / "float", model=make_model(config))
    text = write_text(tmp_path / "text.jsonl")
    whole = make(tmp_path / "float", text=text, out="whole")
    command = [sys.executable, "-m", "octavo.cli.main", "quantize", str(tmp_path / "float"), "--scheme", "a8w8c8"]
    command += ["--calibration", str(text), "--out", str(tmp_path / "cut"), "--quiet"]
    notes = tmp_path / "cut.partial" / "notes.json"
    env, silent = environ(num_threads=torch.get_num_threads()), subprocess.DEVNULL
    with subprocess.Popen(command, env=env, stdout=silent, stderr=silent) as process:
        while not notes.is_file() or json.loads(notes.read_text())["next_layer"] < 3:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    assert 3 <= json.loads(notes.read_text())["next_layer"] < 16
    cut = make(tmp_path / "float", text=text, out="cut")
    assert report(cut) == report(whole)
    mine, theirs = tensors(cut), tensors(whole)
    assert all(mine[name].equal(theirs[name]) for name in theirs)


def test_text_to_measure_on_may_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Path) -> None:
    held_out = write_text(tmp_path / "held_out.jsonl", count=7, length=20, seed=5)
    flags = ("--held-out", str(held_out), "--no-ablation")
    values = report(make(model, *flags, text=write_text(tmp_path / "text.jsonl"), out="with_held_out"))
    assert (values["calibration_sequences"], values["held_out_sequences"], values["held_out_tokens"]) == (30, 7, 140)
    held_out.write_text('{"text": "t5 t6"}\n')
    given = ["--scheme", "a8w8", "--calibration", write_text(tmp_path / "text.jsonl"), "--out", tmp_path / "out"]
    assert "--held-out: 0 sequences of at least 8 tokens; one or more is needed" in refusal(
        capsys, model, *given, "--held-out", held_out
    )
    assert "--held-out nowhere.jsonl: no such file" in refusal(capsys, model, *given, "--held-out", "nowhere.jsonl")


def test_a_run_with_other_options_starts_anew(tmp_path: Path) -> None:
    folder = tmp_path / "float"
    write_float(folder)
    text = split(
        read_text(write_text(tmp_path / "text.jsonl"), Tokenizer.load(folder), max_tokens=64), num_samples=20, seed=0
    )

    def stop(stage: str, done: float) -> None:
        if stage.startswith("layer 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.quantize(Options(folder, tmp_path / "out", parse_scheme("a8w8c8"), "text"), text, stop)
    stages: list[str] = []
    sweep.quantize(
        Options(folder, tmp_path / "out", parse_scheme("w8a16"), "text"), text, lambda stage, done: stages.append(stage)
    )
    assert stages[0] == "layer 1 of 2"


def test_large_models_are_sharded_with_an_index(tmp_path: Path) -> None:
    folder = tmp_path / "float"
    write_float(folder)
    text = split(
        read_text(write_text(tmp_path / "text.jsonl"), Tokenizer.load(folder), max_tokens=64), num_samples=20, seed=0
    )
    options = Options(folder, tmp_path / "out", parse_scheme("a8w8"), "text", max_shard_bytes=60_000, ablation=False)
    sweep.quantize(options, text, lambda stage, done: None)
    index = json.loads((options.out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in options.out.glob("*.safetensors"))
    assert len(files) > 1
    assert set(index["weight_map"].values()) == set(files)
    assert main(["inspect", str(options.out)]) == 0
