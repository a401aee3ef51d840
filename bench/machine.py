"""The machine under the benchmark: what it is, what memory is free, how much a process has used."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

GIB = 2**30
MIB = 2**20
LIBRARIES = (
    "contrastile",
    "torch",
    "triton",
    "numpy",
    "open_clip_torch",
    "lightly",
    "sentence-transformers",
    "pykeops",
    "memeff",
    "inf_cl",
)


def describe() -> dict[str, object]:
    """CPU model, cores, caches, memory, system, and GPU where there is one; what a figure must be read with."""
    lscpu, device = _lscpu(), gpu()
    return {
        "cpu": lscpu.get("Model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads_per_core": lscpu.get("Thread(s) per core"),
        "caches": {name: lscpu[f"{name} cache"] for name in ("L1d", "L2", "L3") if f"{name} cache" in lscpu},
        "vector_extensions": [
            flag for flag in ("avx2", "fma", "avx512f", "amx_tile") if flag in lscpu.get("Flags", "")
        ],
        "memory_gib": _total_gib(),
        "system": platform.system(),
        **({} if device is None else {"gpu": device}),
    }


def gpu() -> dict[str, object] | None:
    """The current CUDA or ROCm device and its driver; None without one."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    rocm = torch.version.hip
    return {
        "name": torch.cuda.get_device_name(),
        "architecture": found.gcnArchName if rocm else f"sm_{found.major}{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / GIB, 1),
        "driver": _gpu_driver(),
        "cuda": torch.version.cuda,
        "rocm": rocm,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def available_bytes() -> int | None:
    """Memory that can be used without swapping, the limit of a container included; None where unknown."""
    bounds = [bound for bound in (_system_available(), _cgroup_available()) if bound is not None]
    return min(bounds) if bounds else None


class PeakMemory:
    """Growth of this process's resident memory above what it held at the start.

    Linux keeps the peak (VmHWM) and lets a process reset its own. Elsewhere only the peak since the process
    began is known, so a rise below an earlier peak goes unseen; `note` then says so.
    """

    def __init__(self) -> None:
        gc.collect()
        _return_freed_memory()
        self.note: str | None = None
        self._read: Callable[[], int]
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._start = _proc_status("VmRSS")
            self._read = partial(_proc_status, "VmHWM")
        except OSError:
            self.note = "peak since process start: a lower bound"
            self._start = _max_resident()
            self._read = _max_resident

    def growth(self) -> int:
        """Bytes between the start and the highest point since."""
        return max(0, self._read() - self._start)


class DevicePeakMemory:
    """The same for the memory that PyTorch has given out on the current CUDA or ROCm device."""

    note: str | None = None

    def __init__(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._start = torch.cuda.memory_allocated()

    def growth(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self._start


def _return_freed_memory() -> None:
    # What the allocator holds back would hide as many bytes of the growth.
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc
    except (AttributeError, OSError, TypeError):
        return


def _proc_status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def _max_resident() -> int:
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _system_available() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def _cgroup_available() -> int | None:
    root = Path("/sys/fs/cgroup")
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"),
    ):
        try:
            return int(limit.read_text()) - int(used.read_text())
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return None


def _total_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpu_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        if torch.version.hip:
            return Path("/sys/module/amdgpu/version").read_text().strip()
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _lscpu() -> dict[str, str]:
    try:
        text = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
