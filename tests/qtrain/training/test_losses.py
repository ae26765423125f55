"""Preference losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from qtrain.recipe.schema import DpoSettings
from qtrain.training.losses import Preferences, preference_loss, reward_metrics


def _pairs(
    chosen: float, rejected: float, reference_chosen: float = 0.0, reference_rejected: float = 0.0
) -> Preferences:
    values = (chosen, rejected, 4.0, 2.0, reference_chosen, reference_rejected)
    return Preferences(*(torch.tensor([value], dtype=torch.float64) for value in values))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": "sigmoid"}, math.log(2)),
        ({"loss": "sigmoid", "label_smoothing": 0.2}, math.log(2)),
        ({"loss": "hinge"}, 1.0),
        ({"loss": "ipo", "beta": 0.5}, 1.0),  # 1 / (4 beta^2)
    ],
)
def test_where_policy_is_reference(settings: dict[str, object], expected: float) -> None:
    loss = preference_loss(_pairs(-3.0, -5.0, -3.0, -5.0), DpoSettings.model_validate(settings))
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_sigmoid_by_hand() -> None:
    # h = 0.5 * ((-2 + 3) - (-7 + 5)) = 1.5
    loss = preference_loss(_pairs(-2, -7, -3, -5), DpoSettings(beta=0.5))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-12)


def test_label_smoothing_by_hand() -> None:
    loss = preference_loss(_pairs(-2, -7, -3, -5), DpoSettings(beta=0.5, label_smoothing=0.1))
    expected = 0.9 * math.log(1 + math.exp(-1.5)) + 0.1 * math.log(1 + math.exp(1.5))
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_hinge_by_hand() -> None:
    assert preference_loss(
        _pairs(-2, -2.5, -3, -3), DpoSettings(loss="hinge", beta=0.5)
    ).item() == pytest.approx(0.75)
    assert preference_loss(_pairs(0, -9), DpoSettings(loss="hinge", beta=0.5)).item() == 0


def test_ipo_is_over_mean_log_probs() -> None:
    # h = (-2 + 3) / 4 - (-7 + 5) / 2 = 1.25; target 1 / (2 * 0.5) = 1
    assert preference_loss(_pairs(-2, -7, -3, -5), DpoSettings(loss="ipo", beta=0.5)).item() == pytest.approx(
        0.0625
    )


def test_rewards() -> None:
    found = reward_metrics(_pairs(-2, -7, -3, -5), beta=0.5)
    assert found["rewards/chosen"].item() == pytest.approx(0.5)
    assert found["rewards/rejected"].item() == pytest.approx(-1.0)
    assert found["rewards/margins"].item() == pytest.approx(1.5)
    assert found["rewards/accuracies"].item() == 1


def test_gradient_pushes_chosen_up_and_rejected_down() -> None:
    for name in ("sigmoid", "hinge", "ipo"):
        chosen = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        rejected = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        ones, zeros = torch.ones(1), torch.zeros(1)
        pairs = Preferences(chosen, rejected, ones, ones, zeros, zeros)
        preference_loss(pairs, DpoSettings(loss=name)).sum().backward()  # type: ignore[arg-type]
        assert chosen.grad is not None
        assert rejected.grad is not None
        assert chosen.grad < 0 < rejected.grad
