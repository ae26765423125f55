"""One export by auto-round: its SignRound with the settings of its own `light` recipe, as GPTQ v1.

Options: `iterations`, `rate` and `batch` (of the recipe: 50, 5e-3 and 8).
"""

from __future__ import annotations

from typing import Any

from .quantizing import measured, read_job


def main() -> None:
    """Load, quantise, save."""
    job = read_job()
    import torch
    from auto_round import AutoRound

    windows: Any = torch.tensor(job.calibration())
    batch = int(job.options["batch"])
    settings: dict[str, Any] = {
        "scheme": "W4A16",
        "group_size": job.group_size,
        "sym": job.symmetric,
        "iters": int(job.options["iterations"]),
        "lr": float(job.options["rate"]),
        "batch_size": batch,
        "nsamples": windows.shape[0],
        "seqlen": windows.shape[1],
        "seed": 0,
    }
    rows = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(batch)]
    with measured(job, settings):
        rounding: Any = AutoRound(model=str(job.model), dataset=rows, device_map="cpu", **settings)
        rounding.quantize_and_save(output_dir=str(job.checkpoint), format="auto_gptq")


if __name__ == "__main__":
    main()
