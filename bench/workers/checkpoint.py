"""One checkpoint in one engine of transformers' kind: loaded, asked, timed, in a process of its own.

Run in the environment that can read the checkpoint, which need not hold this project.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from ..measure import PeakMemory, memory_field, release_free_memory
from .installed import versions

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "gptqmodel", "compressed-tensors")


def main() -> None:
    """Write the memory, the log-probs of the windows, the answers and the times."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    libraries = memory_field("VmRSS")
    begun = time.perf_counter()
    model = load(job)
    touch(model)
    load_s = time.perf_counter() - begun
    load_peak = memory_field("VmHWM")
    release_free_memory()
    loaded = Memory(job["device"], libraries)
    with torch.inference_mode():
        result = {
            "nll": [window_nll(model, window, job["device"]) for window in job["windows"]],
            "answers": answer_all(model, job),
            "speed": [time_batch(model, requests, job) for requests in job["requests"]],
        }
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("down_proj")}
    facts = {"kernel": ", ".join(sorted(kinds)), "dtype": str(model.dtype).removeprefix("torch.")}
    result |= loaded.as_dict() | {
        "load_s": load_s,
        "load_peak_bytes": load_peak,
        "facts": facts,
        "versions": versions(PACKAGES),
    }
    partial = Path(job["output"]).with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.rename(job["output"])


class Memory:
    """Of the whole process with its libraries; on a CUDA device, what PyTorch's allocator holds there."""

    def __init__(self, device: str, libraries: int) -> None:
        self._device, self._libraries = device, libraries
        self._resident = PeakMemory(collect=False)
        if device == "cuda":
            import torch

            self._loaded = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def as_dict(self) -> dict[str, Any]:
        """After loading and at the peak since."""
        self._resident.close()
        host = {
            "loaded_bytes": self._resident.baseline,
            "peak_bytes": self._resident.peak(),
            "libraries_bytes": self._libraries,
            "memory_method": self._resident.method,
        }
        if self._device != "cuda":
            return host
        import torch

        device = {"loaded_bytes": self._loaded, "peak_bytes": torch.cuda.max_memory_allocated()}
        return host | device | {"host": host, "memory_method": "PyTorch's allocator"}


def load(job: dict[str, Any]) -> Any:
    """The model in eval mode: from plain files, packed ones, or over a base held in NF4."""
    import torch
    from transformers import AutoModelForCausalLM

    place: dict[str, Any] = {}
    if job["device"] != "cpu" or job["kind"] == "nf4":
        place["device_map"] = {"": job["device"]}
    if job["kind"] == "dequantized":
        return _dequantized(job)
    if job["kind"] == "nf4":
        from transformers import BitsAndBytesConfig

        dtype = getattr(torch, job["nf4"]["dtype"])
        place["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=job["nf4"]["double_quant"],
            bnb_4bit_compute_dtype=dtype,
        )
        model: Any = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype, **place)
        if job["adapter"] is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, job["adapter"])
        return model.eval()
    return AutoModelForCausalLM.from_pretrained(job["folder"], dtype="auto", **place).eval()


def _dequantized(job: dict[str, Any]) -> Any:
    """Packed weights unpacked by this project: speed and memory are those of 16 bits."""
    import torch
    from transformers import AutoConfig

    from qtrain.export.unpacked_model import unpacked_model

    stored = str(AutoConfig.from_pretrained(job["folder"]).dtype or torch.bfloat16)
    dtype = getattr(torch, stored.removeprefix("torch."))
    return unpacked_model(Path(job["folder"]), dtype, job["device"])


def touch(model: Any) -> None:
    """Read every weight once: pages of a mapped file count only when they are there."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().reshape(-1)[::64].clone()


def window_nll(model: Any, window: list[int], device: str) -> float:
    """Mean -log p of a window's own next tokens."""
    import torch

    ids = torch.tensor([window], device=device)
    logits = model(input_ids=ids).logits[0, :-1].float()  # [T-1, V]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


def answer_all(model: Any, job: dict[str, Any]) -> list[list[int]]:
    """Greedy answers to the prompts, each with the token that ended it."""
    order = sorted(range(len(job["prompts"])), key=lambda number: len(job["prompts"][number]))
    answers: list[list[int]] = [[] for _ in order]
    size = job["answer_batch"]
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        made = _generate(model, [job["prompts"][row] for row in rows], job)
        for row, ids in zip(rows, made, strict=True):
            ends = [place for place, token in enumerate(ids) if token in job["stop_ids"]]
            answers[row] = ids[: ends[0] + 1] if ends else ids
    return answers


def _generate(model: Any, prompts: list[list[int]], job: dict[str, Any]) -> list[list[int]]:
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=job["device"])  # [B, W]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=job["device"])
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=job["max_new_tokens"],
        do_sample=False,
        eos_token_id=job["stop_ids"],
        pad_token_id=job["stop_ids"][0],
    )
    found: list[list[int]] = made[:, width:].tolist()
    return found


def time_batch(model: Any, requests: list[list[list[int]]], job: dict[str, Any]) -> dict[str, Any]:
    """Batches of prompts of one length: the first pass over them, then token by token.

    The first batch warms up.
    """
    import torch

    begun = time.perf_counter()
    found: dict[str, Any] = {"batch": len(requests[0]), "prefill_s": [], "steps_s": []}
    for number, batch in enumerate(requests):
        ids = torch.tensor(batch, device=job["device"])  # [B, T]
        prefill, steps = _one_request(model, ids, job["new_tokens"], job["device"])
        if number:
            found["prefill_s"].append(prefill)
            found["steps_s"].append(steps)
        if number >= job["least"] and time.perf_counter() - begun > job["budget_s"]:
            break
    return found


def _one_request(model: Any, ids: Any, new_tokens: int, device: str) -> tuple[float, list[float]]:
    """Seconds until the first token, and of each of the `new_tokens` after it."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields = CausalLMOutputWithPast.__dataclass_fields__
    name = "cache" if "cache" in fields else "past_key_values"  # until transformers 5.23
    times = [_now(device)]
    cache = None
    for _ in range(new_tokens + 1):
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{name: cache})
        cache = out[name]
        ids = out.logits[:, -1].max(dim=-1).indices.unsqueeze(1)  # [B, 1]
        times.append(_now(device))
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return seconds[0], seconds[1:]


def _now(device: str) -> float:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
