"""bench/drop_ins.py times a class beside a function: both are one loss, by the same operations on the same shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from contrastile import use_backend
from contrastile.bench import drop_ins
from support import INTERPRETING, unit_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.skipif(INTERPRETING, reason="it times what runs on a processor")

NAMES = ["ClipLoss", "SigLipLoss", "NTXentLoss", "MultipleNegativesRankingLoss"]


class Operations(TorchDispatchMode):
    """Counts what is run, by name, shapes of tensors, and all other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, ...]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        arguments = [tuple(each.shape) if isinstance(each, Tensor) else each for each in tree_leaves((args, kwargs))]
        self.found[(str(function), *map(str, arguments))] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=NAMES)
def pair(request):
    pairs = drop_ins.pairs_of()
    if request.param not in pairs:
        pytest.skip("its library is not installed")
    return pairs[request.param]


def embeddings() -> tuple[Tensor, ...]:
    return tuple(unit_rows(20, 7, torch.float64, seed).requires_grad_() for seed in range(2))


def with_gradients(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    value = loss(x, y)
    return value, *torch.autograd.grad(value, (x, y))


def test_class_and_function_are_one_loss(pair):
    torch.testing.assert_close(*(with_gradients(loss, *embeddings()) for loss in pair))


def test_class_runs_no_operation_that_its_function_does_not_run(pair):
    """The eager backend's sweeps are operations of PyTorch, and so in the count."""
    found = []
    for loss in pair:
        x, y = embeddings()
        with use_backend("eager"), Operations() as operations:
            with_gradients(loss, x, y)
        found.append(operations.found)
    of_class, of_function = found
    assert any("(20, 7)" in arguments for _, *arguments in of_function)
    assert of_class == of_function


def test_prints_a_line_for_each(capsys):
    threads = torch.get_num_threads()
    assert drop_ins.main(["--rows", "32", "--dim", "8", "--rounds", "3", "--threads", str(threads)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "float32, N = 32, D = 8"
    assert [line.split()[0] for line in lines] == list(drop_ins.pairs_of())
    for line in lines:
        _, beyond, whole, share = line.replace(" us beyond", "").replace(" ms:", "").replace(" %", "").split()
        assert float(whole) > 0
        assert float(share) == pytest.approx(0.1 * float(beyond) / float(whole), rel=0.1, abs=0.02 / float(whole))
