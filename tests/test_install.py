"""What `pip install` leaves behind: with and without a compiler, as a wheel, editable, from a source distribution.

Nothing is downloaded. Every installation goes into an empty virtual environment
that sees the build tools alone, so a build that imported torch would fail; torch and the rest are lent to it
afterwards, by a .pth file.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import contrastile
import pytest
from installs import Environment, clone, has_compiler, path_without_nvcc, run

pytestmark = pytest.mark.slow

BUILD_TOOLS = ("setuptools", "pybind11", "cmake", "ninja")
needs_compiler = pytest.mark.skipif(not has_compiler, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def build_tools(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH that holds the build tools and nothing else, their programs in bin/."""
    folder = tmp_path_factory.mktemp("build_tools")
    (folder / "bin").mkdir()
    for tool in BUILD_TOOLS:
        try:
            distribution = metadata.distribution(tool)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{tool} is not installed")
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (folder / top).symlink_to(Path(distribution.locate_file(top)))
        for file in distribution.files or ():
            if file.name == "ninja" and file.parent.name == "bin":
                (folder / "bin" / "ninja").symlink_to(Path(file.locate()).resolve())
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    return clone(tmp_path / "source")


@pytest.fixture
def environment(tmp_path, build_tools) -> Environment:
    return Environment(tmp_path / "environment", build_tools)


def leave_a_build_whose_tools_are_gone(source: Path) -> None:
    """As an earlier `pip install .` does, which built in an isolated environment."""
    folder = source / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True)
    gone = {"CMAKE_GENERATOR:INTERNAL": "Ninja", "CMAKE_MAKE_PROGRAM:FILEPATH": "/gone/ninja"}
    gone |= {"CMAKE_HOME_DIRECTORY:INTERNAL": source, "CMAKE_CACHEFILE_DIR:INTERNAL": folder}
    (folder / "CMakeCache.txt").write_text("".join(f"{name}={value}\n" for name, value in gone.items()))


@needs_compiler
def test_without_nvcc_the_wheel_holds_the_package_and_its_cpu_backend_runs(environment, source, tmp_path):
    asked = {"CONTRASTILE_BUILD": "required", "CONTRASTILE_CUDA": "auto", "CUDACXX": ""}
    tools = os.pathsep.join([str(environment.build_tools / "bin"), path_without_nvcc(tmp_path / "path")])
    leave_a_build_whose_tools_are_gone(source)
    printed = environment.pip("wheel", "--wheel-dir", tmp_path, source, **asked, PATH=tools)
    assert "no nvcc was found: the CUDA kernels are not built" in printed.stdout + printed.stderr
    (wheel,) = tmp_path.glob("contrastile-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (listing,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = metadata.PathDistribution(zipfile.Path(archive, listing.removesuffix("METADATA"))).metadata
    assert described["Version"] == contrastile.__version__
    assert described["License-Expression"] == "Apache-2.0"

    modules = {path.relative_to(source / "python") for path in (source / "python" / "contrastile").rglob("*.py")}
    for part in ("bench", "kernels"):
        folder = source / part
        modules |= {Path("contrastile", part, path.relative_to(folder)) for path in folder.rglob("*.py")}
    tables = {f"contrastile/bench/static/{name}.csv" for name in ("bounds", "rivals")}
    data = {"contrastile/py.typed", "contrastile/_C.pyi"} | tables
    expected = {*map(str, modules)} | data
    present = {name for name in names if ".dist-info/" not in name}
    (extension,) = (name for name in present if name.startswith("contrastile/_C.") and not name.endswith(".pyi"))
    assert present == expected | {extension}
    assert any(name.endswith("licenses/LICENSE") for name in names)

    environment.pip("install", wheel)
    report = environment.probe()
    assert report["available"].keys() == {"triton", "cuda", "cpu", "eager"}
    assert report["available"]["cpu"] is None
    assert report["available"]["eager"] is None
    assert report["available"]["cuda"]  # a reason
    assert report["warnings"] == []
    assert report["error"] < 1e-6
    assert Path(report["places"]["contrastile.kernels"]).is_relative_to(environment.site_packages)


@pytest.mark.parametrize("lack", ["broken", "absent"])
def test_without_a_compiler_the_install_succeeds_and_eager_serves(environment, source, build_tools, lack):
    hidden = {"CC": "/bin/false", "CXX": "/bin/false"} if lack == "broken" else {"PATH": str(build_tools / "bin")}
    printed = environment.pip("install", source, **hidden)
    assert "eager PyTorch backend will be used" in printed.stdout + printed.stderr
    report = environment.probe()
    assert report["available"]["eager"] is None
    assert "compiler" in report["available"]["cpu"]
    assert report["error"] < 1e-6
    assert len(report["warnings"]) == 1
    assert report["available"]["cpu"] in report["warnings"][0]


def test_required_build_fails_loudly_without_a_compiler(environment, source):
    done = environment.pip(
        "install", source, check=False, CXX="/bin/false", CC="/bin/false", CONTRASTILE_BUILD="required"
    )
    assert done.returncode != 0
    assert "contrastile._C was not built" in done.stdout + done.stderr


@needs_compiler
def test_cuda_kernels_that_were_asked_for_and_cannot_be_built_fail_loudly(environment, source, build_tools):
    tools = os.pathsep.join([str(build_tools / "bin"), "/usr/bin", "/bin"])
    asked = {"PATH": tools, "CUDACXX": "/nowhere/nvcc", "CONTRASTILE_BUILD": "required", "CONTRASTILE_CUDA": "1"}
    done = environment.pip("install", source, check=False, **asked)
    assert done.returncode != 0
    assert "nvcc" in done.stdout + done.stderr


def test_build_switched_off_names_the_switch(environment, source):
    printed = environment.pip("install", source, CONTRASTILE_BUILD="0")
    assert "was not built (CONTRASTILE_BUILD=0)" in printed.stdout + printed.stderr
    assert environment.probe()["available"]["cpu"] is not None


@needs_compiler
def test_editable_install_serves_the_checkout_with_bench_and_kernels(environment, source):
    # Unoptimised: half the compile time, and speed is not the question here.
    environment.pip("install", "--editable", source, CONTRASTILE_BUILD="required", CMAKE_BUILD_TYPE="Debug")
    report = environment.probe()
    assert report["available"]["cpu"] is None
    assert report["error"] < 1e-6
    assert {name: Path(place) for name, place in report["places"].items()} == {
        "contrastile": source / "python/contrastile/__init__.py",
        "contrastile.bench": source / "bench/__init__.py",
        "contrastile.kernels": source / "kernels/__init__.py",
    }


def test_source_distribution_holds_all_that_a_build_needs(environment, source, build_tools, tmp_path):
    script = "import os, sys; os.chdir(sys.argv[1]); from setuptools import build_meta as b; b.build_sdist(sys.argv[2])"
    run([environment.python, "-c", script, source, tmp_path], PYTHONPATH=str(build_tools))
    (archive,) = tmp_path.glob("contrastile-*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    needed = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"}
    for folder in ("csrc", "python", "bench", "kernels"):
        files = {str(path.relative_to(source)) for path in (source / folder).rglob("*") if path.is_file()}
        needed |= {file for file in files if ".egg-info" not in file and not file.startswith("bench/results/")}
    assert needed <= held, needed - held
