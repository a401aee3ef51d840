"""Latent modality structures against their dense oracle, float64 derivatives, and what they promise."""

from __future__ import annotations

import contrastile as ct
import pytest
import torch
import torch.nn.functional as F
from contrastile import reference
from support import BACKENDS_HERE, DTYPES, assert_as_exact_as_dense, small_workspace, unit_rows
from torch.autograd import gradcheck

GC, BRIDGE, SEPARATION, FOUR = (
    "geometric_consistency",
    "brownian_bridge",
    "feature_separation",
    "four_way_contrastive",
)
NAMES = {
    GC: ("v", "t", "v_aug", "t_aug"),
    BRIDGE: ("v_aug", "v", "t"),
    SEPARATION: ("v", "t", "v_ind", "t_ind", "v_ind_aug", "t_ind_aug"),
    FOUR: ("v", "t", "v_aug", "t_aug"),
}
WEIGHTS = {"row_weights": torch.tensor([0.0, 2, 1, 0.5, 1.5, 3, 1, 0.25, 1])}
CASES = {
    "gc": (GC, 2, {}),
    "gc-cross": (GC, 2, {"in_weight": 0.0}),
    "gc-in": (GC, 2, {"cross_weight": 0.0}),
    "gc-unequal": (GC, 2, {"cross_weight": 0.25, "in_weight": 2.0}),
    "gc-augmented": (GC, 4, {"cross_weight": 0.25}),
    "bridge": (BRIDGE, 3, {}),
    "bridge-likelihood": (BRIDGE, 3, {"time": 0.6, "likelihood_weight": True}),
    "bridge-sum": (BRIDGE, 3, {"time": torch.tensor(0.5), "reduction": "sum"}),
    "bridge-none": (BRIDGE, 3, {"time": 1.0, "reduction": "none"}),
    "separation": (SEPARATION, 6, {"scale": 12.0}),
    "separation-printed": (SEPARATION, 6, {"scale": 12.0, "printed_denominators": True}),
    "separation-printed-alone": (SEPARATION, 4, {"scale": 12.0, "printed_denominators": True}),
    "four": (FOUR, 4, {"scale": 9.0}),
    "four-printed": (FOUR, 4, {"scale": 9.0, "printed_denominators": True}),
}
SHAPES = [(2, 3), (7, 1), (9, 5), (5, 9), (65, 33), (100, 7), (130, 257)]


def features(case, shape, dtype=torch.float32):
    name, count, options = CASES[case]
    shared = unit_rows(*shape, torch.float64, seed=9)
    rows = [F.normalize(shared + 0.7 * unit_rows(*shape, torch.float64, seed=i), dim=1) for i in range(count)]
    return {key: part.to(dtype) for key, part in zip(NAMES[name], rows, strict=False)}, options


def both(case, backend=None, **more):
    name, _, options = CASES[case]
    options = options | more
    return (
        lambda **leaves: getattr(ct, name)(**leaves, **options, backend=backend),
        lambda **leaves: getattr(reference, name)(**leaves, **options),
    )


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_as_exact_as_dense(case, shape, dtype, backend):
    inputs, _ = features(case, shape, dtype)
    ours, dense = both(case, backend)
    # Luck decides the dense error of few entries, and one of 16 bits that is rounded once more than another.
    assert_as_exact_as_dense(ours, dense, dense, inputs, slack=4)


