"""make gpu-check: what can only be known on a GPU, in one results file.

    python tests/gpu_check.py [--only suite,sanitizer,steps,benchmark] [RESULTS.json]
    python tests/gpu_check.py --dry-run RESULTS.json

suite      tests/test_on_device.py, by each GPU backend; with pytest-xdist in several processes, as it compiles a lot
sanitizer  its losses at two sizes under compute-sanitizer's memcheck and racecheck
steps      python -m contrastile.bench.steps: the kernels of a step, and whether the host keeps up
benchmark  python -m contrastile bench on the device, beside plain PyTorch and the losses of other packages

The file, bench/results/gpu-<device>.json unless named, is written after each part; one that is not run again stays as
it was, unless versions have changed. `python -m contrastile.bench.plot` draws it. Backends that are missing are named
first, and in the file: what ran without them says nothing about them.

Exits with 1 where a part failed, and, writing nothing, where there is no CUDA or ROCm device. A dry run goes the same
way at tiny sizes, with Triton's interpreter for a device; its file says so, and holds no times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import contrastile
import torch
from contrastile.bench import machine

ROOT = Path(__file__).resolve().parents[1]
SUITE = "tests/test_on_device.py"
GPU_BACKENDS = ("triton", "cuda")
INTERPRETER = "interpreter"

DRY_TESTS = (
    "test_automatic or test_stats and (groups-and-self or deep) or test_given and groups-and-self-float16"
    " or test_softmax and self-triangular-bfloat16 or test_nan or test_layout and narrowed"
    " or test_losses and 65x65x48 or test_float32_in_tf32 and plain or test_thirty and bfloat16-63x63x384"
    " or test_compiled and bfloat16 or test_a_replayed or test_work_goes or test_nothing_waits or test_training"
    " or test_tuned or test_extra_memory"
)
SHORT_CASE = "test_losses_are_as_exact_as_dense and (65x65x48 or 63x63x384) and not float64"
SANITIZER_TOOLS = {
    # Probes of the driver by PyTorch and Triton count as API errors, and are none of the kernels'.
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": [],
}
SANITIZER_FOUND = 86  # exit status

RIVALS = "dense,linear_cross_entropy,memeff,inf_cl"
EVERY_LOSS = "--repeats 3 --losses symmetric,one_direction,gamma,nt_xent"
BENCHMARKS = [
    f"--dtype bfloat16 --sizes 4096,16384,65536 {EVERY_LOSS} --implementations contrastile,{RIVALS}",
    f"--dtype bfloat16 --sizes 4096,16384 {EVERY_LOSS} --implementations compiled",
    f"--dtype float32 --sizes 16384 {EVERY_LOSS} --implementations contrastile,{RIVALS}",
]
DRY_BENCHMARKS = [
    "--sizes 64 --dim 16 --repeats 1 --losses symmetric,gamma --implementations contrastile,dense,memeff,inf_cl"
]

MOST_PROCESSES = 12  # each takes half a GiB of the device

Outcome = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.dry_run and options.results is None:
        _parser().error("a dry run needs the name of a file")
    missing = {name: contrastile.backends.available().get(name, "not in this version") for name in GPU_BACKENDS}
    missing = {name: reason for name, reason in missing.items() if reason is not None}
    for name, reason in missing.items():
        print(f"GPU backend {name}: missing, {reason}")
    if not options.dry_run and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "finds no device" if built else "was built without CUDA and ROCm"
        print(f"gpu-check needs a CUDA or ROCm device: torch {torch.__version__} {why}", file=sys.stderr)
        return 1

    device = INTERPRETER if options.dry_run else torch.cuda.get_device_name()
    results = options.results or ROOT / "bench" / "results" / f"gpu-{_slug(device)}.json"
    document = {"machine": {}, "runs": []} | _earlier(results, device)
    document |= {
        "device": device,
        "dry_run": options.dry_run,
        "gpu": None if options.dry_run else machine.gpu(),
        "versions": machine.versions(),
        "missing_backends": missing,
    }
    results.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in options.only:
        outcome, passed = PARTS[part](options.dry_run)
        document |= outcome
        failed += [] if passed else [part]
        results.write_text(json.dumps(document, indent=1) + "\n")
    print(f"results in {results}" + (f", FAILED: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def suite(dry_run: bool) -> tuple[Outcome, bool]:
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "suite.xml")
        chosen = ["-k", DRY_TESTS] if dry_run else []
        done = _run([*_pytest(), f"--junitxml={junit}", *chosen, *(() if dry_run else _in_parallel())], dry_run)
        found = suite_counts(junit)
    return {"suite": {"exit_status": done.returncode, **found}}, done.returncode == 0


def suite_counts(junit: Path) -> Outcome:
    """Counts, what failed and by which words, and why tests were skipped."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failed: dict[str, str] = {}
    skipped: dict[str, int] = {}
    for each in ElementTree.parse(junit).getroot().iter("testsuite") if junit.exists() else ():
        for name in counts:
            counts[name] += int(each.get(name, 0))
        for test in each.iter("testcase"):
            for result in test:
                words = result.get("message", "")
                if result.tag in ("failure", "error"):
                    failed[test.get("name", "")] = words[:500]
                elif result.tag == "skipped":
                    skipped[words] = skipped.get(words, 0) + 1
    return {**counts, "failed": failed, "skip_reasons": skipped}


