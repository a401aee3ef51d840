"""Gradient caching: gradients, draws, buffers and states of one step over the whole batch.

Truth is plain autograd in float64 with the graph of every chunk kept: the same seed gives each chunk the same dropout.
"""

from __future__ import annotations

import copy
from collections import UserDict, namedtuple

import contrastile as ct
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, FEATURES, DIM = 23, 7, 5
EXACT = 1e-12  # relative to the largest entry
Pair = namedtuple("Pair", "left right")


def tower(dropout: float = 0.4, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, 11), nn.Tanh(), nn.Dropout(dropout), nn.Linear(11, DIM), nn.Dropout(dropout)
    ).to(dtype)


def batch(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, FEATURES, dtype=dtype)


def dense_info_nce(x: Tensor, y: Tensor, scale: Tensor | float = 3.0) -> Tensor:
    logits = scale * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    target = torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def fused_info_nce(x: Tensor, y: Tensor, scale: Tensor | float = 3.0) -> Tensor:
    return ct.info_nce(F.normalize(x, dim=1), F.normalize(y, dim=1), scale)


def chunked(encoder, inputs: Tensor, size: int) -> Tensor:
    """Embeddings with the graph of every chunk."""
    return torch.cat([encoder(inputs[i : i + size]) for i in range(0, len(inputs), size)])


def take_gradients(*owners: nn.Module | Tensor) -> list[Tensor]:
    leaves = [leaf for owner in owners for leaf in (owner.parameters() if isinstance(owner, nn.Module) else [owner])]
    found = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


def assert_equal_to(expected: list[Tensor], found: list[Tensor], allowed: float = EXACT) -> None:
    assert len(expected) == len(found)
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        error = (a - b).abs().max() / a.abs().max()
        assert a.abs().max() > 0
        assert error <= allowed, f"gradient {number}: relative error {error:.3g} > {allowed}"


# Gradients


@pytest.mark.parametrize("sizes", [(1, 1), (4, 9), (23, 100)], ids=str)
def test_gradients_with_dropout_are_those_of_all_chunks_at_once(sizes):
    f, g, images, texts = tower(), tower(), batch(), batch()
    log_scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(5)
    x, y = chunked(f, images, sizes[0]), chunked(g, texts, sizes[1])
    noise = torch.rand(DIM, dtype=torch.float64)  # a loss that draws
    truth = dense_info_nce(x + noise, y, log_scale.exp())
    truth.backward()
    after = torch.rand(3)
    expected = take_gradients(f, g, log_scale)

    torch.manual_seed(5)

    def loss_fn(x, y):
        return fused_info_nce(x + torch.rand(DIM, dtype=torch.float64), y, log_scale.exp())

    loss = ct.cached_backward(loss_fn, (f, images), (g, texts), chunk_size=sizes)
    assert torch.equal(torch.rand(3), after), "the step has drawn other numbers than one forward"
    assert_equal_to(expected, take_gradients(f, g, log_scale))
    assert loss.item() == pytest.approx(truth.item(), rel=EXACT)
    assert not loss.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 6, 23])
def test_gradients_without_dropout_are_those_of_the_whole_batch_in_one_forward(chunk_size):
    f, g, images, texts = tower(0.0), tower(0.0), batch(), batch()
    dense_info_nce(f(images), g(texts)).backward()
    expected = take_gradients(f, g)
    ct.cached_backward(dense_info_nce, (f, images), (g, texts), chunk_size=chunk_size)
    assert_equal_to(expected, take_gradients(f, g))


def test_one_model_as_both_towers():
    f, queries, documents = tower(), batch(), batch()
    torch.manual_seed(5)
    dense_info_nce(chunked(f, queries, 4), chunked(f, documents, 6)).backward()
    expected = take_gradients(f)
    torch.manual_seed(5)
    ct.cached_backward(dense_info_nce, (f, queries), (f, documents), chunk_size=(4, 6))
    assert_equal_to(expected, take_gradients(f))


