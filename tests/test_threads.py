"""The C++ backend beside PyTorch's threads: one pool, and none that a fork leaves behind."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support import BACKENDS_HERE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("cpu" not in BACKENDS_HERE, reason="the cpu backend is not available"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and /proc"),
]

PRELUDE = """
import os, torch
import contrastile as ct

torch.set_num_threads(2)
x, y = torch.randn(2, 700, 16, generator=torch.Generator().manual_seed(0))


def ranks():
    return ct.retrieval_ranks(x, y, backend="cpu")


before = ranks()
"""

IN_A_FORK = """
process = os.fork()
if process == 0:
    os._exit(0 if torch.equal(ranks(), before) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), torch.equal(ranks(), before))
"""

OPENMP_RUNTIMES = """
with open("/proc/self/maps") as maps:
    print(*{line.split()[-1] for line in maps if "libgomp" in line})
"""


def printed(code: str) -> str:
    child = subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


def test_a_forked_process_computes_the_same():
    # An OpenMP pool does not survive a fork: whoever uses the copy waits for ever. So do some of PyTorch's own
    # functions (exp, log), which is why a forked process with several threads is asked for ranks, not for a loss.
    assert printed(IN_A_FORK) == "0 True"


def test_there_is_one_openmp_runtime():
    if "OpenMP" not in torch.__config__.parallel_info() or not printed(OPENMP_RUNTIMES):
        pytest.skip("this PyTorch does not run on libgomp")
    assert len(printed(OPENMP_RUNTIMES).split()) == 1
