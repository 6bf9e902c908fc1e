"""`octavo doctor`: looks at everything a start needs and says what is missing. Starts and changes nothing."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from octavo.node.errors import NodeError
from octavo.node.model_folder import check_folder
from octavo.node.ports import check_all
from octavo.node.triton import find_libpython, find_triton
from octavo.settings import Settings, SettingsError, misspelled

NEEDED = (
    "fastapi",
    "grpc",
    "jinja2",
    "msgspec",
    "prometheus_client",
    "safetensors",
    "tokenizers",
    "torch",
    "uvicorn",
    "zmq",
)
MIN_SHM_BYTES = 256 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(arguments: argparse.Namespace) -> int:
    """One line per finding; exit code 1 if something is wrong."""
    wrong = 0
    for fine, text in findings():
        print(("ok     " if fine else "WRONG  ") + text)
        wrong += not fine
    return 1 if wrong else 0


def findings() -> Iterator[tuple[bool, str]]:
    """Pairs of (is it fine, what was found)."""
    yield True, f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} CPUs"
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    yield not missing, "packages: " + (f"missing {', '.join(missing)}" if missing else "all there")
    yield shutil.which("g++") is not None, "g++ (builds the CPU kernels)"
    try:
        settings = Settings.from_environ()
    except SettingsError as error:
        yield False, str(error)
        return
    yield True, "settings"
    for given, known in misspelled():
        yield False, f"{given} is not a variable of this server; did you mean {known}?"
    for name, check in _checks(settings):
        yield _outcome(name, check)
    yield _shared_memory()


def _checks(settings: Settings) -> list[tuple[str, Callable[[], object]]]:
    return [
        (
            f"model folder {settings.model_dir}",
            lambda: check_folder(Path(settings.model_dir), settings.model_config_path),
        ),
        ("Triton", lambda: find_libpython(find_triton(settings))),
        ("ports", lambda: check_all(settings)),
    ]


def _outcome(name: str, check: Callable[[], object]) -> tuple[bool, str]:
    try:
        check()
    except NodeError as error:
        return False, f"{name}: {error}"
    return True, name


def _shared_memory() -> tuple[bool, str]:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return False, "/dev/shm is missing; Triton needs it (docker run --shm-size=5g)"
    return free >= MIN_SHM_BYTES, f"/dev/shm has {free >> 20} MiB free (docker's 64 MiB are too few: --shm-size=5g)"
