"""Run by test_memory.py in a process of its own: peak memory of losses, in MiB beyond inputs and gradients.

    python memory_child.py '{"cases": ["info_nce"], "backend": "cpu", "rows": 4096, "dim": 64, "threads": 2}'

Prints {case: MiB} as JSON, and under "kept" what the process still holds of a workspace after them. The kernel's
high-water mark of the process is reset before each case, through /proc/self/clear_refs, so what a case needs is not
hidden under what an earlier one or the warm-up needed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import contrastile as ct
import torch
import torch.nn.functional as F


def status_kib(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def reset_peak() -> None:
    gc.collect()
    ct.backends.set_workspace(ct.backends.workspace_bytes())  # nothing kept from an earlier case
    ctypes.CDLL(None).malloc_trim(0)  # memory that an earlier case freed must not pass for free memory of this one
    Path("/proc/self/clear_refs").write_text("5")


def dense(x, y, scale):
    return F.cross_entropy(scale * x @ y.T, torch.arange(len(x)))


def losses(backend: str):
    def gamma(x, y, scale):
        weights = torch.full((len(x),), -8.0)
        return ct.gamma_contrastive(x, y, scale, weights, weights, backend=backend).loss

    def normalizers(x, y, scale):
        row_lse, col_lse = ct.log_normalizers(x, y, scale, backend=backend)
        return row_lse.sum() + col_lse.sum()

    return {
        "dense": dense,
        "info_nce": lambda x, y, scale: ct.info_nce(x, y, scale, backend=backend),
        "info_nce_bfloat16": lambda x, y, scale: ct.info_nce(x, y, scale, backend=backend),
        "info_nce_none": lambda x, y, scale: ct.info_nce(x, y, scale, reduction="none", backend=backend).sum(),
        "one_direction": lambda x, y, scale: ct.info_nce(x, y, scale, symmetric=False, backend=backend),
        "gamma": gamma,
        "nt_xent": lambda x, y, scale: ct.nt_xent(x, scale, backend=backend),
        "log_normalizers": normalizers,
        "prefixes": lambda x, y, scale: ct.matryoshka(
            ct.info_nce, x, y, dims=(x.shape[1] // 4, x.shape[1] // 2, x.shape[1]), scale=scale, backend=backend
        ),
    }


def kept_mib() -> float:
    """What setting the workspace anew gives back."""
    before = status_kib("VmRSS")
    ct.backends.set_workspace(ct.backends.workspace_bytes())
    return (before - status_kib("VmRSS")) / 1024


def extra_mib(loss, case: str, rows: int, dim: int) -> float:
    dtype = torch.bfloat16 if case.endswith("bfloat16") else torch.float32
    x, y = (F.normalize(torch.randn(rows, dim), dim=1).to(dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0, requires_grad=True)
    reset_peak()
    before = status_kib("VmRSS")
    loss(x, y, scale).backward()
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in (x, y) if t.grad is not None)
    return (status_kib("VmHWM") - before) / 1024 - gradients / 2**20


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    chosen = {case: losses(task["backend"])[case] for case in task["cases"]}
    for case, loss in chosen.items():
        extra_mib(loss, case, 300, task["dim"])
    found = {case: extra_mib(loss, case, task["rows"], task["dim"]) for case, loss in chosen.items()}
    print(json.dumps(found | {"kept": kept_mib()}))
