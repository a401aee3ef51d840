"""Random shapes, dtypes, masks and options against the reference in float64; the same examples every time."""

from __future__ import annotations

import contrastile as ct
import torch
import torch.nn.functional as F
from contrastile import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    BACKENDS_HERE,
    Shape,
    accumulation,
    assert_as_exact_as_dense,
    scalar,
    small_workspace,
    towers,
)
from torch import Tensor

SIZES = st.sampled_from([1, 2, 3, 5, 8, 17, 31, 63, 64, 65, 100, 129])
DIMS = st.sampled_from([1, 2, 3, 7, 16, 31, 48, 65, 100])
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
SCALES = st.sampled_from([0.01, 1.0, 20.0, 100.0, 1000.0])
WORKSPACES = st.sampled_from([2**26, 2**16, 2**13])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
BACKENDS = st.sampled_from(BACKENDS_HERE)
SEEDS = st.integers(0, 2**16)

bounded_in_time = settings(max_examples=80)


def random_ids(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(max(1, count // 3), (count,), generator=generator)


@st.composite
def problems(draw, square: bool = False, positives: bool = True):
    """(inputs x, y, scale; mask options): rows <= columns where positives are drawn, any otherwise."""
    sizes = draw(SIZES), draw(SIZES)
    rows, cols = sorted(sizes) if positives else sizes
    shape = Shape(cols if square else rows, cols, draw(DIMS))
    dtype, seed = draw(DTYPES), draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    widest = Shape(min(shape.rows, shape.cols), max(shape.rows, shape.cols), shape.dim)
    x, y = towers(widest, dtype, seed=seed)
    x, y = (x, y) if shape.rows <= shape.cols else (y, x)
    size, scale = draw(st.sampled_from([0.1, 1.0, 1.0, 5.0])), draw(SCALES)
    per_row = scale * (0.5 + torch.rand(shape.rows, generator=generator)).to(accumulation(dtype))
    inputs = {"x": size * x, "y": y, "scale": per_row if draw(st.booleans()) else scalar(scale, dtype)}
    options = {}
    if positives and draw(st.booleans()):
        options["positives"] = torch.randperm(shape.cols, generator=generator)[: shape.rows]
    if draw(st.booleans()):
        options["groups"] = (random_ids(shape.rows, generator), random_ids(shape.cols, generator))
    return inputs, options


def compare(function: str, inputs, backend: str, workspace: int, pick=lambda result: result, **options) -> None:
    ours, oracle = getattr(ct, function), getattr(reference, function)

    def truth(**leaves):
        return pick(oracle(**leaves, **options))

    with small_workspace(workspace):
        assert_as_exact_as_dense(
            lambda **leaves: pick(ours(**leaves, **options, backend=backend)),
            truth,
            truth,
            inputs,
            dense_dtype=accumulation(next(iter(inputs.values())).dtype),
            slack=8,
        )


@bounded_in_time
@given(problems(square=True), BACKENDS, WORKSPACES, REDUCTIONS)
def test_symmetric_info_nce(problem, backend, workspace, reduction):
    inputs, options = problem
    compare("info_nce", inputs, backend, workspace, reduction=reduction, **options)


@bounded_in_time
@given(problems(), BACKENDS, WORKSPACES, REDUCTIONS)
def test_info_nce_in_one_direction(problem, backend, workspace, reduction):
    inputs, options = problem
    compare("info_nce", inputs, backend, workspace, symmetric=False, reduction=reduction, **options)


@st.composite
def softmax_options(draw, inputs):
    """What a softmax may have beside the pairs; hard negatives join the inputs."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    (rows, dim), dtype = inputs["x"].shape, inputs["x"].dtype
    shape = draw(st.sampled_from([None, (rows, 2, dim), (5, dim)]))
    if shape is not None:
        inputs["hard_negatives"] = F.normalize(torch.randn(shape, generator=generator), dim=-1).to(dtype)
    by_row = 0.9 * torch.rand(rows, generator=generator)
    prior = draw(st.sampled_from([None, 0.0, 0.02, 0.5, by_row]))
    return {"prior": prior, "label_smoothing": draw(st.sampled_from([0.0, 0.1, 0.4]))}


@settings(max_examples=40)
@given(st.data(), st.booleans(), BACKENDS, WORKSPACES, REDUCTIONS)
def test_info_nce_with_options(data, symmetric, backend, workspace, reduction):
    inputs, options = data.draw(problems(square=symmetric))
    inputs["x"], inputs["y"] = (F.normalize(inputs[name].double()).to(inputs[name].dtype) for name in ("x", "y"))
    options |= data.draw(softmax_options(inputs)) | {"reduction": reduction}
    if symmetric and options["prior"] is not None:
        inputs["scale"] = inputs["scale"].amax()
    compare("info_nce", inputs, backend, workspace, symmetric=symmetric, **options)


@settings(max_examples=40)
@given(st.data(), st.sampled_from(["joint", "per_direction"]), BACKENDS, WORKSPACES)
def test_directional_info_nce(data, partition, backend, workspace):
    inputs, options = data.draw(problems())
    directions = data.draw(st.sampled_from([("xy",), ("xy", "yx"), ("xy", "xx", "yy"), ("yy", "xx", "yx", "xy")]))
    options |= data.draw(softmax_options(inputs))
    if "yx" in directions and partition == "joint":
        options |= {"prior": None, "label_smoothing": 0.0}
    if "yx" in directions and options["prior"] is not None:
        inputs["scale"] = inputs["scale"].amax()
    compare("directional_info_nce", inputs, backend, workspace, directions=directions, partition=partition, **options)


@bounded_in_time
@given(SIZES, DIMS, DTYPES, SCALES, st.booleans(), BACKENDS, WORKSPACES, REDUCTIONS, SEEDS)
def test_nt_xent(pairs, dim, dtype, scale, by_row, backend, workspace, reduction, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat(towers(Shape(pairs, pairs, dim), dtype, seed=seed))
    scales = scale * (0.5 + torch.rand(2 * pairs, generator=generator)).to(accumulation(dtype))
    first, second = torch.randperm(2 * pairs, generator=generator).view(2, pairs)
    positives = torch.empty(2 * pairs, dtype=torch.int64).scatter(0, first, second).scatter(0, second, first)
    inputs = {"z": z, "scale": scales if by_row else scalar(scale, dtype)}
    compare("nt_xent", inputs, backend, workspace, positives=positives, reduction=reduction)


@bounded_in_time
@given(st.data(), st.booleans(), st.booleans(), BACKENDS, WORKSPACES, REDUCTIONS, st.floats(-2, 5), SEEDS)
def test_gamma_contrastive(data, both, cap, backend, workspace, reduction, log_multiplier, seed):
    inputs, options = data.draw(problems(square=both))
    generator = torch.Generator().manual_seed(seed)
    wide = {name: value.double() for name, value in inputs.items()}
    positives = options.get("positives", torch.arange(len(wide["x"])))
    masks = options | {"positives": positives}
    lse = reference.log_normalizers(**wide, **masks, log_multiplier=log_multiplier)
    for weights, draws, values in zip(("log_u", "log_v"), ("row_draws", "col_draws"), lse, strict=True):
        if weights == "log_u" or both:
            noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            options[weights] = ((3.0 if cap else 0.3) * noise - values).to(accumulation(inputs["x"].dtype))
            options[draws] = 0.5 + torch.rand(values.shape, generator=generator)
    options |= {"cap": cap, "log_multiplier": log_multiplier, "reduction": reduction}
    compare("gamma_contrastive", inputs, backend, workspace, lambda output: output.loss, **options)


@bounded_in_time
@given(problems(), st.sampled_from([-1000.0, -10.0, 0.0, 3.0]), BACKENDS, WORKSPACES, REDUCTIONS)
def test_siglip(problem, bias, backend, workspace, reduction):
    inputs, options = problem
    inputs["bias"] = scalar(bias, inputs["x"].dtype)
    compare("siglip", inputs, backend, workspace, reduction=reduction, **options)


@bounded_in_time
@given(problems(positives=False), BACKENDS, WORKSPACES, st.floats(-2, 5))
def test_log_normalizers(problem, backend, workspace, log_multiplier):
    inputs, options = problem

    def finite(pair):
        joined = torch.cat(pair)
        return joined.where(joined.isfinite(), joined.detach().nan_to_num(neginf=-1e9))

    compare("log_normalizers", inputs, backend, workspace, finite, log_multiplier=log_multiplier, **options)


@bounded_in_time
@given(problems(), BACKENDS, WORKSPACES, SEEDS)
def test_retrieval_ranks(problem, backend, workspace, seed):
    inputs, options = problem
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(-2, 3, inputs[name].shape, generator=generator).to(inputs[name].dtype) for name in ("x", "y"))
    with small_workspace(workspace):
        ours = ct.retrieval_ranks(x, y, **options, backend=backend)
    assert torch.equal(ours, reference.retrieval_ranks(x, y, **options))
