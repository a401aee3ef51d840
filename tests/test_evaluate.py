"""Retrieval ranks by the properties that users count on, and recall from ranks."""

from __future__ import annotations

import contrastile as ct
import pytest
import torch
from support import BACKENDS_HERE, INTERPRETING, Shape, towers


@pytest.fixture(params=BACKENDS_HERE)
def backend(request):
    return request.param


def test_ranks_count_the_strictly_better_candidates(backend):
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    y = torch.tensor([[3.0, 0.0], [3.0, 2.0], [0.0, 0.0], [1.0, 2.0]])
    assert ct.retrieval_ranks(x, y, backend=backend).tolist() == [0, 0, 3]
    assert ct.retrieval_ranks(x, y, torch.tensor([3, 0, 1]), backend=backend).tolist() == [2, 2, 0]


def test_duplicates_of_the_positive_do_not_outrank_it(backend):
    x, _ = towers(Shape(40, 40, 33))
    if INTERPRETING:  # NumPy's product may round a column by its place: take features whose sums are exact
        x = (64 * x).round() / 64
    y = x.repeat(3, 1)
    assert ct.retrieval_ranks(x, y, backend=backend).tolist() == [0] * 40


def test_ties_count_for_the_positive_so_a_collapsed_encoder_has_rank_0(backend):
    collapsed = torch.ones(9, 5)
    assert ct.retrieval_ranks(collapsed, collapsed.clone(), backend=backend).tolist() == [0] * 9


def test_masked_candidates_are_not_ranked(backend):
    x, y = towers(Shape(30, 50, 4), agreement=0.1)
    plain = ct.retrieval_ranks(x, y, backend=backend)
    everything = (torch.zeros(30, dtype=torch.int64), torch.zeros(50, dtype=torch.int64))
    assert plain.max() > 0
    assert ct.retrieval_ranks(x, y, groups=everything, backend=backend).tolist() == [0] * 30


def test_several_rows_may_share_a_positive(backend):
    """Five captions an image, captions as queries."""
    images, _ = towers(Shape(8, 8, 16))
    captions = images.repeat_interleave(5, 0)
    positives = torch.arange(40) // 5
    assert ct.retrieval_ranks(captions, images, positives, backend=backend).tolist() == [0] * 40


def test_ranks_carry_no_gradient_whatever_the_inputs_do(backend):
    x, y = towers(Shape(6, 6, 4))
    ranks = ct.retrieval_ranks(x.requires_grad_(), y.requires_grad_(), backend=backend)
    assert ranks.dtype == torch.int64
    assert not ranks.requires_grad


def test_autocast_changes_no_rank(backend):
    x, y = towers(Shape(60, 60, 16), agreement=0.2)
    expected = ct.retrieval_ranks(x, y, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ct.retrieval_ranks(x, y, backend=backend), expected)


def test_recall_is_the_share_of_rows_within_the_first_k():
    ranks = torch.tensor([0, 3, 1, 9, 10])
    assert ct.recall_at_k(ranks) == {1: 0.2, 5: 0.6, 10: 0.8}
    assert ct.recall_at_k(ranks, (2, 100)) == {2: 0.4, 100: 1.0}
