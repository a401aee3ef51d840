"""The last pass over the rows of gradients, and how often a step of training reads and writes its rows at all.

In Triton's interpreter, which tests/test_triton_interpreter.py starts.
"""

from __future__ import annotations

import math

import contrastile as ct
import pytest
import torch
from dense_sweeps import assert_finished
from support import BACKENDS_HERE, INTERPRETING, Shape
from test_triton_kernels import DTYPES, Guards, between_guards, rows_between_guards
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="test_triton_interpreter.py runs these")
if "triton" in BACKENDS_HERE:
    from contrastile.backends import triton, triton_launches
    from contrastile.backends.tiled import gradients as tiled_gradients
    from contrastile.backends.tiled.rows import RowSums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [Shape(1, 1, 1), Shape(67, 5, 3), Shape(9, 5, 256), Shape(7, 5, 520)], ids=str)
@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_rows_are_finished_with_all_factors_and_between_guards(shape, dtype, joined):
    rows, _, depth = shape
    sums, other = (torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    row_factors, factor, upstream = torch.linspace(0.1, 3, rows), torch.tensor([2.0**-20]), torch.tensor(2.0**19)
    x = rows_between_guards(torch.randn(depth, rows).to(dtype).T)
    guards = Guards()
    with guards:
        given = (
            triton.KERNELS,
            between_guards(sums),
            between_guards(other),
            True,
            True,
            False,
            factor,
            between_guards(row_factors),
        )
        found = RowSums(*given).finish(x, upstream, dtype, joined=joined)
    guards.check()
    assert_finished(found, x, row_factors[:, None] * sums.double() / 2, other.double() / 2, joined)


def test_a_transposed_batch_has_the_moments_of_its_copy():
    x, sums = torch.randn(40, 33).T, torch.randn(33, 40)
    found = RowSums(triton.KERNELS, sums, None, False, True, False).finish(x, None, torch.float32, joined=False)
    torch.testing.assert_close(found.row_moment, (x * sums).sum(1), rtol=1e-5, atol=1e-5)
    assert found.dx is None


class PassesOverRows(TorchDispatchMode):
    """Bytes of (N, D) tensors that operations of PyTorch outside of the sweeps read and write."""

    TOUCHES_NOTHING = (
        "empty",
        "new_empty",
        "view",
        "slice",
        "transpose",
        "detach",
        "alias",
        "addmm",
        "split",
        "_reshape_alias",
        "t",
    )

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.bytes = shape, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not name.startswith(self.TOUCHES_NOTHING):
            self.add(name, *([] if name.startswith("zero") else args), result)
        return result

    def add(self, name: str, *tensors: object) -> None:
        touched = sum(t.nbytes for t in tensors if isinstance(t, Tensor) and t.shape == self.shape)
        if touched:
            self.bytes[name] = self.bytes.get(name, 0) + touched


@pytest.mark.parametrize("kind", ["info_nce", "gamma"])
@pytest.mark.parametrize("form", ["fused", "strip"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_passes_over_its_rows_as_seldom_as_it_can(kind, form, dtype, monkeypatch):
    """Apart from the sweeps: logits of positives, zeros for both sums, and one last pass over each of these."""
    shape = (130, 96)
    size, entries = dtype.itemsize, math.prod(shape)
    if form == "strip":
        monkeypatch.setattr(triton.TritonKernels, "fused_plan", lambda kernels, problem, sums, capped: None)
    passes = PassesOverRows(shape)

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *tensors, **_: passes.add(self.name, *tensors)

    def start(sweep, kernel, programs, arguments, *_):
        if kernel is triton_launches.positives_kernel:
            passes.add("positives", arguments[0].anchors, arguments[0].candidates)

    monkeypatch.setattr(triton_launches.TritonSweep, "_start", start)
    monkeypatch.setattr(tiled_gradients, "_add_product", lambda *operands: None)
    monkeypatch.setattr(triton_launches, "finish_rows_kernel", Kernel("finish"))
    x, y = (torch.ones(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    scale, log_weights = torch.tensor(20.0, requires_grad=True), torch.zeros(len(x))
    with passes:
        if kind == "info_nce":
            loss = ct.info_nce(x, y, scale, backend="triton")
        else:
            loss = ct.gamma_contrastive(x, y, scale, log_weights, log_weights, backend="triton").loss
        torch.autograd.grad(loss, (x, y, scale))
    last = (4 + size + size) + (4 + size)  # dX with its moment, and dY
    assert passes.bytes == {"positives": 2 * size * entries, "zeros_like": 8 * entries, "finish": last * entries}
