"""Two pictures: what the model retrieves for held-out pairs, and the training curves.

Colours are Okabe and Ito's, told apart by the colour-blind; what a colour says is written as well.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import contrastile as ct
from contrastile.demo.data import CREDIT, EmojiPairs, drawings, render
from contrastile.demo.report import by_method
from contrastile.demo.train import Dataset, Result, embed
from contrastile.demo.models import TwoTowers

BLACK, GREY, GREEN = "#000000", "#666666", "#009E73"
METHOD_COLOURS = ("#0072B2", "#D55E00", "#000000")
QUERIES = 8
RETRIEVED = 5
PIXELS = 72  # OpenMoji's own grid


def draw_curves(path: Path, results: Sequence[Result], held_out: int) -> None:
    """InfoNCE of equally many training and held-out pairs, and held-out recall, against epochs."""
    panels = (
        (1, "InfoNCE of a fixed sample of training pairs"),
        (2, "InfoNCE of the held-out pairs"),
        (3, "held-out recall@10, mean of both directions"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4.2))
    for axis, (column, title) in zip(axes, panels, strict=True):
        for colour, (method, runs) in zip(METHOD_COLOURS, by_method(results).items(), strict=False):
            curves = np.array([run.curve for run in runs])  # (seeds, checks, 4)
            epochs, values = curves[0, :, 0], curves[:, :, column]
            axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
            axis.plot(epochs, values.mean(0), color=colour, linewidth=2, marker="os^"[METHOD_COLOURS.index(colour)],
                      markersize=4, label=method.name)
        axis.set_title(f"{title}", fontsize=10, loc="left")
        axis.set_xlabel("epochs")
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].axhline(10 / held_out, color=GREY, linewidth=1, linestyle=":")
    axes[-1].annotate("chance", (0, 10 / held_out), xytext=(2, 3), textcoords="offset points", color=GREY, fontsize=8)
    axes[-1].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    seeds = len({run.seed for run in results})
    figure.suptitle(f"Both sets have {held_out} pairs, so their losses compare. Line: mean of {seeds} seed(s); band: their range.",
                    fontsize=9, color=GREY, x=0.01, ha="left", y=0.03, va="bottom")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