ARRANGEMENTS = {
    "nearly equal": lambda rows, depth: (
        unit_rows(1, depth, torch.float64) + 0.01 * unit_rows(rows, depth, torch.float64)
    ),
    "opposite": lambda rows, depth: unit_rows(1, depth, torch.float64) * torch.tensor([[1.0], [-1.0]]),
    "any": lambda rows, depth: unit_rows(rows, depth, torch.float64),
}


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [5, 50])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_uniformity_of_long_rows_neither_overflows_nor_vanishes(arrangement, norm, dtype, backend):
    rows = norm * F.normalize(ARRANGEMENTS[arrangement](6, 8), dim=1)
    inputs = {name: rows.to(dtype) for name in ("v_ind", "t_ind")}
    unit = unit_rows(len(rows), 8, torch.float64, seed=1)

    def beside_unit_rows(loss):
        return lambda **long: loss(**dict.fromkeys(NAMES[SEPARATION], unit.to(long["v_ind"].dtype)) | long)

    ours, dense = map(beside_unit_rows, both("separation", backend, scale=1.0))
    assert dense(**inputs).isfinite()
    # Exponents are four times the products whose rounding is allowed for, and luck decides as above.
    assert_as_exact_as_dense(ours, dense, dense, inputs, slack=4 * 4)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("shape", [(9, 3), (4, 6)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_loss_are_its_derivatives(case, shape, backend):
    inputs, _ = features(case, shape, torch.float64)
    leaves = [1.3 * part.requires_grad_() for part in inputs.values()]
    ours, _ = both(case, backend)
    assert gradcheck(lambda *parts: ours(**dict(zip(inputs, parts, strict=True))), leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("case", ["gc", "gc-unequal", "gc-augmented"])
@pytest.mark.parametrize("depth", [3, 20])
def test_weights_of_rows_drop_and_repeat_them(case, depth):
    inputs, _ = features(case, (9, depth), torch.float64)
    ours, dense = both(case, **WEIGHTS)
    assert_as_exact_as_dense(ours, dense, dense, inputs)
    whole, _ = both(case)
    counts = torch.tensor([0, 2, 1, 1, 0, 1, 3, 1, 1])
    weighted, _ = both(case, row_weights=counts.double())
    repeated = whole(**{name: part.repeat_interleave(counts, 0) for name, part in inputs.items()})
    torch.testing.assert_close(weighted(**inputs), repeated)


def test_chunks_of_rows_add_up():
    inputs, _ = features("gc-augmented", (700, 40), torch.float64)
    ours, dense = both("gc-augmented", "eager", row_weights=torch.linspace(0, 2, 700))
    with small_workspace(64 * 2**10):
        assert_as_exact_as_dense(ours, dense, dense, inputs)


def near(rows, depth, gap=1e-3):
    """Rows around a common direction, as trained embeddings are."""
    common = unit_rows(1, depth, torch.float64, seed=3)
    v = F.normalize(common + 0.3 * unit_rows(rows, depth, torch.float64, seed=1), dim=1)
    return v.float(), (v + gap * unit_rows(rows, depth, torch.float64, seed=2)).float()


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.25, 2.0)], ids=str)
@pytest.mark.parametrize("rows", [40, 900])
def test_gc_keeps_its_digits_where_v_is_within_a_thousandth_of_t_and_the_textbook_form_has_none(rows, weights):
    v, t = near(rows, 64)
    options = {"cross_weight": weights[0], "in_weight": weights[1]}
    exact = [part.double().requires_grad_() for part in (v, t)]
    truth = reference.geometric_consistency(*exact, **options)
    truth.backward()
    leaves = [part.clone().requires_grad_() for part in (v, t)]
    loss = ct.geometric_consistency(*leaves, **options)
    loss.backward()
    assert abs(loss.item() / truth.item() - 1) < 1e-5
    for ours, expected in zip(leaves, exact, strict=True):
        assert (ours.grad.double() - expected.grad).norm() < 1e-5 * expected.grad.norm()
    if weights == (0.0, 1.0):
        a, b, c = v.T @ v, t.T @ t, v.T @ t
        textbook = (a.square().sum() + b.square().sum() - 2 * c.square().sum()) / rows
        assert abs(textbook.item() / truth.item() - 1) > 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 9), (300, 9)], ids=str)
@pytest.mark.parametrize("options", [{}, {"in_weight": 0.5}], ids=str)
def test_gc_of_equal_modalities_is_exactly_zero_without_gradients(shape, dtype, options):
    v = unit_rows(*shape, dtype).requires_grad_()
    t = v.detach().clone().requires_grad_()
    loss = ct.geometric_consistency(v, t, **options)
    loss.backward()
    assert loss.item() == 0
    assert v.grad.count_nonzero() == t.grad.count_nonzero() == 0


@pytest.mark.parametrize("depth", [6, 80])
def test_cyclips_two_losses_are_special_cases(depth):
    """Goel et al. 2022: both squared differences of N x N products, a mean over N^2 times N."""
    image, text = unit_rows(50, depth, torch.float64, 1), unit_rows(50, depth, torch.float64, 2)
    across = image @ text.T
    cross_modal = (across - across.T).square().mean() * 50
    in_modal = (image @ image.T - text @ text.T).square().mean() * 50
    torch.testing.assert_close(ct.geometric_consistency(image, text, in_weight=0), cross_modal)
    torch.testing.assert_close(ct.geometric_consistency(image, text, cross_weight=0), in_modal)
    cyclip = ct.GeometricConsistencyLoss(0.25, 0.25)(image, text)
    torch.testing.assert_close(cyclip, 0.25 * cross_modal + 0.25 * in_modal)


