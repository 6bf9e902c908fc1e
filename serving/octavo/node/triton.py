"""Finds Triton and knows its command line and environment. Pure apart from links it makes in the run directory.

Triton is TRITONSERVER_HOME, else /opt/tritonserver, else what the nvidia-pytriton wheel carries. Its Python backend
starts a stub process that embeds the interpreter: the stub must be built for our Python version and must find
libpython and our packages.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from octavo.node.errors import EXIT_BAD_SETTINGS, NodeError
from octavo.node.ports import LOOPBACK
from octavo.node.run_dir import process_stat
from octavo.settings import REPOSITORY, Settings

IMAGE_HOME = Path("/opt/tritonserver")
MODEL_REPOSITORY = REPOSITORY / "model_repository"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
STUB = "triton_python_backend_stub"
BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")
RESTRICTED = "shared-memory,model-repository,model-config,logging,trace,statistics"
EXIT_TIMEOUT_SECONDS = 5  # finalize takes about two; cut short, Triton exits with an error and leaves shared memory


@dataclass(frozen=True)
class TritonInstall:
    """The parts of one Triton that fit this interpreter."""

    home: Path
    backend: Path  # folder with libtriton_python.so
    stub: Path
    libraries: tuple[Path, ...]  # for LD_LIBRARY_PATH

    @property
    def server(self) -> Path:
        return self.home / "bin" / "tritonserver"


@dataclass(frozen=True)
class TritonPorts:
    """Where one Triton listens."""

    host: str
    grpc: int
    metrics: int  # loopback


def find_triton(settings: Settings) -> TritonInstall:
    """The first Triton that fits. Raises NodeError that says what was looked at."""
    refused = []
    for home in _homes(settings.tritonserver_home):
        found = _install_at(home)
        if isinstance(found, TritonInstall):
            _check_numpy(found)
            return found
        refused.append(f"{home}: {found}")
    looked = "; ".join(refused) or "neither /opt/tritonserver nor the nvidia-pytriton wheel is installed"
    raise NodeError(f"no Triton for Python {PYTHON}: {looked}", exit_code=EXIT_BAD_SETTINGS)


def _check_numpy(install: TritonInstall) -> None:
    """Raise NodeError where stub and numpy disagree on the layout of arrays: strings would arrive as garbage."""
    version = importlib.metadata.version("numpy")
    if int(version.partition(".")[0]) >= 2 and b"numpy._core" not in install.stub.read_bytes():
        reason = f"this Triton's Python backend needs numpy below 2, found {version}: pip install 'numpy<2'"
        raise NodeError(f"{reason} (Python 3.10 to 3.12)", exit_code=EXIT_BAD_SETTINGS)


def _homes(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    if IMAGE_HOME.is_dir():
        yield IMAGE_HOME
    try:
        wheel = importlib.metadata.distribution("nvidia-pytriton")
    except importlib.metadata.PackageNotFoundError:
        return
    yield Path(str(wheel.locate_file("pytriton/tritonserver")))


def _install_at(home: Path) -> TritonInstall | str:
    """The parts found there, or why they do not fit."""
    backend = home / "backends" / "python"
    if not (home / "bin" / "tritonserver").is_file():
        return "no bin/tritonserver in it"
    if not (backend / BACKEND_FILES[0]).is_file():
        return "no Python backend in it"
    stubs = [home / "python_backend_stubs" / PYTHON / STUB, backend / STUB]
    stub = next((path for path in stubs if path.is_file() and stub_python(path) == PYTHON), None)
    if stub is None:
        return f"its Python backend stub is not for Python {PYTHON}"
    libraries = tuple(path for path in (home / "lib", home.parent.parent / "nvidia_pytriton.libs") if path.is_dir())
    return TritonInstall(home, backend, stub, libraries)


def stub_python(stub: Path) -> str | None:
    """The Python version whose library a stub names ("3.11"); a wheel's own copy has a hash in its name."""
    match = re.search(rb"libpython3(?:-[0-9a-f]+)?\.(\d+)\.so", stub.read_bytes())
    return f"3.{match[1].decode()}" if match else None


