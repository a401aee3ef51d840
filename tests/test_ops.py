"""The custom ops: PyTorch's own checks, gradients with and without formed ones, and compiled models."""

from __future__ import annotations

import contextlib
from unittest.mock import Mock

import contrastile as ct
import pytest
import torch
from contrastile import backends, functional
from contrastile.autograd import INPUTS
from contrastile.formulas import GammaTerms
from contrastile.validation import check_pairs, check_views
from contrastile.version import __version__
from support import BACKENDS_HERE, Shape, ids, permutation, towers
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.library import opcheck

SIZE = Shape(6, 6, 5)
ALL = (True, True, True)
NOTHING = (False, False, False)


@pytest.fixture(params=BACKENDS_HERE)
def backend(request):
    return request.param


def pair_inputs(requires_grad: bool, strided: bool = False, dtype=torch.float32, **options):
    x, y = towers(SIZE, dtype)
    if strided:
        x, y = x.T.contiguous().T, torch.stack([y, y], 2)[..., 0]
    scale = torch.tensor(4.0)
    options = {"positives": None, "groups": None, "both_directions": True} | options
    inputs = check_pairs(x, y, scale, **options)
    for leaf in inputs[:3]:
        leaf.requires_grad_(requires_grad)
    return inputs


def view_inputs(requires_grad: bool, per_row: bool = False):
    z, _ = towers(SIZE)
    scale = torch.linspace(2, 5, SIZE.rows) if per_row else torch.tensor(4.0)
    return check_views(z.requires_grad_(requires_grad), scale.requires_grad_(requires_grad), None)


def gamma_terms(both_directions: bool = True, draws: bool = False):
    log_u, log_v = torch.linspace(-6, -2, SIZE.rows), torch.linspace(-2, -5, SIZE.rows)
    row_draws = torch.linspace(0.5, 1.5, SIZE.rows) if draws else None
    col_draws = row_draws.flip(0) if draws and both_directions else None
    return GammaTerms(log_u, log_v if both_directions else None, row_draws, col_draws, 0.5, True)


def traced(backend):
    return backend, __version__


GROUPS = (ids(SIZE.rows, 3), ids(SIZE.rows, 3))
CASES = {  # g: whether gradients are required; b: the backend and the release
    "info_nce": lambda g, b: (*pair_inputs(g), True, "mean", *(ALL if g else NOTHING), *b),
    "info_nce-strided": lambda g, b: (*pair_inputs(g, strided=True), True, "mean", *(ALL if g else NOTHING), *b),
    "info_nce-one-direction": lambda g, b: (*pair_inputs(g, groups=GROUPS), False, "sum", *(ALL if g else NOTHING), *b),
    "info_nce-none": lambda g, b: (*pair_inputs(g, strided=True), True, "none", *(ALL if g else NOTHING), *b),
    "info_nce-nothing-formed": lambda g, b: (*pair_inputs(g), True, "mean", *NOTHING, *b),
    "info_nce-float16": lambda g, b: (*pair_inputs(g, dtype=torch.float16), True, "mean", *NOTHING, *b),
    "info_nce-of-views": lambda g, b: (*view_inputs(g), False, "mean", g, False, g, *b),
    "info_nce-of-views-per-row": lambda g, b: (*view_inputs(g, per_row=True), False, "mean", g, False, g, *b),
    "gamma_contrastive": lambda g, b: (*pair_inputs(g), *gamma_terms(draws=True), "mean", *(ALL if g else NOTHING), *b),
    "gamma_contrastive-rows": lambda g, b: (*pair_inputs(g, strided=True), *gamma_terms(False), "none", *NOTHING, *b),
    "log_normalizers": lambda g, b: (*pair_inputs(g), True, 0.5, *b),
    "log_normalizers-rows": lambda g, b: (*pair_inputs(g, strided=True), False, 0.0, *b),
    "retrieval_ranks": lambda g, b: (*pair_inputs(False, strided=g), b[0]),
}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires-grad"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(backend, case, requires_grad):
    op = getattr(torch.ops.contrastile, case.split("-")[0]).default
    opcheck(op, CASES[case](requires_grad, traced(backend)))


