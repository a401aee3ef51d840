"""Starts the tests that the Triton kernels share with the other backends, and their own, in Triton's interpreter.

Triton reads TRITON_INTERPRET when kernels are defined: one process interprets or compiles.
`make interpreter-full` leaves nothing out.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import INTERPRETING

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INTERPRETING, reason="this run is such a child already"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

FULL = os.environ.get("CONTRASTILE_KERNELS") == "full"
TESTS = Path(__file__).parent

# Float64 is no dtype of these kernels, and a batch of 4,096 takes the interpreter minutes.
NEVER = "not gradients_of_the_loss and not cubic"
COVER = {
    "test_triton_kernels.py": "",
    "test_triton_rows.py": "",
    "test_triton_softmax.py": "",
    "test_pair_sweeps.py": (
        "(groups-and-self or lonely or self-triangular-258 or deep or one-by-one or ranks or nan or regimes or layout "
        "or confident or overflow) and not several-tiles and not (regimes and bfloat16)"
    ),
    "test_siglip.py": (
        "groups-and-self-bfloat16 or deep-float16 or huge-scale or nan or confident or few_units or passed_over "
        "or float16_gradient"
    ),
    "test_triton_tuning.py": "",
    "test_peer_faults.py": "not flat_softmax",
    "test_evaluate.py": "",
}


@pytest.mark.parametrize("file", COVER)
def test_passes_in_the_interpreter(file):
    arguments = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file)]
    if not FULL:
        arguments += ["-m", "not slow"]
    arguments += ["-k", NEVER if FULL or not COVER[file] else f"({COVER[file]}) and {NEVER}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(arguments, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
