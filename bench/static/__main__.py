"""python -m contrastile.bench.static: bounds of the compiled kernels, compared with the committed table or into it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from contrastile.bench.static.matrix import TARGETS
from contrastile.bench.static.report import report, report_cuda


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a kernel has a fault or a bound fell."""
    parser = argparse.ArgumentParser(prog="python -m contrastile.bench.static", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--which", choices=("few", "table", "all"), default="table")
    parser.add_argument(
        "--cuda", type=Path, metavar="MODULE", help="the CUDA kernels of a built contrastile._C instead"
    )
    parser.add_argument("--write", action="store_true", help="put the rows into the committed table")
    options = parser.parse_args(argv)
    if options.write and options.which == "few":
        parser.error("--write needs all rows of the table")
    if options.cuda is not None:
        return report_cuda(options.cuda, tuple(options.targets), options.write)
    return report(options.which, tuple(options.targets), options.write)


if __name__ == "__main__":
    sys.exit(main())
