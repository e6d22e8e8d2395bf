"""Haar analysis and synthesis in plain PyTorch: the specification every kernel is held to.

One level maps each 2x2 block ``a b / c d`` (rows, top first) to
``LL=(a+b+c+d)/2, LH=(a+b-c-d)/2, HL=(a-b+c-d)/2, HH=(a-b-c+d)/2`` and recurses on LL. The butterfly is
orthonormal and symmetric: the same four sums take the coefficients back.

An odd size lacks its last sample. PyWavelets' padding modes say what stands there, always a combination of
three samples; :data:`MODES` is that table. ``synthesis`` is the exact adjoint of ``analysis`` in every mode;
mode ``"zero"`` simply crops, which also makes it the inverse transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wavemix_kernels import fx
from wavemix_kernels.ops.common.dtypes import accumulate_dtype


class Edge(NamedTuple):
    """The sample past the end: ``last*x[n-1] + before*x[n-2] + first*x[0]``."""

    last: float = 0.0
    before: float = 0.0
    first: float = 0.0

    @property
    def local(self) -> bool:
        """Whether the missing sample follows from the one beside it, so that a tile needs no neighbours."""
        return self.before == 0 and self.first == 0


MODES: dict[str, Edge] = {
    "zero": Edge(),
    "constant": Edge(last=1),
    "symmetric": Edge(last=1),
    "periodization": Edge(last=1),
    "per": Edge(last=1),
    "antisymmetric": Edge(last=-1),
    "periodic": Edge(first=1),
    "reflect": Edge(before=1),
    "smooth": Edge(last=2, before=-1),
    "antireflect": Edge(last=2, before=-1),
}
#: Modes that PyWavelets defines for two samples or more only.
NEEDS_TWO = ("reflect", "antireflect")


def edge_of(mode: str, size: int) -> Edge:
    """The rule of ``mode`` for an axis of ``size`` samples (a single sample can only repeat itself)."""
    edge = MODES[mode]
    return Edge(last=1) if size == 1 and not edge.local else edge


def half_up(size: int) -> int:
    return (size + 1) // 2


def butterfly(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, q, r, s = a + b, a - b, c + d, c - d
    return (p + r) * 0.5, (p - r) * 0.5, (q + s) * 0.5, (q - s) * 0.5


def extend(x: Tensor, dim: int, mode: str) -> Tensor:
    """Appends the missing sample along ``dim`` where its size is odd."""
    n = x.shape[dim]
    if n % 2 == 0:
        return x
    return torch.cat([x, virtual_sample(x, dim, mode)], dim)


def virtual_sample(x: Tensor, dim: int, mode: str) -> Tensor:
    """The slice past the end of ``x`` along ``dim``, shaped like its last slice."""
    n = x.shape[dim]
    edge = edge_of(mode, n)
    missing = torch.zeros_like(x.narrow(dim, n - 1, 1))
    for weight, index in zip(edge, (n - 1, n - 2, 0), strict=True):
        if weight:
            missing = missing + weight * x.narrow(dim, index, 1)
    return missing


def fold(x: Tensor, dim: int, size: int, mode: str) -> Tensor:
    """Adjoint of :func:`extend`: takes ``size + 1`` samples back to an odd ``size``."""
    if x.shape[dim] == size:
        return x
    out, missing = x.narrow(dim, 0, size), x.narrow(dim, size, 1)
    edge = edge_of(mode, size)
    if any(edge):
        out = out.clone()
        for weight, index in zip(edge, (size - 1, size - 2, 0), strict=True):
            if weight:
                out.narrow(dim, index, 1).add_(missing, alpha=weight)
    return out


def analyse_level(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    if isinstance(x, fx.Proxy):
        return fx.call_function(analyse_level, x, mode)
    x = extend(extend(x, -1, mode), -2, mode)
    ll, lh, hl, hh = butterfly(x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2])
    return ll, torch.stack((lh, hl, hh), 2)


def synthesise_level(ll: Tensor, high: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    a, b, c, d = butterfly(ll, *high.unbind(2))
    rows = torch.stack((torch.stack((a, b), -1).flatten(-2), torch.stack((c, d), -1).flatten(-2)), -2)
    return fold(fold(rows.flatten(-3, -2), -2, size[0], mode), -1, size[1], mode)


def analysis(x: Tensor, levels: int = 1, mode: str = "zero") -> tuple[Tensor, list[Tensor]]:
    """``x`` (N, C, H, W) -> LL (N, C, h_L, w_L) and the bands of each level, finest first, (N, C, 3, h_l, w_l)."""
    ll = x.to(accumulate_dtype(x.dtype))
    highs = []
    for _ in range(levels):
        ll, high = analyse_level(ll, mode)
        highs.append(high.to(x.dtype))
    return ll.to(x.dtype), highs


def synthesis(
    ll: Tensor,
    highs: Sequence[Tensor],
    size: tuple[int, int] | None = None,
    mode: str = "zero",
    add: Tensor | None = None,
) -> Tensor:
    """Adjoint of :func:`analysis` (and its inverse in mode ``"zero"``), plus ``add`` where given."""
    out = ll.to(accumulate_dtype(ll.dtype))
    sizes = [size or (2 * highs[0].shape[-2], 2 * highs[0].shape[-1])]
    sizes += [(high.shape[-2], high.shape[-1]) for high in highs[:-1]]
    for high, target in zip(reversed(highs), reversed(sizes), strict=True):
        out = synthesise_level(out, high.to(out.dtype), target, mode)
    if add is not None:
        out = out + add
    return out.to(ll.dtype)


def haar_pyramid(r: Tensor, levels: int) -> list[Tensor]:
    """r (N, C, H, W) -> Z_l (N, 4C, H/2^l, W/2^l) for l = 1 … levels: LL_l, then LH, HL, HH of each channel."""
    ll = r.to(accumulate_dtype(r.dtype))
    out = []
    for _ in range(levels):
        ll, high = analyse_level(ll, "zero")
        out.append(torch.cat((ll, high.flatten(1, 2)), 1).to(r.dtype))
    return out


def haar_pyramid_backward(grads: list[Tensor]) -> Tensor:
    """Adjoint of :func:`haar_pyramid`."""
    dtype = accumulate_dtype(grads[0].dtype)
    c = grads[0].shape[1] // 4
    ll: Tensor | None = None
    for grad in reversed(grads):
        low, high = grad[:, :c].to(dtype), grad[:, c:].to(dtype).unflatten(1, (c, 3))
        low = low if ll is None else low + ll
        ll = synthesise_level(low, high, (2 * low.shape[-2], 2 * low.shape[-1]), "zero")
    assert ll is not None
    return ll.to(grads[0].dtype)
