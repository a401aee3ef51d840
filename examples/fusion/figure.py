"""The pictures of --figures: every row's share of right answers, and scenes with what was asked and answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from contrastile.bench.plot import COLOURS

from examples.common.intervals import interval
from examples.fusion.corpus import Asked, Corpus
from examples.fusion.model import FusionModel
from examples.fusion.questions import ANSWERS, TASKS
from examples.fusion.report import SORTS, by_structure
from examples.fusion.runs import model_path
from examples.fusion.scenes import Sprites
from examples.fusion.tasks import PICTURES, Answering, answers
from examples.fusion.train import TEXT_ONLY, Run

SHOWN = 5  # examples of each task
WRAP = 26  # letters of a line
RIGHT, WRONG = COLOURS[3], COLOURS[1]


def draw(folder: Path, rows: Sequence[dict[str, Any]], data: Corpus, work: Path) -> list[Path]:
    """The bars, and the answers of the last row's first seed if its model is in `work`."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [folder / "fusion_tasks.png"]
    draw_tasks(drawn[0], rows)
    seeing = [structure for structure in by_structure(rows) if structure != TEXT_ONLY]
    kept = [run for structure in seeing if model_path(work, run := Run(structure, 0)).exists()]
    if kept:
        drawn.append(folder / "fusion_answers.png")
        draw_answers(drawn[1], kept[-1].structure, answering_of(work, kept[-1]), data)
    return drawn


def draw_tasks(picture: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A panel a task, a bar a row with its seeds as dots and their interval; a line where text alone gets to."""
    from matplotlib import pyplot

    kinds = by_structure(rows)
    seeing = [structure for structure in kinds if structure != TEXT_ONLY]
    figure, axes = pyplot.subplots(1, len(TASKS), figsize=(4 * len(TASKS), 3.8), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=True):
        for place, structure in enumerate(seeing):
            shares = [100 * run[task] for run in kinds[structure]]
            centre, half = interval(shares)
            axis.bar(place, centre, yerr=half, capsize=4, color=COLOURS[2], alpha=0.6, width=0.7)
            axis.plot([place] * len(shares), shares, "o", color=COLOURS[0], markersize=3)
        if TEXT_ONLY in kinds:
            floor, _ = interval([100 * run[task] for run in kinds[TEXT_ONLY]])
            axis.axhline(floor, color=COLOURS[1], linewidth=1.2, linestyle="--", label=f"text alone: {floor:.1f} %")
            axis.legend(frameon=False, loc="upper right")
        axis.set_xticks(range(len(seeing)), seeing)
        axis.set_ylim(0, 100)
        axis.set_title(task)
    axes[0].set_ylabel("right answers about held-out combinations, %")
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def draw_answers(picture: Path, structure: str, answering: Answering, data: Corpus) -> None:
    """Examples of each task, one of a sort at least where there is room, as the model sees them."""
    from matplotlib import pyplot

    heights = [2.3 / PICTURES[task] + 0.8 for task in TASKS]  # of pictures side by side, and words
    figure, axes = pyplot.subplots(
        len(TASKS), SHOWN, figsize=(2.5 * SHOWN, sum(heights)), height_ratios=heights, layout="constrained"
    )
    for line, task in zip(axes, TASKS, strict=True):
        asked = data.held_out[task]
        chosen = chosen_of(asked, list(SORTS[task]))
        shown = Asked(*(part[chosen] for part in asked[:3]), [asked.examples[place] for place in chosen])
        given = answers(answering, task, shown, data.sprites).tolist()
        for axis, example, layout, number in zip(line, shown.examples, shown.layouts, given, strict=True):
            axis.imshow(side_by_side(data.sprites, layout))
            axis.set_xticks([])
            axis.set_yticks([])
            answer = ANSWERS[task][number]
            is_right = answer == example.answer
            axis.set_title(fill(example.text, WRAP), fontsize=8)
            said = answer if is_right else f"{answer}, not {example.answer}"
            axis.text(0.5, -0.06, said, transform=axis.transAxes, fontsize=9, ha="center", va="top",
                      color=RIGHT if is_right else WRONG)  # fmt: skip
    figure.suptitle(f"Held-out combinations, answered after pre-training with '{structure}'", fontsize=11)
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


def chosen_of(asked: Asked, sorts: Sequence[str]) -> list[int]:
    """SHOWN positions, sorts in turn; of texts with several examples the answers in turn too."""
    places = [[place for place, each in enumerate(asked.examples) if each.sort == sort] for sort in sorts]
    return [places[turn % len(sorts)][turn + turn // len(sorts)] for turn in range(SHOWN)]


def side_by_side(sprites: Sprites, layout: torch.Tensor) -> Any:
    """The pictures (scenes, CELLS) of one example as one, (S, width, 3) uint8, a grey line between two."""
    pictures = sprites.pictures(layout).byte().permute(0, 2, 3, 1)
    line = torch.full((pictures.shape[1], 2, 3), 160, dtype=torch.uint8)
    parts = [part for each in pictures for part in (line, each)]
    return torch.cat(parts[1:], 1).numpy()


def answering_of(work: Path, run: Run) -> Answering:
    answering = Answering(FusionModel())
    answering.load_state_dict(torch.load(model_path(work, run), weights_only=True))
    return answering
