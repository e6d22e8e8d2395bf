"""``patm_whole``: PATM in one kernel, from its image to its output and back, with no image in memory in between.

Three operators. ``patm_moments`` makes mean and covariance of the image's channels: batch statistics of any 1x1
convolution of it follow. With those the phases' BatchNorms are affine maps, and ``patm_whole`` takes one image of the
batch after the other through everything, while it lies in a cache. ``patm_whole_backward`` does the same from the image
alone; what comes through batch statistics is linear in the image, and is added at the end. For a GPU see ``whole_gpu``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from wavemix_kernels import _native, backends
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.autograd import recorded
from wavemix_kernels.ops.common.dtypes import accumulate_dtype, cast_together
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.patm import reference, statistics, whole_gpu
from wavemix_kernels.ops.patm.waves import in_pairs
from wavemix_kernels.ops.patm.weights import Affine, Weights


class Image(NamedTuple):
    """The image that PATM reads: ``x * scale + shift``, or x where these are None.

    Attributes:
        x: (N, C, H, W), C even. Contiguous channels are read in place.
        scale, shift: (C), or (N, C) by image.
    """

    x: Tensor
    scale: Tensor | None
    shift: Tensor | None


class Batch(NamedTuple):
    """Statistics that the phases' affine maps came of, so that gradients go through them: mean and inverse deviation
    (2, C) of theta_h and theta_w; mean (C) and covariance (C, C) of the image, in float64."""

    mean: Tensor
    invstd: Tensor
    image_mean: Tensor
    covariance: Tensor


class Gradients(NamedTuple):
    """Gradients of the image and the weights, each in the dtype and shape of what it belongs to.

    Attributes:
        weights: by the names of :class:`Weights`, missing biases included; those of the thetas follow from ``sums``.
        sums: (2, 2, C), for theta_h and theta_w the sums of d and of ``d (theta - mean)``, with d the gradient of the
            phase before ReLU and mean 0 without batch statistics: the gradients of shift and scale.
    """

    image: Tensor
    weights: dict[str, Tensor]
    sums: Tensor


#: Weights whose gradients the operator returns, in its order.
_WITH_GRADIENT = tuple(name for name in Weights._fields if name not in ("theta_h_bias", "theta_w_bias"))


def _schema(fields: Any) -> str:
    """A NamedTuple's fields as an operator's arguments."""
    hints = get_type_hints(fields)
    return ", ".join(f"{'Tensor' if kind is Tensor else 'Tensor?'} {field}" for field, kind in hints.items())


_WEIGHTS, _IMAGE = f"{_schema(Weights)}, {_schema(Affine)}", _schema(Image)
_library = Library()
_library.define(f"patm_moments({_IMAGE}, str backend) -> (Tensor, Tensor)")
_library.define(
    "patm_statistics(Tensor mean, Tensor covariance, "
    + "".join(f"Tensor theta_{b}, Tensor? theta_{b}_bias, Tensor? weight_{b}, Tensor? bias_{b}, " for b in "hw")
    + "float eps_h, float eps_w, str backend) -> Tensor"
)
_library.define(
    f"patm_whole({_IMAGE}, Tensor? path, bool residual, bool channels_last, {_WEIGHTS}, str backend)"
    " -> (Tensor, Tensor)"
)
_library.define(
    f"patm_whole_backward(Tensor grad, Tensor branch_mean, Tensor? mean, Tensor? invstd, Tensor? image_mean, "
    f"Tensor? covariance, {_IMAGE}, Tensor? path, bool channels_last, {_WEIGHTS}, str backend) -> Tensor[]"
)


# --- CPU -------------------------------------------------------------------------------------------------

#: The core takes addresses in this order. Names are checked here, so that no call has to.
_FIELDS = (*Weights._fields, *Affine._fields)
if _native.core is not None and (taken := getattr(_native.core, "PATM_WEIGHTS", None)) != _FIELDS:
    raise ImportError(
        f"the compiled core belongs to other sources: it takes PATM's {taken}, not {_FIELDS}; build it anew"
    )


class _CpuArguments:
    """Arguments as the core takes them; holds what must outlive the call."""

    def __init__(self, image: Image, *rest: Tensor | None) -> None:
        x = layout.channels_inner(image.x)
        self.wide = accumulate_dtype(x.dtype)
        affine = [None if t is None else t.to(self.wide).contiguous() for t in image[1:]]
        weights = [None if t is None else t.to(self.wide).contiguous() for t in rest]
        by_image = affine[0] is not None and affine[0].dim() == 2
        self._kept = x, affine, weights
        self.image = _native.DTYPES[x.dtype], x.shape, _native.address(x), *map(_pointer, affine), by_image
        self.rest = [*map(_pointer, weights)]


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _cpu_moments(image: Image) -> tuple[Tensor, Tensor]:
    core: Any = _native.core
    mean, covariance = _moments_fake(image)
    given = _CpuArguments(image)
    core.patm_moments_cpu(given.image, mean.data_ptr(), covariance.data_ptr(), torch.get_num_threads())
    return mean, covariance


def _cpu_forward(
    image: Image, path: Tensor | None, residual: bool, w: Weights, maps: Affine, _: bool
) -> tuple[Tensor, Tensor]:
    core: Any = _native.core
    out, branch_mean = _forward_fake(image, True)
    given = _CpuArguments(image, path, *w, *maps)
    path_at, *weights = given.rest
    core.patm_forward_cpu(
        given.image, weights, w.fc1.shape[0], residual, path_at, _native.address(out), branch_mean.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out, branch_mean


def _cpu_backward(
    grad: Tensor, branch_mean: Tensor, center: Tensor | None, image: Image, path: Tensor | None, w: Weights,
    maps: Affine,
) -> Gradients:  # fmt: skip
    core: Any = _native.core
    grad = layout.channels_inner(grad)
    given = _CpuArguments(image, path, branch_mean, center, *w, *maps)
    # Between two passes over it the image's gradient is in the accumulation dtype.
    between = image.x.dtype if center is None else given.wide
    d_image = layout.empty(branch_mean.new_empty(0, dtype=between), image.x.shape, True)
    *made, sums = (branch_mean.new_empty(shape, dtype=given.wide) for shape in _gradient_shapes(w))
    out = Gradients(d_image, dict(zip(_WITH_GRADIENT, made, strict=True)), sums)
    (shift_h, scale_h), (shift_w, scale_w) = sums
    to = {**out.weights, "scale_h": scale_h, "shift_h": shift_h, "scale_w": scale_w, "shift_w": shift_w}
    path_at, mean_at, center_at, *weights = given.rest
    core.patm_backward_cpu(
        given.image, weights, w.fc1.shape[0], path_at, _native.address(grad), mean_at, center_at,
        _native.address(d_image), between == given.wide, [_pointer(to.get(name)) for name in _FIELDS],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _through_statistics(
    out: Gradients, image: Image, w: Weights, maps: Affine, batch: Batch
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Adds to the thetas' gradients; returns what the image's lacks: ``matrix image + vector``."""
    count = image.x.shape[0] * image.x.shape[2] * image.x.shape[3]
    d_theta, line = statistics.through_moments(out.sums, count, w, maps, *batch[1:])
    for name, more in zip(("theta_h", "theta_w"), d_theta, strict=True):
        out.weights[name].add_(more.reshape(out.weights[name].shape))
    return line


