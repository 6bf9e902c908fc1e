"""`octavo doctor`: looks at everything a start needs and says what is missing. Starts and changes nothing.

`octavo doctor --start`, which `start_server.sh --check` runs, says only whether a start would get as far as starting
its processes, and ends with the exit code that the start would end with.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from octavo.cli.findings import WRONG, Finding, ok, wrong
from octavo.cli.machine import machine
from octavo.cli.server_checks import server
from octavo.node.errors import EXIT_BAD_SETTINGS, error_line
from octavo.settings import Settings, SettingsError, misspelled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `octavo doctor`."""
    parser.add_argument("--start", action="store_true", help="only what would stop a start; its exit code")


def run(arguments: argparse.Namespace) -> int:
    """One line per finding; exit code 1 if something is wrong. With --start: the exit code of a start."""
    if arguments.start:
        return _check_start()
    worst = 0
    for finding in findings():
        print(finding.line, flush=True)
        worst = max(worst, finding.mark == WRONG)
    return int(worst)


def findings() -> Iterator[Finding]:
    """Everything, the cheap things first."""
    try:
        settings = Settings.from_environ()
    except SettingsError as error:
        yield from machine()
        yield wrong(str(error), stops=EXIT_BAD_SETTINGS)
        return
    yield from machine(device=settings.device)
    yield ok("settings: every variable has an allowed value")
    for given, known in misspelled():
        yield wrong(f"{given} is not a variable of this server; did you mean {known}?")
    yield from server(settings)


def _check_start() -> int:
    """Every reason not to start, one line each on the way, and the exit code of the first."""
    code = 0
    for finding in findings():
        if finding.stops:
            print(error_line(finding.text), flush=True)
            code = code or finding.stops
        elif finding.mark == WRONG:
            print(f"octavo: warning: {finding.text}", flush=True)
    if not code:
        print("octavo: settings, model folder, Triton and ports are in order")
    return code
