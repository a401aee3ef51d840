"""Prototypes that remember log-normalisers: what they average, what they predict, and training with them."""

from __future__ import annotations

import math

import pytest
import torch
from contrastile import reference
from contrastile.losses import GammaContrastiveLoss
from contrastile.normalizer import BatchLogNormalizer, PairBatch
from contrastile.prototypes import PrototypeLogNormalizer
from support import Shape, default_dtype, towers
from torch.nn import functional as F

SAMPLES, ROWS, DIM, SCALE = 50, 9, 5, 8.0


def batch_of(seed=0, rows=ROWS, **changes):
    x, y = (side.detach().double() for side in towers(Shape(rows, rows, DIM), seed=seed))
    return PairBatch(x, y, SCALE, torch.arange(rows), True, SAMPLES, None)._replace(**changes)


def dense_logits(batch):
    return batch.fixed_scale * batch.x @ batch.y.T


def log_z(batch):
    """Of rows and columns, with the batch's multiplier, float64."""
    found = reference.log_normalizers(
        batch.x,
        batch.y,
        batch.fixed_scale,
        positives=torch.arange(len(batch.x)),
        log_multiplier=batch.log_multiplier,
        columns=batch.symmetric,
    )
    return found[0], found[1]


def update(normalizer, batch):
    normalizer.update(batch.samples, *log_z(batch), batch)


class Twin:
    """One side in float64, row by row, as the docstring says it."""

    def __init__(self, count, window, sharpness):
        self.count, self.window, self.sharpness = count, window, sharpness
        self.places, self.means, self.rows = [], [None] * count, [0] * count

    def update(self, anchors, logits, scale):
        """logits (B, B) of anchors against candidates; means are kept of exp(s_ij / scale)^scale."""
        units = F.normalize(anchors, dim=1)
        self.places += list(units)[: self.count - len(self.places)]
        nearest = [int((torch.stack(self.places) @ unit).argmax()) for unit in units]
        for k in set(nearest):
            members = [i for i, chosen in enumerate(nearest) if chosen == k]
            others = [logits[i][torch.arange(len(logits)) != i] for i in members]
            mean = torch.cat(others).exp().mean()
            share = len(members) / max(min(self.rows[k] + len(members), self.window), len(members))
            old = 0 if self.means[k] is None else (self.means[k] * scale).exp()
            self.means[k] = ((1 - share) * old + share * mean).log() / scale
            self.places[k] = F.normalize((1 - share) * self.places[k] + share * units[members].mean(0), dim=0)
            self.rows[k] += len(members)

    def estimate(self, anchors, positives, scale):
        known = [k for k in range(len(self.places)) if self.means[k] is not None]
        places, means = torch.stack(self.places)[known], torch.stack([self.means[k] for k in known])
        shares = (self.sharpness * F.normalize(anchors, dim=1) @ places.T).softmax(1)
        return (positives.exp() + (SAMPLES - 1) * (shares * (means * scale).exp()).sum(1)).log()


@pytest.mark.parametrize(("window", "sharpness"), [(1, 3.0), (7, 0.0), (1000, 10.0)])
@pytest.mark.parametrize("count", [1, 4, 13])
def test_every_step_is_the_mean_of_its_neighbours_written_out(count, window, sharpness):
    normalizer = PrototypeLogNormalizer(count, DIM, window=window, sharpness=sharpness)
    twins = [Twin(count, window, sharpness) for _ in range(2)]
    for seed in range(5):
        batch = batch_of(seed, scale=SCALE * (1 + seed / 10))
        logits = dense_logits(batch)
        if seed > 0:
            for ours, twin, anchors in zip(
                normalizer.estimate(batch.samples, batch), twins, (batch.x, batch.y), strict=True
            ):
                truth = twin.estimate(anchors, logits.diagonal(), batch.scale)
                torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-4)
        update(normalizer, batch)
        for twin, anchors, pairs in zip(twins, (batch.x, batch.y), (logits, logits.T), strict=True):
            twin.update(anchors, pairs, batch.scale)


