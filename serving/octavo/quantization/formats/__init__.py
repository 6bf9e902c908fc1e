"""Checkpoint formats, one file each. `open_reader` picks the one that a `quantization_config` names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from octavo.quantization.errors import CheckpointError
from octavo.quantization.files import QUANTIZE_AGAIN, inside, read_json
from octavo.quantization.formats.absmax_json import AbsmaxReader, has_absmax_files
from octavo.quantization.formats.compressed_tensors import CompressedTensorsReader
from octavo.quantization.formats.float_weights import FloatReader
from octavo.quantization.formats.fp8 import Fp8Reader
from octavo.quantization.formats.gptq import GptqReader
from octavo.quantization.formats.reader import Reader, ReaderInputs
from octavo.quantization.formats.smooth_quant import SmoothQuantReader

LOG = logging.getLogger(__name__)
ABSMAX = "act_scales.json + weight_scales.json"
GPTQ_CONFIG = "quantize_config.json"  # where GPTQ's tools wrote what config.json did not say
READERS: dict[str, Callable[[ReaderInputs], Reader]] = {
    "none": FloatReader,
    "compressed-tensors": CompressedTensorsReader,
    "fp8": Fp8Reader,
    "gptq": GptqReader,
    "smooth_quant": SmoothQuantReader,
    ABSMAX: AbsmaxReader,
}

REFUSED = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ (4 bit)",
    "bitsandbytes": "bitsandbytes",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "fbgemm_fp8": "FBGEMM fp8",
    "gguf": "GGUF",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "torchao": "torchao (pickled tensors)",
}


def open_reader(inputs: ReaderInputs) -> Reader:
    """The reader of this checkpoint. Raises CheckpointError for a format that is not served, by its name."""
    if inputs.quantization is None and (inputs.source.folder / GPTQ_CONFIG).is_file():
        inputs = replace(inputs, quantization=_gptq_config(inputs.source.folder))
    method = quant_method(inputs.quantization, inputs.source.folder)
    if method != "none" and inputs.weight_quant != "auto":
        LOG.warning("WEIGHT_QUANT=%s has no effect: the checkpoint is quantised already", inputs.weight_quant)
    if method in READERS:
        return READERS[method](inputs)
    served = ", ".join(name for name in READERS if name != "none")
    raise CheckpointError(
        f"quantization_config: {REFUSED.get(method, repr(method))} checkpoints are not supported "
        f"(supported: float weights, {served}); {QUANTIZE_AGAIN}"
    )


def quant_method(quantization: Mapping[str, object] | None, folder: Path) -> str:
    """The name under which a `quantization_config` goes; "none" for float checkpoints."""
    method = (quantization or {}).get("quant_method")
    if method is None and has_absmax_files(folder):
        return ABSMAX
    if not quantization:
        return "none"
    if method is None and "config_groups" in quantization:  # written before the key existed
        return "compressed-tensors"
    if method is None and ("load_in_8bit" in quantization or "load_in_4bit" in quantization):
        return "bitsandbytes"
    if not isinstance(method, str):
        raise CheckpointError(f"quantization_config.quant_method: must be a text, got {type(method).__name__}")
    return method


def _gptq_config(folder: Path) -> Mapping[str, object]:
    config = read_json(inside(folder, GPTQ_CONFIG), name=GPTQ_CONFIG)
    return {"quant_method": "awq" if "zero_point" in config else "gptq", **config}
