"""Checks of what users pass in, and the PairProblem made of it.

Whatever needs values rather than shapes (range of positives, sign of scale) is checked for CPU tensors only:
elsewhere it would wait for the device, and a compiled graph has no values.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from contrastile.pairs import PairProblem

REDUCTIONS = ("none", "mean", "sum")
EMBEDDING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
LARGEST_LOG_MULTIPLIER = 40

Groups = tuple[Tensor, Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class PairInputs(NamedTuple):
    """Checked arguments that every operation on pairs takes, still attached to their graphs."""

    x: Tensor  # (N, D)
    y: Tensor | None  # (M, D); None: x against itself, a sample never its own negative
    scale: Tensor  # () or (N,)
    positives: Tensor | None  # (N,) int64
    row_groups: Tensor | None  # (N,) int64
    col_groups: Tensor | None  # (M,) int64
    row_ceiling: Tensor | None = None  # (N,) accumulation dtype: a logit above it is masked

    @property
    def self_similarity(self) -> bool:
        """Logits are symmetric, and so is what is masked."""
        return self.y is None and self.scale.dim() == 0 and self.row_ceiling is None

    def problem(self) -> PairProblem:
        """The same for a backend: unit stride along D, scale by row. To be called without gradient recording."""
        anchors = _rows_in_place(self.x)
        rows = anchors.shape[0]
        scale = self.scale.to(accumulation_dtype(anchors.dtype))
        return PairProblem(
            anchors=anchors,
            candidates=anchors if self.y is None else _rows_in_place(self.y),
            scale=(scale.expand(rows) if scale.dim() == 0 else scale).contiguous(),
            positives=self.positives,
            row_groups=self.row_groups,
            col_groups=self.col_groups,
            row_ceiling=self.row_ceiling,
            self_offset=0 if self.y is None else None,
            self_similarity=self.self_similarity,
        )


def check_pairs(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    positives: Tensor | None,
    groups: Groups | None,
    *,
    both_directions: bool,
    needs_positives: bool = True,
    may_be_empty: bool = False,
) -> PairInputs:
    """Arguments of anchors against candidates. Default positives: row i's is column i, if they are needed.

    may_be_empty: no rows are a share of a larger batch.
    """
    _check_embeddings("x", x, may_be_empty)
    _check_embeddings("y", y, may_be_empty)
    if x.device != y.device:
        raise ValueError(f"x is on {x.device} but y is on {y.device}: both need the same device")
    if x.dtype != y.dtype:
        if not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x is {x.dtype} but y is {y.dtype}: both need the same dtype outside autocast")
        wider = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(wider), y.to(wider)
    (rows, depth), cols = x.shape, y.shape[0]
    if y.shape[1] != depth:
        raise ValueError(f"x is {_shape(x)} but y is {_shape(y)}: both need the same feature dimension")
    if needs_positives and positives is None and cols < rows:
        raise ValueError(
            f"x is {_shape(x)} but y is {_shape(y)}: without positives, row i's positive is column i, "
            "which needs at least as many candidates as anchors"
        )
    if needs_positives and both_directions and cols != rows:
        raise ValueError(
            f"x is {_shape(x)} but y is {_shape(y)}: both directions need as many anchors as candidates, "
            "so that every candidate has one positive"
        )
    if positives is not None:
        positives = check_positives(positives, x, cols, distinct=both_directions)
    elif needs_positives:
        positives = torch.arange(rows, device=x.device)
    row_groups, col_groups = (None, None) if groups is None else _check_groups(groups, x, cols)
    return PairInputs(x, y, _check_scale(scale, x), positives, row_groups, col_groups)


def check_views(
    z: Tensor, scale: float | Tensor, positives: Tensor | None, *, may_be_empty: bool = False
) -> PairInputs:
    """Arguments of a batch against itself."""
    _check_embeddings("z", z, may_be_empty)
    rows = z.shape[0]
    if positives is None:
        if rows % 2:
            raise ValueError(f"z is {_shape(z)}: two views of each sample need an even number of rows")
        positives = torch.arange(rows, device=z.device).roll(rows // 2)
    else:
        positives = check_positives(positives, z, rows, distinct=True)
        if _has_values(z):
            own = torch.arange(rows, device=z.device)
            if bool((positives == own).any()):
                raise ValueError("positives holds a row that is its own positive: expected another row for each")
            if not torch.equal(positives[positives], own):
                raise ValueError("positives does not pair the rows up: expected positives[positives[i]] == i")
    return PairInputs(z, None, _check_scale(scale, z), positives, None, None)


def check_alike(embeddings: dict[str, Tensor], *, may_be_empty: bool = False) -> list[Tensor]:
    """Embeddings of the same samples, by the names of their arguments: one shape, device and dtype.

    Under autocast the narrower dtypes are widened. may_be_empty: no rows are a share of a larger batch.
    """
    for name, rows in embeddings.items():
        _check_embeddings(name, rows, may_be_empty)
    (first, like), *others = embeddings.items()
    for name, rows in others:
        if rows.shape != like.shape:
            raise ValueError(f"{first} is {_shape(like)} but {name} is {_shape(rows)}: both need the same shape")
        if rows.device != like.device:
            raise ValueError(f"{first} is on {like.device} but {name} is on {rows.device}: both need the same device")
        if rows.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
            raise TypeError(f"{first} is {like.dtype} but {name} is {rows.dtype}: both need the same dtype")
    widest = like.dtype
    for _, rows in others:
        widest = torch.promote_types(widest, rows.dtype)
    return [rows.to(widest) for rows in embeddings.values()]


def check_number(name: str, value: float, lowest: float, highest: float = math.inf) -> float:
    if not _is_number(value):
        raise TypeError(f"{name} is {_kind(value)}: expected a number")
    if not (lowest <= value <= highest and -math.inf < value < math.inf):
        bounds = f" of at least {lowest:g}" if highest == math.inf else f" from {lowest:g} to {highest:g}"
        raise ValueError(f"{name} is {value}: expected a finite number{bounds if lowest > -math.inf else ''}")
    return float(value)


def check_vector(name: str, vector: Tensor, length: int, like: Tensor, *, positive: bool = False) -> Tensor:
    """A constant of the loss, one entry per row or column, in the accumulation dtype."""
    if not isinstance(vector, Tensor) or not vector.dtype.is_floating_point:
        raise TypeError(f"{name} is {_kind(vector)}: expected a floating-point tensor of shape ({length},)")
    _check_vector_shape(name, vector, length, like)
    if positive and _has_values(like) and not bool((vector > 0).all()):
        raise ValueError(f"{name} holds entries that are not above 0")
    return vector.detach().to(accumulation_dtype(like.dtype)).contiguous()


def one_number(value: float | Tensor) -> float | Tensor:
    """A tensor of one entry as (), for callers whose library takes any shape of it; anything else as it is."""
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value


def check_bias(bias: float | Tensor, like: Tensor) -> Tensor:
    """One number that logits are moved by, (), still attached to its graph."""
    if not isinstance(bias, Tensor):
        if not _is_number(bias):
            raise TypeError(f"bias is {_kind(bias)}: expected a number or a floating-point tensor")
        dtype = accumulation_dtype(like.dtype)
        if not torch.compiler.is_compiling() and not abs(bias) <= torch.finfo(dtype).max:
            raise ValueError(f"bias is {bias}: expected a finite number in {dtype}")
        return torch.full((), bias, dtype=dtype, device=like.device)
    if not bias.dtype.is_floating_point:
        raise TypeError(f"bias is {bias.dtype}: expected a floating-point tensor")
    if bias.dim() != 0:
        raise ValueError(f"bias has shape {_shape(bias)}: expected a number or ()")
    _check_device("bias", bias, like)
    dtype = accumulation_dtype(like.dtype)
    if _has_values(like) and not bool(bias.to(dtype).isfinite()):
        raise ValueError(f"bias holds {bias.item()}: expected a finite number in {dtype}")
    return bias


def check_log_multiplier(log_multiplier: float) -> float:
    if not _is_number(log_multiplier):
        raise TypeError(f"log_multiplier is {_kind(log_multiplier)}: expected a number")
    if not -LARGEST_LOG_MULTIPLIER <= log_multiplier <= LARGEST_LOG_MULTIPLIER:
        raise ValueError(
            f"log_multiplier is {log_multiplier}: expected at most {LARGEST_LOG_MULTIPLIER} in magnitude, "
            "beyond which sums in float32 may overflow"
        )
    return float(log_multiplier)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}: expected one of {', '.join(map(repr, REDUCTIONS))}")


def _check_embeddings(name: str, embeddings: Tensor, may_be_empty: bool = False) -> None:
    if not isinstance(embeddings, Tensor):
        raise TypeError(f"{name} is {_kind(embeddings)}: expected a tensor of shape (rows, features)")
    # A trace would hold the allocation of a result, and not what fills it.
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise RuntimeError("torch.jit.trace does not see these kernels: use torch.export or torch.compile")
    if embeddings.dtype not in EMBEDDING_DTYPES:
        raise TypeError(f"{name} is {embeddings.dtype}: expected float16, bfloat16, float32 or float64")
    if embeddings.dim() != 2:
        raise ValueError(f"{name} has shape {_shape(embeddings)}: expected (rows, features)")
    if (embeddings.shape[0] == 0 and not may_be_empty) or embeddings.shape[1] == 0:
        raise ValueError(f"{name} is {_shape(embeddings)}: a loss over no rows or no features is undefined")
    if embeddings.layout != torch.strided:
        raise TypeError(f"{name} has layout {embeddings.layout}: expected a dense tensor")
    if embeddings.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: it holds no values")


def _check_scale(scale: float | Tensor, x: Tensor) -> Tensor:
    rows, dtype = x.shape[0], accumulation_dtype(x.dtype)
    if not isinstance(scale, Tensor):
        if not _is_number(scale):
            raise TypeError(f"scale is {_kind(scale)}: expected a number or a floating-point tensor")
        limits = torch.finfo(dtype)
        if not torch.compiler.is_compiling() and not limits.smallest_normal <= scale <= limits.max:
            raise ValueError(f"scale is {scale}: expected a finite number above 0 in {dtype}")
        return torch.full((), scale, dtype=dtype, device=x.device)
    if not scale.dtype.is_floating_point:
        raise TypeError(f"scale is {scale.dtype}: expected a floating-point tensor")
    if scale.dim() > 1 or (scale.dim() == 1 and scale.shape[0] != rows):
        raise ValueError(f"scale has shape {_shape(scale)}: expected a number, () or ({rows},)")
    _check_device("scale", scale, x)
    if _has_values(x):
        used = scale.detach().to(dtype)
        fits = (used > 0) & (used < math.inf)
        if not bool(fits.all()):
            wrong, where = scale.detach()[~fits][0].item(), f"above 0 in {dtype}"
            raise ValueError(f"scale of shape {_shape(scale)} holds {wrong}: expected finite numbers {where}")
    return scale


def check_positives(positives: Tensor, x: Tensor, cols: int, *, distinct: bool) -> Tensor:
    rows = x.shape[0]
    _check_integers("positives", positives, rows, x)
    positives = positives.detach().to(torch.int64).contiguous()  # wide enough for any number of columns
    if _has_values(x):
        if bool(((positives < 0) | (positives >= cols)).any()):
            raise ValueError(
                f"positives holds entries from {positives.min()} to {positives.max()}: "
                f"expected columns from 0 to {cols - 1}"
            )
        if distinct and rows and int(torch.bincount(positives, minlength=cols).max()) > 1:
            what = "a permutation" if rows == cols else "distinct columns"
            raise ValueError(f"positives repeats a column: both directions need {what}")
    return positives


def _check_groups(groups: Groups, x: Tensor, cols: int) -> Groups:
    if not isinstance(groups, (tuple, list)) or len(groups) != 2:
        raise TypeError(f"groups is {_kind(groups)}: expected (row_ids, col_ids)")
    row_ids, col_ids = groups
    _check_integers("groups[0]", row_ids, x.shape[0], x)
    _check_integers("groups[1]", col_ids, cols, x)
    return row_ids.to(torch.int64).contiguous(), col_ids.to(torch.int64).contiguous()


def _check_integers(name: str, values: Tensor, length: int, like: Tensor) -> None:
    if not isinstance(values, Tensor) or values.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} is {_kind(values)}: expected an integer tensor of shape ({length},)")
    _check_vector_shape(name, values, length, like)


def _check_vector_shape(name: str, vector: Tensor, length: int, like: Tensor) -> None:
    if vector.dim() != 1 or vector.shape[0] != length:
        raise ValueError(f"{name} has shape {_shape(vector)}: expected ({length},)")
    _check_device(name, vector, like)


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the embeddings are on {like.device}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _has_values(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu"


def _rows_in_place(embeddings: Tensor) -> Tensor:
    return embeddings if embeddings.stride(1) == 1 else embeddings.contiguous()


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
