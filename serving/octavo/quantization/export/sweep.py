"""`quantize`: one walk through the layers makes the checkpoint and measures it.

Several streams of activations go through each layer: the float model's, and one for every variant of the recipe that
is compared. They are files: a layer and a block of rows are in memory, nothing else. Embedding and head go by in parts.
After each layer the state is on disk, so a killed run goes on where it was.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from octavo.first_calls import settle
from octavo.models.config import ModelConfig, load_config
from octavo.models.rope import cos_sin_table
from octavo.quantization.calibrate import CalibrationText
from octavo.quantization.errors import CheckpointError
from octavo.quantization.export.finish import FLOAT, FLOAT_CACHE, Finish, Outcome
from octavo.quantization.export.layer_forward import Hooks, Rows, run_layer
from octavo.quantization.export.layer_weights import (
    Product,
    Weights,
    check_names,
    expand,
    layer_products,
    read_layer,
    write_layer,
)
from octavo.quantization.export.options import Options
from octavo.quantization.export.recipe import Ingredients, MadeLayer, make_layer
from octavo.quantization.export.sensitivity import choose_float, unit_errors
from octavo.quantization.export.state import State, fingerprint
from octavo.quantization.export.statistics import Recorder
from octavo.quantization.export.streams import BLOCK_ROWS, Stream
from octavo.quantization.formats.source import TensorSource

EMBEDDED = "embedded"  # before the first layer all streams are the same
SENSITIVITY_ROWS = 4096  # tokens on which units are compared
Progress = Callable[[str, float], None]  # stage, fraction from 0 to 1


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
    settle()
    config = check(options)
    vocabulary = max(token for ids in (*text.calibration, *text.held_out) for token in ids)
    if vocabulary >= config.vocab_size:
        raise CheckpointError(f"the tokenizer gives token {vocabulary}, the model has {config.vocab_size}")
    asked = {**options.to_json(), "out": "", "max_shard_bytes": 0}
    state = State.open(options.state, fingerprint(asked, options.model, [text.calibration, text.held_out]))
    with _threads(state.num_threads):
        outcome = _Sweep(options, config, text, state, progress).run()
    shutil.rmtree(options.state, ignore_errors=True)
    return outcome


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch computes with so many meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        if self._state.next_layer == 0:
            self._before(EMBEDDED).write(self._embedded([*self._text.calibration, *self._text.held_out]))
        while self._state.next_layer < self._config.num_layers:
            index = self._state.next_layer
            self._progress(f"layer {index + 1} of {self._config.num_layers}", index / self._config.num_layers)
            tensors, notes = self._layer(index)
            self._state.finish_layer(tensors, self._names, notes)
        self._progress("measuring", 1.0)
        return Finish(self._options, self._config, self._text, self._source, self._state).run()

    # ---- streams

    @property
    def _names(self) -> list[str]:
        held_out = [FLOAT, FLOAT_CACHE] if self._options.compares_caches else [FLOAT]
        return [*held_out, *(one.name for one in self._options.variants())]

    def _before(self, name: str) -> Stream:
        """What goes into the next layer: of held-out text, and of a variant that of calibration text before it."""
        state, width = self._state, self._config.hidden_size
        if state.next_layer or name == EMBEDDED:
            return state.stream(name, width=width)
        shared = state.stream(EMBEDDED, width=width)
        return shared.after(self._num_calibration) if name in (FLOAT, FLOAT_CACHE) else shared

    def _behind(self, name: str) -> Stream:
        return self._state.stream(name, width=self._config.hidden_size, layer=self._state.next_layer + 1)

    def _embedded(self, sequences: list[list[int]]) -> Iterator[Tensor]:
        """[m, H] of the sequences' tokens, a block after the other."""
        config = self._config
        ids = torch.tensor([token for sequence in sequences for token in sequence])
        for part in ids.split(BLOCK_ROWS):
            table = self._source.take(config.family.embedding, shape=(config.vocab_size, config.hidden_size))
            x = table[part].float()
            del table
            self._source.release()
            if not bool(torch.isfinite(x).all()):
                raise CheckpointError(f"{config.family.embedding}: has values that are not finite")
            yield x

    def _choose_float(self) -> dict[str, list[str]]:
        """A walk of its own: which units stay float must be known before the first is rounded."""
        if self._options.keep_float == 0:
            return {}
        sequences: list[list[int]] = []
        for ids in self._text.calibration:
            if not sequences or sum(map(len, sequences)) + len(ids) <= SENSITIVITY_ROWS:
                sequences.append(ids)
        x, errors = torch.cat(list(self._embedded(sequences))), []
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

    def _layer(self, index: int) -> tuple[dict[str, Tensor], dict[str, object]]:
        """The layer's tensors, and what was measured. The streams behind it are written."""
        weights = read_layer(self._source, self._config, index)
        self._pass(index, weights, FLOAT, self._held_out, Hooks())
        *others, last = self._options.variants()
        for one in others:
            self._variant(index, weights, one)
        made = self._variant(index, weights, last)
        del weights
        if self._options.compares_caches:
            rounding = replace(made.rounding, k_scale=None, v_scale=None)
            self._pass(index, made.weights, FLOAT_CACHE, self._held_out, rounding)
        alone = self._through(index, made.weights, self._before(FLOAT), self._held_out, made.rounding)
        behind = self._behind(last.name).after(self._num_calibration)
        notes = {
            "alone": self._error(alone),
            "accumulated": self._error(behind.read(part) for part, _ in self._held_out.blocks()),
            "strengths": made.strengths,
            "products": made.product_errors,
            "clips": made.clips,
        }
        return self._tensors(index, made), notes

    def _variant(self, index: int, weights: Weights, ingredients: Ingredients) -> MadeLayer:
        """Make the layer in one way and pass its stream through it."""
        seen = Recorder(self._config.rope.rotary_dim)
        for _ in self._through(index, weights, self._before(ingredients.name), self._calibration, seen):
            pass
        made = make_layer(
            weights,
            self._products(index),
            seen,
            config=self._config,
            scheme=self._options.scheme,
            ingredients=ingredients,
            float_units=self._state.kept_float(index),
        )
        del seen
        self._pass(index, made.weights, ingredients.name, self._rows, made.rounding)
        return made

    def _pass(self, index: int, weights: Weights, name: str, rows: Rows, hooks: Hooks) -> None:
        self._behind(name).write(self._through(index, weights, self._before(name), rows, hooks))

    def _through(self, index: int, weights: Weights, stream: Stream, rows: Rows, hooks: Hooks) -> Iterator[Tensor]:
        for part, block in rows.blocks():
            yield run_layer(weights, stream.read(part), block, config=self._config, index=index, hooks=hooks)

    def _error(self, made: Iterable[Tensor]) -> float:
        """Of blocks behind the layer, relative to the float model's."""
        lost = total = 0.0
        for (part, _), rows in zip(self._held_out.blocks(), made):
            exact = self._behind(FLOAT).read(part)
            lost += float((rows - exact).double().square().sum())
            total += float(exact.double().square().sum())
        return math.sqrt(lost / max(total, 1e-60))

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
