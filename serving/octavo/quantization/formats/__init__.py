"""Checkpoint formats, one file each. `open_reader` picks the one that a `quantization_config` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.compressed_tensors import CompressedTensorsReader
from octavo.quantization.formats.float_weights import FloatReader
from octavo.quantization.formats.reader import Reader, ReaderInputs

READERS: dict[str, Callable[[ReaderInputs], Reader]] = {
    "none": FloatReader,
    "compressed-tensors": CompressedTensorsReader,
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
    "fp8": "fp8",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "smooth_quant": "LMDeploy smooth_quant",
    "torchao": "torchao (pickled tensors)",
}


def open_reader(inputs: ReaderInputs) -> Reader:
    """The reader of this checkpoint. Raises CheckpointError for a format that is not served, by its name."""
    method = quant_method(inputs.quantization)
    if method in READERS:
        return READERS[method](inputs)
    served = ", ".join(name for name in READERS if name != "none")
    raise CheckpointError(
        f"quantization_config: {REFUSED.get(method, repr(method))} checkpoints are not supported "
        f"(supported: float weights, {served})"
    )


def quant_method(quantization: Mapping[str, object] | None) -> str:
    """The name under which a `quantization_config` goes; "none" for float checkpoints."""
    if not quantization:
        return "none"
    method = quantization.get("quant_method")
    if method is None and "config_groups" in quantization:  # written before the key existed
        return "compressed-tensors"
    if not isinstance(method, str):
        raise CheckpointError(f"quantization_config.quant_method: must be a text, got {type(method).__name__}")
    return method
