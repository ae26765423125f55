"""The recipe's keys, their meaning, defaults and ranges.

Every model forbids unknown keys; `load.py` turns a validation error into one line with the nearest
valid key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the recipe: an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelSettings(Section):
    """The base model and how its weights are held."""

    name: str = Field("demo", description="hub name, local folder, or `demo` (SmolLM2-135M-Instruct)")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    quantization: Literal["nf4", "none"] = Field(
        "none", description="`nf4`: 4-bit base through bitsandbytes; `none`: 16-bit (or fp32) base"
    )
    double_quant: bool = Field(True, description="quantise the absmax of the NF4 blocks as well")
    compute_dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="dtype of matmuls and activations; `auto` takes bf16 where the device has it"
    )
    attention: Literal["auto", "packed", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="`packed` keeps attention inside each sequence of a padding-free batch"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class AdapterSettings(Section):
    """LoRA: y = x W^T + (alpha / r) * dropout(x) A^T B^T."""

    r: Annotated[int, Field(ge=1, le=1024)] = 64
    alpha: Annotated[float, Field(gt=0)] = 128.0
    dropout: Fraction = 0.05
    target_modules: list[str] | Literal["all-linear"] = Field(
        default_factory=lambda: ["q_proj", "v_proj"],
        description="names of linear modules, or `all-linear`",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead of alpha / r")

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: object) -> object:
        if not isinstance(value, str) or value == "all-linear":
            return value
        if value.lower().replace("_", "-") == "all-linear":
            raise ValueError(f"adapter.target_modules is {value!r}; did you mean all-linear?")
        return [value]


class DataSettings(Section):
    """The rows to learn from and how they become tokens."""

    train: list[str] = Field(default_factory=lambda: ["demo"], description="files, hub names, or `demo`")
    eval: list[str] = Field(default_factory=list, description="held-out rows, never trained on")
    format: Literal["auto", "alpaca", "dolly", "self-instruct", "sharegpt", "openai", "preference"] = "auto"
    max_length: Annotated[int, Field(ge=8)] = Field(
        2048, description="tokens; longer rows are cut and counted"
    )
    reasoning: Literal["think", "plain", "drop"] = Field(
        "think", description="how a `reasoning` field stands before the answer: <think> tags, plain, left out"
    )
    system: str | None = Field(None, description="system message for rows that have none")
    chat_template: str | None = Field(
        None, description="`chatml` or a Jinja file, for a tokenizer that has no chat template"
    )
    skip_bad_rows: bool = Field(
        False, description="write bad rows to bad_rows.jsonl in the run directory and go on"
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class DpoSettings(Section):
    """Direct preference optimisation (Rafailov et al. 2023) and its relatives."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: Annotated[float, Field(gt=0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of an SFT term on the chosen answers (rpo_alpha elsewhere)"
    )
    share_prompts: bool = Field(True, description="compute the prompt of a pair once, not twice")


class TrainingSettings(Section):
    """The optimisation."""

    method: Literal["sft", "dpo"] = "sft"
    epochs: Annotated[float, Field(gt=0)] = 2.0
    max_steps: Positive | None = Field(
        None, description="stop after so many optimizer steps; overrides epochs"
    )
    batch_size: Positive = Field(2, description="rows (or pairs) a device sees at once")
    gradient_accumulation: Positive = 8
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="0 switches clipping off")
    gradient_checkpointing: bool | Literal["auto"] = Field("auto", description="auto: on CUDA yes, on CPU no")
    packing: bool = Field(True, description="lay the rows of a batch end to end instead of padding them")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    log_every: Positive = 1
    save_every: Positive = Field(50, description="optimizer steps between checkpoints")
    eval_every: Positive | None = Field(
        None, description="optimizer steps between evaluations; null: at the end"
    )
    keep_checkpoints: Positive = 2
    report_to: list[Literal["wandb", "trackio"]] = Field(
        default_factory=list, description="besides metrics.jsonl and TensorBoard, which are always written"
    )
    fsdp: bool = Field(False, description="shard over processes (FSDP2); it is an error if it cannot be had")


class Recipe(Section):
    """Everything a run depends on. `runs/NAME/recipe.yaml` is this with every default written out."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    dpo: DpoSettings = Field(default_factory=DpoSettings)
    kernels: Literal["auto", "off"] = Field("auto", description="`off`: the plain PyTorch paths everywhere")
    parent: Path | None = Field(None, description="a run whose adapter this one continues (--from)")
    out: Path | None = Field(None, description="the run directory; the next free runs/vN by default")
    limit: Positive | None = Field(None, description="use only the first N rows: the small trial")

    @field_validator("kernels", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @model_validator(mode="after")
    def _check_data(self) -> Recipe:
        if not self.data.train:
            raise ValueError("data.train is empty: name at least one file")
        return self
