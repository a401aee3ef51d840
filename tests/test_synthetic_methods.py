"""The example's losses of other articles: each update rule by autograd and written out, and by LibAUC's own code."""

from __future__ import annotations

import math

import pytest
import torch
from contrastile.losses import GammaContrastiveLoss, RobustContrastiveLoss
from contrastile.prototypes import PrototypeLogNormalizer
from contrastile.sweeping_normalizers import QueueLogNormalizer
from contrastile.temperatures import SampleTemperatures
from support import libauc_losses
from torch.nn import functional as F

from examples.synthetic.global_losses import FastCLIP, ISogCLR, SogCLR
from examples.synthetic.methods import GammaByEmbedding, Step
from examples.synthetic.moco import MoCo
from examples.synthetic.problem import embed

RUNS, SAMPLES, ROWS, WIDTH, DIM, SCALE = 2, 12, 6, 7, 5, 12.0
AVERAGED = {"rtol": 1e-4, "atol": 1e-4}  # averages are kept in float32, gradients here are of order 10
OTHERS = ~torch.eye(ROWS, dtype=torch.bool)


def steps(count: int = 6):
    """Whole epochs of disjoint batches, so that a sample's first visits come together; encoders that move, float64."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(2, SAMPLES, WIDTH, generator=generator, dtype=torch.float64)
    for number in range(count):
        if number % (SAMPLES // ROWS) == 0:
            order = torch.randperm(SAMPLES, generator=generator)
        index, order = order[:ROWS], order[ROWS:]
        encoders = torch.randn(2, RUNS, WIDTH, DIM, generator=generator, dtype=torch.float64)
        sides = data[0, index], data[1, index]
        yield Step(sides, encoders, torch.stack(embed(sides, encoders)), index, SCALE)


def gradients_of(loss, step, run):
    """Of `loss`(x, y), a mean over rows, summed over them."""
    leaves = [side[run].clone().requires_grad_() for side in step.embedded]
    return ROWS * torch.stack(torch.autograd.grad(loss(*leaves), leaves))


def assert_gradients_are_of(losses, method, step):
    """A loss of the package for each run."""
    ours = method.gradients(step)
    for run, loss in enumerate(losses):
        truth = gradients_of(lambda x, y: loss(x, y, step.index), step, run)  # noqa: B023
        torch.testing.assert_close(ours[:, run], truth, rtol=1e-4, atol=1e-6)


class Averages:
    """u of one run and both sides: the batch's mean on the first visit."""

    def __init__(self):
        self.u = torch.full((2, SAMPLES), torch.nan, dtype=torch.float64)

    def moved(self, side, index, mean, rate):
        old = self.u[side, index]
        self.u[side, index] = torch.where(old.isnan(), mean, (1 - rate) * old + rate * mean)
        return self.u[side, index]


def sides_of(x, y):
    cosines = x @ y.T
    return [pairs - pairs.diagonal()[:, None] for pairs in (cosines, cosines.T)]


def mean_exp(h, tau):
    return ((h / tau).exp() * OTHERS).sum(1) / (ROWS - 1)


def with_average(h, tau, u, rho):
    """tau log u + rho tau, whose gradients are those of tau log(mean exp) + rho tau with u in the mean's place."""
    mean = mean_exp(h, tau[:, None])
    return tau * (u.log() + (mean - mean.detach()) / u) + rho * tau


