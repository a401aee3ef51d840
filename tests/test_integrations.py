"""Losses under the names of open_clip and lightly: equal to theirs, switched off to theirs, nothing imported early."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from contrastile import losses, reference
from contrastile.integrations import lightly, open_clip
from support import (
    Shape,
    _file_of,
    _load,
    _stand_ins,
    assert_as_exact_as_dense,
    open_clip_loss,
    open_clip_losses,
    scalar,
    towers,
)


def autocast(function):
    """function under autocast to bfloat16, for float32 inputs."""

    def run(*inputs, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*inputs, **options)

    return run


@pytest.mark.parametrize("shape", [Shape(1, 1, 3), Shape(63, 63, 100), Shape(257, 257, 48)], ids=str)
@pytest.mark.parametrize("precision", ["float32", "float64", "autocast"])
def test_clip_loss_and_gradients_are_as_exact_as_open_clips(precision, shape):
    x, y = towers(shape, torch.float64 if precision == "float64" else torch.float32)
    within = autocast if precision == "autocast" else lambda function: function
    assert_as_exact_as_dense(
        within(lambda x, y, scale: open_clip.ClipLoss()(x, y, scale, output_dict=True)["contrastive_loss"]),
        within(lambda x, y, scale: open_clip_loss()()(x, y, scale)),
        lambda x, y, scale: reference.info_nce(x, y, scale),
        {"x": x, "y": y, "scale": scalar(20.0, x.dtype)},
    )


@pytest.mark.parametrize("shape", [Shape(1, 1, 3), Shape(63, 63, 100), Shape(257, 257, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_siglip_loss_and_gradients_are_as_exact_as_open_clips(dtype, shape):
    x, y = towers(shape, dtype)
    theirs = open_clip_losses().SigLipLoss()
    assert_as_exact_as_dense(
        lambda **inputs: open_clip.SigLipLoss()(*inputs.values(), output_dict=True)["contrastive_loss"],
        lambda **inputs: theirs(*inputs.values()),
        reference.siglip,
        {"x": x, "y": y, "scale": scalar(20.0, dtype), "bias": scalar(-8.0, dtype)},
    )


def test_siglip_loss_multiplies_in_the_dtype_of_autocast_about_as_open_clips_does():
    x, y = towers(Shape(257, 257, 48))
    loss = autocast(open_clip.SigLipLoss())(x.requires_grad_(), y, 20.0, -8.0)
    loss.backward()
    assert torch.equal(loss, losses.SigLipLoss()(x.bfloat16(), y.bfloat16(), 20.0, -8.0))
    assert loss.dtype == x.grad.dtype == torch.float32
    torch.testing.assert_close(loss, autocast(open_clip_losses().SigLipLoss())(x, y, 20.0, -8.0), rtol=1e-2, atol=0)


def test_clip_loss_multiplies_in_the_dtype_of_autocast_and_gives_gradients_in_that_of_the_features():
    x, y = towers(Shape(65, 65, 48))
    narrow = losses.ClipLoss()(x.bfloat16(), y.bfloat16(), 20.0)
    x.requires_grad_()
    loss = autocast(open_clip.ClipLoss())(x, y, 20.0)
    loss.backward()
    assert torch.equal(loss, narrow)
    assert loss.dtype == x.grad.dtype == torch.float32
    double = y.double()
    assert torch.equal(autocast(open_clip.ClipLoss())(double, double, 20.0), losses.ClipLoss()(double, double, 20.0))


def open_clip_factory() -> types.ModuleType:
    """open_clip.factory with create_loss as it stands in its file: the rest of the file needs torchvision."""
    path = _file_of("open_clip", "factory.py")
    functions = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "create_loss"]
    factory = types.ModuleType("open_clip.factory")
    factory.__dict__.update(vars(_load("open_clip_loss", path.with_name("loss.py"))))
    exec(compile(ast.Module(functions, []), str(path), "exec"), factory.__dict__)
    return factory


def training_arguments(**changes) -> argparse.Namespace:
    known = {"distill": False, "model": "ViT-B-32", "siglip": False, "horovod": False, "local_loss": True}
    gathering = {"gather_with_grad": True, "rank": 0, "world_size": 1, "loss_dist_impl": None}
    weights = {"coca_caption_loss_weight": 1.0, "coca_contrastive_loss_weight": 1.0}
    return argparse.Namespace(**{**known, **gathering, **weights, **changes})


def test_installed_in_open_clip_its_training_script_gets_this_loss_and_the_others_stay():
    factory = open_clip_factory()
    others = [{"distill": True}, {"model": "coca_ViT-B-32"}]
    before = [type(factory.create_loss(training_arguments(**other))) for other in others]
    with _stand_ins({"open_clip": types.ModuleType("open_clip"), "open_clip.factory": factory}):
        open_clip.install()
    loss = factory.create_loss(training_arguments())
    assert type(loss) is open_clip.ClipLoss
    assert type(factory.create_loss(training_arguments(siglip=True))) is open_clip.SigLipLoss
    assert [type(factory.create_loss(training_arguments(**other))) for other in others] == before

    x, y = towers(Shape(5, 5, 7))
    model_out = {"image_features": x, "text_features": y, "logit_scale": torch.tensor(20.0)}
    assert torch.equal(loss(**model_out, output_dict=True)["contrastive_loss"], losses.ClipLoss()(x, y, 20.0))


def test_open_clip_without_the_name_to_replace_is_refused():
    modules = {name: types.ModuleType(name) for name in ("open_clip", "open_clip.factory")}
    with _stand_ins(modules), pytest.raises(RuntimeError, match=r"open_clip\.factory has no ClipLoss"):
        open_clip.install()


def test_lightlys_name_is_the_loss_that_has_its_constructor():
    assert lightly.NTXentLoss is losses.NTXentLoss


LOSSES = {open_clip: ("ClipLoss", "SigLipLoss"), lightly: ("NTXentLoss",)}


@pytest.mark.parametrize("module", LOSSES)
def test_switched_off_the_name_is_the_librarys_own_class(monkeypatch, module):
    library = {open_clip: "open_clip.loss", lightly: "lightly.loss"}[module]
    originals = {name: type(name, (), {}) for name in LOSSES[module]}
    modules = {part: types.ModuleType(part) for part in (library.partition(".")[0], library)}
    vars(modules[library]).update(originals)
    monkeypatch.setenv("CONTRASTILE_INTEGRATIONS", "0")
    with _stand_ins(modules):
        loaded = _load("switched_off", Path(module.__file__))
        assert {name: getattr(loaded, name) for name in originals} == originals
    monkeypatch.setenv("CONTRASTILE_INTEGRATIONS", "off")
    with pytest.raises(ValueError, match="CONTRASTILE_INTEGRATIONS is 'off': expected 0"):
        _load("switched_wrongly", Path(module.__file__))


def test_no_library_is_imported_before_its_own_module():
    libraries = ("open_clip", "lightly", "sentence_transformers", "pytorch_metric_learning")
    code = (
        "import sys, contrastile.integrations.open_clip, contrastile.integrations.lightly\n"
        f"print([name for name in {libraries} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
