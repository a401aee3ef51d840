"""What bench/drop_ins.py times side by side is the same loss."""

from __future__ import annotations

import pytest
import torch
from contrastile.bench import drop_ins
from support import INTERPRETING, unit_rows

pytestmark = pytest.mark.skipif(INTERPRETING, reason="it times what runs on a processor")


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "NTXentLoss", "MultipleNegativesRankingLoss"])
def test_class_and_function_are_one_loss(name):
    pairs = drop_ins.pairs_of()
    if name not in pairs:
        pytest.skip("its library is not installed")
    x, y = (unit_rows(20, 7, torch.float64, seed).requires_grad_() for seed in range(2))
    drop_in, function = pairs[name]
    torch.testing.assert_close(drop_in(x, y), function(x, y))
    of_both = (torch.autograd.grad(loss(x, y), (x, y)) for loss in (drop_in, function))
    torch.testing.assert_close(*of_both)


def test_prints_a_line_for_each(capsys):
    threads = torch.get_num_threads()
    assert drop_ins.main(["--rows", "32", "--dim", "8", "--rounds", "3", "--threads", str(threads)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "float32, N = 32, D = 8, medians of 3 rounds"
    assert [line.split()[0] for line in lines] == list(drop_ins.pairs_of())
    assert all(float(line.split()[1]) > 0 for line in lines)
