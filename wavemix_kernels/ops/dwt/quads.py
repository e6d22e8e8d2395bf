"""Complex coefficients of six orientations from the quads of three real bands, and back.

A quad is 2 x 2 real coefficients a b / c d of a band. Its two complex numbers are ((a - d) + i (b + c)) / sqrt(2) and
((a + d) + i (b - c)) / sqrt(2): an orthonormal map, so its transpose is its inverse. Band LH gives the orientations 15
and 165 degrees, HL 75 and 105, HH 45 and 135 (Selesnick, Baraniuk and Kingsbury, The Dual-Tree Complex Wavelet
Transform, 2005: the transform of images).

Level 1 has its quads in one image of bands. At the other levels each of the four belongs to one pair of trees along H
and W, whose bands are a tensor of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.common.transforms import standard_wanted
from wavemix_kernels.ops.haar.op import inlined

_library = Library()
_library.define("quads_to_complex(Tensor[] bands, int o_dim, int ri_dim, str backend) -> (Tensor, Tensor)")
_library.define("quads_from_complex(Tensor low, Tensor z, int o_dim, int ri_dim, bool trees, str backend) -> Tensor[]")

_ROOT_HALF = math.sqrt(0.5)
#: Where the two complex numbers of bands LH, HL, HH go among 15, 45, 75, 105, 135, 165 degrees.
ORIENTATIONS = ((0, 5), (2, 3), (1, 4))


def to_complex(
    bands: Sequence[Tensor], o_dim: int, ri_dim: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Low-pass and complex coefficients of the bands LL, LH, HL, HH of one level.

    Args:
        bands: one (N, C, 4, 2h, 2w), or the four (N, C, 4, h, w) of trees (a, a), (a, b), (b, a), (b, b) along H and W;
            of one dtype, float64, float32, float16 or bfloat16, any strides.
        o_dim, ri_dim: axes of the six orientations and of real and imaginary part, of six.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        (N, C, 2h, 2w), and (N, C, 6, h, w, 2) with its axes where they belong, contiguous.

    Raises:
        ValueError, RuntimeError: a backend that cannot serve, or is not installed.
    """
    name = _chosen(backend, *bands)
    low, z = (gathered if name is None else _to)(list(bands), o_dim % 6, ri_dim % 6, name)
    return low, z


def from_complex(
    low: Tensor, z: Tensor, o_dim: int, ri_dim: int, trees: bool, *, backend: str | None = None
) -> tuple[Tensor, ...]:
    """The bands of :func:`to_complex`: four tensors where `trees`, else one. Raises as it."""
    name = _chosen(backend, low, z)
    return tuple((scattered if name is None else _from)(low, z.to(low.dtype), o_dim % 6, ri_dim % 6, trees, name))


def _chosen(backend: str | None, *tensors: Tensor) -> str | None:
    """The backend of a call, or None where standard operators are wanted."""
    asked = backends.requested(backend)
    if inlined(asked) or standard_wanted() is not None:
        return None
    return choose.pick("quads", BACKENDS, asked, *tensors)


def interleaved(corners: Sequence[Tensor]) -> Tensor:
    """(..., 2h, 2w) of its corners a, b, c, d."""
    a, b, c, d = corners
    upper, lower = torch.stack((a, b), -1).flatten(-2), torch.stack((c, d), -1).flatten(-2)
    return torch.stack((upper, lower), -2).flatten(-3, -2)


# --- Backends: on allocated tensors ----------------------------------------------------------------------
#
# corners: (N, C, 4, h, w), of each place in a quad, or pair of trees. z: (N, C, 6, h, w, 2), its axes in this order.


def _library_to(corners: Sequence[Tensor], low: Tensor, z: Tensor, trees: bool) -> None:
    for to, corner in zip(_quads(low), corners, strict=True):
        to.copy_(corner[:, :, 0])
    for band, places in enumerate(ORIENTATIONS, 1):
        a, b, c, d = _of_band(corners, band, trees)
        one, other = (z[:, :, place] for place in places)
        torch.sub(a, d, out=one[..., 0])
        torch.add(b, c, out=one[..., 1])
        torch.add(a, d, out=other[..., 0])
        torch.sub(b, c, out=other[..., 1])
    z.mul_(_ROOT_HALF)


