"""One training run: two encoders, one loss, one seed; and what is measured of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import contrastile as ct
from contrastile.bench.machine import PeakMemory
from contrastile.demo.data import IMAGE_SIZE, EmojiPairs
from contrastile.demo.models import TwoTowers, tokenize
from contrastile.losses import GammaContrastiveLoss

WEIGHT_DECAY = 0.05
WARM_UP_SHARE = 0.1  # of the steps
LARGEST_SHIFT = 3  # pixels
NGRAM_DROPOUT = 0.3
GAMMA_SHAPE = 4.0  # over few epochs the noise of draws of shape 1 costs more than it teaches
CHECKS = 10  # points of the training curves
CHUNK = 128  # images encoded at a time where no gradient is wanted: less memory than a training step
RECALL_AT = (1, 5, 10)
SCALES = [2 ** (step / 2) for step in range(2, 14)]  # 2 to 91


@dataclass(frozen=True)
class Method:
    """What differs between the runs that are compared."""

    loss: str  # info_nce | gamma
    batch_size: int
    learning_rate: float
    init_scale: float

    @property
    def name(self) -> str:
        return f"{'InfoNCE' if self.loss == 'info_nce' else 'gamma loss'}, batch {self.batch_size}"


@dataclass(frozen=True)
class Dataset:
    """Pairs as the encoders take them, and which of them are trained on."""

    images: Tensor  # (n, 3, IMAGE_SIZE, IMAGE_SIZE) uint8, channels last
    tokens: Tensor  # (n, L) int64
    train: Tensor  # (n_train,) int64 positions
    held_out: Tensor  # (n_held_out,) int64 positions
    train_sample: Tensor  # as many training pairs as are held out: their losses compare

    @classmethod
    def of(cls, pairs: EmojiPairs) -> Dataset:
        train, held_out = (~pairs.held_out).nonzero().flatten(), pairs.held_out.nonzero().flatten()
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: len(held_out)]
        images = pairs.images.contiguous(memory_format=torch.channels_last)
        return cls(images, tokenize(pairs.captions), train, held_out, train[chosen])


@dataclass(frozen=True)
class Quality:
    """Over all pairs of a set."""

    info_nce: float
    info_nce_refit: float  # at the best of SCALES instead of the model's own
    image_to_text: dict[int, float]  # recall at k
    text_to_image: dict[int, float]

    def recall(self, k: int) -> float:
        """Mean of both directions."""
        return (self.image_to_text[k] + self.text_to_image[k]) / 2


@dataclass(frozen=True)
class Point:
    """Of the training curves."""

    epochs: float
    train_sample: Quality
    held_out: Quality


@dataclass(frozen=True)
class Result:
    method: Method
    seed: int
    steps: int
    held_out: Quality
    train: Quality
    scale: float
    seconds: float  # training alone
    step_seconds: float  # median
    loss_seconds: float  # median of forward + backward of the loss, without the encoders
    peak_bytes: int  # growth of the process: model, optimiser, activations, loss
    memory_note: str | None
    curve: list[Point]


def train(
    dataset: Dataset, method: Method, seed: int, epochs: int, on_step: Callable[[int], object]
) -> tuple[TwoTowers, Result]:
    """Train from scratch. The same seed gives the same model, pair order and augmentation at the same batch size.

    on_step is told how many pairs a step has taken.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    memory = PeakMemory()
    model = TwoTowers(method.init_scale)
    loss_of = make_loss(method, len(dataset.train))
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=method.learning_rate, fused=True)
    steps = steps_of(dataset, method, epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_up_then_cosine(step / steps))

    curve: list[Point] = []
    step_times: list[float] = []
    loss_times: list[float] = []
    batches = shuffled_batches(len(dataset.train), method.batch_size, epochs, generator)
    for step, index in enumerate(batches, start=1):
        begin = time.perf_counter()
        pairs = dataset.train[index]
        x = model.image(shifted(dataset.images[pairs], generator))
        y = model.text(dropped(dataset.tokens[pairs], generator))
        # The loss alone is timed: it ends at leaves, and the encoders' backward starts from their gradients.
        x_leaf, y_leaf = x.detach().requires_grad_(), y.detach().requires_grad_()
        loss_begin = time.perf_counter()
        torch.autograd.backward(loss_of(x_leaf, y_leaf, index, model.scale))
        loss_times.append(time.perf_counter() - loss_begin)
        torch.autograd.backward([x, y], [x_leaf.grad, y_leaf.grad])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        step_times.append(time.perf_counter() - begin)
        on_step(len(index))
        if step * CHECKS // steps > (step - 1) * CHECKS // steps:
            held_out = evaluate(model, dataset, dataset.held_out)
            train_sample = evaluate(model, dataset, dataset.train_sample)
            curve.append(Point(epochs * step / steps, train_sample, held_out))
    peak_bytes = memory.growth()  # before the whole training set is evaluated
    return model, Result(
        method=method,
        seed=seed,
        steps=steps,
        held_out=curve[-1].held_out,
        train=evaluate(model, dataset, dataset.train),
        scale=model.scale.item(),
        seconds=sum(step_times),
        step_seconds=median(step_times),
        loss_seconds=median(loss_times),
        peak_bytes=peak_bytes,
        memory_note=memory.note,
        curve=curve,
    )


def steps_of(dataset: Dataset, method: Method, epochs: int) -> int:
    return epochs * (len(dataset.train) // method.batch_size)


def make_loss(method: Method, num_samples: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    if method.loss == "gamma":
        return GammaContrastiveLoss(num_samples, shape=GAMMA_SHAPE)
    return lambda x, y, index, scale: ct.info_nce(x, y, scale)


def parameter_groups(model: TwoTowers) -> list[dict[str, object]]:
    """Weight decay for matrices, none for biases, gains and the temperature."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def warm_up_then_cosine(progress: float) -> float:
    return min(1.0, (progress + 1e-3) / WARM_UP_SHARE) * (1 + math.cos(math.pi * progress)) / 2


def shuffled_batches(count: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions 0 .. count - 1 in a new order each epoch; the incomplete last batch is left out."""
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count - count % batch_size], batch_size)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to LARGEST_SHIFT pixels, white where nothing is left."""
    padded = F.pad(images, [LARGEST_SHIFT] * 4, value=255)
    pixels = torch.arange(IMAGE_SIZE)
    offsets = torch.randint(2 * LARGEST_SHIFT + 1, (2, len(images), 1), generator=generator)
    rows, cols = offsets + pixels
    which = torch.arange(len(images))[:, None, None]
    return padded[which, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def dropped(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Each n-gram left out with probability NGRAM_DROPOUT."""
    return tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < NGRAM_DROPOUT, 0)


@torch.no_grad()
def embed(model: TwoTowers, dataset: Dataset, which: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of images and captions, (len(which), EMBEDDING_DIM) each."""
    images = torch.cat([model.image(dataset.images[part]) for part in torch.split(which, CHUNK)])
    return images, model.text(dataset.tokens[which])


@torch.no_grad()
def evaluate(model: TwoTowers, dataset: Dataset, which: Tensor) -> Quality:
    x, y = embed(model, dataset, which)
    return Quality(
        info_nce=ct.info_nce(x, y, model.scale).item(),
        info_nce_refit=min(ct.info_nce(x, y, scale).item() for scale in SCALES),
        image_to_text=ct.recall_at_k(ct.retrieval_ranks(x, y), RECALL_AT),
        text_to_image=ct.recall_at_k(ct.retrieval_ranks(y, x), RECALL_AT),
    )
