"""A card, played by patches, that cannot do what is asked or has no memory left: it is said, and `auto` falls back."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.engine import backend, load
from octavo.engine.backend import check_shape, kernels_for
from octavo.engine.device_queue import CudaQueue
from octavo.engine.interface import StepOutOfMemory
from octavo.engine.load import OutOfDeviceMemory, load_runner
from octavo.kernels.choose import NoSuchKernels, choose
from octavo.kernels.interface import CacheSpec, Kernels
from octavo.kernels.reference import ReferenceKernels
from octavo.models.config import load_config
from octavo.settings import Settings

CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton-lang is not installed")


class Limited(ReferenceKernels):
    """Kernels of a card that serves no heads of its own."""

    def refuses(self, spec: CacheSpec, *, num_heads: int) -> str:
        return f"{num_heads} heads over a cache of {spec.dtype}: this card has no room"


def settings(folder: Path, **environ: str) -> Settings:
    return Settings.from_environ({"MODEL_DIR": str(folder), "MAX_SEQ_LEN": "64", "NUM_THREADS": "1", **environ})


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of compute capability 7.5."""
    from octavo.kernels.gpu import backend as gpu_backend
    from octavo.kernels.gpu.device import DeviceLimits

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "an older card")
    monkeypatch.setattr(gpu_backend, "read_limits", lambda _: DeviceLimits((7, 5), 65536))


@needs_triton
@pytest.mark.usefixtures("old_card")
def test_a_card_that_is_too_old_is_said_and_auto_takes_the_processor(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(tiny_folder)
    with caplog.at_level(logging.WARNING):
        kernels = kernels_for(settings(tiny_folder), config)
    assert kernels.device == CPU
    assert "the card is not used" in caplog.text
    assert "compute capability 7.5, the kernels need 8.0" in caplog.text
    for named in ({"DEVICE": "cuda"}, {"KERNELS": "gpu"}):  # what was asked for by name is not replaced
        with pytest.raises(NoSuchKernels, match=r"compute capability 7\.5"):
            kernels_for(settings(tiny_folder, **named), config)


def test_kernels_that_compute_wrongly_are_not_used(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(name: str, *, device: torch.device, num_threads: int | None) -> Kernels:
        if device.type == "cuda":
            raise NoSuchKernels("they fail their self-test: a product of 1 limbs over 4 inputs is off by 3")
        return choose(name, device=device, num_threads=num_threads)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "choose", wrong)
    with caplog.at_level(logging.WARNING):
        assert kernels_for(settings(tiny_folder), load_config(tiny_folder)).device == CPU
    assert "fail their self-test" in caplog.text


def test_a_shape_that_the_card_cannot_do_is_said_and_auto_takes_the_processor(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def card(name: str, *, device: torch.device, num_threads: int | None) -> Kernels:
        return Limited() if device.type == "cuda" else choose(name, device=device, num_threads=num_threads)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "choose", card)
    config = load_config(tiny_folder)
    with caplog.at_level(logging.WARNING):
        kernels = kernels_for(settings(tiny_folder), config)
    assert (kernels.device, isinstance(kernels, Limited)) == (CPU, False)
    assert "this card has no room" in caplog.text
    with pytest.raises(NoSuchKernels, match=r"over a cache of torch\.int8: this card has no room"):
        kernels_for(settings(tiny_folder, DEVICE="cuda"), config)


@needs_triton
def test_what_the_gpu_kernels_refuse_is_known_before_weights_are_read(tiny_folder: Path) -> None:
    from octavo.kernels.gpu.backend import GpuKernels
    from octavo.kernels.gpu.device import DeviceLimits

    kernels, config = GpuKernels(CPU), load_config(tiny_folder)
    check_shape(kernels, settings(tiny_folder), config)
    kernels._limits = DeviceLimits((8, 9), 101376)
    wide = replace(config, head_dim=128, dtype="bfloat16")
    check_shape(kernels, settings(tiny_folder), wide)
    with pytest.raises(NoSuchKernels, match="needs 112 KiB of shared memory, this card has 99: use USE_CACHE"):
        check_shape(kernels, settings(tiny_folder, USE_CACHE_KV_INT8="0"), wide)
    with pytest.raises(NoSuchKernels, match="71 heads share a kv head, a card serves up to 64"):
        check_shape(kernels, settings(tiny_folder), replace(config, num_heads=71, num_kv_heads=1))
    with pytest.raises(NoSuchKernels, match="head_dim must be a multiple of 8 up to 256"):
        check_shape(kernels, settings(tiny_folder), replace(config, head_dim=512))


@pytest.mark.parametrize("stage", ["kernels_for", "load_decoder", "make_caches", "warm_up"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        StepOutOfMemory("out of device memory: lower BATCH_SIZE"),
    ],
)
def test_out_of_memory_at_any_stage_of_loading_is_one_line_of_advice(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(load, stage, no_memory)
    wanted = settings(tiny_folder, KERNELS="reference", USE_WARMUP="1")
    with pytest.raises(OutOfDeviceMemory, match="while loading: lower KV_MEMORY_FRACTION") as caught:
        load_runner(wanted, lambda *_: None)
    assert "\n" not in str(caught.value)


@needs_triton
@pytest.mark.parametrize(("num_experts", "top_k"), [(0, 1), (8, 2), (64, 6), (128, 8), (256, 8)])
@pytest.mark.parametrize("largest", [40, 500, 4144])
def test_a_card_is_warmed_up_with_every_tile_that_a_step_may_take(num_experts: int, top_k: int, largest: int) -> None:
    """Else the first request that takes one waits for the compiler."""
    from octavo.kernels.gpu.device import DeviceLimits
    from octavo.kernels.gpu.tiles import Tile, int8_tile

    def tile(tokens: int) -> Tile:
        rows = min(64, max(1, tokens * top_k // num_experts)) if num_experts else tokens
        limits = DeviceLimits((9, 0), 232448)
        return int8_tile(rows, 1536, 2048, limbs=2, group=0, residual=False, limits=limits)

    sizes = load.card_warmup_sizes(largest)
    assert max(sizes) == min(largest, 4096)
    assert {tile(tokens) for tokens in sizes} == {tile(tokens) for tokens in range(2, largest + 1)}


def test_other_failures_of_loading_keep_their_words(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(load, "load_decoder", broken)
    with pytest.raises(RuntimeError, match="something else"):
        load_runner(settings(tiny_folder, KERNELS="reference"), lambda *_: None)


@pytest.mark.parametrize("ending", [None, RuntimeError("CUDA error: operation failed during capture")])
def test_a_recording_without_memory_is_known_as_such(
    monkeypatch: pytest.MonkeyPatch, ending: RuntimeError | None
) -> None:
    """Ending a recording that failed may fail too, in words that say nothing of memory."""

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            if ending is None:
                raise
            raise ending from None

    class Stream:
        def synchronize(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    queue = CudaQueue.__new__(CudaQueue)
    queue._stream, queue._pool, queue._records = Stream(), None, True
    runs: list[int] = []

    def body() -> None:
        runs.append(1)
        if len(runs) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        queue.capture(body)
    assert len(runs) == 3
    if ending is not None:  # nothing is recorded any more, and work goes on
        assert queue.capture(body) is body
        assert len(runs) == 4