def test_bridge_of_unit_rows_equals_the_corrected_second_line_and_not_the_printed_mean():
    aug, v, t = (unit_rows(31, 12, torch.float64, seed) for seed in range(3))
    time = 0.25
    length = (time**2 + (1 - time) ** 2 + 2 * time * (1 - time) * (v * t).sum(1)).sqrt()
    corrected = 2 - 2 * (time * (v * aug).sum(1) + (1 - time) * (t * aug).sum(1)) / length
    torch.testing.assert_close(ct.brownian_bridge(aug, v, t, time=time, reduction="none"), corrected)


def test_the_likelihood_weight_makes_it_the_log_density_of_a_bridge():
    """Up to the normaliser: normal around the mean, variance time (1 - time) in every feature."""
    aug, v, t = (unit_rows(4, 3, torch.float64, seed) for seed in range(3))
    time = 0.3
    mean = F.normalize(time * v + (1 - time) * t, dim=1)
    density = torch.distributions.Normal(mean, (time * (1 - time)) ** 0.5)
    expected = -density.log_prob(aug).sum(1) + density.log_prob(mean).sum(1)
    found = ct.brownian_bridge(aug, v, t, time=time, likelihood_weight=True, reduction="none")
    torch.testing.assert_close(found, expected)


def test_uniform_times_are_drawn_for_every_row_and_call():
    aug, v, t = (unit_rows(6, 5, seed=seed) for seed in range(3))
    loss = ct.BrownianBridgeLoss("uniform", reduction="none", generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        times = torch.rand(6, generator=generator)
        torch.testing.assert_close(loss(aug, v, t), reference.brownian_bridge(aug, v, t, time=times, reduction="none"))


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_detached_augmentations_get_no_gradient_and_the_others_the_same(backend):
    aug, v, t = (unit_rows(6, 5, seed=seed).requires_grad_() for seed in range(3))
    ct.BrownianBridgeLoss(detach_aug=True, backend=backend)(aug, v, t).backward()
    assert aug.grad is None
    expected = torch.autograd.grad(reference.brownian_bridge(aug, v, t), (v, t))
    torch.testing.assert_close((v.grad, t.grad), expected)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("case", CASES)
def test_upstream_factors_retained_graphs_and_no_grad(case, backend):
    inputs, _ = features(case, (12, 5))
    ours, dense = both(case, backend)
    leaves = {name: part.requires_grad_() for name, part in inputs.items()}
    loss = ours(**leaves).sum()
    expected = torch.autograd.grad(dense(**leaves).sum(), leaves.values())
    for factor in (3.0, -0.5):
        found = torch.autograd.grad(factor * loss, leaves.values(), retain_graph=True)
        torch.testing.assert_close(found, tuple(factor * g for g in expected), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        alone = ours(**leaves)
    assert alone.grad_fn is None
    torch.testing.assert_close(alone.sum(), loss.detach())


@pytest.mark.parametrize("case", CASES)
def test_a_second_derivative_names_the_reference(case):
    inputs, _ = features(case, (6, 5))
    leaves = {name: part.requires_grad_() for name, part in inputs.items()}
    loss = both(case)[0](**leaves).sum()
    gradient = torch.autograd.grad(loss, leaves["v"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"contrastile\.reference"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("case", ["gc-augmented", "bridge", "separation", "four"])
def test_autocast_changes_neither_the_precision_nor_the_result(case):
    inputs, _ = features(case, (200, 24))
    leaves = {name: part.requires_grad_() for name, part in inputs.items()}
    plain = both(case)[0](**leaves)
    expected = torch.autograd.grad(plain, leaves.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = both(case)[0](**leaves)
        found = torch.autograd.grad(cast, leaves.values())
    torch.testing.assert_close(cast, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gc-augmented", "gc-unequal", "bridge", "separation", "four"])
def test_compiled_graphs_hold_the_whole_loss(case):
    inputs, _ = features(case, (40, 6))
    leaves = {name: part.requires_grad_() for name, part in inputs.items()}
    ours, dense = both(case)
    loss = torch.compile(ours, fullgraph=True, backend="aot_eager")(**leaves)
    torch.testing.assert_close(loss, dense(**leaves))
    found, expected = (torch.autograd.grad(of, leaves.values()) for of in (loss, dense(**leaves)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_modules_call_their_functions():
    (v, t, v_ind, t_ind, v_aug, t_aug), _ = (
        list(part.values()) if isinstance(part, dict) else part for part in features("separation", (9, 5))
    )
    separation = ct.FeatureSeparationLoss(7.0)(v, t, v_ind, t_ind, v_aug, t_aug)
    torch.testing.assert_close(separation, ct.feature_separation(v, t, v_ind, t_ind, v_aug, t_aug, scale=7.0))
    four = ct.FourWayContrastiveLoss(printed_denominators=True)(v, t, v_aug, t_aug, 9.0)
    torch.testing.assert_close(four, ct.four_way_contrastive(v, t, v_aug, t_aug, 9.0, printed_denominators=True))
    heads = ct.SeparatingHeads(5, 3)
    shared, independent = heads(v)
    torch.testing.assert_close(shared, F.normalize(v @ heads.shared.weight.T, dim=1))
    torch.testing.assert_close(independent, F.normalize(v @ heads.independent.weight.T, dim=1))


V, T = unit_rows(9, 5), unit_rows(9, 5, seed=1)
BAD = [
    (lambda: ct.geometric_consistency(V, T[:, :4]), ValueError, r"v is \(9, 5\) but t is \(9, 4\): both need the same"),
    (lambda: ct.geometric_consistency(V, T.double()), TypeError, r"v is torch.float32 but t is torch.float64"),
    (lambda: ct.geometric_consistency(V, T.tolist()), TypeError, r"t is list: expected a tensor"),
    (lambda: ct.geometric_consistency(V[:0], T[:0]), ValueError, r"v is \(0, 5\): a loss over no rows"),
    (lambda: ct.geometric_consistency(V, T, V), ValueError, r"one of v_aug and t_aug is given: expected both"),
    (lambda: ct.geometric_consistency(V, T, cross_weight=-1), ValueError, r"cross_weight is -1: .* of at least 0"),
    (lambda: ct.geometric_consistency(V, T, in_weight="1"), TypeError, r"in_weight is str: expected a number"),
    (lambda: ct.geometric_consistency(V, T, row_weights=V[:3, 0]), ValueError, r"row_weights has shape \(3,\)"),
    (lambda: ct.geometric_consistency(V, T, row_weights=-V[:, 0].abs()), ValueError, r"row_weights .* at least 0"),
    (lambda: ct.geometric_consistency(V, T, row_weights=0 * V[:, 0]), ValueError, r"row_weights .* all 0"),
    (lambda: ct.geometric_consistency(V, T, V, T, backend="tpu"), ValueError, r"backend is 'tpu'"),
    (lambda: ct.brownian_bridge(V, V, T, time=1.5), ValueError, r"time is 1.5: expected a finite number from 0 to 1"),
    (lambda: ct.brownian_bridge(V, V, T, time=V[:, 0] - 2), ValueError, r"time .* holds -.*: expected times from 0"),
    (lambda: ct.brownian_bridge(V, V, T, time=0, likelihood_weight=True), ValueError, r"time is 0, where"),
    (lambda: ct.brownian_bridge(V, V, T, reduction="max"), ValueError, r"reduction is 'max'"),
    (lambda: ct.brownian_bridge(V[0], V, T), ValueError, r"v_aug has shape \(5,\)"),
    (lambda: ct.BrownianBridgeLoss("normal"), ValueError, r"time is 'normal': expected a number"),
    (lambda: ct.BrownianBridgeLoss("uniform", likelihood_weight=True), ValueError, r"its mean .* is infinite"),
    (lambda: ct.feature_separation(V, T, V, T, scale=1.0), ValueError, r"v_ind_aug and t_ind_aug are not given"),
    (lambda: ct.feature_separation(V, T, V, T, V, scale=1.0), ValueError, r"one of v_ind_aug and t_ind_aug"),
    (lambda: ct.feature_separation(*[V[:1]] * 6, scale=1.0), ValueError, r"v is \(1, 5\): the uniformity of one row"),
    (lambda: ct.feature_separation(*[V] * 6, scale=-1.0), ValueError, r"scale is -1.0"),
    (lambda: ct.four_way_contrastive(V, T, V[:8], T, 1.0), ValueError, r"v is \(9, 5\) but v_aug is \(8, 5\)"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
