"""Losses of other libraries on given embeddings, each called as its users would."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from contrastile.bench.cases import SCALE, Case, Inputs
from contrastile.bench.dense import STRIP_ROWS
from torch import Tensor, nn

Loss = Callable[[Inputs], Tensor]


def linear_cross_entropy(case: Case) -> Loss:
    """torch.nn.functional.linear_cross_entropy in its chunked form, one call a direction."""
    call: Any = getattr(F, "linear_cross_entropy", None)
    if call is None:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy (new in 2.13)")
    options = torch.nn.LinearCrossEntropyOptions()

    def run(inputs: Inputs) -> Tensor:
        x, y = inputs.pair
        targets = torch.arange(x.shape[0], device=x.device)
        loss: Tensor = call(SCALE * x, y, targets, options=options)
        if case.loss == "symmetric":
            loss = (loss + call(SCALE * y, x, targets, options=options)) / 2
        return loss

    return run


def open_clip(case: Case) -> Loss:
    """open_clip.loss.ClipLoss."""
    loss = import_alone("open_clip.loss").ClipLoss()

    def run(inputs: Inputs) -> Tensor:
        value: Tensor = loss(*inputs.pair, SCALE)
        return value

    return run


def lightly(case: Case) -> Loss:
    """lightly.loss.NTXentLoss, which takes the two views apart and normalises them."""
    # The memory bank names lightly.models.utils, which wants torchvision; without a bank it is never used.
    loss = import_alone("lightly.loss.ntx_ent_loss", unused="lightly.models.utils").NTXentLoss(temperature=1 / SCALE)

    def run(inputs: Inputs) -> Tensor:
        first, second = inputs.x.chunk(2)
        value: Tensor = loss(first, second)
        return value

    return run


def mnrl(case: Case) -> Loss:
    """sentence_transformers MultipleNegativesRankingLoss."""
    return _sentence_transformers(case, "MultipleNegativesRankingLoss")


def cached_mnrl(case: Case) -> Loss:
    """sentence_transformers CachedMultipleNegativesRankingLoss.

    Its mini-batch of 32 rows is meant for a model's forward and slow for scores: STRIP_ROWS here.
    """
    return _sentence_transformers(case, "CachedMultipleNegativesRankingLoss", mini_batch_size=STRIP_ROWS)


def keops(case: Case) -> Loss:
    """KeOps LazyTensors: log-sum-exp reductions compiled for this dimension, gradients by its own autodiff."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise ImportError("pykeops compiles its reductions and found no C++ compiler")
    from pykeops.torch import LazyTensor

    def run(inputs: Inputs) -> Tensor:
        x, y = inputs.pair
        logits = (LazyTensor((SCALE * x)[:, None, :]) * LazyTensor(y[None, :, :])).sum(-1)
        normalizer: Tensor = logits.logsumexp(dim=1).mean()
        if case.loss == "symmetric":
            normalizer = (normalizer + logits.logsumexp(dim=0).mean()) / 2
        return normalizer - SCALE * (x * y).sum(1).mean()

    return run


def memeff(case: Case) -> Loss:
    """memeff's MemoryEfficientCLIPLoss, and by row alone MemoryEfficientQwen3Loss without its mask (a margin of 2).

    stable=False: by default its gradients are scaled by sqrt(N / temperature) rather than those of the loss. In float32
    it multiplies in TF32 unless MEMEFF_INPUT_PRECISION says otherwise.
    """
    module = importlib.import_module("memeff")
    options: dict[str, Any] = {"temperature": 1 / SCALE, "normalized_inputs": True, "stable": False}
    if case.loss == "symmetric":
        loss = module.MemoryEfficientCLIPLoss(**options)
    else:
        loss = module.MemoryEfficientQwen3Loss(margin=2.0, **options)

    def run(inputs: Inputs) -> Tensor:
        value: Tensor = loss(*inputs.pair)
        return value

    return run


def inf_cl(case: Case) -> Loss:
    """inf_cl.cal_flash_loss, Inf-CL on one device: losses by row, one call a direction; widened and multiplied in TF32.

    Takes features in heads of 256 by default, and a power of two.
    """
    call: Any = importlib.import_module("inf_cl").cal_flash_loss
    options: dict[str, Any] = {"scale": SCALE, "head_dim": min(256, case.dim)}

    def run(inputs: Inputs) -> Tensor:
        x, y = inputs.pair
        loss: Tensor = call(x, y, **options).mean()
        if case.loss == "symmetric":
            loss = (loss + call(y, x, **options).mean()) / 2
        return loss

    return run


class _GivenEmbeddings(nn.Sequential):
    """A sentence-transformers model whose features are the embeddings themselves."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["embedding"]}


def _sentence_transformers(case: Case, name: str, **options: Any) -> Loss:
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.util import dot_score

    if case.loss == "symmetric":
        options.update(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    loss = getattr(losses, name)(_GivenEmbeddings(), scale=SCALE, similarity_fct=dot_score, **options)

    def run(inputs: Inputs) -> Tensor:
        value: Tensor = loss([{"embedding": embedding} for embedding in inputs.pair], None)
        return value

    return run


def import_alone(name: str, unused: str | None = None) -> ModuleType:
    """Import a module without running the __init__ of the packages around it, which may want torchvision.

    Args:
        name: dotted name of the module.
        unused: a module it imports and never calls; an empty one stands in for it.
    """
    root, *_ = name.split(".")
    spec = importlib.util.find_spec(root)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{root} is not installed")
    folder = Path(spec.submodule_search_locations[0])
    before = {key: module for key, module in sys.modules.items() if key == root or key.startswith(f"{root}.")}
    for key in before:
        del sys.modules[key]
    try:
        for package in [folder, *(path for path in folder.rglob("*") if (path / "__init__.py").is_file())]:
            key = ".".join([root, *package.relative_to(folder).parts])
            sys.modules[key] = ModuleType(key)
            sys.modules[key].__path__ = [str(package)]
        if unused:
            sys.modules[unused] = ModuleType(unused)
            setattr(sys.modules[unused.rpartition(".")[0]], unused.rpartition(".")[2], sys.modules[unused])
        return importlib.import_module(name)
    finally:
        for key in [key for key in sys.modules if key == root or key.startswith(f"{root}.")]:
            del sys.modules[key]
        sys.modules.update(before)