def _cpu_finish(out: Gradients, image: Image, w: Weights, maps: Affine, batch: Batch | None, _: bool) -> Gradients:
    if batch is None:
        return out
    core: Any = _native.core
    partial, (matrix, vector) = out.image, _through_statistics(out, image, w, maps, batch)
    given = _CpuArguments(image, matrix, vector)
    d_image = partial if partial.dtype == image.x.dtype else layout.empty(image.x, image.x.shape, True)
    core.patm_add_linear_cpu(
        given.image, _native.address(partial), *given.rest, _native.address(d_image), torch.get_num_threads()
    )
    return out._replace(image=d_image)


# --- CUDA ------------------------------------------------------------------------------------------------


def _cuda_backward(*arguments: Any) -> Gradients:
    return Gradients(*whole_gpu.backward(*arguments))


def _cuda_finish(
    out: Gradients, image: Image, w: Weights, maps: Affine, batch: Batch | None, channels_last: bool
) -> Gradients:
    through = None if batch is None or image.x.numel() == 0 else (out.sums, *batch[1:])
    d_image, of_projections = whole_gpu.finish(out.image, image, w, maps, through, channels_last)
    weights = {**out.weights, **of_projections}
    shapes = dict(zip(_WITH_GRADIENT, _gradient_shapes(w), strict=False))
    return Gradients(d_image, {name: weights[name].reshape(shape) for name, shape in shapes.items()}, out.sums)


