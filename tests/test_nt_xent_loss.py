"""NTXentLoss takes the place of lightly's, within the batch and against a memory bank."""

from __future__ import annotations

import inspect
import math
import types

import pytest
import torch
from contrastile import reference
from contrastile.losses import NTXentLoss
from support import BACKENDS_HERE, _file_of, _load, _stand_ins, assert_as_exact_as_dense
from torch import nn
from torch.nn import functional as F


def lightly_loss() -> type:
    """NTXentLoss of lightly with its own memory bank, from their files: the package needs torchvision."""
    root = _file_of("lightly", "loss/ntx_ent_loss.py").parent.parent
    modules = {
        name: types.ModuleType(name)
        for name in ("lightly", "lightly.models", "lightly.models.utils", "lightly.models.modules", "lightly.utils")
    }
    modules["lightly.models"].utils = modules["lightly.models.utils"]
    modules["lightly.utils"].dist = _load("lightly_dist", root / "utils" / "dist.py")
    with _stand_ins(modules):
        bank = _load("lightly_memory_bank", root / "models" / "modules" / "memory_bank.py")
    modules["lightly.models.modules.memory_bank"] = bank
    with _stand_ins(modules):
        return _load("lightly_ntx_ent_loss", root / "loss" / "ntx_ent_loss.py").NTXentLoss


def views(rows: int, dim: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, rows, dim, generator=generator).unbind()
    return first * 3, first + second


def truth(x, y, temperature):
    return reference.nt_xent(torch.cat([F.normalize(x, dim=1), F.normalize(y, dim=1)]), 1 / temperature)


@pytest.mark.parametrize("temperature", [0.5, 0.02])
@pytest.mark.parametrize("shape", [(1, 3), (2, 5), (33, 65), (129, 48)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_loss_and_gradients_are_as_exact_as_lightlys(backend, shape, temperature):
    theirs, ours = lightly_loss()(temperature), NTXentLoss(temperature, backend=backend)
    out0, out1 = views(*shape)
    assert_as_exact_as_dense(
        lambda x, y: ours(x, y),
        lambda x, y: theirs(x, y),
        lambda x, y: truth(x, y, temperature),
        {"x": out0, "y": out1},
    )


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("rows", [3, 5, 8, 11])
def test_memory_bank_holds_and_scores_what_lightlys_does(backend, rows):
    torch.manual_seed(5)
    theirs = lightly_loss()(0.1, memory_bank_size=(8, 6))
    torch.manual_seed(5)
    ours = NTXentLoss(0.1, memory_bank_size=(8, 6), backend=backend)
    for step in range(5):
        out0, out1 = views(rows, 6, seed=step)
        out0.requires_grad_(step != 3)
        gradients = []
        for loss_of in (theirs, ours):
            out1.requires_grad_().grad = None
            out0.grad = None
            loss = loss_of(out0, out1)
            loss.backward()
            gradients.append((loss.detach(), out1.grad, out0.grad))
        for their_value, our_value in zip(*gradients, strict=True):
            if their_value is not None:
                torch.testing.assert_close(our_value, their_value, rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.memory_bank.bank, theirs.memory_bank.bank)
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


def test_memory_bank_stays_as_it_is_where_out0_needs_no_gradient():
    loss = NTXentLoss(memory_bank_size=(8, 6))
    before = loss.memory_bank.bank.clone()
    out0, out1 = views(3, 6)
    assert torch.equal(loss(out0, out1), loss(out0, out1))
    assert torch.equal(loss.memory_bank.bank, before)


# Inductor drops copies that look needless: there, a backward could read the bank after the write.
@pytest.mark.parametrize(
    ("size", "compiler"),
    [(0, "aot_eager"), ((8, 6), "aot_eager"), pytest.param((8, 6), "inductor", marks=pytest.mark.slow)],
    ids=["batch", "bank", "bank-inductor"],
)
def test_compiles_without_a_graph_break_and_reads_the_bank_as_it_was(size, compiler):
    def run(compiled):
        torch.manual_seed(3)
        tower, module = nn.Linear(7, 6), NTXentLoss(memory_bank_size=size)

        def step(first, second):
            return module(tower(first), tower(second))

        if compiled:
            torch.compiler.reset()
            step = torch.compile(step, fullgraph=True, backend=compiler)
        seen = []
        for t in range(4):
            loss = step(*views(5, 7, seed=t))
            seen += [loss.detach(), *torch.autograd.grad(loss, list(tower.parameters()))]
        return [*seen, module.memory_bank.bank, module.memory_bank.bank_ptr]

    for ours, plain in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("size", [0, (8, 6)], ids=["batch", "bank"])
def test_sixteen_bit_projections_give_a_float32_loss(size):
    out0, out1 = (view.to(torch.bfloat16) for view in views(5, 6))
    module = NTXentLoss(memory_bank_size=size)
    out0.requires_grad_()
    loss = module(out0, out1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert out0.grad.dtype == torch.bfloat16
    assert module.memory_bank.bank.dtype == torch.float32


def test_constructor_and_call_have_lightlys_arguments_in_its_order():
    theirs = lightly_loss()
    for name in ("__init__", "forward"):
        wanted = inspect.signature(getattr(theirs, name)).parameters
        ours = inspect.signature(getattr(NTXentLoss, name)).parameters
        positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
        assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in wanted.values()]


def test_state_dict_has_lightlys_entries():
    assert NTXentLoss(memory_bank_size=(8, 6)).state_dict() == {}
    assert lightly_loss()(memory_bank_size=(8, 6)).state_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0: expected a number above"),
        ({"temperature": -0.5}, "temperature is -0.5: expected a number above"),
        ({"memory_bank_size": 64}, r"memory_bank_size is 64: expected \(entries, dim\)"),
        ({"memory_bank_size": (64, -1)}, r"memory_bank_size is \(64, -1\): expected no negative entries"),
        ({"memory_bank_size": (64, 2, 2)}, r"memory_bank_size is \(64, 2, 2\): expected \(entries, dim\)"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NTXentLoss(**options)


def test_views_that_do_not_fit_are_named():
    out0, out1 = views(5, 6)
    with pytest.raises(ValueError, match=r"out0 is \(5, 6\) and out1 is \(4, 6\): expected \(B, D\) each"):
        NTXentLoss()(out0, out1[:4])
    with pytest.raises(ValueError, match=r"out0 and out1 are \(5, 6\), but the memory bank is \(8, 7\)"):
        NTXentLoss(memory_bank_size=(8, 7))(out0, out1)


@pytest.mark.parametrize("size", [0, (8, 6)], ids=["batch", "bank"])
def test_nan_in_gives_nan_out(size):
    out0, out1 = views(5, 6)
    out0[2, 3] = torch.nan
    assert bool(NTXentLoss(memory_bank_size=size)(out0, out1).isnan())


def test_memory_bank_loss_of_a_hopeless_pair_is_exact_in_float64():
    # log(1 + exp(gap)) at a gap of 22: softplus as PyTorch has it by default would return the gap itself.
    loss = NTXentLoss(temperature=1 / 11, memory_bank_size=(1, 2))
    view = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    loss.memory_bank.bank = view.clone()
    found = loss(view, -view).item()
    assert found - 22 == pytest.approx(math.exp(-22), rel=1e-5)
