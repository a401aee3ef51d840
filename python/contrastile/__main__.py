"""python -m contrastile demo | bench | doctor."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "train an image and a text encoder on emoji with InfoNCE and the gamma loss",
    "bench": "time, memory and float64 error of every implementation",
    "doctor": "versions, backends and why one is unavailable, threads; --kernels: what kernels compile to",
}
# The packages that the results depend on.
REPORTED_VERSIONS = ("torch", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of the subcommand: 0 where all went well."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m contrastile",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:8}{summary}" for name, summary in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, help="followed by its own options; COMMAND --help lists them")
    # The subcommand parses what follows it, --help included.
    command = parser.parse_args(arguments[:1]).command
    rest = arguments[1:]
    if command == "doctor":
        return doctor(rest)
    # Only here, because demo and bench need packages that the losses do not.
    status: int = importlib.import_module(f"contrastile.{command}").main(rest)
    return status


def doctor(argv: Sequence[str]) -> int:
    """Prints what this installation can do; returns 1 where CONTRASTILE_BACKEND names a backend that cannot run, or
    with --kernels where a kernel has a fault.
    """
    parser = argparse.ArgumentParser(prog="python -m contrastile doctor", description=COMMANDS["doctor"])
    parser.add_argument(
        "--kernels",
        nargs="?",
        const="few",
        choices=("few", "table", "all"),
        help="compile the Triton kernels for every target and print registers, matrix instruction and bound: a few "
        "(the default; a minute or two), those of the table in docs/kernels.md, or all. No GPU is needed",
    )
    kernels = parser.parse_args(argv).kernels
    if kernels is not None:
        return _doctor_kernels(kernels)

    import torch

    import contrastile
    from contrastile.backends import available, resolve, workspace_bytes

    print(f"contrastile {contrastile.__version__} in {os.path.dirname(contrastile.__file__)}")
    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch {torch.__version__}")
    print("\nbackends")
    for name, reason in available().items():
        print(f"  {name:6}  {'available' if reason is None else f'unavailable: {reason}'}")
    print(f"\nvector instructions of the C++ backend: {_vector_instructions()}")
    print(f"threads: {torch.get_num_threads()} (torch.set_num_threads)")
    print(f"workspace: {workspace_bytes() / 2**20:g} MiB (CONTRASTILE_WORKSPACE_MB)")
    try:
        print(f"chosen for tensors on the processor: {resolve(None, 'cpu')} (CONTRASTILE_BACKEND)")
    except (ValueError, RuntimeError) as error:
        print(f"no backend for tensors on the processor: {error} (CONTRASTILE_BACKEND)")
        return 1
    return 0


def _doctor_kernels(which: str) -> int:
    try:
        import triton  # noqa: F401
    except ImportError:
        print("triton is not installed: pip install contrastile[triton]")
        return 1
    from contrastile.bench.static.report import report

    return report(which)


def _vector_instructions() -> str:
    try:
        from contrastile import _C
    except ImportError:
        return "none, it is not built"
    return _C.isa()


if __name__ == "__main__":
    raise SystemExit(main())
