"""Images and containers without a container engine: a base that debootstrap makes, buildah with chroot isolation, and
a container of our own making (unshare, a read-only root, tmpfs, no capabilities) to run what was built.

What pip needs of this machine (certificates, indexes, folders of wheels) goes in as build arguments and read-only
mounts, so nothing of it is in a Dockerfile.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from server.conftest import PORT_NAMES, REPOSITORY, free_ports

TOOLS = ("buildah", "debootstrap", "unshare", "setpriv", "tar")
DEBIAN = "docker.io/library/debian:bookworm-slim"
CERTIFICATES = "/mnt/ca.crt"
PIP_OPTIONS = ("index-url", "extra-index-url", "find-links")


def missing() -> str:
    """Why nothing can be built here; empty if it can."""
    if os.geteuid() != 0:
        return "building images needs root here"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


class Builder:
    """A store of images in a folder of its own. With `keep`, layers that are there already are used again."""

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        self._folder = folder
        self._keep = keep
        self._options = ("--root", str(folder / "store"), "--runroot", str(folder / "run"), "--storage-driver", "vfs")

    def buildah(self, *arguments: str, timeout: float = 120) -> str:
        command = ["buildah", *self._options, *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
        return done.stdout.strip()

    def make_debian(self) -> None:
        """A minimal Debian under the name that the Dockerfile's FROM has."""
        if self._keep and DEBIAN in self.buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
            return
        base = self._folder / "debian"
        made = ["debootstrap", "--variant=minbase", "bookworm", str(base)]
        done = subprocess.run(made, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
        shutil.rmtree(base / "var" / "cache" / "apt")
        shutil.rmtree(base / "var" / "lib" / "apt" / "lists")
        container = self.buildah("from", "scratch")
        self.buildah("add", "-q", container, f"{base}/", "/")
        self.buildah("commit", "-q", "--rm", container, DEBIAN)

    def build(self, dockerfile: str, tag: str) -> None:
        """What `docker build -f dockerfiles/… -t tag .` would do."""
        options = ["--isolation", "chroot", "--network", "host", f"--layers={str(self._keep).lower()}"]
        path = REPOSITORY / "dockerfiles" / dockerfile
        self.buildah(
            "bud",
            *options,
            "--format",
            "docker",
            *host_pip(),
            "-f",
            str(path),
            "-t",
            tag,
            str(REPOSITORY),
            timeout=1500,
        )

    def open(self, image: str) -> tuple[str, Path]:
        """A container of an image, not running: its name and its root file system."""
        container = self.buildah("from", "--pull-never", image)
        return container, Path(self.buildah("mount", container))

    def config(self, container: str) -> dict[str, Any]:
        """User, Env, Entrypoint, Healthcheck and so on."""
        return json.loads(self.buildah("inspect", container))["Docker"]["config"]

    def size(self, image: str) -> str:
        return self.buildah("images", "--format", "{{.Size}}", image)


def host_pip() -> list[str]:
    """This machine's pip settings as options of a build."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    options: list[str] = []
    for line in said.stdout.splitlines():
        name, _, quoted = line.partition("=")
        option, value = name.rpartition(".")[2], quoted.strip("'\"")
        if option == "cert":
            options += ["-v", f"{value}:{CERTIFICATES}:ro", "--build-arg", f"PIP_CERT={CERTIFICATES}"]
        if option in PIP_OPTIONS:
            options += ["--build-arg", f"PIP_{option.upper().replace('-', '_')}={value}"]
            local = [urlsplit(part).path for part in value.split() if part.startswith(("/", "file:"))]
            roots = sorted({"/" + "/".join(Path(path).parts[1:3]) for path in local if Path(path).exists()})
            options += [item for root in roots for item in ("-v", f"{root}:{root}:ro")]
    return _without_repeats(options)


def _without_repeats(options: list[str]) -> list[str]:
    pairs = list(dict.fromkeys(zip(options[::2], options[1::2])))
    return [item for pair in pairs for item in pair]


# As process 1 of its own namespace: everything read-only but /tmp and /dev/shm, no rights, no way to new ones.
IN_A_CONTAINER = """
set -e
root=$1; shm=$2; model=$3; shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for one in null zero random urandom full tty; do touch "$root/dev/$one"; mount --bind "/dev/$one" "$root/dev/$one"; done
mkdir "$root/dev/shm"
mount -t tmpfs -o "mode=1777,size=$shm" tmpfs "$root/dev/shm"
if [ -n "$model" ]; then
    mount --bind "$model" "$root/models"
    mount -o remount,bind,ro "$root/models"
fi
mount -o remount,bind,ro "$root"
rights="--clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
exec chroot "$root" setpriv --reuid="$RUN_AS" --regid="$RUN_AS" $rights -- env -i "$@"
"""


@dataclass
class Container:
    """One that runs. `lines` grows as it writes."""

    process: subprocess.Popen[str]
    ports: Mapping[str, str]
    lines: list[str]

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    @property
    def init(self) -> int:
        """The pid here of its process 1."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def wait_ready(self, *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url('HTTP_PORT')}/v2/health/ready", timeout=2).status_code == 200:
                    return
            time.sleep(0.2)
        raise AssertionError("not ready:\n" + "".join(self.lines[-60:]))

    def stop(self) -> int:
        """What `docker stop` does first. Returns the exit code."""
        os.kill(self.init, signal.SIGTERM)
        return self.process.wait(timeout=100)

    def kill(self) -> None:
        """End process 1, and with it all others of its namespace: the change of user undid unshare's --kill-child."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, IndexError, FileNotFoundError):
                os.kill(self.init, signal.SIGKILL)
            self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(
    root: Path,
    config: Mapping[str, Any],
    *command: str,
    shm: str = "1g",
    model: Path | None = None,
    stdin: int = subprocess.DEVNULL,
    **variables: str,
) -> Iterator[Container]:
    """Run an image's entry point (with a command, if one is given) as `docker run --read-only --cap-drop=ALL` would."""
    ports = dict(zip(PORT_NAMES, map(str, free_ports(len(PORT_NAMES)))))
    environ = {**dict(item.split("=", 1) for item in config["Env"]), **ports, "HOST": "127.0.0.1", **variables}
    inside = ["/bin/bash", "-c", 'cd "$0" && exec "$@"', config["WorkingDir"], *config["Entrypoint"], *command]
    unshared = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", IN_A_CONTAINER, "container"]
    settings = [f"{name}={value}" for name, value in environ.items()]
    process = subprocess.Popen(
        [*unshared, str(root), shm, str(model or ""), *settings, *inside],
        env={**os.environ, "RUN_AS": config["User"]},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
    reader.start()
    container = Container(process, ports, lines)
    try:
        yield container
    finally:
        container.kill()
        reader.join(10)
