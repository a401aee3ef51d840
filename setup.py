"""Builds the optional C++ module contrastile._C with CMake and Ninja; everything else stands in pyproject.toml.

The environment variable CONTRASTILE_BUILD says what happens where it cannot be built:

    auto        (default) the reason is printed and the package installs without it; eager PyTorch serves
    required    the installation fails
    0           no build is tried

CONTRASTILE_CUDA says whether the module gets its CUDA kernels:

    auto        (default) where nvcc is found
    1           the build fails without nvcc; where there is none, that of the PyPI wheels is brought for the build
    0           no
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BUILD_CHOICES = ("auto", "required", "0")
CUDA_CHOICES = ("auto", "1", "0")
# One release of all: a compiler does not take another one's headers.
NVCC_WHEELS = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
NVCC_OF_WHEELS = Path("nvidia", "cu13", "bin", "nvcc")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        choice = os.environ.get("CONTRASTILE_BUILD", "auto")
        if choice not in BUILD_CHOICES:
            raise SystemExit(f"CONTRASTILE_BUILD is {choice!r}: expected one of {', '.join(BUILD_CHOICES)}")
        if choice == "0":
            return skipped("CONTRASTILE_BUILD=0")
        try:
            self.run_cmake(ext)
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if choice == "required":
                raise SystemExit(f"contrastile: {ext.name} was not built: {error}") from error
            skipped(str(error))

    def run_cmake(self, ext: Extension) -> None:
        import cmake
        import pybind11

        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake_program = os.path.join(cmake.CMAKE_BIN_DIR, "cmake")
        # Without build isolation the environment's own ninja is not on PATH unless it was activated.
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        # Fresh: an earlier build's cache names tools of an isolated environment that is gone by now.
        configure = [
            cmake_program, "--fresh", "-S", str(ROOT), "-B", self.build_temp, "-G", "Ninja",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module.parent}",
            f"-DCONTRASTILE_CUDA={cuda_choice()}",
        ]  # fmt: skip
        environment = {**os.environ, "PATH": path}
        nvcc = nvcc_of_wheels()
        if nvcc is not None and not has_own_nvcc():
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            # The wheels have their libraries in lib, their nvcc looks for these in lib64.
            given = os.environ.get("LIBRARY_PATH", "")
            environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(nvcc.parents[1] / "lib"), given]))
        for command in (configure, [cmake_program, "--build", self.build_temp]):
            subprocess.run(command, check=True, env=environment)


def cuda_choice() -> str:
    choice = os.environ.get("CONTRASTILE_CUDA", "auto")
    if choice not in CUDA_CHOICES:
        raise SystemExit(f"CONTRASTILE_CUDA is {choice!r}: expected one of {', '.join(CUDA_CHOICES)}")
    return choice


def has_own_nvcc() -> bool:
    return bool(os.environ.get("CUDACXX") or shutil.which("nvcc"))


def nvcc_of_wheels() -> Path | None:
    found = (Path(folder, NVCC_OF_WHEELS) for folder in sys.path)
    return next((path for path in found if path.exists()), None)


def skipped(reason: str) -> None:
    print(
        f"contrastile: the C++ backend was not built ({reason}).\n"
        "contrastile: the eager PyTorch backend will be used. A C++20 compiler (GCC 11 or newer) and\n"
        "contrastile: CONTRASTILE_BUILD=required pip install -v . show what is missing.",
        file=sys.stderr,
    )


def sources(*suffixes: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in suffixes)


# sources and depends also tell setuptools what belongs into a source distribution.
others = [*sources(".h", ".cu"), "CMakeLists.txt"]
extension = Extension("contrastile._C", sources(".cpp"), depends=others, optional=True)
# setuptools passes setup_requires on to the build's own environment.
brought = NVCC_WHEELS if cuda_choice() == "1" and not has_own_nvcc() else []
setup(ext_modules=[extension], cmdclass={"build_ext": CMakeBuild}, setup_requires=brought)
