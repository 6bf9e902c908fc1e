"""The files of a model folder: which may be opened, which are of a kind that is not read, and JSON read with limits.

Used by every process that looks into a model folder while it starts; imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.quantization.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20
QUANTIZE_AGAIN = "take the float original: WEIGHT_QUANT=wint8 or a8w8 quantises it while it loads"
FOREIGN = (  # how a file's name ends, what it is, what to do
    ((".bin", ".pt", ".pth", ".ckpt", ".pkl"), "is a pickle, which can run code when it is opened", "safetensors"),
    ((".pdparams",), "is a pickle of Paddle, which can run code when it is opened", "safetensors"),
    ((".pdmodel", ".pdiparams"), "is a Paddle static graph, which is not supported", "the Hugging Face folder"),
    ((".gguf", ".ggml"), "is a GGUF file, which is not supported", "the float original"),
    ((".onnx",), "is an ONNX graph, which is not supported", "the Hugging Face folder"),
    ((".engine", ".plan"), "is a TensorRT engine, which is not supported", "the Hugging Face folder"),
    ((".h5", ".msgpack"), "holds TensorFlow or Flax weights, which are not supported", "safetensors"),
)
ADVICE = {
    "safetensors": "convert the model to safetensors",
    "the Hugging Face folder": "serve the Hugging Face folder (config.json, safetensors, tokenizer)",
    "the float original": QUANTIZE_AGAIN,
}


def inside(folder: Path, name: str) -> Path:
    """The path of a file in the folder. Raises CheckpointError for a link that leads out of it.

    The hub's cache is the exception: its snapshots are links into the same repository's `blobs`.
    """
    path = folder / name
    root, real = folder.resolve(), path.resolve()
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{name}: is a link out of the model folder; put the file itself there")
    return path


def read_json(path: Path, *, name: str, max_bytes: int = MAX_JSON_BYTES) -> Mapping[str, Any]:
    """A file with one JSON object. Raises CheckpointError: too large, too deep, not JSON, not an object."""
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{name}: larger than {max_bytes} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{name}: cannot be read as JSON: nested too deeply") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{name}: cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{name}: must be a JSON object")
    return raw


def foreign_weights(folder: Path) -> str | None:
    """What the folder holds in place of safetensors, and what to do about it; None if nothing known."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return None
    for endings, what, advice in FOREIGN:
        for name in names:
            if name.endswith(endings):
                return f"{name} {what}; {ADVICE[advice]}"
    return None
