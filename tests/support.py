"""What the numeric tests share: a cover of shapes, truth in float64, and what plain PyTorch would have achieved.

The rule of judgement: error(ours) <= 2 * error(the same computation, dense, in the same dtype) + floor, where
the floor is how much the float64 truth itself moves when the inputs are perturbed by eight units in the last
place, plus the rounding of the result to its own dtype.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from contrastile import backends
from torch import Tensor

# With TRITON_INTERPRET=1 a run is about the Triton kernels alone; test_triton_interpreter.py starts it.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Those that run on CPU tensors. Compiled, the kernels for GPUs take tensors on a device alone: test_on_device.py.
ON_PROCESSORS = ("triton",) if INTERPRETING else ("cpu", "eager")
BACKENDS_HERE = [name for name in ON_PROCESSORS if backends.available()[name] is None]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


class Shape(NamedTuple):
    rows: int
    cols: int
    dim: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}x{self.dim}"


SQUARE_SHAPES = [
    Shape(1, 1, 3),
    Shape(2, 2, 1),
    Shape(63, 63, 384),
    Shape(65, 65, 520),
    Shape(100, 100, 96),
    Shape(257, 257, 48),
    Shape(257, 257, 100),
    Shape(650, 650, 33),
]
WIDE_SHAPES = [
    Shape(1, 257, 48),
    Shape(2, 63, 520),
    Shape(63, 65, 1),
    Shape(65, 257, 384),
    Shape(100, 257, 3),
    Shape(300, 900, 5),
]
ODD_SHAPES = SQUARE_SHAPES + WIDE_SHAPES


def sweeps_of(backend: str) -> backends.Backend:
    """The module that implements pair_stats and pair_grad."""
    return backends.get(backend)


@contextmanager
def small_workspace(size: int = 64 * 2**10) -> Iterator[None]:
    """So little workspace that several hundred rows or columns need several strips and column chunks."""
    before = backends.workspace_bytes()
    backends.set_workspace(size)
    try:
        yield
    finally:
        backends.set_workspace(before)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def unit_rows(rows: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + rows * 1009 + dim)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def towers(shape: Shape, dtype: torch.dtype = torch.float32, agreement: float = 0.5, seed: int = 0):
    """Unit rows x (N, D), y (M, D); y's first N rows lean towards x's by `agreement`."""
    x = unit_rows(shape.rows, shape.dim, torch.float64, seed)
    y = unit_rows(shape.cols, shape.dim, torch.float64, seed + 1)
    y[: shape.rows] = F.normalize(agreement * x + (1 - agreement) * y[: shape.rows], dim=1)
    return x.to(dtype), y.to(dtype)


def permutation(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(3))


def ids(count: int, kinds: int) -> Tensor:
    """Group ids, about count / kinds rows in each group."""
    return torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(count))


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=accumulation(dtype))


def takes_float64(parameters: Iterable[object]) -> bool:
    """Whether a test's parameters ask for it, alone or in a tuple."""
    return any(torch.float64 in (value if isinstance(value, tuple) else (value,)) for value in parameters)


def placed(values: Any, device: str) -> Any:
    """Dataclasses and tuples with their tensors on a device: each whole storage, so that layouts stay what they are."""
    moved: dict[int, Tensor] = {}

    def place(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(place, value))
        if dataclasses.is_dataclass(value):
            fields = {field.name: place(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in moved:  # candidates may be the anchors
            storage = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
            layout = value.shape, value.stride(), value.storage_offset()
            moved[id(value)] = storage.to(device).as_strided(*layout)
        return moved[id(value)]

    return place(values)


# Measuring


def gradients_of(function: Callable[..., Tensor], inputs: Mapping[str, Tensor], dtype: torch.dtype | None = None):
    """function(**inputs) and its gradient in every input, all as float64, under the keys "loss" and "d<input>".

    Inputs are first converted to dtype; a scale stays in the dtype that sums are accumulated in. A loss with
    entries is differentiated against a ramp, so that no two rows weigh the same.
    """
    leaves = {}
    for name, value in inputs.items():
        kept = dtype or value.dtype
        leaves[name] = value.detach().to(accumulation(kept) if name == "scale" else kept).clone().requires_grad_()
    loss = function(**leaves)
    ramp = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape) if loss.dim() else None
    loss.backward(ramp)
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().double() for name, value in {"loss": loss, **gradients}.items()}


