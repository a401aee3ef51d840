"""The memory of log-normalisers: moving averages of Z, whatever the scale, the order and the duplicates."""

from __future__ import annotations

import pytest
import torch
from contrastile.normalizer import (
    BatchLogNormalizer,
    LogNormalizerMemory,
    PairBatch,
    StochasticLogNormalizerMemory,
    log_mean_of_equals,
)
from hypothesis import given
from hypothesis import strategies as st
from support import default_dtype

UNIT = PairBatch(torch.ones(1, 1), torch.ones(1, 1), 1.0, None, True, 1, None)  # log Z is the level itself


def at_scale(scale, virtual_batch=64):
    return UNIT._replace(scale=scale, virtual_batch=virtual_batch)


def batch(rows: int, seed: int = 0, spread: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(2, rows, generator=generator)).unbind()


def test_first_visit_takes_the_batch_and_later_ones_average_in_the_domain_of_z():
    memory = LogNormalizerMemory(10, update_rate=0.25)
    index = torch.tensor([7, 2, 5])
    first, second = batch(3, 1), batch(3, 2)
    memory.update(index, *first, UNIT)
    assert all(torch.equal(a, b) for a, b in zip(memory.estimate(index, UNIT), first, strict=True))
    memory.update(index, *second, UNIT)
    for ours, old, new in zip(memory.estimate(index, UNIT), first, second, strict=True):
        torch.testing.assert_close(ours.double(), (0.75 * old.double().exp() + 0.25 * new.double().exp()).log())
    assert int(memory.visits) == 6


def test_the_whole_batch_replaces_the_memory_at_rate_one():
    memory, index = LogNormalizerMemory(3, update_rate=1.0), torch.arange(3)
    memory.update(index, *batch(3, 1), UNIT)
    memory.update(index, *batch(3, 2), UNIT)
    assert all(torch.equal(a, b) for a, b in zip(memory.estimate(index, UNIT), batch(3, 2), strict=True))


@pytest.mark.parametrize("level", [-1000.0, 0.0, 1000.0])
def test_levels_far_outside_the_range_of_exp_are_kept(level):
    memory, index = LogNormalizerMemory(4, update_rate=0.5), torch.tensor([3, 1, 3])
    memory.update(index, torch.tensor([level, level, level + 1]), torch.full((3,), level), UNIT)
    memory.update(index, torch.full((3,), level + 2), torch.full((3,), -level), UNIT)
    rows, cols = memory.estimate(index, UNIT)
    once = torch.tensor([0.0, 1.0], dtype=torch.float64).logsumexp(0) - torch.tensor(2.0).log()
    expected = torch.stack([once, torch.tensor(2.0)]).logsumexp(0) - torch.tensor(2.0).log()
    assert abs(float(rows[0]) - level - float(expected)) < 1e-3
    assert bool(cols.isfinite().all())


def test_unknown_samples_are_minus_infinity_and_others_are_left_alone():
    memory = LogNormalizerMemory(6)
    memory.update(torch.tensor([4, 0]), *batch(2), UNIT)
    assert memory.level.isfinite().all(0).tolist() == [True, False, False, False, True, False]
    assert memory.estimate(torch.tensor([1]), UNIT)[0].item() == -torch.inf


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-300, 300)), min_size=1, max_size=12))
def test_equal_indices_get_the_log_of_their_mean(entries):
    index = torch.tensor([i for i, _ in entries])
    values = torch.tensor([[v for _, v in entries]], dtype=torch.float64)
    ours = log_mean_of_equals(index, values)[0]
    for position, i in enumerate(index):
        same = values[0, index == i]
        assert abs(ours[position] - (same.logsumexp(0) - torch.tensor(float(len(same))).log())) < 1e-6


def test_distinct_indices_keep_their_values_bit_for_bit():
    index, values = torch.randperm(50), torch.stack(batch(50, spread=30))
    assert torch.equal(log_mean_of_equals(index, values), values)


