"""python -m examples.fusion [--out JSON] [--figures FOLDER]: trains what is not yet trained, prints, writes, draws.

python -m examples.fusion --processes 2
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from contrastile.demo.data import CREDIT

from examples.common.options import positive
from examples.common.runs import Results
from examples.fusion import corpus
from examples.fusion.report import ROWS, report
from examples.fusion.runs import complete
from examples.fusion.train import Run, Settings

SEEDS = 3
FULL = Settings(scenes=20_000, pretraining_epochs=4, examples=9_600, fine_tuning_epochs=6, measured=1_500)
SHORT = Settings(scenes=1_280, pretraining_epochs=1, examples=384, fine_tuning_epochs=2, measured=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    settings, seeds = (SHORT, 1) if options.short else (FULL, SEEDS)
    work = options.work or Path("out/fusion" + "_short" * options.short)
    try:
        results = Results(options.out or work / "results.json", settings)
    except ValueError as other:
        parser.error(f"{other}: give another --out and --work, or remove them")
    runs = [Run(row, seed) for seed, row in itertools.product(range(options.seeds or seeds), options.rows)]
    complete(runs, results, settings, work, options.processes)
    report(results.rows)
    if options.figures:
        from examples.fusion.figure import draw

        data = corpus.load(settings.scenes, settings.examples, settings.measured)
        print(*draw(options.figures, results.rows, data, work), CREDIT, sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.fusion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)} (default all)")
    add("--seeds", type=positive, help=f"runs of each (default {SEEDS})")
    add(
        "--short",
        action="store_true",
        help="few scenes and examples, one seed: shows that everything runs, not a result",
    )
    add("--processes", type=positive, default=1, help="runs side by side, one thread each (default 1)")
    add("--out", type=Path, help="results, JSON; what is in it is not trained again (default WORK/results.json)")
    add("--work", type=Path, help="folder of trained models (default out/fusion)")
    add("--figures", type=Path, metavar="FOLDER", help="draw all results here; needs the models in WORK")
    return parser


if __name__ == "__main__":
    main()
