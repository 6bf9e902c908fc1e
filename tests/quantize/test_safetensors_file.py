"""Writing safetensors one tensor at a time gives the files that the library writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.quantization.safetensors_file import Entry, copy_safetensors, list_entries, write_safetensors


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


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_copied_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    homes = {name: tmp_path / f"from-{index % 2}" for index, name in enumerate(tensors)}
    for path in set(homes.values()):
        save_file({name: tensor for name, tensor in tensors.items() if homes[name] == path}, path)
    wanted = [one for one in entries(tensors) if one.name != "half"]
    copy_safetensors(tmp_path / "copy", wanted, homes)
    found = load_file(tmp_path / "copy")
    assert found.keys() == tensors.keys() - {"half"}
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
        assert bytes_of(tensor) == bytes_of(tensors[name])


def test_a_copy_of_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    save_file({"large": torch.zeros(1000)}, tmp_path / "from")
    (tmp_path / "from").write_bytes((tmp_path / "from").read_bytes()[:-8])
    with pytest.raises(OSError, match="ends within a tensor"):
        copy_safetensors(tmp_path / "x", [Entry("large", torch.float32, (1000,))], {"large": tmp_path / "from"})


@pytest.mark.parametrize("other", [torch.zeros(2, 2), torch.zeros(3, 5)])
def test_a_tensor_that_was_not_announced_so_is_refused(tmp_path: Path, other: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not what was announced"):
        write_safetensors(tmp_path / "x", [Entry("bytes", torch.int8, (3, 5))], lambda name: other)
