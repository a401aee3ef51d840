"""bench/steps.py on a device that is made up: tensors stay on the processor."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contrastile.bench import steps
from contrastile.bench.cases import Case

CUDA, CPU = steps.DeviceType.CUDA, steps.DeviceType.CPU
EVENTS = [
    SimpleNamespace(name="fast_kernel", device_type=CUDA, device_time_total=2.0),
    SimpleNamespace(name="slow_kernel<" + "x" * 200, device_type=CUDA, device_time_total=30.0),
    SimpleNamespace(name="fast_kernel", device_type=CUDA, device_time_total=3.0),
    SimpleNamespace(name="cudaLaunchKernel", device_type=CPU, device_time_total=99.0),
]


class Event:
    """The third of three calls, 4 ms after the second, and so on."""

    count = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.count += 1
        self.at = Event.count

    def elapsed_time(self, other: Event) -> float:
        return 4.0 * (other.at - self.at)


class Profile:
    def __init__(self, activities: list[object]) -> None:
        assert activities == [steps.ProfilerActivity.CUDA]

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def events(self) -> list[SimpleNamespace]:
        return EVENTS


@pytest.fixture
def made_up_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("wait"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(steps, "profile", Profile)
    monkeypatch.setattr(Case, "tensor_device", "cpu")
    return waited


def test_kernels_are_summed_by_name_and_come_slowest_first(made_up_device: list[str]) -> None:
    first, second = steps.kernels(lambda: None)
    assert (first["name"], first["launches"]) == (("slow_kernel<" + "x" * 200)[: steps.NAME_LENGTH], 1)
    assert (second["name"], second["launches"]) == ("fast_kernel", 2)
    assert (first["seconds"], second["seconds"]) == (pytest.approx(30e-6), pytest.approx(5e-6))
    assert made_up_device == ["wait"]  # the kernels have run when the profiler is asked


def test_every_loss_is_a_row_of_the_file(made_up_device: list[str], tmp_path, capsys) -> None:
    out = tmp_path / "steps.json"
    assert steps.main([str(out), "--backends", "eager", "--sizes", "64", "--dims", "16", "--dtype", "float32"]) == 0
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    assert [row["loss"] for row in rows] == list(steps.LOSSES)
    assert {(row["rows"], row["dim"], row["backend"], row["device_seconds"]) for row in rows} == {
        (64, 16, "eager", 0.004)
    }
    assert all(row["host_seconds"] > 0 and len(row["kernels"]) == 2 for row in rows)
    assert "eager float32 N=64 D=16 symmetric: device 0.004 s (0 Tflop/s), busy 3.5e-05 s" in capsys.readouterr().out


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="a CUDA or ROCm device, and there is none"):
        steps.main([str(tmp_path / "steps.json")])
