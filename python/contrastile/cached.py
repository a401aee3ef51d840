"""Gradient caching: one loss over a whole batch whose encoders only ever hold the activations of one chunk.

    first     embeddings of every chunk, without a graph; the state each chunk met is remembered   O(N D) kept
    loss      one loss over all N embeddings, once; its backward leaves dL/dE at the embeddings     O(N D) kept
    second    each chunk again, in that state, with a graph; backward from its rows of dL/dE         one chunk kept

By the chain rule dL/dw = sum over chunks of (dE_chunk/dw)^T dL/dE_chunk, so the gradients are those of a backward
through all chunks at once. After Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", RepL4NLP 2021.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contrastile.chunks import chunks_of, tensors_in, with_tensors

Encoder = Callable[[Any], Any]


def cached_backward(
    loss_fn: Callable[..., Any],
    *towers: tuple[Encoder, Any],
    chunk_size: int | Sequence[int | None] | None,
    scaler: torch.amp.GradScaler | None = None,
) -> Any:
    """Forward and backward of loss_fn over the embeddings of all towers, encoding chunk by chunk.

    In place of `loss_fn(*(encoder(inputs) for encoder, inputs in towers)).backward()`: gradients are added to `.grad`
    of the encoders' parameters and of whatever else the loss depends on, such as a learnable scale.

    Args:
        loss_fn: called once with one argument per tower, the embeddings of all its N rows; gives the loss, or a tuple,
            list or dictionary of losses, whose gradients add up.
        towers: pairs (encoder, inputs), as `GradientCache.encode` takes them. Encoders may share parameters.
        chunk_size: rows to encode at a time: one number, or one per tower; None where inputs are a list of chunks.
        scaler: its current scale multiplies the gradients; `scaler.step(optimizer)` then divides by it.

    Returns:
        What loss_fn returned, detached and not scaled.

    Raises:
        ValueError: no tower is given; chunk_size has not one entry per tower; as GradientCache does.
        TypeError, RuntimeError: as GradientCache does.
    """
    sizes = list(chunk_size) if isinstance(chunk_size, Sequence) else [chunk_size] * len(towers)
    if not towers or len(sizes) != len(towers):
        raise ValueError(f"chunk_size has {len(sizes)} entries for {len(towers)} towers: expected one each")
    cache = GradientCache()
    embeddings = [cache.encode(*tower, size) for tower, size in zip(towers, sizes, strict=True)]
    result = loss_fn(*embeddings)
    losses = tensors_in(result)
    _check_losses(losses, expected="loss_fn to return one loss, or several")
    cache.backward(*(losses if scaler is None else scaler.scale(losses)))
    return with_tensors(result, (loss.detach() for loss in losses))


class GradientCache:
    """Gradient caching for a training loop of one's own: encode every tower, form any loss, call backward here.

        cache = GradientCache()
        x = cache.encode(image_encoder, images, chunk_size=64)
        y = cache.encode(text_encoder, tokens, chunk_size=256)
        cache.backward(loss_fn(x, y))

    The second forward sees the random number generators (torch's own, on the CPU and on the devices of the chunk's
    tensors and of the encoder's parameters), the autocast state and the buffers as the first forward of that chunk saw
    them. Buffers, such as running statistics, end as the first forwards and the loss left them, also those of a loss in
    the encoder's module. A buffer written both there and in an encoder's backward keeps only the former. Generators and
    buffers that PyTorch does not know the encoder to own (Python's `random`, a closure's module) are not set back.

    A step that is skipped after an encode calls `reset` in place of backward, or the next step would meet its towers.

    DistributedDataParallel is found where the encoder is one, holds one as a submodule, or is a method of such a
    module. It exchanges gradients once, in the last chunk of the last tower that uses it.

    Attributes:
        replay_errors: after backward, for each encode a tensor (): the largest difference between an embedding's two
            forwards, relative to the largest entry. 0 or rounding; more means a state that was not reproduced.
    """

    def __init__(self) -> None:
        self.replay_errors: list[Tensor] = []
        self._towers: list[_Tower] = []
        self._buffers: dict[tuple[int, str], _Buffer] = {}

    def reset(self) -> None:
        """Forgets what is encoded. Buffers and generators stay as the forwards left them."""
        self._towers, self._buffers = [], {}

    def encode(self, encoder: Encoder, inputs: Any, chunk_size: int | None = None) -> Any:
        """Embeddings of all rows of inputs, (N, ...), leaves that require gradients.

        An encode that raises adds nothing: it may be called again, say with smaller chunks.

        Args:
            encoder: called with one chunk, gives a floating-point tensor with a row for each of the chunk's, or a
                tuple, list or dictionary of such tensors; encode returns the like.
            inputs: tensors with N rows, alone or within dictionaries, lists and tuples; tensors () and what is no
                tensor go to every chunk as they are. With chunk_size None: a list of chunks, each what encoder takes.
                A tensor that requires its gradient must be a leaf.
            chunk_size: rows of a chunk, at least 1; the last chunk may have fewer.

        Raises:
            TypeError: chunk_size is no integer; inputs are no list of chunks without one; encoder gives no
                floating-point tensor.
            ValueError: chunk_size is below 1; inputs have no tensor, no rows or unequal rows; one is part of a graph;
                embeddings have not the chunk's rows, are empty, or differ in shape or dtype between chunks.
        """
        name = f"tower {len(self._towers)}"
        chunks = chunks_of(inputs, chunk_size, name)
        module = _module_of(encoder)
        buffers = _buffers_of(module)
        moments, parts, like = [], [], None
        with torch.no_grad():
            for number, chunk in enumerate(chunks):
                moments.append(_Moment.now(chunk.value, module))
                like = encoder(chunk.value)
                parts.append(tensors_in(like))
                _check_embeddings(parts[0], parts[-1], chunk.rows, f"chunk {number} of {name}")
            # Weights cast here carry no graph. Releases of PyTorch that keep them in autocast's cache would hand them
            # to the second forward, whose parameters would then get no gradient.
            torch.clear_autocast_cache()
            leaves = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        rows = [len(pieces[0]) for pieces in parts]
        self._buffers = buffers | self._buffers  # where encodes share a buffer, as the first of them met it
        self._towers.append(_Tower(name, encoder, module, [chunk.value for chunk in chunks], moments, rows, leaves))
        return with_tensors(like, iter(leaves))

    def backward(self, *losses: Tensor) -> None:
        """Backward of the sum of losses into the embeddings, then through the encoders; forgets both.

        In place of `loss.backward()`. With a GradScaler: `cache.backward(scaler.scale(loss))`. Without losses it takes
        the gradients that earlier `loss.backward()` calls left in the embeddings.

        Raises:
            RuntimeError: nothing is encoded; the embeddings of a tower got no gradient; an encoder's output requires
                none, as all of its parameters are frozen.
            TypeError, ValueError: a loss is no tensor of one element, or does not depend on anything.
        """
        if not self._towers:
            raise RuntimeError("nothing is encoded: expected encode() before each backward()")
        towers, buffers = self._towers, self._buffers
        self.reset()
        if losses:
            _check_losses(losses, expected="backward to be given losses")
            torch.autograd.backward(losses)
        for tower in towers:
            if all(leaf.grad is None for leaf in tower.leaves):
                raise RuntimeError(
                    f"the embeddings of {tower.name} got no gradient: expected a loss that uses them, "
                    "and reset() after a step that was skipped"
                )
        last_use = {wrapper: tower for tower in towers for wrapper in tower.data_parallel}
        with _set_back(buffers.values()):
            self.replay_errors = [
                tower.replay([wrapper for wrapper in tower.data_parallel if last_use[wrapper] is tower])
                for tower in towers
            ]


@dataclass(eq=False)
class _Tower:
    """One encode: what its second forward needs."""

    name: str
    encoder: Encoder
    module: nn.Module | None
    chunks: list[Any]
    moments: list[_Moment]  # one per chunk
    rows: list[int]  # of each chunk's embeddings
    leaves: list[Tensor]  # (N, ...) each

    @property
    def data_parallel(self) -> list[DistributedDataParallel]:
        parts = [] if self.module is None else self.module.modules()
        return [part for part in parts if isinstance(part, DistributedDataParallel)]

    def replay(self, synchronised: list[DistributedDataParallel]) -> Tensor:
        """Second forward and backward of every chunk. In the last one the given wrappers exchange gradients."""
        gradients = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None
        first = [leaf.detach().split(self.rows) for leaf in self.leaves]
        upstream = [None if grad is None else grad.split(self.rows) for grad in gradients]
        errors = []
        for number in range(len(self.chunks)):
            last = number + 1 == len(self.chunks)
            with ExitStack() as stack:
                for wrapper in self.data_parallel:
                    if not last or wrapper not in synchronised:
                        stack.enter_context(wrapper.no_sync())
                errors += self._replay_chunk(number, [e[number] for e in first], [g and g[number] for g in upstream])
        return torch.stack(errors).amax()

    def _replay_chunk(self, number: int, first: list[Tensor], upstream: list[Tensor | None]) -> list[Tensor]:
        with self.moments[number].again(), torch.enable_grad():
            second = tensors_in(self.encoder(self.chunks[number]))
        reached = [(embedding, grad) for embedding, grad in zip(second, upstream, strict=True) if grad is not None]
        if not all(embedding.requires_grad for embedding, _ in reached):
            raise RuntimeError(
                f"the encoder's output for chunk {number} of {self.name} requires no gradient: expected a trainable "
                "encoder; embed with a frozen one under torch.no_grad(), outside, and let the loss take the result"
            )
        torch.autograd.backward([embedding for embedding, _ in reached], [grad for _, grad in reached])
        return [_relative_error(a, b.detach()) for a, b in zip(first, second, strict=True)]


def _relative_error(expected: Tensor, found: Tensor) -> Tensor:
    largest = expected.abs().amax().clamp_min(torch.finfo(expected.dtype).tiny)  # all may be 0
    return (found - expected).abs().amax() / largest


class _Moment(NamedTuple):
    """What a chunk's first forward met besides its inputs and parameters."""

    devices: list[torch.device]
    rng_states: list[Tensor]  # of the CPU, then of each device
    autocast: list[tuple[str, bool, torch.dtype]]
    autocast_cache: bool

    @classmethod
    def now(cls, chunk: Any, module: nn.Module | None) -> _Moment:
        tensors = [*tensors_in(chunk), *([] if module is None else module.parameters())]
        devices = sorted({t.device for t in tensors} - {torch.device("cpu"), torch.device("meta")}, key=str)
        kinds = ["cpu", *sorted({device.type for device in devices})]
        autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        return cls(devices, _rng_states(devices), autocast, torch.is_autocast_cache_enabled())

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same generators' states and autocast; afterwards those of before."""
        before = _rng_states(self.devices)
        try:
            with ExitStack() as stack:
                for kind, enabled, dtype in self.autocast:
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=self.autocast_cache))
                _set_rng_states(self.devices, self.rng_states)
                yield
        finally:
            _set_rng_states(self.devices, before)


