"""Which backend runs: by argument, context, environment or automatically, and what is said when one cannot."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import warnings

import contrastile as ct
import pytest
import torch
from contrastile import backends
from support import BACKENDS_HERE, Shape, towers

X = torch.eye(4)


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch):
    monkeypatch.delenv("CONTRASTILE_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_fallbacks_told", set())


@pytest.fixture
def used(monkeypatch):
    """Names of the backends that were asked for, in order."""
    names = []
    get = backends.get
    monkeypatch.setattr(backends, "get", lambda name: names.append(name) or get(name))
    return names


def pretend(monkeypatch, **reasons):
    """Only eager computes, under every name; a name runs or does not for the reason given."""
    monkeypatch.setattr(backends, "_unavailable_reason", lambda name: reasons.get(name))
    eager = backends.get("eager")
    monkeypatch.setattr(backends, "get", lambda name: eager)


def child(code: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONTRASTILE_")}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, timeout=120
    )


def test_available_names_every_backend_and_eager_always_runs():
    found = ct.backends.available()
    assert list(found) == ["triton", "cuda", "cpu", "eager"]
    assert found["eager"] is None
    assert all(reason is None or isinstance(reason, str) for reason in found.values())


@pytest.mark.parametrize("name", BACKENDS_HERE)
def test_argument_context_and_environment_choose(name, used, monkeypatch):
    ct.info_nce(X, X, 1.0, backend=name)
    with ct.use_backend(name):
        ct.info_nce(X, X, 1.0)
    monkeypatch.setenv("CONTRASTILE_BACKEND", name)
    ct.info_nce(X, X, 1.0)
    assert set(used) == {name}


def test_argument_goes_before_context_and_context_before_environment(monkeypatch):
    pretend(monkeypatch)
    monkeypatch.setenv("CONTRASTILE_BACKEND", "cpu")
    with ct.use_backend("eager"):
        assert backends.resolve(None, "cpu") == "eager"
        assert backends.resolve("cpu", "cpu") == "cpu"
    assert backends.resolve(None, "cpu") == "cpu"


def test_contexts_nest_and_end_with_an_exception(monkeypatch):
    pretend(monkeypatch)
    with ct.use_backend("eager"):
        with contextlib.suppress(KeyError), ct.use_backend("cpu"):
            assert backends.resolve(None, "cpu") == "cpu"
            raise KeyError
        assert backends.resolve(None, "cpu") == "eager"
    assert backends.resolve(None, "cpu") == "cpu"


def test_a_context_is_its_threads_own(monkeypatch):
    pretend(monkeypatch)
    seen = {}
    inside, outside = threading.Event(), threading.Event()

    def other():
        with ct.use_backend("eager"):
            inside.set()
            outside.wait(10)
            seen["other"] = backends.resolve(None, "cpu")

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    seen["main"] = backends.resolve(None, "cpu")
    outside.set()
    thread.join()
    assert seen == {"other": "eager", "main": "cpu"}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_runs_where_the_forward_ran(used, reduction):
    """Autograd may run the backward in another thread, which does not see the context."""
    x = X.clone().requires_grad_()
    with ct.use_backend("eager"):
        loss = ct.info_nce(x, X, 1.0, reduction=reduction).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert x.grad is not None
    assert set(used) == {"eager"}


def test_losses_in_many_threads_equal_those_in_one():
    x = [torch.randn(50, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [ct.info_nce(each, each.flip(0), 5.0) for each in x]
    found = {}

    def work(i):
        found[i] = ct.info_nce(x[i], x[i].flip(0), 5.0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(8))


# Automatic choice


def test_automatic_choice_prefers_cpu_and_is_silent(monkeypatch):
    pretend(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve(None, "cpu") == "cpu"


def test_the_choice_is_by_the_dtype_that_autocast_widens_to(monkeypatch):
    """A backend without float64 would otherwise be chosen by the narrower x, and meet float64."""
    chosen = []
    resolve = backends.resolve
    monkeypatch.setattr(backends, "resolve", lambda *named: chosen.append(named[2]) or resolve(*named))
    x, y = towers(Shape(6, 6, 5))
    wide = y.double()
    with torch.autocast("cpu", torch.bfloat16):
        ct.info_nce(x, wide, 5.0)
        ct.log_normalizers(x, wide, 5.0)
        ct.gamma_contrastive(x, wide, 5.0, torch.zeros(6))
        ct.siglip(x, wide, 5.0, 0.0)
        ct.retrieval_ranks(x, wide)
    assert chosen == [torch.float64] * 5


def test_automatic_choice_falls_back_and_says_why_once(monkeypatch):
    pretend(monkeypatch, cpu="the C++ extension is not there")
    with pytest.warns(RuntimeWarning, match=r"'cpu' cannot run and another is used: the C\+\+ extension"):
        ct.info_nce(X, X, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ct.info_nce(X, X, 1.0)


def test_a_named_backend_is_no_fallback_and_warns_of_nothing(monkeypatch):
    pretend(monkeypatch, cpu="the C++ extension is not there")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ct.info_nce(X, X, 1.0, backend="eager")


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", torch.bfloat16, "triton"),
        ("cuda", torch.float64, "eager"),  # which Triton's kernels do not take
        ("mps", torch.float32, "eager"),
    ],
)
def test_automatic_choice_by_device_and_dtype_is_silent(monkeypatch, device, dtype, expected):
    pretend(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve(None, device, dtype) == expected


@pytest.mark.parametrize(("others", "expected"), [({}, "cuda"), ({"cuda": "built without it"}, "eager")])
def test_without_triton_tensors_on_a_gpu_fall_back_and_say_so(monkeypatch, others, expected):
    pretend(monkeypatch, triton="No module named 'triton'", **others)
    with pytest.warns(RuntimeWarning, match="'triton' cannot run and another is used: No module named 'triton'"):
        assert backends.resolve(None, "cuda") == expected


# A named backend that cannot run


def name_by(how: str, name: str, monkeypatch) -> None:
    """Names a backend in one of the three ways, and calls a loss."""
    if how == "environment":
        monkeypatch.setenv("CONTRASTILE_BACKEND", name)
    with ct.use_backend(name) if how == "context" else contextlib.nullcontext():
        assert how != "context", "the context must not open"
        ct.info_nce(X, X, 1.0, backend=name if how == "argument" else None)


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_a_named_backend_that_cannot_run_raises_with_the_reason(monkeypatch, how):
    pretend(monkeypatch, cpu="the C++ extension is not there")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run: the C\+\+ extension is not there"):
        name_by(how, "cpu", monkeypatch)


@pytest.mark.parametrize("how", ["argument", "context", "environment"])
def test_an_unknown_backend_raises_and_lists_those_there_are(monkeypatch, how):
    with pytest.raises(ValueError, match=r"backend is 'gpu': expected one of 'triton', 'cuda', 'cpu', 'eager'"):
        name_by(how, "gpu", monkeypatch)


def test_a_named_backend_on_the_wrong_device_raises(monkeypatch):
    pretend(monkeypatch)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' runs on tensors on cpu, these are on cuda"):
        backends.resolve("cpu", "cuda")


def test_a_named_backend_that_does_not_take_the_dtype_raises(monkeypatch):
    pretend(monkeypatch)
    with pytest.raises(
        TypeError, match=r"backend 'triton' takes float16, bfloat16, float32, these embeddings are torch.float64"
    ):
        backends.resolve("triton", "cuda", torch.float64)


def test_a_backend_that_fails_to_import_is_unavailable_for_that_reason(monkeypatch):
    monkeypatch.setitem(backends.MODULES, "cpu", "contrastile.backends.no_such_module")
    backends._unavailable_reason.cache_clear()
    try:
        assert "no_such_module" in ct.backends.available()["cpu"]
    finally:
        backends._unavailable_reason.cache_clear()


def test_a_triton_too_old_for_the_kernels_says_so(monkeypatch):
    triton = pytest.importorskip("triton")
    from contrastile.backends import triton as backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    for version, is_missing in (("3.4.0", True), ("3.5.1", False), ("4.0.0+git1", False)):
        monkeypatch.setattr(triton, "__version__", version)
        reason = backend.unavailable_reason()
        assert (reason == f"Triton {version} does not compile the kernels: 3.5 or newer is needed") == is_missing


# The environment, read by a process of its own


@pytest.mark.slow
def test_environment_names_the_backend():
    code = "from contrastile import backends; print(backends.resolve(None, 'cpu'))"
    assert child(code, CONTRASTILE_BACKEND="eager").stdout.strip() == "eager"


@pytest.mark.slow
def test_environment_with_an_unknown_name_fails_at_the_first_loss_not_at_import():
    done = child(
        "import torch, contrastile; print('imported'); contrastile.info_nce(torch.eye(2), torch.eye(2), 1.0)",
        CONTRASTILE_BACKEND="gpu",
    )
    assert "imported" in done.stdout
    assert "ValueError: backend is 'gpu'" in done.stderr


@pytest.mark.slow
def test_without_the_extension_eager_serves_and_says_so_once():
    code = (
        "import sys, torch; sys.modules['contrastile._C'] = None\n"
        "import contrastile as ct\n"
        "for _ in range(3): ct.info_nce(torch.eye(2), torch.eye(2), 1.0)\n"
        "print(ct.backends.available()['cpu'])"
    )
    done = child(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "contrastile._C" in done.stdout


# The workspace


@pytest.fixture
def _workspace():
    before = backends.workspace_bytes()
    yield
    backends.set_workspace(before)


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("size", [0, -1, 1.5, "64", True, None, 2**70])
def test_a_workspace_is_a_positive_number_of_bytes(size):
    with pytest.raises(ValueError, match=r"workspace is .*: expected a positive number of bytes"):
        backends.set_workspace(size)


@pytest.mark.usefixtures("_workspace")
def test_set_workspace_bounds_the_tiles_of_eager(monkeypatch):
    sizes = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *size, **options: sizes.append(size) or new_empty(self, *size, **options),
    )
    for bound in (2**14, 2**16, 2**18):
        sizes.clear()
        backends.set_workspace(bound)
        ct.info_nce(torch.randn(300, 8).requires_grad_(), torch.randn(300, 8), 1.0, backend="eager")
        [(buffers, pairs), *_] = [size for size in sizes if len(size) == 2]
        assert bound / 4 < 4 * buffers * pairs <= bound


@pytest.mark.usefixtures("_workspace")
def test_workspace_from_the_environment_is_read_at_the_first_use(monkeypatch):
    def read(text=None):
        monkeypatch.setattr(backends, "_workspace_bytes", None)
        if text is not None:
            monkeypatch.setenv("CONTRASTILE_WORKSPACE_MB", text)
        return backends.workspace_bytes()

    monkeypatch.delenv("CONTRASTILE_WORKSPACE_MB", raising=False)
    assert read() == 64 * 2**20
    assert read("1.5") == 3 * 2**19
    monkeypatch.setenv("CONTRASTILE_WORKSPACE_MB", "2")
    assert backends.workspace_bytes() == 3 * 2**19
    for wrong in ("much", "0", "-3", "nan", "inf"):
        with pytest.raises(ValueError, match=r"CONTRASTILE_WORKSPACE_MB is '.*': expected a positive number of MiB"):
            read(wrong)


def test_backends_implement_the_protocol():
    for name in BACKENDS_HERE:
        backend = backends.get(name)
        assert backend.unavailable_reason() is None
        assert callable(backend.pair_stats)
        assert callable(backend.pair_grad)