def test_isogclr_is_its_objective_by_autograd():
    rho, eta, beta, lowest, highest = 0.7, 0.6, 0.8, 0.6, 1.4
    method = ISogCLR(RUNS, SAMPLES, rho=rho, eta=eta, beta=beta, lowest=lowest, highest=highest)
    taus = torch.full((RUNS, 2, SAMPLES), 1 / SCALE, dtype=torch.float64)
    momenta, averages = torch.zeros_like(taus), [Averages() for _ in range(RUNS)]
    for step in steps():
        ours = method.gradients(step)
        for run in range(RUNS):
            used = taus[run][:, step.index].clone().requires_grad_()
            found = [
                mean_exp(h, tau[:, None]).detach()
                for h, tau in zip(sides_of(*step.embedded[:, run]), used, strict=True)
            ]
            u = [averages[run].moved(side, step.index, mean, 0.9) for side, mean in enumerate(found)]

            def objective(x, y, used=used, u=u):
                losses = zip(sides_of(x, y), used, u, strict=True)
                return sum(with_average(*each, rho) for each in losses).mean()

            truth = gradients_of(objective, step, run) * SCALE / 2
            torch.testing.assert_close(ours[:, run], truth, **AVERAGED)
            (slope,) = torch.autograd.grad(objective(*step.embedded[:, run]), used)
            momenta[run][:, step.index] = (1 - beta) * momenta[run][:, step.index] + beta * ROWS * slope
            moved = taus[run][:, step.index] - eta / SCALE * momenta[run][:, step.index]
            taus[run][:, step.index] = moved.clamp(lowest / SCALE, highest / SCALE)
        torch.testing.assert_close(method.relative.transpose(0, 1) / SCALE, taus, rtol=1e-5, atol=1e-7)
    assert 0 < (taus * SCALE == lowest).sum() < taus.numel()


def test_isogclr_is_the_loss_of_the_package():
    rho, eta, beta, lowest, highest = 0.7, 0.3, 0.8, 0.6, 1.4
    method = ISogCLR(RUNS, SAMPLES, rho=rho, eta=eta, beta=beta, lowest=lowest, highest=highest)
    losses = [
        RobustContrastiveLoss(
            SAMPLES,
            SampleTemperatures(SAMPLES, rho=rho, step=eta, slope_rate=beta, lowest=lowest, highest=highest),
            init_scale=SCALE,
        )
        for _ in range(RUNS)
    ]
    for step in steps():
        assert_gradients_are_of(losses, method, step)
        for run, loss in enumerate(losses):
            torch.testing.assert_close(method.relative[:, run].float(), loss.temperatures.relative)


@pytest.mark.parametrize("scale", [SCALE, 50.0])
def test_fastclip_is_its_objective_by_autograd(scale):
    """At 50 the temperature is below the threshold of its step."""
    rho, rate, epochs, lr = 0.7, 0.3, 2, 0.02
    method = FastCLIP(RUNS, SAMPLES, rho=rho, rate=rate, epochs=epochs, step=lr)
    logs = [torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True) for _ in range(RUNS)]
    adams = [torch.optim.Adam([log], lr=lr / 3 if scale == 50 else lr) for log in logs]
    averages = [Averages() for _ in range(RUNS)]
    for number, step in enumerate(steps(8)):
        epoch = number // (SAMPLES // ROWS)
        now = [1.0, rate + (1 - rate) / 2, rate, rate][epoch]
        ours = method.gradients(step._replace(scale=scale))
        for run, (log, adam) in enumerate(zip(logs, adams, strict=True)):
            tau = (-log).exp()
            found = [mean_exp(h, tau).detach() for h in sides_of(*step.embedded[:, run])]
            u = [averages[run].moved(side, step.index, mean, now) for side, mean in enumerate(found)]

            def objective(x, y, tau=tau, u=u):
                losses = [
                    with_average(h, tau.expand(ROWS), each, rho) for h, each in zip(sides_of(x, y), u, strict=True)
                ]
                return sum(losses).mean() / 2

            truth = gradients_of(lambda x, y: objective(x, y, tau.detach()), step, run) * scale  # noqa: B023
            torch.testing.assert_close(ours[:, run], truth, rtol=1e-4, atol=1e-3)
            adam.zero_grad()
            objective(*step.embedded[:, run]).backward()
            adam.step()
        torch.testing.assert_close(method.log_scale, torch.stack(logs).detach(), rtol=1e-5, atol=1e-5)


def test_fastclips_temperature_stays_above_a_hundredth():
    method = FastCLIP(RUNS, SAMPLES, rho=100.0, step=1.0)
    for step in steps():
        method.gradients(step)
    torch.testing.assert_close(method.log_scale, torch.full((RUNS,), math.log(100), dtype=torch.float64))


