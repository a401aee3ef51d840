"""The pass over rows in C++: csrc/cpu/row_pass.h, through the extension module contrastile._C."""

from __future__ import annotations

import torch
from torch import Tensor

from contrastile.backends.cpu import embedding_view, extension
from contrastile.backends.rows import BridgeDistance, Gradients, RowKind


def run(kind: RowKind, inputs: tuple[Tensor, ...], gain: Tensor, values: Tensor, gradients: Gradients) -> None:
    """Writes values and the gradients that are not None: see `rows.run`."""
    c, suffix = extension(), "_float64" if gain.dtype == torch.float64 else "_float32"
    native = [
        c.RowInput(rows=embedding_view(part), gradient=None if gradient is None else gradient.data_ptr())
        for part, gradient in zip(inputs, gradients, strict=True)
    ]
    rest = gain.data_ptr(), values.data_ptr(), torch.get_num_threads()
    if isinstance(kind, BridgeDistance):
        time = kind.time.contiguous()
        getattr(c, "bridge_rows" + suffix)(native, time.data_ptr(), *rest)
    else:
        getattr(c, "dot_product_rows" + suffix)(native, kind.difference, *rest)
