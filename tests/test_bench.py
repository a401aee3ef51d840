"""The benchmark: what it counts, what it measures, what it refuses, and whether its rivals compute the same loss."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contrastile.bench import IMPLEMENTATIONS, LOSSES, Case, Row, child, harness, loss_scaling, main, run_cases, run_job
from contrastile.bench import implementations as implementations_module
from contrastile.bench import promises as promises_module
from contrastile.bench import scaling as scaling_module
from contrastile.bench.harness import run_jobs
from contrastile.bench.machine import GIB, MIB, PeakMemory
from contrastile.bench.promises import Promise, Scope, cost_spread, measure_promises

RESETS_PEAK = Path("/proc/self/clear_refs").exists()
NEEDS_A_COMPILER = ("compiled", "keops")  # half a minute and more
FLOAT32_ROUNDING = 4e-6  # of sums over some hundred terms; plain PyTorch's own error is 1e-6 here
EVERY_LOSS = [
    pytest.param(name, loss, marks=pytest.mark.slow if name in NEEDS_A_COMPILER else (), id=f"{name}-{loss}")
    for name, implementation in IMPLEMENTATIONS.items()
    if "cpu" in implementation.devices
    for loss in implementation.losses
]


def small(loss: str = "symmetric", implementation: str = "contrastile", n: int = 128, **options: object) -> Case:
    return Case(loss, implementation, n, n, dim=32, threads=1, **options)  # type: ignore[arg-type]


def measured(case: Case, seconds: float = 1.0, **figures: object) -> Row:
    """A row as a child would have returned it, at a peak of 1 Gflop/s."""
    fraction = case.flop / (seconds * 1e9)
    repetitions = [(seconds, seconds / 4, 1e9)] * 3
    return replace(Row(case, "measured", seconds=seconds, fma_fraction=fraction, repetitions=repetitions), **figures)


@pytest.mark.parametrize(("name", "loss"), EVERY_LOSS)
def test_implementation_computes_the_loss_and_gradients_of_the_reference(name: str, loss: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    if reason := implementation.missing():
        pytest.skip(reason)
    case = small(loss, name)
    try:
        found = child.error_against_truth(case, implementation.build(case))
    except ImportError as missing:
        pytest.skip(str(missing))
    assert found["loss_error"] < FLOAT32_ROUNDING
    assert found["gradient_error"] < FLOAT32_ROUNDING


def test_strips_that_do_not_divide_the_rows_give_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contrastile.bench.dense.STRIP_ROWS", 100)
    for loss in IMPLEMENTATIONS["checkpointed"].losses:
        case = small(loss, "checkpointed")
        found = child.error_against_truth(case, IMPLEMENTATIONS["checkpointed"].build(case))
        assert max(found["loss_error"], found["gradient_error"]) < FLOAT32_ROUNDING, loss


@pytest.mark.parametrize(("loss", "products"), [("gamma", 3), ("one_direction", 3), ("symmetric", 4), ("nt_xent", 2)])
def test_flop_count_is_that_of_the_fused_products(loss: str, products: int) -> None:
    assert Case(loss, "dense", 8192, 8192, 512).flop == products * 2 * 8192**2 * 512


def test_flop_count_of_unequal_sides() -> None:
    assert Case("one_direction", "dense", 100, 300, 8).flop == 6 * 100 * 300 * 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clip", "dense", 8, 8), "loss is 'clip', expected one of gamma"),
        (("symmetric", "dense", 8, 9), "symmetric needs rows == cols, got 8 and 9"),
        (("nt_xent", "dense", 9, 9), "nt_xent needs an even number of rows"),
        (("symmetric", "dense", 0, 0), "must be positive"),
        (("symmetric", "dense", 8, 8, 4, "int8"), "dtype is 'int8'"),
        (("symmetric", "dense", 8, 8, 4, "float32", 2, None, "tpu"), "device is 'tpu', expected one of cpu, cuda"),
    ],
)
def test_impossible_case_is_refused_by_name(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(*arguments)  # type: ignore[arg-type]


@pytest.mark.slow
def test_row_of_a_case_in_a_fresh_process_is_complete_and_consistent() -> None:
    (row,) = run_job([small("gamma")], repeats=3, error=True)
    assert row.status == "measured", row.reason
    assert row.repetitions is not None
    assert len(row.repetitions) == 3
    assert 0 < row.seconds_min <= row.seconds <= row.seconds_max < 60
    assert row.in_products > 0
    assert 0 <= row.extra_bytes < GIB
    assert row.error_rows == child.ERROR_ROWS
    assert max(row.loss_error, row.gradient_error) < FLOAT32_ROUNDING
    assert (row.fma_fraction is None) == (row.no_peak is not None)
    assert json.loads(json.dumps(row.as_dict()))["loss"] == "gamma"


@pytest.mark.slow
def test_contenders_of_one_job_take_turns_in_one_process() -> None:
    ours, dense = run_job([small(), small("nt_xent", "dense")], repeats=4, memory=False)
    assert [products for _, products, _ in ours.repetitions] == [products for _, products, _ in dense.repetitions]
    assert ours.extra_bytes is None


def test_contenders_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="must agree in size"):
        run_job([small(n=64), small(n=128)])


def test_float64_error_is_measured_once_per_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(jobs: list[harness.Job], **_: object) -> list[Row]:
        asked.append([job.error for job in jobs])
        errors = [{"loss_error": 1e-7, "gradient_error": 2e-7} if job.error else {} for job in jobs]
        return [measured(*job.cases, **found) for job, found in zip(jobs, errors, strict=True)]

    monkeypatch.setattr(harness, "run_jobs", fake)
    rows = run_cases([small(n=64), small(n=128), small(implementation="dense")])
    assert asked == [[True], [False], [True]]
    assert [row.loss_error for row in rows] == [1e-7, 1e-7, 1e-7]


def test_on_a_device_the_sizes_of_an_implementation_share_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def fake(jobs: list[harness.Job], *, limit_seconds: float) -> list[Row]:
        started.append(([(job.cases[0].rows, job.error) for job in jobs], limit_seconds))
        return [measured(*job.cases) for job in jobs]

    monkeypatch.setattr(harness, "run_jobs", fake)
    cases = [small(implementation=name, n=n, device="cuda") for n in (64, 128) for name in ("contrastile", "dense")]
    rows = run_cases(cases, limit_seconds=5)
    assert started == [([(64, True), (128, False)], 10)] * 2
    assert [row.case for row in rows] == cases


@pytest.mark.slow
def test_what_a_job_breaks_off_leaves_the_results_of_the_jobs_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "missing", lambda case: None)
    cases = small(), small(n=64, backend="abacus"), small(n=256)
    first, second, third = run_jobs([harness.Job([case], repeats=1) for case in cases])
    assert first.status == "measured"
    assert (second.status, third.status) == ("failed", "failed")
    assert "abacus" in second.reason


@pytest.mark.slow
@pytest.mark.skipif(not RESETS_PEAK, reason="the peak of a process can be reset on Linux only")
def test_peak_memory_sees_a_passing_allocation_of_200_mib_and_not_an_earlier_one() -> None:
    program = """