# --- Reference -------------------------------------------------------------------------------------------


def _read(image: Image) -> Tensor:
    wide = image.x.to(accumulate_dtype(image.x.dtype))
    if image.scale is None or image.shift is None:
        return wide
    return wide * image.scale.to(wide.dtype)[..., None, None] + image.shift.to(wide.dtype)[..., None, None]


def _reference_moments(image: Image) -> tuple[Tensor, Tensor]:
    rows = _read(image).double().permute(0, 2, 3, 1).flatten(0, 2)
    mean = rows.mean(0)
    return mean, (rows - mean).t() @ (rows - mean) / rows.shape[0]


def _reference_forward(
    image: Image, path: Tensor | None, residual: bool, w: Weights, maps: Affine, _: bool
) -> tuple[Tensor, Tensor]:
    out, mean = reference.patm(_read(image), w._asdict() | maps._asdict())
    if residual:
        out = image.x + (out if path is None else out * path.reshape(-1, 1, 1, 1))
    return layout.laid_out(out.to(image.x.dtype), True), mean


def _reference_backward(
    grad: Tensor, branch_mean: Tensor, center: Tensor | None, image: Image, path: Tensor | None, w: Weights,
    maps: Affine,
) -> Gradients:  # fmt: skip
    zero = (read := _read(image)).new_zeros(image.x.shape[1])
    given = {name: zero if t is None else t.to(read.dtype) for name, t in (w._asdict() | maps._asdict()).items()}
    leaves = {name: t.detach().requires_grad_() for name, t in {"read": read, **given}.items()}
    with recorded():
        out, _ = reference.patm(leaves["read"], leaves)
    cotangent = grad.to(read.dtype) if path is None else grad.to(read.dtype) * path.reshape(-1, 1, 1, 1)
    grads = dict(zip(leaves, torch.autograd.grad(out, [*leaves.values()], cotangent), strict=True))
    sums = torch.stack([torch.stack((grads[f"shift_{b}"], grads[f"scale_{b}"])) for b in "hw"])
    if center is not None:
        sums[:, 1] -= center * sums[:, 0]
    else:
        grads["read"] = grads["read"].to(image.x.dtype)
    return Gradients(layout.laid_out(grads["read"], True), {name: grads[name] for name in _WITH_GRADIENT}, sums)


def _reference_finish(
    out: Gradients, image: Image, w: Weights, maps: Affine, batch: Batch | None, _: bool
) -> Gradients:
    if batch is None:
        return out
    matrix, vector = (t.to(out.image.dtype) for t in _through_statistics(out, image, w, maps, batch))
    d_image = out.image + F.conv2d(_read(image), matrix[:, :, None, None], vector)
    return out._replace(image=layout.laid_out(d_image.to(image.x.dtype), True))


BACKENDS: dict[str, backends.Backend] = {
    "cpu": backends.Backend(
        in_pairs(backends.cpu_why_not),
        {
            "moments": _cpu_moments,
            "statistics": statistics.of_moments_standard,
            "forward": _cpu_forward,
            "backward": _cpu_backward,
            "finish": _cpu_finish,
        },
    ),
    "cuda": backends.Backend(
        whole_gpu.why_not,
        {
            "moments": whole_gpu.moments,
            "statistics": whole_gpu.statistics,
            "forward": whole_gpu.forward,
            "backward": _cuda_backward,
            "finish": _cuda_finish,
        },
        torch.float16,
        (1, whole_gpu.CHANNELS[0], 2, 2),
    ),
    "reference": backends.Backend(
        backends.reference_why_not,
        {
            "moments": _reference_moments,
            "statistics": statistics.of_moments_standard,
            "forward": _reference_forward,
            "backward": _reference_backward,
            "finish": _reference_finish,
        },
    ),
}


# --- The operators ---------------------------------------------------------------------------------------

_AFFINE = len(Affine._fields)
_COUNT = len(_FIELDS)


def _moments_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    *image, backend = arguments
    return choose.select("patm_moments", BACKENDS, backend, image[0]).functions["moments"](Image(*image))


