"""csrc in a C++ program without Python: the examples built in a project of their own, and what they print.

The CUDA example runs its kernels on the processor, through cuda_host.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "csrc" / "examples"
PAIRS, FEATURES, SCALE = 300, 48, 14.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler"),
]

# What docs/cuda.md tells a trainer's own CMakeLists.txt to say.
TRAINER = f"""
cmake_minimum_required(VERSION 3.25)
project(trainer LANGUAGES CXX)
set(CONTRASTILE_PYTHON OFF)
set(CONTRASTILE_CUDA host)
add_subdirectory({ROOT} contrastile)
foreach(name train_step_cpu train_step_cuda)
  add_executable(${{name}} {EXAMPLES}/${{name}}.cpp)
  target_compile_options(${{name}} PRIVATE -Wall -Wextra -Werror)
  target_link_libraries(${{name}} PRIVATE contrastile)
endforeach()
"""


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Path:
    """The folder of the programs."""
    cmake = pytest.importorskip("cmake", reason="cmake is not installed")
    ninja = pytest.importorskip("ninja", reason="ninja is not installed")
    source, build = tmp_path_factory.mktemp("trainer"), tmp_path_factory.mktemp("build")
    (source / "CMakeLists.txt").write_text(TRAINER)
    program = Path(cmake.CMAKE_BIN_DIR, "cmake")
    make = f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR, 'ninja')}"
    run(program, "-S", source, "-B", build, "-G", "Ninja", make, "-DCMAKE_BUILD_TYPE=Debug")
    run(program, "--build", build)
    return build


def run(*command: object) -> str:
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def embeddings(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and y (N, D) of csrc/examples/embeddings.h, rounded as the programs round them."""
    row, feature = torch.arange(PAIRS, dtype=torch.float64)[:, None], torch.arange(FEATURES, dtype=torch.float64)
    angle, size = 12.9898 * row + 78.233 * feature, (2 / FEATURES) ** 0.5
    x, y = size * angle.sin(), size * (angle + 0.5 * (7 * row * feature).cos()).sin()
    return x.float().to(dtype).double(), y.float().to(dtype).double()


def info_nce(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Loss, norm of dX, norm of dY, from the dense matrix of logits."""
    s = SCALE * x @ y.T
    loss = (s.logsumexp(1) - s.diag()).mean() / 2 + (s.logsumexp(0) - s.diag()).mean() / 2
    c = ((s.softmax(1) + s.softmax(0)) / 2 - torch.eye(PAIRS, dtype=s.dtype)) * SCALE / PAIRS
    return loss.item(), (c @ y).norm().item(), (c.T @ x).norm().item()


@pytest.mark.parametrize(
    ("program", "dtype", "loss_error", "norm_error"),
    [
        ("train_step_cpu", torch.float32, 1e-6, 1e-5),
        ("train_step_cuda", torch.bfloat16, 1e-6, 1e-3),  # coefficients are rounded to 8 bits
    ],
)
def test_step_is_right(trainer, program, dtype, loss_error, norm_error):
    printed = run(trainer / program)
    numbers = re.fullmatch(r"loss (\S+), norm of dX (\S+), of dY (\S+)\n", printed)
    assert numbers, printed
    loss, *norms = map(float, numbers.groups())
    truth, *true_norms = info_nce(*embeddings(dtype))
    assert loss == pytest.approx(truth, rel=loss_error)
    assert norms == pytest.approx(true_norms, rel=norm_error)


def test_no_python_is_looked_for(trainer):
    cache = (trainer / "CMakeCache.txt").read_text()
    assert "pybind11" not in cache
    assert "Python" not in cache.replace("CONTRASTILE_PYTHON", "").replace("The Python module", "")