import torch
from contrastile.bench.machine import PeakMemory
torch.ones(300, 2**18)          # 300 MiB, freed before the measurement
peak = PeakMemory()
torch.ones(200, 2**18).sum()
print(peak.growth())
"""
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert 198 * MIB < int(done.stdout) < 210 * MIB


@pytest.mark.slow
@pytest.mark.skipif(not RESETS_PEAK, reason="the peak of a process can be reset on Linux only")
def test_dense_loss_is_seen_to_store_its_scores_and_ours_is_not() -> None:
    n = 2048
    (dense,) = run_job([small("symmetric", "dense", n)], repeats=0)
    assert dense.extra_bytes > 2 * 4 * n * n
    assert dense.extra_bytes < IMPLEMENTATIONS["dense"].score_bytes(dense.case) + 16 * MIB
    (ours,) = run_job([small("symmetric", n=n)], repeats=0)
    assert ours.extra_bytes < 96 * MIB


def test_device_is_waited_for_and_its_memory_is_what_its_allocator_gave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that is made up: tensors stay on the CPU."""
    done = []
    allocated = {"memory_allocated": 100 * MIB, "max_memory_allocated": 150 * MIB}
    for name in ("synchronize", "reset_peak_memory_stats", *allocated):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: done.append(name) or allocated.get(name))
    monkeypatch.setattr(Case, "tensor_device", "cpu")
    case = small("symmetric", "dense", device="cuda", dtype="bfloat16")
    (found,) = child.measure([case], repeats=2, memory=True, error=True)
    assert found["extra_bytes"] == 50 * MIB - 2 * 128 * 32 * 2
    assert done[:4] == ["synchronize", "reset_peak_memory_stats", "memory_allocated", "synchronize"]
    assert done.count("synchronize") == 2 + 2 * 2 * (1 + 2)  # around two calls, once to set the pace and twice to time
    assert found["seconds"] > 0
    assert found["no_peak"] == "no FMA probe: it is the processor's"
    assert found["gradient_error"] < 0.1


