"""Writing safetensors one tensor at a time gives the files that the library writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.quantization.safetensors_file import Entry, list_entries, read_tensor, write_safetensors


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "bytes": torch.randint(-128, 128, (3, 5), generator=generator, dtype=torch.int8),
        "half": torch.randn(7, 3, generator=generator).bfloat16(),
        "large": torch.randn(3000, 700, generator=generator),  # written in several parts
        "number": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "eight": torch.randn(9, generator=generator).to(torch.float8_e4m3fn),
        "words": torch.arange(6).view(2, 3),
        "turned": torch.randn(4, 6, generator=generator).T,
    }


def entries(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def test_the_file_is_the_librarys(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "mine", entries(tensors), tensors.__getitem__)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    mine, theirs = load_file(tmp_path / "mine"), load_file(tmp_path / "theirs")
    assert mine.keys() == theirs.keys()
    assert all(
        torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in mine if mine[name].dim()
    )
    assert mine["number"] == 3.5
    assert {(one.name, one.dtype, one.shape) for one in list_entries(tmp_path / "theirs")} == {
        (one.name, one.dtype, one.shape) for one in entries(tensors)
    }
    assert torch.equal(read_tensor(tmp_path / "mine", "words"), tensors["words"])


@pytest.mark.parametrize("other", [torch.zeros(2, 2), torch.zeros(3, 5)])
def test_a_tensor_that_was_not_announced_so_is_refused(tmp_path: Path, other: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not what was announced"):
        write_safetensors(tmp_path / "x", [Entry("bytes", torch.int8, (3, 5))], lambda name: other)
