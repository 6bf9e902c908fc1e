"""Choosing a backend: by name, by self-test, and what happens when nothing fast can run."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.backends import MakeKernels
from octavo.kernels import choose as choosing
from octavo.kernels.choose import NoSuchKernels, choose, cpu_flags, self_test
from octavo.kernels.cpu import backend
from octavo.kernels.cpu import build as building
from octavo.kernels.cpu.build import BuildError, build, is_current
from octavo.kernels.cpu.library import create_pool
from octavo.kernels.interface import Activation, ActivationFormat, Kernels, PackedLinear
from octavo.kernels.reference import ReferenceKernels

CPU = torch.device("cpu")


def test_the_reference_can_be_asked_for_by_name() -> None:
    kernels = choose("reference", device=CPU)
    assert (kernels.name, kernels.device) == ("reference", CPU)


def test_auto_takes_the_best_variant_of_this_processor(make_kernels: MakeKernels) -> None:
    best = "amx" if "amx_int8" in cpu_flags() else "avx512" if "avx512_vnni" in cpu_flags() else "avx2"
    assert choose("auto", device=CPU, num_threads=2).name == make_kernels(best, 2).name


def test_without_permission_for_tile_registers_auto_takes_the_next_best(
    make_kernels: MakeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_kernels("amx", 1)

    def refused(library: ctypes.CDLL, num_threads: int, *, tiles: bool, owner: object) -> int:
        if tiles:
            raise OSError("tile registers are not to be had")
        return create_pool(library, num_threads, tiles=tiles, owner=owner)

    monkeypatch.setattr(backend, "create_pool", refused)
    assert choose("auto", device=CPU, num_threads=1).name == "avx512"
    with pytest.raises(NoSuchKernels, match="the amx library does not load: tile registers are not to be had"):
        choose("amx", device=CPU)


def test_unknown_names_and_devices_are_refused_in_one_clear_sentence() -> None:
    with pytest.raises(NoSuchKernels, match="there are auto, reference, avx2, avx512, amx"):
        choose("sse2", device=CPU)
    with pytest.raises(NoSuchKernels, match="no kernels for device cuda"):
        choose("auto", device=torch.device("cuda"))


def test_without_a_compiler_auto_falls_back_to_the_reference_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        kernels = choose("auto", device=CPU, library_folder=tmp_path / "none")
    assert kernels.name == "reference"
    assert len(caplog.records) == 1
    if {"avx2", "fma", "f16c"} <= cpu_flags():
        assert "no C++ compiler" in caplog.text
        with pytest.raises(NoSuchKernels, match="compiler"):
            choose("avx2", device=CPU, library_folder=tmp_path / "none")


def test_a_folder_that_cannot_be_written_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    kernels = choose("auto", device=CPU, library_folder=tmp_path / "file" / "below")
    assert kernels.name == "reference"


def test_a_processor_without_the_instructions_is_never_given_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choosing, "cpu_flags", lambda: {"sse2", "fma"})
    assert choose("auto", device=CPU).name == "reference"
    assert "lacks" in caplog.text
    with pytest.raises(NoSuchKernels, match="lacks avx2 f16c"):
        choose("avx2", device=CPU)


class Saturating(ReferenceKernels):
    """A backend whose 16-bit sums saturate, as byte products do without the right instructions."""

    def linear(self, x: Activation, weight: PackedLinear, *, residual: Tensor | None = None) -> Tensor:
        return super().linear(x, weight, residual=residual).clamp(-32768, 32767)


def test_the_self_test_passes_exact_kernels_and_catches_saturation() -> None:
    assert self_test(ReferenceKernels()) == ""
    assert "is off by" in self_test(Saturating())


def test_flags_are_read_from_the_first_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2 fma\n\nprocessor : 1\nflags : fpu\n")
    assert cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "fma"}
    assert cpu_flags(tmp_path / "missing") == set()


@pytest.fixture
def tiny_sources(tmp_path: Path) -> Path:
    """A folder with one small source, so that building takes no time."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int answer() { return 42; }\n')
    return sources


def test_a_build_is_skipped_until_a_source_changes(tmp_path: Path, tiny_sources: Path) -> None:
    out = tmp_path / "out"
    assert build(out, sources=tiny_sources) == out
    library = building.library_path(out, "avx2")
    first = library.stat().st_mtime_ns
    build(out, sources=tiny_sources)
    assert library.stat().st_mtime_ns == first
    (tiny_sources / "one.cpp").write_text('extern "C" int answer() { return 43; }\n')
    assert not is_current(out, "avx2", sources=tiny_sources)
    build(out, sources=tiny_sources)
    assert library.stat().st_mtime_ns > first


def test_a_current_build_needs_no_compiler(tmp_path: Path, tiny_sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    build(out, sources=tiny_sources)
    monkeypatch.setenv("PATH", os.devnull)
    assert build(out, sources=tiny_sources) == out


def test_a_refusing_compiler_is_named_with_its_first_lines(tmp_path: Path, tiny_sources: Path) -> None:
    (tiny_sources / "one.cpp").write_text("this is not C++\n")
    with pytest.raises(BuildError, match=r"g\+\+ failed"):
        build(tmp_path / "out", sources=tiny_sources)
    assert not building.library_path(tmp_path / "out", "avx2").exists()


def num_tasks() -> int:
    """Threads of this process."""
    return len(os.listdir("/proc/self/task"))


def product(kernels: Kernels) -> Tensor:
    """Some product that takes several tiles."""
    format = ActivationFormat(1)
    weight = torch.arange(300 * 64).remainder(255).sub(127).to(torch.int8).view(300, 64)
    x = torch.arange(9 * 64, dtype=torch.float32).view(9, 64)
    return kernels.linear(kernels.quantize(x, format), kernels.pack_int8(weight, torch.ones(1), format=format))


def test_threads_end_with_their_kernels(make_kernels: MakeKernels) -> None:
    make_kernels("avx2", 1)
    before = num_tasks()
    kernels = choose("avx2", device=CPU, num_threads=4)
    product(kernels)
    assert num_tasks() == before + 3
    del kernels
    gc.collect()
    assert num_tasks() == before


def test_kernels_still_work_in_a_forked_child(make_kernels: MakeKernels) -> None:
    kernels = make_kernels("avx2", 2)
    expected = product(kernels)
    child = os.fork()
    if child == 0:
        same = torch.equal(product(kernels), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
