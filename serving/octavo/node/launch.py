"""The start command: `python -m octavo.node.launch`, called by start_server.sh.

Checks what can be checked, starts node detached with its output in LOG_DIR/node.log, shows progress until it is ready
and says what to try. If it does not get ready: the reason, nothing left running, a non-zero exit code. Standard
library only.
"""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time

from octavo import __version__
from octavo.node import run_dir
from octavo.node.__main__ import clear_predecessor, fail, warn_misspelled
from octavo.node.errors import EXIT_ALREADY_RUNNING, EXIT_BAD_SETTINGS, NodeError
from octavo.node.logs import last_error, progress_step
from octavo.node.model_folder import resolve_model
from octavo.node.ports import check_all
from octavo.node.shared_memory import warn_small_shared_memory
from octavo.node.tls import check_tls
from octavo.node.triton import find_libpython, find_triton
from octavo.settings import Settings, SettingsError, child_environ

NODE = (sys.executable, "-m", "octavo.node")
LOOK_SECONDS = 0.1
MARGIN_SECONDS = 20.0  # node itself gives up after START_SECONDS


def main(*, node: tuple[str, ...] = NODE) -> int:
    """Start and wait. Returns the exit code."""
    began = time.monotonic()
    try:
        settings = Settings.from_environ()
        warn_misspelled()
        warn_small_shared_memory()
        changes = prepare(settings)
        process, offset = start(settings, changes, node)
        wait_ready(settings, process, offset, deadline=began + settings.start_seconds + MARGIN_SECONDS)
    except SettingsError as error:
        return fail(error, EXIT_BAD_SETTINGS)
    except NodeError as error:
        return fail(error, error.exit_code)
    print(welcome(settings, pid=process.pid, seconds=time.monotonic() - began))
    return 0


def prepare(settings: Settings) -> dict[str, str]:
    """The checks that node makes too, and the download of a model, where the user sees it. Raises NodeError."""
    run_dir.make_run_dir(settings.run_dir)
    run_dir.make_log_dir(settings.log_dir)
    record = run_dir.read_record(settings.run_dir)
    if record is not None and record.node.alive:
        raise NodeError(
            f"already running (pid {record.node.pid}); stop it with stop_server.sh", exit_code=EXIT_ALREADY_RUNNING
        )
    clear_predecessor(settings, clock=time.monotonic)
    check_all(settings)
    check_tls(settings)
    find_libpython(find_triton(settings))
    return resolve_model(settings)


def start(settings: Settings, changes: dict[str, str], node: tuple[str, ...]) -> tuple[subprocess.Popen[bytes], int]:
    """Start node in a session of its own. Returns it and the size of its log before."""
    path = settings.log_dir / "node.log"
    environ = {**child_environ(settings), **changes}
    environ.pop("OCTAVO_NODE")  # node itself is nobody's child
    with open(path, "ab") as log:
        offset = log.tell()
        process = subprocess.Popen(
            node, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    print(f"octavo {__version__}: starting {settings.model_dir} (pid {process.pid}, log {path})", flush=True)
    return process, offset


def wait_ready(settings: Settings, process: subprocess.Popen[bytes], offset: int, *, deadline: float) -> None:
    """Return when ready. Raises NodeError with node's own reason; node is gone then."""
    log, said = settings.log_dir / "node.log", ""
    try:
        while True:
            if (code := process.poll()) is not None:
                raise NodeError(last_error(log, offset) or f"node ended, see {log}", exit_code=code if code > 0 else 1)
            health = look(settings)
            if health.get("ready"):
                return
            reason = str(health.get("reason") or "")
            if health.get("state") == "down":
                reason = ""  # node gives up, and says why with its last line
            if said != (said := progress_step(reason)) and reason:
                print(f"  {reason}", flush=True)
            if time.monotonic() > deadline:
                raise NodeError(f"not ready in time: {reason or 'no answer'}; see {log}")
            time.sleep(LOOK_SECONDS)
    except (NodeError, KeyboardInterrupt) as error:
        end(process)
        if isinstance(error, KeyboardInterrupt):
            raise NodeError("interrupted; the server was stopped", exit_code=130) from None
        raise


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop node without a long drain (two signals); its children go with it."""
    for number, seconds in ((signal.SIGTERM, 0.5), (signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        if process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue


def look(settings: Settings) -> dict[str, object]:
    """The health page; empty if there is none yet."""
    connection = http.client.HTTPConnection(settings.local_address, settings.http_port, timeout=2)
    try:
        connection.request("GET", "/v2/health")
        body = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    finally:
        connection.close()
    return body if isinstance(body, dict) else {}


def welcome(settings: Settings, *, pid: int, seconds: float) -> str:
    """Ports and what to try."""
    at = settings.local_target
    gateway = settings.push_mode_http_port
    lines = [
        f"octavo: ready in {seconds:.1f} s (pid {pid})",
        f"  health   http://{at(settings.http_port)}/v2/health/ready",
        f"  metrics  http://{at(settings.metrics_port)}/metrics",
        f"  gRPC     {at(settings.grpc_port)} (model `model`)",
    ]
    if gateway != -1:
        key = " -H 'Authorization: Bearer <one of API_KEYS>'" if settings.api_keys else ""
        scheme = "http" if settings.tls_certfile is None else "https"
        lines += [
            f"  HTTP     {scheme}://{at(gateway)}/v1",
            f"try: curl {scheme}://{at(gateway)}/v1/chat/completions -H 'Content-Type: application/json'{key}"
            ' -d \'{"text": "hello, llm"}\'',
        ]
    return "\n".join([*lines, "stop: bash stop_server.sh"])


if __name__ == "__main__":
    sys.exit(main())
