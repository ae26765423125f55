"""The gate lets a right first step through and names what is wrong with any other."""

from __future__ import annotations

from typing import Any

import pytest

from qtrain.bench.gate import check

SFT = {"loss": 21.7665, "grad_norm": 19.6}
DPO = {"loss": 0.693147, "grad_norm": 89.5, "logps/chosen": -8704.56}


def result(*logs: dict[str, float], dropout: float = 0.0) -> dict[str, Any]:
    return {"logs": list(logs), "settings": {"dropout": dropout}}


def test_what_bf16_and_dropout_do_passes() -> None:
    assert (
        check(
            "sft",
            result({"loss": 21.7662, "grad_norm": 20.1}, {"loss": 21.5, "grad_norm": 20.2}, dropout=0.05),
            SFT,
        )
        is None
    )
    first = {"loss": 0.69315, "grad_norm": 89.45, "logps/chosen": -8704.24}
    assert check("dpo", result(first, {"loss": 0.1, "grad_norm": 17.0}), DPO) is None


def test_dpo_gradient_is_not_compared_under_dropout() -> None:
    first = {"loss": 0.69315, "grad_norm": 121.0, "logps/chosen": -8704.24}
    assert check("dpo", result(first, dropout=0.05), DPO) is None
    assert "grad_norm is 121.000" in str(check("dpo", result(first), DPO))


@pytest.mark.parametrize(
    ("task", "logs", "reason"),
    [
        ("sft", [], "nothing was logged"),
        ("sft", [{"loss": 21.78, "grad_norm": 19.6}], "first loss is 21.78"),
        ("sft", [{"loss": float("nan"), "grad_norm": 19.6}], "first loss is nan"),
        ("sft", [{"loss": 21.7665, "grad_norm": 9.8}], "grad_norm is 9.800"),
        ("sft", [{"loss": 21.7665, "grad_norm": float("nan")}], "grad_norm is nan"),
        ("sft", [{"loss": 21.7665, "grad_norm": 19.6}] * 2, "does not learn"),
        ("dpo", [{"loss": 0.70, "grad_norm": 89.5, "logps/chosen": -8704.5}], "first loss is 0.70"),
        ("dpo", [{"loss": 0.69315, "grad_norm": 89.5, "logps/chosen": -8600.0}], "logps/chosen is -8600"),
    ],
)
def test_wrong_first_steps_are_named(task: str, logs: list[dict[str, float]], reason: str) -> None:
    assert reason in str(check(task, result(*logs), SFT if task == "sft" else DPO))
