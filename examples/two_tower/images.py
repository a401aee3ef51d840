"""Images as training sees them: turned, zoomed, moved, and of another brightness and contrast."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_TURN = math.radians(15)
ZOOM = (0.8, 1.15)  # of the drawing
LARGEST_SHIFT = 0.2  # of half the width: 3 of 32 pixels
BRIGHTNESS = (0.85, 1.0)  # of the paper
CONTRAST = (0.7, 1.2)  # of the ink
WHITE = 255.0


def jittered(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, S, S) of 0 to 255, uint8, to as many in float32, white where nothing is left.

    Nothing is mirrored and no hue is moved: arrows, flags, hearts and skin tones would be called otherwise.
    """

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    turn, zoom = drawn(-LARGEST_TURN, LARGEST_TURN), drawn(*ZOOM)
    cosine, sine = turn.cos() / zoom, turn.sin() / zoom
    shift = torch.stack([drawn(-LARGEST_SHIFT, LARGEST_SHIFT) for _ in range(2)], 1)
    to_source = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1), shift], 2)  # (B, 2, 3)
    grid = F.affine_grid(to_source, list(images.shape), align_corners=False)
    ink = F.grid_sample(images.float() - WHITE, grid, align_corners=False)  # beyond its edges there is no ink
    brightness, contrast = (drawn(*limits)[:, None, None, None] for limits in (BRIGHTNESS, CONTRAST))
    return (WHITE * brightness + contrast * ink).clamp(0, WHITE)
