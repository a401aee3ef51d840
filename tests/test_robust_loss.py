"""RobustContrastiveLoss: the article's objective, by autograd over dense logits and by LibAUC's own code."""

from __future__ import annotations

import math

import pytest
import torch
from contrastile import backends
from contrastile.losses import RobustContrastiveLoss
from contrastile.temperatures import SampleTemperatures
from support import BACKENDS_HERE, Shape, default_dtype, libauc_losses, towers
from torch import Tensor

SAMPLES, ROWS, DIM, SCALE = 13, 6, 5, 12.0
STATE_ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # of what is remembered, in float32
OPTIONS = {"rho": 0.7, "step": 0.2, "slope_rate": 0.8, "lowest": 0.6, "highest": 1.4}
BACKENDS_FOR_FLOAT64 = [name for name in BACKENDS_HERE if name in ("cpu", "eager")]


def batch(seed: int = 0, dtype=torch.float64, rows: int = ROWS):
    x, y = towers(Shape(rows, rows, DIM), dtype, seed=seed)
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:rows]
    return x.requires_grad_(), y.requires_grad_(), index


def loss_of(symmetric: bool = True, backend: str | None = None, update_rate: float = 0.9, **options):
    temperatures = SampleTemperatures(SAMPLES, columns=symmetric, **{**OPTIONS, **options})
    return RobustContrastiveLoss(
        SAMPLES, temperatures, init_scale=SCALE, update_rate=update_rate, symmetric=symmetric, backend=backend
    )


def state_of(module):
    return [value.clone() for value in module.state_dict().values()]


class Article:
    """The objective of Qiu et al. and its updates, dense, float64: u, tau, and its slopes' averages.

    Means are over each row's own negatives, and equal samples of a batch enter with their mean: what the article,
    whose batches hold no sample twice, leaves open.
    """

    def __init__(
        self, sides: int, rate: float, rho: float, step: float, slope_rate: float, lowest: float, highest: float
    ):
        self.rate, self.rho, self.eta, self.beta = rate, rho, step / SCALE, slope_rate
        self.bounds = lowest / SCALE, highest / SCALE
        self.u = torch.full((sides, SAMPLES), torch.nan, dtype=torch.float64)
        self.tau = torch.full_like(self.u, 1 / SCALE)
        self.momentum = torch.zeros_like(self.u)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The bound, and the objective whose gradients are the articles', both times SCALE."""
        cosines, is_negative = x @ y.T, index[:, None] != index
        equals = (~is_negative).double() / (~is_negative).sum(1)
        bounds, objectives = [], []
        for side in range(len(self.u)):
            pairs = cosines.T if side else cosines
            h = pairs - pairs.diagonal()[:, None]
            tau = self.tau[side, index].requires_grad_()
            mean = ((h / tau[:, None]).exp() * is_negative).sum(1) / is_negative.sum(1)
            old, found = self.u[side, index], equals @ mean.detach()
            u = torch.where(old.isnan(), found, (1 - self.rate) * old + self.rate * found)
            self.u[side, index] = u
            objective = tau * (u.log() + (mean - mean.detach()) / u) + self.rho * tau
            (slope,) = torch.autograd.grad(objective.sum(), tau, retain_graph=True)
            self.momentum[side, index] = torch.lerp(self.momentum[side, index], equals @ slope, self.beta)
            self.tau[side, index] = (tau.detach() - self.eta * self.momentum[side, index]).clamp(*self.bounds)
            bounds.append(tau.detach() * (u.log() + mean.detach() / u - 1 + self.rho))
            objectives.append(objective)
        return SCALE * torch.stack(bounds).mean(), SCALE * torch.stack(objectives).mean()


# What it computes


