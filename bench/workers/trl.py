"""One run of TRL's DPOTrainer or SFTTrainer with peft and bitsandbytes.

Options: `checkpointing` (on is TRL's default), `precompute` (reference log-probs once; off is TRL's
default). Dropout stays as TRL has it: its DPO switches it off unless told otherwise.
"""

from __future__ import annotations

from typing import Any

from ..measure import Stopwatch
from ..workload import as_text
from .common import (
    Job,
    Recorder,
    keep_nf4_layout,
    quantization,
    read_job,
    sft_rows,
    step_callback,
    torch_dtype,
    trainer_arguments,
    trainer_settings,
)


def main() -> None:
    """Load, train, write the result."""
    job = read_job()
    recorder = Recorder(job)
    # Imported before the baseline is taken: a library's own code is not memory that training adds.
    import datasets  # noqa: F401
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    trainers = trl.DPOTrainer, trl.SFTTrainer
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.folder,
        dtype=torch_dtype(job.dtype),
        quantization_config=quantization(job),
        device_map={"": "cpu"},
    )
    keep_nf4_layout(model)
    lora = LoraConfig(
        r=job.work.lora_r,
        lora_alpha=job.work.lora_alpha,
        lora_dropout=job.work.lora_dropout,
        target_modules=list(job.work.target_modules),
        task_type="CAUSAL_LM",
    )
    recorder.model_loaded(model)
    train(job, recorder, trainers, {"model": model, "peft_config": lora})


def train(job: Job, recorder: Recorder, trainers: tuple[Any, Any], model: dict[str, Any]) -> None:
    """Run the job with TRL's (DPO, SFT) trainers, which unsloth uses too, and write the result."""
    from transformers import PreTrainedTokenizerFast

    arguments = trainer_arguments(job) | {
        "bf16": job.dtype == "bf16",
        "gradient_checkpointing": job.options["checkpointing"],
        "max_length": job.work.length,
    }
    shared = model | {
        "processing_class": PreTrainedTokenizerFast.from_pretrained(job.folder),
        "callbacks": [step_callback(recorder)],
    }
    dpo_trainer, sft_trainer = trainers
    if job.task == "dpo":
        trainer = _dpo(dpo_trainer, job, recorder, arguments, shared)
    else:
        trainer = _sft(sft_trainer, job, arguments, shared)
    trainer.train()
    recorder.finish(trainer_settings(trainer))


def _sft(base: Any, job: Job, arguments: dict[str, Any], shared: dict[str, Any]) -> Any:
    import trl
    from datasets import Dataset

    return base(args=trl.SFTConfig(**arguments), train_dataset=Dataset.from_list(sft_rows(job)), **shared)


def _dpo(base: Any, job: Job, recorder: Recorder, arguments: dict[str, Any], shared: dict[str, Any]) -> Any:
    import trl
    from datasets import Dataset

    class TimedDPOTrainer(base):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            with Stopwatch() as watch:
                result = super()._precompute_ref_logps(*args, **kwargs)
            recorder.reference = watch.cost
            return result

    precompute = job.options.get("precompute", False)
    config = trl.DPOConfig(**arguments, beta=job.work.beta, precompute_ref_log_probs=precompute)
    return TimedDPOTrainer(args=config, train_dataset=Dataset.from_list(_pairs(job)), **shared)


def _pairs(job: Job) -> list[dict[str, str]]:
    """TRL tokenises pairs itself; the space keeps the prompt's last word apart from the answer's first."""
    return [
        {
            "prompt": as_text(row["prompt_ids"]) + " ",
            "chosen": as_text(row["chosen_ids"]),
            "rejected": as_text(row["rejected_ids"]),
        }
        for row in job.rows
    ]


if __name__ == "__main__":
    main()
