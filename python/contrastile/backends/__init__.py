"""Backends of the pairwise operations, and the one place that chooses among them.

The choice is, first to last: the `backend` argument of a function, `use_backend`, the environment variable
CONTRASTILE_BACKEND, and else the first backend of AUTOMATIC_ORDER that can run on the tensors' device.
A backend that was named and cannot run raises; only the automatic choice passes on to the next, and says so once.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import cast

import torch

from contrastile.pairs import Backend

__all__ = ["available", "get", "resolve", "set_workspace", "use_backend", "workspace_bytes"]

AUTOMATIC_ORDER = ("triton", "cuda", "cpu", "eager")
DEVICES = {
    "triton": ("cuda",),
    "cuda": ("cuda",),
    "cpu": ("cpu",),
}  # device types that a backend is limited to; no entry: any
GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = {"triton": GPU_DTYPES, "cuda": GPU_DTYPES}  # likewise dtypes of embeddings
MODULES = {name: f"contrastile.backends.{name}" for name in AUTOMATIC_ORDER}

DEFAULT_WORKSPACE_MB = 64

_named: ContextVar[str | None] = ContextVar("contrastile_backend", default=None)
_fallbacks_told: set[str] = set()
_workspace_bytes: int | None = None


def available() -> dict[str, str | None]:
    """Every backend by name, with None where it can run here and otherwise the reason why not."""
    return {name: _unavailable_reason(name) for name in MODULES}


def get(backend: Backend | str) -> Backend:
    """The backend of this name, known to be available; what is a backend already, as it is."""
    if not isinstance(backend, str):
        return backend
    return cast(Backend, importlib.import_module(MODULES[backend]))


def resolve(backend: str | None, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend for embeddings of a dtype on a device type ("cpu", "cuda", ...).

    Raises:
        ValueError: no backend has that name.
        TypeError: the named backend does not take that dtype.
        RuntimeError: the named backend cannot run here, or not on such a device.
    """
    named = backend or _named.get() or os.environ.get("CONTRASTILE_BACKEND")
    if named:
        _check_runs(named)
        devices = ("cpu",) if named == "triton" and _interprets_triton() else DEVICES.get(named, (device_type,))
        if device_type not in devices:
            raise RuntimeError(
                f"backend {named!r} runs on tensors on {' or '.join(devices)}, these are on {device_type}"
            )
        if dtype not in DTYPES.get(named, (dtype,)):
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in DTYPES[named])
            raise TypeError(f"backend {named!r} takes {kinds}, these embeddings are {dtype}")
        return named
    for name in AUTOMATIC_ORDER:
        if device_type not in DEVICES.get(name, (device_type,)) or dtype not in DTYPES.get(name, (dtype,)):
            continue
        reason = _unavailable_reason(name)
        if reason is None:
            return name
        _tell_once(name, reason)
    raise RuntimeError(f"no backend runs on tensors on {device_type}")


# A compiled graph keeps the backend that was chosen while tracing. This is all that torch.compiler's
# assume_constant_result does, but calling it imports the compiler, which takes seconds.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Within this block (and this thread or task), calls without a `backend` argument use this one.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run here.
    """
    _check_runs(backend)
    token = _named.set(backend)
    try:
        yield
    finally:
        _named.reset(token)


def workspace_bytes() -> int:
    """Bound of the memory that a sweep uses for tiles of logits: 64 MiB unless set.

    The environment variable CONTRASTILE_WORKSPACE_MB is read once, at the first use.
    """
    if _workspace_bytes is None:
        set_workspace(_workspace_of_environment())
    return cast(int, _workspace_bytes)


def set_workspace(size: int) -> None:
    """Bounds the memory that a sweep uses for tiles of logits, in bytes, for all threads.

    What a backend keeps of it from one sweep to the next is given back.

    Raises:
        ValueError: size is not a positive number of bytes, or more than there are addresses.
    """
    global _workspace_bytes
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= sys.maxsize:
        raise ValueError(f"workspace is {size!r}: expected a positive number of bytes, at most {sys.maxsize}")
    _workspace_bytes = size
    cpu = sys.modules.get(MODULES["cpu"])  # not loaded, it keeps nothing
    if cpu is not None:
        cpu.release_workspace()


def _workspace_of_environment() -> int:
    text = os.environ.get("CONTRASTILE_WORKSPACE_MB", str(DEFAULT_WORKSPACE_MB))
    try:
        size = int(float(text) * 2**20)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"CONTRASTILE_WORKSPACE_MB is {text!r}: expected a positive number of MiB")
    return size


def _interprets_triton() -> bool:
    from contrastile.backends import triton

    return triton.interpreting()


@cache
def _unavailable_reason(name: str) -> str | None:
    try:
        return get(name).unavailable_reason()
    except ImportError as error:
        return str(error)


def _check_runs(name: str) -> None:
    if name not in MODULES:
        raise ValueError(f"backend is {name!r}: expected one of {', '.join(map(repr, MODULES))}")
    reason = _unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason}")


def _tell_once(name: str, reason: str) -> None:
    if name not in _fallbacks_told:
        _fallbacks_told.add(name)
        warnings.warn(
            f"contrastile's backend {name!r} cannot run and another is used: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
