"""The Haar operators under torch.func.vmap: the mapped dimension joins the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def into_batch(t: Tensor, dim: int | None, size: int) -> Tensor:
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1)


def analysis(info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any) -> tuple[list[Tensor], list[int]]:
    out = torch.ops.wavemix_kernels.haar_analysis(into_batch(x, in_dims[0], info.batch_size), *rest)
    return [t.unflatten(0, (info.batch_size, -1)) for t in out], [0] * len(out)


def synthesis(
    info: Any, in_dims: tuple[Any, ...], ll: Tensor, highs: list[Tensor], size: Any, mode: str, add: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, int]:  # fmt: skip
    n = info.batch_size
    highs = [into_batch(t, d, n) for t, d in zip(highs, in_dims[1], strict=True)]
    add = None if add is None else into_batch(add, in_dims[4], n)
    ll = into_batch(ll, in_dims[0], n)
    out = torch.ops.wavemix_kernels.haar_synthesis(ll, highs, size, mode, add, *rest)
    return out.unflatten(0, (n, -1)), 0
