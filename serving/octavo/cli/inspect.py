"""`octavo inspect DIR`: what a checkpoint holds, how it would be served, what that takes, and what is wrong with it.

Reads the model just as a start does, every check included, but keeps no weight longer than it takes to look at it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from octavo.engine.backend import device_of, kernels_for
from octavo.engine.kv_cache import available_memory, cache_specs, count_blocks
from octavo.kernels.choose import NoSuchKernels
from octavo.kernels.interface import BLOCK, FLOAT, ActivationFormat, Kernels, multiplies_fp8
from octavo.kernels.reference.cache import block_bytes
from octavo.models.config import ModelConfig, load_config
from octavo.models.loader import LoadOptions, load_decoder
from octavo.parallel.group import make_group
from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.reader import ReaderInputs
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.load_report import MIB, LoadReport
from octavo.quantization.scheme import FLOAT_TYPES, CacheScheme
from octavo.settings import Settings, SettingsError, with_overrides


@dataclass(frozen=True)
class Weighed:
    """A product whose weights were looked at and dropped."""

    in_features: int
    out_features: int
    format: ActivationFormat
    nbytes: int


class WeighingKernels:
    """Stands in for a backend while a model is read: packs nothing, multiplies nothing."""

    name = "none"
    device = torch.device("cpu")
    multiplies_fp8 = True  # whatever the reader keeps

    def pack_int8(
        self,
        weight: Tensor,
        scale: Tensor,
        *,
        format: ActivationFormat,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Weighed:
        return Weighed(weight.shape[1], weight.shape[0], format, weight.numel())

    def pack_fp8(
        self, weight: Tensor, scale: Tensor, *, format: ActivationFormat, bias: Tensor | None = None
    ) -> Weighed:
        return Weighed(weight.shape[1], weight.shape[0], format, weight.numel())

    def pack_float(self, weight: Tensor, *, bias: Tensor | None = None) -> Weighed:
        return Weighed(weight.shape[1], weight.shape[0], FLOAT, weight.numel() * weight.element_size())


@dataclass(frozen=True)
class Fit:
    """How much of the machine a model takes."""

    available_bytes: int
    cache_bytes_per_token: int
    cache_tokens: int  # 0: it does not fit
    problem: str = ""


@dataclass(frozen=True)
class Inspection:
    """All that `octavo inspect` says."""

    config: ModelConfig
    report: LoadReport
    fit: Fit

    def to_json(self) -> dict[str, object]:
        fit = {item.name: getattr(self.fit, item.name) for item in fields(self.fit)}
        config = {"architecture": self.config.architecture, "context_length": self.config.context_length}
        return {**config, **self.report.to_json(), "fit": fit}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `octavo inspect`."""
    parser.add_argument("folder", metavar="DIR", help="model folder")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--weight-quant", choices=("auto", "none", "wint8", "a8w8"), help="instead of WEIGHT_QUANT")
    parser.add_argument("--float-cache", action="store_true", help="as with USE_CACHE_KV_INT8=0")


def run(arguments: argparse.Namespace) -> int:
    """Print the report. Exit code 1: the folder cannot be served, with one line that says why."""
    overrides: dict[str, object] = {"model_dir": arguments.folder}
    if arguments.weight_quant is not None:
        overrides["weight_quant"] = arguments.weight_quant
    if arguments.float_cache:
        overrides["use_cache_kv_int8"] = False
    try:
        found = inspect(Path(arguments.folder), with_overrides(overrides))
    except (CheckpointError, SettingsError, NoSuchKernels) as error:
        print(json.dumps({"error": str(error)}) if arguments.json else f"octavo: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found.to_json(), indent=1) if arguments.json else "\n".join(_lines(found)))
    return 0


def inspect(folder: Path, settings: Settings) -> Inspection:
    """Read the whole model once and measure what writing its weights in 8 bits costs. Raises CheckpointError."""
    config = load_config(folder, config_path=settings.model_config_path)
    card = _card(settings, config)
    inputs = ReaderInputs(
        source=TensorSource(folder),
        quantization=config.quantization,
        weight_quant=settings.weight_quant,
        head_quant=settings.head_quant,
        float_dtype=FLOAT_TYPES.get(settings.dtype),
        measure=True,
        keep_fp8=card is not None and multiplies_fp8(card),
    )
    report = LoadReport()
    device = torch.device("cpu") if card is None else card.device
    decoder = load_decoder(
        config,
        inputs,
        cast(Kernels, WeighingKernels()),
        make_group(1),
        options=LoadOptions(max_positions=1, int8_cache=settings.use_cache_kv_int8),
        progress=lambda stage, fraction: None,
        report=report,
    )
    return Inspection(
        config, report, _fit(settings, config, decoder.cache_schemes, device=device, num_bytes=report.num_bytes)
    )


def _card(settings: Settings, config: ModelConfig) -> Kernels | None:
    """The kernels of the card that the server would use here; None: it would run on the processor."""
    if device_of(settings).type == "cpu":
        return None
    kernels = kernels_for(settings, config)
    return None if kernels.device.type == "cpu" else kernels


def _fit(
    settings: Settings, config: ModelConfig, schemes: Sequence[CacheScheme], *, device: torch.device, num_bytes: int
) -> Fit:
    """What the server would do here if it started now: weights first, then the cache in its share of the rest."""
    float_type = FLOAT_TYPES[config.dtype if settings.dtype == "auto" else settings.dtype]
    dtype = torch.int8 if settings.use_cache_kv_int8 else float_type
    per_block = sum(block_bytes(spec) for spec in cache_specs(config, schemes, dtype=dtype, device=torch.device("cpu")))
    available = available_memory(device)
    left = max(0, available - num_bytes)
    try:
        blocks = count_blocks(
            settings,
            context_length=config.context_length,
            block_bytes=per_block,
            available_bytes=left,
            is_host=device.type == "cpu",
        )
    except SettingsError as error:
        return Fit(available, per_block // BLOCK, 0, str(error))
    problem = "" if left else "the weights do not fit into the free memory"
    return Fit(available, per_block // BLOCK, blocks * BLOCK if left else 0, problem)


def _lines(found: Inspection) -> list[str]:
    report, fit, config = found.report, found.fit, found.config
    lines = [report.table(), "", f"{config.architecture}, context {config.context_length}; {report.summary()}"]
    total = report.num_bytes + fit.cache_tokens * fit.cache_bytes_per_token
    lines.append(f"memory: weights {report.num_bytes / MIB:.1f} MiB, cache {fit.cache_bytes_per_token} bytes a token")
    lines.append(f"here: {fit.available_bytes / MIB:.0f} MiB free; {fit.cache_tokens} tokens of cache fit")
    lines.append(f"in all: {total / MIB:.1f} MiB")
    return [*lines, f"does not fit: {fit.problem}"] if fit.problem else lines