@pytest.mark.parametrize("strided", [False, True])
def test_opcheck_of_the_backward_op(backend, strided):
    rows = torch.linspace(-1, 1, SIZE.rows)
    weights = (rows, rows + 2, rows.flip(0), rows.square(), -rows, "exponential")
    opcheck(torch.ops.contrastile.pair_grad.default, (*pair_inputs(False, strided), *weights, *ALL, backend))


@pytest.mark.parametrize("form", [ALL, NOTHING, (True, False, False)], ids=["all", "nothing", "only-dx"])
@pytest.mark.parametrize("case", ["info_nce", "info_nce-of-views", "gamma_contrastive"])
def test_gradients_do_not_depend_on_what_the_forward_formed(backend, case, form):
    def gradients(form):
        arguments = list(CASES[case](True, traced(backend)))
        arguments[-5:-2] = form
        loss, *_ = getattr(torch.ops.contrastile, case.split("-")[0])(*arguments)
        leaves = [leaf for leaf in arguments[:3] if leaf is not None]
        return torch.autograd.grad(3 * loss, leaves, retain_graph=True), torch.autograd.grad(3 * loss, leaves)

    first, again = gradients(form)
    expected, _ = gradients(ALL)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(again, expected)


def test_only_the_values_of_an_op_carry_gradients(backend):
    loss, *others = torch.ops.contrastile.info_nce(*CASES["info_nce"](True, traced(backend)))
    assert loss.requires_grad
    assert not any(other.requires_grad for other in others)
    row_lse, col_lse, *others = torch.ops.contrastile.log_normalizers(*CASES["log_normalizers"](True, traced(backend)))
    assert row_lse.requires_grad
    assert col_lse.requires_grad
    assert not any(other.requires_grad for other in others)


def test_second_derivative_of_an_op_names_the_reference(backend):
    for case in ("info_nce", "gamma_contrastive", "log_normalizers"):
        arguments = CASES[case](True, traced(backend))
        value, *_ = getattr(torch.ops.contrastile, case)(*arguments)
        [gradient] = torch.autograd.grad(value.sum(), arguments[0], create_graph=True)
        with pytest.raises(RuntimeError, match=r"first derivatives only.*contrastile\.reference"):
            gradient.sum().backward()


# Compiled models


class Towers(torch.nn.Module):
    """A small model that ends in one of the losses."""

    def __init__(self, loss: str, backend: str):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = torch.nn.Linear(7, 5), torch.nn.Linear(7, 5)
        self.log_scale = torch.nn.Parameter(torch.tensor(1.0))
        self.loss, self.backend = loss, backend

    def forward(self, left, right):
        x, y, scale = self.left(left), self.right(right), self.log_scale.exp()
        backend = {"backend": self.backend}
        if self.loss == "info_nce":
            return ct.info_nce(x, y, scale, **backend)
        if self.loss == "info_nce-rows-none":
            return ct.info_nce(x, y, 3.0, symmetric=False, reduction="none", **backend).square().sum()
        if self.loss == "nt_xent":
            return ct.nt_xent(torch.cat([x, y]), scale, **backend)
        if self.loss == "gamma":
            log_weights = -x.detach().sum(1) - 3
            output = ct.gamma_contrastive(x, y, scale, log_weights, log_weights, log_multiplier=0.5, **backend)
            return output.loss + output.row_lse.mean() + output.col_lse.mean()
        row_lse, col_lse = ct.log_normalizers(x, y, scale, columns=self.loss == "log_normalizers", **backend)
        return row_lse.sum() - (0 if col_lse is None else col_lse.mean())


LOSSES = ["info_nce", "info_nce-rows-none", "nt_xent", "gamma", "log_normalizers", "log_normalizers-rows"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model, call, rows):
    generator = torch.Generator().manual_seed(rows)
    left, right = (torch.randn(rows, 7, generator=generator) for _ in range(2))
    model.zero_grad()
    loss = call(left, right)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_model_equals_eager(backend, loss):
    model = Towers(loss, backend)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for rows in (8, 12):
        torch.testing.assert_close(step(model, compiled, rows), step(model, model, rows))
    left = torch.randn(8, 7)
    with torch.no_grad():
        torch.testing.assert_close(compiled(left, left), model(left, left))