def test_duplicates_count_once_whatever_their_order():
    index, (rows, cols) = torch.tensor([3, 1, 3, 0, 3]), batch(5)
    memories = []
    for order in (torch.arange(5), torch.tensor([4, 3, 2, 1, 0]), torch.tensor([2, 0, 1, 4, 3])):
        memory = LogNormalizerMemory(4)
        memory.update(index[order], rows[order], cols[order], UNIT)
        memory.update(index[order], cols[order], rows[order], UNIT)
        memories.append(memory)
    assert all(int(memory.visits) == 10 for memory in memories)
    for memory in memories[1:]:
        torch.testing.assert_close(memory.level, memories[0].level, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_counted_and_not_taken_in(bad, side):
    memory, index = LogNormalizerMemory(4), torch.tensor([0, 1])
    memory.update(index, *batch(2), UNIT)
    before = memory.level.clone()
    values = batch(2, 1)
    values[side][1] = bad
    memory.update(index, *values, UNIT)
    assert torch.equal(memory.level[:, 1:], before[:, 1:])
    assert not torch.equal(memory.level[:, 0], before[:, 0])
    assert int(memory.visits) == 3
    assert int(memory.stats()["rejected"]) == 1


def test_rows_alone():
    memory, index = LogNormalizerMemory(4, columns=False), torch.tensor([2, 0])
    rows, _ = batch(2)
    memory.update(index, rows, None, UNIT)
    known, cols = memory.estimate(index, UNIT)
    assert torch.equal(known, rows)
    assert cols is None


def test_stats_count_samples_and_batches():
    memory = LogNormalizerMemory(4)
    for index in ([0, 1], [0, 0]):
        memory.update(torch.tensor(index), *batch(2), UNIT)
    stats = {name: value.item() for name, value in memory.stats().items()}
    assert stats == {"seen": 0.5, "visits": 1.0, "rejected": 0}


def test_casting_the_model_leaves_the_memory_in_float32():
    memory = LogNormalizerMemory(4)
    memory.update(torch.arange(4), *batch(4), UNIT)
    before = memory.level.clone()
    for cast in (memory.half, memory.double, lambda: memory.to(torch.bfloat16)):
        cast()
        assert memory.level.dtype == torch.float32
        assert torch.equal(memory.level, before)


def test_a_default_dtype_of_16_bits_leaves_new_state_in_float32():
    with default_dtype(torch.bfloat16):
        memories = LogNormalizerMemory(4), StochasticLogNormalizerMemory(4)
        unknown = BatchLogNormalizer().estimate(torch.arange(2), UNIT)[0]
    assert [memory.level.dtype for memory in memories] == [torch.float32] * 2
    assert unknown.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_assigning_a_state_of_another_dtype_leaves_the_memory_in_float32(dtype):
    memory, resumed = LogNormalizerMemory(4), LogNormalizerMemory(4)
    memory.update(torch.tensor([3, 1]), *batch(2), UNIT)
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in memory.state_dict().items()
    }
    resumed.load_state_dict(state, assign=True)
    assert resumed.level.dtype == torch.float32
    assert torch.equal(resumed.level, memory.level.to(dtype).float())
    assert resumed.visits.dtype == torch.int64


def test_state_dict_carries_the_memory():
    memory, resumed = LogNormalizerMemory(4), LogNormalizerMemory(4)
    memory.update(torch.tensor([3, 1]), *batch(2), UNIT)
    resumed.load_state_dict(memory.state_dict())
    for each in (memory, resumed):
        each.update(torch.tensor([3, 2]), *batch(2, 1), UNIT)
    assert all(torch.equal(a, b) for a, b in zip(memory.buffers(), resumed.buffers(), strict=True))


def test_compiles_without_a_graph_break():
    plain, compiled_memory = LogNormalizerMemory(6), LogNormalizerMemory(6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(index, rows, cols):
        compiled_memory.update(index, rows, cols, UNIT)
        return compiled_memory.estimate(index, UNIT)

    for seed in range(3):
        index = torch.tensor([4, 1, 4, 0]).roll(seed)
        rows, cols = batch(4, seed)
        found = step(index, rows, cols)
        plain.update(index, rows, cols, UNIT)
        torch.testing.assert_close(found, plain.estimate(index, UNIT))
    assert torch.equal(plain.visits, compiled_memory.visits)


def test_messages_name_what_does_not_fit():
    with pytest.raises(ValueError, match="num_samples is 0"):
        LogNormalizerMemory(0)
    for rate in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"update_rate is {rate}: expected a number above 0, at most 1"):
            LogNormalizerMemory(4, update_rate=rate)
    index, (rows, cols) = torch.tensor([0, 1]), batch(2)
    with pytest.raises(ValueError, match="keeps 2 log-normaliser"):
        LogNormalizerMemory(4).update(index, rows, None, UNIT)
    with pytest.raises(ValueError, match=r"keeps 1 log-normaliser.* expected no col_lse"):
        LogNormalizerMemory(4, columns=False).update(index, rows, cols, UNIT)


# A scale that moves


def dense_log_z(cosines, scale):
    return torch.logsumexp(scale * cosines, 1)


