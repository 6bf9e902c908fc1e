"""A loaded decoder with its cache, driven step by step as the runner would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from octavo.engine.kv_cache import cache_specs, make_caches
from octavo.engine.step_tensors import BlockTables, forward_batch
from octavo.kernels.choose import choose
from octavo.kernels.interface import BLOCK, Kernels, LayerCache, multiplies_fp8
from octavo.models.config import load_config
from octavo.models.decoder import Decoder
from octavo.models.loader import LoadOptions, load_decoder
from octavo.parallel.group import make_group
from octavo.protocol.messages import SamplingParams
from octavo.quantization.formats.reader import ReaderInputs
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.scheme import FLOAT_TYPES
from octavo.scheduling.plan import SequenceStep

BLOCKS_PER_SLOT = 8  # 512 tokens


@dataclass
class Harness:
    """Slots with blocks of their own; `computed` counts the tokens in each slot's cache."""

    model: Decoder
    caches: list[LayerCache]
    computed: dict[int, int] = field(default_factory=dict)

    def step(self, parts: Sequence[tuple[int, Sequence[int]]], *, wanted: bool = True) -> list[Tensor]:
        """Compute the next tokens of some slots in one step; logits [len(tokens), V] of each, or none."""
        steps = [self._sequence(slot, token_ids) for slot, token_ids in parts]
        batch = forward_batch(steps, np.zeros(64, dtype=np.int64), BlockTables(64), device=self.model.kernels.device)
        batch = replace(batch, logits_rows=torch.arange(batch.token_ids.numel() if wanted else 0))
        with torch.inference_mode():
            hidden = self.model.hidden(batch, self.caches)
            logits = self.model.logits(hidden) if wanted else torch.empty(0, self.model.config.vocab_size)
        return [part.clone() for part in logits.split([len(token_ids) if wanted else 0 for _, token_ids in parts])]

    def prefill(self, token_ids: Sequence[int], *, chunk: int, slot: int = 0) -> Tensor:
        """All logits of one sequence computed in chunks, [len(token_ids), V]."""
        self.computed[slot] = 0
        return torch.cat(
            [self.step([(slot, token_ids[low : low + chunk])])[0] for low in range(0, len(token_ids), chunk)]
        )

    def greedy(self, prompt: Sequence[int], *, chunk: int, count: int, slot: int = 0) -> list[int]:
        """`count` greedy tokens after a prompt."""
        tokens = [int(self.prefill(prompt, chunk=chunk, slot=slot)[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.step([(slot, tokens[-1:])])[0][-1].argmax()))
        return tokens

    def _sequence(self, slot: int, token_ids: Sequence[int]) -> SequenceStep:
        start = self.computed.get(slot, 0)
        self.computed[slot] = start + len(token_ids)
        first = slot * BLOCKS_PER_SLOT
        # blocks in descending order: a table is not a range
        table = list(range(first, first + BLOCKS_PER_SLOT))[::-1][: -(-self.computed[slot] // BLOCK)]
        return SequenceStep(
            seq_id=slot,
            slot=slot,
            fresh=start == 0,
            start=start,
            token_ids=token_ids,
            block_table=table,
            sample=False,
            num_outputs=0,
            prompt_len=len(token_ids),
            params=SamplingParams(max_tokens=1),
        )


def load_harness(
    folder: Path,
    *,
    weight_quant: str = "auto",
    dtype: str = "auto",
    int8_cache: bool = True,
    kernels: str | Kernels = "reference",
    num_slots: int = 6,
    head_quant: str = "none",
) -> Harness:
    """Load a model folder with room for `num_slots` sequences of 512 tokens."""
    config = load_config(folder)
    device = torch.device("cpu")
    backend = choose(kernels, device=device, num_threads=1) if isinstance(kernels, str) else kernels
    inputs = ReaderInputs(
        TensorSource(folder),
        config.quantization,
        weight_quant,
        FLOAT_TYPES.get(dtype),
        head_quant=head_quant,
        keep_fp8=multiplies_fp8(backend),
    )
    options = LoadOptions(max_positions=BLOCKS_PER_SLOT * BLOCK, int8_cache=int8_cache)
    model = load_decoder(config, inputs, backend, make_group(1), options=options, progress=lambda stage, fraction: None)
    cache_dtype = torch.int8 if int8_cache else FLOAT_TYPES[config.dtype if dtype == "auto" else dtype]
    specs = cache_specs(config, model.cache_schemes, dtype=cache_dtype, device=backend.device)
    return Harness(model, make_caches(backend, specs, num_slots * BLOCKS_PER_SLOT))
