import pytest

from tests.qtrain.tiny import save_tiny_base, save_tiny_run, write_rows

WORDS = ["Berlin", "Paris", "Rome", "Oslo", "Kyiv", "Lima", "Bern", "Riga", "Baku", "Doha", "Male", "Suva"]


def conversation(number: int) -> dict:
    """Any answer that stops passes in the first half; in the second the reference is asked for."""
    word = WORDS[number % len(WORDS)]
    row = {"instruction": f"Say <b>{word}</b> {number} & stop.", "output": f"{word} <i>{number}</i>"}
    return row | ({"check": {"kind": "regex", "pattern": ".*"}} if number % 2 == 0 else {})


def pair(number: int) -> dict:
    word = WORDS[number % len(WORDS)]
    return {
        "prompt": f"Name town {number}.",
        "chosen": f"{word}.",
        "rejected": f"Not {word}, perhaps {number}.",
    }


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A base, an SFT run, a DPO run (both with random adapters) and their held-out files."""
    folder = tmp_path_factory.mktemp("world")
    rows = write_rows(folder / "rows.jsonl", map(conversation, range(14)))
    pairs = write_rows(folder / "pairs.jsonl", map(pair, range(10)))
    train = write_rows(folder / "train.jsonl", map(conversation, range(12, 40)))
    base = save_tiny_base(folder / "base", eos_scale=2.5)
    save_tiny_run(
        folder / "runs" / "sft",
        base,
        seed=1,
        data={"train": [str(train)], "eval": [str(rows)], "system": "Be brief."},
    )
    save_tiny_run(
        folder / "runs" / "dpo",
        base,
        seed=2,
        method="dpo",
        data={"train": [str(pairs)], "eval": [str(pairs)], "system": "Be brief."},
    )
    return folder