@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["both", "rows"])
@pytest.mark.parametrize("backend", BACKENDS_FOR_FLOAT64)
def test_every_step_is_the_article_by_autograd(backend, symmetric, repeated):
    loss = loss_of(symmetric, backend, update_rate=0.7)
    article = Article(2 if symmetric else 1, 0.7, **OPTIONS)
    for seed in range(6):
        x, y, index = batch(seed)
        if repeated:
            index[4] = index[1]
        bound, objective = article.step(x, y, index)
        truth = torch.autograd.grad(objective, (x, y))
        ours = loss(x, y, index)
        torch.testing.assert_close(ours, bound, **STATE_ROUNDING)
        torch.testing.assert_close(torch.autograd.grad(ours, (x, y)), truth, **STATE_ROUNDING)
        torch.testing.assert_close(loss.temperatures.relative / SCALE, article.tau.float(), **STATE_ROUNDING)
    assert 0 < ((article.tau * SCALE - 1).abs() > 0.39).sum() < article.tau.numel()  # some at their bounds
    assert article.tau.unique().numel() > 6


@pytest.mark.parametrize("symmetric", [True, False], ids=["both", "rows"])
@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_the_article_at_the_same_values(dtype, backend, symmetric):
    loss, article = loss_of(symmetric, backend), Article(2 if symmetric else 1, 0.9, **OPTIONS)
    for seed in range(3):
        x, y, index = batch(seed, dtype)
        bound, objective = article.step(x.double(), y.double(), index)
        truth = torch.autograd.grad(objective, (x, y))
        ours = loss(x, y, index)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, bound.float(), rtol=1e-4, atol=1e-4)
        found, tolerance = torch.autograd.grad(ours, (x, y)), 1e-4 if dtype == torch.float32 else 2e-2
        assert found[0].dtype == dtype
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("step", [0.0, 0.05], ids=["SogCLR", "iSogCLR"])
def test_gradients_and_temperatures_are_those_of_libauc(step):
    """Over epochs of disjoint batches, as LibAUC tells first visits by the epoch. Its loss of two modalities."""
    rho, lowest, highest = 0.7, 0.6 / SCALE, 1.4 / SCALE
    scheme = "individual_learnable" if step else "global_constant"
    theirs = libauc_losses().GCLoss_v2(
        N=SAMPLES,
        tau=1 / SCALE,
        gamma=0.9,
        temperature_scheme=scheme,
        rho=rho,
        eta=step,
        tau_min=lowest,
        tau_max=highest,
    )
    for name, value in vars(theirs).items():
        if isinstance(value, Tensor):
            setattr(theirs, name, value.double())
    ours = loss_of(rho=rho, step=step * SCALE, slope_rate=0.9)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(3):
        theirs.adjust_gamma(epoch)
        for part, index in enumerate(torch.randperm(2 * ROWS, generator=generator).split(ROWS)):
            x, y, _ = batch(10 * epoch + part)
            wanted = torch.autograd.grad(theirs(x, y, index)[0], (x, y))
            found = torch.autograd.grad(ours(x, y, index), (x, y))
            # Theirs lacks the mean's 1 / (B - 1) over the negatives, and ours is times the scale.
            wanted = [gradient * SCALE / (ROWS - 1) for gradient in wanted]
            torch.testing.assert_close(list(found), wanted, **STATE_ROUNDING)
        if epoch == 0:
            first = index
    if step:
        learned = torch.stack([theirs.learnable_tau_img, theirs.learnable_tau_txt])[..., 0]
        torch.testing.assert_close(ours.temperatures.relative.double() / SCALE, learned, rtol=1e-5, atol=1e-7)
        assert (learned[:, first] - 1 / SCALE).abs().max() > 0.01
    else:
        assert bool((ours.temperatures.relative == 1).all())


