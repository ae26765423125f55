"""Quantising layer by layer, against the whole model in memory; and after a kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtrain.export.checkpoint import Checkpoint
from qtrain.export.errors import ExportError
from qtrain.export.formats import gptq
from qtrain.export.formats.scheme import Scheme
from qtrain.export.journal import Journal
from qtrain.export.layerwise import Compute, Step, quantize_layers
from qtrain.export.merged_weights import MergedWeights
from qtrain.export.quantize_stage import StageSettings
from qtrain.export.rounding.correction import corrected_weight, missing_products
from qtrain.export.rounding.curvature import curvature
from qtrain.export.rounding.linear import round_linears
from qtrain.export.structure import find_structure
from tests.export.folders import ARCHITECTURES, files_of, save_model

SCHEME = Scheme(4, 32)
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def windows(count: int = 6, length: int = 24) -> Tensor:
    return torch.randint(0, 320, (count, length), generator=torch.Generator().manual_seed(0))


def quantize(
    folder: Path,
    out: Path,
    *,
    at_once: int = 2**30,
    in_memory: int = 2**31,
    resume: bool = False,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Journal:
    structure = find_structure(folder)
    journal = Journal(out, {"test": 1}, resume=resume)
    schemes: dict[str, Scheme | None] = dict.fromkeys(structure.linears(), SCHEME)
    quantize_layers(
        structure,
        MergedWeights(Checkpoint.open(folder), None),
        windows(),
        schemes | more.pop("schemes", {}),
        more.pop("settings", StageSettings()),
        gptq.pack,
        journal,
        Compute(CPU, dtype, activation_bytes=at_once, states_bytes=in_memory),
        **more,
    )
    return journal


def dequantized(journal: Journal) -> dict[str, Tensor]:
    found = {}
    for entry in journal.names():
        tensors = journal.load(entry)
        for module in {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}:
            parts = {
                suffix: tensors[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")
            }
            found[module] = gptq.unpack(parts, SCHEME).dequantize()
    return found


@torch.no_grad()
def whole_model(folder: Path) -> dict[str, Tensor]:
    """The same, with the model in memory: it runs from its beginning for every stage."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stages = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    found = {}
    for index, layer in enumerate(model.model.layers):
        for stage in stages:
            modules = {name: module for name, module in layer.named_modules() if name.split(".")[-1] in stage}
            seen: list[Tensor] = []
            first = next(iter(modules.values()))
            handle = first.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
            model(input_ids=windows())
            handle.remove()
            x = seen[0].flatten(0, 1)
            rounded = round_linears([m.weight for m in modules.values()], curvature(x.t() @ x), SCHEME)
            for (name, module), its in zip(modules.items(), rounded, strict=True):
                module.weight.copy_(its.linear.dequantize())
                found[f"model.layers.{index}.{name}"] = module.weight.clone()
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layer_by_layer_is_the_whole_model(architecture: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", architecture)
    found, expected = dequantized(quantize(folder, tmp_path / "out")), whole_model(folder)
    assert found.keys() == expected.keys()
    for name in expected:
        # sums over the inputs are taken in another order, so that a tie falls to the other side now and then
        assert (found[name] != expected[name]).float().mean() < 0.03, name


def test_chunks_and_spilled_states_are_the_same(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    whole = dequantized(quantize(folder, tmp_path / "whole"))
    journal = quantize(folder, tmp_path / "parts", at_once=1, in_memory=0)
    assert not list((journal.folder / "spilled").glob("*"))  # nothing is left behind
    parts = dequantized(journal)
    for name in whole:
        assert (parts[name] != whole[name]).float().mean() < 0.03, name
    # in memory or in files makes no difference at all
    kept = quantize(folder, tmp_path / "kept", at_once=1)
    for entry in journal.names():
        for name, values in journal.load(entry).items():
            assert torch.equal(values, kept.tensor(entry, name)), name


def test_correction_is_for_the_original_models_inputs_and_residual_stream(tmp_path: Path) -> None:
    """Against both models whole in memory, for the last layer's last stage; and in chunks."""
    folder = save_model(tmp_path / "m")
    settings = StageSettings(correction=1.0, refine=0)
    journal = quantize(folder, tmp_path / "out", settings=settings)
    found = dequantized(journal)
    name = "model.layers.1.mlp.down_proj"
    original, corrected = load_float32(folder), load_float32(folder)
    with torch.no_grad():
        for module, values in found.items():
            if module != name:
                corrected.get_submodule(module).weight.copy_(values)
    y, x = inputs_of(original, name), inputs_of(corrected, name)
    norm = "model.layers.1.post_attention_layernorm"  # which reads what down_proj's output is added to
    behind = inputs_of(original, norm) - inputs_of(corrected, norm)
    weight = original.get_submodule(name).weight
    weight = weight.detach()
    missing = missing_products({name: weight}, (y - x).t() @ x, behind.t() @ x)
    h = curvature(x.t() @ x)
    wanted = corrected_weight(weight, missing[name], h)
    expected = round_linears([wanted], h, SCHEME, refine=0)[0].linear.dequantize()
    # sums over the inputs are taken in another order, so that a tie falls to the other side now and then
    assert (found[name] != expected).float().mean() < 0.03
    without = corrected_weight(weight, missing_products({name: weight}, (y - x).t() @ x)[name], h)
    for other in (weight, without):
        plain = round_linears([other], h, SCHEME, refine=0)[0].linear.dequantize()
        assert (found[name] != plain).float().mean() > 0.1
    parts = dequantized(quantize(folder, tmp_path / "parts", settings=settings, at_once=1, in_memory=0))
    name = "model.layers.0.self_attn.o_proj"  # later ones are shifted by any tie that fell here
    assert (parts[name] != found[name]).float().mean() < 0.03


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_calibrated_in_bfloat16(correction: float, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    settings = StageSettings(correction=correction)
    errors = [
        quantize(folder, tmp_path / str(dtype), dtype=dtype, settings=settings).notes("layer-0")["errors"]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    # activations with 8 bits: sums over them are right to a per cent, what feedback leaves of them less so
    for name, error in errors[0].items():
        assert errors[1][name] == pytest.approx(error, rel=0.2), name


def load_float32(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def inputs_of(model: Any, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(input_ids=windows())
    handle.remove()
    return seen[0].flatten(0, 1)


def test_modules_left_in_16_bits_and_modules_with_a_scheme_of_their_own(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    steps: list[Step] = []
    journal = quantize(
        folder,
        tmp_path / "out",
        schemes={"model.layers.0.self_attn.k_proj": None, "model.layers.1.mlp.down_proj": Scheme(8, 32)},
        progress=steps.append,
    )
    assert "model.layers.0.self_attn.k_proj.qweight" not in journal.specs("layer-0")
    assert journal.specs("layer-1")["model.layers.1.mlp.down_proj.qweight"].shape == (96 // 4, 64)
    assert [step.module.rpartition(".")[2] for step in steps[:7]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ]
    assert [step.error is None for step in steps[:7]] == [False, True, *[False] * 5]
    # 8 bits have steps a sixteenth as wide: errors 256 times smaller, less what the earlier layers add
    assert steps[13].error is not None
    assert steps[6].error is not None
    assert steps[13].error < steps[6].error / 50


def test_few_tokens_are_noted_with_their_count(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", intermediate_size=160)
    steps: list[Step] = []
    quantize(folder, tmp_path / "out", progress=steps.append)
    notes = {step.module: step.note for step in steps if step.note}
    assert set(notes) == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert "144 tokens for 160 inputs" in notes["model.layers.0.mlp.down_proj"]


def test_activations_that_overflow_name_the_module(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    checkpoint = Checkpoint.open(folder)

    class Damaged(MergedWeights):
        def load(self, names: Any) -> dict[str, Tensor]:
            found = super().load(names)
            for name in found:
                if name == "model.layers.1.post_attention_layernorm.weight":
                    found[name] = found[name] * float("inf")
            return found

    structure = find_structure(folder)
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.gate_proj: the activations.*NaN"):
        quantize_layers(
            structure,
            Damaged(checkpoint, None),
            windows(),
            dict.fromkeys(structure.linears(), SCHEME),
            StageSettings(),
            gptq.pack,
            Journal(tmp_path / "out", {}),
            Compute(CPU),
        )


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.export.test_layerwise import StageSettings, quantize

def die(step):
    if step.module.endswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

settings = StageSettings(correction=float(sys.argv[4]))
quantize(Path(sys.argv[1]), Path(sys.argv[2]), progress=die, settings=settings)
"""


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(correction: float, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", num_hidden_layers=3)
    settings = StageSettings(correction=correction)
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed"), "layers.1.mlp.up_proj"]
    command.append(str(correction))
    died = subprocess.run(command, cwd=Path(__file__).parents[2], check=False, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    steps: list[Step] = []
    resumed = quantize(folder, tmp_path / "killed", resume=True, progress=steps.append, settings=settings)
    assert steps[0].module == "model.layers.1.self_attn.q_proj"
    whole = quantize(folder, tmp_path / "whole", settings=settings)
    assert resumed.names() == whole.names() == ["layer-0", "layer-1", "layer-2"]
    found, expected = files_of(resumed.folder), files_of(whole.folder)
    for name in (f"layer-{index}.safetensors" for index in range(3)):
        assert found[name] == expected[name], name