@pytest.mark.slow
def test_inductor_equals_eager(backend):
    model = Towers("info_nce", backend)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(step(model, compiled, 8), step(model, model, 8))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["info_nce", "gamma", "log_normalizers"])
def test_a_compiled_graph_kept_on_disk_serves_its_own_release_only(loss, monkeypatch):
    """It holds the backward of the release it was traced with."""
    model = Towers(loss, "eager")

    def graphs_found():
        torch._dynamo.reset()
        counters.clear()
        step(model, torch.compile(model, fullgraph=True), 8)
        return counters["aot_autograd"]["autograd_cache_hit"]

    graphs_found()
    assert graphs_found() == 1
    monkeypatch.setattr(functional, "__version__", "another")
    assert graphs_found() == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_one_compilation_serves_all_batch_sizes(loss):
    counter = CompileCounterWithBackend("aot_eager")
    model = Towers(loss, "eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    step(model, compiled, 8)
    compilations = counter.frame_count
    for rows in (8, 12, 30):
        torch.testing.assert_close(step(model, compiled, rows), step(model, model, rows))
    assert counter.frame_count == compilations


def test_a_compiled_step_is_one_sweep(backend, monkeypatch):
    """Gradients are formed with the loss in a compiled graph too."""
    model = Towers("info_nce", backend)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step(model, compiled, 8)
    sweeps = backends.get(backend)
    grad = Mock(wraps=sweeps.pair_grad)
    monkeypatch.setattr(backends, "get", lambda name: Mock(pair_grad=grad, spec=["pair_grad"]))
    step(model, compiled, 8)
    assert grad.call_count == 1


def test_compiled_under_autocast_equals_eager_under_autocast(backend):
    model = Towers("info_nce", backend)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def autocast(call):
        def run(*inputs):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call(*inputs)

        return run

    torch.testing.assert_close(step(model, autocast(compiled), 8), step(model, autocast(model), 8))


def test_masks_in_a_compiled_graph(backend):
    x, y = towers(SIZE)
    order = permutation(SIZE.rows)

    def loss(x, y):
        return ct.info_nce(x, y, 4.0, positives=order, groups=GROUPS, backend=backend)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), loss(x, y))


def test_numbers_that_change_between_calls_of_a_compiled_graph(backend):
    x, y = towers(SIZE)

    def lse(scale, log_multiplier):
        leaf = x.clone().requires_grad_()
        row_lse, _ = ct.log_normalizers(leaf, y, scale, log_multiplier=log_multiplier, backend=backend)
        return row_lse, torch.autograd.grad(row_lse.sum(), leaf)[0]

    def forward(x, scale, log_multiplier):
        return ct.log_normalizers(x, y, scale, log_multiplier=log_multiplier, backend=backend)[0]

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for scale, log_multiplier in ((4.0, 0.5), (3.0, 1.5), (2.0, -1.0)):
        leaf = x.clone().requires_grad_()
        row_lse = compiled(leaf, scale, log_multiplier)
        torch.testing.assert_close((row_lse, torch.autograd.grad(row_lse.sum(), leaf)[0]), lse(scale, log_multiplier))


def test_ranks_in_a_compiled_graph(backend):
    x, y = towers(SIZE)
    compiled = torch.compile(
        lambda x, y: ct.retrieval_ranks(x, y, backend=backend), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x, y), ct.retrieval_ranks(x, y, backend=backend))


def test_a_compiled_graph_keeps_the_backend_chosen_while_tracing():
    x, y = towers(SIZE)
    compiled = torch.compile(lambda x, y: ct.info_nce(x, y, 4.0), backend="aot_eager", fullgraph=True)
    for context in (ct.use_backend("eager"), contextlib.nullcontext()):
        with context:
            torch.testing.assert_close(compiled(x, y), ct.info_nce(x, y, 4.0, backend="eager"))


def test_every_op_takes_the_inputs_first():
    expected = ["x", "y", "scale", "positives", "row_groups", "col_groups", "row_ceiling"]
    for name in ("info_nce", "gamma_contrastive", "log_normalizers", "retrieval_ranks", "pair_grad"):
        arguments = getattr(torch.ops.contrastile, name).default._schema.arguments
        assert [a.name for a in arguments[:INPUTS]] == expected
