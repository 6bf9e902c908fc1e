"""How large the K/V cache is, and making it. Runs once, after the weights are loaded.

Which block belongs to whom is the scheduler's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from octavo.engine.decode_graphs import batch_buckets, table_buckets
from octavo.engine.gpu_steps import LOGPROB_ROWS
from octavo.kernels.interface import BLOCK, SEGMENT, CacheSpec, Kernels, LayerCache
from octavo.models.config import ModelConfig
from octavo.quantization.scheme import CacheScheme
from octavo.settings import Settings, SettingsError

HOST_FRACTION = 0.25
DEVICE_FRACTION = 0.9
MIB = 1 << 20
RECORDING_BYTES = 2 * MIB  # of a recorded decode step beside its tensors: some 300 launches, a guess


def cache_specs(
    config: ModelConfig, schemes: Sequence[CacheScheme], *, dtype: torch.dtype, device: torch.device
) -> list[CacheSpec]:
    """One spec per layer. dtype int8, or the float type of the cache."""
    return [
        CacheSpec(
            config.num_kv_heads,
            config.head_dim,
            dtype,
            k_scale=None if scheme.k_scale is None else scheme.k_scale.to(device),
            v_scale=None if scheme.v_scale is None else scheme.v_scale.to(device),
        )
        for scheme in schemes
    ]


def longest_sequence(settings: Settings, *, context_length: int) -> int:
    """Tokens of the longest sequence that is served."""
    return min(settings.max_seq_len + settings.max_dec_len, context_length)


def count_blocks(
    settings: Settings, *, context_length: int, block_bytes: int, available_bytes: int, is_host: bool
) -> int:
    """Blocks of the cache: BLOCK_BS sequences, or a share of the free memory but no more than a full batch can fill.

    block_bytes: of one block over all layers. Raises SettingsError if one longest sequence does not fit.
    """
    longest = longest_sequence(settings, context_length=context_length)
    one_sequence = math.ceil((longest + 1) / BLOCK)  # a step is planned ahead of the last token
    if settings.block_bs is not None:
        blocks = math.ceil(settings.block_bs * longest / BLOCK)
        if blocks < one_sequence:
            need = one_sequence * BLOCK
            allowed = f"holds {blocks * BLOCK} tokens, one sequence of MAX_SEQ_LEN + MAX_DEC_LEN needs {need}"
            raise SettingsError("BLOCK_BS", settings.block_bs, allowed)
        return blocks
    fraction = settings.kv_memory_fraction or (HOST_FRACTION if is_host else DEVICE_FRACTION)
    blocks = int(available_bytes * fraction) // block_bytes
    if blocks < one_sequence:
        allowed = (
            f"of {available_bytes // MIB} MiB free holds {blocks * BLOCK} tokens, "
            f"one sequence of MAX_SEQ_LEN + MAX_DEC_LEN needs {one_sequence * BLOCK}: lower those, or raise this"
        )
        raise SettingsError("KV_MEMORY_FRACTION", fraction, allowed)
    return min(blocks, (settings.batch_size + 1) * one_sequence)  # one more, for prefixes worth keeping


def workspace_bytes(config: ModelConfig, *, rows: int, batch_size: int, longest: int, drafts: int = 0) -> int:
    """Device memory that steps need beside weights and cache, rounded up: activations of `rows`, logits, partials.

    A layer holds at most the residual stream, its norm, and its two widest intermediates at once, in float32. `drafts`:
    tokens guessed for each sequence of a step.
    """
    wide = max(2 * config.intermediate_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    activations = rows * (4 * config.hidden_size + 2 * wide) * 4
    logits = _logit_rows(rows=rows, batch_size=batch_size, drafts=drafts) * config.vocab_size * 4
    partials = _partial_rows(config, longest=longest) * batch_size * config.num_heads * (config.head_dim + 2) * 4
    recordings = len(batch_buckets(batch_size)) * len(_tables(longest)) * RECORDING_BYTES
    return activations + logits + partials + recordings + 512 * MIB  # and compiled kernels, small buffers, fragments


def _logit_rows(*, rows: int, batch_size: int, drafts: int) -> int:
    """Rows of logits that are in memory at once.

    Recorded steps have their result and what it is copied from. Others have theirs, and both kinds the copy from which
    log probabilities are read, for penalties change the logits; of prompts one part is there while the next is made.
    """
    sampled = min(rows, batch_size * (1 + drafts))
    return 2 * batch_size + 2 * max(sampled, batch_size) + 2 * min(rows, LOGPROB_ROWS)


def _partial_rows(config: ModelConfig, *, longest: int) -> int:
    """Partial results of decode attention for each sequence and head, one a segment, in all that is in memory at once.

    A step leaves one for every query row that is taken by segments. Recorded steps have their own, for each width of
    tables.
    """
    heads_sharing = 1 << (config.num_heads // config.num_kv_heads - 1).bit_length()
    recorded = sum(math.ceil(width * BLOCK / SEGMENT) for width in _tables(longest))
    return max(1, 8 // heads_sharing) * math.ceil(longest / SEGMENT) + recorded


def _tables(longest: int) -> list[int]:
    """Widths of the tables over which decode steps are recorded."""
    return table_buckets(math.ceil((longest + 1) / BLOCK))


def make_caches(kernels: Kernels, specs: Sequence[CacheSpec], num_blocks: int) -> list[LayerCache]:
    """Zeroed blocks for every layer. On a host the system hands out the memory as blocks are first written."""
    return [kernels.make_cache(spec, num_blocks) for spec in specs]


def available_memory(device: torch.device) -> int:
    """Free bytes where the cache will be."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left behind is free
        return torch.cuda.mem_get_info(device)[0]
    return available_host_memory()


def available_host_memory(*, proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: the host's, or the container's limit if that leaves less."""
    return min(_meminfo(proc), _cgroup_room(cgroup))


def _meminfo(path: Path) -> int:
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} has no MemAvailable")


def _cgroup_room(folder: Path) -> int:
    """Bytes left under the container's memory limit, its file cache counted as free; without a limit, endless."""
    for limit_name, usage_name, folder_name, cache_key in (
        ("memory.max", "memory.current", "", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory", "total_inactive_file"),
    ):
        limit = _number(folder / folder_name / limit_name)
        usage = _number(folder / folder_name / usage_name)
        if limit is not None and usage is not None:
            return max(0, limit - usage + _stat(folder / folder_name / "memory.stat", cache_key))
    return 1 << 62


def _number(path: Path) -> int | None:
    """A file with one number; None if it is not there or says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)