def _library_from(corners: Sequence[Tensor], low: Tensor, z: Tensor, trees: bool) -> None:
    for quad, corner in zip(_quads(low), corners, strict=True):
        corner[:, :, 0].copy_(quad)
    for band, places in enumerate(ORIENTATIONS, 1):
        (one_r, one_i), (other_r, other_i) = (z[:, :, place].unbind(-1) for place in places)
        a, b, c, d = _of_band(corners, band, trees)
        torch.add(one_r, other_r, out=a).mul_(_ROOT_HALF)
        torch.add(one_i, other_i, out=b).mul_(_ROOT_HALF)
        torch.sub(one_i, other_i, out=c).mul_(_ROOT_HALF)
        torch.sub(other_r, one_r, out=d).mul_(_ROOT_HALF)


def _compiled(direction: str) -> Any:
    def run(corners: Sequence[Tensor], low: Tensor, z: Tensor, trees: bool) -> None:
        n, c, _, h, w = corners[0].shape
        getattr(_native.core, f"quads_{direction}_complex_cpu")(
            _native.DTYPES[low.dtype], [n, c, h, w], trees, [_native.address(corner) for corner in corners],
            _native.address(low), _native.address(z), torch.get_num_threads(),
        )  # fmt: skip

    return run


def _triton(back: bool) -> Any:
    def run(*args: Any) -> None:
        from wavemix_kernels.ops.dwt.triton_quads import run as launch

        launch(back, *args)

    return run


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(backends.triton_why_not, {"to": _triton(False), "from": _triton(True)}),
    "cpu": backends.Backend(backends.cpu_why_not, {"to": _compiled("to"), "from": _compiled("from")}),
    "reference": backends.Backend(backends.reference_why_not, {"to": _library_to, "from": _library_from}),
}


# --- The operators ---------------------------------------------------------------------------------------


def _to_op(bands: list[Tensor], o_dim: int, ri_dim: int, backend: str) -> tuple[Tensor, Tensor]:
    runs = choose.select("quads", BACKENDS, backend, *bands).functions["to"]
    low, z = _to_fake(bands, o_dim, ri_dim, backend)
    runs(_corners(bands), low, z.movedim((o_dim, ri_dim), (2, 5)), len(bands) == 4)
    return low, z