def error(ours: Tensor, truth: Tensor) -> float:
    """Largest |ours - truth|; equal infinities agree. NaN where ours is NaN."""
    ours, truth = ours.double(), truth.double()
    return torch.where(ours == truth, 0.0, (ours - truth).abs()).max().item()


def rounding_floor(
    evaluate: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    truth: Mapping[str, Tensor],
) -> dict[str, float]:
    """How far evaluate(inputs) moves from truth when every input moves by up to 8 ulp of what dtype accumulates in.

    Worst of two random directions: the room for sums of rounded terms, whose dense error may be small by luck.
    """
    accumulated = accumulation(dtype)
    step = 8 * torch.finfo(accumulated).eps
    if accumulated == torch.float64:
        step *= 4  # truth is rounded as much as ours then, and dense has no error at all against it
    generator = torch.Generator().manual_seed(7)
    logit_rounding = roundings_of_a_logit(inputs, dtype) * torch.finfo(accumulated).eps * largest_logit(inputs)
    floor = {name: step * largest(value) for name, value in truth.items()}
    for _ in range(2):
        moved = {}
        for name, value in inputs.items():
            jitter = torch.rand(value.shape, generator=generator) * 2 - 1
            moved[name] = value.double() * (1 + step * jitter.double())
        for name, value in evaluate(moved).items():
            floor[name] = max(floor[name], error(value, truth[name]))
    return {name: value + logit_rounding * largest(truth[name]) for name, value in floor.items()}


SUMS_ON_MATRIX_UNITS = False  # of a GPU, whose sums of 16-bit products are cut off, and not rounded, at every step
FEATURES_OF_A_STEP = 16