def test_moco_is_cross_entropy_over_its_queue_by_autograd():
    capacity, momentum = 2 * ROWS + 1, 0.7
    method = MoCo(RUNS, capacity=capacity, momentum=momentum)
    slow, queues = None, None
    for step in steps():
        slow = step.encoders if slow is None else momentum * slow + (1 - momentum) * step.encoders
        keys = [F.normalize(side @ encoder, dim=-1) for side, encoder in zip(step.sides, slow, strict=True)]
        ours = method.gradients(step)
        if queues is not None:
            for run in range(RUNS):

                def loss(*queries, run=run):
                    total = 0.0
                    for query, other in zip(queries, (1, 0), strict=True):
                        positives = (query * keys[other][run]).sum(1, keepdim=True)  # noqa: B023
                        logits = torch.cat([positives, query @ queues[other][run].T], 1)  # noqa: B023
                        total = total + F.cross_entropy(SCALE * logits, torch.zeros(ROWS, dtype=torch.int64))
                    return total / 2

                torch.testing.assert_close(ours[:, run], gradients_of(loss, step, run))
        else:
            queues = [torch.zeros(RUNS, 0, DIM, dtype=torch.float64)] * 2
        queues = [torch.cat([old, new], 1)[:, -capacity:] for old, new in zip(queues, keys, strict=True)]
        kept = queues[0].shape[1]
        torch.testing.assert_close(method.queue[:, :, -kept:], torch.stack(queues))
        assert method.queue.shape == (2, RUNS, capacity, DIM)
        queues = [each.clone() for each in method.queue]


@pytest.mark.parametrize(
    "normalizer",
    [lambda: PrototypeLogNormalizer(3, DIM), lambda: QueueLogNormalizer(8, DIM)],
    ids=["prototypes", "queue"],
)
def test_gamma_by_embedding_is_the_loss_of_the_package(normalizer):
    method = GammaByEmbedding(RUNS, SAMPLES, normalizer)
    losses = [
        GammaContrastiveLoss(SAMPLES, init_scale=SCALE, mode="lagged", draws="mean", normalizer=normalizer())
        for _ in range(RUNS)
    ]
    for step in steps():
        assert_gradients_are_of(losses, method, step)


# LibAUC: https://github.com/Optimization-AI/LibAUC, its loss of two modalities


def libauc_loss(scheme, **options):
    theirs = libauc_losses().GCLoss_v2(N=SAMPLES, tau=1 / SCALE, gamma=0.9, temperature_scheme=scheme, **options)
    theirs.double()
    for name in ("b1", "b2", "u1", "u2"):
        setattr(theirs, name, getattr(theirs, name).double())
    return theirs


def libauc_gradients(theirs, step):
    """Of run 0, per summed loss, and with its factors undone: (B - 1) of the mean, and 1 / temperature of ours."""
    return gradients_of(lambda x, y: theirs(x, y, step.index)[0], step, 0) * SCALE / (ROWS - 1)


def test_sogclr_has_the_gradients_of_libauc():
    theirs, ours = libauc_loss("global_constant"), SogCLR(RUNS, SAMPLES)
    for number, step in enumerate(steps()):
        theirs.adjust_gamma(number // (SAMPLES // ROWS))
        torch.testing.assert_close(ours.gradients(step)[:, 0], libauc_gradients(theirs, step), rtol=1e-5, atol=1e-6)


def test_isogclr_has_the_gradients_and_the_temperatures_of_libauc():
    rho, eta, lowest, highest = 0.7, 0.05, 0.6 / SCALE, 1.4 / SCALE
    theirs = libauc_loss("individual_learnable", rho=rho, eta=eta, tau_min=lowest, tau_max=highest)
    for name in ("learnable_tau_img", "learnable_tau_txt", "grad_tau_img", "grad_tau_txt"):
        setattr(theirs, name, getattr(theirs, name).double())
    ours = ISogCLR(RUNS, SAMPLES, rho=rho, eta=eta * SCALE, lowest=lowest * SCALE, highest=highest * SCALE)
    for number, step in enumerate(steps()):
        theirs.adjust_gamma(number // (SAMPLES // ROWS))
        torch.testing.assert_close(ours.gradients(step)[:, 0], libauc_gradients(theirs, step), rtol=1e-5, atol=1e-6)
        learned = torch.stack([theirs.learnable_tau_img, theirs.learnable_tau_txt])[..., 0]
        torch.testing.assert_close(ours.relative[:, 0] / SCALE, learned, rtol=1e-5, atol=1e-7)
    assert (learned - 1 / SCALE).abs().max() > 0.01
