"""`octavo merge --lora DIR --model DIR --out DIR`: a float checkpoint with a LoRA adapter folded in."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from octavo.quantization.errors import CheckpointError
from octavo.quantization.export.merge import Merged, merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `octavo merge`."""
    parser.add_argument("--lora", required=True, metavar="DIR", type=Path, help="adapter in peft's form")
    parser.add_argument("--model", required=True, metavar="DIR", type=Path, help="float checkpoint it was trained on")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder to make")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Make the folder. Exit code 1: it cannot be made, with one line that says why."""
    try:
        merged = _merge(arguments)
    except CheckpointError as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"octavo: error: {error.filename or arguments.out}: {error.strerror}", file=sys.stderr)
        return 1
    for note in merged.notes:
        print(f"octavo: {note}", file=sys.stderr)
    print(f"{arguments.out}: {merged.num_tensors} tensors changed, most of all {merged.name} by {merged.change:.2%}")
    return 0


def _merge(arguments: argparse.Namespace) -> Merged:
    columns = (TextColumn("merge"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=arguments.quiet) as bar:
        task = bar.add_task("merge", total=1.0)
        return merge(
            arguments.model, arguments.lora, arguments.out, lambda name, done: bar.update(task, completed=done)
        )
