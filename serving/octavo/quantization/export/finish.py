"""The end of a run: what is behind the last layer is measured, and the folder is put together.

Runs once all layers are made. Embedding and head go by in parts.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from octavo.models.config import ModelConfig
from octavo.quantization.calibrate import CalibrationText
from octavo.quantization.export.evaluation import Head, Measured, measure
from octavo.quantization.export.folder import copy_companions, write_config, write_shards
from octavo.quantization.export.layer_weights import layer_products, read_float
from octavo.quantization.export.options import Options
from octavo.quantization.export.report import write_report
from octavo.quantization.export.scheme_names import quantization_config
from octavo.quantization.export.state import State
from octavo.quantization.export.streams import Stream
from octavo.quantization.files import read_json
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.safetensors_file import list_entries
from octavo.quantization.scheme import row_slices

FLOAT = "float"  # the stream of the float model, on held-out text
FLOAT_CACHE = "float cache"  # what is written, but with its cache in float
HEAD_VALUES = 1 << 22  # of the head in memory at once


@dataclass(frozen=True)
class Outcome:
    """What the checkpoint lost."""

    exact: Measured
    variants: dict[str, Measured]  # the last one was written
    float_cache: Measured | None = None  # what was written, but with its cache in float


class Finish:
    """Of one run whose layers are all made."""

    def __init__(
        self, options: Options, config: ModelConfig, text: CalibrationText, source: TensorSource, state: State
    ) -> None:
        self._options = options
        self._config = config
        self._text = text
        self._source = source
        self._state = state

    def run(self) -> Outcome:
        outcome = self.measure()
        self.write(outcome)
        return outcome

    def _stream(self, name: str) -> Stream:
        return self._state.stream(name, width=self._config.hidden_size)

    def measure(self) -> Outcome:
        config = self._config
        norm = read_float(self._source, config.family.norm, (config.hidden_size,))
        calibration = sum(map(len, self._text.calibration))
        streams = {one.name: self._stream(one.name).after(calibration) for one in self._options.variants()}
        others = [FLOAT, FLOAT_CACHE] if self._options.compares_caches else [FLOAT]
        measured = measure(
            Head(norm, config.rms_norm_eps, self._head_parts),
            {**{name: self._stream(name) for name in others}, **streams},
            self._text.held_out,
            exact=FLOAT,
        )
        exact, float_cache = measured.pop(FLOAT), measured.pop(FLOAT_CACHE, None)
        return Outcome(exact, measured, float_cache)

    def _head_parts(self) -> Iterator[Tensor]:
        """The head [V, H] in parts of its rows, as float32."""
        config = self._config
        name = config.family.embedding if config.tie_word_embeddings else f"{config.family.head}.weight"
        shape = (config.vocab_size, config.hidden_size)
        for rows in row_slices(shape, values=HEAD_VALUES):
            weight = self._source.take(name, shape=shape)
            part = weight[rows].to(torch.float32, copy=True)
            del weight
            self._source.release()
            yield part

    def write(self, outcome: Outcome) -> None:
        """Put the folder together in the state's, then move it to its place."""
        options = self._options
        fresh = options.state / "out"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        self._source.release()
        write_shards(fresh, self._places(), max_bytes=options.max_shard_bytes)
        entry = quantization_config(options.scheme, ignore=self._ignored(), cache_per_head=options.cache_per_head)
        write_config(fresh, dict(read_json(options.model / "config.json", name="config.json")), entry)
        copy_companions(options.model, fresh)
        self._report(fresh, outcome)
        if options.out.is_dir():
            options.out.rmdir()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        fresh.rename(options.out)

    def _places(self) -> dict[str, Path]:
        """The file that each tensor of the result is in now: embedding and head stay as they are."""
        config, source = self._config, self._source
        names = [config.family.embedding, config.family.norm, f"{config.family.head}.weight"]
        if config.tie_word_embeddings:
            names.pop()
        homes = {name: source.folder / file_name for file_name, held in source.files().items() for name in held}
        places = {name: homes[name] for name in names}
        for index in range(config.num_layers):
            path = self._state.layer_file(index)
            places.update({entry.name: path for entry in list_entries(path)})
        return places

    def _report(self, folder: Path, outcome: Outcome) -> None:
        text = self._text
        about = {
            "model": self._options.model.resolve().name,
            "architecture": self._config.architecture,
            "scheme": self._options.scheme.name,
            "calibration_sequences": len(text.calibration),
            "calibration_tokens": sum(map(len, text.calibration)),
            "held_out_sequences": len(text.held_out),
            "held_out_tokens": sum(map(len, text.held_out)),
        }
        write_report(
            folder,
            about=about,
            exact=outcome.exact,
            variants=outcome.variants,
            float_cache=outcome.float_cache,
            layers=self._state.layers,
            float_units=self._state.float_units or {},
        )

    def _ignored(self) -> list[str]:
        """Linears that are not quantised, by name."""
        names = [self._config.family.head]
        for index in range(self._config.num_layers):
            kept = self._state.kept_float(index)
            products = layer_products(self._config, index)
            names += [one.name for one in products if one.unit == FLOAT or one.unit in kept]
        return names
