"""python -m contrastile: the subcommands, without running the demo or the benchmark."""

from __future__ import annotations

import subprocess
import sys

import contrastile
import pytest
import torch
from contrastile import backends
from contrastile.__main__ import main


def test_doctor_reports_versions_backends_threads_and_workspace(capsys, monkeypatch):
    monkeypatch.setattr(backends, "available", lambda: {"cpu": "it is Sunday", "eager": None})
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"contrastile {contrastile.__version__} " in printed
    assert f"torch {torch.__version__}" in printed
    assert "cpu     unavailable: it is Sunday" in printed
    assert "eager   available" in printed
    assert f"threads: {torch.get_num_threads()} " in printed
    assert f"workspace: {backends.workspace_bytes() / 2**20:g} MiB" in printed
    assert "vector instructions of the C++ backend: " in printed


def test_doctor_fails_where_the_environment_names_an_unknown_backend(capsys, monkeypatch):
    monkeypatch.setenv("CONTRASTILE_BACKEND", "abacus")
    assert main(["doctor"]) == 1
    assert "'abacus'" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_unknown_command_exits_with_2_and_the_list_of_commands(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "{demo,bench,doctor}" in capsys.readouterr().err


@pytest.mark.slow
def test_module_runs_from_the_shell():
    done = subprocess.run([sys.executable, "-m", "contrastile", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_subcommand_explains_its_options(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "--out" in capsys.readouterr().out


@pytest.mark.slow
def test_package_imports_without_the_packages_of_demo_and_benchmark():
    script = """
import sys
for name in ("rich", "matplotlib", "tqdm", "emoji", "resvg_py", "PIL", "psutil"):
    sys.modules[name] = None
import contrastile.__main__
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
