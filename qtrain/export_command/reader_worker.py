"""Reads a model folder with transformers or GPTQModel; run by another interpreter, which lacks this project.

    python reader_worker.py JOB.json

The job's `output` gets, as safetensors, `targets` [n, T-1], `top_ids` and `top_log_probs` [n, T-1, C],
`greedy` [m, new] and, as metadata, the versions.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Read the folder and write what it says."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(job["threads"])
    model = _load(job["reader"], job["folder"], job["dtype"])
    windows = torch.tensor(job["windows"])
    found: dict[str, list[Any]] = {"targets": [], "top_ids": [], "top_log_probs": []}
    greedy = []
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0, :-1]  # [T-1, V]
            log_probs = logits.double().log_softmax(-1).float()
            found["targets"].append(log_probs.gather(1, window[1:, None])[:, 0])
            values, ids = log_probs.topk(min(job["top"], log_probs.shape[1]))
            found["top_ids"].append(ids)
            found["top_log_probs"].append(values)
        for prompt in job["prompts"]:
            tokens = torch.tensor([prompt])
            made = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=job["new_tokens"],
                min_new_tokens=job["new_tokens"],
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            greedy.append(made[0, len(prompt) :])
    tensors = {name: torch.stack(values).contiguous() for name, values in found.items()}
    tensors["greedy"] = torch.stack(greedy).contiguous()
    # the class of the layers' linears tells which kernel was chosen
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("down_proj")}
    facts = {"kernel": ", ".join(sorted(kinds)), "dtype": str(model.dtype).removeprefix("torch.")}
    packages = ("torch", "transformers", "gptqmodel", "optimum", "compressed-tensors")
    versions = {name: importlib.metadata.version(name) for name in packages}
    save_file(tensors, job["output"], metadata=facts | versions)


def _load(reader: str, folder: str, dtype: str) -> Any:
    import torch

    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    if reader == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=wanted)
    from gptqmodel import GPTQModel

    options = {} if dtype == "auto" else {"dtype": wanted}
    return GPTQModel.load(folder, device="cpu", **options).model


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