def find_libpython(install: TritonInstall) -> Path | None:
    """The shared library of this interpreter that the stub loads; None if the loader finds one by itself."""
    if re.search(rb"libpython3-[0-9a-f]+\.", install.stub.read_bytes()):
        return None  # the wheel brings it
    name = f"libpython{PYTHON}.so.1.0"
    folders = [
        sysconfig.get_config_var("LIBDIR"),
        f"{sys.base_prefix}/lib",
        sysconfig.get_config_var("LIBPL"),
        f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}",
    ]
    for folder in folders:
        if folder and (Path(folder) / name).is_file():
            return Path(folder) / name
    raise NodeError(
        f"{name} is missing, which Triton's Python backend needs: apt-get install libpython{PYTHON}, "
        "or use a Python built with --enable-shared",
        exit_code=EXIT_BAD_SETTINGS,
    )


def prepare(install: TritonInstall, folder: Path) -> Path:
    """Links to backend, stub and libpython below `folder`, as the install may be read-only. Returns `folder`."""
    targets = {f"backends/python/{name}": install.backend / name for name in BACKEND_FILES}
    targets[f"backends/python/{STUB}"] = install.stub
    targets["backends/python/octavo"] = REPOSITORY / "serving" / "octavo"  # the stub's sys.path has this folder
    if (library := find_libpython(install)) is not None:
        targets[f"lib/{library.name}"] = library
    for name, target in targets.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return folder


def command(
    install: TritonInstall, *, prepared: Path, repository: Path, ports: TritonPorts, shm_prefix: str, secret: str
) -> tuple[str, ...]:
    """Triton's command line. HTTP is off; protocols that nobody here uses need the secret, which nobody is told."""
    gpu = Path("/dev/nvidiactl").exists()
    return (
        str(install.server),
        f"--model-repository={repository}",
        f"--backend-directory={prepared / 'backends'}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--disable-auto-complete-config",
        "--allow-http=false",
        f"--grpc-address={_bracketed(ports.host)}",
        f"--grpc-port={ports.grpc}",
        f"--grpc-restricted-protocol={RESTRICTED}:octavo-key={secret}",
        f"--metrics-address={LOOPBACK}",
        f"--metrics-port={ports.metrics}",
        f"--allow-gpu-metrics={str(gpu).lower()}",
        f"--exit-timeout-secs={EXIT_TIMEOUT_SECONDS}",
    )


def environ(base: Mapping[str, str], install: TritonInstall, *, prepared: Path) -> dict[str, str]:
    """The environment in which Triton's stub finds its libraries, the standard library and our packages.

    From Python 3.12 on the interpreter in the stub is isolated: it ignores PYTHONPATH and PYTHONHOME and goes by the
    first python3 on PATH (which must be ours) and by links beside the backend.
    """
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]
    libraries = [str(prepared / "lib"), *map(str, install.libraries)]
    return {
        **base,
        "LD_LIBRARY_PATH": _joined(libraries, base.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _joined([str(REPOSITORY / "serving"), *packages], base.get("PYTHONPATH")),
        "PYTHONHOME": f"{sys.base_prefix}:{sys.base_exec_prefix}",
        "PATH": _joined([str(Path(sys.executable).parent)], base.get("PATH")),
        "PYTHONUNBUFFERED": "1",
    }


def _joined(first: list[str], rest: str | None) -> str:
    return ":".join([*first, *([rest] if rest else [])])


def find_stub(server_pid: int) -> int | None:
    """The pid of the stub that a tritonserver has started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and process_stat(int(entry.name))[1:2] == [str(server_pid)]:
            try:
                name = (entry / "comm").read_text()
            except OSError:
                continue
            if name.startswith(STUB[:15]):  # the kernel cuts names there
                return int(entry.name)
    return None


def _bracketed(address: str) -> str:
    """An address as gRPC wants it."""
    return f"[{address}]" if ":" in address else address
