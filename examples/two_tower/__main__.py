"""python -m examples.two_tower [--out JSON] [--figures FOLDER]: trains what is not yet trained, prints, writes, draws.

The table, then batches of InfoNCE against the gamma loss, in one file of results:

    python -m examples.two_tower --processes 2
    python -m examples.two_tower --processes 2 --rows alone --batches 8 32 128 512 all
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from contrastile.demo.data import CREDIT

from examples.common.options import positive
from examples.common.runs import Results
from examples.two_tower import corpus
from examples.two_tower.objectives import CONTRASTS, STRUCTURES
from examples.two_tower.report import report
from examples.two_tower.runs import complete
from examples.two_tower.train import Run, Settings

SEEDS, EPOCHS, BATCH = 3, 12, 32
SHORT_EPOCHS, SHORT_KEEPS_ONE_IN = 4, 12  # of the families: shows that everything runs


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    seeds, epochs = (1, SHORT_EPOCHS) if options.short else (SEEDS, EPOCHS)
    settings = Settings(
        options.epochs or epochs, keep_one_in=SHORT_KEEPS_ONE_IN if options.short else 1, validate=options.validate
    )
    kind = "_short" * options.short + "_validate" * options.validate
    work = options.work or Path(f"out/two_tower{kind}")
    data = corpus.load(work, settings.keep_one_in, settings.validate)
    if too_large := [batch for batch in options.batches if batch != "all" and batch > len(data.dataset.train)]:
        parser.error(f"--batches {too_large[0]}: there are {len(data.dataset.train)} pairs to train on")
    try:
        results = Results(options.out or work / "results.json", settings)
    except ValueError as other:
        parser.error(f"{other}: give another --out and --work, or remove them")
    runs = [
        Run(contrast, structure, batch, seed)
        for seed, structure, contrast, batch in itertools.product(
            range(options.seeds or seeds), options.rows, options.contrasts, options.batches
        )
    ]
    complete(runs, results, settings, work, options.processes)
    report(results.rows, len(data.dataset.held_out))
    if options.figures:
        from examples.two_tower.figure import draw

        print(*draw(options.figures, results.rows, data, work), CREDIT, sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.two_tower", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=STRUCTURES, default=STRUCTURES, metavar="ROW", help=f"of {', '.join(STRUCTURES)}")
    add("--contrasts", nargs="+", choices=CONTRASTS, default=CONTRASTS, help="each row with these (default both)")
    add("--batches", nargs="+", type=_batch, default=[BATCH], help=f'pairs, or "all" at once (default {BATCH})')
    add("--seeds", type=positive, help=f"runs of each (default {SEEDS})")
    add("--epochs", type=positive, help=f"passes over the training pairs (default {EPOCHS})")
    add("--short", action="store_true", help="a twelfth of the emoji, one seed, few epochs: seconds, not a result")
    add("--validate", action="store_true", help="measure on a part of the training families: to choose options by")
    add("--processes", type=positive, default=1, help="runs side by side, one thread each (default 1)")
    add("--out", type=Path, help="results, JSON; what is in it is not trained again (default WORK/results.json)")
    add("--work", type=Path, help="folder of rendered emoji and trained towers (default out/two_tower)")
    add("--figures", type=Path, metavar="FOLDER", help="draw all results here; needs the towers in WORK")
    return parser


def _batch(text: str) -> int | str:
    return text if text == "all" else positive(text, at_least=2)


if __name__ == "__main__":
    main()
