"""What the doctor finds out about the server that the variables ask for: settings, folders, model, Triton, ports,
leftovers.

Changes nothing: no folder is made, no model fetched, nothing removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from octavo.cli.findings import Finding, note, ok, wrong
from octavo.node import run_dir
from octavo.node.errors import EXIT_ALREADY_RUNNING, EXIT_BAD_SETTINGS, NodeError
from octavo.node.model_folder import HUB_ID, check_folder
from octavo.node.ports import LOOPBACK, check_free
from octavo.node.triton import find_libpython, find_triton
from octavo.settings import Settings

PUBLIC_PORTS = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "PUSH_MODE_HTTP_PORT")


def server(settings: Settings) -> Iterator[Finding]:
    """Findings about one server. The model's files are opened only if nothing else would stop a start."""
    stops = 0
    for finding in _cheap(settings):
        stops = stops or finding.stops
        yield finding
    if not stops and Path(settings.model_dir).is_dir():
        yield _readable(Path(settings.model_dir), settings)


def _cheap(settings: Settings) -> Iterator[Finding]:
    yield _run_dir(settings)
    yield _log_dir(settings)
    yield _triton(settings)
    yield _model(settings)
    yield from _ports(settings)
    yield from leftovers(settings)


def _found(check: Callable[[], object], text: str) -> Finding:
    try:
        check()
    except NodeError as error:
        return wrong(str(error), stops=error.exit_code)
    return ok(text)


def _run_dir(settings: Settings) -> Finding:
    folder = settings.run_dir
    if folder.exists():
        return _found(lambda: run_dir.make_run_dir(folder), f"RUN_DIR={folder}")
    return _writable("RUN_DIR", folder)


def _log_dir(settings: Settings) -> Finding:
    return _writable("LOG_DIR", settings.log_dir)


def _writable(name: str, folder: Path) -> Finding:
    """Whether the folder, or the nearest one above it that exists, can be written."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return ok(f"{name}={folder}")
    return wrong(f"{name}={folder}: {nearest} cannot be written", stops=EXIT_BAD_SETTINGS)


def _triton(settings: Settings) -> Finding:
    try:
        install = find_triton(settings)
        find_libpython(install)
    except NodeError as error:
        return wrong(str(error), stops=error.exit_code)
    version = install.home / "TRITON_VERSION"
    number = f" {version.read_text().strip()}" if version.is_file() else ""
    return ok(f"Triton{number} at {install.home}")


def _model(settings: Settings) -> Finding:
    folder = Path(settings.model_dir)
    if not folder.is_dir() and HUB_ID.fullmatch(settings.model_dir):
        return note(f"MODEL_DIR={settings.model_dir}: will be fetched from the hub")
    return _found(lambda: check_folder(folder, settings.model_config_path), f"MODEL_DIR={folder}")


def _readable(folder: Path, settings: Settings) -> Finding:
    """Configuration, tokenizer and the headers of the weight files, read as a start reads them."""
    from octavo.models.config import load_config  # torch takes seconds
    from octavo.quantization.errors import CheckpointError
    from octavo.quantization.formats.source import TensorSource
    from octavo.text.tokenizer import Tokenizer, TokenizerError

    try:
        config = load_config(folder, config_path=settings.model_config_path)
        names = list(TensorSource(folder).names())
        Tokenizer.load(folder)
    except (CheckpointError, TokenizerError, ValueError, OSError) as error:
        return wrong(f"MODEL_DIR={folder}: {error}", stops=EXIT_BAD_SETTINGS)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    what = f"{config.architecture}, context {config.context_length}, {len(names)} tensors, {size >> 20} MiB"
    return ok(f"model: {what} (octavo inspect reads every weight)")


def _ports(settings: Settings) -> Iterator[Finding]:
    """Each of the ports; those of this very server, if it runs, are fine."""
    record = run_dir.read_record(settings.run_dir)
    own = record.ports if record is not None and record.node.alive else {}
    if record is not None and own:
        yield note(f"this server is running (pid {record.node.pid}): a second start ends with {EXIT_ALREADY_RUNNING}")
    for name in PUBLIC_PORTS:
        port = getattr(settings, name.lower())
        if port == -1:
            yield ok(f"{name}=-1: off")
        elif own.get(name) == port:
            yield ok(f"{name}={port}: of the running server")
        else:
            yield _port(name, settings.host, port)
    if not own:
        yield _port("INFER_QUEUE_PORT", LOOPBACK, settings.infer_queue_port)


def _port(name: str, host: str, port: int) -> Finding:
    return _found(lambda: check_free(name, host, port), f"{name}={port}: free on {host}")


def leftovers(settings: Settings) -> Iterator[Finding]:
    """What servers of this user that are gone have left: records of the dead, processes, shared memory."""
    records = {}
    for path in {settings.run_dir, *(entry.parent for entry in settings.run_dir.parent.glob("*/node.json"))}:
        if (record := run_dir.read_record(path)) is not None:
            records[path] = record
    dead = {path: record for path, record in records.items() if not record.node.alive}
    for path, record in sorted(dead.items()):
        alive = [str(child.pid) for child in run_dir.remains(record)]
        also = f"; still running: pid {', '.join(alive)}" if alive else ""
        yield note(f"left over: {path} of a killed server{also} (stop_server.sh or the next start there clears it)")
    running = _command_lines_of_triton()
    regions = [name for name in _regions() if not any(_prefix(name) in line for line in running)]
    if regions:
        yield note(f"left over: {len(regions)} regions in /dev/shm that no running Triton uses, e.g. {regions[0]}")
    if not dead and not regions:
        yield ok("nothing left over of earlier servers")


def _command_lines_of_triton() -> list[str]:
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "shm-region-prefix-name=" in line:
                lines.append(line)
    return lines


def _prefix(region: str) -> str:
    """ "octavo_0123…_" of "octavo_0123…_5e35…" """
    return "_".join(region.split("_")[:2]) + "_"


def _regions() -> list[str]:
    """Names in /dev/shm that our servers make, of this user."""
    if not run_dir.SHARED_MEMORY.is_dir():
        return []
    names = []
    for entry in run_dir.SHARED_MEMORY.iterdir():
        if entry.name.startswith(run_dir.SHM_PREFIX) and _is_ours(entry):
            names.append(entry.name)
    return sorted(names)


def _is_ours(entry: Path) -> bool:
    try:
        return entry.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False
