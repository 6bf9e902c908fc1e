"""From a model folder to a packed `Decoder`, layer by layer, so that little more than the result is in memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.interface import HeadLayout, Kernels
from octavo.models.config import ModelConfig, MoeConfig
from octavo.models.decoder import Decoder, DecoderLayer
from octavo.models.layers import Attention, Experts, Mlp, Norm, Projection, RowParallel, SharedExpert, pack
from octavo.models.rope import cos_sin_table
from octavo.parallel.group import Group
from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats import open_reader
from octavo.quantization.formats.cache_scales import pass_over_cache_scales
from octavo.quantization.formats.float_weights import read_head
from octavo.quantization.formats.reader import AttentionShape, Reader, ReaderInputs, kept_tensor, vector_tensor
from octavo.quantization.formats.source import MAPPED_BYTES
from octavo.quantization.load_report import LoadReport
from octavo.quantization.scheme import CacheScheme, LinearWeights

LOG = logging.getLogger(__name__)
Progress = Callable[[str, float], None]  # stage, fraction from 0 to 1


@dataclass(frozen=True)
class LoadOptions:
    """What the settings say about a model in memory."""

    max_positions: int  # rows of the rotary table
    int8_cache: bool = True


def load_decoder(
    config: ModelConfig,
    inputs: ReaderInputs,
    kernels: Kernels,
    group: Group,
    *,
    options: LoadOptions,
    progress: Progress,
    report: LoadReport | None = None,
) -> Decoder:
    """Read, quantise if asked to, and pack every tensor; what was read goes into the report, and that into the log.

    Raises CheckpointError, also for tensors that nothing uses and for what the kernels do not multiply.
    """
    report = LoadReport() if report is None else report
    try:
        decoder = _load(config, _Builder(config, inputs, kernels, group, report), options=options, progress=progress)
    except CheckpointError:
        raise
    except ValueError as error:  # of the kernels: sizes that they do not serve
        raise CheckpointError(f"{report.last_name()}: {error}") from error
    _check_all_used(config, inputs)
    LOG.info("%s", report.summary())
    LOG.debug("what was loaded:\n%s", report.table())
    progress("weights", 1.0)
    return decoder


def _load(config: ModelConfig, builder: _Builder, *, options: LoadOptions, progress: Progress) -> Decoder:
    """The head comes before the layers: while it is read, it is in memory twice."""
    embedding = builder.embedding()
    head = pack(builder.kernels, builder.head(embedding))
    layers = []
    for index in range(config.num_layers):
        progress("weights", index / config.num_layers)
        layers.append(builder.layer(index))
    schemes = [builder.cache_scheme(index, int8=options.int8_cache) for index in range(config.num_layers)]
    return Decoder(
        config=config,
        kernels=builder.kernels,
        embedding=embedding,
        layers=layers,
        norm=builder.norm(config.family.norm),
        head=head,
        cos_sin=cos_sin_table(config.rope, num_positions=options.max_positions).to(builder.kernels.device),
        cache_schemes=schemes,
        weight_scheme=builder.reader.weight_scheme,
    )


class _Builder:
    """Names of a family turned into layers."""

    def __init__(
        self, config: ModelConfig, inputs: ReaderInputs, kernels: Kernels, group: Group, report: LoadReport
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._kernels = self.kernels = kernels
        self._group = group
        self._report = report
        self.reader: Reader = open_reader(inputs)
        report.weight_scheme = self.reader.weight_scheme

    def embedding(self) -> Tensor:
        """[V, H] in its float type. A copy: it must not stay a view of the mapped file."""
        shape = (self._config.vocab_size, self._config.hidden_size)
        table = kept_tensor(self._inputs, self._config.family.embedding, shape)
        self._report.add_float(self._config.family.embedding, table)
        self._inputs.source.release()
        return table.to(self._kernels.device)

    def head(self, embedding: Tensor) -> LinearWeights:
        config, source = self._config, self._inputs.source
        first = len(source.taken)
        head = read_head(
            self.reader,
            self._inputs,
            config.family.head,
            shape=(config.vocab_size, config.hidden_size),
            tied=embedding if config.tie_word_embeddings else None,
        )
        if head.weight is not embedding:  # else it is counted already
            self._report.add_product(config.family.head, head, taken=source.taken[first:])
        source.release(at_least=MAPPED_BYTES)
        return head

    def norm(self, name: str) -> Norm:
        return Norm(self._kernels, self._vector(name, self._config.hidden_size), self._config.rms_norm_eps)

    def layer(self, index: int) -> DecoderLayer:
        names, prefix = self._config.family.names, self._prefix(index)
        has_experts = self._config.moe is not None and index in self._config.moe.layers
        return DecoderLayer(
            attention_norm=self.norm(f"{prefix}{names.input_norm}.weight"),
            attention=self._attention(index),
            mlp_norm=self.norm(f"{prefix}{names.mlp_norm}.weight"),
            mlp=self._experts(prefix) if has_experts else self._dense_mlp(prefix),
        )

    def cache_scheme(self, index: int, *, int8: bool) -> CacheScheme:
        attention = self._prefix(index) + self._config.family.names.attention
        first = len(self._inputs.source.taken)
        if int8:
            config = self._config
            heads = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim)
            scheme = self.reader.cache(attention, heads=heads)
        else:
            scheme = pass_over_cache_scales(self._inputs.source, attention, note="scales unused: the cache is float")
        self._report.add_cache(attention, scheme, int8=int8, taken=self._inputs.source.taken[first:])
        return scheme

    def _linear(self, name: str, *, shape: tuple[int, int], bias: bool, keep_float: bool = False) -> LinearWeights:
        """Read a product and note what it came from. Pages of the file that are read go back now and then."""
        source = self._inputs.source
        first = len(source.taken)
        linear = self.reader.linear(name, shape=shape, bias=bias, keep_float=keep_float)
        self._report.add_product(name, linear, taken=source.taken[first:])
        source.release(at_least=MAPPED_BYTES)
        return linear

    def _prefix(self, index: int) -> str:
        return self._config.family.layer.format(layer=index) + "."

    def _vector(self, name: str, size: int) -> Tensor:
        """A norm's weight as float32."""
        vector = vector_tensor(self._inputs.source, name, size)
        self._report.add_float(name, vector)
        return vector.to(self._kernels.device)

    def _attention(self, index: int) -> Attention:
        config, names, prefix = self._config, self._config.family.names, self._prefix(index)
        q_size = config.num_heads * config.head_dim
        out = self._linear(prefix + names.out, shape=(config.hidden_size, q_size), bias=config.out_bias)
        qk_norm = config.family.qk_norm
        return Attention(
            self._kernels,
            qkv=Projection(self._kernels, self._qkv(prefix)),
            out=RowParallel(self._kernels, self._group, out),
            heads=HeadLayout(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                scale=config.head_dim**-0.5,
                window=config.windows[index],
            ),
            q_norm=self._vector(f"{prefix}{names.q_norm}.weight", config.head_dim) if qk_norm else None,
            k_norm=self._vector(f"{prefix}{names.k_norm}.weight", config.head_dim) if qk_norm else None,
            eps=config.rms_norm_eps,
        )

    def _qkv(self, prefix: str) -> list[LinearWeights]:
        config, names = self._config, self._config.family.names.qkv
        kv_size = config.num_kv_heads * config.head_dim
        q_size = config.num_heads * config.head_dim
        if len(names) == 1:
            shape = (q_size + 2 * kv_size, config.hidden_size)
            fused = self._linear(prefix + names[0], shape=shape, bias=config.qkv_bias)
            return [fused.take_rows(separated_rows(config))]
        return [
            self._linear(prefix + name, shape=(size, config.hidden_size), bias=config.qkv_bias)
            for name, size in zip(names, (q_size, kv_size, kv_size))
        ]

    def _dense_mlp(self, prefix: str) -> Mlp:
        names = self._config.family.names
        parts = (prefix + names.gate, prefix + names.up, prefix + names.down)
        return self._mlp(parts, size=self._config.intermediate_size, bias=self._config.mlp_bias)

    def _mlp(self, names: tuple[str, str, str], *, size: int, bias: bool) -> Mlp:
        hidden = self._config.hidden_size
        gate, up = (self._linear(name, shape=(size, hidden), bias=bias) for name in names[:2])
        down = self._linear(names[2], shape=(hidden, size), bias=bias)
        return Mlp(
            self._kernels,
            gate_up=Projection(self._kernels, [gate, up]),
            down=RowParallel(self._kernels, self._group, down),
        )

    def _experts(self, prefix: str) -> Experts:
        moe, names = self._config.moe, self._config.family.names
        assert moe is not None
        shape = (moe.num_experts, self._config.hidden_size)
        router = self._linear(prefix + names.router, shape=shape, bias=False, keep_float=True)
        experts = []
        for expert in range(moe.num_experts):
            base = prefix + names.expert.format(expert=expert)
            gate, up, down = (f"{base}.{part}" for part in names.expert_parts)
            experts.append(self._mlp((gate, up, down), size=moe.intermediate_size, bias=False))
        return Experts(
            self._kernels,
            router=Projection(self._kernels, [router]),
            experts=experts,
            top_k=moe.top_k,
            renormalize=moe.renormalize,
            shared=self._shared_expert(prefix, moe),
        )

    def _shared_expert(self, prefix: str, moe: MoeConfig) -> SharedExpert | None:
        if moe.shared_intermediate_size is None:
            return None
        names = self._config.family.names
        base = prefix + names.shared_expert
        gate, up, down = (f"{base}.{part}" for part in names.expert_parts)
        mlp = self._mlp((gate, up, down), size=moe.shared_intermediate_size, bias=False)
        shape = (1, self._config.hidden_size)
        logit = self._linear(prefix + names.shared_gate, shape=shape, bias=False, keep_float=True)
        return SharedExpert(mlp, Projection(self._kernels, [logit]))


def separated_rows(config: ModelConfig) -> Tensor:
    """Rows of a qkv product interleaved by K/V head (its queries, key, value) as all q, all k, all v. [N] int64."""
    group = config.num_heads // config.num_kv_heads
    rows = torch.arange(config.num_kv_heads * (group + 2) * config.head_dim)
    rows = rows.view(config.num_kv_heads, group + 2, config.head_dim)
    return torch.cat((rows[:, :group].reshape(-1), rows[:, group].reshape(-1), rows[:, group + 1].reshape(-1)))


def _check_all_used(config: ModelConfig, inputs: ReaderInputs) -> None:
    """A tensor that nothing used means that the checkpoint is not what its configuration says."""
    family = config.family
    ignored = [re.compile(pattern) for pattern in family.ignored]
    if config.tie_word_embeddings:
        ignored.append(re.compile(re.escape(family.head) + r"\.weight"))
    left = [name for name in inputs.source.untaken() if not any(pattern.fullmatch(name) for pattern in ignored)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(f"the checkpoint has tensors that {config.architecture} does not use: {left[0]}{more}")
