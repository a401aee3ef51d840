import sys

from contrastile.bench.cli import main

raise SystemExit(main(sys.argv[1:]))
