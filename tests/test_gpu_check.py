"""make gpu-check's script, on machines without a GPU: a device and what runs on it are made up, or it is a dry run."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from contrastile.bench import machine
from support import INTERPRETING

GPU = {"name": "Abacus 9000", "driver": "1.2", "cuda": "13.0", "rocm": None}


def row(**figures: object) -> dict[str, object]:
    measured = {"status": "measured", "reason": None, "seconds": 0.001, "extra_bytes": 2**26}
    case = {"loss": "symmetric", "implementation": "contrastile", "backend": "triton", "rows": 4096, "cols": 4096}
    setup = {"dim": 512, "dtype": "bfloat16", "threads": 2, "device": "cuda"}
    return {**case, **setup, **measured, **figures}


def benchmark_document(*rows: dict[str, object]) -> dict[str, object]:
    return {"machine": {"cpu": "abacus", "gpu": GPU}, "versions": machine.versions(), "runs": [run(rows)]}


def run(rows: tuple[dict[str, object], ...]) -> dict[str, object]:
    return {"command": "bench", "date": "today", "rows": list(rows), "promises": []}


@pytest.fixture
def made_up_gpu(monkeypatch):
    """A device, and subprocesses that leave what pytest and the benchmark would. Gives their exit statuses, by name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: GPU["name"])
    monkeypatch.setattr(machine, "gpu", lambda: GPU)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda program, path=None: None)
    statuses = {"pytest": 0, "contrastile": 0}
    document = benchmark_document(row(), row(implementation="dense", backend=None, status="refused", seconds=None))

    def fake(command, *_, **__):
        if "contrastile.bench.steps" in command:
            Path(command[3]).write_text(json.dumps([{"loss": "gamma", "kernels": []}]))
        elif "contrastile" in command:
            Path(command[command.index("--out") + 1]).write_text(json.dumps(document))
        else:
            (junit,) = (Path(part.removeprefix("--junitxml=")) for part in command if part.startswith("--junitxml="))
            junit.write_text(
                '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">'
                '<testcase name="test_a[cuda]"><failure message="AssertionError: dx"/></testcase>'
                '<testcase name="test_b[cuda]"><skipped message="no reason"/></testcase></testsuite></testsuites>'
            )
        return subprocess.CompletedProcess(command, statuses.get(command[2], 0))

    monkeypatch.setattr(gpu_check, "_run", fake)
    return statuses


def test_without_a_device_it_names_the_missing_backends_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check.contrastile.backends, "available", lambda: {"triton": "no CUDA device"})
    results = tmp_path / "results.json"
    assert gpu_check.main([str(results)]) == 1
    assert not results.exists()
    printed = capsys.readouterr()
    assert "needs a CUDA or ROCm device" in printed.err
    for name in gpu_check.GPU_BACKENDS:
        assert f"GPU backend {name}: missing" in printed.out


def test_with_a_device_everything_ends_in_one_file_named_after_it(tmp_path, monkeypatch, made_up_gpu):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    assert gpu_check.main([]) == 0
    report = json.loads((tmp_path / "bench" / "results" / "gpu-abacus-9000.json").read_text())
    assert (report["device"], report["dry_run"], report["gpu"]) == (GPU["name"], False, GPU)
    assert report["suite"] == {
        "exit_status": 0,
        **{"tests": 3, "failures": 1, "errors": 0, "skipped": 1},
        "failed": {"test_a[cuda]": "AssertionError: dx"},
        "skip_reasons": {"no reason": 1},
    }
    assert report["sanitizer"] == {"status": "skipped", "reason": "compute-sanitizer is not installed"}
    assert report["steps"] == {"exit_status": 0, "rows": [{"loss": "gamma", "kernels": []}]}
    assert [row["status"] for row in report["runs"][0]["rows"]] == ["measured", "refused"]
    assert {"torch", "python"} <= set(report["versions"])
    assert set(report["missing_backends"]) <= set(gpu_check.GPU_BACKENDS)


@pytest.mark.parametrize("part", ["suite", "benchmark"])
def test_a_part_that_fails_is_the_exit_status_and_the_others_are_kept(tmp_path, made_up_gpu, part, capsys):
    results = tmp_path / "results.json"
    assert gpu_check.main([str(results)]) == 0
    before = json.loads(results.read_text())
    made_up_gpu.update({"pytest": 1, "contrastile": 1})
    assert gpu_check.main([str(results), "--only", part]) == 1
    assert f"FAILED: {part}" in capsys.readouterr().out
    after = json.loads(results.read_text())
    assert after["suite"]["exit_status"] == int(part == "suite")
    assert after | {"suite": None} == before | {"suite": None}


def test_parts_that_ran_with_other_versions_are_dropped(tmp_path, made_up_gpu):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"device": GPU["name"], "versions": {"torch": "1.0"}, "suite": {"tests": 7}}))
    assert gpu_check.main([str(results), "--only", "sanitizer"]) == 0
    assert "suite" not in json.loads(results.read_text())


