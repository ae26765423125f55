"""Every format that we write, read by vLLM, GPTQModel and transformers, against our dequantised model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from qtrain.export.formats.scheme import Scheme
from qtrain.export_command.readers import Comparison, ReaderFailed, Reading, compare, missing, read_with
from qtrain.export_command.vllm_server import ServerFailed
from tests.interop.quantized_folders import Case, asked_for, reference_model, save_base, write_case

pytestmark = [
    pytest.mark.skipif(not asked_for(), reason="make interop"),
    pytest.mark.usefixtures("one_thread"),
]

CASES = (
    Case("gptq", Scheme(4, 128)),
    Case("gptq", Scheme(4, 64)),
    Case("gptq", Scheme(4, 64), "nearest"),
    Case("gptq", Scheme(4, -1)),
    Case("gptq", Scheme(4, 64, desc_act=True), order="full"),
    Case("gptq", Scheme(4, 64, symmetric=False)),
    Case("awq", Scheme(4, 128, symmetric=False)),
    Case("awq", Scheme(4, 64, symmetric=False)),
    Case("awq", Scheme(4, 64)),
    Case("compressed-tensors", Scheme(4, 64)),
    Case("compressed-tensors", Scheme(4, 128, symmetric=False)),
)
WINDOWS = torch.randint(0, 320, (4, 48), generator=torch.Generator().manual_seed(1)).tolist()
PROMPTS = [window[:16] for window in WINDOWS]
NEW = 24

# In which dtype a reader computes; GPTQModel's kernels know no float32, and auto is bfloat16 on CPUs.
DTYPE = {"transformers": "float32", "gptqmodel": "float16", "vllm": "auto"}
# The largest difference of a log-prob (spread by 1.3 in the vocabulary) that its arithmetic leaves: 3 times
# what was seen. GPTQModel's kernels multiply in 16 bits inside of transformers' float32 models too.
TOLERANCE = {"transformers": 0.015, "gptqmodel": 0.05, "vllm": 0.05}


@dataclass(frozen=True)
class Made:
    """A written folder and the logits that it stands for."""

    folder: Path
    logits: Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Made]:
    """Writes a case once, for all readers."""
    base = save_base(tmp_path_factory.mktemp("interop") / "base")
    done: dict[str, Made] = {}

    def make(case: Case) -> Made:
        if case.name not in done:
            folder = base.parent / case.name
            model = reference_model(base, write_case(base, folder, case))
            done[case.name] = Made(folder, lambda tokens: logits(model, tokens))
        return done[case.name]

    return make


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens).logits
    return found


def refusal(reader: str, case: Case) -> str | None:
    """What a reader says of a case that it doesn't read; what we warn of when we write it."""
    if reader == "vllm" and case.format == "gptq" and case.scheme.desc_act:
        return "desc_act"
    if reader == "vllm" and case.format == "gptq" and not case.scheme.symmetric:
        return "sym=False"
    if reader in ("gptqmodel", "transformers") and case.format == "gptq" and case.scheme.group_size == -1:
        return "qGroupSize"  # of GPTQModel's kernel for CPUs, which transformers uses: 32, 64, 128 or 256
    if reader == "gptqmodel" and case.format == "gptq" and not case.scheme.symmetric:
        return "sym=False"  # of other programs; transformers, with its kernels, does read it
    if reader == "transformers" and case.format == "compressed-tensors" and not case.scheme.symmetric:
        return "ignore_mismatched_sizes"  # of weight_zero_point, says the report above it
    return None


@pytest.mark.parametrize("reader", ["transformers", "gptqmodel", "vllm"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_others_read_what_we_wrote(case: Case, reader: str, made: Callable[[Case], Made]) -> None:
    if reader == "gptqmodel" and case.format == "compressed-tensors":
        pytest.skip("GPTQModel has no compressed-tensors")
    reason = missing(reader)
    if reason:
        pytest.skip(reason)
    folder, dtype = made(case), DTYPE[reader]
    expected = refusal(reader, case)
    if expected:
        with pytest.raises((ReaderFailed, ServerFailed), match=expected) as caught:
            read_with(reader, folder.folder, WINDOWS, PROMPTS, new_tokens=NEW, dtype=dtype, threads=1)
        record(case, reader, refused=str(caught.value))
        return
    reading = read_with(reader, folder.folder, WINDOWS, PROMPTS, new_tokens=NEW, dtype=dtype, threads=1)
    found = compare(reading, WINDOWS, folder.logits)
    record(case, reader, reading=reading, found=found)
    tolerance = TOLERANCE[reader]
    assert found.positions == 4 * 47
    assert found.difference < tolerance
    assert found.greedy_tokens == 4 * NEW
    # a choice of the reader that is not the reference's first is as closely tied with it as differences allow
    assert found.worst_margin < 2 * tolerance


def record(
    case: Case,
    reader: str,
    *,
    reading: Reading | None = None,
    found: Comparison | None = None,
    refused: str | None = None,
) -> None:
    """A line for the table in docs/interop.md, where QTRAIN_INTEROP_RESULTS names a file."""
    path = os.environ.get("QTRAIN_INTEROP_RESULTS")
    if not path:
        return
    line: dict[str, Any] = {"case": case.name, "reader": reader, "refused": refused}
    if reading and found:
        line |= {"seconds": reading.seconds, "facts": reading.facts} | asdict(found)
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")
