"""Gradient caching: what the second forward of a chunk meets is what the first one met; and scaled losses."""

from __future__ import annotations

import copy
import functools

import contrastile as ct
import pytest
import torch
import torch.nn.functional as F
from test_cached import (
    DIM,
    EXACT,
    FEATURES,
    ROWS,
    assert_equal_to,
    batch,
    chunked,
    dense_info_nce,
    take_gradients,
    tower,
)
from torch import Tensor, nn

# Autocast and scaled losses


def autocast_truth(f, g, images, texts, outer_cache):
    """Each chunk casts its weights anew, as the cached run does: their gradients add up in float32."""
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=outer_cache):
        loss = dense_info_nce(chunked(f, images, 4), chunked(g, texts, 4))
    loss.backward()
    return take_gradients(f, g)


@pytest.mark.parametrize("backward_within", [True, False])
def test_second_forward_runs_under_the_autocast_of_the_first(backward_within):
    f, g = tower(dtype=torch.float32), tower(dtype=torch.float32)
    images, texts = batch(dtype=torch.float32), batch(dtype=torch.float32)
    expected = autocast_truth(f, g, images, texts, outer_cache=False)
    seen = []
    f.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    torch.manual_seed(5)
    cache = ct.GradientCache()
    with torch.autocast("cpu", torch.bfloat16):
        loss = dense_info_nce(cache.encode(f, images, 4), cache.encode(g, texts, 4))
        if backward_within:
            cache.backward(loss)
    if not backward_within:
        cache.backward(loss)
    assert seen == [torch.bfloat16] * 12
    assert_equal_to(expected, take_gradients(f, g), 1e-5)
    assert [error.item() for error in cache.replay_errors] == [0, 0]


def test_autocast_around_the_backward_alone_does_not_reach_the_encoders():
    f, images = tower(dtype=torch.float32), batch(dtype=torch.float32)
    cache = ct.GradientCache()
    x = cache.encode(f, images, 4)
    with torch.autocast("cpu", torch.bfloat16):
        cache.backward(x.square().sum())
    assert cache.replay_errors[0] == 0


def test_weights_cast_without_a_graph_do_not_reach_the_second_forward(monkeypatch):
    f, images, calls = tower(0.0, torch.float32), batch(dtype=torch.float32), []
    clear = torch.clear_autocast_cache
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (calls.append("cleared"), clear()))
    f.register_forward_hook(lambda *_: calls.append("graph" if torch.is_grad_enabled() else "no graph"))
    with torch.autocast("cpu", torch.bfloat16):
        ct.cached_backward(lambda x: x.float().square().sum(), (f, images), chunk_size=12)
    # Recent releases of PyTorch cast with a graph even under no_grad: there only the order of calls can fail.
    assert [call for call in calls if call != "cleared"] == ["no graph"] * 2 + ["graph"] * 2
    assert calls[2] == "cleared"
    assert [p.grad is not None and bool(p.grad.any()) for p in f.parameters()] == [True] * 4


def test_grad_scaler_scales_gradients_and_step_divides_them():
    f, images = tower(0.0), batch()
    optimizer = torch.optim.SGD(f.parameters(), lr=1.0)
    truth = f(images).square().mean()
    truth.backward()
    expected = take_gradients(f)
    before = copy.deepcopy(list(f.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    loss = ct.cached_backward(lambda x: x.square().mean(), (f, images), chunk_size=4, scaler=scaler)
    assert loss.item() == pytest.approx(truth.item(), rel=EXACT)
    assert_equal_to([2.0**12 * grad for grad in expected], [p.grad for p in f.parameters()])
    scaler.step(optimizer)
    scaler.update()
    assert_equal_to(expected, [a - b for a, b in zip(before, f.parameters(), strict=True)], 1e-9)

    f.zero_grad()
    cache = ct.GradientCache()
    cache.backward(scaler.scale(cache.encode(f, images, 4).square().mean()))
    found = take_gradients(f)
    scaler.scale(f(images).square().mean()).backward()
    assert_equal_to(take_gradients(f), found)


# Buffers and generators


class Running(nn.Module):
    """A batch norm, a buffer that the output depends on, and one that is replaced at every forward."""

    moving: Tensor
    replaced: Tensor

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(FEATURES, DIM), nn.BatchNorm1d(DIM)).double()
        self.register_buffer("moving", torch.ones((), dtype=torch.float64))
        self.register_buffer("replaced", torch.ones((), dtype=torch.float64))

    def forward(self, rows, factor=1.0):
        self.moving.mul_(1.5)
        self.replaced = self.replaced + factor
        return self.embed(rows)

    def embed(self, rows):
        return self.inner(rows) * self.moving.clone() + rows[:, :DIM] * self.replaced


@pytest.mark.parametrize("shared", [True, False])
def test_buffers_end_where_one_forward_would_have_left_them(shared):
    plain = [Running()] if shared else [Running(), Running()]
    cached = copy.deepcopy(plain)
    images, texts = batch(), batch()
    dense_info_nce(chunked(plain[0], images, 4), chunked(plain[-1], texts, 5)).backward()
    ct.cached_backward(dense_info_nce, (cached[0], images), (cached[-1], texts), chunk_size=(4, 5))
    assert_equal_to(take_gradients(*plain), take_gradients(*cached))
    for a, b in zip(plain, cached, strict=True):
        for name, value in a.state_dict().items():
            assert torch.equal(b.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("encoder_of", "updates"),
    [
        (lambda f: f.embed, 6),
        (lambda f: functools.partial(functools.partial(f), factor=2.0), 6),
        (lambda f: lambda rows: f(rows), 12),  # a closure's module is not found, as the documentation says
    ],
    ids=["method", "partial", "closure"],
)
def test_whose_buffers_are_found(encoder_of, updates):
    f, images = Running(), batch()
    ct.cached_backward(lambda x: x.square().sum(), (encoder_of(f), images), chunk_size=4)
    assert f.inner[1].num_batches_tracked == updates


class WithLoss(nn.Module):
    """Both towers and the loss, whose memory is among the buffers; the encoders read one of the others, write one."""

    queue: Tensor
    center: Tensor
    calls: Tensor

    def __init__(self):
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Linear(FEATURES, DIM, bias=False), nn.BatchNorm1d(DIM)).double() for _ in range(2)
        )
        self.loss = ct.GammaContrastiveLoss(100)
        self.register_buffer("queue", torch.full((3, DIM), torch.nan, dtype=torch.float64))
        self.register_buffer("center", torch.zeros(DIM, dtype=torch.float64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def embed(self, side, rows):
        self.calls += 1
        return F.normalize(side(rows) - self.center, dim=1)

    def image(self, rows):
        return self.embed(self.left, rows)

    def text(self, rows):
        return self.embed(self.right, rows)

    def forward(self, x, y, index):
        self.calls += 1
        self.queue[:2] = x[:2].detach()
        self.center = 0.9 * self.center + 0.1 * x.detach().mean(0)
        return self.loss(x, y, index)


def test_backward_does_not_undo_the_memory_of_a_loss_within_the_encoders_module():
    plain = WithLoss()
    cached = copy.deepcopy(plain)
    for _ in range(3):
        images, texts, index = batch(), batch(), torch.randperm(100)[:ROWS]
        plain(chunked(plain.image, images, 4), chunked(plain.text, texts, 5), index).backward()
        ct.cached_backward(
            functools.partial(cached, index=index), (cached.image, images), (cached.text, texts), chunk_size=(4, 5)
        )
        expected, found = take_gradients(plain.left, plain.right), take_gradients(cached.left, cached.right)
        assert_equal_to(expected, found, 1e-9)  # the memory is float32
    assert cached.calls == 3 * (6 + 5 + 1)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], value, equal_nan=True)


