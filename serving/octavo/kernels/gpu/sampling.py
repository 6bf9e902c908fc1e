"""Sampling and log-probabilities on the GPU: checks arguments and launches sampling_kernels.py."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.gpu import sampling_kernels
from octavo.kernels.gpu.device import GpuBase, checked, power_of_two
from octavo.kernels.interface import SamplingRows

LIST_BLOCK = 256  # penalised tokens taken together
LARGEST_BLOCK = 4096  # logits taken together


class GpuSampling(GpuBase):
    """The sampling half of the GPU backend."""

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """See the interface. [B, V] float32, changed in place → [B] int64, new memory. The lists are not checked.

        NaN counts as -inf; a row whose largest logit is not finite takes the argmax. A row's biased ids differ.
        """
        logits = checked(logits, torch.float32, (-1, -1), "logits")
        count, size = logits.shape
        for name in ("temperature", "top_p", "min_p"):
            checked(getattr(rows, name), torch.float32, (count,), name)
        ids = torch.empty(count, dtype=torch.int64, device=self.device)
        if count == 0:
            return ids
        if len(rows.seen_ids) or len(rows.bias_ids):
            sampling_kernels.penalize[(count,)](
                logits, rows.seen_start, rows.seen_ids, rows.seen_counts, rows.repetition_penalty,
                rows.frequency_penalty, rows.presence_penalty, rows.bias_start, rows.bias_ids, rows.bias_values, size,
                BLOCK=LIST_BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        sampling_kernels.sample[(count,)](
            logits, ids, rows.temperature, rows.top_p, rows.top_k, rows.min_p, rows.seed, rows.position, size,
            BLOCK=_block(size), num_warps=16, enable_fp_fusion=False,
        )  # fmt: skip
        return ids

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the interface. Ranks and ids are int64, logprobs float32. Ids are not checked.

        Nothing is sorted: the logits are passed over once for each of the top ids, of which requests get 20 at most.
        """
        logits = checked(logits, torch.float32, (-1, -1), "logits")
        count, size = logits.shape
        tokens = checked(token_ids, torch.int64, (count,), "token_ids")
        if not 0 <= num_top <= size:
            raise ValueError(f"num_top {num_top} of {size} tokens")
        maximum = torch.empty(count, dtype=torch.float64, device=self.device)
        total, rank = torch.empty_like(maximum), torch.empty(count, dtype=torch.int64, device=self.device)
        if count:
            sampling_kernels.summarize[(count,)](
                logits, tokens, maximum, total, rank, size, BLOCK=_block(size), num_warps=16, enable_fp_fusion=False
            )
        top = torch.empty(count, num_top, dtype=torch.int64, device=self.device)
        if count and num_top:
            sampling_kernels.largest[(count,)](
                logits, top, size, num_top, BLOCK=_block(size), num_warps=16, enable_fp_fusion=False
            )
        logs = torch.log(total)[:, None]

        def of(ids: Tensor) -> Tensor:  # [count, n] → float32
            return ((logits.gather(1, ids).double() - maximum[:, None]) - logs).float()

        return of(tokens[:, None])[:, 0], rank, top, of(top)


def _block(size: int) -> int:
    return min(LARGEST_BLOCK, power_of_two(size))