def test_results_of_another_device_are_not_mixed_in(tmp_path, made_up_gpu):
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"device": "interpreter"}))
    with pytest.raises(SystemExit, match="holds results of interpreter: choose another file than for Abacus 9000"):
        gpu_check.main([str(results)])


@pytest.mark.parametrize(
    ("said", "exit_status", "passes"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("========= ERROR SUMMARY: 2 errors", gpu_check.SANITIZER_FOUND, False),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0, False),
        ("========= ERROR SUMMARY: 0 errors", 1, False),  # the tests failed
        ("Segmentation fault", 0, False),
    ],
)
def test_sanitizer_passes_with_a_summary_of_nothing_and_passing_tests(tmp_path, monkeypatch, said, exit_status, passes):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho "{said}"\nexit {exit_status}\n')
    program.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path=None: str(program))
    outcome, passed = gpu_check.sanitizer(dry_run=False)
    assert passed == passes
    assert set(outcome["sanitizer"]) == {"memcheck", "racecheck"}
    for tool in outcome["sanitizer"].values():
        assert tool["exit_status"] == exit_status
        assert ("output" in tool) != passes
    memcheck, racecheck = (tmp_path / "asked").read_text().splitlines()
    assert "--tool memcheck --error-exitcode 86 --report-api-errors no --target-processes application-only" in memcheck
    assert racecheck.endswith(f"tests/test_on_device.py -k {gpu_check.SHORT_CASE}")


def test_plotter_takes_the_file_and_draws_each_dtype(tmp_path, made_up_gpu):
    pytest.importorskip("matplotlib")
    from contrastile.bench.plot import plot_results

    rows = [
        row(dtype=dtype, rows=n, cols=n, implementation=name, backend=None, seconds=n**2 / 1e11)
        for dtype in ("bfloat16", "float32")
        for n in (4096, 16384)
        for name in ("contrastile", "memeff", "inf_cl")
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"device": GPU["name"], **benchmark_document(*rows)}))
    pictures = plot_results(results, tmp_path / "gpu.png")
    assert [path.name for path in pictures] == ["gpu-512-bfloat16-2-cuda.png", "gpu-512-float32-2-cuda.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_suite_takes_several_processes_where_it_can(monkeypatch):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: name)
    for cores, options in ((64, ["-n", "12"]), (8, ["-n", "6"]), (2, []), (None, [])):
        monkeypatch.setattr(gpu_check.os, "cpu_count", lambda cores=cores: cores)
        assert gpu_check._in_parallel() == options
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 64)
    assert gpu_check._in_parallel() == []


def test_page_on_gpus_has_the_figures_of_the_results_file():
    columns = [("contrastile", "cuda"), ("contrastile", "triton")]
    columns += [(name, None) for name in ("memeff", "inf_cl", "dense", "compiled")]
    document = json.loads((gpu_check.ROOT / "bench" / "results" / "gpu-nvidia-h200.json").read_text())
    found = {}
    for run in document["runs"]:
        for row in run["rows"]:
            name = (row["dtype"], row["rows"], row["loss"], row["implementation"], row["backend"])
            if row["status"] == "measured":
                found[name] = f"{row['seconds'] * 1e3:.2f} / {row['extra_bytes'] / 2**20:.0f}"
    lines = re.findall(
        r"^\| (b?float\d+) \| (\d+) \| (\w+) \| (.*) \|$", (gpu_check.ROOT / "docs" / "gpu.md").read_text(), re.M
    )
    told = {
        (dtype, int(rows), loss, *column): cell
        for dtype, rows, loss, cells in lines
        for column, cell in zip(columns, cells.split(" | "), strict=True)
        if cell != "-"
    }
    assert told == found


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="this run is interpreted already")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_dry_run_goes_all_the_way_and_cannot_be_taken_for_a_measurement(tmp_path):
    pytest.importorskip("rich")
    results = tmp_path / "dry.json"
    command = [sys.executable, gpu_check.__file__, "--dry-run", str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads(results.read_text())
    assert (report["device"], report["dry_run"], report["gpu"]) == ("interpreter", True, None)
    suite = report["suite"]
    assert suite["exit_status"] == suite["failures"] == suite["errors"] == 0
    assert suite["tests"] - suite["skipped"] >= 50
    assert all("interpreter" in reason for reason in suite["skip_reasons"])
    rows = [row for run in report["runs"] for row in run["rows"]]
    assert {(row["implementation"], row["status"]) for row in rows} == {
        ("contrastile", "dry run"),
        ("dense", "dry run"),
        ("memeff", "skipped"),
        ("inf_cl", "skipped"),
    }
    assert {row["device"] for row in rows} == {"interpreter"}
    times = ("seconds", "seconds_min", "seconds_max", "product_seconds", "in_products", "repetitions", "extra_bytes")
    assert all(row[name] is None for row in rows for name in times)
    assert all(row["gradient_error"] < 4e-6 for row in rows if row["status"] == "dry run")
