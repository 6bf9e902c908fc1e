"""A process that makes an int8 checkpoint and says what it took.

Run as a program: `python quantize_peak.py FOLDER OUT SCHEME TOKENS ABLATION` prints the peak over what the process had
before, in bytes of resident memory: mapped pages of files count.
"""

from __future__ import annotations

import contextlib
import gc
import random
import sys
from pathlib import Path

from octavo.models.config import load_config
from octavo.quantization.calibrate import CalibrationText
from octavo.quantization.export import report, sweep
from octavo.quantization.export.allocator import return_freed_blocks
from octavo.quantization.export.options import Options
from octavo.quantization.export.scheme_names import parse_scheme
from quantization.peak_memory import memory

SEQUENCE = 128  # tokens


def measure(folder: Path, out: Path, *, scheme: str, num_tokens: int, ablation: bool) -> int:
    """The peak of one run."""
    assert report  # what it draws with is imported before the mark
    vocabulary, rng = load_config(folder).vocab_size, random.Random(0)
    sequences = [[rng.randrange(vocabulary) for _ in range(SEQUENCE)] for _ in range(num_tokens // SEQUENCE)]
    text = CalibrationText(sequences, [[rng.randrange(vocabulary) for _ in range(SEQUENCE)] for _ in range(2)])
    options = Options(folder, out, parse_scheme(scheme), "text", ablation=ablation)
    return_freed_blocks()  # as the command does
    gc.collect()
    before = memory("VmRSS")
    with contextlib.suppress(OSError):  # where the mark cannot be reset, the peak is overstated, not understated
        Path("/proc/self/clear_refs").write_text("5")
    sweep.quantize(options, text, lambda stage, fraction: None)
    return memory("VmHWM") - before


if __name__ == "__main__":
    model, target, wanted, tokens, compares = sys.argv[1:]
    print(measure(Path(model), Path(target), scheme=wanted, num_tokens=int(tokens), ablation=compares == "1"))