@pytest.mark.parametrize(
    "wrap", [tuple, list, lambda losses: dict(enumerate(losses)), sum], ids=["tuple", "list", "dict", "sum"]
)
def test_three_towers_and_two_losses(wrap):
    encoders, inputs = [tower() for _ in range(3)], [batch() for _ in range(3)]

    def losses(x, y, z):
        return wrap([dense_info_nce(x, y), 0.3 * dense_info_nce(y, z)])

    torch.manual_seed(5)
    x, y, z = (chunked(f, rows, 5) for f, rows in zip(encoders, inputs, strict=True))
    (dense_info_nce(x, y) + 0.3 * dense_info_nce(y, z)).backward()
    expected = take_gradients(*encoders)
    torch.manual_seed(5)
    result = ct.cached_backward(losses, *zip(encoders, inputs, strict=True), chunk_size=5)
    assert_equal_to(expected, take_gradients(*encoders))
    assert type(result) is type(wrap([torch.tensor(0.0), torch.tensor(0.0)]))


def test_losses_with_backwards_of_their_own():
    f, images = tower(0.0), batch()
    x = f(images)
    (x[:9].square().sum() + x[9:].sum()).backward()
    expected = take_gradients(f)
    cache = ct.GradientCache()
    x = cache.encode(f, images, 4)
    x[:9].square().sum().backward()
    x[9:].sum().backward()
    cache.backward()
    assert_equal_to(expected, take_gradients(f))
    cache.backward(cache.encode(f, images, 4).square().sum())  # one object serves the next step


def test_gradients_accumulate_as_in_a_plain_backward():
    f, steps = tower(0.0), [batch(), batch()]
    for rows in steps:
        (dense_info_nce(f(rows), f(rows.flip(1))) / 2).backward()
    expected = take_gradients(f)
    for rows in steps:
        ct.cached_backward(lambda x, y: dense_info_nce(x, y) / 2, (f, rows), (f, rows.flip(1)), chunk_size=4)
    assert_equal_to(expected, take_gradients(f))


def test_leaf_inputs_get_their_gradient():
    f, images = tower(0.0), batch().requires_grad_()
    f(images).square().sum().backward()
    expected = take_gradients(images)
    f.requires_grad_(False)
    with torch.no_grad():
        cache = ct.GradientCache()
        x = cache.encode(f, images, 4)
    cache.backward(x.square().sum())
    assert_equal_to(expected, take_gradients(images))


def test_encoder_with_several_outputs():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = tower(), tower()

        def forward(self, inputs):
            return {"pair": Pair(self.image(inputs["image"]), self.text(inputs["text"])), "unused": inputs["text"] * 2}

    both, inputs = Both(), {"image": batch(), "text": batch()}
    torch.manual_seed(5)
    parts = [both({k: v[i : i + 4] for k, v in inputs.items()})["pair"] for i in range(0, ROWS, 4)]
    dense_info_nce(*(torch.cat(side) for side in zip(*parts, strict=True))).backward()
    expected = take_gradients(both)
    torch.manual_seed(5)
    ct.cached_backward(lambda found: dense_info_nce(*found["pair"]), (both, inputs), chunk_size=4)
    assert_equal_to(expected, take_gradients(both))


# The loss is called once


def test_gamma_loss_remembers_and_draws_once():
    f, g, images, texts, index = tower(), tower(), batch(), batch(), torch.randperm(100)[:ROWS]
    plain = ct.GammaContrastiveLoss(100, learnable_scale=True)
    cached = copy.deepcopy(plain)  # of the same seed
    for step in range(3):  # the second reads what the first remembered
        torch.manual_seed(step)
        x, y = chunked(f, images, 4), chunked(g, texts, 4)
        truth = plain(F.normalize(x, dim=1), F.normalize(y, dim=1), index)
        truth.backward()
        expected = take_gradients(f, g, plain)
        torch.manual_seed(step)
        loss = ct.cached_backward(
            lambda x, y: cached(F.normalize(x, dim=1), F.normalize(y, dim=1), index),
            (f, images),
            (g, texts),
            chunk_size=4,
        )
        assert loss.item() == pytest.approx(truth.item(), rel=EXACT)
        assert_equal_to(expected, take_gradients(f, g, cached), 1e-9)  # the memory is float32
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], value)


