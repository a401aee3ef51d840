"""Peak memory of geometric consistency and the row losses, beyond inputs and gradients, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_memory import PROMISE_MIB, _why_not_measurable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_why_not_measurable() is not None, reason=_why_not_measurable() or ""),
]

CHILD = """
import contrastile as ct, json, sys, torch
from memory_child import extra_mib
torch.set_num_threads(2)
rows, dim = map(int, sys.argv[1:])
losses = {
    "geometry": lambda x, y, scale: ct.geometric_consistency(x, y),
    "geometry_bfloat16": lambda x, y, scale: ct.geometric_consistency(x, y, in_weight=0.5),
    "bridge": lambda x, y, scale: ct.brownian_bridge(x.detach(), x, y),
}
for case, loss in losses.items():
    extra_mib(loss, case, 300, dim)
print(json.dumps({case: extra_mib(loss, case, rows, dim) for case, loss in losses.items()}))
"""


def extra_mib(rows: int, dim: int) -> dict[str, float]:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(rows), str(dim)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_extra_memory_of_131072_rows_is_the_workspace_and_gram_matrices():
    found = extra_mib(131072, 512)
    grams = 8 * 512**2 * 4 / 2**20
    assert max(found.values()) <= PROMISE_MIB + grams, f"MiB beyond inputs and gradients: {found}"
