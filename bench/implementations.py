"""Everything that can be measured: contrastile, plain PyTorch, and the losses of other libraries.

An implementation turns a Case into a function of Inputs that returns a scalar loss with a gradient. Those of
other libraries are looked up when they are asked for, so each may be absent.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from contrastile.bench import dense, libraries
from contrastile.bench.cases import DEVICES, LOSSES, SCALE, Case, Inputs
from torch import Tensor

Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Implementation:
    build: Callable[[Case], Loss]
    losses: tuple[str, ...]
    # Measured peaks, rounded up, by which a case is refused: float32 matrices of N x M, and of STRIP_ROWS x M.
    pair_matrices: float = 0
    strip_matrices: float = 0
    modules: tuple[str, ...] = ()  # that must be importable
    # differentiates through a normalisation of its own, so its gradient is orthogonal to the rows
    normalizes: bool = False
    # compiles for the shape it sees: the compiler's own memory is not the loss's
    compiles: bool = False
    devices: tuple[str, ...] = DEVICES

    def score_bytes(self, case: Case) -> int:
        """Estimate of what it stores beyond embeddings and a bounded workspace."""
        rows = self.pair_matrices * case.rows + self.strip_matrices * dense.STRIP_ROWS
        return int(4 * rows * case.cols)

    def missing(self) -> str | None:
        absent = [name for name in self.modules if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None


def _contrastile(case: Case) -> Loss:
    import contrastile as ct

    backend = case.backend or ("triton" if case.device == "interpreter" else None)

    def run(inputs: Inputs) -> Tensor:
        x, y = inputs.pair
        if case.loss == "gamma":
            return ct.gamma_contrastive(x, y, SCALE, inputs.log_u, inputs.log_v, backend=backend).loss
        if case.loss == "nt_xent":
            return ct.nt_xent(x, SCALE, backend=backend)
        return ct.info_nce(x, y, SCALE, symmetric=case.loss == "symmetric", backend=backend)

    return run


def _compiled(case: Case) -> Loss:
    return dense.evaluate(case.loss, lambda function: torch.compile(function, dynamic=False))


_PAIRED = ("one_direction", "symmetric")

IMPLEMENTATIONS: dict[str, Implementation] = {
    "contrastile": Implementation(_contrastile, LOSSES),
    "dense": Implementation(lambda case: dense.evaluate(case.loss), LOSSES, pair_matrices=8),
    "compiled": Implementation(_compiled, LOSSES, pair_matrices=3, compiles=True),
    "checkpointed": Implementation(lambda case: dense.evaluate_in_strips(case.loss), LOSSES, strip_matrices=16),
    "linear_cross_entropy": Implementation(libraries.linear_cross_entropy, _PAIRED, pair_matrices=0.3),
    "open_clip": Implementation(libraries.open_clip, ("symmetric",), pair_matrices=5, modules=("open_clip",)),
    "lightly": Implementation(libraries.lightly, ("nt_xent",), pair_matrices=6, modules=("lightly",), normalizes=True),
    "mnrl": Implementation(libraries.mnrl, _PAIRED, pair_matrices=6, modules=("sentence_transformers",)),
    "cached_mnrl": Implementation(
        libraries.cached_mnrl, _PAIRED, strip_matrices=16, modules=("sentence_transformers",)
    ),
    "keops": Implementation(libraries.keops, _PAIRED, modules=("pykeops",)),
    "memeff": Implementation(libraries.memeff, _PAIRED, modules=("memeff",), devices=("cuda",)),
    "inf_cl": Implementation(libraries.inf_cl, _PAIRED, modules=("inf_cl",), devices=("cuda",)),
}
