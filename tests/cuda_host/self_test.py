"""The kernels of self_test.cu for the tests of the layer, built with the sanitizers of CUDA_HOST_SANITIZER if set."""

from __future__ import annotations

import ctypes
import os
from functools import cache

import numpy as np
from cuda_host import build as host

SOURCE = host.HERE / "self_test.cu"
SANITIZER = os.environ.get("CUDA_HOST_SANITIZER", "")

SCHEDULES = [
    {},
    {"blocks": "reversed"},
    *({"blocks": "random", "random_threads": True, "seed": seed} for seed in range(5)),
]


class Kernels:
    """run(kernel, arrays, numbers) of self_test_exports.h."""

    def __init__(self, checks: bool):
        self.checks = checks
        self.library = host.Library(host.build([SOURCE], SANITIZER, checks))

    def __call__(self, name: str, *arrays: np.ndarray, numbers: tuple[int, ...] = (), **settings) -> host.Report:
        self.library.configure(**settings)
        buffers = (ctypes.c_void_p * max(1, len(arrays)))(*(array.ctypes.data for array in arrays))
        return self.library.call("run", name.encode(), buffers, (ctypes.c_int * max(1, len(numbers)))(*numbers))


@cache
def load(checks: bool) -> Kernels:
    return Kernels(checks)
