"""Which backend runs here: asked once at start, by name or by self-test. Nothing is looked up when a module is
imported.

A fast backend must show on extreme values that its integer sums are exact on this processor before it may run a model.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from octavo.kernels.cpu.backend import CpuKernels
from octavo.kernels.cpu.build import NEEDED_FLAGS, BuildError, build
from octavo.kernels.interface import LIMB_RANGE, ActivationFormat, Kernels
from octavo.kernels.reference import ReferenceKernels

log = logging.getLogger(__name__)

EXTREME_ROWS = 40  # of the self-test: enough for every kernel that a number of rows selects
IN_PLACE = Path(__file__).resolve().parent / "cpu"


class NoSuchKernels(ValueError):
    """The asked-for backend cannot run on this machine; the message says why."""


def choose(
    name: str, *, device: torch.device, num_threads: int | None = None, library_folder: Path | None = None
) -> Kernels:
    """The backend `name` ("auto", "reference", "avx2", "avx512", "amx"), proven by its self-test. Raises NoSuchKernels.

    A CUDA device has one backend, which "auto" and "gpu" name.

    "auto" takes the first of amx, avx512, avx2 and reference that works, and warns in one line when that is the
    reference. Libraries are looked for in `library_folder` (default: beside the sources, else a folder of the
    user's) and built there if they are missing.
    """
    if device.type == "cuda":
        return _gpu(name, device)
    if device.type != "cpu":
        raise NoSuchKernels(f"no kernels for device {device.type}: there are those for cpu and cuda")
    if name == "reference":
        return ReferenceKernels()
    if name not in ("auto", *NEEDED_FLAGS):
        raise NoSuchKernels(f"no kernels named {name}: there are auto, reference, {', '.join(reversed(NEEDED_FLAGS))}")
    reasons = []
    for variant in NEEDED_FLAGS if name == "auto" else (name,):
        try:
            return _try(variant, num_threads=num_threads, folder=library_folder)
        except NoSuchKernels as error:
            reasons.append(str(error))
    if name != "auto":
        raise NoSuchKernels(reasons[0])
    log.warning("using the slow reference kernels: %s", "; ".join(dict.fromkeys(reasons)))
    return ReferenceKernels()


def _gpu(name: str, device: torch.device) -> Kernels:
    """The GPU backend. Imported here: triton-lang is there only where a card is."""
    refusal = f"no kernels for device {device.type}"
    if name not in ("auto", "gpu"):
        raise NoSuchKernels(f"{refusal} named {name}: there are auto and gpu")
    if not torch.cuda.is_available():
        raise NoSuchKernels(f"{refusal}: torch {torch.__version__} finds no card")
    try:
        from octavo.kernels.gpu.backend import GpuKernels, UnsupportedDevice
    except ImportError as error:
        raise NoSuchKernels(f"{refusal}: triton-lang is not installed ({error.name})") from error
    try:
        kernels = GpuKernels(device)
        wrong = self_test(kernels)
    except UnsupportedDevice as error:
        raise NoSuchKernels(f"{refusal}: {error}") from error
    if wrong:
        raise NoSuchKernels(f"{refusal}: they fail their self-test: {wrong}")
    return kernels


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets of this machine's processors, as Linux names them; empty if it does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def _try(variant: str, *, num_threads: int | None, folder: Path | None) -> Kernels:
    missing = NEEDED_FLAGS[variant] - cpu_flags()
    if missing:
        raise NoSuchKernels(f"this processor lacks {' '.join(sorted(missing))} for {variant}")
    built = _built(folder)
    try:
        kernels = CpuKernels(variant, folder=built, num_threads=num_threads)
    except (OSError, AttributeError) as error:
        raise NoSuchKernels(f"the {variant} library does not load: {error}") from error
    wrong = self_test(kernels)
    if wrong:
        raise NoSuchKernels(f"{variant} fails its self-test: {wrong}")
    return kernels


def _built(folder: Path | None) -> Path:
    """A folder with current libraries. Raises NoSuchKernels if none can be made."""
    reason = "there is no C++ compiler (g++)"
    for candidate in (folder,) if folder is not None else (IN_PLACE, _user_folder()):
        try:
            built = build(candidate)
        except OSError as error:
            reason = f"{candidate} cannot be written: {error.strerror}"
        except BuildError as error:
            reason = str(error).splitlines()[0]
        else:
            if built is not None:
                return built
    raise NoSuchKernels(f"the CPU library is not built: {reason}")


def _user_folder() -> Path:
    """A private folder for libraries when the package's own cannot be written."""
    folder = Path(tempfile.gettempdir()) / f"octavo-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise NoSuchKernels(f"{folder} is not a private folder of this user")
    return folder


def self_test(kernels: Kernels, *, widths: Sequence[int] = (4, 60, 1024, 8192)) -> str:
    """Empty if products of extreme integers are exact on this machine, else what was wrong. Takes some milliseconds."""
    for limbs in (1, 2):
        for width in widths:
            error = _extreme_error(kernels, limbs=limbs, width=width)
            if error:
                return f"a product of {limbs} limbs over {width} inputs is off by {error:g}"
    return ""


def _extreme_error(kernels: Kernels, *, limbs: int, width: int) -> float:
    """Largest error of products of full-range activations with full-range weights, rows of nothing but extremes
    among them.
    """
    format = ActivationFormat(limbs)
    largest = int(LIMB_RANGE[limbs])
    generator = torch.Generator().manual_seed(width)
    integers = torch.randint(-largest, largest + 1, (EXTREME_ROWS, width), generator=generator)
    integers[:3] = torch.tensor([[largest], [-largest], [32384 if limbs == 2 else 127]])  # 32384: hi 127, lo -128
    integers[:, 0] = largest  # so the scale is 1 and quantising gives these integers back
    weight = torch.randint(-128, 128, (37, width), generator=generator, dtype=torch.int8)  # [37, width]
    weight[0], weight[1] = -128, 127
    device = kernels.device
    quantized = kernels.quantize(integers.float().to(device), format)
    packed = kernels.pack_int8(weight.to(device), torch.ones(1, device=device), format=format)
    y = kernels.linear(quantized, packed).cpu()
    high = (integers + 128) >> 8
    if limbs == 1:
        exact = (integers @ weight.long().T).float()
    else:
        exact = (high @ weight.long().T).float() * 256.0 + ((integers - 256 * high) @ weight.long().T).float()
    return float((y - exact).abs().max())
