"""One export by GPTQModel, in its own default settings but for what is compared.

Options: `method`, `gptq` (GPTQ v1, no activation order that a reader would need) or `awq` (GEMM).
"""

from __future__ import annotations

import os

# on two cores it counts none by itself, and loads nothing
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

from typing import Any

from .quantizing import measured, read_job


def main() -> None:
    """Load, quantise, save."""
    job = read_job()
    from gptqmodel import GPTQModel, QuantizeConfig

    settings: dict[str, Any] = {"bits": 4, "group_size": job.group_size, "sym": job.symmetric}
    if job.options["method"] == "gptq":
        settings |= {"desc_act": False}
    else:
        settings |= {"method": "awq", "format": "gemm"}
    config: Any = QuantizeConfig(**settings)
    rows = [{"input_ids": window, "attention_mask": [1] * len(window)} for window in job.calibration()]
    with measured(job, settings | {"config": repr(config)}):
        model: Any = GPTQModel.load(str(job.model), config)
        model.quantize(rows, batch_size=1)
        model.save(str(job.checkpoint))


if __name__ == "__main__":
    main()
