"""Every refusal by its message, and what non-finite values do instead."""

from __future__ import annotations

import math

import contrastile as ct
import numpy as np
import pytest
import torch
from support import BACKENDS_HERE

X = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
WIDE = torch.randn(12, 5, generator=torch.Generator().manual_seed(2))
ORDER = torch.arange(9).roll(2)
LOG_U = torch.full((9,), -3.0)
IDS = torch.zeros(9, dtype=torch.int64)
META = torch.empty(9, 5, device="meta")


def gamma(x=X, y=Y, scale=4.0, log_u=LOG_U, *arguments, **options):
    return ct.gamma_contrastive(x, y, scale, log_u, *arguments, **options)


def changed(values: torch.Tensor, at: int, value: float) -> torch.Tensor:
    values = values.clone()
    values[at] = value
    return values


# Functions of x and y, which share their checks
PAIRWISE = {
    "info_nce": lambda x=X, y=Y, scale=4.0, **options: ct.info_nce(x, y, scale, **options),
    "gamma": lambda x=X, y=Y, scale=4.0, **options: gamma(x, y, scale, LOG_U, LOG_U, **options),
    "log_normalizers": lambda x=X, y=Y, scale=4.0, **options: ct.log_normalizers(x, y, scale, **options),
    "retrieval_ranks": lambda x=X, y=Y, scale=4.0, **options: ct.retrieval_ranks(x, y, **options),
}

EMBEDDINGS = [
    ({"x": X[0]}, ValueError, r"x has shape \(5,\): expected \(rows, features\)"),
    ({"y": Y[None]}, ValueError, r"y has shape \(1, 9, 5\): expected \(rows, features\)"),
    ({"x": X.long()}, TypeError, r"x is torch.int64: expected float16, bfloat16, float32 or float64"),
    ({"y": Y + 1j}, TypeError, r"y is torch.complex64: expected float16"),
    ({"x": X.tolist()}, TypeError, r"x is list: expected a tensor of shape \(rows, features\)"),
    ({"y": Y.double()}, TypeError, r"x is torch.float32 but y is torch.float64: both need the same dtype"),
    ({"x": X.half(), "y": Y.bfloat16()}, TypeError, r"x is torch.float16 but y is torch.bfloat16"),
    ({"y": Y[:, :4]}, ValueError, r"x is \(9, 5\) but y is \(9, 4\): both need the same feature dimension"),
    ({"x": META, "y": META}, ValueError, r"x is on the meta device"),
    ({"y": META}, ValueError, r"y is on the meta device"),
    ({"x": X.to_sparse()}, TypeError, r"x has layout torch.sparse_coo: expected a dense tensor"),
    ({"x": X[:0]}, ValueError, r"x is \(0, 5\): a loss over no rows or no features is undefined"),
    ({"y": Y[:0]}, ValueError, r"y is \(0, 5\)"),
    ({"x": X[:, :0], "y": Y[:, :0]}, ValueError, r"x is \(9, 0\)"),
    ({"x": X[:0], "y": Y[:0]}, ValueError, r"x is \(0, 5\)"),
    ({"positives": ORDER[:8]}, ValueError, r"positives has shape \(8,\): expected \(9,\)"),
    ({"positives": ORDER[None]}, ValueError, r"positives has shape \(1, 9\): expected \(9,\)"),
    (
        {"positives": ORDER.float()},
        TypeError,
        r"positives is torch.float32: expected an integer tensor of shape \(9,\)",
    ),
    ({"positives": ORDER > 3}, TypeError, r"positives is torch.bool: expected an integer tensor"),
    ({"positives": ORDER.tolist()}, TypeError, r"positives is list: expected an integer tensor"),
    ({"positives": ORDER + 1}, ValueError, r"positives holds entries from 1 to 9: expected columns from 0 to 8"),
    ({"positives": ORDER - 1}, ValueError, r"positives holds entries from -1 to 7: expected columns from 0 to 8"),
    ({"positives": ORDER.to("meta")}, ValueError, r"positives is on meta, the embeddings are on cpu"),
    ({"groups": (IDS[:8], IDS)}, ValueError, r"groups\[0\] has shape \(8,\): expected \(9,\)"),
    ({"groups": (IDS, IDS[:8])}, ValueError, r"groups\[1\] has shape \(8,\): expected \(9,\)"),
    ({"groups": (IDS, IDS.float())}, TypeError, r"groups\[1\] is torch.float32: expected an integer tensor"),
    ({"groups": IDS}, TypeError, r"groups is torch.int64: expected \(row_ids, col_ids\)"),
    ({"groups": (IDS,)}, TypeError, r"groups is tuple: expected \(row_ids, col_ids\)"),
    ({"groups": (IDS, IDS.to("meta"))}, ValueError, r"groups\[1\] is on meta"),
    ({"backend": "cudnn"}, ValueError, r"backend is 'cudnn': expected one of 'triton', 'cuda', 'cpu', 'eager'"),
]