def _statistics_op(mean: Tensor, covariance: Tensor, *rest: Any) -> Tensor:
    *phases, eps_h, eps_w, backend = rest
    made = choose.select("patm_statistics", BACKENDS, backend, phases[0]).functions["statistics"]
    return made(mean, covariance, (phases[:4], phases[4:]), (eps_h, eps_w))


def _forward_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, scale, shift, path, residual, channels_last, *weights, backend = arguments
    function = choose.select("patm_whole", BACKENDS, backend, x).functions["forward"]
    w, maps = Weights(*weights[:-_AFFINE]), Affine(*weights[-_AFFINE:])
    out, mean = function(Image(x, scale, shift), path, residual, w, maps, channels_last)
    return (out if channels_last else layout.laid_out(out, False)), mean


def _backward_op(*arguments: Any) -> list[Tensor]:
    grad, branch_mean, *given, x, scale, shift, path, channels_last = arguments[: -_COUNT - 1]
    weights, maps, backend = _weights(arguments), Affine(*arguments[-_AFFINE - 1 : -1]), arguments[-1]
    image = Image(x, scale, shift)
    order = choose.with_kernels("backward", BACKENDS, x.device.type)
    functions = choose.select("patm_whole_backward", BACKENDS, backend, grad, x, order=order).functions
    batch = None if given[0] is None else Batch(*given)
    out: Gradients = functions["backward"](
        grad, branch_mean, None if batch is None else batch.mean, image, path, weights, maps
    )
    out = functions["finish"](out, image, weights, maps, batch, channels_last)
    d_image = out.image if channels_last else layout.laid_out(out.image, False)
    return [d_image, *cast_together([*out.weights.values()], _gradient_dtypes(weights)), out.sums]


def _weights(arguments: tuple[Any, ...]) -> Weights:
    return Weights(*arguments[-_COUNT - 1 : -_AFFINE - 1])


def _gradient_shapes(w: Weights) -> list[tuple[int, ...]]:
    """Shapes of the weights' gradients, a missing bias's too, and of the sums."""
    like = (getattr(w, name) for name in _WITH_GRADIENT)
    channels = w.proj.shape[0]
    return [*((channels,) if t is None else tuple(t.shape) for t in like), (2, 2, channels)]


def _gradient_dtypes(w: Weights) -> list[torch.dtype]:
    like = (getattr(w, name) for name in _WITH_GRADIENT)
    return [(w.proj if t is None else t).dtype for t in like]


def _moments_fake(image: Image) -> tuple[Tensor, Tensor]:
    c = image.x.shape[1]
    return image.x.new_empty(c, dtype=torch.float64), image.x.new_empty((c, c), dtype=torch.float64)


def _statistics_fake(mean: Tensor, covariance: Tensor, theta: Tensor, *_: Any) -> Tensor:
    return theta.new_empty((len(statistics.Statistics._fields), 2, theta.shape[0]), dtype=accumulate_dtype(theta.dtype))


def _forward_fake(image: Image, channels_last: bool) -> tuple[Tensor, Tensor]:
    x = image.x
    return layout.empty(x, x.shape, channels_last), x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))


def _backward_fake(*arguments: Any) -> list[Tensor]:
    x, channels_last, weights = arguments[6], arguments[10], _weights(arguments)
    dtypes = [*_gradient_dtypes(weights), accumulate_dtype(x.dtype)]
    made = [x.new_empty(s, dtype=d) for s, d in zip(_gradient_shapes(weights), dtypes, strict=True)]
    return [layout.empty(x, x.shape, channels_last), *made]


