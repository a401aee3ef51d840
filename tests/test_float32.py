"""Which form of float32 products a GPU backend takes."""

from __future__ import annotations

import pytest
import torch
from contrastile.backends.float32 import choices_of, float32_products


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.delenv("CONTRASTILE_FLOAT32", raising=False)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


@pytest.mark.parametrize(("allowed", "expected"), [("ieee", "ieee"), ("tf32", "tf32"), ("none", "ieee")])
def test_pytorchs_newer_setting_is_followed_and_reading_it_raises_nothing(settings, allowed, expected):
    settings.fp32_precision = allowed
    assert float32_products("sm_90") == expected


def test_a_target_without_tf32_takes_ieee_where_pytorch_merely_allows_it(settings):
    settings.fp32_precision = "tf32"
    assert float32_products("gfx942") == "tf32"
    assert float32_products("gfx950") == "ieee"


@pytest.mark.parametrize("products", choices_of("sm_80"))
def test_a_named_form_is_taken(monkeypatch, settings, products):
    settings.fp32_precision = "tf32"
    monkeypatch.setenv("CONTRASTILE_FLOAT32", products)
    assert float32_products("sm_80") == products


def test_a_named_form_that_is_not_there_raises(monkeypatch):
    monkeypatch.setenv("CONTRASTILE_FLOAT32", "tf32x3")
    with pytest.raises(RuntimeError, match="'tf32x3': gfx942 has ieee, tf32"):
        float32_products("gfx942")
    monkeypatch.setenv("CONTRASTILE_FLOAT32", "fast")
    with pytest.raises(ValueError, match="'fast': expected one of ieee, tf32x3, tf32"):
        float32_products("sm_80")
