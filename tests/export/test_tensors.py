"""Our streamed safetensors files are the library's, byte for byte."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtrain.export.errors import ExportError
from qtrain.export.tensors import (
    DTYPES,
    TensorSpec,
    check_finite,
    in_file_order,
    read_specs,
    write_tensors,
    write_whole,
)


def _one_of_each() -> dict[str, torch.Tensor]:
    tensors = {f"a.{name}": torch.arange(6).to(dtype).reshape(2, 3) for name, dtype in DTYPES.items()}
    tensors |= {f'b.{name}.ü"': torch.ones(5).to(dtype) for name, dtype in reversed(DTYPES.items())}
    return tensors | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    tensors = _one_of_each()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    written = write_whole(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert written.nbytes == (tmp_path / "ours").stat().st_size
    assert read_specs(tmp_path / "ours") == {name: TensorSpec.of(name, t) for name, t in tensors.items()}


def test_blocks_of_rows_make_the_same_file(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(37, 11).bfloat16(), "v": torch.randn(64), "t": torch.randn(8, 6).t()}
    written = write_whole(tmp_path / "whole", tensors)
    specs = in_file_order(TensorSpec.of(name, tensor) for name, tensor in tensors.items())
    streamed = write_tensors(tmp_path / "blocks", specs, lambda spec: tensors[spec.name].split(5))
    assert streamed.sha256 == written.sha256
    assert torch.equal(load_file(tmp_path / "blocks")["t"], tensors["t"])


def test_streaming_holds_one_block(tmp_path: Path) -> None:
    block = torch.ones(2**16)  # 256 KiB; the file has 64 of them
    tracemalloc.start()
    write_tensors(
        tmp_path / "f", [TensorSpec("w", torch.float32, (64, 2**16))], lambda _: (block for _ in range(64))
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # Python's side of it: buffers, no copy of the file


def test_blocks_that_are_not_the_tensors_are_refused(tmp_path: Path) -> None:
    spec = TensorSpec("w", torch.float32, (2, 3))
    with pytest.raises(ValueError, match="w: 12 bytes were given, must be 24"):
        write_tensors(tmp_path / "f", [spec], lambda _: [torch.ones(3)])
    with pytest.raises(ValueError, match=r"w: a block is torch.float16, must be torch.float32"):
        write_tensors(tmp_path / "f", [spec], lambda _: [torch.ones(2, 3).half()])


@pytest.mark.parametrize("cut", [1, 4, 40, 2000])
def test_a_cut_file_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    write_whole(path, {"w": torch.ones(400)})
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(
        ExportError, match=r"model.safetensors is damaged or no safetensors file .*get the model again"
    ):
        read_specs(path)


def test_a_damaged_header_and_a_missing_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ExportError, match=r"model.safetensors is missing"):
        read_specs(path)
    write_whole(path, {"w": torch.ones(400)})
    content = bytearray(path.read_bytes())
    content[20] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ExportError, match="damaged"):
        read_specs(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ExportError, match="damaged or no safetensors file"):
        read_specs(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_is_counted_by_name(dtype: torch.dtype) -> None:
    weight = torch.zeros(3, 2**22, dtype=dtype)
    check_finite("w", weight, "f")
    weight[2, -1] = torch.nan
    weight[0, 5] = -torch.inf
    with pytest.raises(ExportError, match=r"^f: model.w holds 1 NaN and 1 infinite values of 12582912; "):
        check_finite("model.w", weight, "f")
