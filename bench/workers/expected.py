"""What the first step of every task must come out as, in plain PyTorch with full logits in fp32.

No trainer, no packing, no chunks, no dropout: one sequence after the other through transformers, peft
and bitsandbytes. This is what the variants' figures are checked against before any speed is printed.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
import torch.nn.functional as F

from .common import Job, keep_nf4_layout, quantization, read_job, sft_rows


def main() -> None:
    """Write {task: {loss, grad_norm[, logps/chosen]}}."""
    job = read_job()
    found: dict[str, Any] = {}
    for task in ("sft", "sft-answers"):
        rows = [(row["input_ids"], row["labels"]) for row in sft_rows(job, task)]
        count = sum(label != -100 for _, labels in rows for label in labels[1:])
        logps, norm = _pass(job, rows, [-1 / count] * len(rows))
        found[task] = {"loss": -sum(logps) / count, "grad_norm": norm}
    found["dpo"] = _dpo(job)
    job.output.write_text(json.dumps(found))


def _dpo(job: Job) -> dict[str, float]:
    rows = [
        (row["prompt_ids"] + row[answer], [-100] * len(row["prompt_ids"]) + row[answer])
        for row in job.rows
        for answer in ("chosen_ids", "rejected_ids")
    ]
    # Policy == reference: d(-log sigmoid(beta h)) / dh = -beta / 2, the mean being over pairs.
    slope = job.work.beta / 2 / len(job.rows)
    logps, norm = _pass(job, rows, [-slope, slope] * len(job.rows))
    return {"loss": math.log(2), "grad_norm": norm, "logps/chosen": sum(logps[0::2]) / len(job.rows)}


def _pass(
    job: Job, rows: list[tuple[list[int], list[int]]], slopes: list[float]
) -> tuple[list[float], float]:
    """Summed log-prob of each row; the adapter's gradient norm for the sum of slope * log-prob."""
    model = _model(job)
    logps = []
    for (ids, labels), slope in zip(rows, slopes, strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()  # [T - 1, V]
        logp = -F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
        (slope * logp).backward()  # type: ignore[no-untyped-call]
        logps.append(float(logp))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return logps, float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def _model(job: Job) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(job.work.seed)
    base: Any = AutoModelForCausalLM.from_pretrained(
        job.folder, dtype=torch.float32, quantization_config=quantization(job), device_map={"": "cpu"}
    )
    keep_nf4_layout(base)
    base.requires_grad_(False)
    lora = LoraConfig(
        r=job.work.lora_r,
        lora_alpha=job.work.lora_alpha,
        target_modules=list(job.work.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora)


if __name__ == "__main__":
    main()
