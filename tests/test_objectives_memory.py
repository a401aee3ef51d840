"""Peak memory of the new options all together, beyond inputs and gradients, in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_memory import PROMISE_MIB, _why_not_measurable

pytestmark = pytest.mark.skipif(_why_not_measurable() is not None, reason=_why_not_measurable() or "")

ROWS, DIM, HARD = 8192, 64, 2
EMBEDDINGS = 14  # what is kept of x, y and the hard negatives, in rows of x
CHILD = """
import contrastile as ct, json, sys, torch
from memory_child import extra_mib
torch.set_num_threads(2)
rows, dim, hard = map(int, sys.argv[1:])

def own(x):
    return x.detach()[:, None].expand(-1, hard, -1).clone().requires_grad_()

def options(x, **more):
    groups = (torch.arange(len(x)) // 3,) * 2
    return {"prior": 0.01, "label_smoothing": 0.1, "groups": groups, "hard_negatives": own(x), **more}

losses = {
    "info_nce": lambda x, y, s: ct.info_nce(x, y, s, **options(x)),
    "margin": lambda x, y, s: ct.info_nce(x, y, s, hard_negatives=own(x), false_negative_margin=-0.1),
    "directions": lambda x, y, s: ct.directional_info_nce(x, y, s, **options(x)),
}
for loss in losses.values():
    extra_mib(loss, "warm-up", 300, dim)
print(json.dumps({case: extra_mib(loss, case, rows, dim) for case, loss in losses.items()}))
"""


@pytest.mark.slow
def test_extra_memory_of_all_options_is_vectors_beside_the_workspace():
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, (ROWS, DIM, HARD))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    embeddings = ROWS * DIM * 4 / 2**20  # one side
    assert max(found.values()) <= PROMISE_MIB + EMBEDDINGS * embeddings, f"MiB beyond inputs and gradients: {found}"
