"""make gpu-check's script, on machines without a GPU: a device and what runs on it are made up."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import gpu_check
import torch


def test_without_a_device_it_names_the_missing_backends_and_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = tmp_path / "results.json"
    assert gpu_check.main(results) == 1
    assert not results.exists()
    printed = capsys.readouterr()
    assert "needs a CUDA device" in printed.err
    for name in gpu_check.GPU_BACKENDS:
        assert f"GPU backend {name}: missing" in printed.out


def test_with_a_device_suite_and_benchmark_end_in_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "abacus")

    def run(command):
        fails = "pytest" in command
        if fails:
            xml = '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"/></testsuites>'
            Path(command[-1].removeprefix("--junitxml=")).write_text(xml)
        else:
            Path(command[-1]).write_text('{"runs": []}')
        return subprocess.CompletedProcess(command, int(fails))

    monkeypatch.setattr(subprocess, "run", run)
    results = tmp_path / "new" / "results.json"
    assert gpu_check.main(results) == 1  # a test failed
    report = json.loads(results.read_text())
    assert report["device"] == "abacus"
    assert report["suite"] == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1}
    assert report["benchmark"] == {"runs": []}
    assert set(report["missing_backends"]) <= set(gpu_check.GPU_BACKENDS)