def test_nothing_is_known_before_the_first_batch_and_everything_after_it():
    normalizer, first = PrototypeLogNormalizer(20, DIM), batch_of()
    assert all(bool((z == -torch.inf).all()) for z in normalizer.estimate(first.samples, first))
    update(normalizer, first)
    assert all(bool(z.isfinite().all()) for z in normalizer.estimate(first.samples, batch_of(1)))
    assert normalizer.stats()["seen"] == ROWS / 20
    assert int(normalizer.placed) == ROWS
    for seed in (1, 2):
        update(normalizer, batch_of(seed))
    assert int(normalizer.placed) == 20
    torch.testing.assert_close(normalizer.prototypes.norm(dim=2), torch.ones(2, 20))


def clusters(seed, rows=32, dim=12):
    """Sides whose rows lie about three directions, of which the first is crowded: log Z is highest there."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.eye(dim, dtype=torch.float64)[:3]
    chosen = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), rows, replacement=True, generator=generator)
    x, y = (
        F.normalize(centres[chosen] + 0.1 * torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    return PairBatch(x, y, SCALE, torch.arange(rows), True, 400, None)


def test_prototypes_tell_crowded_directions_from_empty_ones_and_one_average_does_not():
    everything = clusters(99, rows=400)
    truth = log_z(everything)[0]
    errors = {}
    for count in (1, 12):
        normalizer = PrototypeLogNormalizer(count, 12, window=200)
        for seed in range(40):
            update(normalizer, clusters(seed))
        errors[count] = (normalizer.estimate(everything.samples, everything)[0] - truth).square().mean().sqrt()
    assert errors[12] < 0.25 < 0.5 < errors[1], f"{errors}, of a log Z that spreads by {truth.std()}"


@pytest.mark.parametrize("after", [5.0, 12.0, 22.0, 40.0])
def test_an_average_serves_at_another_temperature_than_that_of_its_rows(after):
    """Truth: log Z of the same embeddings at both scales."""
    visited, served = (batch_of(scale=scale, virtual_batch=ROWS) for scale in (15.0, after))
    normalizer = PrototypeLogNormalizer(ROWS, DIM, sharpness=1e4)  # a prototype a row: nothing else is averaged
    update(normalizer, visited)
    stale, truth = log_z(visited)[0], log_z(served)[0]
    for scale in (after, torch.tensor(after, requires_grad=True)):
        corrected = normalizer.estimate(served.samples, served._replace(scale=scale))[0]
        assert bool(((corrected - truth).abs() <= 0.7 * (stale - truth).abs()).all())
        assert not corrected.requires_grad


def test_equal_embeddings_share_one_prototype_and_are_told_apart_once_they_differ():
    same = batch_of()
    same = same._replace(x=same.x[:1].expand(ROWS, -1), y=same.y[:1].expand(ROWS, -1))
    normalizer = PrototypeLogNormalizer(4, DIM)
    update(normalizer, same)
    assert normalizer.stats()["seen"] == 0.25
    torch.testing.assert_close(normalizer.estimate(same.samples, same), log_z(same), check_dtype=False)
    for seed in range(6):
        update(normalizer, batch_of(seed))
    assert normalizer.stats()["seen"] >= 0.5
    assert (normalizer.prototypes[0] @ normalizer.prototypes[0].T).min() < 0.9


def test_rows_whose_negatives_are_lost_in_rounding_are_left_out():
    batch = batch_of(scale=200.0)
    batch = batch._replace(x=torch.eye(ROWS, DIM, dtype=torch.float64), y=torch.eye(ROWS, DIM, dtype=torch.float64))
    # Rows from DIM on are zero: nothing but negatives. The others' positive is 200 above every negative.
    normalizer = PrototypeLogNormalizer(1, DIM)
    normalizer.update(batch.samples, *(z + 2e-5 for z in log_z(batch)), batch)  # one unit in float32's last place
    assert normalizer.rows.tolist() == [[ROWS - DIM]] * 2
    torch.testing.assert_close(normalizer.level, torch.zeros(2, 1), rtol=0, atol=1e-6)
    assert int(normalizer.stats()["rejected"]) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["x", "row_lse"])
def test_rows_that_are_not_finite_are_counted_and_not_taken_in(place, bad):
    broken, whole = PrototypeLogNormalizer(3, DIM), PrototypeLogNormalizer(3, DIM)
    for seed in range(2):
        batch = batch_of(seed)
        found = log_z(batch)
        kept = torch.arange(ROWS) != seed
        whole.update(
            batch.samples[kept],
            *(z[kept] for z in found),
            batch._replace(x=batch.x[kept], y=batch.y[kept]),
        )
        values = {"x": batch.x.clone(), "row_lse": found[0].clone()}
        values[place][seed] = bad
        broken.update(batch.samples, values["row_lse"], found[1], batch._replace(x=values["x"]))
    for name in ("prototypes", "level", "rows", "placed"):
        torch.testing.assert_close(getattr(broken, name), getattr(whole, name))
    assert int(broken.stats()["rejected"]) == 2


def test_rows_alone():
    normalizer, batch = PrototypeLogNormalizer(2, DIM, columns=False), batch_of(symmetric=False)
    update(normalizer, batch)
    rows, cols = normalizer.estimate(batch.samples, batch)
    both = PrototypeLogNormalizer(2, DIM)
    update(both, batch_of())
    torch.testing.assert_close(rows, both.estimate(batch.samples, batch_of())[0])
    assert cols is None


def test_casting_the_model_leaves_the_averages_in_float32():
    normalizer = PrototypeLogNormalizer(3, DIM)
    update(normalizer, batch_of())
    before = [buffer.clone() for buffer in normalizer.buffers()]
    for cast in (normalizer.half, normalizer.double, lambda: normalizer.to(torch.bfloat16)):
        cast()
        assert all(torch.equal(a, b) for a, b in zip(normalizer.buffers(), before, strict=True))


def test_averages_are_created_and_loaded_in_float32_whatever_the_default_and_the_state():
    with default_dtype(torch.bfloat16):
        normalizer = PrototypeLogNormalizer(3, DIM)
    update(normalizer, batch_of())
    averages = ("prototypes", "level", "rows")
    narrow = {**normalizer.state_dict(), **{name: getattr(normalizer, name).half() for name in averages}}
    loaded = PrototypeLogNormalizer(3, DIM)
    loaded.load_state_dict(narrow, assign=True)
    for name in averages:
        assert getattr(normalizer, name).dtype == torch.float32
        assert torch.equal(getattr(loaded, name), narrow[name].float())


def test_state_does_not_depend_on_the_number_of_samples():
    floats = [buffer for buffer in PrototypeLogNormalizer(64, 128).buffers() if buffer.dim()]
    assert sum(buffer.nbytes for buffer in floats) == 2 * 64 * (128 + 2) * 4


def loss_of(**options):
    options = {"init_scale": SCALE, "generator": torch.Generator().manual_seed(0), **options}
    return GammaContrastiveLoss(SAMPLES, mode="lagged", normalizer=PrototypeLogNormalizer(4, DIM), **options)


def steps(loss, seeds, dtype=torch.float32):
    values = []
    for seed in seeds:
        batch = batch_of(seed)
        leaves = [side.to(dtype).requires_grad_() for side in (batch.x, batch.y)]
        value = loss(*leaves, batch.samples)
        values += [value.detach(), *torch.autograd.grad(value, [*leaves, *loss.parameters()])]
    return values


def test_the_loss_weighs_by_what_was_estimated():
    loss, batch = loss_of(draws="mean"), batch_of(2)
    steps(loss, range(2))
    rows, cols = loss.normalizer.estimate(batch.samples, batch)
    expected = reference.gamma_contrastive(
        batch.x, batch.y, SCALE, -rows.double(), -cols.double(), log_multiplier=batch.log_multiplier
    )
    torch.testing.assert_close(loss(batch.x, batch.y, batch.samples), expected.loss)


def test_no_index_is_an_index_of_distinct_samples():
    batch, with_index, without = batch_of(1), loss_of(), loss_of()
    for _ in range(2):
        found = [loss(batch.x, batch.y, index) for loss, index in ((with_index, batch.samples), (without, None))]
        assert torch.equal(*found)
    assert bool(GammaContrastiveLoss(SAMPLES, normalizer=BatchLogNormalizer())(batch.x, batch.y, None).isfinite())
    with pytest.raises(ValueError, match="index is None: training needs the index"):
        GammaContrastiveLoss(SAMPLES)(batch.x, batch.y, None)


def test_indices_beyond_num_samples_tell_equal_samples_apart():
    batch = batch_of(1)
    index = batch.samples.clone()
    index[5] = index[2]
    for loss_with in (loss_of, lambda: GammaContrastiveLoss(SAMPLES, normalizer=BatchLogNormalizer(), draws="mean")):
        hashed, plain = loss_with(), loss_with()
        assert torch.equal(hashed(batch.x, batch.y, 10**9 - 7 * index), plain(batch.x, batch.y, index))
        assert not torch.equal(plain(batch.x, batch.y, index), plain(batch.x, batch.y, batch.samples))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_embeddings_train_a_learned_temperature(dtype):
    loss = loss_of(learnable_scale=True)
    assert all(bool(value.isfinite().all()) for value in steps(loss, range(4), dtype))
    assert loss.normalizer.level.dtype == torch.float32
    assert loss.stats()["seen"] == 1


def test_training_resumes_bitwise():
    whole, resumed = loss_of(learnable_scale=True), loss_of(learnable_scale=True)
    steps(whole, range(4))
    resumed.load_state_dict(whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(steps(whole, range(4, 8)), steps(resumed, range(4, 8)), strict=True))


def test_compiles_without_a_graph_break():
    plain, compiled = PrototypeLogNormalizer(12, DIM), PrototypeLogNormalizer(12, DIM)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(batch, rows, cols):
        compiled.update(batch.samples, rows, cols, batch)
        return compiled.estimate(batch.samples, batch)

    for seed in range(3):
        batch = batch_of(seed)
        found = step(batch, *log_z(batch))
        update(plain, batch)
        torch.testing.assert_close(found, plain.estimate(batch.samples, batch))


def test_messages_name_what_does_not_fit():
    for arguments in ((0, 4), (3, 0)):
        with pytest.raises(ValueError, match=r"prototypes is \d and dim \d: expected at least 1 each"):
            PrototypeLogNormalizer(*arguments)
    for window in (0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"window is {window}: expected a finite number of at least 1"):
            PrototypeLogNormalizer(3, 4, window=window)
    with pytest.raises(ValueError, match="sharpness is -1: expected a finite number of at least 0"):
        PrototypeLogNormalizer(3, 4, sharpness=-1)
    batch = batch_of()
    with pytest.raises(ValueError, match=r"x is \(9, 5\), the prototypes have width 4: expected \(B, 4\)"):
        PrototypeLogNormalizer(3, 4).estimate(batch.samples, batch)
    with pytest.raises(ValueError, match="symmetric is True, but columns=False: expected the same of both"):
        PrototypeLogNormalizer(3, DIM, columns=False).estimate(batch.samples, batch)
    with pytest.raises(ValueError, match="col_lse is missing, but symmetric True"):
        PrototypeLogNormalizer(3, DIM).update(batch.samples, log_z(batch)[0], None, batch)
