"""`octavo quantize` holds one layer and what is worked out about it, however deep the model, wide its vocabulary, long
the text.

A layer of the model made here is 52 MiB in float32. The peak may be: the layer before and after smoothing; what the
inputs of its products say of each other, once in float32 and once in float64, and GPTQ's factor of it; and a block of
2048 tokens on its way through the layer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.quantization.export.streams import BLOCK_ROWS
from quantization.peak_memory import HIDDEN, INNER, write_large
from quantize import quantize_peak

pytestmark = pytest.mark.slow
LAYER = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)  # bytes
STATISTICS = 4 * (3 * HIDDEN**2 + INNER**2)
FACTOR = (8 + 4) * INNER**2
BLOCK = 4 * BLOCK_ROWS * (4 * INNER + 4 * HIDDEN)
ALLOWED = 2 * LAYER + STATISTICS + FACTOR + BLOCK + (48 << 20)  # what is not counted: parts, samples, buffers


def peak(folder: Path, *, num_layers: int, vocab: int, num_tokens: int, ablation: bool) -> int:
    """Bytes of a process that makes the checkpoint, over what it had before."""
    folder.mkdir()
    write_large(
        folder, lambda _name, weight, _largest: ({"weight": weight.bfloat16()}, weight), None,
        num_layers=num_layers, vocab=vocab,
    )  # fmt: skip
    command = [sys.executable, quantize_peak.__file__, str(folder), f"{folder}-made", "a8w8c8", str(num_tokens)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [*command, "1" if ablation else "0"], env=environ, capture_output=True, text=True, check=True, timeout=900
    )
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> int:
    """The peak with two layers, 4096 words and 4096 tokens of text."""
    folder = tmp_path_factory.mktemp("memory") / "small"
    return peak(folder, num_layers=2, vocab=4096, num_tokens=4096, ablation=False)


def test_the_peak_is_that_of_one_layer(small: int) -> None:
    assert small <= ALLOWED


def test_the_peak_stays_when_depth_vocabulary_and_text_grow(tmp_path: Path, small: int) -> None:
    large = peak(tmp_path / "large", num_layers=8, vocab=65536, num_tokens=8192, ablation=False)
    assert large <= small + LAYER // 2  # six layers more are 312 MiB in float32; embedding and head 480


def test_the_peak_stays_when_variants_are_compared(tmp_path: Path, small: int) -> None:
    compared = peak(tmp_path / "compared", num_layers=2, vocab=4096, num_tokens=4096, ablation=True)
    assert compared <= small + LAYER // 2
