"""`quantize`: one walk through the layers makes the checkpoint and measures it.

Several streams of activations go through each layer: the float model's, and one for every variant of the recipe that
is compared. A layer and its streams are in memory, nothing else. After each layer the state is on disk, so a killed
run goes on where it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from octavo.models.config import ModelConfig, load_config
from octavo.models.rope import cos_sin_table
from octavo.quantization.calibrate import CalibrationText
from octavo.quantization.errors import CheckpointError
from octavo.quantization.export.evaluation import Head, Measured, measure
from octavo.quantization.export.folder import copy_companions, copy_tensors, write_config, write_shards
from octavo.quantization.export.layer_forward import Hooks, Rows, run_layer
from octavo.quantization.export.layer_weights import (
    Product,
    check_names,
    expand,
    layer_products,
    read_float,
    read_layer,
    write_layer,
)
from octavo.quantization.export.options import Options
from octavo.quantization.export.recipe import MadeLayer, make_layer
from octavo.quantization.export.report import write_report
from octavo.quantization.export.scheme_names import quantization_config
from octavo.quantization.export.sensitivity import choose_float, unit_errors
from octavo.quantization.export.state import State, fingerprint
from octavo.quantization.export.statistics import Recorder
from octavo.quantization.files import read_json
from octavo.quantization.formats.source import TensorSource

FLOAT = "float"
FLOAT_CACHE = "float cache"  # what is written, but with its cache in float
SENSITIVITY_ROWS = 4096  # tokens on which units are compared
Progress = Callable[[str, float], None]  # stage, fraction from 0 to 1


@dataclass(frozen=True)
class Outcome:
    """What the checkpoint lost."""

    exact: Measured
    variants: dict[str, Measured]  # the last one was written
    float_cache: Measured | None = None  # what was written, but with its cache in float


def check(options: Options) -> ModelConfig:
    """Everything that can be refused before calibration text is made. Raises CheckpointError."""
    config = load_config(options.model)
    if config.quantization is not None:
        method = config.quantization.get("quant_method", "some way")
        raise CheckpointError(f"{options.model}: is quantised already ({method}); a float checkpoint is needed")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise CheckpointError(f"--out {options.out}: exists and is not empty")
    if not 0 <= options.keep_float <= 100:
        raise CheckpointError(f"--keep-float {options.keep_float:g}: must be a percentage from 0 to 100")
    if not 8 < options.max_tokens <= config.context_length:
        raise CheckpointError(f"--max-tokens {options.max_tokens}: must be above 8, at most {config.context_length}")
    size = options.scheme.group_size
    for index in range(config.num_layers):
        for product in layer_products(config, index):
            if size is not None and product.unit != FLOAT and product.shape[1] % size:
                raise CheckpointError(f"{product.name}: {product.shape[1]} inputs are no multiple of the group {size}")
    check_names(TensorSource(options.model), config)
    return config


@torch.inference_mode()
def quantize(options: Options, text: CalibrationText, progress: Progress) -> Outcome:
    """Write the checkpoint and its report to `options.out`. Raises CheckpointError."""
    config = check(options)
    vocabulary = max(token for ids in (*text.calibration, *text.held_out) for token in ids)
    if vocabulary >= config.vocab_size:
        raise CheckpointError(f"the tokenizer gives token {vocabulary}, the model has {config.vocab_size}")
    asked = {**options.to_json(), "out": "", "max_shard_bytes": 0}
    state = State.open(options.state, fingerprint(asked, options.model, [text.calibration, text.held_out]))
    outcome = _Sweep(options, config, text, state, progress).run()
    shutil.rmtree(options.state, ignore_errors=True)
    return outcome


class _Sweep:
    """One run."""

    def __init__(
        self, options: Options, config: ModelConfig, text: CalibrationText, state: State, progress: Progress
    ) -> None:
        self._options = options
        self._config = config
        self._text = text
        self._state = state
        self._progress = progress
        self._source = TensorSource(options.model)
        lengths = [len(ids) for ids in (*text.calibration, *text.held_out)]
        table = cos_sin_table(config.rope, num_positions=max(lengths))
        self._rows = Rows(lengths, table)
        self._calibration = Rows(lengths[: len(text.calibration)], table)
        self._held_out = Rows(lengths[len(text.calibration) :], table)
        self._num_calibration = sum(self._calibration.lengths)

    def run(self) -> Outcome:
        if self._state.float_units is None:
            self._state.float_units = self._choose_float()
            self._state.save_notes()
        streams = self._state.streams() or self._first_streams()
        while self._state.next_layer < self._config.num_layers:
            index = self._state.next_layer
            self._progress(f"layer {index + 1} of {self._config.num_layers}", index / self._config.num_layers)
            tensors, streams, notes = self._layer(index, streams)
            self._state.finish_layer(tensors, streams, notes)
        self._progress("measuring", 1.0)
        outcome = self._measure(streams)
        self._write(outcome)
        return outcome

    # ---- streams

    def _embed(self, sequences: list[list[int]]) -> Tensor:
        config = self._config
        table = self._source.take(config.family.embedding, shape=(config.vocab_size, config.hidden_size))
        x = table[torch.tensor([token for ids in sequences for token in ids])].float()  # [M, H]
        if not bool(torch.isfinite(x).all()):
            raise CheckpointError(f"{config.family.embedding}: has values that are not finite")
        return x

    def _first_streams(self) -> dict[str, Tensor]:
        x = self._embed([*self._text.calibration, *self._text.held_out])
        held_out = [FLOAT, FLOAT_CACHE] if self._compares_caches else [FLOAT]
        streams = {one.name: x for one in self._options.variants()}
        streams.update({name: x[self._num_calibration :] for name in held_out})
        return {name: stream.clone() for name, stream in streams.items()}

    @property
    def _compares_caches(self) -> bool:
        return self._options.ablation and self._options.scheme.eight_bit_cache

    def _choose_float(self) -> dict[str, list[str]]:
        """A walk of its own: which units stay float must be known before the first is rounded."""
        if self._options.keep_float == 0:
            return {}
        sequences: list[list[int]] = []
        for ids in self._text.calibration:
            if not sequences or sum(map(len, sequences)) + len(ids) <= SENSITIVITY_ROWS:
                sequences.append(ids)
        x, errors = self._embed(sequences), []
        rows = Rows([len(ids) for ids in sequences], self._rows.cos_sin)
        for index in range(self._config.num_layers):
            self._progress("sensitivity", index / self._config.num_layers)
            weights = read_layer(self._source, self._config, index)
            found, x = unit_errors(
                weights, self._products(index), x, rows, config=self._config, index=index, scheme=self._options.scheme
            )
            errors += found
        return choose_float(errors, per_cent=self._options.keep_float)

    # ---- layers

    def _products(self, index: int) -> list[Product]:
        return expand(layer_products(self._config, index), self._config)

    def _float_units(self, index: int) -> list[str]:
        return (self._state.float_units or {}).get(str(index), [])

    def _layer(
        self, index: int, streams: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, object]]:
        """The layer's tensors, the streams behind it and what was measured."""
        weights = read_layer(self._source, self._config, index)
        behind = {FLOAT: self._through(index, weights, streams[FLOAT], self._held_out, Hooks())}
        for one in self._options.variants():
            seen = Recorder(self._config.rope.rotary_dim)
            self._through(index, weights, streams[one.name][: self._num_calibration], self._calibration, seen)
            made = make_layer(
                weights,
                self._products(index),
                seen,
                config=self._config,
                scheme=self._options.scheme,
                ingredients=one,
                float_units=self._float_units(index),
            )
            behind[one.name] = self._through(index, made.weights, streams[one.name], self._rows, made.rounding)
        alone = self._through(index, made.weights, streams[FLOAT], self._held_out, made.rounding)
        if self._compares_caches:
            rounding = replace(made.rounding, k_scale=None, v_scale=None)
            behind[FLOAT_CACHE] = self._through(index, made.weights, streams[FLOAT_CACHE], self._held_out, rounding)
        notes = {
            "alone": _relative(alone, behind[FLOAT]),
            "accumulated": _relative(behind[one.name][self._num_calibration :], behind[FLOAT]),
            "strengths": made.strengths,
            "products": made.product_errors,
            "clips": made.clips,
        }
        return self._tensors(index, made), behind, notes

    def _through(self, index: int, weights: dict[str, Tensor], x: Tensor, rows: Rows, hooks: Hooks) -> Tensor:
        return run_layer(weights, x, rows, config=self._config, index=index, hooks=hooks)

    def _tensors(self, index: int, made: MadeLayer) -> dict[str, Tensor]:
        config = self._config
        dtypes = {name: dtype for name in self._source.names() if (dtype := self._source.dtype(name)) is not None}
        tensors = write_layer(
            config,
            index,
            made.weights,
            made.quantized,
            dtype_of=dtypes,
            packed=self._options.scheme.packed,
            input_scales=made.rounding.input_scales,
        )
        attention = f"{config.family.layer.format(layer=index)}.{config.family.names.attention}"
        for kind, scale in (("k", made.rounding.k_scale), ("v", made.rounding.v_scale)):
            if scale is not None:
                tensors[f"{attention}.{kind}_scale"] = scale if scale.numel() == 1 else scale.view(-1, 1, 1)
        return tensors

    # ---- the end

    def _measure(self, streams: dict[str, Tensor]) -> Outcome:
        config = self._config
        name = config.family.embedding if config.tie_word_embeddings else f"{config.family.head}.weight"
        weight = self._source.take(name, shape=(config.vocab_size, config.hidden_size))
        norm = read_float(self._source, config.family.norm, (config.hidden_size,))
        head = Head(norm, config.rms_norm_eps, weight)
        exact = streams[FLOAT]
        made = {
            one.name: measure(head, exact, streams[one.name][self._num_calibration :], self._text.held_out)
            for one in self._options.variants()
        }
        float_cache = None
        if self._compares_caches:
            float_cache = measure(head, exact, streams[FLOAT_CACHE], self._text.held_out)
        return Outcome(measure(head, exact, exact, self._text.held_out), made, float_cache)

    def _write(self, outcome: Outcome) -> None:
        """Put the folder together in the state's, then move it to its place."""
        options, config = self._options, self._config
        fresh = options.state / "out"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        names = [config.family.embedding, config.family.norm, f"{config.family.head}.weight"]
        if config.tie_word_embeddings:
            names.pop()
        ends = options.state / "ends.safetensors"
        copy_tensors(self._source, names, ends)
        self._source.release()
        layers = [self._state.layer_file(index) for index in range(config.num_layers)]
        write_shards(fresh, [ends, *layers], max_bytes=options.max_shard_bytes)
        entry = quantization_config(options.scheme, ignore=self._ignored(), cache_per_head=options.cache_per_head)
        write_config(fresh, dict(read_json(options.model / "config.json", name="config.json")), entry)
        copy_companions(options.model, fresh)
        self._report(fresh, outcome)
        if options.out.is_dir():
            options.out.rmdir()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        fresh.rename(options.out)

    def _report(self, folder: Path, outcome: Outcome) -> None:
        text = self._text
        about = {
            "model": self._options.model.resolve().name,
            "architecture": self._config.architecture,
            "scheme": self._options.scheme.name,
            "calibration_sequences": len(text.calibration),
            "calibration_tokens": self._num_calibration,
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
            kept = self._float_units(index)
            products = layer_products(self._config, index)
            names += [one.name for one in products if one.unit == FLOAT or one.unit in kept]
        return names


def _relative(made: Tensor, exact: Tensor) -> float:
    return float((made - exact).norm() / exact.norm().clamp_min(1e-30))
