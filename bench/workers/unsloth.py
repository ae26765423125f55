"""One run of unsloth on CPU: its own loader and adapter call, then the TRL trainers it patches.

unsloth has a CPU backend of its own (chunked losses, bitsandbytes kept on the trainable layout); no
check of it is worked around here. Options: as in `trl`.
"""

from __future__ import annotations

import unsloth  # isort: skip  # patches transformers, peft and trl, so it must come first

from typing import Any

from .common import Recorder, read_job, torch_dtype
from .trl import train


def main() -> None:
    """Load, train, write the result."""
    job = read_job()
    recorder = Recorder(job)
    import datasets  # noqa: F401
    import trl

    trainers = trl.DPOTrainer, trl.SFTTrainer
    checkpointing = "unsloth" if job.options["checkpointing"] else False
    fast: Any = unsloth.FastLanguageModel
    model, _tokenizer = fast.from_pretrained(
        str(job.folder),
        max_seq_length=job.work.length,
        dtype=torch_dtype(job.dtype),
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing,
    )
    recorder.model_loaded(model)
    wrapped = fast.get_peft_model(
        model,
        r=job.work.lora_r,
        lora_alpha=job.work.lora_alpha,
        lora_dropout=job.work.lora_dropout,
        target_modules=list(job.work.target_modules),
        use_gradient_checkpointing=checkpointing,
        random_state=job.work.seed,
    )
    train(job, recorder, trainers, {"model": wrapped})


if __name__ == "__main__":
    main()
