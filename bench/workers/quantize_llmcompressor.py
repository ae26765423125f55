"""One export by llm-compressor, as compressed-tensors (pack-quantized).

Options: `method`, `gptq` or `awq`.
"""

from __future__ import annotations

from typing import Any

from .quantizing import measured, read_job


def main() -> None:
    """Load, quantise, save."""
    job = read_job()
    import llmcompressor
    from datasets import Dataset
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    cache: Any = IntermediatesCache
    cache.pin_memory = _nothing  # it asks for an accelerator, which pinning is for
    windows = job.calibration()
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows]
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": job.symmetric,
        "strategy": "group",
        "group_size": job.group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if job.options["method"] == "gptq":
        recipe: list[Any] = [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    else:
        recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    settings: dict[str, Any] = {
        "max_seq_length": len(windows[0]),
        "num_calibration_samples": len(windows),
        "shuffle_calibration_samples": False,
    }
    with measured(job, settings | {"weights": weights, "recipe": [repr(part) for part in recipe]}):
        model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto", device_map={"": "cpu"})
        llmcompressor.oneshot(model=model, dataset=Dataset.from_list(rows), recipe=recipe, **settings)
        model.save_pretrained(job.checkpoint, save_compressed=True)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """No memory to pin."""


if __name__ == "__main__":
    main()
