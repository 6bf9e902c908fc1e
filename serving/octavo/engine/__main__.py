"""`python -m octavo.engine`: settings, the lifetime lock, the link key, the socket, then the server.

Exit codes: 0 asked to end, 1 a crash, 2 bad settings or model, 3 the port is in use, 4 another engine holds the lock.
Codes 2 to 4 come with one line on stderr. Torch is imported by the loading thread, after all of that was checked.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

import zmq

from octavo.engine import run_dir
from octavo.engine.core import EngineCore, scheduler_for
from octavo.engine.server import Link, LoadFailed, Progress, Server, Stop
from octavo.settings import Settings, SettingsError, misspelled, set_thread_environ

EXIT_OK, EXIT_CRASH, EXIT_BAD_SETTINGS, EXIT_PORT_IN_USE, EXIT_LOCKED = 0, 1, 2, 3, 4
ORPHAN_GRACE_SECONDS = 5.0

log = logging.getLogger("octavo.engine")


def main() -> int:
    """Run one engine; the exit code."""
    try:
        settings = Settings.from_environ()
        run_dir.make_private(settings.run_dir)
        lock = run_dir.take_lock(settings.run_dir)
    except (SettingsError, run_dir.RunDirError) as error:
        return _complain(error, EXIT_BAD_SETTINGS)
    except run_dir.EngineRunning as error:
        return _complain(error, EXIT_LOCKED)
    set_up_log(settings.log_level)
    for given, known in misspelled():
        log.warning("%s is not a setting; did you mean %s?", given, known)
    set_thread_environ(settings)
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(stop, "asked", True))
    try:
        return _run_locked(settings, stop)
    finally:
        run_dir.remove_key(settings.run_dir)
        os.close(lock)


def _run_locked(settings: Settings, stop: Stop) -> int:
    key = run_dir.write_key(settings.run_dir)
    try:
        link = Link(port=settings.infer_queue_port)
    except zmq.ZMQError as error:
        reason = os.strerror(error.errno or errno.EIO)
        taken = error.errno == errno.EADDRINUSE
        code = EXIT_PORT_IN_USE if taken else EXIT_BAD_SETTINGS
        return _complain(f"INFER_QUEUE_PORT={settings.infer_queue_port}: {reason}", code)
    server = Server(link, key, loader(settings), time.monotonic, managed_by_node=settings.managed_by_node, stop=stop)
    if settings.managed_by_node:
        watch_parent(server.request_stop)
    try:
        return server.run()
    except LoadFailed as failure:
        log.debug("load failed", exc_info=failure)
        return _complain(_one_line(failure.__cause__ or failure), EXIT_BAD_SETTINGS)
    finally:
        link.close()


def loader(settings: Settings) -> Callable[[Progress], EngineCore]:
    """What loads the model on the server's second thread."""

    def load(progress: Progress) -> EngineCore:
        from octavo.engine.load import load_runner  # torch: heavy, so only now

        runner = load_runner(settings, progress)
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not look at it between steps
        return EngineCore(scheduler_for(settings, runner.info), runner, time.monotonic)

    return load


def watch_parent(stop: Callable[[], None]) -> None:
    """Ask to end when the parent process is gone, and see to it: nobody else would."""
    parent = os.pidfd_open(os.getppid())

    def watch() -> None:
        select.select([parent], [], [])
        log.warning("the parent process is gone")
        stop()
        time.sleep(ORPHAN_GRACE_SECONDS)
        os._exit(EXIT_CRASH)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def set_up_log(level: str) -> None:
    """To stderr, which whoever started this process keeps in a file."""
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
    )


def _complain(error: object, code: int) -> int:
    print(f"octavo: error: {error}", file=sys.stderr, flush=True)
    return code


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:1000] if not isinstance(error, ValueError) else text[:1000]


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a load that was cut short must not hold up the end, nor run into a dying interpreter
