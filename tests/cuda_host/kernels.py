"""The kernels of csrc/cuda on a processor, behind the launches that contrastile.backends.cuda makes."""

from __future__ import annotations

import importlib.util
import sysconfig
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import pybind11
from cuda_host.build import HERE, ORDERS, ROOT, TARGETS, build

NAME = "contrastile_cuda_host"
INCLUDES = (Path(pybind11.get_include()), Path(sysconfig.get_path("include")))


@cache
def load(sanitizer: str = "", checks: bool = False) -> ModuleType:
    """What contrastile._C.cuda offers, and settings and counters of the execution layer."""
    sources = [HERE / "module.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    library = build(sources, sanitizer, checks, INCLUDES)
    spec = importlib.util.spec_from_loader(NAME, ExtensionFileLoader(NAME, str(library)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configure(
    module: ModuleType, target: str = "sm_86", blocks: str = "natural", random_threads: bool = False, seed: int = 0
) -> None:
    module.configure(TARGETS.index(target), ORDERS.index(blocks), random_threads, seed)
