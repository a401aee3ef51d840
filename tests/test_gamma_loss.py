"""GammaContrastiveLoss: what it computes, what it remembers, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from contrastile import backends, info_nce, reference
from contrastile.draws import GammaDraws
from contrastile.losses import GammaContrastiveLoss
from contrastile.normalizer import LogNormalizerMemory, PairBatch, StochasticLogNormalizerMemory
from contrastile.prototypes import PrototypeLogNormalizer
from support import BACKENDS_HERE, Shape, towers
from torch import Tensor, nn

SAMPLES, ROWS, DIM, SCALE = 40, 8, 6, 10.0
MODES = ["mixed", "lagged"]


def batch(seed: int = 0, rows: int = ROWS):
    x, y = towers(Shape(rows, rows, DIM), seed=seed)
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:rows]
    return x.requires_grad_(), y.requires_grad_(), index


def log_ratio(rows: int = ROWS, samples: int = SAMPLES) -> float:
    return math.log((samples - 1) / (rows - 1))


def loss_of(mode: str = "mixed", **options) -> GammaContrastiveLoss:
    options = {"init_scale": SCALE, "generator": torch.Generator().manual_seed(1), **options}
    return GammaContrastiveLoss(SAMPLES, mode=mode, **options)


def dense_log_z(x, y, index, symmetric=True):
    rows = torch.arange(len(x))
    return reference.log_normalizers(
        x, y, SCALE, positives=rows, groups=(index, index), columns=symmetric, log_multiplier=log_ratio(len(x))
    )


def known_log_z(loss, index):
    now = PairBatch(index[:, None], index[:, None], SCALE, index, True, SAMPLES, None)
    return [None if z is None else z.clone() for z in loss.normalizer.estimate(index, now)]


def same_state(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


# What it computes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("draws", ["mean", "gamma"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_every_step_is_the_oracle_at_the_weights_of_its_mode(backend, mode, draws, symmetric):
    loss = loss_of(mode, draws=draws, symmetric=symmetric, update_rate=0.4, backend=backend)
    twin = GammaDraws(generator=torch.Generator().manual_seed(1))
    index = torch.arange(ROWS) + 3
    for seed in range(3):
        x, y, _ = batch(seed)
        fresh = dense_log_z(x.detach(), y.detach(), index, symmetric)
        known = known_log_z(loss, index)
        moved = [
            None if new is None else new if seed == 0 else torch.logaddexp(old + math.log(0.6), new + math.log(0.4))
            for old, new in zip(known, fresh, strict=True)
        ]
        rows, cols = moved if mode == "mixed" or seed == 0 else known
        drawn = twin(2 * ROWS if symmetric else ROWS) if draws == "gamma" else None
        expected = reference.gamma_contrastive(
            x,
            y,
            SCALE,
            -rows,
            None if cols is None else -cols,
            groups=(index, index),
            log_multiplier=log_ratio(),
            cap=mode == "lagged",
            row_draws=None if drawn is None else drawn[:ROWS],
            col_draws=None if drawn is None or not symmetric else drawn[ROWS:],
        ).loss
        wanted = torch.autograd.grad(expected, (x, y))
        ours = loss(x, y, index)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(ours, (x, y)), wanted, rtol=1e-4, atol=1e-6)
        for remembered, value in zip(known_log_z(loss, index), moved, strict=True):
            torch.testing.assert_close(remembered, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_first_visit_without_draws_is_info_nce_over_as_many_samples(mode):
    """With as many samples as rows the multiplier is one, and the value InfoNCE's own."""
    x, y, _ = batch()
    loss = GammaContrastiveLoss(ROWS, init_scale=SCALE, mode=mode, draws="mean")
    torch.testing.assert_close(loss(x, y, torch.arange(ROWS)), info_nce(x, y, SCALE))


def test_lagged_takes_the_batchs_log_z_for_new_samples_only():
    loss = loss_of("lagged", draws="mean")
    loss(*batch(0)[:2], torch.arange(ROWS))
    x, y, _ = batch(1)
    index = torch.arange(ROWS) + 3
    known, fresh = known_log_z(loss, index), dense_log_z(x, y, index)
    rows, cols = (torch.cat([old[:-3], new[-3:]]) for old, new in zip(known, fresh, strict=True))
    expected = reference.gamma_contrastive(x, y, SCALE, -rows, -cols, log_multiplier=log_ratio()).loss
    torch.testing.assert_close(loss(x, y, index), expected)