def _rng_states(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(*_index(d)) for d in devices)]


def _set_rng_states(devices: list[torch.device], states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one, and its functions take no argument


@dataclass
class _Buffer:
    """A module's buffer at one moment."""

    module: nn.Module
    name: str
    tensor: Tensor
    value: Tensor

    @classmethod
    def now(cls, module: nn.Module, name: str, tensor: Tensor) -> _Buffer:
        return cls(module, name, tensor, tensor.detach().clone())

    def is_changed(self, tensor: Tensor) -> bool:
        try:
            return tensor is not self.tensor or not torch.equal(tensor, self.value)
        except NotImplementedError:  # sparse, or on the meta device
            return True

    @torch.no_grad()
    def set_back(self) -> None:
        self.module._buffers[self.name] = self.tensor  # where a forward put another tensor in its place
        self.tensor.copy_(self.value)  # always: batch norm changes running statistics without a new version


def _buffers_of(module: nn.Module | None) -> dict[tuple[int, str], _Buffer]:
    return {
        (id(part), name): _Buffer.now(part, name, tensor)
        for part in ([] if module is None else module.modules())
        for name, tensor in part._buffers.items()
        if tensor is not None
    }


@contextmanager
def _set_back(buffers: Collection[_Buffer]) -> Iterator[None]:
    """Buffers as they were; afterwards those changed since then as now, the others as the second forwards left them."""
    changed = [
        _Buffer.now(buffer.module, buffer.name, tensor)
        for buffer in buffers
        if (tensor := buffer.module._buffers.get(buffer.name)) is not None and buffer.is_changed(tensor)
    ]
    try:
        for buffer in buffers:
            buffer.set_back()
        yield
    finally:
        for buffer in changed:
            buffer.set_back()


def _module_of(encoder: Encoder) -> nn.Module | None:
    """The module that encoder is, or is a method of, also within functools.partial."""
    while isinstance(encoder, functools.partial):
        encoder = encoder.func
    owner = getattr(encoder, "__self__", encoder)
    return owner if isinstance(owner, nn.Module) else None


def _check_embeddings(expected: list[Tensor], found: list[Tensor], rows: int | None, where: str) -> None:
    if not found or not all(t.is_floating_point() for t in found):
        kinds = ", ".join(str(t.dtype) for t in found) or "no tensor"
        raise TypeError(f"the encoder gave {kinds} for {where}: expected floating-point embeddings")
    shapes = ", ".join(str(tuple(t.shape)) for t in found)
    if not all(t.dim() and t.numel() and len(t) == (rows or len(found[0])) for t in found):
        wanted = "the same number of rows, at least 1" if rows is None else f"{rows} rows, as the chunk has"
        raise ValueError(f"the encoder gave shape {shapes} for {where}: expected {wanted}")
    if [(t.shape[1:], t.dtype) for t in found] != [(t.shape[1:], t.dtype) for t in expected]:
        others = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in expected)
        raise ValueError(
            f"the encoder gave shape {shapes} {found[0].dtype} for {where}, but {others} for the first chunk: "
            "expected the same dtype, and the same shape but for the rows"
        )


def _check_losses(losses: Sequence[Any], expected: str) -> None:
    if not losses or not all(isinstance(loss, Tensor) for loss in losses):
        kinds = ", ".join(type(loss).__name__ for loss in losses) or "nothing"
        raise TypeError(f"loss is {kinds}: expected {expected}, tensors ()")
    for loss in losses:
        if loss.numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"loss has shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}: expected {expected}, "
                "of one element and a function of the embeddings"
            )
