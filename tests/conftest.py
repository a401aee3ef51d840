"""One seed and one thread per test, no compiled graphs of earlier runs, and a header that names the backends."""

from __future__ import annotations

import os

import pytest
import torch
from contrastile.backends import available
from hypothesis import settings
from support import BACKENDS_HERE, INTERPRETING, takes_float64

settings.register_profile("contrastile", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("contrastile")

LONGEST = "test_triton_interpreter.py"

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it PyTorch takes no product for deterministic


def pytest_report_header() -> str:
    missing = [f"{name} ({reason})" for name, reason in available().items() if reason is not None]
    return f"contrastile backends: {', '.join(BACKENDS_HERE)}; not here: {', '.join(missing) or 'none'}"


def pytest_collection_modifyitems(config, items):
    """The file that takes longest first: it stays in one process, and would run alone at the end.

    Triton's kernels take no float64: such cases are not run against them.
    """
    items.sort(key=lambda item: item.path.name != LONGEST)
    if not INTERPRETING:
        return

    dropped = [item for item in items if hasattr(item, "callspec") and takes_float64(item.callspec.params.values())]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


@pytest.fixture(autouse=True, scope="session")
def _own_compiled_graphs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _fixed_seed_and_threads():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