@pytest.mark.parametrize(("mode", "draws"), [("mixed", "mean"), ("mixed", "gamma"), ("lagged", "mean")])
def test_value_is_a_bound_of_what_eval_mode_gives(mode, draws):
    loss = loss_of(mode, draws=draws)
    for seed in range(4):
        x, y, index = batch(seed)
        trained = loss(x, y, torch.arange(ROWS))
        assert trained > loss.eval()(x, y, index) - 1e-5
        loss.train()


def test_equal_indices_are_no_negatives_of_each_other():
    x, y, index = batch()
    index[5] = index[2]
    found = loss_of(draws="mean")(x, y, index)
    rows, cols = dense_log_z(x, y, index)
    equal = torch.tensor([2, 5])
    rows, cols = (z.index_fill(0, equal, (z[equal].logsumexp(0) - math.log(2)).item()) for z in (rows, cols))
    expected = reference.gamma_contrastive(
        x, y, SCALE, -rows, -cols, groups=(index, index), log_multiplier=log_ratio(), cap=False
    )
    torch.testing.assert_close(found, expected.loss)


def test_virtual_batch_sets_the_multiplier():
    x, y, index = batch()
    plain = loss_of(draws="mean", virtual_batch=ROWS)(x, y, index)
    torch.testing.assert_close(plain, info_nce(x, y, SCALE))
    assert loss_of(draws="mean", virtual_batch=20)(x, y, index) > plain


@pytest.mark.parametrize("mode", MODES)
def test_lagged_sweeps_once_where_all_samples_are_known_and_mixed_twice(mode, monkeypatch):
    eager, sweeps = backends.get("eager"), []
    for name in ("pair_stats", "pair_grad"):
        original = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda *a, f=original, n=name, **k: sweeps.append(n) or f(*a, **k))
    loss = loss_of(mode, backend="eager")
    x, y, _ = batch()
    seen = []
    for index in (torch.arange(ROWS), torch.arange(ROWS), torch.arange(ROWS) + 1):
        sweeps.clear()
        loss(x, y, index).backward()
        seen.append(list(sweeps))
    both, one = ["pair_stats", "pair_grad"], ["pair_grad"]
    assert seen == ([both, one, both] if mode == "lagged" else [both, both, both])


# Temperature


def test_learned_scale_gets_the_gradient_of_its_logarithm():
    x, y, index = batch()
    learned, given = loss_of(learnable_scale=True), torch.tensor(SCALE, requires_grad=True)
    learned(x, y, index).backward()
    loss_of()(x, y, index, given).backward()
    torch.testing.assert_close(learned.log_scale.grad, SCALE * given.grad)
    assert not list(loss_of().parameters())


def test_learned_scale_is_held_at_its_maximum_and_can_come_back():
    x, y, index = batch()
    loss = loss_of(learnable_scale=True, max_scale=12.0)
    with torch.no_grad():
        loss.log_scale.fill_(5.0)
    loss(x, y, index).backward()
    assert loss.log_scale.item() == pytest.approx(math.log(12.0))
    assert loss.log_scale.grad != 0


# What it remembers


