"""One decoder for all families: embedding, layers, norm, head. Run by the runner's worker thread.

Takes a `ForwardBatch` and the layers' caches; knows nothing of sequences or sampling. After the last layer's attention
only the rows whose logits are wanted go on: rows do not influence each other outside attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from octavo.kernels.interface import (
    DenseLayer,
    Head,
    Kernels,
    LayerCache,
    LayerStack,
    PackedLinear,
    SamplingRows,
    StacksLayers,
)
from octavo.models.batch import ForwardBatch
from octavo.models.config import ModelConfig
from octavo.models.layers import Attention, Experts, Mlp, Norm
from octavo.quantization.scheme import CacheScheme


@dataclass(frozen=True)
class DecoderLayer:
    """Attention and MLP, each behind a norm and added to the residual stream."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp | Experts

    def forward(
        self, x: Tensor, batch: ForwardBatch, *, cos_sin: Tensor, cache: LayerCache, rows: Tensor | None = None
    ) -> Tensor:
        """[M, H] float32 → [M, H], or [R, H] with `rows` [R]. May change x."""
        normed, x = self.attention_norm(x, self.attention.qkv.format)
        heads = self.attention.attend(normed, cos_sin=cos_sin, layout=batch.layout, cache=cache)
        if rows is not None:
            heads, x = heads[rows], x[rows]
        x = self.attention.out(heads, residual=x)
        normed, x = self.mlp_norm(x, self.mlp.format)
        return self.mlp(normed, residual=x)

    def dense(self) -> DenseLayer | None:
        """The layer as a backend may run it whole; None if it has experts, or products that do not fuse."""
        attention, mlp, norms = self.attention, self.mlp, (self.attention_norm, self.mlp_norm)
        if not isinstance(mlp, Mlp) or {norm.eps for norm in norms} != {attention.eps}:
            return None
        qkv, out, gate_up, down = attention.qkv.only, attention.out.only, mlp.gate_up.only, mlp.down.only
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        return DenseLayer(
            attention_norm=norms[0].weight,
            qkv=qkv,
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            heads=attention.heads,
            out=out,
            mlp_norm=norms[1].weight,
            gate_up=gate_up,
            down=down,
            eps=attention.eps,
        )


@dataclass(frozen=True)
class Decoder:
    """A loaded model."""

    config: ModelConfig
    kernels: Kernels
    embedding: Tensor  # [V, H], a float type
    layers: Sequence[DecoderLayer]
    norm: Norm
    head: PackedLinear
    cos_sin: Tensor  # [max_position, rotary_dim] float32
    cache_schemes: Sequence[CacheScheme]  # per layer
    weight_scheme: str

    @cached_property
    def stack(self) -> LayerStack | None:
        """All layers as one, where the backend can."""
        layers = [layer.dense() for layer in self.layers]
        if not isinstance(self.kernels, StacksLayers):
            return None
        dense = [layer for layer in layers if layer is not None]
        head = Head(self.norm.weight, self.norm.eps, self.head)
        return self.kernels.stack_layers(dense, self.cos_sin, head) if len(dense) == len(layers) else None

    @property
    def waits(self) -> bool:
        """Whether a step asks the host something on its way, so that it cannot be recorded."""
        return any(isinstance(layer.mlp, Experts) and layer.mlp.waits for layer in self.layers)

    def hidden(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> Tensor:
        """Run a step: fills the caches and returns the residual stream of the wanted rows, [R, H] float32."""
        x = self.kernels.embedding(batch.token_ids, self.embedding)  # [M, H]
        if self.stack is not None:
            return self.stack.run(x, batch.layout, caches, batch.logits_rows)
        last = len(self.layers) - 1
        for index, (layer, cache) in enumerate(zip(self.layers, caches)):
            rows = batch.logits_rows if index == last else None
            if rows is not None and rows.numel() == 0:
                return self._fill_last(layer, x, batch, cache)
            x = layer.forward(x, batch, cos_sin=self.cos_sin, cache=cache, rows=rows)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] → [R, V] float32, new memory. May change `hidden`."""
        normed, _ = self.norm(hidden, self.head.format)
        return self.kernels.linear(normed, self.head)

    def sample(self, batch: ForwardBatch, caches: Sequence[LayerCache], rows: SamplingRows) -> Tensor:
        """Run a step whose wanted rows all sample: the tokens drawn, [R] int64 (R > 0)."""
        if self.stack is None:
            return self.kernels.sample(self.logits(self.hidden(batch, caches)), rows)
        x = self.kernels.embedding(batch.token_ids, self.embedding)
        return self.stack.sample(x, batch.layout, caches, batch.logits_rows, rows)

    def _fill_last(self, layer: DecoderLayer, x: Tensor, batch: ForwardBatch, cache: LayerCache) -> Tensor:
        """The last layer of a step that wants no logits: K and V into the cache, nothing else."""
        normed, x = layer.attention_norm(x, layer.attention.qkv.format)
        layer.attention.fill(normed, cos_sin=self.cos_sin, layout=batch.layout, cache=cache)
        return x[:0]
