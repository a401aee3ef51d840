"""python -m contrastile demo: train an image and a text encoder on emoji, and compare losses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

SEEDS, EPOCHS = 2, 16


def main(argv: Sequence[str]) -> int:
    """Returns 0. Pictures, training curves and figures go to the folder of --out."""
    options = _parser().parse_args(argv)
    try:
        from contrastile.demo import compare
    except ImportError as missing:
        raise SystemExit(f"demo needs more packages: pip install 'contrastile[demo]' ({missing})") from missing
    compare.run(options.out, options.seeds, options.epochs, quick=options.quick, with_table=options.table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m contrastile demo",
        description="Train an image and a text encoder on emoji with InfoNCE and the gamma loss; compare what "
        "they retrieve for emoji that were held out.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), help="folder for pictures and results.json (default out)")
    add("--seeds", type=_positive, default=SEEDS, help=f"runs of each loss (default {SEEDS})")
    add("--epochs", type=_positive, default=EPOCHS, help=f"passes over the training pairs (default {EPOCHS})")
    add("--quick", action="store_true", help="a twelfth of the emoji, one seed, few epochs: seconds, not a result")
    add("--no-table", dest="table", action="store_false", help="leave out time and memory of the loss alone")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number
