"""C++ backend: the sweeps in csrc/cpu, through the extension module contrastile._C."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contrastile.backends import workspace_bytes
from contrastile.pairs import GivenWeights, GradNeeds, PairGrads, PairProblem, PairStats, SoftmaxWeights

ELEMENT_TYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}


@cache
def extension() -> ModuleType:
    """contrastile._C."""
    from contrastile import _C

    return _C


def unavailable_reason() -> str | None:
    try:
        extension()
    except ImportError as error:
        return f"the C++ extension contrastile._C is not there ({error}): was there a C++ compiler at installation?"
    return None


def release_workspace() -> None:
    """Gives back the memory that is kept from one sweep for the next."""
    if unavailable_reason() is None:
        extension().release_workspace()


def positive_logits(problem: PairProblem) -> Tensor:
    call = _Call(problem)
    found = call.empty(problem.rows)
    call.run("positive_logits", found.data_ptr())
    return found


def pair_stats(problem: PairProblem, *, columns: bool = False, ranks: bool = False) -> PairStats:
    if ranks and problem.self_similarity:
        problem = replace(problem, self_similarity=False)  # a rank needs the whole row
    call = _Call(problem)
    stats = call.new_stats(columns=columns, ranks=ranks)
    call.run("pair_stats", call.native_stats(stats))
    return stats


def pair_grad(problem: PairProblem, weights: GivenWeights | SoftmaxWeights, needs: GradNeeds) -> PairGrads:
    call = _Call(problem)
    given = isinstance(weights, GivenWeights)
    columns = weights.col_shift is not None if isinstance(weights, GivenWeights) else weights.columns
    stats = call.new_stats(columns=columns, ranks=False) if needs.stats or not given else None
    n, m, d = problem.rows, problem.cols, problem.anchors.shape[1]
    grads = PairGrads(
        dx=call.empty(n, d) if needs.dx else None,
        dy=call.empty(m, d) if needs.dy and not problem.self_similarity else None,
        row_moment=call.empty(n) if needs.moment else None,
        row_mass=call.empty(n) if isinstance(weights, GivenWeights) and weights.row_shift is not None else None,
        col_mass=call.empty(m) if isinstance(weights, GivenWeights) and weights.col_shift is not None else None,
        stats=stats,
        row_weight=call.empty(n) if needs.row_weight else None,
    )
    if isinstance(weights, GivenWeights):
        call.run("pair_grad_given", call.native_weights(weights), call.native_grads(grads), call.native_stats(stats))
    else:
        call.run("pair_grad_softmax", weights.gain, call.native_grads(grads), call.native_stats(stats))
    return grads


class _Call:
    """One call of the extension: the problem as addresses, and the tensors behind them kept alive."""

    def __init__(self, problem: PairProblem) -> None:
        self._c = extension()
        self._dtype = problem.scale.dtype
        self._suffix = "_float64" if self._dtype == torch.float64 else "_float32"
        self._held: list[Tensor] = []
        self._problem = problem
        self._native_problem = self._native("PairProblem")(
            anchors=self._view(problem.anchors, "x"),
            candidates=self._view(problem.candidates, "y"),
            scale=self._at(problem.scale, "scale"),
            positives=self._at(problem.positives, "positives"),
            row_groups=self._at(problem.row_groups, "groups[0]"),
            col_groups=self._at(problem.col_groups, "groups[1]"),
            row_ceiling=self._at(problem.row_ceiling),
            self_offset=problem.self_offset,
            self_similarity=problem.self_similarity,
        )
        self._execution = self._c.Execution(threads=torch.get_num_threads(), workspace_bytes=workspace_bytes())

    def run(self, operation: str, *arguments: Any) -> None:
        self._native(operation)(self._native_problem, *arguments, self._execution)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device="cpu")

    def new_stats(self, *, columns: bool, ranks: bool) -> PairStats:
        n, m = self._problem.rows, self._problem.cols
        return PairStats(
            row_max=self.empty(n),
            row_sum=self.empty(n),
            col_max=self.empty(m) if columns else None,
            col_sum=self.empty(m) if columns else None,
            positive_logit=self.empty(n) if self._problem.positives is not None else None,
            row_rank=torch.empty(n, dtype=torch.int64, device="cpu") if ranks else None,
        )

    def native_stats(self, stats: PairStats | None) -> Any:
        if stats is None:
            return self._native("PairStats")()
        return self._native("PairStats")(
            row_max=self._at(stats.row_max),
            row_sum=self._at(stats.row_sum),
            col_max=self._at(stats.col_max),
            col_sum=self._at(stats.col_sum),
            positive_logit=self._at(stats.positive_logit),
            row_rank=self._at(stats.row_rank),
        )

    def native_weights(self, weights: GivenWeights) -> Any:
        return self._native("GivenWeights")(
            row_shift=self._at(weights.row_shift),
            row_gain=self._at(weights.row_gain),
            col_shift=self._at(weights.col_shift),
            col_gain=self._at(weights.col_gain),
            positive_coeff=self._at(weights.positive_coeff),
            function=weights.function.value,
        )

    def native_grads(self, grads: PairGrads) -> Any:
        return self._native("PairGrads")(
            dx=self._at(grads.dx),
            dy=self._at(grads.dy),
            row_moment=self._at(grads.row_moment),
            row_mass=self._at(grads.row_mass),
            col_mass=self._at(grads.col_mass),
            row_weight=self._at(grads.row_weight),
        )

    def _native(self, name: str) -> Any:
        return getattr(self._c, name + self._suffix)

    def _at(self, tensor: Tensor | None, name: str = "a tensor") -> int | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        self._held.append(tensor)
        return address(tensor, name)

    def _view(self, embeddings: Tensor, name: str) -> Any:
        self._held.append(embeddings)
        return embedding_view(embeddings, name)


def embedding_view(embeddings: Tensor, name: str = "a tensor of rows") -> Any:
    """Of a tensor that the caller keeps alive, unit stride along its features."""
    rows, depth = embeddings.shape
    return extension().EmbeddingView(
        data=address(embeddings, name),
        rows=rows,
        depth=depth,
        row_stride=embeddings.stride(0),
        element_type=ELEMENT_TYPES[embeddings.dtype],
    )


def address(tensor: Tensor, name: str) -> int:
    """What stands for other tensors, such as a DTensor, has none: reading there would end the process."""
    found = tensor.data_ptr()
    if not found and tensor.numel():
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, which has no memory of its own: expected a plain tensor, "
            "such as its to_local() or full_tensor()"
        )
    return found
