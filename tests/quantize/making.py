"""Tiny float checkpoints with a tokenizer and calibration text, and a short way to make an int8 one of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from models.tiny_checkpoints import VOCAB, family_configs, make_model, save_model
from octavo.cli.main import main

HELD_TEXT = [1, *random.Random(9).choices(range(3, VOCAB), k=60)]  # nothing was calibrated on it


def write_float(folder: Path, *, family: str = "llama2", model: Any = None) -> Any:
    """A float checkpoint with a tokenizer of the words t0, t1, …; returns the transformers model."""
    model = make_model(family_configs()[family]) if model is None else model
    save_model(model, folder)
    return with_tokenizer(folder, model)


def with_tokenizer(folder: Path, model: Any) -> Any:
    library = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCAB)}, unk_token="t0"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "t1", "eos_token": "t2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return model


def write_text(path: Path, *, count: int = 30, length: int = 48, seed: int = 0) -> Path:
    """A jsonl of random words."""
    rng = random.Random(seed)
    lines = [" ".join(f"t{rng.randrange(3, VOCAB)}" for _ in range(length)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def make(model: Path, *flags: str, scheme: str = "a8w8c8", text: Path | None = None, out: str = "made") -> Path:
    """Run `octavo quantize`; the made folder."""
    target = model.parent / out
    source = str(text or write_text(model.parent / "text.jsonl"))
    code = main(["quantize", str(model), "--scheme", scheme, "--calibration", source, "--out", str(target),
                 "--quiet", *flags])  # fmt: skip
    assert code == 0
    return target


def report(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return value


def relative(made: torch.Tensor, exact: torch.Tensor) -> float:
    return float((made - exact).norm() / exact.norm())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
