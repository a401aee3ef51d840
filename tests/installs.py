"""Installations of the project into virtual environments of their own, and a module with CUDA kernels from one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOT_SOURCE = (".git", ".venv", "build", "dist", "out", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis")
COMPILERS = ("c++", "g++", "clang++")
has_compiler = any(map(shutil.which, COMPILERS))

PROBE = """
import importlib.util, json, sys, warnings
import torch, contrastile
from contrastile import reference
from contrastile.backends import available

x, y = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    error = (contrastile.info_nce(x, y, 3.0) - reference.info_nce(x, y, 3.0)).abs().item()
names = ("contrastile", "contrastile.bench", "contrastile.kernels")
places = {name: importlib.util.find_spec(name).origin for name in names}
told = [str(warning.message) for warning in caught]
print(json.dumps({"available": available(), "error": error, "warnings": told, "places": places}))
"""


def clone(to: Path) -> Path:
    """A copy of the project as it would be cloned."""
    return Path(shutil.copytree(ROOT, to, ignore=shutil.ignore_patterns(*NOT_SOURCE)))


class Environment:
    """A virtual environment without pip, driven by this one's pip."""

    def __init__(self, folder: Path, build_tools: Path | None = None) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site_packages = next(folder.glob("lib/python*/site-packages"))
        self.build_tools = build_tools

    def pip(self, *arguments: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """With the build tools that are here, and no other packages."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments[:1], "-v"]
        options = ["--no-deps", "--no-build-isolation", "--no-index", *arguments[1:]]
        path = f"{self.build_tools / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return run([*command, *options], check, PYTHONPATH=str(self.build_tools), **{"PATH": path, **environment})

    def pip_with_isolation(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """As a user runs it: pip brings what the build asks for."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments[:1], "-v", "--no-deps"]
        return run([*command, *arguments[1:]], check=False, **environment)

    @property
    def module(self) -> Path:
        """contrastile._C."""
        return next((self.site_packages / "contrastile").glob("_C.*.so"))

    def probe(self) -> dict:
        """Lends the packages of this environment and reports what the installation can do."""
        lent = {str(Path(module.__file__).parents[1]) for module in (torch,)}
        (self.site_packages / "lent.pth").write_text("\n".join(lent))
        return json.loads(run([self.python, "-c", PROBE]).stdout.splitlines()[-1])


def run(command: list, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    # Neither this environment's checkout nor its choice of a backend may reach the new one.
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("CONTRASTILE_")}
    environment = {**kept, "CONTRASTILE_CUDA": "0", **environment}  # they take minutes, and have a test of their own
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=1800)
    if check and done.returncode:
        raise AssertionError(f"{command} failed:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
    return done


def path_without_nvcc(folder: Path) -> str:
    """PATH, but for nvcc; a directory that has it is replaced by links to all else in it."""
    found = []
    for number, name in enumerate(os.environ["PATH"].split(os.pathsep)):
        place = Path(name)
        if (place / "nvcc").exists():
            place = folder / str(number)
            place.mkdir(parents=True)
            for program in Path(name).iterdir():
                if program.name != "nvcc":
                    (place / program.name).symlink_to(program.resolve())
        found.append(str(place))
    return os.pathsep.join(found)


def install_with_nvcc_of_wheels(folder: Path) -> Environment:
    """With the CUDA kernels, for all chips, by the nvcc that the build brings. Skips where pip cannot bring it."""
    if not has_compiler:
        pytest.skip("there is no C++ compiler")
    environment = Environment(folder / "environment")
    asked = {
        "CONTRASTILE_BUILD": "required",
        "CONTRASTILE_CUDA": "1",
        "CUDACXX": "",
        "PATH": path_without_nvcc(folder / "path"),
    }
    done = environment.pip_with_isolation("install", clone(folder / "source"), **asked)
    if "No matching distribution found" in done.stdout + done.stderr:
        pytest.skip("pip cannot bring the build tools and nvcc from here")
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return environment