@pytest.mark.parametrize("after", [5.0, 12.0, 18.0, 22.0, 40.0])
def test_an_entry_serves_at_another_temperature_than_its_visits(after):
    """Truth: log Z of the same embeddings at both scales, float64."""
    generator, visited = torch.Generator().manual_seed(0), 15.0
    x, y = (torch.nn.functional.normalize(torch.randn(64, 8, generator=generator).double(), dim=1) for _ in range(2))
    before, truth = (dense_log_z(x @ y.T, scale) for scale in (visited, after))
    memory, index = LogNormalizerMemory(64), torch.arange(64)
    memory.update(index, before, before, at_scale(visited))
    corrected = memory.estimate(index, at_scale(after))[0]
    known = memory.estimate(index, at_scale(torch.tensor(visited)))[0]
    torch.testing.assert_close(known, before.float(), rtol=1e-6, atol=1e-5)
    assert bool(((corrected - truth).abs() < 0.4 * (before - truth).abs()).all())
    # log Z is convex in the scale: an extrapolation along the secant through 0 stays below, within it above.
    assert bool((torch.sign(corrected - truth) == (-1 if after > visited else 1)).all())


def test_visits_at_several_temperatures_average_in_the_domain_of_z():
    memory, index = LogNormalizerMemory(3, update_rate=0.25), torch.arange(3)
    first, second = batch(3, 1), batch(3, 2)
    memory.update(index, *first, at_scale(10.0))
    carried = [value.clone() for value in memory.estimate(index, at_scale(20.0))]
    memory.update(index, *second, at_scale(torch.tensor(20.0, requires_grad=True)))
    for ours, old, new in zip(memory.estimate(index, at_scale(20.0)), carried, second, strict=True):
        torch.testing.assert_close(ours, (0.75 * old.exp() + 0.25 * new.exp()).log(), rtol=1e-6, atol=1e-5)
    assert not memory.level.requires_grad


def test_eight_bytes_a_sample_hold_both_sides():
    memory = LogNormalizerMemory(1000)
    assert sum(buffer.nbytes for buffer in memory.buffers() if buffer.dim()) == 8000


# Stochastic approximation


def visits_on_fixed_embeddings(memory, steps, samples=60, rows=8, scale=4.0):
    """exp(v) Z of every sample before each visit, (visits,), and log Z, float64, against the estimates at the end."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(samples, 5, generator=generator).double(), dim=1) for _ in "xy")
    logits = scale * x @ y.T
    truth, seen = torch.stack([logits.logsumexp(1), logits.logsumexp(0)]), []
    for step in range(steps):
        index = torch.randperm(samples, generator=generator)[:rows]
        own = logits[index][:, index] + torch.tensor((samples - 1) / (rows - 1)).log() * (1 - torch.eye(rows))
        known = torch.stack(memory.estimate(index, at_scale(scale, samples)))
        if step > steps // 4:
            seen.append((truth[:, index] - known).exp())
        memory.update(index, own.logsumexp(1), own.logsumexp(0), at_scale(scale, samples))
    everything = torch.stack(memory.estimate(torch.arange(samples), at_scale(scale, samples)))
    return torch.cat(seen, 1), (everything - truth).square().mean().sqrt()


def test_stochastic_approximation_has_the_right_weights_on_average_and_an_average_has_not():
    ours, _ = visits_on_fixed_embeddings(StochasticLogNormalizerMemory(60, update_rate=0.3), 700)
    averaged, _ = visits_on_fixed_embeddings(LogNormalizerMemory(60, update_rate=0.3), 700)
    assert abs(ours.mean() - 1) < 0.02
    assert averaged.mean() > 1.04


def test_stochastic_approximation_converges_to_log_z_as_its_rate_falls():
    errors = [
        visits_on_fixed_embeddings(StochasticLogNormalizerMemory(60, update_rate=rate), steps)[1]
        for rate, steps in ((0.5, 150), (0.05, 800))
    ]
    assert 3 * errors[1] < errors[0], errors
    assert errors[1] < 0.15


@pytest.mark.parametrize("found", [-50.0, 3.0, 200.0])
def test_no_step_of_stochastic_approximation_leads_past_what_the_batch_found(found):
    memory, index = StochasticLogNormalizerMemory(1, update_rate=0.9, columns=False), torch.tensor([0])
    memory.update(index, torch.tensor([2.5]), None, UNIT)
    memory.update(index, torch.tensor([found]), None, UNIT)
    moved = memory.estimate(index, UNIT)[0].item()
    assert min(2.5, found) <= moved <= max(2.5, found)
    assert moved == pytest.approx({-50.0: 1.6, 3.0: 3.0, 200.0: 200.0}[found], abs=1e-5)


# Without a memory


def test_a_normalizer_of_the_batch_alone_knows_nothing_and_keeps_nothing():
    normalizer, index = BatchLogNormalizer(), torch.tensor([5, 2])
    normalizer.update(index, *batch(2), UNIT)
    rows, cols = normalizer.estimate(index, UNIT)
    assert bool((torch.stack([rows, cols]) == -torch.inf).all())
    assert normalizer.estimate(index, UNIT._replace(symmetric=False))[1] is None
    assert not normalizer.state_dict()