def test_the_loss_bounds_the_objective_of_the_batch_and_meets_it_at_a_first_visit():
    loss, twin = loss_of(step=0.0), loss_of(step=0.0)
    x, y, _ = batch(0)
    index = torch.arange(ROWS)
    own = torch.eye(ROWS, dtype=torch.bool)
    h = [SCALE * (pairs - (x * y).sum(1)[:, None]).masked_fill(own, -torch.inf) for pairs in (x @ y.T, y @ x.T)]
    batchs_own = torch.cat(h).logsumexp(1).mean() - math.log(ROWS - 1) + OPTIONS["rho"]
    torch.testing.assert_close(loss(x, y, index), batchs_own, **STATE_ROUNDING)
    twin(*batch(1)[:2], index)
    assert twin(x, y, index) > batchs_own


@pytest.mark.parametrize("symmetric", [True, False], ids=["both", "rows"])
def test_a_step_takes_two_sweeps_a_side(symmetric, monkeypatch):
    eager, sweeps = backends.get("eager"), []
    for name in ("pair_stats", "pair_grad"):
        original = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda *a, f=original, n=name, **k: sweeps.append(n) or f(*a, **k))
    loss_of(symmetric, "eager")(*batch()).backward()
    sides = 2 if symmetric else 1
    assert sweeps == ["pair_stats"] * sides + ["pair_grad"] * sides


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_temperatures_move_alike_whatever_gradients_are_wanted(wanted):
    whole, partial = loss_of(), loss_of()
    for seed in range(2):
        x, y, index = batch(seed)
        full = torch.autograd.grad(whole(x, y, index), (x, y))
        leaves = [side.detach().requires_grad_(wants) for side, wants in zip((x, y), wanted, strict=True)]
        loss = partial(*leaves, index)
        assert loss.requires_grad == any(wanted)
        for leaf, wants, truth in zip(leaves, wanted, full, strict=True):
            if wants:
                torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], truth)
    torch.testing.assert_close(whole.state_dict(), partial.state_dict())


def test_a_gradient_scaler_acts_before_gradients_are_rounded_to_16_bits():
    x, y, index = batch(dtype=torch.float16)
    wide = [side.detach().double().requires_grad_() for side in (x, y)]
    temperatures = SampleTemperatures(SAMPLES, rho=1.0, step=0.0)
    loss = RobustContrastiveLoss(SAMPLES, temperatures, init_scale=1e-6)  # gradients below 16 bits' least
    truth = torch.autograd.grad(2.0**18 * loss(*wide, index), wide)
    found = torch.autograd.grad(2.0**18 * loss(x, y, index), (x, y))
    for ours, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=1e-5)
        assert exact.abs().max() > 0.005


def test_second_derivatives_are_refused():
    x, y, index = batch()
    (gradient,) = torch.autograd.grad(loss_of()(x, y, index), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


# What it remembers


def test_eval_mode_takes_the_start_and_the_batch_and_changes_nothing():
    loss, fresh = loss_of(), loss_of()
    for seed in range(3):
        loss(*batch(seed))
    before = state_of(loss)
    x, y, index = batch(4)
    first_visit = fresh(x, y, index)
    for given in (index, None, index + SAMPLES):
        value = loss.eval()(x, y, given)
        torch.testing.assert_close(value, first_visit)
        torch.testing.assert_close(torch.autograd.grad(value, x), torch.autograd.grad(fresh.eval()(x, y, index), x))
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(loss), strict=True))


