"""Checkpoint folders are whole or not there; disks fill up; processes die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtrain.export.checkpoint import Checkpoint
from qtrain.export.disk import check_room, free_bytes, parse_size
from qtrain.export.errors import ExportError
from qtrain.export.tensors import TensorSpec, write_whole
from qtrain.export.writer import CheckpointWriter, split
from tests.export.folders import files_of, save_model
from tests.small_disk import small_disk

ROOT = Path(__file__).parents[2]


def _specs(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec.of(name, tensor) for name, tensor in tensors.items()]


def test_shards_index_and_contents(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.randn(100, dtype=torch.float32) for n in range(7)} | {"big": torch.randn(900)}
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=1000) as writer:
        writer.write(_specs(tensors), lambda spec: (tensors[spec.name],))
        partial = writer.seal({"model_type": "qwen2"})
        assert partial.name == "out.partial"
        assert not (tmp_path / "out").exists()
        place = writer.publish()
    checkpoint = Checkpoint.open(place)
    # two of 400 bytes each to a shard, the last t6 alone because `big` does not fit beside it
    assert [len(checkpoint.names_in(file)) for file in checkpoint.files] == [2, 2, 2, 1, 1]
    assert checkpoint.files[0] == "model-00001-of-00005.safetensors"
    loaded = checkpoint.load(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert {file: checkpoint.sha256(file) for file in checkpoint.files} == writer.hashes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_shard_has_the_plain_name_and_no_index(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.write([TensorSpec("w", torch.float32, (3,))], lambda _: [torch.ones(3)])
        writer.seal({})
        writer.publish()
    assert set(files_of(tmp_path / "out")) == {"config.json", "model.safetensors"}


def test_copied_shards_keep_their_hash(tmp_path: Path) -> None:
    base = Checkpoint.open(save_model(tmp_path / "base"))
    with CheckpointWriter(tmp_path / "out") as writer:
        for file in base.files:
            writer.copy_shard(base.folder / file)
        writer.seal((base.folder / "config.json").read_bytes())
        writer.publish()
    assert (
        files_of(tmp_path / "out").items()
        >= {
            name: content for name, content in files_of(base.folder).items() if name.endswith(".safetensors")
        }.items()
    )
    assert writer.copied == {file: base.sha256(file) for file in base.files}
    assert Checkpoint.open(tmp_path / "out").specs == base.specs


def test_side_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "additional_chat_templates").mkdir(parents=True)
    kept = {
        "tokenizer.json": b"\xef\xbb\xbf{}\r\n",
        "tokenizer_config.json": b'{"b": 1,   "a": 2}',
        "chat_template.jinja": b"{{ x }}",
        "generation_config.json": b"{}",
        "vocab.txt": b"a\nb",
        "merges.txt": b"",
        "spiece.model": b"\0\1",
        "tokenization_x.py": b"pass\n",
        "LICENSE": b"l",
        "NOTICE.md": b"n",
        "additional_chat_templates/rag.jinja": b"r",
    }
    left = ["config.json", "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"]
    left += ["README.md", ".gitattributes", "checksums.json", "training_args.bin"]
    for name in (*kept, *left):
        (base / name).write_bytes(kept.get(name, b"x"))
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.copy_side_files(base)
        writer.seal({})
        writer.publish()
    found = files_of(tmp_path / "out")
    found.pop("config.json")
    assert found == kept
    assert set(writer.side_files) == set(kept)


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.write([TensorSpec("w", torch.float32, (3,))], lambda _: [torch.ones(3)])
            writer.seal({})
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_only_when_told_and_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(
        ExportError, match=r"out exists already; --force replaces it, --out names another folder"
    ):
        CheckpointWriter(out)
    with pytest.raises(RuntimeError, match="boom"), CheckpointWriter(out, force=True):
        raise RuntimeError("boom")
    assert (out / "mine.txt").read_text() == "x"
    with CheckpointWriter(out, force=True) as writer:
        writer.seal({})
        assert (out / "mine.txt").exists()
        writer.publish()
    assert set(files_of(tmp_path)) == {"out/config.json"}
    for inside in (out / "config.json", out / "config.json" / "below"):
        with pytest.raises(ExportError, match=r"config.json is a file; name a folder with --out"):
            CheckpointWriter(inside, force=True)


def test_rejected_checkpoints_have_a_name_that_says_so(tmp_path: Path) -> None:
    for _ in range(2):  # a second one takes the first one's place
        with CheckpointWriter(tmp_path / "gptq") as writer:
            writer.seal({})
            assert writer.publish(rejected=True) == tmp_path / "gptq.rejected"
    assert set(files_of(tmp_path)) == {"gptq.rejected/config.json"}


def test_a_killed_export_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    code = """
import sys, time, torch
from pathlib import Path
from qtrain.export.tensors import TensorSpec
from qtrain.export.writer import CheckpointWriter

def slow(spec):
    yield torch.ones(8)
    print("writing", flush=True)
    time.sleep(60)

with CheckpointWriter(Path(sys.argv[1])) as writer:
    writer.write([TensorSpec("a", torch.float32, (8,))], lambda _: [torch.ones(8)])
    writer.write([TensorSpec("b", torch.float32, (16,))], slow)
"""
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not (tmp_path / "out.partial" / "config.json").exists()
    with CheckpointWriter(out) as writer:  # the next one takes its place
        writer.seal({})
        writer.publish()
    assert set(files_of(tmp_path)) == {"out/config.json"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as place:
        yield place


def test_a_full_disk_is_one_line_and_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    spec = TensorSpec("w", torch.float32, (2**19,))
    with (
        pytest.raises(
            ExportError, match=r"^disk full while writing the checkpoint to .*disk/out \(.* free\); free some"
        ),
        CheckpointWriter(disk / "out") as writer,
    ):
        writer.write([spec], lambda _: (torch.ones(2**15) for _ in range(16)))
    assert list(disk.iterdir()) == []
    big = tmp_path / "big.safetensors"
    write_whole(big, {"w": torch.ones(2**19)})
    with pytest.raises(ExportError, match="disk full"), CheckpointWriter(disk / "out") as writer:
        writer.copy_shard(big)
    assert list(disk.iterdir()) == []


def test_room_is_asked_for_beforehand(tmp_path: Path) -> None:
    check_room(1, tmp_path / "not" / "there")
    with pytest.raises(ExportError, match=r"out needs .* GiB, and its disk has .* GiB free; free some space"):
        check_room(free_bytes(tmp_path) + 2**40, tmp_path / "out")


def test_split_keeps_order_and_limit() -> None:
    specs = [TensorSpec(str(n), torch.uint8, (size,)) for n, size in enumerate([3, 4, 5, 20, 1, 9])]
    assert [[spec.shape[0] for spec in part] for part in split(specs, 10)] == [[3, 4], [5], [20], [1, 9]]
    assert split([], 10) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("500MB", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5 kb", 1500),
        ("123", 123),
        ("10 G", 10**10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4QB", "-1GB", "0", "nan", "1e999GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ExportError, match=r"is no size; write it like 4GB, 500MB or 2GiB"):
        parse_size(text)
