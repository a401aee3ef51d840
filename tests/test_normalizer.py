"""The memory of log-normalisers: moving averages of Z, whatever the scale, the order and the duplicates."""

from __future__ import annotations

import pytest
import torch
from contrastile.normalizer import LogNormalizerMemory, log_mean_of_equals
from hypothesis import given
from hypothesis import strategies as st


def batch(rows: int, seed: int = 0, spread: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(2, rows, generator=generator)).unbind()


def test_first_visit_takes_the_batch_and_later_ones_average_in_the_domain_of_z():
    memory = LogNormalizerMemory(10, update_rate=0.25)
    index = torch.tensor([7, 2, 5])
    first, second = batch(3, 1), batch(3, 2)
    memory.update(index, *first)
    assert all(torch.equal(a, b) for a, b in zip(memory.estimate(index), first, strict=True))
    memory.update(index, *second)
    for ours, old, new in zip(memory.estimate(index), first, second, strict=True):
        torch.testing.assert_close(ours.double(), (0.75 * old.double().exp() + 0.25 * new.double().exp()).log())
    assert memory.visits.tolist() == [0, 0, 2, 0, 0, 2, 0, 2, 0, 0]


def test_the_whole_batch_replaces_the_memory_at_rate_one():
    memory, index = LogNormalizerMemory(3, update_rate=1.0), torch.arange(3)
    memory.update(index, *batch(3, 1))
    memory.update(index, *batch(3, 2))
    assert all(torch.equal(a, b) for a, b in zip(memory.estimate(index), batch(3, 2), strict=True))


@pytest.mark.parametrize("level", [-1000.0, 0.0, 1000.0])
def test_levels_far_outside_the_range_of_exp_are_kept(level):
    memory, index = LogNormalizerMemory(4, update_rate=0.5), torch.tensor([3, 1, 3])
    memory.update(index, torch.tensor([level, level, level + 1]), torch.full((3,), level))
    memory.update(index, torch.full((3,), level + 2), torch.full((3,), -level))
    rows, cols = memory.estimate(index)
    once = torch.tensor([0.0, 1.0], dtype=torch.float64).logsumexp(0) - torch.tensor(2.0).log()
    expected = torch.stack([once, torch.tensor(2.0)]).logsumexp(0) - torch.tensor(2.0).log()
    assert abs(float(rows[0]) - level - float(expected)) < 1e-3
    assert bool(cols.isfinite().all())


def test_unknown_samples_are_minus_infinity_and_others_are_left_alone():
    memory = LogNormalizerMemory(6)
    memory.update(torch.tensor([4, 0]), *batch(2))
    assert memory.log_z.isfinite().all(0).tolist() == [True, False, False, False, True, False]
    assert memory.estimate(torch.tensor([1]))[0].item() == -torch.inf


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
        memory.update(index[order], rows[order], cols[order])
        memory.update(index[order], cols[order], rows[order])
        memories.append(memory)
    assert memories[0].visits.tolist() == [2, 2, 0, 2]
    for memory in memories[1:]:
        torch.testing.assert_close(memory.log_z, memories[0].log_z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_counted_and_not_taken_in(bad, side):
    memory, index = LogNormalizerMemory(4), torch.tensor([0, 1])
    memory.update(index, *batch(2))
    before = memory.log_z.clone()
    values = batch(2, 1)
    values[side][1] = bad
    memory.update(index, *values)
    assert torch.equal(memory.log_z[:, 1:], before[:, 1:])
    assert not torch.equal(memory.log_z[:, 0], before[:, 0])
    assert memory.visits.tolist() == [2, 1, 0, 0]
    assert int(memory.stats()["rejected"]) == 1


def test_rows_alone():
    memory, index = LogNormalizerMemory(4, columns=False), torch.tensor([2, 0])
    rows, _ = batch(2)
    memory.update(index, rows)
    known, cols = memory.estimate(index)
    assert torch.equal(known, rows)
    assert cols is None


def test_stats_count_samples_and_batches():
    memory = LogNormalizerMemory(4)
    for index in ([0, 1], [0, 0]):
        memory.update(torch.tensor(index), *batch(2))
    stats = {name: value.item() for name, value in memory.stats().items()}
    assert stats == {"seen": 0.5, "visits": 0.75, "rejected": 0}


def test_casting_the_model_leaves_the_memory_in_float32():
    memory = LogNormalizerMemory(4)
    memory.update(torch.arange(4), *batch(4))
    before = memory.log_z.clone()
    for cast in (memory.half, memory.double, lambda: memory.to(torch.bfloat16)):
        cast()
        assert memory.log_z.dtype == torch.float32
        assert torch.equal(memory.log_z, before)


def test_state_dict_carries_the_memory():
    memory, resumed = LogNormalizerMemory(4), LogNormalizerMemory(4)
    memory.update(torch.tensor([3, 1]), *batch(2))
    resumed.load_state_dict(memory.state_dict())
    for each in (memory, resumed):
        each.update(torch.tensor([3, 2]), *batch(2, 1))
    assert all(torch.equal(a, b) for a, b in zip(memory.buffers(), resumed.buffers(), strict=True))


def test_compiles_without_a_graph_break():
    plain, compiled_memory = LogNormalizerMemory(6), LogNormalizerMemory(6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(index, rows, cols):
        compiled_memory.update(index, rows, cols)
        return compiled_memory.estimate(index)

    for seed in range(3):
        index = torch.tensor([4, 1, 4, 0]).roll(seed)
        rows, cols = batch(4, seed)
        found = step(index, rows, cols)
        plain.update(index, rows, cols)
        torch.testing.assert_close(found, plain.estimate(index))
    assert torch.equal(plain.visits, compiled_memory.visits)


def test_messages_name_what_does_not_fit():
    with pytest.raises(ValueError, match="num_samples is 0"):
        LogNormalizerMemory(0)
    for rate in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"update_rate is {rate}: expected a number above 0, at most 1"):
            LogNormalizerMemory(4, update_rate=rate)
    index, (rows, cols) = torch.tensor([0, 1]), batch(2)
    with pytest.raises(ValueError, match="keeps 2 log-normaliser"):
        LogNormalizerMemory(4).update(index, rows)
    with pytest.raises(ValueError, match=r"keeps 1 log-normaliser.* expected no col_lse"):
        LogNormalizerMemory(4, columns=False).update(index, rows, cols)
