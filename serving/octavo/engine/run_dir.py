"""The run directory's engine files: the lifetime lock that makes the engine single, and the link key that dies with it.

Used by the engine process and by front ends that look for it. Knows no settings and no sockets.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import time
from pathlib import Path

LOCK_NAME = "engine.lock"  # held by a living engine; its text is the pid
KEY_NAME = "engine.key"  # hex link key, 0600


class RunDirError(Exception):
    """The directory cannot be used; one line for the user."""


class EngineRunning(Exception):
    """Another engine holds the lock; one line for the user."""


def make_private(path: Path) -> None:
    """Create the directory for this user alone (0700). RunDirError if another user could write into it."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise RunDirError(f"RUN_DIR={path}: cannot be made: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise RunDirError(f"RUN_DIR={path}: is not a folder")
    if status.st_uid != os.getuid():
        raise RunDirError(f"RUN_DIR={path}: belongs to another user (uid {status.st_uid})")
    if status.st_mode & 0o022:
        raise RunDirError(f"RUN_DIR={path}: can be written by other users; it needs mode 0700")


def take_lock(path: Path) -> int:
    """The engine's lock, held as long as the returned descriptor is open. EngineRunning if another engine has it."""
    handle = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if not _try_lock(handle):
        os.close(handle)
        raise EngineRunning(f"another engine (pid {running_pid(path) or 'unknown'}) holds {path / LOCK_NAME}")
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())
    return handle


def _try_lock(handle: int, *, attempts: int = 5) -> bool:
    """A few attempts, since `is_locked` of others holds the lock for an instant."""
    for attempt in range(attempts):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt < attempts - 1:
                time.sleep(0.05)
    return False


def running_pid(path: Path) -> int | None:
    """The pid that the newest engine wrote; it may have ended."""
    try:
        return int((path / LOCK_NAME).read_text())
    except (OSError, ValueError):
        return None


def is_locked(path: Path) -> bool:
    """Whether a living engine holds the lock."""
    try:
        handle = os.open(path / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def write_key(path: Path) -> str:
    """A new link key, written before the socket exists so that whoever can connect can read it."""
    key = secrets.token_hex(32)
    temporary = path / f".{KEY_NAME}.new"
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(key)
    temporary.replace(path / KEY_NAME)
    return key


def read_key(path: Path) -> str | None:
    """The link key of the running engine, or None while there is none."""
    try:
        return (path / KEY_NAME).read_text().strip() or None
    except OSError:
        return None


def remove_key(path: Path) -> None:
    (path / KEY_NAME).unlink(missing_ok=True)
