"""Two pictures: what the model retrieves for held-out pairs, and the training curves.

Colours are Okabe and Ito's, told apart by the colour-blind; what a colour says is written as well.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import contrastile as ct
from contrastile.demo.data import CREDIT, EmojiPairs, render
from contrastile.demo.models import TwoTowers
from contrastile.demo.report import by_method
from contrastile.demo.train import Dataset, Point, Result, embed

matplotlib.use("Agg")

BLACK, GREY, GREEN = "#000000", "#666666", "#009E73"
LINE_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#000000", "^"))
PIXELS = 72  # the grid that OpenMoji draws on
QUERIES = 8
IMAGES_SHOWN, CAPTIONS_SHOWN = 5, 3
MARGINS = {"left": 0.02, "right": 0.91, "top": 0.94, "bottom": 0.07, "hspace": 0.12, "wspace": 0.12}


def draw_curves(path: Path, results: Sequence[Result], held_out: int) -> None:
    """InfoNCE of equally many training and held-out pairs, and held-out recall, against epochs."""
    panels: dict[str, Callable[[Point], float]] = {
        f"InfoNCE among {held_out} training pairs": lambda point: point.train_sample.info_nce,
        f"InfoNCE among the {held_out} held-out pairs, best temperature": lambda point: point.held_out.info_nce_refit,
        "held-out recall@10 in %, mean of both directions": lambda point: 100 * point.held_out.recall(10),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 4.2))
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for (colour, marker), (method, runs) in zip(LINE_STYLES, by_method(results).items(), strict=False):
            epochs = [point.epochs for point in runs[0].curve]
            values = np.array([[value(point) for point in run.curve] for run in runs])  # (seeds, checks)
            axis.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
            axis.plot(epochs, values.mean(0), color=colour, marker=marker, markersize=4, label=method.name)
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("epochs")
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].axhline(1000 / held_out, color=GREY, linestyle=":")
    across = axes[2].get_yaxis_transform()
    axes[2].text(0.99, 1000 / held_out, "chance", color=GREY, fontsize=8, ha="right", va="bottom", transform=across)
    axes[2].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=9)
    seeds = len({run.seed for run in results})
    note = f"Mean and range of {seeds} seeds." if seeds > 1 else "One seed."
    figure.text(0.01, 0.015, note, fontsize=8, color=GREY)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


@dataclass(frozen=True)
class Retrieval:
    """Candidates for each query, best first. Queries and candidates are positions in EmojiPairs."""

    queries: list[int]
    best: list[list[int]]
    ranks: list[int]  # of the right candidate, from 1


def draw_examples(path: Path, model: TwoTowers, dataset: Dataset, pairs: EmojiPairs, trained_with: str) -> None:
    """Queries evenly spaced over the held-out families, and what is retrieved among all held-out pairs."""
    images, captions = embed(model, dataset, dataset.held_out)
    first_of_family: dict[str, int] = {}
    for row, position in enumerate(dataset.held_out.tolist()):
        first_of_family.setdefault(pairs.families[position], row)
    rows = list(first_of_family.values())
    chosen = torch.tensor([rows[len(rows) * i // QUERIES] for i in range(QUERIES)])

    figure = plt.figure(figsize=(14, 0.95 * QUERIES + 1.3))
    panels: Any = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    left, right = panels
    _draw_image_grid(left, _retrieve(captions, images, chosen, dataset.held_out), pairs)
    _draw_caption_grid(right, _retrieve(images, captions, chosen, dataset.held_out), pairs)
    about = (
        f"Encoders trained with the {trained_with}. Candidates: all {len(captions)} pairs of the {len(rows)} emoji "
        "families that were not trained on. Queries: evenly spaced over these families."
    )
    figure.text(0.01, 0.012, f"{about}\n{CREDIT}", fontsize=8, color=GREY, linespacing=1.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _retrieve(x: Tensor, y: Tensor, chosen: Tensor, positions: Tensor) -> Retrieval:
    ranks = ct.retrieval_ranks(x[chosen], y, chosen) + 1
    best = (x[chosen] @ y.T).topk(IMAGES_SHOWN).indices
    return Retrieval(positions[chosen].tolist(), positions[best].tolist(), ranks.tolist())


def _draw_image_grid(figure: Any, found: Retrieval, pairs: EmojiPairs) -> None:
    shape = (len(found.queries), IMAGES_SHOWN + 2)
    axes = figure.subplots(*shape, gridspec_kw={"width_ratios": [2.6, *[1] * (IMAGES_SHOWN + 1)], **MARGINS})
    for line, query, best, rank in zip(axes, found.queries, found.best, found.ranks, strict=True):
        line[0].axis("off")
        line[0].text(0.95, 0.5, textwrap.fill(pairs.captions[query], 26), ha="right", va="center", fontsize=9)
        for axis, shown in zip(line[1:], [*best, query], strict=True):
            _show(axis, pairs, shown, framed=shown == query)
        right = line[-1]
        right.text(1.1, 0.5, f"rank {rank}", color=GREEN, fontsize=9, va="center", transform=right.transAxes)
    _head(figure, axes[0, 1], f"{IMAGES_SHOWN} images retrieved first for the caption")
    _head(figure, axes[0, -1], "the right one", color=GREEN)


def _draw_caption_grid(figure: Any, found: Retrieval, pairs: EmojiPairs) -> None:
    axes = figure.subplots(len(found.queries), 2, gridspec_kw={"width_ratios": [1, 6], **MARGINS})
    for line, query, best, rank in zip(axes, found.queries, found.best, found.ranks, strict=True):
        _show(line[0], pairs, query, framed=False)
        line[1].axis("off")
        listed = list(enumerate(best[:CAPTIONS_SHOWN], start=1))
        if rank > CAPTIONS_SHOWN:
            listed.append((rank, query))
        for place, (number, shown) in enumerate(listed):
            caption = textwrap.shorten(pairs.captions[shown], 56, placeholder=" ...")
            style = {"color": GREEN, "fontweight": "bold"} if shown == query else {"color": BLACK}
            line[1].text(0.07, 0.9 - 0.27 * place, str(number), ha="right", va="center", fontsize=9, **style)
            line[1].text(0.09, 0.9 - 0.27 * place, caption, va="center", fontsize=9, **style)
    _head(figure, axes[0, 1], "captions retrieved for the image by rank, the right one in green")


def _head(figure: Any, axis: Any, text: str, color: str = BLACK) -> None:
    figure.text(axis.get_position().x0, 0.955, text, fontsize=10, color=color)


def _show(axis: Any, pairs: EmojiPairs, position: int, *, framed: bool) -> None:
    axis.imshow(np.asarray(render(pairs.drawings[position], PIXELS)))
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(framed)
        spine.set(color=GREEN, linewidth=2.5)
