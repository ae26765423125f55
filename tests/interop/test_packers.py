"""Our packing of integers against GPTQModel's and compressed-tensors', byte for byte."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtrain.bench.launch import environment
from qtrain.bench.peers.environments import Peer
from qtrain.export.formats.quantized import QuantizedLinear
from qtrain.export_command.readers import RUN_FILE
from tests.interop.quantized_folders import PACK, asked_for

WORKER = Path(__file__).with_name("pack_worker.py")
PEER = Peer("gptqmodel")
pytestmark = pytest.mark.skipif(not asked_for() or bool(PEER.missing()), reason="make interop")


@pytest.mark.parametrize("order", ["neighbours", "g_idx"])
@pytest.mark.parametrize("signs", ["positive", "both"])
def test_the_same_integers_become_the_same_bytes(order: str, signs: str, tmp_path: Path) -> None:
    n, k, group = 96, 256, 64
    seed = torch.Generator().manual_seed(3)
    q = torch.randint(0, 16, (n, k), generator=seed, dtype=torch.uint8)
    zeros = torch.randint(1, 16, (n, k // group), generator=seed, dtype=torch.uint8)
    scales = (torch.rand(n, k // group, generator=seed) * 0.02 + 0.001).half()
    if signs == "both":
        scales *= torch.randint(0, 2, scales.shape, generator=seed) * 2 - 1
    g_idx = (torch.arange(k) // group).int()
    if order == "g_idx":
        g_idx = g_idx[torch.randperm(k, generator=seed)]
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"q": q, "zeros": zeros, "scales": scales, "g_idx": g_idx}, source)
    command = [str(PEER.python), "-c", RUN_FILE, str(WORKER), str(source), str(out)]
    alone = {"GPTQMODEL_DISABLE_PACK_EXT": "1"}  # its packing in Python: nothing to compile
    done = subprocess.run(
        command, env=environment(1) | alone, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = load_file(out)
    linear = QuantizedLinear(q, scales, zeros, g_idx if order == "g_idx" else None, 4, group)
    compared = 0
    for form in ("gptq",) if order == "g_idx" else tuple(PACK):
        ours = PACK[form](linear, "m")
        for name in ours.keys() - {"weight_scale", "weight_shape"}:  # which nothing packs
            assert torch.equal(ours[name], theirs[f"{form}.{name}"]), (form, name)
            compared += 1
    assert compared == (4 if order == "g_idx" else 9)