def sanitizer(dry_run: bool) -> tuple[Outcome, bool]:
    """Outcomes by tool. A tool passes with the test's own exit status and a summary of nothing."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None or dry_run:
        reason = "kernels were interpreted" if dry_run else "compute-sanitizer is not installed"
        return {"sanitizer": {"status": "skipped", "reason": reason}}, True
    outcomes, passed = {}, True
    for tool, options in SANITIZER_TOOLS.items():
        command = [program, "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND), *options]
        # One allocation a tensor, so that what lies past its end belongs to nobody.
        done = _run(
            [*command, "--target-processes", "application-only", *_pytest(), "-k", SHORT_CASE],
            dry_run,
            capture=True,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
        summary = re.findall(r"=+ ((?:\w+ )?SUMMARY: .*)", done.stdout)
        clean = done.returncode == 0 and bool(summary) and all(re.search(r"SUMMARY: 0 ", line) for line in summary)
        outcomes[tool] = {"status": "clean" if clean else "failed", "exit_status": done.returncode, "summary": summary}
        if not clean:
            outcomes[tool]["output"] = done.stdout[-8000:]
            passed = False
        print(f"compute-sanitizer {tool}: {outcomes[tool]['status']}, {'; '.join(summary) or 'no summary'}")
    return {"sanitizer": outcomes}, passed


def benchmark(dry_run: bool) -> tuple[Outcome, bool]:
    """The benchmark's own document: machine, versions, runs. A row of ours that was not measured fails the part."""
    device = INTERPRETER if dry_run else "cuda"
    status, document = 0, dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bench.json")
        backends = [] if dry_run else ["--backends", ",".join(_able())]
        for options in DRY_BENCHMARKS if dry_run else BENCHMARKS:
            command = [sys.executable, "-m", "contrastile", "bench", "--device", device, *options.split(), *backends]
            status |= _run([*command, "--out", str(out)], dry_run).returncode
            if out.exists():  # written after each run, all of them in it
                document = json.loads(out.read_text())
    if dry_run and document:
        document["machine"].pop("gpu", None)
    runs = document.get("runs", [])
    for run in runs:
        run["command"] = run["command"].replace(str(out), "RESULTS.json")
    rows = [row for run in runs for row in run["rows"]]
    ours = {row["status"] for row in rows if row["implementation"] == "contrastile"}
    return document, status == 0 and ours == {"dry run" if dry_run else "measured"}


def steps(dry_run: bool) -> tuple[Outcome, bool]:
    """Rows of bench/steps.py."""
    if dry_run:
        return {"steps": {"status": "skipped", "reason": "kernels were interpreted"}}, True
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "steps.json")
        command = [sys.executable, "-m", "contrastile.bench.steps", str(out), "--backends", ",".join(_able())]
        status = _run(command, dry_run).returncode
        rows = json.loads(out.read_text()) if out.exists() else []
    return {"steps": {"exit_status": status, "rows": rows}}, status == 0


PARTS: dict[str, Callable[[bool], tuple[Outcome, bool]]] = {
    "suite": suite,
    "sanitizer": sanitizer,
    "steps": steps,
    "benchmark": benchmark,
}


def _able() -> list[str]:
    return [name for name in GPU_BACKENDS if contrastile.backends.available()[name] is None]


def _in_parallel() -> list[str]:
    processes = min(MOST_PROCESSES, (os.cpu_count() or 1) - 2)
    return ["-n", str(processes)] if importlib.util.find_spec("xdist") and processes > 1 else []


def _pytest() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SUITE]


def _run(command: list[str], dry_run: bool, capture: bool = False, **environment: str) -> Any:
    """In the repository; a dry run's kernels are interpreted."""
    environment = {**os.environ, **environment, **({"TRITON_INTERPRET": "1"} if dry_run else {})}
    kept: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if capture else {}
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, **kept)


def _earlier(results: Path, device: str) -> Outcome:
    """What the file holds of the same device and versions."""
    if not results.exists():
        return {}
    earlier: Outcome = json.loads(results.read_text())
    if earlier.get("device") != device:
        raise SystemExit(f"{results} holds results of {earlier.get('device')}: choose another file than for {device}")
    return earlier if earlier.get("versions") == machine.versions() else {}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _parts(text: str) -> list[str]:
    parts = text.split(",")
    if not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(PARTS)}")
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check.py", description="Suite, sanitizer and benchmark on a GPU.")
    parser.add_argument("results", type=Path, nargs="?", help="default bench/results/gpu-<device>.json")
    parser.add_argument("--only", type=_parts, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter, no times")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
