"""What the loop computes: normalisation, packing, the reference, precision, evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtrain.errors import UserError
from qtrain.recipe.schema import Recipe

from .conftest import MakeRecipe, adapter_bytes, do_run, losses, metrics

# fp32: the same sums in another order
CLOSE = {"rel": 2e-5}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_batch_times_accumulation_is_what_counts(make_recipe: MakeRecipe, method: str) -> None:
    """8 x 1 == 1 x 8, although the rows differ in length."""
    wide = make_recipe("wide", method, training__batch_size=8)
    narrow = make_recipe("narrow", method, training__batch_size=1, training__gradient_accumulation=8)
    do_run(wide)
    do_run(narrow)
    assert losses(wide) == pytest.approx(losses(narrow), **CLOSE)
    assert [line["grad_norm"] for line in metrics(wide) if "grad_norm" in line] == pytest.approx(
        [line["grad_norm"] for line in metrics(narrow) if "grad_norm" in line], rel=1e-3
    )


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("sft", {"training__packing": False}),
        ("dpo", {"training__packing": False}),
        ("dpo", {"dpo__share_prompts": False}),
        ("sft", {"training__gradient_checkpointing": True}),
        ("dpo", {"training__gradient_checkpointing": True}),
    ],
)
def test_layout_and_checkpointing_change_nothing(
    make_recipe: MakeRecipe, method: str, change: dict[str, bool]
) -> None:
    plain, other = make_recipe("plain", method), make_recipe("other", method, **change)
    do_run(plain)
    do_run(other)
    assert losses(plain) == pytest.approx(losses(other), **CLOSE)


def test_dpo_starts_at_ln_2_and_learns(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("dpo", "dpo", training__max_steps=12)
    do_run(recipe)
    lines = [line for line in metrics(recipe) if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["rewards/margins"] > 0.01
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    } <= set(lines[0])


def test_dpo_continues_an_sft_run_from_ln_2(make_recipe: MakeRecipe) -> None:
    """The reference is the policy that the run starts from, not the base."""
    first = make_recipe("first")
    do_run(first)
    second = make_recipe("second", "dpo", parent=first.out)
    do_run(second)
    assert losses(second)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert json.loads((second.out / "manifest.json").read_text())["parent"] == str(first.out)


def test_reference_is_computed_once_and_reused(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qtrain.training.run as run_module

    recipe = make_recipe("dpo", "dpo", training__save_every=2)
    do_run(recipe)
    table = recipe.out / "reference_logps.npy"
    before = table.read_bytes()
    (recipe.out / "status.json").write_text('{"state": "running"}')

    def refuse(*_: object) -> None:
        raise AssertionError("the reference was computed again")

    monkeypatch.setattr(run_module, "score_pairs", lambda *_: refuse)
    do_run(recipe, resume=True)
    assert table.read_bytes() == before


@pytest.mark.parametrize("loss", ["ipo", "hinge"])
def test_other_preference_losses_train(make_recipe: MakeRecipe, loss: str) -> None:
    recipe = make_recipe(loss, "dpo", dpo__loss=loss, dpo__sft_weight=0.5, training__max_steps=8)
    do_run(recipe)
    lines = [line for line in metrics(recipe) if "loss" in line]
    assert lines[-1]["rewards/margins"] > 0
    assert lines[-1]["sft_loss"] < lines[0]["sft_loss"]


def test_nf4_learns_on_after_an_evaluation(make_recipe: MakeRecipe, sft_file: Path) -> None:
    """bitsandbytes would repack the weights in the first eval forward, and the rest would learn nothing."""
    recipe = make_recipe(
        "nf4",
        model__quantization="nf4",
        model__compute_dtype="bf16",
        data__eval=[str(sft_file)],
        training__eval_every=3,
        training__max_steps=15,
        training__learning_rate=0.03,
    )
    outcome, _ = do_run(recipe)
    evals = [line["eval_loss"] for line in metrics(recipe) if "eval_loss" in line]
    assert len(evals) >= 5
    assert evals == sorted(evals, reverse=True)
    assert evals[-1] < evals[0] - 0.1
    assert outcome.figures["eval_perplexity"] == pytest.approx(math.exp(evals[-1]), rel=1e-6)


def test_adapter_and_optimizer_are_fp32_under_bf16(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("bf16", model__quantization="nf4", model__compute_dtype="bf16")
    do_run(recipe)
    for folder in (recipe.out / "adapter", recipe.out / "checkpoints" / "checkpoint-5"):
        assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {
            torch.float32
        }
    state = torch.load(recipe.out / "checkpoints" / "checkpoint-5" / "optimizer.pt", weights_only=True)[
        "state"
    ]
    assert {value["exp_avg"].dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_dropout_asked_for_is_applied(make_recipe: MakeRecipe, method: str) -> None:
    without, with_ = make_recipe("without", method), make_recipe("with", method, adapter__dropout=0.5)
    do_run(without)
    do_run(with_)
    assert losses(without)[0] == losses(with_)[0]  # B is 0: dropout changes nothing yet
    assert losses(without)[-1] != losses(with_)[-1]


def test_adapter_loads_in_plain_peft(make_recipe: MakeRecipe, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qtrain.model.adapter import load_adapter
    from qtrain.model.load import load_base

    recipe = make_recipe("sft")
    do_run(recipe)
    ids = torch.arange(20).unsqueeze(0)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(plain, recipe.out / "adapter").eval()(input_ids=ids).logits
        ours = (
            load_adapter(load_base(recipe.model).model, recipe.out / "adapter").eval()(input_ids=ids).logits
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (before - theirs).abs().max() > 1e-3


def test_eval_loss_counts_every_token_once(make_recipe: MakeRecipe, sft_file: Path) -> None:
    one = make_recipe(
        "one", data__eval=[str(sft_file)], training__batch_size=1, training__gradient_accumulation=4
    )
    many = make_recipe("many", data__eval=[str(sft_file)], training__batch_size=4)
    assert do_run(one)[0].figures["eval_loss"] == pytest.approx(
        do_run(many)[0].figures["eval_loss"], rel=1e-4
    )


def test_run_directory_describes_itself(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("sft")
    do_run(recipe)
    manifest = json.loads((recipe.out / "manifest.json").read_text())
    assert set(manifest["base"]["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert manifest["versions"]["torch"]
    assert manifest["data"]["train"]["rows"] == 24
    assert "linear_logprob" in manifest["choices"]
    stored = (recipe.out / "recipe.yaml").read_text()
    assert all(f"{key}:" in stored for key in Recipe.model_fields)
    assert list((recipe.out / "tensorboard").glob("events*"))


def test_limit_is_the_small_trial(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("small", limit=6, training__max_steps=None, training__epochs=1)
    outcome, _ = do_run(recipe)
    assert outcome.step == 2  # 6 rows by 4


def test_nan_stops_the_run_and_names_the_rows(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    """A weight that only row 7 touches is NaN."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qtrain.training.trainer import NonFiniteLoss
    from tests.qtrain.tiny import write_rows

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    (rare,) = tokenizer.encode("~", add_special_tokens=False)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.model.embed_tokens.weight.data[rare] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    rows = [{"instruction": "week", "output": "total"}] * 6 + [{"instruction": "~", "output": "total"}]
    recipe = make_recipe(
        "run",
        model__name=tmp_path / "nan",
        data__train=[str(write_rows(tmp_path / "rows.jsonl", rows))],
        training__batch_size=1,
        training__save_every=1,
        training__max_steps=7,
        training__keep_checkpoints=9,
    )
    with pytest.raises(NonFiniteLoss, match=r"step \d+, training rows 6 \(.*rows\.jsonl:7\)") as stopped:
        do_run(recipe)
    step = int(str(stopped.value).split("step ")[1].split(",")[0])
    kept = sorted(path.name for path in (recipe.out / "checkpoints").glob("checkpoint-*"))
    assert kept == [f"checkpoint-{number}" for number in range(1, step)]
    assert json.loads((recipe.out / "status.json").read_text())["state"] == "failed"


def test_same_seed_same_bytes(make_recipe: MakeRecipe) -> None:
    one, two = make_recipe("one", adapter__dropout=0.1), make_recipe("two", adapter__dropout=0.1)
    do_run(one)
    do_run(two)
    assert adapter_bytes(one) == adapter_bytes(two)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"adapter__target_modules": ["q_prok"]},
            "no linear layer is called q_prok; this model has .*q_proj",
        ),
        ({"training__optimizer": "paged_adamw_8bit"}, "needs a CUDA device; use adamw"),
        ({"training__fsdp": True}, "training.fsdp needs several processes, this is one"),
        ({"model__compute_dtype": "fp16"}, "fp16, which a CPU can't train in"),
        ({"model__name": "./nowhere"}, "there is no folder ./nowhere"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="these are mistakes on a CPU only")
def test_mistakes_are_one_line(make_recipe: MakeRecipe, change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        do_run(make_recipe("run", **change))
    assert "\n" not in str(error.value)