def test_full_device_refuses_by_its_own_words(monkeypatch, tmp_path) -> None:
    def full(*_: object, **__: object) -> list[object]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB. GPU 0 has ...")

    jobs = [{"cases": [{**vars(small()), "device": "cpu"}], "repeats": 1, "memory": True, "error": False}]
    monkeypatch.setattr(child, "measure", full)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(jobs)))
    monkeypatch.setattr(sys, "argv", ["child", str(tmp_path / "result.json")])
    assert child.main() == 0
    ((found,),) = json.loads((tmp_path / "result.json").read_text())
    assert found == {"status": "refused", "reason": "CUDA out of memory. Tried to allocate 16.00 GiB"}


def test_peak_memory_elsewhere_says_that_it_is_a_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(*_: object) -> int:
        raise OSError

    monkeypatch.setattr(Path, "write_text", no_proc)
    peak = PeakMemory()
    assert "lower bound" in peak.note
    assert peak.growth() >= 0


def test_case_that_does_not_fit_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "available_bytes", lambda: 2 * GIB)
    monkeypatch.setattr(harness, "_in_child", lambda *_: pytest.fail("started"))
    (row,) = run_job([Case("symmetric", "dense", 32768, 32768)])
    assert row.status == "refused"
    assert row.reason.startswith("needs ")
    assert row.reason.endswith(" GiB, 2.0 GiB available")
    assert row.seconds is None


def test_ours_is_not_refused_where_dense_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "available_bytes", lambda: 4 * GIB)
    assert harness.refusal([Case("symmetric", "dense", 32768, 32768)]) is not None
    assert harness.refusal([Case("symmetric", "contrastile", 32768, 32768)]) is None


