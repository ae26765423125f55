import json

import pytest
import torch
from typer.testing import CliRunner

from qtrain.cli import app
from qtrain.data.load import iter_rows
from qtrain.data.rows import Message
from qtrain.errors import UserError
from qtrain.evaluation.checks import check_answer, default_check
from qtrain.evaluation.plain import dequantize_for_decoding, plain_linear
from qtrain.evaluation.subject import find_subject, find_subjects
from qtrain.runs.listing import summarise
from qtrain.runs.rundir import RunDir
from tests.qtrain.tiny import save_tiny_run, write_rows

LIMITS = ["--max-new-tokens", "24", "--batch-size", "5"]


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


@pytest.fixture(scope="module")
def evaluated(world):
    """JSON of `qtrain eval` for both runs."""
    found = {}
    for name in ("sft", "dpo"):
        result = invoke("eval", world / "runs" / name, "--json", *LIMITS)
        assert result.exit_code == 0, result.output
        found[name] = json.loads(result.stdout)
    return found


def naive_logps(world, run, messages, answer):
    """Log-probs of the answer's tokens, from the full logits of plain transformers and plain peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, world / "runs" / run / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer + "<|im_end|>")]
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1)
    return logp[len(ids[0]) - 1 : -1].gather(1, torch.tensor(ids[1])[:, None]).squeeze(1)


def chat(prompt):
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]


def test_rows_are_checked_as_their_check_says(world, evaluated):
    rows = list(iter_rows(str(world / "rows.jsonl")))
    scores = evaluated["sft"]["subjects"][0]["rows"]
    assert {score["passed"] for score in scores} == {True, False}
    assert {score["stopped"] for score in scores} == {True, False}
    for row, score in zip(rows, scores, strict=True):
        check = row.extra.get("check") or default_check(row.messages[-1].content)
        assert score["passed"] == (score["stopped"] and check_answer(check, score["answer"]).passed)
        assert bool(score["reason"]) != score["passed"]
        assert score["stopped"] or (score["tokens"] == 24 and "did not stop" in score["reason"])


def test_figures_are_the_means_of_the_rows(evaluated):
    result = evaluated["sft"]
    rows = result["subjects"][0]["rows"]
    lines = {section["title"]: section["lines"][0]["value"] for section in result["sections"]}
    for title, kept in [
        ("exact checks", rows),
        ("exact checks: regex", [row for row in rows if row["kind"] == "regex"]),
        ("exact checks: exact", [row for row in rows if row["kind"] == "exact"]),
    ]:
        assert lines[title]["mean"] == pytest.approx(sum(row["passed"] for row in kept) / len(kept))
        assert lines[title]["rows"] == len(kept)
    loss = sum(row["nll"] for row in rows) / sum(row["nll_tokens"] for row in rows)
    assert lines["loss"]["mean"] == pytest.approx(loss)
    assert result["score"]["mean"] == lines["exact checks"]["mean"]


def test_loss_is_that_of_plain_peft(world, evaluated):
    for score in evaluated["sft"]["subjects"][0]["rows"][:4]:
        logp = naive_logps(world, "sft", chat(score["prompt"]), score["reference"])
        assert score["nll_tokens"] == len(logp)
        assert score["nll"] == pytest.approx(-float(logp.sum()), rel=1e-4)  # fp32 sums in another order


def test_preferences_are_those_of_plain_peft(world, evaluated):
    rows = list(iter_rows(str(world / "pairs.jsonl")))
    scores = evaluated["dpo"]["subjects"][0]["pairs"]
    for row, score in list(zip(rows, scores, strict=True))[:4]:
        for side, answer in (("chosen", row.chosen), ("rejected", row.rejected)):
            logp = naive_logps(world, "dpo", chat(row.prompt[0].content), answer[0].content)
            assert score[side] == pytest.approx(float(logp.sum()), rel=1e-4)
            assert score[f"{side}_tokens"] == len(logp)
    lines = {section["title"]: section["lines"][0]["value"] for section in evaluated["dpo"]["sections"]}
    right = [score["chosen"] > score["rejected"] for score in scores]
    assert lines["preference accuracy"]["mean"] == pytest.approx(sum(right) / len(right))


def test_pairs_alone_are_answered_too(evaluated):
    rows = evaluated["dpo"]["subjects"][0]["rows"]
    assert len(rows) == 10
    assert {row["kind"] for row in rows} == {"exact"}


def test_a_run_keeps_its_evaluation_and_runs_shows_it(world, evaluated):
    kept = json.loads((world / "runs" / "sft" / "eval.json").read_text())
    assert kept["score"] == evaluated["sft"]["score"]
    assert kept["held_out"]["sha256"] == evaluated["sft"]["held_out"]["sha256"]
    assert summarise(world / "runs" / "sft").eval_score == kept["score"]["mean"]


@pytest.mark.usefixtures("evaluated")
def test_part_of_the_rows_is_not_kept(world):
    before = (world / "runs" / "sft" / "eval.json").read_bytes()
    result = invoke("eval", world / "runs" / "sft", "--limit", "3", *LIMITS)
    assert result.exit_code == 0
    assert "not kept" in result.stdout
    assert (world / "runs" / "sft" / "eval.json").read_bytes() == before


def test_a_leak_is_said(evaluated):
    (note,) = evaluated["sft"]["subjects"][0]["notes"]
    assert "2 held-out rows" in note  # numbers 12 and 13 are in both files


def test_the_same_row_twice_counts_once(world, tmp_path):
    lines = (world / "rows.jsonl").read_text().splitlines(keepends=True)
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text("".join(lines[:3] + lines[:2]))
    result = invoke("eval", world / "base", "--data", doubled, "--json", *LIMITS)
    assert result.exit_code == 0, result.output
    held_out = json.loads(result.stdout)["held_out"]
    assert (held_out["conversations"], held_out["duplicates"]) == (3, 2)


def test_nf4_dequantised_is_bit_equal(world):
    from bitsandbytes.nn import Linear4bit

    from qtrain.model.load import load_base
    from qtrain.recipe.schema import ModelSettings

    settings = {"name": str(world / "base"), "quantization": "nf4", "compute_dtype": "bf16"}
    base = load_base(ModelSettings.model_validate(settings))
    module = base.model.model.layers[0].self_attn.q_proj
    assert isinstance(module, Linear4bit)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert module.bias.abs().sum() > 0
    assert torch.equal(plain_linear(module, torch.bfloat16)(x), module(x))
    ids = torch.arange(3, 20)[None]
    before = base.model(input_ids=ids).logits
    said = []
    assert dequantize_for_decoding(base.model, torch.bfloat16, said.append)
    assert not any(isinstance(layer, Linear4bit) for layer in base.model.modules())
    assert torch.equal(base.model(input_ids=ids).logits, before)
    assert "dequantised once" in said[0]


def test_weights_that_do_not_fit_stay_in_4_bit(world, monkeypatch):
    from qtrain.evaluation import plain
    from qtrain.model.load import load_base
    from qtrain.recipe.schema import ModelSettings

    base = load_base(ModelSettings.model_validate({"name": str(world / "base"), "quantization": "nf4"}))
    monkeypatch.setattr(plain, "free_memory", lambda _: 1000)
    said = []
    assert not plain.dequantize_for_decoding(base.model, torch.float32, said.append)
    assert "4-bit" in said[0]


def test_a_base_is_compared_with_the_runs_weights_and_prompts(world, tmp_path):
    run = save_tiny_run(tmp_path / "run", world / "base", quantization="nf4", data={"system": "Be brief."})
    base, _ = find_subjects([str(world / "base"), str(run)])
    assert (base.weights, base.data.system) == ("nf4", "Be brief.")
    assert find_subject(str(world / "base")).weights == "16-bit"


def test_mistakes_are_one_line(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    unfinished = save_tiny_run(tmp_path / "unfinished", world / "base")
    RunDir(unfinished).set_status("stopped", step=2)
    damaged = save_tiny_run(tmp_path / "damaged", world / "base")
    weights = damaged / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    empty = save_tiny_run(tmp_path / "empty", world / "base")
    write_rows(tmp_path / "prompts.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    for words, part in [
        (["eval", "runs/stf"], "did you mean runs/sft?"),
        (["eval", "sft"], "did you mean runs/sft?"),
        (["eval", "./nothing"], "there is no run or model"),
        (["eval", "runs"], "neither a run"),
        (["eval", "rows.jsonl"], "is a file"),
        (["eval", unfinished], "is stopped, not finished"),
        (["eval", damaged], "is damaged"),
        (["eval", empty], "--data"),
        (["compare", "runs/sft"], "two or more"),
        (["compare", "runs/sft", "runs/sft"], "is there twice"),
        (["compare", "runs/sft", "base", "--html", tmp_path, "--limit", "1", *LIMITS], "is a folder"),
        (["chat", "runs/sft"], "piped text is empty"),
    ]:
        result = invoke(*words)
        assert isinstance(result.exception, UserError), (words, result.output)
        assert part in str(result.exception)
        assert "\n" not in str(result.exception)


def test_chat_answers_as_eval_does(world, evaluated):
    score = next(row for row in evaluated["sft"]["subjects"][0]["rows"] if row["stopped"])
    result = invoke("chat", world / "runs" / "sft", score["prompt"], "--max-new-tokens", "24")
    assert result.exit_code == 0, result.output
    assert result.stdout == score["answer"] + "\n"


def test_chat_remembers_and_forgets(world, evaluated):
    from qtrain.evaluation.chat import Chat, ChatSettings
    from qtrain.evaluation.score import make_encoder
    from qtrain.evaluation.subject import adapted, open_base

    long = next(row for row in evaluated["sft"]["subjects"][0]["rows"] if not row["stopped"])
    subject = find_subject(str(world / "runs" / "sft"))
    base = open_base(subject, lambda _: None)
    system = Message("system", "Be brief.")
    settings = ChatSettings(system=system.content, max_new_tokens=24)
    with adapted(base, subject) as model:
        talk = Chat(model, base, make_encoder(base, subject.data), settings, [system])
        stream = talk.stream(long["prompt"])
        said = next(stream)
        stream.close()  # what Ctrl-C does
        assert talk.messages[2].content.startswith(said)
        assert len(talk.messages[2].content) < len(long["answer"])
        talk.reset()
        assert talk.messages == [system]
        pieces = list(talk.stream(long["prompt"]))
        list(talk.stream("Grüße 🦊"))
    assert len(pieces) > 1
    assert "".join(pieces) == long["answer"]
    assert [message.role for message in talk.messages] == ["system"] + ["user", "assistant"] * 2
    assert talk.messages[2].content == long["answer"]


def test_a_character_of_several_tokens_is_shown_whole(world, monkeypatch):
    from qtrain.evaluation import chat as module
    from qtrain.evaluation.score import make_encoder
    from qtrain.evaluation.subject import open_base

    subject = find_subject(str(world / "base"))
    base = open_base(subject, lambda _: None)
    text = "Fuchs 🦊!"
    ids = base.tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > len(text)  # the fox is one character of four tokens
    monkeypatch.setattr(module, "decode_steps", lambda *_, **__: ([(0, token)] for token in ids))
    talk = module.Chat(None, base, make_encoder(base, subject.data), module.ChatSettings(), [])
    assert [piece for piece in talk.stream("Tier?") if not piece.isascii()] == ["🦊"]
    assert talk.messages[-1].content == text