@pytest.mark.parametrize("mode", MODES)
def test_eval_mode_is_info_nce_with_the_multiplier_and_changes_nothing(mode):
    loss = loss_of(mode)
    loss(*batch(0))
    twin = loss_of(mode)
    twin.load_state_dict(loss.state_dict())
    x, y, index = batch(1)
    rows, cols = dense_log_z(x, y, index)
    expected = ((rows + cols) / 2 - SCALE * (x * y).sum(1)).mean()
    found = loss.eval()(x, y, index)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss(x, y, None), expected)
    assert bool(loss(x, y, index + SAMPLES).isfinite())
    assert same_state(loss, twin)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_one_is_scored_from_memory_and_not_remembered(mode):
    loss = loss_of(mode, draws="mean")
    x, y, index = batch()
    assert loss(x[:1], y[:1], index[:1]).item() == pytest.approx(0, abs=1e-5)
    loss(x, y, index)
    before = known_log_z(loss, index)
    one = loss(x[:1], y[:1], index[:1])
    t = SCALE * (x[0] * y[0]).sum() - torch.stack([z[0] for z in before])
    torch.testing.assert_close(one, (t.exp() - t - 1).mean())
    assert all(torch.equal(a, b) for a, b in zip(before, known_log_z(loss, index), strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_short_last_batch_stands_for_as_many_samples(mode):
    loss = loss_of(mode, draws="mean")
    x, y, index = batch(rows=3)
    rows, cols = dense_log_z(x, y, index)
    torch.testing.assert_close(loss(x, y, index), ((rows + cols) / 2 - SCALE * (x * y).sum(1)).mean())


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_larger_than_the_data_set_repeats_samples(mode):
    loss = GammaContrastiveLoss(3, init_scale=SCALE, mode=mode)
    x, y, _ = batch()
    found = loss(x, y, torch.arange(ROWS) % 3)
    assert bool(found.isfinite())
    assert int(loss.normalizer.visits) == ROWS
    assert loss.stats()["seen"] == 1


@pytest.mark.parametrize("mode", MODES)
def test_nan_in_gives_nan_out_and_is_not_remembered(mode):
    loss = loss_of(mode)
    x, y, index = batch()
    loss(x, y, index)
    before = known_log_z(loss, index)
    broken = x.detach().clone()
    broken[2, 3] = torch.nan
    assert bool(loss(broken, y, index).isnan())
    assert all(torch.equal(a, b) for a, b in zip(before, known_log_z(loss, index), strict=True))
    assert int(loss.stats()["rejected"]) == ROWS
    assert bool(loss(x, y, index).isfinite())


def test_stats_tell_how_far_the_weights_are_from_one():
    loss = loss_of("lagged", draws="mean", update_rate=0.5)
    x, y, index = batch()
    loss(x, y, index)
    assert loss.stats()["drift"].item() == pytest.approx(0, abs=1e-5)
    assert loss.stats()["above_one"] == 0
    loss.normalizer.level.sub_(0.25 / SCALE)
    loss(x, y, index)
    assert loss.stats()["drift"].item() == pytest.approx(0.25, abs=1e-4)
    assert loss.stats()["above_one"] == 0.5
    assert loss.stats()["seen"] == ROWS / SAMPLES


def test_another_normalizer_can_stand_in():
    class Constant:
        updates = 0

        def estimate(self, index: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
            return torch.full(index.shape, 7.0), torch.full(index.shape, 6.0)

        def update(self, index: Tensor, row_lse: Tensor, col_lse: Tensor | None, batch: PairBatch) -> None:
            self.updates += 1

        def stats(self) -> dict[str, Tensor]:
            return {}

    x, y, index = batch()
    for mode in MODES:
        constant = Constant()
        found = loss_of(mode, draws="mean", normalizer=constant)(x, y, index)
        seven, six = torch.full((ROWS,), -7.0), torch.full((ROWS,), -6.0)
        cap = mode == "lagged"
        expected = reference.gamma_contrastive(x, y, SCALE, seven, six, log_multiplier=log_ratio(), cap=cap).loss
        torch.testing.assert_close(found, expected)
        assert constant.updates == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_other_dtypes_give_their_own_gradients_and_a_float32_memory(mode, dtype):
    loss = loss_of(mode)
    x, y, index = batch()
    x, y = (side.detach().to(dtype).requires_grad_() for side in (x, y))
    for _ in range(2):
        found = loss(x, y, index)
    found.backward()
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert x.grad.dtype == dtype
    assert loss.normalizer.level.dtype == torch.float32


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "num_samples is 1: expected a whole number of at least 2"),
        ({"num_samples": 10.0}, "num_samples is 10.0: expected a whole number"),
        ({"virtual_batch": 1}, "virtual_batch is 1: expected a whole number of at least 2"),
        ({"init_scale": 0.0}, "init_scale is 0.0 and max_scale 100.0: expected 0 < init_scale <= max_scale"),
        ({"init_scale": 200.0}, "init_scale is 200.0 and max_scale 100.0"),
        ({"mode": "fresh"}, "mode is 'fresh': expected one of 'mixed', 'lagged'"),
        ({"draws": "normal"}, "draws is 'normal': expected one of 'gamma', 'mean'"),
        ({"shape": 0.5}, "shape is 0.5: expected a finite number of at least 1"),
        ({"update_rate": 0.0}, "update_rate is 0.0: expected a number above 0, at most 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GammaContrastiveLoss(**{"num_samples": SAMPLES, **options})


def test_update_rate_belongs_to_the_default_normalizer():
    with pytest.raises(ValueError, match="update_rate and normalizer are both given"):
        loss_of(update_rate=0.5, normalizer=loss_of().normalizer)


@pytest.mark.parametrize(
    "normalizer",
    [
        lambda columns: LogNormalizerMemory(SAMPLES, columns=columns),
        lambda columns: StochasticLogNormalizerMemory(SAMPLES, columns=columns),
        lambda columns: PrototypeLogNormalizer(3, DIM, columns=columns),
    ],
    ids=["average", "stochastic", "prototypes"],
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_normalizer_of_other_directions_is_refused_at_construction(mode, symmetric, normalizer):
    message = f"with columns={not symmetric}, but symmetric is {symmetric}: expected columns={symmetric}"
    with pytest.raises(ValueError, match=rf"normalizer is a \w+ {message}"):
        loss_of(mode, draws="mean", symmetric=symmetric, normalizer=normalizer(not symmetric))
    loss_of(mode, draws="mean", symmetric=symmetric, normalizer=normalizer(symmetric))


def test_a_memory_of_fewer_samples_is_refused_at_construction():
    message = "normalizer is a LogNormalizerMemory of 10 samples, but num_samples is 40: expected one of at least 40"
    with pytest.raises(ValueError, match=message):
        loss_of(normalizer=LogNormalizerMemory(10))
    loss_of(normalizer=LogNormalizerMemory(SAMPLES + 1))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x, y, i: (x, y, i + 38),
            ValueError,
            r"index runs from \d+ to \d+, but num_samples is 40: expected .* 39",
        ),
        (lambda x, y, i: (x, y, i - 30), ValueError, r"index runs from -\d+ to \d+, but num_samples is 40"),
        (lambda x, y, i: (x, y, i[:5]), ValueError, r"index has shape \(5,\): expected \(8,\)"),
        (lambda x, y, i: (x, y, i[:, None]), ValueError, r"index has shape \(8, 1\): expected \(8,\)"),
        (lambda x, y, i: (x, y, i.float()), TypeError, r"index is torch.float32: expected an integer tensor"),
        (lambda x, y, i: (x, y, list(i)), TypeError, r"index is list: expected an integer tensor"),
        (lambda x, y, i: (x, y, None), ValueError, r"index is None: training needs"),
        (lambda x, y, i: (x, y[:5], i), ValueError, r"x is \(8, 6\) but y is \(5, 6\): expected \(B, D\) each"),
        (lambda x, y, i: (x[0], y[0], i), ValueError, r"x is \(6,\) but y is \(6,\): expected \(B, D\) each"),
        (lambda x, y, i: (x, y[:, :4], i), ValueError, r"x is \(8, 6\) but y is \(8, 4\)"),
        (lambda x, y, i: (x, [1], i), TypeError, r"x is Tensor and y is list: expected tensors"),
        (lambda x, y, i: (x[:0], y[:0], i[:0]), ValueError, r"x is \(0, 6\)"),
        (lambda x, y, i: (x, y, i, -1.0), ValueError, r"scale is -1.0: expected a finite number above 0"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_bad_input_is_named_and_not_remembered(mode, change, error, message):
    loss, twin = loss_of(mode), loss_of(mode)
    with pytest.raises(error, match=message):
        loss(*change(*batch()))
    assert same_state(loss.normalizer, twin.normalizer)


def test_a_learned_scale_and_a_given_one_exclude_each_other():
    with pytest.raises(ValueError, match="scale is given, but the loss learns its own"):
        loss_of(learnable_scale=True)(*batch(), 10.0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_narrow_indices_serve(dtype):
    x, y, index = batch()
    assert torch.equal(loss_of()(x, y, index.to(dtype)), loss_of()(x, y, index))
