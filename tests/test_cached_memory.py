"""Gradient caching: peak memory of a step in fresh processes, and what the second forward costs.

python tests/test_cached_memory.py          seconds of a plain step and of a cached one, and the peak of each
python tests/test_cached_memory.py ROWS SIZE  one process: {"seconds": ..., "mib": ...}; SIZE 0 is a plain step
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import contrastile as ct
import pytest
import torch
from contrastile.demo.data import IMAGE_SIZE
from contrastile.demo.models import VOCABULARY, TwoTowers
from torch import Tensor

BATCH, TIMES, CHUNK = 256, 16, 64
WORKSPACE_MB = 8
TOKENS = 40  # of a caption
REPEATS = 5


def status_kib(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def one_step(model: TwoTowers, inputs: tuple[Tensor, Tensor], chunk_size: int) -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ct.info_nce(x, y, model.scale)

    if chunk_size:
        ct.cached_backward(loss, (model.image, inputs[0]), (model.text, inputs[1]), chunk_size=chunk_size)
    else:
        loss(model.image(inputs[0]), model.text(inputs[1])).backward()


def random_inputs(rows: int) -> tuple[Tensor, Tensor]:
    return (
        torch.randint(256, (rows, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8),
        torch.randint(VOCABULARY, (rows, TOKENS)),
    )


def measured(rows: int, chunk_size: int, repeats: int) -> dict[str, float]:
    """Median seconds of `repeats` steps; peak of the first in MiB beyond inputs, parameters and their gradients."""
    torch.manual_seed(0)
    model = TwoTowers()
    one_step(model, random_inputs(8), 8)  # gradients, libraries and threads
    inputs = random_inputs(rows)
    gc.collect()
    ct.backends.set_workspace(ct.backends.workspace_bytes())  # nothing kept from the warm-up
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_kib("VmRSS")
    one_step(model, inputs, chunk_size)
    mib = (status_kib("VmHWM") - before) / 1024
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        one_step(model, inputs, chunk_size)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": median(seconds), "mib": mib}


def in_a_child(rows: int, chunk_size: int, repeats: int = 1) -> dict[str, float]:
    path = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.run(
        [sys.executable, __file__, str(rows), str(chunk_size), str(repeats)],
        env=os.environ | {"PYTHONPATH": path, "CONTRASTILE_WORKSPACE_MB": str(WORKSPACE_MB)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_batch_16_times_larger_takes_no_more_memory():
    plain, cached = in_a_child(BATCH, 0)["mib"], in_a_child(TIMES * BATCH, CHUNK)["mib"]
    assert plain > 40, f"the test is blind: {plain:.0f} MiB"
    assert cached <= plain, f"{cached:.0f} MiB for {TIMES * BATCH} rows in chunks, {plain:.0f} for {BATCH} at once"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        print(json.dumps(measured(*map(int, sys.argv[1:]))))
    else:
        large = TIMES * BATCH
        for rows, size in ((BATCH, 0), (large, 0), *((large, size) for size in (CHUNK // 2, CHUNK, BATCH))):
            found = in_a_child(rows, size, REPEATS)
            what = f"cached, chunks of {size}" if size else "plain"
            print(f"{rows:5} rows, {what:22} {found['seconds']:7.3f} s {found['mib']:7.0f} MiB", flush=True)
