"""What the doctor finds out about the machine: versions, cores, instruction sets, memory, GPU, compiler, /dev/shm.

Reads /proc, /sys and package records; imports no torch, starts nothing but nvidia-smi.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from octavo import __version__
from octavo.cli.findings import Finding, note, ok, wrong
from octavo.kernels.cpu.build import NEEDED_FLAGS, SOURCES, library_path
from octavo.node.errors import EXIT_BAD_SETTINGS
from octavo.node.shared_memory import shared_memory_trouble

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
SHOWN = ("torch", "numpy", "tokenizers", "nvidia-pytriton")
INSTRUCTION_SETS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "amx_int8")
SMI = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
CPU_KERNELS = SOURCES.parent


def machine(*, device: str = "auto") -> Iterator[Finding]:
    """Findings about this machine. `device` is DEVICE."""
    yield ok(f"Octavo {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    yield _packages()
    yield from _processor()
    yield _memory()
    yield _gpu(device)
    trouble = shared_memory_trouble()
    yield wrong(trouble) if trouble else ok(f"/dev/shm: {shutil.disk_usage('/dev/shm').free >> 20} MiB free")


def _packages() -> Finding:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return wrong(f"packages: missing {', '.join(missing)}: bash start_server.sh --install", stops=EXIT_BAD_SETTINGS)
    return ok("packages: " + ", ".join(f"{name} {found}" for name in SHOWN if (found := _version(name))))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> Iterator[Finding]:
    flags = cpu_flags()
    sets = [name for name in INSTRUCTION_SETS if name in flags]
    quota = cpu_quota()
    limit = f", limited to {quota:g} by its control group" if quota is not None else ""
    yield ok(f"CPU: {len(os.sched_getaffinity(0))} cores{limit}; {' '.join(sets) or 'no AVX2'}")
    wanted = next((variant for variant, needed in NEEDED_FLAGS.items() if flags >= needed), None)
    if wanted is None:
        yield note("CPU kernels: no AVX2 here, so the slow reference kernels run")
    elif library_path(CPU_KERNELS, wanted).is_file():
        yield ok(f"CPU kernels: {wanted}, built")
    elif shutil.which("g++") is None:
        yield wrong("CPU kernels: not built and g++ is missing, so the slow reference kernels run: apt-get install g++")
    else:
        yield note(f"CPU kernels: {wanted}, will be built at the first start")


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets of the first processor; empty where there is no such file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in text.splitlines() if line.startswith("flags")), set())


def cpu_quota(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores that the control group allows; None: no limit, or not known."""
    try:
        allowed, period = path.read_text().split()
        return None if allowed == "max" else int(allowed) / int(period)
    except (OSError, ValueError):
        return None


def memory_limit(path: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes that the control group allows; None: no limit, or not known."""
    try:
        text = path.read_text().strip()
        return None if text == "max" else int(text)
    except (OSError, ValueError):
        return None


def _memory() -> Finding:
    pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES", "SC_PAGE_SIZE")}
    total, limit = pages["SC_PHYS_PAGES"] * pages["SC_PAGE_SIZE"], memory_limit()
    limited = f", {limit >> 20} MiB allowed by its control group" if limit is not None and limit < total else ""
    return ok(f"memory: {total >> 20} MiB{limited}")


def _gpu(device: str) -> Finding:
    found = gpus()
    torch_build = _version("torch") or ""
    if not found:
        reason = "GPU: none seen (nvidia-smi is missing or finds none)"
        return wrong(f"{reason}, but DEVICE=cuda", stops=EXIT_BAD_SETTINGS) if device == "cuda" else ok(reason)
    if torch_build.endswith("+cpu"):
        return wrong(f"GPU: {'; '.join(found)}, but torch {torch_build} is a build for CPUs")
    return ok(f"GPU: {'; '.join(found)}")


def gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU that the driver shows."""
    if shutil.which(SMI[0]) is None:
        return []
    try:
        said = subprocess.run(SMI, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in said.stdout.splitlines() if line.strip()] if said.returncode == 0 else []