def test_a_batch_of_one_sample_has_loss_zero_and_teaches_nothing():
    loss = loss_of()
    loss(*batch())
    before = [buffer.clone() for buffer in loss.temperatures.buffers()] + [loss.normalizer.level.clone()]
    x, y, _ = batch(1, rows=3)
    for rows, index in ((1, torch.tensor([4])), (3, torch.tensor([4, 4, 4]))):
        value = loss(x[:rows], y[:rows], index)
        assert value == 0
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(value, (x, y)))
    after = [*loss.temperatures.buffers(), loss.normalizer.level]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_default_dtype_of_16_bits_changes_nothing():
    plain = loss_of()
    with default_dtype(torch.bfloat16):
        under_narrow = loss_of()
        for seed in range(3):
            assert torch.equal(under_narrow(*batch(seed)), plain(*batch(seed)))
    torch.testing.assert_close(under_narrow.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_what_is_not_finite_is_not_taken_in():
    loss = loss_of()
    loss(*batch(0)[:2], torch.arange(ROWS))
    before = [buffer.clone() for buffer in loss.temperatures.buffers()] + [loss.normalizer.level.clone()]
    x, y, _ = batch(1)
    with torch.no_grad():
        x[2] = torch.nan
    assert loss(x, y, torch.arange(ROWS)).isnan()
    after = [*loss.temperatures.buffers(), loss.normalizer.level]
    assert all(bool(torch.equal(a[:, 2], b[:, 2])) for a, b in zip(before, after, strict=True))
    assert all(bool(b.isfinite()[:, :ROWS].all()) for b in after)
    assert loss.stats()["rejected"] > 0


def test_training_resumes_bitwise():
    whole, resumed = loss_of(), loss_of()
    for seed in range(3):
        whole(*batch(seed, torch.float32))
    resumed.load_state_dict(whole.state_dict())
    for seed in range(3, 6):
        x, y, index = batch(seed, torch.float32)
        values = [loss(x, y, index) for loss in (whole, resumed)]
        assert torch.equal(*values)
        assert torch.equal(*(torch.autograd.grad(value, x)[0] for value in values))
    assert all(torch.equal(a, b) for a, b in zip(state_of(whole), state_of(resumed), strict=True))


def test_a_compiled_model_calls_it_as_it_is():
    plain, inside = loss_of(), loss_of()
    compiled = torch.compile(lambda x, y, index: 2 * inside(x, y, index), backend="eager")
    x, y, index = batch()
    assert torch.equal(compiled(x, y, index), 2 * plain(x, y, index))


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y, i: (x, y, i + 12), ValueError, r"index runs from \d+ to \d+, but num_samples is 13: .* 0 to 12"),
        (lambda x, y, i: (x, y, i[:5]), ValueError, r"index has shape \(5,\): expected \(6,\)"),
        (lambda x, y, i: (x, y, i.float()), TypeError, r"index is torch.float32: expected an integer tensor"),
        (lambda x, y, i: (x, y, None), ValueError, r"index is None: training needs"),
        (lambda x, y, i: (x, y[:5], i), ValueError, r"x is \(6, 5\) but y is \(5, 5\): expected \(B, D\) each"),
        (lambda x, y, i: (x, y[:, :4], i), ValueError, r"x is \(6, 5\) but y is \(6, 4\)"),
        (lambda x, y, i: (x, y.float(), i), TypeError, r"x is torch.float64 but y is torch.float32"),
    ],
)
def test_bad_input_is_named_and_not_remembered(change, error, message):
    loss = loss_of()
    before = state_of(loss)
    with pytest.raises(error, match=message):
        loss(*change(*batch()))
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(loss), strict=True))


def test_options_that_do_not_fit_are_named():
    temperatures = SampleTemperatures(SAMPLES, rho=1.0)
    with pytest.raises(ValueError, match="num_samples is 1: expected a whole number of at least 2"):
        RobustContrastiveLoss(1, temperatures)
    with pytest.raises(ValueError, match=r"temperatures are \(2, 13\), by side and sample: expected \(2, 14\)"):
        RobustContrastiveLoss(SAMPLES + 1, temperatures)
    with pytest.raises(ValueError, match=r"temperatures are \(2, 13\), by side and sample: expected \(1, 13\)"):
        RobustContrastiveLoss(SAMPLES, temperatures, symmetric=False)
    with pytest.raises(ValueError, match=r"init_scale is 0\.0: expected a finite number above 0"):
        RobustContrastiveLoss(SAMPLES, temperatures, init_scale=0.0)
    with pytest.raises(TypeError, match="temperatures is float: expected a SampleTemperatures"):
        RobustContrastiveLoss(SAMPLES, 1.0)
