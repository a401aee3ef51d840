"""The CUDA kernels on a processor, through the backend's own launches: the same sweeps as every backend's.

With the layer's checks on: a race in shared memory, a copy read before its wait, a bank conflict or a stray access to
shared memory fails a test, whatever the numbers are.
"""

from __future__ import annotations

import dense_sweeps
import pytest
import torch
from contrastile.backends.cuda import CudaBackend
from contrastile.backends.cuda_launches import CudaKernels
from contrastile.pairs import PairProblem
from cuda_host import build as host
from cuda_host import kernels
from dense_sweeps import PROBLEMS
from test_pair_sweeps import *  # noqa: F403
from test_pair_sweeps import NARROW

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(host.compiler() is None, reason="there is no C++ compiler"),
]

CASES = [(name, torch.float32) for name in PROBLEMS]
CASES += [(name, dtype) for name in NARROW for dtype in (torch.float16, torch.bfloat16)]


@pytest.fixture(scope="module")
def native():
    return kernels.load(checks=True)


@pytest.fixture
def backend(native, monkeypatch, request):
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and torch.float64 in parameters.params.values():
        pytest.skip("takes no float64")
    monkeypatch.setattr(dense_sweeps, "BACKENDS_HERE", ["cuda"])
    kernels.configure(native)
    return CudaBackend(CudaKernels(native))


@pytest.fixture(params=CASES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in CASES])
def problem(request) -> PairProblem:
    name, dtype = request.param
    return PROBLEMS[name](dtype)
