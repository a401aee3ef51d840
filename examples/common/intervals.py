"""Means over seeds with their 95 % confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

# Student's t, two-sided 95 %, of 1, 2, ... degrees of freedom; of more than these the last is a little too wide.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % confidence interval over seeds; 0 for a single one."""
    if len(values) == 1:
        return values[0], 0.0
    quantile = T_95[min(len(values) - 1, len(T_95)) - 1]
    return mean(values), quantile * stdev(values) / len(values) ** 0.5


def percent(values: Sequence[float]) -> str:
    """'61.3±2.0' of shares, '61.3' of a single one."""
    centre, half = interval(values)
    return f"{100 * centre:.1f}" + (f"±{100 * half:.1f}" if len(values) > 1 else "")
