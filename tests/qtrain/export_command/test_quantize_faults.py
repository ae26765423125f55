"""How `qtrain export gptq` and `awq` refuse: damaged models, full disks, wrong options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from qtrain.export.lock import only_one
from tests.qtrain.export_command.exports import SMALL, damaged_base, export, make_world, manifest_of, refused
from tests.qtrain.tiny import save_tiny_base
from tests.small_disk import small_disk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, one whose head is not tied, rows, a text, and a 4-bit run with held-out rows."""
    return make_world(tmp_path_factory.mktemp("world"))


def test_nan_weights(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan

    base = damaged_base(world, tmp_path / "base", change)
    words = (base, *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    line = refused(capsys, "gptq", *words)
    assert "model.layers.1.mlp.up_proj.weight holds 1 NaN and 0 infinite values" in line
    assert [path.name for path in tmp_path.iterdir()] == ["base"]  # seen before the first layer: no journal


def test_a_missing_tensor_and_one_of_another_shape(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:100].clone()

    lacks = damaged_base(world, tmp_path / "lacks", lambda tensors: tensors.pop(name))
    short = damaged_base(world, tmp_path / "short", cut)
    words = (*SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    assert f"lacks holds no {name}, which the model of its config.json has" in refused(
        capsys, "gptq", lacks, *words
    )
    assert f"{name} is 100 x 64, and 128 x 64 by config.json" in refused(capsys, "awq", short, *words)
    assert f"lacks holds no {name}" in refused(capsys, "merge", lacks, "--out", tmp_path / "out")
    assert f"{name} is 100 x 64" in refused(capsys, "merge", short, "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lacks", "short"]


def test_a_folder_without_a_tokenizer(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    for path in base.glob("*token*"):
        path.unlink()
    words = (*SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    line = refused(capsys, "gptq", base, *words)
    assert f"{base} holds no tokenizer's vocabulary" in line
    assert "copy the tokenizer's files" in line
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_values_beyond_float16_are_stored_in_bfloat16(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = 1e5

    base = damaged_base(world, tmp_path / "base", change)
    words = (base, *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out", "--gate", "off")
    code, text, errors = export(capsys, "gptq", *words)
    assert code == 0, errors
    assert "model.norm.weight holds values up to 1e+05, beyond float16" in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "beyond float16" in manifest_of(tmp_path / "out")["stored_dtype"]["reason"]


@pytest.mark.parametrize("kind", ["merge", "gptq"])
def test_two_at_once(kind: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: tuple[object, ...] = (world / "run",) if kind == "merge" else (world / "base", *SMALL)
    words += () if kind == "merge" else ("--calib-data", world / "text.txt")
    with only_one(tmp_path / "out"):
        line = refused(capsys, kind, *words, "--out", tmp_path / "out", "--force")
    assert "another export" in line
    assert "--out" in line
    assert list(tmp_path.iterdir()) == []


def test_corrupt_safetensors(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = (base, *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    assert f"{weights} is damaged or no safetensors file" in refused(capsys, "awq", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_architecture_without_decoder_layers_of_linears(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mystery9"}))
    words = (base, *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    line = refused(capsys, "gptq", *words)
    assert "Qwen2, Qwen3, Llama and Mistral are supported" in line
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"num_key_value_heads": 0}, "ZeroDivisionError"),
        ({"num_attention_heads": 3}, "by config.json; get the model again"),
        ({"quantization_config": "4 bits"}, "is quantised already (4 bits)"),
    ],
)
def test_values_of_config_that_can_not_be(
    value: dict[str, object], said: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(world / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | value))
    words = (base, *SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    assert said in refused(capsys, "gptq", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_adapter_for_another_base(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_base(tmp_path / "base", hidden_size=32, intermediate_size=128)
    words = (*SMALL, "--calib-data", world / "text.txt", "--out", tmp_path / "out")
    line = refused(capsys, "gptq", base, "--adapter", world / "run" / "adapter", *words)
    assert "is for another base: model.layers.0.self_attn.q_proj is 64 x 64 there and 32 x 32 in" in line


def test_rows_of_a_run_that_are_gone(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(world / "run", tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("held-out.jsonl", "gone.jsonl"))
    code, text, errors = export(capsys, "gptq", run, *SMALL)
    assert code == 0, errors
    assert "gone.jsonl: there is no such file" in text
    assert "some calibration rows are kept back instead" in text
    assert manifest_of(run / "export" / "gptq")["gate"]["rows"] == 2  # a tenth of twenty
    (run / "recipe.yaml").write_text(recipe.replace("train.jsonl", "gone.jsonl"))
    line = refused(capsys, "gptq", run, *SMALL, "--force")
    assert "gone.jsonl: there is no such file" in line
    assert "give others: --calib-data FILE" in line


def test_a_full_disk(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (world / "base", *SMALL, "--calib-data", world / "text.txt", "--gate", "off")
    with small_disk(tmp_path / "disk") as disk:
        (disk / "filler").write_bytes(b"x" * 950_000)
        line = refused(capsys, "gptq", *words, "--out", disk / "out")
        assert f"{disk / 'out'} needs 1" in line
        assert [path.name for path in disk.iterdir()] == ["filler"]
        # room for the layers, and not for the checkpoint after them: it goes on where there is room again
        (disk / "filler").write_bytes(b"x" * 855_000)
        line = refused(capsys, "gptq", *words, "--out", disk / "out")
        assert "disk full while writing" in line
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "out.journal"]
        (disk / "filler").unlink()
        code, text, errors = export(capsys, "gptq", *words, "--out", disk / "out", "--resume")
        assert code == 0, errors
        assert "resumed: 2 of 2 layers" in text
        assert [path.name for path in disk.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gptq", "base", *SMALL, "--out", "new"], "give rows like those it will see: --calib-data FILE"),
        (
            ["gptq", "base", "--out", "new", "--calib-data", "text.txt"],
            "group_size 128 does not divide its in_features 64 (nor those of 11 others)",
        ),
        (["gptq", "run", "--bits", "3"], "--bits is 3, must be one of 2, 4, 8"),
        (["gptq", "run", "--bits", "four"], "--bits is 'four', must be a whole number"),
        (["awq", "run", "--damp", "little"], "--damp is 'little', must be a number"),
        (["awq", "run", "--tokens", "1"], "--tokens is 1, must be 2 or more"),
        (["gptq", "run", "--group-size", "48"], "--group-size is 48, must be one of 32, 64, 128, -1"),
        (["gptq", "run", "--act-order", "ful"], "--act-order is ful, must be one of static, off, full"),
        (["gptq", "run", "--format", "awq"], "--format is awq, must be one of gptq, compressed-tensors"),
        (["gptq", "run", "--rounding", "up"], "--rounding is up, must be one of gptq, nearest"),
        (["gptq", "run", "--damp", "2"], "--damp is 2, must be 0 .. 1"),
        (["gptq", "run", "--calib", "0"], "--calib is 0, must be 1 or more"),
        (["gptq", "run", "--gate", "ppk=3"], "did you mean ppl?"),
        (["gptq", "run", "--gate", "kl=-1"], "kl is '-1', must be a number of 0 or more"),
        (["gptq", "run", "--rows", "0"], "--rows 0 leaves nothing to measure; give --gate off with it"),
        (["gptq", "run", *SMALL, "--set", "modules.dwn_proj.bits=8"], "did you mean modules.down_proj.bits?"),
        (["gptq", "run", *SMALL, "--set", "modules.down_proj.bit=8"], "did you mean modules.down_proj.bits?"),
        (["gptq", "run", *SMALL, "--set", "module.down_proj.bits=8"], "did you mean modules.down_proj.bits?"),
        (["gptq", "run", *SMALL, "--set", "modules.down_proj.bits=5"], "'5' must be one of 2, 4, 8, 16"),
        (["gptq", "run", *SMALL, "--set", "modules.model.bits=16"], "leaves every module in 16 bits"),
        (["awq", "run", "--bits", "8"], "AWQ GEMM holds 4 bits, not 8; use --format compressed-tensors"),
        (["awq", "run", "--act-order", "full"], "--format awq has no g_idx; use --act-order static"),
        (["awq", "run", *SMALL, "--set", "modules.q_proj.group_size=64"], "one scheme for all modules"),
        (["awq", "untied", *SMALL, "--lm-head", "--out", "new"], "readers of AWQ GEMM keep the head in 16"),
        (
            ["gptq", "run", *SMALL, "--calib-length", "4096", "--calib-data", "text.txt"],
            "windows of 4096 tokens, but the model's max_position_embeddings is 2048",
        ),
        (["gptq", "run", *SMALL[:-1], "1024"], "less than one window of 1024"),
        (["gptq", "run", *SMALL, "--calib-data", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["gptq", "run", *SMALL, "--calib-data", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["gptq", "run", "--device", "tpu"], "--device is tpu, must be one of auto, cpu, cuda"),
        (["gptq", "base", *SMALL, "--adapter", "gone", "--out", "new"], "gone holds no adapter_config.json"),
        (["gptq", "./runs/v9"], "there is no run or model ./runs/v9"),
        (["gptq", "base", *SMALL, "--out", "base", "--force"], "--out base would replace"),
        (["gptq", "run", *SMALL, "--out", ".", "--force"], "which is read; name another folder"),
        (["merge", "run", "--out", "run", "--force"], "--out run would replace"),
        (["verify", "base"], "is not quantised: its config.json has no quantization_config"),
        (["verify", "base", "--reader", "tgi"], "there is no reader 'tgi'; there are vllm, gptqmodel"),
        (["verify", "nowhere"], "nowhere holds no config.json; give a quantised model folder"),
    ],
)
def test_mistakes(
    world: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    before = sorted(world.rglob("*"))
    assert message in refused(capsys, *words)
    assert sorted(world.rglob("*")) == before


def test_what_is_there_is_not_written_over(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    words = ("gptq", world / "run", *SMALL, "--out", tmp_path / "out")
    assert "exists already; --force replaces it" in refused(capsys, *words)
    assert export(capsys, *words, "--force")[0] == 0
    assert not (tmp_path / "out" / "mine").exists()
