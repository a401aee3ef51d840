"""Builds kernels against the execution layer and calls them: see README.md beside this file.

library = Library(build([source], checks=True))
report = library.call("entry", *arguments)      # bool entry(..., Report*, char* message, size_t message_bytes)
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INCLUDES = (HERE, ROOT / "csrc", ROOT / "csrc" / "cuda")
BUILDS = ROOT / "build" / "cuda_host"
SANITIZERS = "address,undefined"
FULL = os.environ.get("CUDA_HOST_FULL") == "1"  # what `make cuda-host-full` sets: more cases, all schedules

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
ORDERS = ("natural", "reversed", "random")


def compiler() -> str | None:
    """CXX, or the first of c++, g++ and clang++ that is there."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)


def flags(sanitizer: str = "", checks: bool = False) -> list[str]:
    # Lines alone of the debugging information: what a report names. The whole takes a third longer to compile.
    options = ["-std=c++20", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    options += ["-O1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizer}"] if sanitizer else ["-O2"]
    if "undefined" in sanitizer:
        options.append("-fno-sanitize-recover=undefined")
    # Builds with and without checks may live in one process: nothing of theirs may be merged.
    if "clang" not in version():
        options.append("-fno-gnu-unique")
    if checks:
        options.append("-DCONTRASTILE_HOST_CHECKS")
    return [*options, "-DCONTRASTILE_HOST_EXECUTION", *(f"-I{folder}" for folder in INCLUDES)]


def version() -> str:
    program = compiler()
    if program is None:
        raise RuntimeError("there is no C++ compiler: c++, g++ or clang++")
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout


def build(
    sources: Sequence[Path],
    sanitizer: str = "",
    checks: bool = False,
    includes: Sequence[Path] = (),
    program: bool = False,
) -> Path:
    """A shared library, or a program, of `sources`: .cu, or .cpp, for which `includes` are.

    It and the object of each source are built once for the same text, headers, flags and compiler.
    """
    options = flags(sanitizer, checks)
    headers = sorted(path for folder in (HERE, ROOT / "csrc") for path in folder.rglob("*.h"))
    common = hashlib.sha256(version().encode() + b"".join(str(path).encode() + path.read_bytes() for path in headers))
    commands = {}
    for source in map(Path, sources):
        folders = [f"-I{folder}" for folder in includes] if source.suffix == ".cpp" else []
        command = [str(compiler()), *options, *folders, "-c", "-x", "c++", str(source)]
        digest = common.copy()
        digest.update(" ".join(command).encode() + source.read_bytes())
        commands[BUILDS / f"{source.stem}-{digest.hexdigest()[:16]}.o"] = command

    link = [str(compiler()), *options, *([] if program else ["-shared"]), *map(str, commands), "-ldl"]
    digest = hashlib.sha256(" ".join(link).encode()).hexdigest()
    library = BUILDS / f"{Path(sources[0]).stem}-{digest[:16]}{'' if program else '.so'}"
    if not library.exists():
        BUILDS.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_make, commands, commands.values()))
        _make(library, link)
    return library


def _make(path: Path, command: Sequence[str]) -> None:
    """What the command writes, unless it is there; unfinished it is nowhere to be found."""
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder, path.name)
            _run([*command, "-o", str(unfinished)])
            unfinished.replace(path)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def sanitizer_environment(sanitizer: str = SANITIZERS) -> dict[str, str]:
    """What a Python process needs in its environment before it can load a library built with `sanitizer`, by GCC."""
    names = {"address": "libasan.so", "undefined": "libubsan.so"}
    runtimes = []
    for each in sanitizer.split(","):
        find = [str(compiler()), f"-print-file-name={names[each]}"]
        runtimes.append(subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip())
        if not Path(runtimes[-1]).is_absolute():
            raise RuntimeError(f"{compiler()} has no {names[each]}")
    return {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",  # Python's own leaks are not ours
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


class KernelFailure(RuntimeError):
    """What stopped a launch; the text names the kernel, the block and the thread."""


class Banks(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("requests", "wavefronts", "conflicts")]


class Report(ctypes.Structure):
    """Report of report.h, field for field."""

    _fields_ = [
        *((name, Banks) for name in ("loads", "stores", "matrix_loads")),
        *(
            (name, ctypes.c_uint64)
            for name in ("unwritten_bytes_read", "copies_never_waited_for", "matrix_products", "switches")
        ),
    ]


class Library:
    """A library of `build`, whose entry points end in `guarded` of exports.h."""

    def __init__(self, path: Path):
        self.functions = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL)

    def configure(self, target: str = "sm_86", blocks: str = "natural", random_threads: bool = False, seed: int = 0):
        self.functions.contrastile_host_configure(
            TARGETS.index(target), ORDERS.index(blocks), random_threads, ctypes.c_ulonglong(seed)
        )

    def call(self, entry: str, *arguments: Any) -> Report:
        report, message = Report(), ctypes.create_string_buffer(4096)
        function = getattr(self.functions, entry)
        function.restype = ctypes.c_bool
        if not function(*arguments, ctypes.byref(report), message, ctypes.c_size_t(len(message))):
            raise KernelFailure(message.value.decode())
        return report
