"""What is learnt, and behind which ids: for templates of the well-known kinds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtrain.data.rows import Conversation, Message, Source
from qtrain.data.template import ChatEncoder, CutOff
from qtrain.errors import DataError, UserError

FROM_FIXTURES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.text(min_size=1, max_size=40).filter(str.strip)
PLAIN_TEXT = TEXT.map(str.strip).filter(lambda text: "</think>" not in text)
STOPS = {"chatml": "<|im_end|>", "qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>",
         "mistral": "</s>", "no stop": "<|im_end|>"}  # fmt: skip


def encoder_for(tokenizer, **options):
    return ChatEncoder(tokenizer, **{"max_length": 10_000, **options})


def learnt(tokenizer, example) -> str:
    ids = [token for token, wanted in zip(example.input_ids, example.supervised, strict=True) if wanted]
    return tokenizer.decode(ids, skip_special_tokens=False)


def learnt_spans(tokenizer, example) -> list[str]:
    spans: list[list[int]] = []
    before = False
    for token, wanted in zip(example.input_ids, example.supervised, strict=True):
        if wanted and not before:
            spans.append([])
        if wanted:
            spans[-1].append(token)
        before = wanted
    return [tokenizer.decode(span, skip_special_tokens=False) for span in spans]


@pytest.mark.parametrize("name", list(STOPS))
@FROM_FIXTURES
@given(user=PLAIN_TEXT, answer=PLAIN_TEXT)
def test_any_answer_is_learnt_whole_with_its_stop_token(make_tokenizer, talk, name, user, answer):
    tokenizer = make_tokenizer(name)
    example = encoder_for(tokenizer).encode(talk(("user", user), ("assistant", answer)))
    head = "<think>\n\n</think>\n\n" if name == "qwen3" else " " if name == "mistral" else ""
    assert learnt(tokenizer, example) == head + answer + STOPS[name]
    assert example.supervised[-1]
    assert example.cut == 0


@pytest.mark.parametrize("name", list(STOPS))
@FROM_FIXTURES
@given(turns=st.lists(st.tuples(PLAIN_TEXT, PLAIN_TEXT), min_size=1, max_size=4))
def test_every_answer_stands_behind_the_ids_that_serving_shows(make_tokenizer, name, turns):
    tokenizer = make_tokenizer(name)
    encoder = encoder_for(tokenizer)
    messages = tuple(
        Message(role, text) for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)
    )
    shown: list[list[int]] = []
    for example in encoder.encode_all(Conversation(messages, Source("a", 1))):
        mask = example.supervised
        starts = [i for i in range(len(mask)) if mask[i] and not mask[i - 1]]
        shown += [example.input_ids[:start] for start in starts]
    wanted = [encoder.encode_prompt(messages[:i]) for i in range(1, len(messages), 2)]
    assert shown == wanted
    for prefix, i in zip(wanted, range(1, len(messages), 2), strict=True):
        text = encoder.render(messages[:i])
        assert prefix == tokenizer(text, add_special_tokens=False).input_ids


def test_all_turns_of_an_unchanging_template_are_one_example(make_tokenizer, talk):
    tokenizer = make_tokenizer("llama3")
    example = encoder_for(tokenizer).encode(
        talk(("system", "be"), ("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    )
    assert learnt_spans(tokenizer, example) == ["one<|eot_id|>", "two<|eot_id|>"]


def test_a_template_that_rewrites_history_gives_one_example_for_each_answer(make_tokenizer, talk):
    tokenizer = make_tokenizer("qwen3")
    row = talk(("user", "a"), ("assistant", "one", "first"), ("user", "b"), ("assistant", "two", "second"))
    first, second = encoder_for(tokenizer).encode_all(row)
    assert learnt(tokenizer, first) == "<think>\nfirst\n</think>\n\none<|im_end|>"
    assert learnt(tokenizer, second) == "<think>\nsecond\n</think>\n\ntwo<|im_end|>"
    history = tokenizer.decode(second.input_ids)
    assert "one<|im_end|>" in history
    assert "first" not in history
    with pytest.raises(DataError, match=r"talk.jsonl:7: .*once they are history"):
        encoder_for(tokenizer).encode(row)


def test_answers_that_become_other_tokens_as_history_give_an_example_each(make_tokenizer, talk):
    tokenizer = make_tokenizer("llama3", gpt2=True)
    encoder = encoder_for(tokenizer)
    row = talk(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    first, second = encoder.encode_all(row)
    assert (learnt(tokenizer, first), learnt(tokenizer, second)) == ("one<|eot_id|>", "two<|eot_id|>")
    shown = tokenizer(encoder.render(row.messages[:3]), add_special_tokens=False).input_ids
    assert second.input_ids[: len(shown)] == shown
    assert first.input_ids != second.input_ids[: len(first.input_ids)]


def test_the_empty_thought_that_a_template_adds_is_noted(make_tokenizer):
    assert any(
        "before an answer without reasoning" in note for note in encoder_for(make_tokenizer("qwen3")).notes
    )
    assert encoder_for(make_tokenizer("chatml")).notes == []


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [("think", "<think>\nhm\n</think>\n\nyes"), ("plain", "hm\n\nyes"), ("drop", "yes")],
)
@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_reasoning_stands_before_the_answer_as_chosen(make_tokenizer, talk, name, mode, wanted):
    tokenizer = make_tokenizer(name)
    example = encoder_for(tokenizer, reasoning=mode).encode(talk(("user", "q"), ("assistant", "yes", "hm")))
    assert learnt(tokenizer, example) == wanted + STOPS[name]


def test_a_template_that_loses_the_reasoning_is_an_error(make_tokenizer, talk):
    tokenizer = make_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content.split('</think>')[-1]")
    row = talk(("user", "q"), ("assistant", "yes", "hm"))
    with pytest.raises(DataError, match=r"talk.jsonl:7: .*leaves the reasoning out"):
        encoder_for(tokenizer).encode(row)
    assert learnt(tokenizer, encoder_for(tokenizer, reasoning="plain").encode(row)) == "hm\n\nyes<|im_end|>"


def test_the_eos_is_learnt_where_it_is_also_the_pad_token(make_tokenizer, talk):
    tokenizer = make_tokenizer("chatml", pad="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    example = encoder_for(tokenizer).encode(talk(("user", "q <|im_end|> q"), ("assistant", "a")))
    stops = [
        m for t, m in zip(example.input_ids, example.supervised, strict=True) if t == tokenizer.eos_token_id
    ]
    assert stops == [False, False, True]


def test_an_answer_that_repeats_the_prompt_does_not_shift_the_mask(make_tokenizer, talk):
    tokenizer = make_tokenizer("chatml")
    text = "<|im_start|>assistant\nhello"
    example = encoder_for(tokenizer).encode(talk(("user", text), ("assistant", text)))
    assert learnt(tokenizer, example) == text + "<|im_end|>"


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_bos_stands_once_where_the_template_writes_it(make_tokenizer, talk, name, adds_bos):
    tokenizer = make_tokenizer(name, adds_bos=adds_bos)
    example = encoder_for(tokenizer).encode(
        talk(("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "b"))
    )
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [None, "chatml"])
def test_bos_stands_once_where_the_tokenizer_adds_it(make_tokenizer, talk, template):
    tokenizer = make_tokenizer("chatml", adds_bos=True)
    encoder = encoder_for(tokenizer, chat_template=template)
    row = talk(("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "b"))
    example = encoder.encode(row)
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoder.encode_prompt(row.messages[:1]) == example.input_ids[: example.supervised.index(True)]
    assert encoder.encode_prompt(row.messages[:1])[0] == tokenizer.bos_token_id


def test_no_bos_where_neither_writes_one(make_tokenizer, talk):
    tokenizer = make_tokenizer("chatml", bos="<s>")
    example = encoder_for(tokenizer).encode(talk(("user", "q"), ("assistant", "a")))
    assert tokenizer.bos_token_id not in example.input_ids


def test_an_eos_is_added_and_noted_where_the_template_writes_no_stop_token(make_tokenizer, talk):
    tokenizer = make_tokenizer("no stop")
    encoder = encoder_for(tokenizer)
    assert any("put after every answer" in note for note in encoder.notes)
    assert learnt(tokenizer, encoder.encode(talk(("user", "q"), ("assistant", "a")))) == "a<|im_end|>"


def test_a_template_and_tokenizer_without_any_stop_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer("no stop")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS"):
        encoder_for(tokenizer)


def test_a_default_system_message_is_context_and_gives_way(make_tokenizer, talk):
    tokenizer = make_tokenizer("qwen2.5")
    row = talk(("user", "q"), ("assistant", "a"))
    example = encoder_for(tokenizer).encode(row)
    assert tokenizer.decode(example.input_ids).startswith("<|im_start|>system\nYou are a helper.")
    assert learnt(tokenizer, example) == "a<|im_end|>"
    ours = tokenizer.decode(encoder_for(tokenizer, system="Be brief.").encode(row).input_ids)
    assert "Be brief." in ours
    assert "You are a helper." not in ours


def test_no_template_is_an_error_that_names_the_way_out(make_tokenizer, talk, tmp_path: Path):
    tokenizer = make_tokenizer(None)
    with pytest.raises(UserError, match=r"no chat template: for a run, set data.chat_template to chatml"):
        encoder_for(tokenizer)
    row = talk(("user", "q"), ("assistant", "a"))
    assert learnt(tokenizer, encoder_for(tokenizer, chat_template="chatml").encode(row)) == "a<|im_end|>"
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    by_file = encoder_for(tokenizer, chat_template=str(tmp_path / "t.jinja"))
    assert learnt(tokenizer, by_file.encode(row)) == "a<|im_end|>"
    with pytest.raises(UserError, match="neither chatml nor a Jinja file"):
        encoder_for(tokenizer, chat_template="chatmll")


@pytest.mark.parametrize(
    "broken",
    [
        "{% for m in messages %}",
        "{{ raise_exception('never') }}",
        "{{ messages[0].content }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_an_unusable_template_is_one_line(make_tokenizer, tmp_path: Path, broken):
    (tmp_path / "t.jinja").write_text(broken)
    with pytest.raises(UserError) as caught:
        encoder_for(make_tokenizer(None), chat_template=str(tmp_path / "t.jinja"))
    assert "\n" not in str(caught.value)


def test_a_prompt_that_opens_what_the_answer_lacks_is_an_error(make_tokenizer):
    with pytest.raises(UserError, match="prompt for an answer goes on with '<think>"):
        encoder_for(make_tokenizer("opens thought"))


def test_a_refused_or_unwritten_message_names_the_row(make_tokenizer, talk):
    row = talk(("system", "be brief"), ("user", "q"), ("assistant", "a"))
    with pytest.raises(
        DataError, match=r"talk.jsonl:7: the chat template refuses it: Only user and assistant"
    ):
        encoder_for(make_tokenizer("mistral")).encode(row)
    with pytest.raises(DataError, match=r"talk.jsonl:7: .*does not write the system message"):
        encoder_for(make_tokenizer("drops system")).encode(row)


def test_a_long_row_is_cut_right_and_counted(make_tokenizer, talk):
    tokenizer = make_tokenizer("chatml")
    row = talk(("user", "q"), ("assistant", "x y z " * 20))
    whole = encoder_for(tokenizer).encode(row)
    cut = encoder_for(tokenizer, max_length=30).encode(row)
    assert cut.input_ids == whole.input_ids[:30]
    assert cut.supervised == whole.supervised[:30]
    assert cut.cut == len(whole.input_ids) - 30


def test_a_row_of_which_nothing_learnt_is_left_is_an_error(make_tokenizer, talk, preference):
    encoder = encoder_for(make_tokenizer("chatml"), max_length=30)
    with pytest.raises(CutOff, match=r"talk.jsonl:7: the prompt takes \d+ tokens.*max_length: 30"):
        encoder.encode(talk(("user", "x y z " * 20), ("assistant", "a")))
    with pytest.raises(CutOff, match=r"pairs.jsonl:5: the prompt takes"):
        encoder.encode_pair(preference("x y z " * 20, "a", "b"))


def test_a_conversation_without_an_answer_is_an_error(make_tokenizer, talk):
    with pytest.raises(DataError, match=r"talk.jsonl:7: has no assistant turn"):
        encoder_for(make_tokenizer()).encode(talk(("user", "q")))


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen2.5"])
@FROM_FIXTURES
@given(prompt=PLAIN_TEXT, chosen=PLAIN_TEXT, rejected=PLAIN_TEXT)
def test_a_pair_is_the_prompt_and_two_completions_with_stop_tokens(
    make_tokenizer, preference, name, prompt, chosen, rejected
):
    tokenizer = make_tokenizer(name)
    encoder = encoder_for(tokenizer)
    row = preference(prompt, chosen, rejected)
    if chosen == rejected:
        with pytest.raises(DataError, match="are the same"):
            encoder.encode_pair(row)
        return
    pair = encoder.encode_pair(row)
    assert pair.prompt_ids == encoder.encode_prompt(row.prompt)
    assert tokenizer.decode(pair.chosen_ids) == chosen + STOPS[name]
    assert tokenizer.decode(pair.rejected_ids) == rejected + STOPS[name]


def test_completions_that_become_the_same_are_an_error(make_tokenizer, preference):
    tokenizer = make_tokenizer("chatml")
    with pytest.raises(DataError, match=r"the same with data.reasoning: drop"):
        encoder_for(tokenizer, reasoning="drop").encode_pair(preference("q", "a", "a", "hm"))
    with pytest.raises(DataError, match=r"the same within data.max_length: 20"):
        encoder_for(tokenizer, max_length=20).encode_pair(preference("q", "x" * 90 + "1", "x" * 90 + "2"))
