"""What an export will take, from shapes alone."""

from __future__ import annotations

from pathlib import Path

import torch

from qtrain.export.layerwise import Compute
from qtrain.export.planned_cost import planned_cost
from qtrain.export.quantize_stage import StageSettings
from qtrain.export.structure import find_structure
from tests.export.folders import save_model

CPU = torch.device("cpu")


def test_memory_does_not_grow_with_depth_and_work_does(tmp_path: Path) -> None:
    found = {}
    for layers in (2, 4):
        folder = save_model(tmp_path / str(layers), num_hidden_layers=layers)
        found[layers] = planned_cost(find_structure(folder), 8, 32, StageSettings(), Compute(CPU))
    assert found[2].peak_bytes == found[4].peak_bytes
    assert found[4].exact == 2 * found[2].exact
    assert found[4].forward == 2 * found[2].forward


def test_sums_and_factor_of_the_widest_module_are_in_it(tmp_path: Path) -> None:
    width = 2**13
    folder = save_model(tmp_path / "m", intermediate_size=width)
    structure = find_structure(folder)
    plain = planned_cost(structure, 8, 32, StageSettings(), Compute(CPU))
    assert plain.peak_bytes > 2 * 4 * width**2
    corrected = planned_cost(structure, 8, 32, StageSettings(correction=0.5), Compute(CPU))
    assert corrected.peak_bytes > plain.peak_bytes
    assert corrected.exact > plain.exact
    assert corrected.forward > 2 * plain.forward  # the original beside it, and the drift
    # hidden states beyond their budget lie in files
    many = planned_cost(structure, 2**16, 32, StageSettings(), Compute(CPU))
    assert many.peak_bytes < plain.peak_bytes + 2**30 + 2**29
