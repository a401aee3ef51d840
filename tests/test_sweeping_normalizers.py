"""Log-normalisers from sweeps: exact ones make the gamma gradient unbiased, a queue's are those of what it holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from contrastile import backends, info_nce, reference
from contrastile.losses import GammaContrastiveLoss
from contrastile.normalizer import PairBatch
from contrastile.sweeping_normalizers import ExactLogNormalizer, QueueLogNormalizer
from support import Shape, default_dtype, towers
from torch.nn import functional as F

SAMPLES, ROWS, DIM, SCALE = 7, 3, 4, 8.0


def sides(rows=SAMPLES, seed=0, dtype=torch.float64):
    return [side.detach().to(dtype) for side in towers(Shape(rows, rows, DIM), seed=seed)]


def batch_of(x, y, index, **options):
    return PairBatch(x, y, SCALE, index, True, SAMPLES, None)._replace(**options)


# Exact


@pytest.mark.parametrize("symmetric", [True, False])
def test_exact_is_the_dense_log_sum_exp_over_all_samples(symmetric):
    x, y = sides()
    index = torch.tensor([4, 0, 4])
    rows, cols = ExactLogNormalizer(lambda: (x, y)).estimate(
        index, batch_of(x[index], y[index], index, symmetric=symmetric)
    )
    logits = SCALE * x @ y.T
    torch.testing.assert_close(rows, logits.logsumexp(1)[index])
    if symmetric:
        torch.testing.assert_close(cols, logits.logsumexp(0)[index])
    else:
        assert cols is None


def mean_gradient_over_all_batches(loss, x, y):
    """Of every batch of ROWS distinct samples once, so that nothing is left to chance."""
    total = torch.zeros(2, SAMPLES, DIM, dtype=torch.float64)
    batches = list(itertools.combinations(range(SAMPLES), ROWS))
    for chosen in batches:
        index, leaves = torch.tensor(chosen), [side.clone().requires_grad_() for side in (x, y)]
        total += torch.stack(torch.autograd.grad(loss(leaves[0][index], leaves[1][index], index), leaves))
    return total / len(batches)


def test_gradients_with_exact_normalizers_are_unbiased_and_info_nce_is_biased():
    x, y = sides()
    leaves = [side.clone().requires_grad_() for side in (x, y)]
    exact = torch.stack(torch.autograd.grad(reference.info_nce(*leaves, SCALE), leaves))
    loss = GammaContrastiveLoss(
        SAMPLES,
        init_scale=SCALE,
        mode="lagged",
        cap=False,
        draws="mean",
        normalizer=ExactLogNormalizer(lambda: (x, y)),
    )
    torch.testing.assert_close(mean_gradient_over_all_batches(loss, x, y), exact, rtol=1e-9, atol=1e-9)
    biased = mean_gradient_over_all_batches(lambda x, y, index: info_nce(x, y, SCALE), x, y)
    assert (biased - exact).norm() > 0.1 * exact.norm()


# Queue


def test_queue_is_the_dense_log_sum_exp_over_batch_and_queue():
    queue, seen = QueueLogNormalizer(5, DIM), []
    for step in range(4):
        x, y = sides(ROWS, seed=step)
        index = torch.arange(ROWS) + 2 * step  # shares one sample with the batch before
        batch = batch_of(x, y, index, virtual_batch=50)
        if step > 1:
            held = seen[-5:]
            others_x, others_y = (torch.stack([entry[side] for entry in held]) for side in (0, 1))
            samples = torch.tensor([entry[2] for entry in held])
            log_multiplier = torch.tensor(49 / (ROWS - 1 + 5)).log()
            for anchors, own, others, found in zip(
                (x, y), (y, x), (others_y, others_x), queue.estimate(index, batch), strict=True
            ):
                candidates, ids = torch.cat([own, others.double()]), torch.cat([index, samples])
                logits = SCALE * anchors @ candidates.T + log_multiplier
                logits = logits.masked_fill(index[:, None] == ids, -torch.inf)
                logits[torch.arange(ROWS), torch.arange(ROWS)] = SCALE * (anchors * own).sum(1)
                torch.testing.assert_close(found, logits.logsumexp(1), rtol=1e-6, atol=1e-6)
        queue.update(index, torch.zeros(ROWS), torch.zeros(ROWS), batch)
        seen += [(x[i].float(), y[i].float(), int(index[i])) for i in range(ROWS)]
    assert int(queue.position) == 12 % 5
    assert queue.stats()["filled"] == 1


def test_first_batch_stands_in_for_what_an_unfilled_queue_lacks():
    queue, (x, y) = QueueLogNormalizer(4 * ROWS, DIM), sides(ROWS)
    index = torch.arange(ROWS)
    batch = batch_of(x, y, index, virtual_batch=ROWS)
    before = queue.estimate(index, batch)
    queue.update(index, *before, batch)
    for first, second in zip(before, queue.estimate(index, batch), strict=True):
        torch.testing.assert_close(first, second)
    assert queue.stats()["filled"] == 0.25


def test_a_batch_above_capacity_leaves_its_last_rows():
    queue, (x, y) = QueueLogNormalizer(2, DIM), sides(5)
    queue.update(torch.arange(5), torch.zeros(5), torch.zeros(5), batch_of(x, y, torch.arange(5)))
    assert queue.samples.tolist() == [3, 4]
    torch.testing.assert_close(queue.entries, torch.stack([x[3:], y[3:]]).float())


HELD = 8


def queue_loss(**options):
    normalizer = QueueLogNormalizer(HELD, DIM)
    return GammaContrastiveLoss(1000, init_scale=SCALE, mode="lagged", normalizer=normalizer, **options)


def test_a_queue_trains_on_indices_beyond_num_samples():
    hashed, plain = queue_loss(draws="mean"), queue_loss(draws="mean")
    for seed in range(3):
        x, y = sides(ROWS, seed)
        index = torch.arange(ROWS) + seed
        values = hashed(x, y, 10**9 - 7 * index), plain(x, y, index)
        assert torch.equal(*values)
    with pytest.raises(TypeError, match=r"index is torch.float32: expected an integer tensor"):
        hashed(x, y, index.float())


def test_a_step_with_a_queue_takes_three_products_and_one_over_batch_and_queue_a_side(monkeypatch):
    eager, swept = backends.get("eager"), []
    for name, products in (("pair_stats", 1), ("pair_grad", 3)):
        original = getattr(eager, name)

        def counted(problem, *rest, f=original, products=products, **options):
            swept.append(products * problem.rows * problem.cols)
            return f(problem, *rest, **options)

        monkeypatch.setattr(eager, name, counted)
    loss = queue_loss(backend="eager")
    for seed in range(2):
        swept.clear()
        x, y = (side.requires_grad_() for side in sides(ROWS, seed))
        loss(x, y, torch.arange(ROWS)).backward()
        assert swept == [ROWS * (ROWS + HELD), ROWS * (ROWS + HELD), 3 * ROWS**2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_queue_stays_in_float32_whatever_it_is_created_cast_or_loaded_as(dtype):
    with default_dtype(dtype):
        queue = QueueLogNormalizer(5, DIM)
    assert queue.entries.dtype == torch.float32
    x, y = sides(5)
    queue.update(torch.arange(5), torch.zeros(5), torch.zeros(5), batch_of(x, y, torch.arange(5)))
    before = queue.entries.clone()
    assert torch.equal(queue.to(dtype).entries, before)
    state = {**queue.state_dict(), "entries": before.to(dtype)}
    queue.load_state_dict(state, assign=True)
    assert queue.entries.dtype == torch.float32
    assert torch.equal(queue.entries, before.to(dtype).float())


def test_training_with_a_queue_resumes_bitwise():
    def steps(loss, seeds):
        values = []
        for seed in seeds:
            x, y = (F.normalize(side, dim=1).requires_grad_() for side in sides(ROWS, seed, torch.float32))
            value = loss(x, y, torch.arange(ROWS) + seed)
            values += [value.detach(), *torch.autograd.grad(value, (x, y))]
        return values

    def fresh():
        return queue_loss(generator=torch.Generator().manual_seed(0))

    whole, resumed = fresh(), fresh()
    steps(whole, range(4))
    resumed.load_state_dict(whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(steps(whole, range(4, 8)), steps(resumed, range(4, 8)), strict=True))


def test_messages_name_what_does_not_fit():
    with pytest.raises(ValueError, match="capacity is 0 and dim 4: expected at least 1 each"):
        QueueLogNormalizer(0, 4)
    x, y = sides(ROWS)
    index = torch.arange(ROWS)
    with pytest.raises(ValueError, match=r"x is \(3, 4\), the queue keeps rows of 9: expected \(B, 9\)"):
        QueueLogNormalizer(5, 9).estimate(index, batch_of(x, y, index))
