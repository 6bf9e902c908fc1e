"""Sampling and log-probabilities on the CPU: checks arguments and calls csrc/sampling.cpp.

Runs in the engine's thread, like all kernels; knows nothing of requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.cpu.library import CpuBase, checked, pointer
from octavo.kernels.interface import SamplingRows

SIGNATURES = {
    "octavo_sample": "p" + "pp" + "ii" + "p" * 15,
    "octavo_logprobs": "p" + "pppppp" + "iii",
}

_FLOAT, _INT, _LONG = torch.float32, torch.int32, torch.int64
_PER_ROW = {
    "temperature": _FLOAT,
    "top_p": _FLOAT,
    "top_k": _INT,
    "min_p": _FLOAT,
    "seed": _LONG,
    "position": _LONG,
    "repetition_penalty": _FLOAT,
    "frequency_penalty": _FLOAT,
    "presence_penalty": _FLOAT,
}
_LISTS = ("seen_start", "seen_ids", "seen_counts", "bias_start", "bias_ids", "bias_values")
SAMPLING_NAMES = (*_PER_ROW, *_LISTS)  # fields of SamplingRows in the order of native arguments


class CpuSampling(CpuBase):
    """The sampling half of the CPU backend."""

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """See the interface. [B, V] float32, changed in place → [B] int64, new memory.

        NaN counts as -inf; a row whose largest logit is not finite takes the argmax. Penalised ids outside the
        vocabulary are passed over.
        """
        logits = checked(logits, torch.float32, (-1, -1), "logits")
        count, size = logits.shape
        tensors = sampling_tensors(rows, count)
        ids = torch.empty(count, dtype=torch.int64)
        self._lib.octavo_sample(self._pool, pointer(logits), pointer(ids), count, size, *map(pointer, tensors))
        return ids

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the interface. Ranks and ids are int64, logprobs float32. ValueError for an id outside the vocabulary."""
        logits = checked(logits, torch.float32, (-1, -1), "logits")
        count, size = logits.shape
        tokens = checked(token_ids, torch.int64, (count,), "token_ids")
        if not 0 <= num_top <= size:
            raise ValueError(f"num_top {num_top} of {size} tokens")
        if count and (int(tokens.min()) < 0 or int(tokens.max()) >= size):
            raise ValueError(f"token ids must be from 0 to {size - 1}")
        logprobs, ranks = torch.empty(count), torch.empty(count, dtype=torch.int64)
        top_ids, top_logprobs = torch.empty(count, num_top, dtype=torch.int64), torch.empty(count, num_top)
        outputs = (logprobs, ranks, top_ids, top_logprobs)
        self._lib.octavo_logprobs(
            self._pool, pointer(logits), pointer(tokens), *map(pointer, outputs), count, size, num_top
        )
        return outputs


def sampling_tensors(rows: SamplingRows, count: int) -> list[Tensor]:
    """What native sampling of `count` rows reads, in its order, checked."""
    numbers = [checked(getattr(rows, name), dtype, (count,), name) for name, dtype in _PER_ROW.items()]
    return numbers + _lists(rows, count)


def _lists(rows: SamplingRows, count: int) -> list[Tensor]:
    """The CSR lists, checked so far that native code stays inside them."""
    starts = [checked(x, _INT, (count + 1,), "list start") for x in (rows.seen_start, rows.bias_start)]
    seen_ids = checked(rows.seen_ids, _INT, (-1,), "seen_ids")
    seen_counts = checked(rows.seen_counts, _INT, (len(seen_ids),), "seen_counts")
    bias_ids = checked(rows.bias_ids, _INT, (-1,), "bias_ids")
    bias_values = checked(rows.bias_values, _FLOAT, (len(bias_ids),), "bias_values")
    if int(starts[0][-1]) > len(seen_ids) or int(starts[1][-1]) > len(bias_ids):
        raise ValueError("a list of a row ends beyond its ids")
    return [starts[0], seen_ids, seen_counts, starts[1], bias_ids, bias_values]
