"""The gate's bounds, and what counts as below them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from qtrain.export.agreement import Agreement
from qtrain.export.errors import ExportError, GateFailed
from qtrain.export.verify import Bounds, Stops, Verdict, check_gate, parse_gate

GOOD = Agreement(
    kl=0.1,
    kl_max=2.0,
    top1=0.85,
    max_logit_difference=3.0,
    perplexity_p=10.0,
    perplexity_q=11.0,
    positions=100,
)


def test_bounds_are_changed_one_by_one() -> None:
    assert parse_gate(None) == Bounds()
    assert parse_gate("off") is None
    assert parse_gate("kl=0.05, top1=.9") == Bounds(kl=0.05, top1=0.9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl", "kl is '', must be a number"),
        ("kl=nan", "kl is 'nan', must be a number"),
        ("kl=inf", "kl is 'inf', must be a number"),
        ("ppl=-1", "ppl is '-1', must be a number"),
        ("perplexity=2", "no bound 'perplexity', there are kl, ppl, top1, stops, or off"),
        ("stop=1", "did you mean stops?"),
    ],
)
def test_bounds_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ExportError) as caught:
        parse_gate(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "stops", "said"),
    [
        ({}, None, []),
        ({}, Stops(10, 10, 9), []),
        ({}, Stops(10, 0, 0), []),
        ({"kl": 0.3}, None, ["KL 0.3 is above 0.25"]),
        ({"perplexity_q": 12.6}, None, ["perplexity is 1.26 times the reference's, above 1.25"]),
        ({"top1": 0.4}, None, ["top-1 agreement 0.4 is below 0.5"]),
        (
            {},
            Stops(10, 10, 8),
            ["answers end at 8 of 10 places where the reference's end at 10, below 0.9 of them"],
        ),
        ({"kl": math.nan}, None, ["KL nan is above 0.25"]),  # no number keeps to no bound
        (
            {"perplexity_q": math.inf, "perplexity_p": math.inf},
            None,
            ["perplexity is nan times the reference's, above 1.25"],
        ),
    ],
)
def test_what_is_below(changes: dict[str, float], stops: Stops | None, said: list[str]) -> None:
    verdict = Verdict(replace(GOOD, **changes), stops, Bounds(top1=0.5))
    assert verdict.failures == said
    assert verdict.as_dict()["passed"] is not bool(said)
    assert Verdict(verdict.agreement, stops, None).failures == []
    if said:
        with pytest.raises(GateFailed, match="x is below the gate"):
            check_gate(verdict, Path("x"))
    else:
        check_gate(verdict, Path("x"))
