"""GammaContrastiveLoss in a training run: resumed, repeated, of one sample, compiled, and against InfoNCE."""

from __future__ import annotations

import io

import pytest
import torch
from contrastile import info_nce
from contrastile.losses import GammaContrastiveLoss
from support import Shape, default_dtype, towers
from test_gamma_loss import DIM, MODES, ROWS, SAMPLES, SCALE, batch, loss_of, same_state
from torch import Tensor, nn
from torch.nn import functional as F

# Runs that repeat


class Run:
    """Two linear towers under training, whole enough to be saved and resumed."""

    def __init__(self, **options) -> None:
        torch.manual_seed(0)
        self.x, self.y = (side.detach() for side in towers(Shape(SAMPLES, SAMPLES, DIM)))
        self.model = nn.ModuleList([nn.Linear(DIM, 5), nn.Linear(DIM, 5), loss_of(**options)])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)

    def steps(self, first: int, last: int) -> list[Tensor]:
        losses = []
        for step in range(first, last):
            index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:ROWS]
            x_tower, y_tower, loss_module = self.model
            loss = loss_module(
                F.normalize(x_tower(self.x[index]), dim=1), F.normalize(y_tower(self.y[index]), dim=1), index
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return losses

    def saved(self):
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, state) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


@pytest.mark.parametrize("shape", [1.0, 2.0])
@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_is_bitwise_the_uninterrupted_one(mode, shape):
    options = {"mode": mode, "shape": shape, "learnable_scale": True}
    whole, resumed = Run(**options), Run(**options, generator=torch.Generator().manual_seed(99))
    whole.steps(0, 7)
    resumed.load(whole.saved())
    assert all(torch.equal(a, b) for a, b in zip(whole.steps(7, 16), resumed.steps(7, 16), strict=True))
    assert same_state(whole.model, resumed.model)


def test_same_seed_is_the_same_run_and_another_seed_another():
    def run(seed):
        return torch.stack(Run(generator=torch.Generator().manual_seed(seed)).steps(0, 6))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_global_seed_fixes_the_draws_where_no_generator_is_given():
    def run():
        torch.manual_seed(11)
        loss = GammaContrastiveLoss(SAMPLES)
        torch.rand(5)
        return loss(*batch())

    assert torch.equal(run(), run())


def test_a_default_dtype_of_16_bits_changes_nothing():
    plain = loss_of()
    with default_dtype(torch.bfloat16):
        under_narrow = loss_of()
        for seed in range(3):
            assert torch.equal(under_narrow(*batch(seed)), plain(*batch(seed)))
    assert all(a.dtype == b.dtype for a, b in zip(under_narrow.buffers(), plain.buffers(), strict=True))
    assert same_state(under_narrow, plain)


# Batches without negatives


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_whose_rows_are_one_sample_teaches_no_normaliser(mode, rows, symmetric):
    loss = loss_of(mode, draws="mean", symmetric=symmetric)
    x, y, index = batch()
    loss(x, y, index)
    before = loss.normalizer.level.clone()
    new = (set(range(SAMPLES)) - set(index.tolist())).pop()
    for sample in (int(index[2]), new):
        value = loss(x[:rows], y[:rows], torch.full((rows,), sample))
        assert bool(value.isfinite())
        assert torch.equal(loss.normalizer.level, before)
    assert int(loss.normalizer.visits) == ROWS
    assert int(loss.stats()["rejected"]) == 2 * rows


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_negatives_leaves_drift_and_the_count_of_weights(mode, rows):
    loss = loss_of(mode, draws="mean")
    x, y, index = batch()
    for _ in range(2):
        loss(x, y, index)
    before = loss.drift.clone(), loss.weight_sums.clone()
    loss.normalizer.level.sub_(1.0)
    loss(x[:rows], y[:rows], index[:1].expand(rows))
    assert torch.equal(loss.drift, before[0])
    assert torch.equal(loss.weight_sums, before[1])


# torch.compile


MIXED = {"learnable_scale": True}
LAGGED = {"mode": "lagged", "symmetric": False, "learnable_scale": True}