def test_absent_library_is_skipped_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations_module.importlib.util, "find_spec", lambda name: None)
    (row,) = run_job([small("symmetric", "open_clip")])
    assert (row.status, row.reason) == ("skipped", "not installed: open_clip")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (small("nt_xent", "open_clip"), "open_clip has no nt_xent"),
        (small(backend="abacus"), "no backend named 'abacus'"),
        (small(implementation="dense", backend="eager"), "dense has no backends"),
        (small(implementation="memeff"), "memeff runs on cuda, not on cpu"),
        (small(device="cuda"), "no CUDA or ROCm device"),
        (small(device="interpreter"), "TRITON_INTERPRET=1 is not set"),
    ],
    ids=["loss", "backend", "rival", "device", "no-device", "not-interpreting"],
)
def test_case_that_cannot_run_is_skipped_with_the_reason(case: Case, reason: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (row,) = run_job([case])
    assert (row.status, row.reason) == ("skipped", reason)


def test_failure_of_the_child_is_reported_with_its_last_words() -> None:
    (row,) = run_job([small()], limit_seconds=0.01)
    assert (row.status, row.reason) == ("failed", "not done after 0.01 s")
    assert harness._why_ended(-9, "") == "killed by SIGKILL"
    assert harness._why_ended(1, "Traceback ...\nRuntimeError: why") == "RuntimeError: why"


def test_scaling_refuses_a_size_that_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(cases: list[Case], **_: object) -> list[Row]:
        return [measured(cases[0], seconds=(cases[0].rows / 1000) ** 2, extra_bytes=3 * MIB)]

    monkeypatch.setattr(scaling_module, "run_job", fake)
    seen = []
    rows = loss_scaling([1000, 2000, 8000], implementations=["dense"], repeats=3, limit_seconds=30, on_row=seen.append)
    assert seen == rows
    assert [(row.n, row.seconds, row.mib) for row in rows] == [(1000, 1.0, 3.0), (2000, 4.0, 3.0), (8000, None, None)]
    assert rows[2].refused == "would take 320 s, limit 30 s"


@pytest.mark.slow
def test_scaling_measures_dense_and_ours() -> None:
    rows = loss_scaling([64], dim=16, threads=1, repeats=1)
    assert [(row.implementation, row.refused) for row in rows] == [("dense", None), ("contrastile", None)]
    assert all(row.seconds > 0 and row.mib >= 0 for row in rows)


class TestPromises:
    scope = Scope(main=64, second=32, small=16, memory=(32, 64), growth=(32, 64), dim=8, threads=1, repeats=2)

    def measure(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> dict[str, Promise]:
        def fake(cases: list[Case], *, memory: bool = True, **_: object) -> list[Row]:
            extra = {"extra_bytes": 64 * MIB} if memory else {}
            return [measured(case, seconds[case.implementation] * case.rows**2, **extra) for case in cases]

        monkeypatch.setattr(promises_module, "run_job", fake)
        return {promise.name: promise for promise in measure_promises(self.scope).promises}

    def test_hold_when_ours_is_fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.measure(monkeypatch, {"contrastile": 1e-8, "dense": 1e-7, "compiled": 1e-7})
        failing = {name for name, promise in found.items() if not promise.holds}
        assert failing == {"nt_xent of 64 rows: time / time of symmetric"}
        assert found["gamma against dense, N = 64: times faster"].figure == pytest.approx(10)
        assert found["symmetric: spread of time / N^2 from 32 to 64"].figure == pytest.approx(0)
        assert found["nt_xent: extra memory, N = 64"].figure_text == "64 MiB"

    def test_do_not_hold_when_ours_is_slow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.measure(monkeypatch, {"contrastile": 1e-5, "dense": 1e-6, "compiled": 1e-6})
        speed = found["gamma against compiled, N = 32: times faster"]
        assert (speed.verdict, speed.figure_text, speed.bound_text) == ("does not hold", "0.10 x", ">= 1.30 x")
        assert not found["gamma: share of FMA peak, N = 64"].holds

    def test_that_cannot_be_measured_do_not_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            promises_module, "run_job", lambda cases, **_: [Row(case, "refused", "needs 9.0 GiB") for case in cases]
        )
        found = measure_promises(self.scope).promises
        assert not any(promise.holds for promise in found)
        assert all("needs 9.0 GiB" in promise.verdict for promise in found)


def test_cost_spread_is_taken_in_units_of_the_peak_of_the_moment() -> None:
    quiet, busy = small(n=64), small(n=128)
    rows = [
        replace(measured(quiet), repetitions=[(1.0, 1.0, 2e9)]),
        replace(measured(busy), repetitions=[(8.0, 1.0, 1e9)]),  # twice the time / N^2 at half the peak
    ]
    assert cost_spread(rows) == pytest.approx(0)
    assert cost_spread([replace(row, repetitions=[(*row.repetitions[0][:2], None)]) for row in rows]) == pytest.approx(
        1
    )
    assert cost_spread([rows[0], Row(busy, "refused", "why")]) is None


class TestCommandLine:
    def test_measures_prints_and_writes_and_replaces_its_own_run(self, tmp_path, monkeypatch, capsys) -> None:
        pytest.importorskip("rich")
        monkeypatch.setattr(harness, "run_jobs", lambda jobs, **_: [measured(*jobs[0].cases, in_products=4.0)])
        out = tmp_path / "results.json"
        arguments = ["--sizes", "64,32x96", "--losses", "one_direction", "--implementations", "contrastile,dense"]
        for _ in range(2):
            assert main([*arguments, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert "32 x 96" in printed
        assert "peak of the process beyond inputs" in printed
        document = json.loads(out.read_text())
        assert {"cpu", "cores", "caches"} <= set(document["machine"])
        assert {"python", "torch"} <= set(document["versions"])
        (run,) = document["runs"]
        assert run["command"].startswith("python -m contrastile bench --sizes 64,32x96")
        assert len(run["rows"]) == 4
        assert {"loss", "implementation", "rows", "cols", "dim", "dtype", "threads", "backend"} <= set(run["rows"][0])
        assert {"status", "reason", "seconds", "in_products", "fma_fraction", "extra_bytes"} <= set(run["rows"][0])

    def test_figures_of_another_machine_are_not_mixed_in(self, tmp_path) -> None:
        report = pytest.importorskip("contrastile.bench.report")
        out = tmp_path / "results.json"
        out.write_text(json.dumps({"machine": {"cpu": "abacus"}, "versions": {}, "runs": []}))
        with pytest.raises(ValueError, match="another machine"):
            report.write_results(out, "command", [])

    def test_backends_are_a_choice_of_ours_alone(self, monkeypatch) -> None:
        pytest.importorskip("rich")
        cases = []
        monkeypatch.setattr(
            harness, "run_jobs", lambda jobs, **_: cases.extend(jobs[0].cases) or [measured(*jobs[0].cases)]
        )
        main(["--sizes", "64", "--implementations", "contrastile,dense", "--backends", "cpu,eager"])
        assert [case.label for case in cases] == ["contrastile[cpu]", "contrastile[eager]", "dense"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--losses", "clip"], "'clip' is not one of gamma"),
            (["--implementations", "ours"], "'ours' is not one of contrastile"),
            (["--sizes", "2k"], "'2k' is not a size such as 2048"),
            (["--sizes", "0"], "sizes are positive"),
        ],
    )
    def test_wrong_option_is_named(self, arguments, message, capsys) -> None:
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err

    def test_broken_promise_is_the_exit_status(self, monkeypatch) -> None:
        pytest.importorskip("rich")
        promise = Promise("speed", 1.0, 2.0, "x", at_least=True)
        for figure, status in ((1.0, 1), (3.0, 0)):
            kept = promises_module.Findings([replace(promise, figure=figure)], [])
            monkeypatch.setattr(promises_module, "measure_promises", lambda *_, kept=kept: kept)
            assert main(["--must-reach"]) == status


def test_plot_draws_every_loss_and_skips_what_was_not_measured(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from contrastile.bench.plot import plot

    rows = [measured(small(loss, n=n), extra_bytes=n * MIB).as_dict() for loss in LOSSES for n in (64, 128)]
    rows.append(Row(small("symmetric", "dense"), "refused", "needs 9.0 GiB").as_dict())
    picture = tmp_path / "bench.png"
    plot(rows, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no measured times"):
        plot(rows[-1:], picture)
    with pytest.raises(ValueError, match=r"one picture shows one \(D, dtype, threads, device\)"):
        plot([*rows, measured(replace(small(), dim=64)).as_dict()], picture)


def test_inputs_are_unit_rows_and_the_same_for_every_implementation() -> None:
    ours, theirs = (child.make_inputs(small("gamma", name)) for name in ("contrastile", "dense"))
    assert torch.equal(ours.x, theirs.x)
    assert torch.allclose(ours.x.norm(dim=1), torch.ones(128))