def _to_fake(bands: list[Tensor], o_dim: int, ri_dim: int, backend: str) -> tuple[Tensor, Tensor]:
    n, c, _, h, w = bands[0].shape
    h, w = (h, w) if len(bands) == 4 else (h // 2, w // 2)
    shape = [n, c, h, w]
    for dim, size in sorted(((o_dim, 6), (ri_dim, 2))):
        shape.insert(dim, size)
    return bands[0].new_empty((n, c, 2 * h, 2 * w)), bands[0].new_empty(shape)


def _from_op(low: Tensor, z: Tensor, o_dim: int, ri_dim: int, trees: bool, backend: str) -> list[Tensor]:
    runs = choose.select("quads", BACKENDS, backend, low, z).functions["from"]
    bands = _from_fake(low, z, o_dim, ri_dim, trees, backend)
    runs(_corners(bands), low, z.movedim((o_dim, ri_dim), (2, 5)), trees)
    return bands


def _from_fake(low: Tensor, z: Tensor, o_dim: int, ri_dim: int, trees: bool, backend: str) -> list[Tensor]:
    n, c, h, w = low.shape
    shape = (n, c, 4, h // 2, w // 2) if trees else (n, c, 4, h, w)
    return [low.new_empty(shape) for _ in range(4 if trees else 1)]


_library.impl("quads_to_complex", _to_op, "CompositeExplicitAutograd")
_library.impl("quads_from_complex", _from_op, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::quads_to_complex", _to_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::quads_from_complex", _from_fake, lib=_library)


def _to_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    bands, *ctx.rest = inputs
    ctx.trees = len(bands) == 4


def _to_backward(ctx: Any, d_low: Tensor, d_z: Tensor) -> tuple[Any, ...]:
    o_dim, ri_dim, backend = ctx.rest
    return _from(d_low, d_z, o_dim, ri_dim, ctx.trees, backend), None, None, None


def _from_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, ctx.o_dim, ctx.ri_dim, _, ctx.backend = inputs


def _from_backward(ctx: Any, *d_bands: Tensor) -> tuple[Any, ...]:
    return *_to(list(d_bands), ctx.o_dim, ctx.ri_dim, ctx.backend), None, None, None, None


def gathered(bands: Sequence[Tensor], o_dim: int, ri_dim: int, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """:func:`to_complex` by operators of torch that every transform knows."""
    corners, trees = _corners(bands), len(bands) == 4
    oriented: list[Any] = [None] * 6
    for band, (one, other) in enumerate(ORIENTATIONS, 1):
        a, b, c, d = _of_band(corners, band, trees)
        oriented[one] = torch.stack((a - d, b + c), -1)
        oriented[other] = torch.stack((a + d, b - c), -1)
    z = (torch.stack(oriented, 2) * _ROOT_HALF).movedim((2, 5), (o_dim, ri_dim)).contiguous()
    return interleaved([corner[:, :, 0] for corner in corners]), z


def scattered(low: Tensor, z: Tensor, o_dim: int, ri_dim: int, trees: bool, backend: str | None = None) -> list[Tensor]:
    """:func:`from_complex` by operators of torch that every transform knows."""
    parts = z.movedim((o_dim, ri_dim), (2, 5)) * _ROOT_HALF
    corners = [[quad] for quad in _quads(low)]
    for band, (one, other) in enumerate(ORIENTATIONS, 1):
        (one_r, one_i), (other_r, other_i) = parts[:, :, one].unbind(-1), parts[:, :, other].unbind(-1)
        quads = (one_r + other_r, one_i + other_i, one_i - other_i, other_r - one_r)
        for corner, place in zip(quads, _places(band, trees), strict=True):
            corners[place].append(corner)
    bands = [torch.stack(corner, 2) for corner in corners]
    return bands if trees else [interleaved(bands)]


#: The operators with their gradients: each is the other's.
_to = differentiable(_library, "quads_to_complex", _to_setup, _to_backward, standard=gathered)
_from = differentiable(_library, "quads_from_complex", _from_setup, _from_backward, standard=scattered)


def _quads(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, c, d of each quad of x (..., 2h, 2w)."""
    return x[..., 0::2, 0::2], x[..., 0::2, 1::2], x[..., 1::2, 0::2], x[..., 1::2, 1::2]


def _corners(bands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return _quads(bands[0]) if len(bands) == 1 else tuple(bands)


def _places(band: int, trees: bool) -> tuple[int, int, int, int]:
    """The corners that hold a, b, c, d of a band: a high-pass of the second tree comes first."""
    flip = band if trees else 0  # bit 0: along H, bit 1: along W
    row, column = flip & 1, flip >> 1
    a, b, c, d = (2 * (r ^ row) + (k ^ column) for r in (0, 1) for k in (0, 1))
    return a, b, c, d


def _of_band(corners: Sequence[Tensor], band: int, trees: bool) -> list[Tensor]:
    """a, b, c, d of each quad of a band."""
    return [corners[place][:, :, band] for place in _places(band, trees)]


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Quads of one image and of four pairs of trees, there and back: (error, bound)."""

    def there_and_back(to: Any, back: Any, x: Tensor) -> list[Tensor]:
        out: list[Tensor] = []
        for bands in ([x[..., :8]], [x[..., i : i + 3] for i in (8, 11, 14, 17)]):
            low, z = to(bands, 2, 5)
            out += [low, z, *back(low * 0.5, z, 2, 5, len(bands) == 4)]
        return out

    ours = functools.partial(to_complex, backend=backend), functools.partial(from_complex, backend=backend)
    x = selftest.pattern(2, 3, 4, 6, 20)
    error = selftest.against_reference(
        lambda x: there_and_back(*ours, x), lambda x: there_and_back(gathered, scattered, x), [x], device, dtype
    )
    return error, selftest.rounding_bound(4, dtype)
