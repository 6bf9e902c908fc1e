"""`python -m octavo.node [--follow]`: runs the server in the foreground; start_server.sh runs it detached.

With --follow, as in images, everything that is logged goes to standard output, the children's lines too.
Ends with node's exit code.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable

from octavo.node import run_dir
from octavo.node.errors import EXIT_BAD_SETTINGS, NodeError, error_line
from octavo.node.model_folder import resolve_model
from octavo.node.ports import check_all
from octavo.node.programs import Programs, make_plan
from octavo.node.shared_memory import warn_small_shared_memory
from octavo.node.tls import check_tls
from octavo.settings import Settings, SettingsError, child_environ, misspelled

PREDECESSOR_SECONDS = 15.0  # for the children of a node that was killed


def main(programs: Programs | None = None, *, follow: bool = False) -> int:
    """Run until asked to end. Every failure is one line on standard error."""
    try:
        settings = Settings.from_environ()
        warn_misspelled()
        return run(settings, programs or Programs(), follow=follow)
    except SettingsError as error:
        return fail(error, EXIT_BAD_SETTINGS)
    except NodeError as error:
        return fail(error, error.exit_code)


def fail(error: Exception, code: int) -> int:
    print(error_line(error), file=sys.stderr, flush=True)
    return code


def warn_misspelled() -> None:
    """One line for each variable that looks like a mistyped one of ours."""
    for given, known in misspelled():
        print(
            f"octavo: warning: {given} is not a variable of this server; did you mean {known}?",
            file=sys.stderr,
            flush=True,
        )


def run(settings: Settings, programs: Programs, *, follow: bool = False) -> int:
    """One server's life, from the run directory to its removal. Raises NodeError."""
    from octavo.node.supervisor import supervise  # grpc: not before the settings are known to be good

    stream = sys.stdout if follow else sys.stderr
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=settings.log_level, format=line, stream=stream)
    warn_small_shared_memory()
    run_dir.make_run_dir(settings.run_dir)
    handle = run_dir.lock(settings.run_dir)  # held until the process ends
    run_dir.make_log_dir(settings.log_dir)
    clear_predecessor(settings, clock=time.monotonic)
    check_all(settings)
    check_tls(settings)
    environ = {**child_environ(settings), **resolve_model(settings)}
    plan = make_plan(settings, programs, environ, follow=follow)
    try:
        # Not asyncio.run: it would wait for every last task, and one inside grpc may never end.
        return asyncio.new_event_loop().run_until_complete(supervise(plan))
    finally:
        run_dir.remove_record(settings.run_dir)
        os.close(handle)


def clear_predecessor(settings: Settings, *, clock: Callable[[], float]) -> None:
    """If the last node here was killed: wait until its children have ended by themselves, remove what they left."""
    record = run_dir.read_record(settings.run_dir)
    if record is None:
        return
    deadline = clock() + PREDECESSOR_SECONDS
    while list(run_dir.remains(record)) and clock() < deadline:
        time.sleep(0.1)
    run_dir.remove_shared_memory(record.shm_prefix)
    run_dir.remove_record(settings.run_dir)
    while clock() < deadline:
        try:
            return check_all(settings)
        except NodeError:
            time.sleep(0.1)


if __name__ == "__main__":
    exit_code = main(follow=sys.argv[1:] == ["--follow"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # what is left of grpc's threads has nothing more to say
