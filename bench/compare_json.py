"""A comparison as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .compare import Comparison
from .results import Figure, Results, Row


def as_json(comparison: Comparison) -> dict[str, Any]:
    """JSON-ready."""

    def about(results: Results) -> dict[str, Any]:
        return {"path": str(results.path), "setting": dict(results.setting)} | dict(results.provenance)

    def case(row: Row) -> dict[str, Any]:
        return {
            "op": row.op, "variant": row.variant, "pass": row.phase, "dtype": row.dtype,
            "shape": dict(row.shape),
        }  # fmt: skip

    def side(figure: Figure) -> Mapping[str, float]:
        return {"n": figure.n, "p05": figure.p05, "p50": figure.p50, "p95": figure.p95}

    return {
        "kind": comparison.a.kind,
        "a": about(comparison.a),
        "b": about(comparison.b),
        "rows": [
            case(line.row)
            | {
                "figure": line.a.name,
                "unit": line.a.unit,
                "a": side(line.a),
                "b": side(line.b),
                "ratio": None
                if line.ratio is None
                else [line.ratio.low, line.ratio.estimate, line.ratio.high],
                "noise_floor": line.floor,
                "noise_measured": line.measured_floor,
                "verdict": line.verdict,
            }
            for line in comparison.lines
        ],
        "not_compared": [
            case(one.row) | {"a": one.a, "b": one.b, "broke": one.broke} for one in comparison.untimed
        ],
        "only_in_a": [case(row) | {"status": row.status} for row in comparison.only_a],
        "only_in_b": [case(row) | {"status": row.status} for row in comparison.only_b],
        "notes": comparison.notes,
        "regressions": len(comparison.regressions),
    }
