import pytest
import torch

from qtrain.evaluation.generate import decode_steps, generate, greedy, sampler
from tests.qtrain.tiny import tiny_qwen2, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_qwen2(len(tokenizer))


def prompts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def without_cache(model, prompt, stops, count):
    """The definition of greedy decoding: the whole sequence again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in stops:
                break
    return ids[len(prompt) :]


def common_stop(model, rows):
    """A token that some answers hold early and others late or never."""
    made = [without_cache(model, row, (), 20) for row in rows]
    tokens = {token for ids in made for token in ids}
    places = {t: [ids.index(t) for ids in made if t in ids] for t in tokens}
    return next(t for t in sorted(tokens) if len(places[t]) < len(made) and len(set(places[t])) > 1)


def test_batched_equals_one_by_one(model, tokenizer):
    rows = prompts(11)
    stop = common_stop(model, rows)
    expected = [without_cache(model, row, {stop}, 20) for row in rows]
    done = []
    answers = generate(model, tokenizer, rows, {stop}, max_new_tokens=20, batch_size=4, advance=done.append)
    assert [answer.tokens for answer in answers] == [len(ids) for ids in expected]
    assert [answer.stopped for answer in answers] == [ids[-1] == stop for ids in expected]
    assert {answer.stopped for answer in answers} == {True, False}
    kept = [[token for token in ids if token != stop] for ids in expected]
    assert [answer.text for answer in answers] == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in kept
    ]
    assert sum(done) == len(rows)


def test_long_rows_are_decoded_in_smaller_batches(model, tokenizer, monkeypatch):
    from qtrain.evaluation import generate as module

    rows = prompts(9, seed=2)
    sizes = []

    def recorded(model, batch, *words, **named):
        sizes.append((len(batch), max(map(len, batch)) + named["max_new_tokens"]))
        return decode_steps(model, batch, *words, **named)

    monkeypatch.setattr(module, "decode_steps", recorded)
    monkeypatch.setattr(module, "BATCH_TOKENS", 60)
    answers = generate(model, tokenizer, rows, (), max_new_tokens=5, batch_size=4)
    assert [answer.tokens for answer in answers] == [5] * 9
    assert sum(size for size, _ in sizes) == 9
    assert all(size == 1 or size * length <= 60 for size, length in sizes)
    assert max(size for size, _ in sizes) > 1


def test_a_stopped_row_leaves_the_batch(model):
    rows = prompts(6, seed=1)
    stop = common_stop(model, rows)
    lengths = [len(without_cache(model, row, {stop}, 20)) for row in rows]
    steps = list(decode_steps(model, rows, {stop}, greedy, max_new_tokens=20))
    assert [len(step) for step in steps] == [
        sum(length > number for length in lengths) for number in range(max(lengths))
    ]


def test_sampling_is_seeded_and_follows_the_distribution():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]])).expand(4000, 3)
    drawn = sampler(1.0, seed=3)(logits)
    assert torch.equal(drawn, sampler(1.0, seed=3)(logits))
    share = torch.bincount(drawn, minlength=3) / 4000
    # four standard errors of a share of 0.7 over 4000 draws
    assert torch.allclose(share, torch.tensor([0.7, 0.2, 0.1]), atol=0.03)
    assert sampler(0.0, seed=3)(logits).unique().tolist() == [0]


def test_empty_prompt_is_refused(model):
    with pytest.raises(ValueError, match="empty prompt"):
        list(decode_steps(model, [[1, 2], []], (), greedy, max_new_tokens=1))