@pytest.mark.parametrize(
    ("arguments", "exception", "message"), EMBEDDINGS, ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("function", PAIRWISE)
def test_pairs(function, arguments, exception, message):
    with pytest.raises(exception, match=message):
        PAIRWISE[function](**arguments)


SCALES = [
    (0, ValueError, r"scale is 0: expected a finite number above 0"),
    (-1.0, ValueError, r"scale is -1.0: expected a finite number above 0"),
    (math.nan, ValueError, r"scale is nan"),
    (math.inf, ValueError, r"scale is inf"),
    (1e39, ValueError, r"scale is 1e\+39: expected a finite number above 0 in torch.float32"),
    (1e-60, ValueError, r"scale is 1e-60: expected a finite number above 0 in torch.float32"),
    (torch.tensor(1e39, dtype=torch.float64), ValueError, r"scale of shape \(\) holds 1e\+39: expected finite numbers"),
    ("20", TypeError, r"scale is str: expected a number or a floating-point tensor"),
    (True, TypeError, r"scale is bool"),
    (torch.tensor(-2.0), ValueError, r"scale of shape \(\) holds -2.0: expected finite numbers above 0"),
    (torch.tensor(math.nan), ValueError, r"scale of shape \(\) holds nan"),
    (changed(torch.ones(9), 3, 0.0), ValueError, r"scale of shape \(9,\) holds 0.0"),
    (changed(torch.ones(9), 8, math.inf), ValueError, r"scale of shape \(9,\) holds inf"),
    (torch.ones(1), ValueError, r"scale has shape \(1,\): expected a number, \(\) or \(9,\)"),
    (torch.ones(8), ValueError, r"scale has shape \(8,\): expected a number, \(\) or \(9,\)"),
    (torch.ones(9, 1), ValueError, r"scale has shape \(9, 1\)"),
    (torch.tensor(3), TypeError, r"scale is torch.int64: expected a floating-point tensor"),
    (torch.ones((), device="meta"), ValueError, r"scale is on meta, the embeddings are on cpu"),
]


@pytest.mark.parametrize(("scale", "exception", "message"), SCALES, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("function", ["info_nce", "gamma", "log_normalizers"])
def test_scale(function, scale, exception, message):
    with pytest.raises(exception, match=message):
        PAIRWISE[function](scale=scale)


OTHERS = [
    (lambda: ct.info_nce(X, Y, 4.0, reduction="median"), ValueError, r"reduction is 'median': expected one of 'none'"),
    (lambda: gamma(reduction="avg"), ValueError, r"reduction is 'avg'"),
    (lambda: ct.nt_xent(X[:8], 4.0, reduction=None), ValueError, r"reduction is None"),
    # fewer candidates than anchors
    (lambda: ct.info_nce(WIDE, Y, 4.0), ValueError, r"x is \(12, 5\) but y is \(9, 5\): without positives"),
    (lambda: ct.info_nce(WIDE, Y, 4.0, symmetric=False), ValueError, r"x is \(12, 5\) but y is \(9, 5\)"),
    (lambda: gamma(WIDE, Y, 4.0, torch.zeros(12)), ValueError, r"at least as many candidates as anchors"),
    (lambda: ct.retrieval_ranks(WIDE, Y), ValueError, r"at least as many candidates as anchors"),
    # both directions
    (lambda: ct.info_nce(X, WIDE, 4.0), ValueError, r"x is \(9, 5\) but y is \(12, 5\): both directions need as many"),
    (lambda: ct.info_nce(X, WIDE, 4.0, positives=ORDER), ValueError, r"both directions need as many anchors as cand"),
    (lambda: gamma(X, WIDE, 4.0, LOG_U, torch.zeros(12)), ValueError, r"both directions need as many"),
    (
        lambda: ct.info_nce(X, Y, 4.0, positives=changed(ORDER, 1, 2)),
        ValueError,
        r"positives repeats a column: both directions need a permutation",
    ),
    (lambda: gamma(X, Y, 4.0, LOG_U, LOG_U, positives=changed(ORDER, 1, 2)), ValueError, r"positives repeats a column"),
    (
        lambda: ct.log_normalizers(X, WIDE, 4.0, positives=changed(ORDER, 1, 2)),
        ValueError,
        r"positives repeats a column: both directions need distinct columns",
    ),
    # views
    (lambda: ct.nt_xent(X, 4.0), ValueError, r"z is \(9, 5\): two views of each sample need an even number of rows"),
    (lambda: ct.nt_xent(X[0], 4.0), ValueError, r"z has shape \(5,\)"),
    (lambda: ct.nt_xent(X[:0], 4.0), ValueError, r"z is \(0, 5\)"),
    (lambda: ct.nt_xent(X.int(), 4.0), TypeError, r"z is torch.int32"),
    (
        lambda: ct.nt_xent(X[:8], torch.ones(4)),
        ValueError,
        r"scale has shape \(4,\): expected a number, \(\) or \(8,\)",
    ),
    (lambda: ct.nt_xent(X, 4.0, positives=ORDER), ValueError, r"positives does not pair the rows up"),
    (lambda: ct.nt_xent(X, 4.0, positives=ORDER.flip(0)), ValueError, r"a row that is its own positive"),
    (lambda: ct.nt_xent(X[:8], 4.0, positives=ORDER), ValueError, r"positives has shape \(9,\): expected \(8,\)"),
    (lambda: ct.nt_xent(X[:8], 4.0, positives=torch.arange(8) + 4), ValueError, r"expected columns from 0 to 7"),
    # the gamma loss
    (lambda: gamma(log_u=LOG_U[:8]), ValueError, r"log_u has shape \(8,\): expected \(9,\)"),
    (lambda: gamma(log_u=-3.0), TypeError, r"log_u is float: expected a floating-point tensor of shape \(9,\)"),
    (lambda: gamma(log_u=LOG_U.long()), TypeError, r"log_u is torch.int64: expected a floating-point tensor"),
    (lambda: gamma(log_u=LOG_U.to("meta")), ValueError, r"log_u is on meta"),
    (lambda: gamma(X, Y, 4.0, LOG_U, LOG_U[:, None]), ValueError, r"log_v has shape \(9, 1\): expected \(9,\)"),
    (lambda: gamma(row_draws=LOG_U), ValueError, r"row_draws holds entries that are not above 0"),
    (lambda: gamma(row_draws=changed(-LOG_U, 2, 0.0)), ValueError, r"row_draws holds entries that are not above 0"),
    (lambda: gamma(row_draws=changed(-LOG_U, 2, math.nan)), ValueError, r"row_draws holds entries"),
    (lambda: gamma(row_draws=-LOG_U[:3]), ValueError, r"row_draws has shape \(3,\): expected \(9,\)"),
    (lambda: gamma(col_draws=-LOG_U), ValueError, r"col_draws is given without log_v"),
    (lambda: gamma(X, Y, 4.0, LOG_U, LOG_U, col_draws=LOG_U), ValueError, r"col_draws holds entries"),
    # the multiplier
    (lambda: gamma(log_multiplier=math.inf), ValueError, r"log_multiplier is inf: expected at most 40 in magnitude"),
    (lambda: gamma(log_multiplier=math.nan), ValueError, r"log_multiplier is nan: expected at most 40"),
    (lambda: ct.log_normalizers(X, Y, 4.0, log_multiplier=-81), ValueError, r"log_multiplier is -81: expected at most"),
    (lambda: ct.log_normalizers(X, Y, 4.0, log_multiplier="1"), TypeError, r"log_multiplier is str: expected a number"),
    # ranks
    (lambda: ct.recall_at_k(torch.zeros(3)), TypeError, r"ranks is torch.float32: expected integers"),
    (lambda: ct.recall_at_k([0, 1]), TypeError, r"ranks is list: expected a tensor of integers"),
    (lambda: ct.recall_at_k(IDS[:0]), ValueError, r"ranks has shape \(0,\): expected \(N,\) with N >= 1"),
    (lambda: ct.recall_at_k(IDS[None]), ValueError, r"ranks has shape \(1, 9\)"),
    (lambda: ct.recall_at_k(IDS, (1, 0)), ValueError, r"ks is \(1, 0\): expected whole numbers of at least 1"),
    (lambda: ct.recall_at_k(IDS, (1.5,)), ValueError, r"ks is \(1\.5,\): expected whole numbers of at least 1"),
    # the bias
    (lambda: ct.siglip(X, Y, 4.0, -1e39), ValueError, r"bias is -1e\+39: expected a finite number in torch.float32"),
]


@pytest.mark.parametrize(("call", "exception", "message"), OTHERS, ids=lambda v: v if isinstance(v, str) else "")
def test_others(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


def test_more_anchors_than_candidates_are_fine_in_one_direction_where_positives_say_so():
    """Several captions of one image, for example."""
    positives = torch.arange(12) % 9
    expected = ct.reference.info_nce(WIDE, Y, 4.0, symmetric=False, positives=positives)
    for backend in BACKENDS_HERE:
        loss = ct.info_nce(WIDE, Y, 4.0, symmetric=False, positives=positives, backend=backend)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_any_integer_type_serves_for_positives_and_groups(dtype):
    options = {"positives": ORDER, "groups": (torch.arange(9) % 3, torch.arange(9) % 4)}
    other = {"positives": ORDER.to(dtype), "groups": tuple(g.to(dtype) for g in options["groups"])}
    assert torch.equal(ct.info_nce(X, Y, 4.0, **other), ct.info_nce(X, Y, 4.0, **options))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16], ids=str)
def test_narrow_positives_serve_where_the_number_of_columns_does_not_fit_their_dtype(dtype):
    many = torch.cat([Y] * 3641)  # 1 column, and -32767, to 8 and 16 bits
    positives = ORDER + 50
    narrow = ct.info_nce(X, many, 4.0, symmetric=False, positives=positives.to(dtype))
    assert torch.equal(narrow, ct.info_nce(X, many, 4.0, symmetric=False, positives=positives))


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_scalars_of_numpy_are_numbers(kind):
    assert torch.equal(ct.info_nce(X, Y, kind(4)), ct.info_nce(X, Y, 4.0))
    x = X.clone().requires_grad_()
    loss = ct.info_nce(x, Y, 4.0, label_smoothing=kind(1))
    loss.backward()
    assert torch.equal(loss, ct.info_nce(X, Y, 4.0, label_smoothing=1.0))
    assert torch.equal(gamma(log_multiplier=kind(2)).loss, gamma(log_multiplier=2.0).loss)
    assert torch.equal(ct.siglip(X, Y, 4.0, kind(-1)), ct.siglip(X, Y, 4.0, -1.0))


# Non-finite values in the embeddings are no error: they show in what they affect

LOSSES = {
    "info_nce": lambda x, y, b: ct.info_nce(x, y, 4.0, backend=b),
    "one direction": lambda x, y, b: ct.info_nce(x, y, 4.0, symmetric=False, backend=b),
    "nt_xent": lambda x, y, b: ct.nt_xent(torch.cat([x, y]), 4.0, backend=b),
    "gamma": lambda x, y, b: gamma(x, y, 4.0, LOG_U, LOG_U, backend=b).loss,
    "gamma uncapped": lambda x, y, b: gamma(x, y, 4.0, LOG_U, cap=False, backend=b).loss,
    "row log-normalizers": lambda x, y, b: ct.log_normalizers(x, y, 4.0, backend=b)[0].sum(),
    "column log-normalizers": lambda x, y, b: ct.log_normalizers(x, y, 4.0, backend=b)[1].sum(),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "y"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_a_non_finite_entry_never_gives_a_finite_loss(backend, loss, where, value):
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    with torch.no_grad():
        (x if where == "x" else y)[4, 2] = value
    result = LOSSES[loss](x, y, backend)
    assert not result.isfinite()
    if math.isnan(value):
        assert result.isnan()
        result.backward()
        assert (x if where == "x" else y).grad[4].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_an_infinite_positive_logit_has_no_loss_like_in_cross_entropy(backend):
    x = -X.abs()
    x[4] *= -1
    y = changed(Y, 4, math.inf)  # plus infinity for its own row, minus infinity for the others
    ours = ct.info_nce(x, y, 4.0, symmetric=False, reduction="none", backend=backend)
    expected = torch.nn.functional.cross_entropy(4 * x @ y.T, torch.arange(9), reduction="none")
    assert expected.isnan().tolist() == [i == 4 for i in range(9)]
    torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_nan_log_weights_give_nan_in_their_row(backend):
    losses = gamma(log_u=changed(LOG_U, 4, math.nan), reduction="none", backend=backend).loss
    assert losses.isnan().tolist() == [i == 4 for i in range(9)]
