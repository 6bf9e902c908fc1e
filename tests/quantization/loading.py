"""A model folder read for its report alone."""

from __future__ import annotations

from pathlib import Path

from octavo.cli.inspect import inspect
from octavo.quantization.load_report import LoadReport
from octavo.settings import with_overrides


def load_report(folder: Path) -> LoadReport:
    return inspect(folder, with_overrides({"model_dir": folder}, {})).report
