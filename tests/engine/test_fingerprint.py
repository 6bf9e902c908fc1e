"""What changes the fingerprint and what does not."""

from __future__ import annotations

import json
import os

import pytest

from octavo.engine.fingerprint import fingerprint
from octavo.settings import with_overrides


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    header = json.dumps({"weight": {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\x01")
    return tmp_path


def of(folder, **overrides) -> str:
    return fingerprint(with_overrides({"model_dir": str(folder), **overrides}, environ={}))


def test_it_is_the_same_for_the_same_folder_and_settings(folder):
    assert of(folder) == of(folder)
    assert len(bytes.fromhex(of(folder))) == 16


@pytest.mark.parametrize(
    "change", [{"weight_quant": "a8w8"}, {"dtype": "float32"}, {"use_cache_kv_int8": False}, {"kernels": "reference"}]
)
def test_settings_that_change_bits_change_it(folder, change):
    assert of(folder, **change) != of(folder)


@pytest.mark.parametrize(
    "change", [{"batch_size": 3}, {"max_num_batched_tokens": 64}, {"prefix_cache": False}, {"http_port": 9999}]
)
def test_settings_that_change_no_bits_do_not(folder, change):
    assert of(folder, **change) == of(folder)


def test_a_changed_small_file_changes_it(folder):
    before = of(folder)
    (folder / "config.json").write_text("[]")
    assert of(folder) != before


def test_a_new_time_or_header_of_the_weights_changes_it(folder):
    before = of(folder)
    os.utime(folder / "model.safetensors", (1, 1))
    assert of(folder) != before


def test_files_that_do_not_matter_do_not(folder):
    before = of(folder)
    (folder / "README.md").write_text("words")
    (folder / "notes").mkdir()
    assert of(folder) == before


def test_a_folder_moved_keeps_it(folder, tmp_path_factory):
    before = of(folder)
    moved = tmp_path_factory.mktemp("other") / "model"
    folder.rename(moved)
    assert of(moved) == before
    folder.mkdir()  # pytest removes it


def test_a_missing_folder_has_one_too(tmp_path):
    assert of(tmp_path / "a") != of(tmp_path / "b")
