"""examples/gradient_bias: it finds the bias of InfoNCE, and none in weights by the exact normaliser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.gradient_bias.__main__ import estimators, measure
from examples.gradient_bias.figure import draw


def test_exact_normalizers_are_unbiased_and_a_memory_is_less_biased_than_info_nce():
    rows = {row["estimator"]: row for row in measure(0.5, 0.1, (8,), samples=256, epochs=10)}
    assert list(rows) == list(estimators(256, 10.0, lambda: None))
    # Without bias, off by more than 2.5 standard errors in one of 10^6 such runs; the run is seeded.
    assert rows["gamma, exact"]["bias"] < 2.5 * rows["gamma, exact"]["chance"]
    assert rows["gamma, mean"]["bias"] < 0.5 * rows["InfoNCE"]["bias"]
    assert rows["InfoNCE"]["bias"] > 5 * rows["InfoNCE"]["chance"]
    assert rows["gamma, sampled"]["spread"] > rows["gamma, mean"]["spread"]


def test_the_committed_results_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    results = Path(__file__).parents[1] / "examples" / "results" / "gradient_bias.json"
    draw(json.loads(results.read_text())["rows"], tmp_path / "folder" / "bias.png")
    assert (tmp_path / "folder" / "bias.png").read_bytes().startswith(b"\x89PNG")
