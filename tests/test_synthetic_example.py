"""examples/synthetic: its batched losses are the package's, its measure has the optimum it says, its headline holds."""

from __future__ import annotations

import pytest
import torch
from contrastile import reference
from contrastile.losses import GammaContrastiveLoss

from examples.synthetic.__main__ import report
from examples.synthetic.cells import HEADLINE, headline
from examples.synthetic.figure import draw
from examples.synthetic.methods import Gamma
from examples.synthetic.named import METHODS
from examples.synthetic.problem import LATENT, WIDTH, Problem, canonical_correlations
from examples.synthetic.train import Cell, measure, train

RUNS, SAMPLES, ROWS, SCALE = 3, 20, 6, 12.0


def steps(count: int = 4):
    """Unit rows and sample numbers of a few steps, (RUNS, ROWS, 5) and (ROWS,), float64."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        x, y = torch.nn.functional.normalize(
            torch.randn(2, RUNS, ROWS, 5, generator=generator, dtype=torch.float64), dim=-1
        )
        yield x, y, torch.randperm(SAMPLES, generator=generator)[:ROWS]


def batched(method, x, y, index):
    """Gradients of both sides by the example's coefficients."""
    leaves = [side.clone().requires_grad_() for side in (x, y)]
    logits = SCALE * (leaves[0] @ leaves[1].mT)
    logits.backward(method.coefficients(logits.detach(), index, SCALE).to(logits.dtype) / ROWS)
    return torch.stack([leaf.grad for leaf in leaves])


@pytest.mark.parametrize("options", [{"mode": "mixed"}, {"mode": "lagged"}], ids=str)
def test_gamma_is_the_loss_of_the_package(options):
    losses = [GammaContrastiveLoss(SAMPLES, init_scale=SCALE, draws="mean", **options) for _ in range(RUNS)]
    method = Gamma(RUNS, SAMPLES, **options)
    for x, y, index in steps():
        ours = batched(method, x, y, index)
        for run, loss in enumerate(losses):
            leaves = [side[run].clone().requires_grad_() for side in (x, y)]
            wanted = torch.autograd.grad(loss(*leaves, index), leaves)
            torch.testing.assert_close(ours[:, run], torch.stack(wanted), rtol=1e-4, atol=1e-6)


def dcl(x, y, index, state):
    s = (SCALE * x @ y.T).masked_fill(torch.eye(ROWS, dtype=torch.bool), -torch.inf)
    return ((s.logsumexp(0) + s.logsumexp(1)) / 2 - SCALE * (x * y).sum(1)).mean()


def sogclr(x, y, index, state):
    """The surrogate of the article: mean_j w_ij (s_ij - s_ii) with w = exp(.) / u held fixed."""
    s, total = SCALE * x @ y.T, 0.0
    for side, logits in enumerate((s, s.T)):
        margins = logits - logits.diagonal()[:, None]
        others = ~torch.eye(ROWS, dtype=torch.bool)
        mean = (margins.exp() * others).sum(1).detach() / (ROWS - 1)
        old = state.setdefault(side, torch.full((SAMPLES,), torch.nan, dtype=torch.float64))
        u = torch.where(old[index].isnan(), mean, 0.1 * old[index] + 0.9 * mean)
        old[index] = u
        total = total + (margins.exp().detach() / u[:, None] * margins * others).sum(1) / (ROWS - 1)
    return total.mean() / 2


TRUTH = {
    "InfoNCE": lambda x, y, index, state: reference.info_nce(x, y, SCALE),
    "DCL": dcl,
    "SogCLR": sogclr,
}


@pytest.mark.parametrize("name", TRUTH)
def test_a_baseline_is_its_loss_by_autograd(name):
    method, states = METHODS[name](RUNS, SAMPLES), [{} for _ in range(RUNS)]
    for x, y, index in steps():
        ours = batched(method, x, y, index)
        for run in range(RUNS):
            leaves = [side[run].clone().requires_grad_() for side in (x, y)]
            wanted = torch.autograd.grad(TRUTH[name](*leaves, index, states[run]), leaves)
            torch.testing.assert_close(ours[:, run], torch.stack(wanted), rtol=1e-4, atol=1e-6)


def test_sampled_weights_have_the_mean_of_the_mean_ones():
    x, y, index = next(steps(1))
    logits = SCALE * (x @ y.mT)
    mean = Gamma(RUNS, SAMPLES).coefficients(logits, index, SCALE)
    sampled = Gamma(RUNS, SAMPLES, sampled=True)
    draws = torch.stack([sampled.coefficients(logits, index, SCALE) for _ in range(3000)])
    # Unchanged logits leave the memory where the first visit put it. 6 standard errors: a false alarm in 10^7 runs.
    assert bool(((draws.mean(0) - mean).abs() <= 6 * draws.std(0) / 3000**0.5 + 1e-6).all())
    assert draws.std(0).max() > 0.1


def test_the_best_linear_encoders_recover_one_and_others_less():
    problem = Problem(2, 50, noise=1.5)
    best = []
    for mixing in problem.mixing:
        covariance = mixing.T @ mixing + 1.5**2 * torch.eye(WIDTH)
        best.append(torch.linalg.solve(covariance, mixing.T))
    remixed = torch.stack(best)[:, None] @ torch.randn(2, 2, LATENT, LATENT)
    torch.testing.assert_close(problem.recovery(remixed), torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert bool((problem.recovery(problem.start) < 0.95).all())


def test_canonical_correlations_are_those_of_many_samples():
    problem = Problem(1, 200_000, noise=1.0)
    encoder, mixing = problem.start[0, 0].double(), problem.mixing[0].double()
    latent = torch.randn(200_000, LATENT, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(200_000, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    codes = torch.linalg.qr((latent @ mixing + noise) @ encoder)[0]
    sampled = torch.linalg.svdvals(codes.T @ torch.linalg.qr(latent)[0])
    exact = canonical_correlations(encoder, mixing.T @ mixing + torch.eye(WIDTH, dtype=torch.float64), mixing.T)
    assert (sampled - exact).abs().max() < 0.01


@pytest.mark.slow
def test_from_heavy_noise_gamma_recovers_the_latent_in_every_run_and_info_nce_in_none():
    """The article's claim, at 0.97 of what the best linear encoders reach; ten initialisations, batches of 32."""
    problem = Problem(10, HEADLINE["samples"], HEADLINE["noise"])
    cells = {cell.method: cell for cell in headline() if cell.batch == HEADLINE["batch"]}
    gamma, info_nce = (problem.recovery(train(cells[name], problem)) for name in ("gamma, mean", "InfoNCE"))
    assert bool((gamma >= 0.97).all()), f"gamma {gamma}"
    assert bool((info_nce < 0.97).all()), f"InfoNCE {info_nce}"


def test_report_and_figure_are_made_of_what_is_measured(tmp_path, capsys):
    problem = Problem(2, 64, noise=1.0)
    rows = [measure(Cell(name, 64, 1.0, 0.1, batch, steps=5), problem) for name in METHODS for batch in (8, 64)]
    report(rows)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("SogCLR", "recovery"))
    draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