def roundings_of_a_logit(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """In units in the last place, at most."""
    if not SUMS_ON_MATRIX_UNITS or dtype.itemsize != 2:
        return 0.5
    return 0.5 + max(value.shape[1] for value in inputs.values() if value.dim() == 2) / FEATURES_OF_A_STEP


def largest_logit(inputs: Mapping[str, Tensor]) -> float:
    """Bound of |scale <x_i, y_j>|. A sweep may form a logit twice, rounded differently: exp moves by eps times this."""
    norms = [value.double().norm(dim=1).max() for value in inputs.values() if value.dim() == 2]
    scale = inputs.get("scale", torch.ones(()))
    return (scale.max() * norms[0] * norms[-1]).item()


def rounding_of(dtype: torch.dtype, truth: Tensor) -> float:
    """Half a unit in the last place of the largest entry, or of a subnormal."""
    info = torch.finfo(dtype)
    return max(info.eps * largest(truth), info.smallest_normal * info.eps) / 2


def largest(values: Tensor) -> float:
    """Largest finite absolute value."""
    return values.abs().nan_to_num(nan=0, posinf=0).max().item()


def assert_at_most(ours: Tensor, truth: Tensor, allowed: float, what: str) -> None:
    """The largest |ours - truth| is at most `allowed`, and ours is finite wherever truth is."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    ours, truth = ours.double(), truth.double()
    same = (ours == truth) | (ours.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, (ours - truth).abs()).nan_to_num(nan=math.inf).reshape(-1)
    if not difference.numel() or difference.max() <= allowed:
        return
    worst = int(difference.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    raise AssertionError(
        f"{what}: worst at {where}: ours {ours.reshape(-1)[worst]:.9g}, truth {truth.reshape(-1)[worst]:.9g}, "
        f"error {difference[worst]:.3g} > allowed {allowed:.3g}; {int((difference > allowed).sum())} of "
        f"{difference.numel()} entries are worse than allowed"
    )


def assert_as_exact_as_dense(
    ours: Callable[..., Tensor],
    dense: Callable[..., Tensor],
    truth: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    dense_dtype: torch.dtype | None = None,
    slack: float = 1.0,
    beyond: Mapping[str, float] | None = None,
) -> None:
    """Loss and every gradient of `ours` within twice the error of `dense` (in dense_dtype, default that of ours).

    The kernels for GPUs multiply coefficients rounded to 16 bits with 16-bit inputs, as matrix units do: there the bar
    of the gradients is the dense loss in these 16 bits.
    slack multiplies what is allowed, for problems so small or so random that luck decides the dense error.
    beyond, by the name of a result, is allowed as well.
    """
    dtype = next(value.dtype for name, value in inputs.items() if name != "scale")
    exact = gradients_of(truth, inputs, torch.float64)
    plain = gradients_of(dense, inputs, dense_dtype)
    if {"triton", "cuda"} & set(BACKENDS_HERE) and dtype.itemsize == 2:
        plain = gradients_of(dense, inputs) | {"loss": plain["loss"]}
    floor = rounding_floor(lambda moved: gradients_of(truth, moved, torch.float64), inputs, dtype, exact)
    for name, value in gradients_of(ours, inputs).items():
        result_dtype = accumulation(dtype) if name in ("loss", "dscale", "dbias") else dtype
        dense_error = error(plain[name], exact[name])
        if math.isnan(dense_error):  # dense overflowed: it sets no bar
            dense_error = math.inf
            assert bool(value.isfinite().all()), f"{name} is not finite"
        allowed = 2 * dense_error + floor[name] + rounding_of(result_dtype, exact[name])
        assert_at_most(value, exact[name], slack * allowed + (beyond or {}).get(name, 0.0), name)


# Plain PyTorch, in the dtype of its inputs: what a user would have written


def dense_torch_logits(x: Tensor, y: Tensor, scale: float | Tensor, positives: Tensor, groups=None) -> Tensor:
    row_scale = torch.as_tensor(scale, dtype=x.dtype).reshape(-1, 1)
    logits = row_scale * (x @ y.T)
    if groups is None:
        return logits
    masked = (groups[0][:, None] == groups[1]).scatter(1, positives[:, None], False)
    return logits.masked_fill(masked, -math.inf)


def dense_torch_info_nce(x, y, scale, *, symmetric=True, positives=None, groups=None, reduction="mean"):
    positives = torch.arange(x.shape[0]) if positives is None else positives
    logits = dense_torch_logits(x, y, scale, positives, groups)
    rows = F.cross_entropy(logits, positives, reduction="none")
    if symmetric:
        columns = F.cross_entropy(logits.T, positives.argsort(), reduction="none")
        rows = (rows + columns[positives]) / 2
    return {"mean": rows.mean, "sum": rows.sum, "none": rows.clone}[reduction]()


def dense_torch_nt_xent(z, scale, *, positives=None, reduction="mean"):
    rows = z.shape[0]
    positives = torch.arange(rows).roll(-(rows // 2)) if positives is None else positives
    logits = dense_torch_logits(z, z, scale, positives).masked_fill(torch.eye(rows, dtype=torch.bool), -math.inf)
    return F.cross_entropy(logits, positives, reduction=reduction)


# Libraries: loaded from their one file, because importing the packages needs torchvision


def _file_of(package: str, relative: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent / relative


def _load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_clip_losses() -> types.ModuleType:
    return _load("open_clip_loss", _file_of("open_clip", "loss.py"))


def open_clip_loss() -> type:
    return open_clip_losses().ClipLoss


def libauc_losses() -> types.ModuleType:
    return _load("libauc_contrastive", _file_of("libauc", "losses/contrastive.py"))


class _NoMemoryBank(torch.nn.Module):
    """lightly's memory bank of size 0: hands the batch back and has no negatives of its own."""

    def __init__(self, size=0, gather_distributed=False):
        super().__init__()

    def forward(self, output, labels=None, update=False):
        return output, None


@contextmanager
def _stand_ins(modules: Mapping[str, types.ModuleType]):
    hidden = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def lightly_nt_xent_loss() -> type:
    path = _file_of("lightly", "loss/ntx_ent_loss.py")
    names = ("lightly", "lightly.models", "lightly.models.modules", "lightly.models.modules.memory_bank")
    modules = {name: types.ModuleType(name) for name in (*names, "lightly.utils")}
    modules[names[-1]].MemoryBankModule = _NoMemoryBank
    modules["lightly.utils"].dist = _load("lightly_dist", path.parent.parent / "utils" / "dist.py")
    with _stand_ins(modules):
        return _load("lightly_ntx_ent_loss", path).NTXentLoss
