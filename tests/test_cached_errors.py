"""Gradient caching: what it refuses, and that the message names the tower, the shape and what was expected."""

from __future__ import annotations

import contrastile as ct
import pytest
import torch
from torch import nn

ROWS = torch.randn(10, 4)
HALF = nn.Linear(4, 3)


def total(x):
    return x.square().sum()


def step(encoder=HALF, inputs=ROWS, chunk_size=4, loss=total):
    return ct.cached_backward(loss, (encoder, inputs), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size of tower 0 is 0: expected 1 or more"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size of tower 0 is float"),
        ({"chunk_size": True}, TypeError, "chunk_size of tower 0 is bool"),
        ({"chunk_size": (4, 4)}, ValueError, "chunk_size has 2 entries for 1 towers"),
        ({"chunk_size": None}, TypeError, "inputs of tower 0 are Tensor and chunk_size is None"),
        ({"chunk_size": None, "inputs": []}, TypeError, "a list of at least one chunk"),
        ({"inputs": ["a", "b"]}, ValueError, "hold no tensor with rows"),
        ({"inputs": torch.tensor(1.0)}, ValueError, "hold no tensor with rows"),
        ({"inputs": ROWS[:0]}, ValueError, r"shapes \(0, 4\)"),
        ({"inputs": (ROWS, ROWS[1:])}, ValueError, r"shapes \(10, 4\), \(9, 4\): expected .* same number of rows"),
        ({"inputs": HALF(ROWS), "encoder": nn.Linear(3, 3)}, ValueError, "computed with a graph"),
        ({"encoder": lambda x: HALF(x)[:-1]}, ValueError, r"shape \(3, 3\) for chunk 0 of tower 0: expected 4 rows"),
        ({"encoder": lambda x: HALF(x).mean()}, ValueError, r"shape \(\) for chunk 0"),
        ({"encoder": lambda x: HALF(x)[:, :0]}, ValueError, r"shape \(4, 0\) for chunk 0"),
        ({"encoder": lambda x: HALF(x)[:, : len(x)]}, ValueError, r"\(2, 2\) .* for chunk 2 .*\(4, 3\)"),
        ({"encoder": lambda x: x.argmax(1)}, TypeError, "gave torch.int64 for chunk 0 of tower 0"),
        ({"encoder": lambda x: None}, TypeError, "gave no tensor for chunk 0 of tower 0"),
        ({"encoder": lambda x: x * 2}, RuntimeError, "chunk 0 of tower 0 requires no gradient"),
        ({"encoder": nn.Linear(4, 3).requires_grad_(False)}, RuntimeError, "under torch.no_grad"),
        ({"loss": lambda x: x.square()}, ValueError, r"loss has shape \(10, 3\)"),
        ({"loss": lambda x: torch.tensor(1.0)}, ValueError, "requires_grad=False"),
        ({"loss": lambda x: 1.0}, TypeError, "loss is nothing"),
        ({"loss": lambda x: (HALF.weight**2).sum()}, RuntimeError, "embeddings of tower 0 got no gradient"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_message(arguments, error, message):
    with pytest.raises(error, match=message):
        step(**arguments)


def test_second_tower_is_named():
    with pytest.raises(ValueError, match="tower 1"):
        ct.cached_backward(total, (HALF, ROWS), (HALF, ()), chunk_size=2)


def test_no_tower():
    with pytest.raises(ValueError, match="0 towers"):
        ct.cached_backward(total, chunk_size=2)


def test_backward_before_encode_and_twice():
    cache = ct.GradientCache()
    with pytest.raises(RuntimeError, match="nothing is encoded"):
        cache.backward(torch.ones((), requires_grad=True))
    x = cache.encode(HALF, ROWS, 4)
    cache.backward(total(x))
    with pytest.raises(RuntimeError, match="nothing is encoded"):
        cache.backward(total(x))


def test_encode_that_failed_does_not_set_buffers_back_in_a_later_step():
    encoder, cache = nn.Sequential(HALF, nn.BatchNorm1d(3)), ct.GradientCache()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cache.encode(encoder, [ROWS, ROWS[:, 1:]])
    encoder(ROWS)
    cache.backward(total(cache.encode(encoder, ROWS, 5)))
    assert encoder[1].num_batches_tracked == 1 + 1 + 2


def test_skipped_step_is_forgotten_after_reset():
    encoder, cache = nn.Sequential(HALF, nn.BatchNorm1d(3)), ct.GradientCache()
    total(cache.encode(encoder, ROWS, 5)).backward()  # its embeddings have a gradient, which no one must take
    cache.reset()
    with pytest.raises(RuntimeError, match="nothing is encoded"):
        cache.backward()
    encoder.zero_grad()
    cache.backward(cache.encode(encoder, ROWS, 5).sin().sum())
    found = HALF.weight.grad
    assert len(cache.replay_errors) == 1
    assert encoder[1].num_batches_tracked == 2 * 2
    encoder.zero_grad()
    step(encoder, chunk_size=5, loss=lambda x: x.sin().sum())
    torch.testing.assert_close(found, HALF.weight.grad)


def test_skipped_step_that_was_not_reset_is_told():
    cache = ct.GradientCache()
    cache.encode(HALF, ROWS, 4)
    with pytest.raises(RuntimeError, match=r"embeddings of tower 0 got no gradient: .* reset\(\)"):
        cache.backward(total(cache.encode(HALF, ROWS, 4)))


def test_loss_that_is_no_tensor():
    cache = ct.GradientCache()
    cache.encode(HALF, ROWS, 4)
    with pytest.raises(TypeError, match="loss is float"):
        cache.backward(1.0)


def test_generators_are_set_back_when_the_second_forward_fails():
    cache, calls = ct.GradientCache(), []

    def encoder(rows):
        calls.append(torch.rand(3))
        if torch.is_grad_enabled():
            raise KeyError("second forward")
        return HALF(rows)

    x = cache.encode(encoder, ROWS, 10)
    torch.rand(3)  # the loss, say
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        cache.backward(total(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(calls[0], calls[1])