def test_every_chunk_is_encoded_twice_and_the_loss_is_called_once():
    f, calls = tower(), []

    def encoder(rows):
        calls.append(("encoder", len(rows), torch.is_grad_enabled()))
        return f(rows)

    def loss(x):
        calls.append(("loss", len(x), x.is_leaf))
        return x.square().sum()

    ct.cached_backward(loss, (encoder, batch(10)), chunk_size=4)
    sizes = (4, 4, 2)
    assert calls == [("encoder", n, False) for n in sizes] + [("loss", 10, True)] + [
        ("encoder", n, True) for n in sizes
    ]


# Inputs


class Encoding(UserDict):
    """Like a tokenizer's output: a mapping that is no dict, with attributes of its own."""

    def __init__(self, data, kind):
        super().__init__(data)
        self.kind = kind


def test_nested_inputs_keep_their_structure():
    seen = []

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tower(0.0)

        def forward(self, inputs):
            assert isinstance(inputs, Encoding)
            assert inputs.kind == "tokens"
            assert isinstance(inputs["pair"], Pair)
            assert isinstance(inputs["list"], list)
            assert inputs["list"][1] == "as it is"
            assert inputs["factor"].dim() == 0
            assert inputs["none"] is None
            seen.append(len(inputs["list"][0]))
            return inputs["factor"] * self.inner(inputs["pair"].left + inputs["pair"].right[0]) * inputs["list"][0]

    f = Nested()
    inputs = Encoding(
        {
            "pair": Pair(batch(), (batch(),)),
            "list": [torch.rand(ROWS, 1, dtype=torch.float64), "as it is"],
            "factor": torch.tensor(2.0, dtype=torch.float64),
            "none": None,
        },
        "tokens",
    )
    f(inputs).square().sum().backward()
    expected = take_gradients(f)
    seen.clear()
    ct.cached_backward(lambda x: x.square().sum(), (f, inputs), chunk_size=10)
    assert_equal_to(expected, take_gradients(f))
    assert seen == [10, 10, 3] * 2
    assert len(inputs["list"][0]) == ROWS, "the caller's mapping was changed"


def test_chunks_of_variable_length_given_as_a_list():
    f = nn.EmbeddingBag(50, DIM, mode="mean").double()
    chunks = [torch.randint(50, (rows, length)) for rows, length in ((3, 4), (1, 17), (5, 2))]
    dense_info_nce(x := torch.cat([f(chunk) for chunk in chunks]), x.flip(1)).backward()
    expected = take_gradients(f)
    ct.cached_backward(lambda x: dense_info_nce(x, x.flip(1)), (f, chunks), chunk_size=None)
    assert_equal_to(expected, take_gradients(f))


def test_chunks_may_be_packed_or_hold_no_tensor():
    f = nn.EmbeddingBag(50, DIM, mode="sum").double()
    packed = [(torch.randint(50, (9,)), torch.tensor([0, 4, 5])), (torch.randint(50, (3,)), torch.tensor([0, 1]))]
    vocabulary = {"a": 3, "b": 4}

    def embed_words(words):
        return f(torch.tensor([[vocabulary[word]] for word in words]))

    words = [["a", "b", "a"], ["b", "b"]]
    texts = torch.cat([embed_words(chunk) for chunk in words])
    dense_info_nce(torch.cat([f(*chunk) for chunk in packed]), texts).backward()
    expected = take_gradients(f)
    ct.cached_backward(dense_info_nce, (lambda c: f(*c), packed), (embed_words, words), chunk_size=None)
    assert_equal_to(expected, take_gradients(f))