def test_buffers_written_in_the_second_forward_or_the_backward_alone_are_kept():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(FEATURES, DIM, dtype=torch.float64)
            self.register_buffer("with_graph", torch.zeros(()))
            self.register_buffer("backwards", torch.zeros(()))
            self.register_full_backward_hook(lambda module, *_: module.backwards.add_(1) and None)

        def forward(self, rows):
            self.with_graph += torch.is_grad_enabled()
            return super().forward(rows)

    f, images = Counting(), batch().requires_grad_()
    ct.cached_backward(lambda x: x.square().sum(), (f, images), chunk_size=4)
    assert (f.with_graph, f.backwards) == (6, 6)


def test_buffers_end_as_the_loss_left_them_when_the_second_forward_fails():
    f, images = Running(), batch()

    def fail_with_graph(module, inputs):
        if torch.is_grad_enabled():
            raise KeyError("second forward")

    f.inner.register_forward_pre_hook(fail_with_graph)
    with pytest.raises(KeyError):
        ct.cached_backward(lambda x: x.square().sum() * f.moving.add_(1), (f, images), chunk_size=4)
    assert (f.moving, f.replaced, f.inner[1].num_batches_tracked) == (1.5**6 + 1, 1 + 6, 6)


def test_buffers_that_cannot_be_compared_are_accepted():
    f, images = tower(), batch()
    f.register_buffer("graph", torch.eye(3).to_sparse())
    ct.cached_backward(lambda x: x.square().sum(), (f, images), chunk_size=4)
    assert torch.equal(f.graph.to_dense(), torch.eye(3))


@pytest.mark.parametrize("dead", [4, ROWS])
def test_replay_errors_are_0_not_nan_where_a_chunk_embeds_to_zeros(dead):
    f, images = nn.Linear(FEATURES, DIM, bias=False).double(), batch()
    images[:dead] = 0
    cache = ct.GradientCache()
    cache.backward((cache.encode(f, images, 4) + 1).square().sum())
    assert cache.replay_errors[0] == 0


def test_replay_errors_tell_of_randomness_that_was_not_reproduced():
    f, images, own = tower(0.3), batch(), torch.Generator().manual_seed(0)
    cache = ct.GradientCache()
    x = cache.encode(f, images, 4)
    y = cache.encode(lambda rows: f(rows) * torch.rand(len(rows), 1, generator=own), images, 4)
    cache.backward(dense_info_nce(x, y))
    first, second = cache.replay_errors
    assert first == 0
    assert second > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dropout_on_a_device_is_that_of_the_first_forward():
    f, images = tower().cuda(), batch().cuda()
    torch.manual_seed(5)
    chunked(f, images, 4).square().sum().backward()
    after = torch.rand(3, device="cuda")
    expected = take_gradients(f)
    torch.manual_seed(5)
    ct.cached_backward(lambda x: x.square().sum(), (f, images), chunk_size=4)
    assert torch.equal(torch.rand(3, device="cuda"), after)
    assert_equal_to(expected, take_gradients(f))
