"""The pictures of --figures: what is retrieved, both modalities in a plane, recall over the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from contrastile.bench.plot import COLOURS, MARKERS
from contrastile.demo.pictures import draw_examples
from contrastile.demo.train import embed
from torch import Tensor

from examples.common.intervals import interval
from examples.two_tower.corpus import Corpus
from examples.two_tower.objectives import CONTRASTS
from examples.two_tower.report import by_kind
from examples.two_tower.runs import model_path
from examples.two_tower.towers import HeadedTowers
from examples.two_tower.train import INIT_SCALE, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGE_COLOUR, TEXT_COLOUR = COLOURS[2], COLOURS[1]
REACH = 1.35  # of a panel, from the middle of the unit rows
RECALL = "recall@10 among held-out pairs, %, both directions"


def draw(folder: Path, rows: Sequence[dict[str, Any]], data: Corpus, work: Path) -> list[Path]:
    """Pictures of the first seeds' towers that are in `work`, at the batch that most rows have: of retrieval by the
    last run, of the geometry of all; and one of all batches, where there are several.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    runs = [Run(*kind, seed=0) for kind in by_kind(rows)]
    batches = Counter(run.batch for run in runs)
    alike = [run for run in runs if run.batch == batches.most_common(1)[0][0] and model_path(work, run).exists()]
    drawn = []
    if alike:
        drawn.append(folder / "two_tower_retrieved.png")
        last = alike[-1]
        draw_examples(drawn[-1], towers_of(work, last), data.dataset, data.pairs, title(last))
        drawn.append(folder / "two_tower_geometry.png")
        draw_geometry(drawn[-1], alike, data, work)
    if len(batches) > 1:
        drawn.append(folder / "two_tower_batches.png")
        draw_batches(drawn[-1], rows)
    return drawn


def draw_geometry(picture: Path, runs: Sequence[Run], data: Corpus, work: Path) -> None:
    """A panel a run: the first two principal components of both modalities together, pairs joined by a line.

    One pair of each held-out family is drawn. All panels have one scale.
    """
    from matplotlib import pyplot

    held_out = data.dataset.held_out
    shown = torch.tensor(list({family: row for row, family in enumerate(data.families[held_out].tolist())}.values()))
    structures = list(dict.fromkeys(run.structure for run in runs))
    contrasts = list(dict.fromkeys(run.contrast for run in runs))
    shape = len(contrasts), len(structures)
    figure, axes = pyplot.subplots(
        *shape,
        figsize=(2.6 * shape[1], 2.9 * shape[0] + 0.4),
        squeeze=False,
        layout="constrained",
        sharex=True,
        sharey=True,
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for run in runs:
        axis = axes[contrasts.index(run.contrast), structures.index(run.structure)]
        v, t = (side[shown] for side in embed(towers_of(work, run), data.dataset, held_out))
        _modalities(axis, v, t)
        axis.set_title(f"{run.contrast}, {run.structure}\ngap {float((v.mean(0) - t.mean(0)).norm()):.2f}", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(picture, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def principal_plane(rows: Tensor) -> tuple[Tensor, float]:
    """The two directions of most variance, (D, 2), and the share of the variance that they have."""
    _, lengths, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return directions[:2].T, float(lengths[:2].square().sum() / lengths.square().sum())


def _modalities(axis: Axes, v: Tensor, t: Tensor) -> None:
    plane, share = principal_plane(torch.cat([v, t]))
    middle = torch.cat([v, t]).mean(0)
    images, captions = ((side - middle) @ plane for side in (v, t))
    for image, caption in zip(images.tolist(), captions.tolist(), strict=True):
        axis.plot(*zip(image, caption, strict=True), color="#999999", linewidth=0.3, zorder=1)
    axis.scatter(*images.T.tolist(), s=5, color=IMAGE_COLOUR, marker="o", label="images", zorder=2)
    axis.scatter(*captions.T.tolist(), s=5, color=TEXT_COLOUR, marker="^", label="captions", zorder=2)
    axis.text(0.98, 0.02, f"{100 * share:.0f} % of the variance", fontsize=7, ha="right", transform=axis.transAxes)
    axis.set_axis_on()
    axis.set_xlim(-REACH, REACH)
    axis.set_ylim(-REACH, REACH)
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])


def draw_batches(picture: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Held-out recall over the batch, `alone` by either contrast, with the interval over seeds."""
    from matplotlib import pyplot

    kinds = by_kind([row for row in rows if row["structure"] == "alone"])
    batches = list(dict.fromkeys(batch for _, _, batch in kinds))
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for place, contrast in enumerate(CONTRASTS):
        line = []
        for (of, _, batch), runs in kinds.items():
            if of == contrast:
                recalls = [50 * (run["image to text R@10"] + run["text to image R@10"]) for run in runs]
                line.append((batches.index(batch), *interval(recalls)))
        if line:
            places, centres, halves = zip(*line, strict=True)
            axis.errorbar(
                places, centres, halves, label=contrast, color=COLOURS[place + 1], marker=MARKERS[place], capsize=3
            )
    axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axis.set_xlabel("batch, at equally many epochs")
    axis.set_ylabel(RECALL)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def towers_of(work: Path, run: Run) -> HeadedTowers:
    towers = HeadedTowers(INIT_SCALE)
    towers.load_state_dict(torch.load(model_path(work, run), weights_only=True))
    return towers


def title(run: Run) -> str:
    """As in 'trained with the ...'."""
    name = "InfoNCE" if run.contrast == "InfoNCE" else "gamma loss"
    return f"{name}, {run.structure}, batch {run.batch}"
