"""What the integrations share: the switch that gives the originals back, and the dtype that autocast asks for."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

SWITCH = "CONTRASTILE_INTEGRATIONS"

Class = TypeVar("Class", bound=type)


def in_place_of(module: str) -> Callable[[Class], Class]:
    """Decorator of a class: with the switch at 0, the class of the same name in the library's module instead.

    Raises:
        ValueError: the switch is neither unset nor 0 or 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH} is {switch!r}: expected 0, the libraries' own losses, or 1")

    def chosen(ours: Class) -> Class:
        if switch == "1":
            return ours
        original: Class = getattr(importlib.import_module(module), ours.__name__)
        return original

    return chosen


def as_autocast_multiplies(embeddings: Tensor) -> Tensor:
    """In autocast's dtype where a matrix product would be, so that a loss runs at the precision asked for.

    Unit rows come in float32 under autocast, as normalising is kept in it; the dense losses narrow them in their
    products. What is summed here stays float32. float64 stays what it is, as in autocast.
    """
    device = embeddings.device.type
    if embeddings.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return embeddings
    return embeddings.to(torch.get_autocast_dtype(device))
