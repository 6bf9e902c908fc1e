"""How many blocks there are, and how much memory a host has left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from octavo.engine.kv_cache import available_host_memory, count_blocks, workspace_bytes
from octavo.models.config import load_config
from octavo.settings import Settings, SettingsError

GIB = 1 << 30


def _count(available: int = 64 * GIB, *, context: int = 100_000, **environ: str) -> int:
    settings = Settings.from_environ({"MAX_SEQ_LEN": "1000", "MAX_DEC_LEN": "100", "BATCH_SIZE": "10", **environ})
    return count_blocks(settings, context_length=context, block_bytes=1 << 20, available_bytes=available, is_host=True)


def test_block_bs_counts_longest_sequences() -> None:
    assert _count(BLOCK_BS="4") == 69  # 4 * 1100 tokens
    assert _count(BLOCK_BS="1.5", context=640) == 15  # 960 tokens


def test_free_memory_decides_up_to_a_full_batch() -> None:
    assert _count(available=400 << 20) == 100  # a quarter
    assert _count(available=400 << 20, KV_MEMORY_FRACTION="0.5") == 200 - 2  # eleven sequences of 18 blocks
    assert _count() == 11 * 18


def test_one_longest_sequence_must_fit() -> None:
    with pytest.raises(SettingsError, match=r"KV_MEMORY_FRACTION=0\.25: of 40 MiB free holds 640 tokens.*needs 1152"):
        _count(available=40 << 20)
    with pytest.raises(SettingsError, match=r"BLOCK_BS=0\.9: holds 1024 tokens"):
        _count(BLOCK_BS="0.9")


def test_log_probabilities_and_guesses_have_memory_set_aside(tiny_folder: Path) -> None:
    """Beside the recorded steps' logits: a step's own, those before penalties, and two parts of a prompt's."""
    config = load_config(tiny_folder)

    def rows_of_logits(rows: int, drafts: int) -> int:
        large, small = (
            workspace_bytes(replace(config, vocab_size=vocab), rows=rows, batch_size=256, longest=4096, drafts=drafts)
            for vocab in (128256, 128255)
        )
        return (large - small) // 4

    assert rows_of_logits(4096, 0) == 4 * 256 + 2 * 64
    assert rows_of_logits(4096, 8) == 2 * 256 + 2 * 9 * 256 + 2 * 64
    assert rows_of_logits(300, 8) == 2 * 256 + 2 * 300 + 2 * 64
    assert rows_of_logits(16, 0) == 4 * 256 + 2 * 16


def test_every_width_of_recorded_steps_has_its_partial_results(tiny_folder: Path) -> None:
    """8192 tokens: tables of 16, 64 and 129 blocks, in segments of four blocks; a query row of a step has 32."""
    config = replace(load_config(tiny_folder), num_heads=8, num_kv_heads=1)
    large, small = (
        workspace_bytes(replace(config, head_dim=size), rows=0, batch_size=24, longest=8192) for size in (66, 64)
    )
    assert large - small == (32 + 4 + 16 + 33) * 24 * 8 * 2 * 4


def _host(folder: Path, *, mib: int) -> Path:
    path = folder / "meminfo"
    path.write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: {mib * 1024} kB\n")
    return path


def test_memory_is_the_hosts_without_a_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("123\n")
    assert available_host_memory(proc=_host(tmp_path, mib=500), cgroup=tmp_path) == 500 << 20
    assert available_host_memory(proc=_host(tmp_path, mib=500), cgroup=tmp_path / "none") == 500 << 20


def test_a_containers_limit_counts_if_it_leaves_less(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{300 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{200 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {50 << 20}\n")
    assert available_host_memory(proc=_host(tmp_path, mib=500), cgroup=tmp_path) == 150 << 20
    assert available_host_memory(proc=_host(tmp_path, mib=90), cgroup=tmp_path) == 90 << 20


def test_the_older_kind_of_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(str(300 << 20))
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text(str(200 << 20))
    assert available_host_memory(proc=_host(tmp_path, mib=500), cgroup=tmp_path) == 100 << 20
