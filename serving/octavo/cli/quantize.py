"""`octavo quantize MODEL`: make an int8 checkpoint of a float one, with a report of what it lost."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from octavo.quantization.calibrate import SELF, CalibrationText, read_text, split, write_own_text
from octavo.quantization.errors import CheckpointError
from octavo.quantization.export.allocator import return_freed_blocks
from octavo.quantization.export.options import Options
from octavo.quantization.export.scheme_names import NAMES, parse_scheme
from octavo.quantization.export.sweep import Outcome, check, quantize
from octavo.settings import SettingsError
from octavo.text.tokenizer import Tokenizer, TokenizerError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `octavo quantize`."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a float checkpoint")
    parser.add_argument("--scheme", required=True, help=NAMES)
    parser.add_argument("--calibration", required=True, metavar="FILE.jsonl|self", help="texts or messages, or self")
    parser.add_argument("--held-out", metavar="FILE.jsonl", type=Path, help="text to measure on instead of one in five")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="folder to make")
    parser.add_argument("--samples", type=int, default=128, help="sequences used; one in five is measured on (128)")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a sequence; longer texts become several (512)")
    parser.add_argument("--keep-float", type=float, default=0.0, metavar="N", help="%% of parameters left in float (0)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sequences (0)")
    parser.add_argument("--kv-scales", choices=("tensor", "head"), default="tensor", help="static cache scales")
    parser.add_argument("--no-smoothing", action="store_true", help="leave outliers where they are")
    parser.add_argument("--no-gptq", action="store_true", help="nearest rounding")
    parser.add_argument("--no-act-order", action="store_true", help="GPTQ in the order of columns")
    parser.add_argument("--no-kv-smoothing", action="store_true", help="leave outliers of K where they are")
    parser.add_argument("--no-clipping", action="store_true", help="static input scales hold every value seen")
    parser.add_argument("--no-ablation", action="store_true", help="make only the last variant: quicker")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Make the checkpoint. Exit code 1: it cannot be made, with one line that says why."""
    return_freed_blocks()
    try:
        options = _options(arguments)
        outcome = _make(options, arguments.held_out, progress=not arguments.quiet)
    except (CheckpointError, SettingsError, TokenizerError) as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"octavo: error: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("octavo: stopped; the same command goes on from the last finished layer", file=sys.stderr)
        return 130
    print("\n".join(_lines(options, outcome)))
    return 0


def _options(arguments: argparse.Namespace) -> Options:
    if arguments.samples < 2:
        raise CheckpointError(f"--samples {arguments.samples}: must be at least 2")
    return Options(
        model=arguments.model,
        out=arguments.out,
        scheme=parse_scheme(arguments.scheme),
        calibration=arguments.calibration,
        num_samples=arguments.samples,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        keep_float=arguments.keep_float,
        smoothing=not arguments.no_smoothing,
        gptq=not arguments.no_gptq,
        keys=not arguments.no_kv_smoothing,
        clipping=not arguments.no_clipping,
        act_order=not arguments.no_act_order,
        cache_per_head=arguments.kv_scales == "head",
        ablation=not arguments.no_ablation,
    )


def _make(options: Options, held_out: Path | None, *, progress: bool) -> Outcome:
    check(options)
    text = _text(options, held_out, progress=progress)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("quantize", total=1.0)
        return quantize(options, text, lambda stage, done: bar.update(task, description=stage, completed=done))


def _text(options: Options, held_out: Path | None, *, progress: bool) -> CalibrationText:
    tokenizer, apart = Tokenizer.load(options.model), None
    if held_out is not None:
        apart = read_text(held_out, tokenizer, max_tokens=options.max_tokens, flag="--held-out")
    if options.calibration == SELF:
        sequences = write_own_text(
            options.model,
            num_sequences=options.num_samples,
            max_tokens=options.max_tokens,
            seed=options.seed,
            progress=progress,
        )
    else:
        sequences = read_text(Path(options.calibration), tokenizer, max_tokens=options.max_tokens)
    return split(sequences, num_samples=options.num_samples, seed=options.seed, held_out=apart)


def _lines(options: Options, outcome: Outcome) -> list[str]:
    exact = outcome.exact
    lines = [f"{options.out}: {options.scheme.name}; perplexity of the float model {exact.perplexity:.4f}"]
    for name, made in outcome.variants.items():
        change = made.perplexity / exact.perplexity - 1
        lines.append(
            f"  {name:12} perplexity {made.perplexity:.4f} ({change:+.2%}), "
            f"top-1 agreement {made.top1_agreement:.2%}, KL {made.kl:.2e}"
        )
    return [*lines, f"report: {options.out / 'report.md'}"]
