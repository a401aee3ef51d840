"""How float32 embeddings are multiplied on a GPU.

    ieee    multiply-adds                                      a product is off by about 2^-24 of its size
    tf32x3  three matrix products of parts of 11 bits          about 2^-21
    tf32    one matrix product of the leading 11 bits          about 2^-11

CONTRASTILE_FLOAT32 names one for the logits; otherwise PyTorch's setting for CUDA products decides, which is ieee
unless TF32 was allowed. Products of coefficients with embeddings are PyTorch's own, and follow its setting alone.
"""

from __future__ import annotations

import os

import torch

CHOICES = ("ieee", "tf32x3", "tf32")


def choices_of(target: str) -> tuple[str, ...]:
    """What a target ("sm_90", "gfx942", "interpreter", ...) has."""
    if target.startswith("gfx"):
        return ("ieee", "tf32") if target == "gfx942" else ("ieee",)
    return CHOICES


def float32_products(target: str) -> str:
    """
    Raises:
        ValueError: CONTRASTILE_FLOAT32 is not one of the choices.
        RuntimeError: the target does not have the one that it names.
    """
    named, there = os.environ.get("CONTRASTILE_FLOAT32"), choices_of(target)
    if not named:
        return "tf32" if tf32_is_allowed() and "tf32" in there else "ieee"
    if named not in CHOICES:
        raise ValueError(f"CONTRASTILE_FLOAT32 is {named!r}: expected one of {', '.join(CHOICES)}")
    if named not in there:
        raise RuntimeError(f"CONTRASTILE_FLOAT32 is {named!r}: {target} has {', '.join(there)}")
    return named


def tf32_is_allowed() -> bool:
    """By PyTorch, for CUDA products."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # once it was set, PyTorch refuses to tell the older flag
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)