_library.impl("patm_moments", _moments_op, "CompositeExplicitAutograd")
_library.impl("patm_statistics", _statistics_op, "CompositeExplicitAutograd")
_library.impl("patm_whole", _forward_op, "CompositeExplicitAutograd")
_library.impl("patm_whole_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::patm_moments", lambda *a: _moments_fake(Image(*a[:3])), lib=_library)
torch.library.register_fake("wavemix_kernels::patm_statistics", _statistics_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::patm_whole", lambda *a: _forward_fake(Image(*a[:3]), a[5]), lib=_library)
torch.library.register_fake("wavemix_kernels::patm_whole_backward", _backward_fake, lib=_library)


def moments(image: Image, backend: str) -> tuple[Tensor, Tensor]:
    """Mean (C) and biased covariance (C, C) of the image's channels over N, H and W, float64."""
    return torch.ops.wavemix_kernels.patm_moments(*image, backend)


def forward(
    image: Image, path: Tensor | None, residual: bool, weights: Weights, maps: Affine, backend: str,
    channels_last: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PATM of the image, or with ``residual`` ``x + path PATM(image)``, path (N) or None.

    Returns:
        The output, (N, C, H, W) in x's dtype, channels_last or contiguous, and (N, C) the branches' mean over H and W,
        fp32 (fp64 for fp64). No gradient is registered: it is a step of :mod:`wavemix_kernels.ops.patm.op`.
    """
    return torch.ops.wavemix_kernels.patm_whole(*image, path, residual, channels_last, *weights, *maps, backend)


def backward(
    grad: Tensor, branch_mean: Tensor, batch: Batch | None, image: Image, path: Tensor | None, weights: Weights,
    maps: Affine, backend: str, channels_last: bool = True,
) -> Gradients:  # fmt: skip
    """All gradients of :func:`forward`, less what goes around the branch; ``batch`` None: scale and shift are given.
    ``channels_last``: the memory order of the image's."""
    given = batch or (None,) * len(Batch._fields)
    image_, *made, sums = torch.ops.wavemix_kernels.patm_whole_backward(
        grad, branch_mean, *given, *image, path, channels_last, *weights, *maps, backend
    )
    return Gradients(image_, dict(zip(_WITH_GRADIENT, made, strict=True)), sums)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Two images behind an affine map, as a residual branch, with all gradients through statistics: (error,
    bound)."""
    p = selftest.pattern
    c = whole_gpu.CHANNELS[0] if dtype in whole_gpu.DTYPES else 6
    hidden, shape = c // 2, (2, c, 9, 5)
    projection = (c, c, 1, 1), (c,)
    mlp = (hidden, c, 1, 1), (hidden,), (3 * c, hidden, 1, 1), (3 * c,)
    shapes = *projection * 6, (c, 2, 1, 7), (c, 2, 7, 1), *mlp
    phases = (0, 0, 1, 1, 4, 0, 2, 2, 3, 3, 5, 0, 0, 1, 0, 0, 0, 0)

    def run(name: str, where: torch.device, wide: torch.dtype) -> list[Tensor]:
        def to(t: Tensor) -> Tensor:
            return t.to(where, dtype).to(wide)

        image = Image(to(p(*shape)), to(p(2, c) + 2), to(p(2, c, phase=1)))
        # Sums of many channels stay small, or their rounding would turn phases by whole radians.
        share = 8 if c > 6 else 1
        w = Weights(*(to(p(*shape, phase=phase) / share) for shape, phase in zip(shapes, phases, strict=True)))
        w = w._replace(theta_h=w.theta_h / 8, theta_w=w.theta_w / 8)
        # No phase is near the kink of its ReLU, where rounding would switch its gradient on or off.
        sides = 6.0 * (1 - 2 * (torch.arange(c) % 2))
        maps = Affine(
            to(p(c) + 2), to(sides + p(c, phase=1)), to(p(c, phase=1) + 2), to(sides.roll(1) + p(c, phase=2))
        )  # fmt: skip
        mean, covariance = moments(image, name)
        norms = [(theta, bias, to(p(c, phase=3) + 2), to(p(c))) for theta, bias in (w[6:8], w[8:10])]
        of_thetas = torch.ops.wavemix_kernels.patm_statistics(mean, covariance, *norms[0], *norms[1], 1.0, 2.0, name)
        batch = Batch(to(p(2, c)), to(p(2, c) + 2), mean, covariance)
        out, branch_mean = forward(image, to(p(2)), True, w, maps, name)
        grads = backward(to(p(*shape, phase=3)), branch_mean, batch, image, to(p(2)), w, maps, name)
        return [mean, covariance, of_thetas, out, branch_mean, grads.image, *grads.weights.values(), grads.sums]

    got = run(backend, device, dtype)
    want = run("reference", torch.device("cpu"), torch.float64)
    return selftest.largest_error(got, want), selftest.rounding_bound(2 * 9 * 5 + 14 + 5 * c, dtype)
