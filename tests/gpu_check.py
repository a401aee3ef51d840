"""make gpu-check: the suite and the benchmark on a machine with a CUDA device, in one results file.

    python tests/gpu_check.py RESULTS.json

Exits with 1, writing nothing, where there is no CUDA device. Backends that are missing are named first, and in
the file: what ran without them says nothing about them.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import contrastile
import torch

GPU_BACKENDS = ("triton", "cuda")


def main(results: Path) -> int:
    reasons = contrastile.backends.available()
    missing = {name: reasons.get(name, "not in this version") for name in GPU_BACKENDS}
    missing = {name: reason for name, reason in missing.items() if reason is not None}
    for name, reason in missing.items():
        print(f"GPU backend {name}: missing, {reason}")
    if not torch.cuda.is_available():
        why = "was built without CUDA" if torch.version.cuda is None else "finds no device"
        print(f"gpu-check needs a CUDA device: torch {torch.__version__} {why}", file=sys.stderr)
        return 1

    results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        suite, bench = Path(folder, "suite.xml"), Path(folder, "bench.json")
        status = subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={suite}"]).returncode
        status |= subprocess.run([sys.executable, "-m", "contrastile", "bench", "--out", str(bench)]).returncode
        report = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "contrastile": contrastile.__version__,
            "missing_backends": missing,
            "suite": suite_counts(suite),
            "benchmark": json.loads(bench.read_text()) if bench.exists() else None,
        }
    results.write_text(json.dumps(report, indent=1))
    print(f"results in {results}")
    return int(status != 0)


def suite_counts(junit: Path) -> dict[str, int] | None:
    if not junit.exists():
        return None
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    return totals


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
