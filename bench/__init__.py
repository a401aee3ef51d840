"""Time, memory and error of the losses, beside plain PyTorch and other libraries.

python -m contrastile bench --help
"""

from contrastile.bench.cases import LOSSES, Case
from contrastile.bench.cli import main
from contrastile.bench.harness import Row, run_cases, run_job
from contrastile.bench.implementations import IMPLEMENTATIONS
from contrastile.bench.scaling import ScalingRow, loss_scaling

__all__ = ["IMPLEMENTATIONS", "LOSSES", "Case", "Row", "ScalingRow", "loss_scaling", "main", "run_cases", "run_job"]