@pytest.mark.parametrize(
    ("options", "compiler"),
    [(MIXED, "aot_eager"), (LAGGED, "aot_eager"), pytest.param(LAGGED, "inductor", marks=pytest.mark.slow)],
    ids=["mixed-aot_eager", "lagged-aot_eager", "lagged-inductor"],
)
def test_compiles_without_a_graph_break(options, compiler):
    def run(compiled):
        torch.manual_seed(3)
        tower, loss = nn.Linear(DIM, 5), loss_of(**options)

        def step(x, y, index):
            return loss(F.normalize(tower(x), dim=1), F.normalize(tower(y), dim=1), index)

        if compiled:
            torch.compiler.reset()
            step = torch.compile(step, fullgraph=True, backend=compiler)
        seen = []
        for seed, rows in enumerate((ROWS, ROWS, 5)):
            x, y, index = batch(seed, rows)
            value = step(x.detach(), y.detach(), index)
            parameters = [*tower.parameters(), *loss.parameters()]
            seen += [value.detach(), *torch.autograd.grad(value, parameters)]
        return [*seen, *loss.buffers()]

    for ours, plain in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_compiles_in_eval_mode():
    loss = loss_of().eval()
    x, y, _ = batch()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y, None), loss(x, y, None))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_first_visits_op_passes_opcheck(symmetric, known):
    x, y, index = batch()
    rows = torch.full((ROWS,), 3.0 if known else -torch.inf)
    cols = rows.clone() if symmetric else None
    arguments = (rows, cols, x.detach(), y.detach(), torch.tensor(SCALE), index, symmetric, SAMPLES, "eager")
    torch.library.opcheck(torch.ops.contrastile.with_first_visits.default, arguments)


# Training: two linear towers on pairs that share a latent, n = 256, temperature 0.05, batches of 8


class Towers:
    def __init__(self, seed: int, samples: int = 256, latent: int = 8, width: int = 16, noise: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(samples, latent, generator=generator)
        self.samples, self.seed = samples, seed
        self.x, self.y = (
            z @ torch.randn(latent, width, generator=generator) / latent**0.5
            + noise * torch.randn(samples, width, generator=generator)
            for _ in range(2)
        )
        self.start = torch.randn(2, width, latent, generator=generator) / width**0.5

    def loss_after_training(self, loss, rows: int, steps: int) -> float:
        """InfoNCE over all pairs."""
        weights = self.start.clone().requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator, order = torch.Generator().manual_seed(100 + self.seed), torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) < rows:
                order = torch.randperm(self.samples, generator=generator)
            index, order = order[:rows], order[rows:]
            optimizer.zero_grad()
            loss(*self.embeddings(weights, index), index).backward()
            optimizer.step()
            schedule.step()
        return info_nce(*self.embeddings(weights.detach(), slice(None)), 20.0).item()

    def embeddings(self, weights, index):
        return F.normalize(self.x[index] @ weights[0], dim=1), F.normalize(self.y[index] @ weights[1], dim=1)


def plain_info_nce(x, y, index):
    return info_nce(x, y, 20.0)


@pytest.mark.parametrize("seed", [1, 3])
def test_small_batches_end_nearer_to_the_full_batch_optimum_than_info_nce(seed):
    towers = Towers(seed)
    optimum = towers.loss_after_training(plain_info_nce, 256, 150)
    small_batch = towers.loss_after_training(plain_info_nce, 8, 300)
    for mode in MODES:
        loss = GammaContrastiveLoss(256, init_scale=20.0, mode=mode, generator=torch.Generator().manual_seed(seed))
        ours = towers.loss_after_training(loss, 8, 300)
        assert optimum < ours < small_batch - 0.05, f"{mode}: {ours}, InfoNCE {small_batch}, full batch {optimum}"


def test_without_the_cap_stale_weights_do_harm():
    towers = Towers(0)
    small_batch = towers.loss_after_training(plain_info_nce, 8, 150)
    loss = GammaContrastiveLoss(256, init_scale=20.0, mode="lagged", cap=False, draws="mean")
    assert towers.loss_after_training(loss, 8, 150) > small_batch + 1
    assert loss.stats()["above_one"] > 0.1
