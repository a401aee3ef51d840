"""Inputs of an encoder, however nested, cut into chunks of rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


def tensors_in(tree: Any) -> list[Tensor]:
    """Tensors of nested dictionaries, lists and tuples, depth first."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [tensor for child in tree.values() for tensor in tensors_in(child)]
    if isinstance(tree, (list, tuple)):
        return [tensor for child in tree for tensor in tensors_in(child)]
    return []


def with_tensors(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """tree with its tensors replaced, in the order of `tensors_in`; everything else is the same object."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, Mapping):
        changed: MutableMapping[Any, Any] = copy.copy(tree) if isinstance(tree, MutableMapping) else dict(tree)
        for key, child in tree.items():
            changed[key] = with_tensors(child, tensors)
        return changed
    if isinstance(tree, (list, tuple)):
        children = [with_tensors(child, tensors) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return tree


class Chunk(NamedTuple):
    value: Any
    rows: int | None  # None where the caller cut: a chunk may then be packed, or hold no tensor


def chunks_of(inputs: Any, chunk_size: int | None, name: str) -> list[Chunk]:
    """What the encoder is called with, one after the other."""
    tensors = tensors_in(inputs)
    if any(t.requires_grad and not t.is_leaf for t in tensors):
        raise ValueError(
            f"inputs of {name} hold a tensor computed with a graph, which every chunk would walk again: "
            "expected leaves; let the encoder compute it, or detach it"
        )
    if chunk_size is None:
        if not isinstance(inputs, (list, tuple)) or not inputs:
            raise TypeError(
                f"inputs of {name} are {type(inputs).__name__} and chunk_size is None: expected a chunk_size, "
                "or a list of at least one chunk"
            )
        return [Chunk(chunk, None) for chunk in inputs]
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool):
        raise TypeError(f"chunk_size of {name} is {type(chunk_size).__name__}: expected an integer of 1 or more")
    if chunk_size < 1:
        raise ValueError(f"chunk_size of {name} is {chunk_size}: expected 1 or more")
    counts = {len(t) for t in tensors if t.dim()}
    if not counts:
        raise ValueError(f"inputs of {name} ({type(inputs).__name__}) hold no tensor with rows: nothing to split")
    if len(counts) > 1 or counts == {0}:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(
            f"inputs of {name} have shapes {shapes}: expected tensors of one and the same number of rows, at least 1; "
            "else cut them yourself, give the list of chunks and chunk_size=None"
        )
    (rows,) = counts
    with torch.enable_grad():  # inputs may be leaves that get gradients
        return [_rows_of(inputs, tensors, start, min(start + chunk_size, rows)) for start in range(0, rows, chunk_size)]


def _rows_of(inputs: Any, tensors: list[Tensor], start: int, end: int) -> Chunk:
    cut = (t[start:end] if t.dim() else t for t in tensors)
    return Chunk(with_tensors(inputs, cut), end - start)
