"""Sampling on a real card draws what the reference draws, in any company."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from gpu.steps import DEVICE
from kernels.test_sampling import INF, Row, rows_of
from octavo.kernels.interface import Kernels, SamplingRows

KINDS = [
    Row(), Row(temperature=0.0), Row(top_p=0.9), Row(top_k=50), Row(top_k=2000, top_p=0.8), Row(min_p=0.02),
    Row(top_p=0.99999), Row(top_p=0.0), Row(top_k=1), Row(temperature=3.0, top_k=7, top_p=0.5, min_p=0.05),
    Row(seen={0: 0, 3: 2, 4: 1}, repetition=1.3, frequency=0.4, presence=0.7, bias={1: 100.0, 2: -INF}),
]  # fmt: skip


def draw(kernels: Kernels, logits: Tensor, rows: list[Row], device: torch.device) -> list[int]:
    made = rows_of(rows)
    moved = SamplingRows(**{field.name: getattr(made, field.name).to(device) for field in fields(SamplingRows)})
    return kernels.sample(logits.clone().to(device), moved).tolist()


def test_draws_equal_the_reference_and_do_not_depend_on_the_others(gpu: Kernels, reference: Kernels) -> None:
    rows = [Row(**{**vars(kind), "seed": seed, "position": seed * 7}) for kind in KINDS for seed in range(4)]
    for vocabulary, ties in ((1000, True), (128256, False)):
        logits = torch.randn(len(rows), vocabulary) * 3
        logits = logits.round() if ties else logits
        together = draw(gpu, logits, rows, DEVICE)
        assert together == draw(reference, logits, rows, torch.device("cpu"))
        assert together[:12] == [draw(gpu, logits[i : i + 1], [rows[i]], DEVICE)[0] for i in range(12)]


def test_logprobs_equal_the_reference(gpu: Kernels, reference: Kernels) -> None:
    logits, tokens = torch.randn(7, 128256) * 4, torch.randint(0, 128256, (7,))
    ours = [part.cpu() for part in gpu.logprobs(logits.to(DEVICE), tokens.to(DEVICE), 5)]
    theirs = reference.logprobs(logits, tokens, 5)
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[2], theirs[2])
    for a, b in ((ours[0], theirs[0]), (ours[3], theirs[3])):
        assert torch.allclose(a, b, rtol=3e-7, atol=1e-12)


def test_top_ids_among_equals_are_those_of_a_stable_sort(gpu: Kernels) -> None:
    logits, tokens = (torch.randn(48, 128256, device=DEVICE) * 4).round(), torch.zeros(48, dtype=torch.int64).to(DEVICE)
    logits[3, 17::1000] = float("nan")
    logits[4] = 0.0
    logits[4, ::2] = -0.0
    found = gpu.logprobs(logits, tokens, 20)[2].cpu()
    assert torch.equal(found, torch.sort(logits.cpu(), dim=1, descending=True, stable=True).indices[:, :20])
