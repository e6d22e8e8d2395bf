"""``pointwise_mlp``: conv1x1 -> GELU -> Dropout -> conv1x1 whose hidden layer never stays in memory.

Backward makes the hidden layer again from the inputs, and its dropout mask from the counter (Philox), so neither
is saved. The same kernel is the Waveblock's feed-forward part and Wave-MLP's channel MLP.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wavemix_kernels import _native, backends, checks, fx
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import chips, layout, selftest
from wavemix_kernels.ops.common.autograd import differentiable, recorded
from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.common.products import matrix
from wavemix_kernels.ops.haar.tiles import MOST_COLUMNS
from wavemix_kernels.ops.mlp import reference

_ARGUMENTS = (
    "Tensor x, Tensor? second, Tensor? scale, Tensor? shift, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "float p, Tensor? seed"
)
_library = Library()
_library.define(f"pointwise_mlp({_ARGUMENTS}, str backend) -> Tensor")
_library.define(f"pointwise_mlp_backward(Tensor grad, {_ARGUMENTS}, bool want_output, str backend) -> Tensor[]")


class Gradients(NamedTuple):
    """Results of the backward pass; ``second`` is the gradient of ``second * scale + shift``. Absent ones are None."""

    x: Tensor
    second: Tensor | None
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    output: Tensor | None


def draw_seed(device: torch.device, count: int = 1) -> Tensor:
    """Seeds for counter-based dropout from torch's own generator of ``device``: they follow ``torch.manual_seed``,
    activation checkpointing restores them, and a CUDA graph draws new ones at each replay."""
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device)


def pointwise_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    second: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``conv1x1(Dropout(GELU(conv1x1([x | second * scale + shift]))))``, GELU in its exact (erf) form.

    Under autocast x, second and the weights take the autocast dtype, as a convolution's do.

    Args:
        x: (N, A, H, W), float64, float32, float16 or bfloat16. channels_last is read in place; any other order is
            converted once.
        w1: (K, A + B), first weight; b1: (K) or None.
        w2: (O, K), second weight; b2: (O) or None.
        second: (N, B, H, W), joined to x's channels without a concatenation, or None.
        scale, shift: (B), an affine map applied to ``second`` as it is read (a folded BatchNorm), or None.
        dropout: probability of dropping a hidden activation; 0 for inference.
        seed: (1) int64 on x's device; default: drawn from torch's generator there.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        (N, O, H, W), channels_last.

    Raises:
        TypeError, ValueError: types, shapes, dtypes or devices that do not belong together; a call that the backend
            asked for cannot serve.
        RuntimeError: the backend asked for is not installed.

    Backward is not differentiable again, except on backend ``"reference"``.

    Source: WaveMix (arXiv:2205.14375), a feed-forward part; Wave-MLP (arXiv:2111.12294), the channel MLP.
    """
    if isinstance(x, fx.Proxy):
        given = {"second": second, "scale": scale, "shift": shift, "dropout": dropout, "seed": seed}
        return fx.call_function(pointwise_mlp, x, w1, b1, w2, b2, **given, backend=backends.requested(backend))
    checks.check_tensor("x", x, 4, "(N, A, H, W)")
    checks.check_probability("dropout", dropout)
    x, second, w1, b1, w2, b2 = checks.autocast(x, second, w1, b1, w2, b2)
    b = 0
    if second is not None:
        checks.check_tensor("second", second, 4, "(N, B, H, W)")
        b = second.shape[1]
        if second.shape[0] != x.shape[0] or second.shape[2:] != x.shape[2:]:
            raise ValueError(f"second: expected (N, B, H, W) to go with x {tuple(x.shape)}, got {tuple(second.shape)}")
    elif scale is not None or shift is not None:
        raise ValueError("scale and shift belong to second, which is None")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift: give both or neither")
    shapes = {
        "w1": (w1, (w1.shape[0], x.shape[1] + b)),
        "b1": (b1, (w1.shape[0],)),
        "w2": (w2, (w2.shape[0], w1.shape[0])),
        "b2": (b2, (w2.shape[0],)),
        "scale": (scale, (b,)),
        "shift": (shift, (b,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: expected shape {shape} to go with the other arguments, got {tuple(tensor.shape)}"
            )
        checks.check_same_device(name, tensor, "x", x)
        if name not in ("scale", "shift"):
            checks.check_same_dtype(name, tensor, "x", x)
    if dropout > 0 and seed is None:
        seed = draw_seed(x.device)
    chosen = backends.requested(backend)
    if chosen == "reference":
        number = 0 if seed is None or dropout == 0 else int(seed)
        return reference.pointwise_mlp(
            x, w1, b1, w2, b2, second=second, scale=scale, shift=shift, p=dropout, seed=number
        )
    return fused(x, second, scale, shift, w1, b1, w2, b2, dropout, seed, chosen)


# --- CPU -------------------------------------------------------------------------------------------------


def _empty_image(like: Tensor, channels: int) -> Tensor:
    n, _, h, w = like.shape
    return layout.empty(like, [n, channels, h, w], True)


def _seed_value(p: float, seed: Tensor | None) -> int:
    return 0 if p == 0 or seed is None else int(seed) % 2**64


def _rows(rows: Tensor | None) -> tuple[int, int]:
    return (0, 0) if rows is None else (rows.data_ptr(), rows.stride(0))


def _cpu_arguments(
    x: Tensor, second: Tensor | None, scale: Tensor | None, shift: Tensor | None, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, p: float, seed: Tensor | None,
) -> tuple[list[Any], list[Tensor | None]]:  # fmt: skip
    """Arguments that both passes take, and the tensors that must outlive the call."""
    wide = accumulate_dtype(x.dtype)
    matrices = [None if t is None else rows_of(t) for t in (x, second)]
    affine = [None if t is None else t.to(wide).contiguous() for t in (scale, shift)]
    weights = [None if t is None else t.contiguous() for t in (w1, b1, w2, b2)]
    kept = [*matrices, *affine, *weights]
    (k, total), a = w1.shape, x.shape[1]
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    pointers = [0 if t is None else t.data_ptr() for t in kept[2:]]
    size = (rows, a, total - a, k, w2.shape[0])
    return [_native.DTYPES[x.dtype], size, *map(_rows, matrices), pointers, p, _seed_value(p, seed), 0], kept


def rows_of(image: Tensor) -> Tensor:
    """Pixels by channels, channels contiguous."""
    rows = matrix(image)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _cpu_forward(x: Tensor, *rest: Any) -> Tensor:
    core: Any = _native.core
    arguments, _kept = _cpu_arguments(x, *rest)
    out = _empty_image(x, arguments[1][4])
    core.mlp_forward_cpu(*arguments, _rows(matrix(out)), torch.get_num_threads())
    return out


def _cpu_backward(
    grad: Tensor, x: Tensor, second: Tensor | None, scale: Tensor | None, shift: Tensor | None, w1: Tensor,
    b1: Tensor | None, w2: Tensor, b2: Tensor | None, p: float, seed: Tensor | None, want_output: bool,
) -> Gradients:  # fmt: skip
    core: Any = _native.core
    arguments, _kept = _cpu_arguments(x, second, scale, shift, w1, b1, w2, b2, p, seed)
    g = rows_of(grad)
    d_x = _empty_image(x, x.shape[1])
    d_second = None if second is None else _empty_image(x, second.shape[1])
    output = _empty_image(x, w2.shape[0]) if want_output else None
    weights = [None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in (w1, b1, w2, b2)]
    core.mlp_backward_cpu(
        *arguments, _rows(g), *(_rows(None if t is None else matrix(t)) for t in (d_x, d_second, output)),
        [0 if t is None else t.data_ptr() for t in weights], torch.get_num_threads(),
    )  # fmt: skip
    return Gradients(*cast(Any, (d_x, d_second, *weights, output)))


def triton_why_not(*tensors: Tensor) -> str | None:
    if (reason := backends.triton_products_why_not(*tensors)) is not None:
        return reason
    wide = next((t.shape[1] for t in tensors if t.shape[1] > MOST_COLUMNS), None)
    return None if wide is None else f"it takes up to {MOST_COLUMNS} input and output channels, got {wide}"


def triton_mlp(
    x: Tensor, second: Tensor | None, scale: Tensor | None, shift: Tensor | None, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, p: float, seed: Tensor | None,
) -> Any:  # fmt: skip
    from wavemix_kernels.ops.mlp import triton as kernels

    scale, shift = (None if t is None else t.float().contiguous() for t in (scale, shift))
    b1, b2 = (None if t is None else t.contiguous() for t in (b1, b2))
    second = None if second is None else rows_of(second)
    return kernels.Mlp(rows_of(x), second, scale, shift, w1.contiguous(), b1, w2.contiguous(), b2, p, seed)


def _triton_forward(x: Tensor, *arguments: Any) -> Tensor:
    from wavemix_kernels.ops.mlp import triton_forms as forms

    mlp = triton_mlp(x, *arguments)
    out = _empty_image(x, mlp.w2.shape[0])
    forms.forward(matrix(out), mlp)
    return out


def _triton_backward(grad: Tensor, x: Tensor, *rest: Any) -> Gradients:
    from wavemix_kernels.ops.mlp import triton_forms as forms

    *arguments, want_output = rest
    mlp, second = triton_mlp(x, *arguments), arguments[0]
    a, b = x.shape[1], 0 if second is None else second.shape[1]
    joins = _joins(x, second, mlp.w1, mlp.w2, "triton")
    gx = _empty_image(x, a + b if joins else a)
    gs = None if second is None or joins else _empty_image(x, b)
    output = _empty_image(x, mlp.w2.shape[0]) if want_output else None
    weights = [None if t is None else torch.empty_like(t) for t in (mlp.w1, mlp.b1, mlp.w2, mlp.b2)]
    of_second, again = (None if t is None else matrix(t) for t in (gs, output))
    forms.backward(forms.Results(*cast(Any, (matrix(gx), of_second, *weights, again))), rows_of(grad), mlp)
    return Gradients(*cast(Any, (gx, gs, *weights, output)))


BACKENDS: dict[str, backends.Backend] = {
    "triton": backends.Backend(triton_why_not, {"forward": _triton_forward, "backward": _triton_backward}),
    "cpu": backends.Backend(backends.cpu_why_not, {"forward": _cpu_forward, "backward": _cpu_backward}),
    "reference": backends.Backend(backends.reference_why_not, {}),
}


# --- The operators ---------------------------------------------------------------------------------------


def _forward(
    x: Tensor, second: Tensor | None, scale: Tensor | None, shift: Tensor | None, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, p: float, seed: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    chosen = choose.select("pointwise_mlp", BACKENDS, backend, x, w1, w2.t())
    if not chosen.functions:
        return layout.laid_out(_standard(x, second, scale, shift, w1, b1, w2, b2, p, seed, backend), True)
    return chosen.functions["forward"](x, second, scale, shift, w1, b1, w2, b2, p, seed)


def _reference_backward(grad: Tensor, *arguments: Any) -> Gradients:
    x, second, scale, shift, w1, b1, w2, b2, p, seed, want_output = arguments
    if second is not None and scale is not None:
        second = (second * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
    inputs = [x, second, w1, b1, w2, b2]
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    lx, ls, lw1, lb1, lw2, lb2 = cast(Any, leaves)
    with recorded():
        number = 0 if seed is None or p == 0 else int(seed)
        out = reference.pointwise_mlp(lx, lw1, lb1, lw2, lb2, second=ls, p=p, seed=number)
        grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad))
    gx, gs, *weights = (None if t is None else next(grads) for t in leaves)
    images = (None if t is None else layout.laid_out(t, True) for t in (gx, gs, out.detach() if want_output else None))
    gx, gs, output = images
    return Gradients(*cast(Any, (gx, gs, *weights, output)))


def _joins(x: Tensor, second: Tensor | None, w1: Tensor, w2: Tensor, backend: str) -> bool:
    """Whether an operator gives the gradients of x and of the second input as one image, side by side, and none for
    the latter: one product of the library makes both then, and reads the hidden layer's gradient once."""
    if second is None or x.dtype.itemsize != 2 or not (x.is_cuda or backend == "triton"):
        return False
    return choose.pointwise_mlp(x.dtype, w1.shape[1], w2.shape[0], True, chips.little_shared(x.device)) != "fused"


def _backward_op(grad: Tensor, *arguments: Any) -> list[Tensor]:
    *inputs, want_output, backend = arguments
    chosen = choose.select("pointwise_mlp_backward", BACKENDS, backend, grad, inputs[4], inputs[0])
    function = chosen.functions["backward"] if chosen.functions else _reference_backward
    gx, gs, *out = function(grad, *inputs, want_output)
    x, second, w1, w2 = (inputs[i] for i in (0, 1, 4, 6))
    joins = _joins(x, second, w1, w2, backend)
    if joins and gs is not None:  # not Triton's
        gx, gs = layout.laid_out(torch.cat((gx, gs), 1), True), None
    elif second is not None and not joins and gs is None:
        gx, gs = (layout.laid_out(part, True) for part in gx.split((x.shape[1], second.shape[1]), 1))
    return [grad.new_empty(0) if t is None else t for t in (gx, gs, *out)]


def _forward_fake(x: Tensor, *rest: Any) -> Tensor:
    return _empty_image(x, rest[5].shape[0])


def _backward_fake(grad: Tensor, *arguments: Any) -> list[Tensor]:
    x, second, _, _, w1, b1, w2, b2, _, _, want_output, backend = arguments
    if _joins(x, second, w1, w2, backend):
        images = [_empty_image(x, w1.shape[1]), None]
    else:
        images = [_empty_image(x, x.shape[1]), None if second is None else _empty_image(x, second.shape[1])]
    weights = [None if t is None else torch.empty_like(t) for t in (w1, b1, w2, b2)]
    out = [*images, *weights, _empty_image(x, w2.shape[0]) if want_output else None]
    return [grad.new_empty(0) if t is None else t for t in out]


_library.impl("pointwise_mlp", _forward, "CompositeExplicitAutograd")
_library.impl("pointwise_mlp_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::pointwise_mlp", _forward_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::pointwise_mlp_backward", _backward_fake, lib=_library)


def backward(grad: Tensor, *arguments: Any) -> Gradients:
    """All gradients of :data:`fused` (its arguments after ``grad``, then ``want_output``, ``backend``), and the
    output itself made again where ``want_output`` is set (a convolution's weight gradient wants it)."""
    x, second, _, _, w1, b1, w2, b2, _, _, want_output, _ = arguments
    out = torch.ops.wavemix_kernels.pointwise_mlp_backward(grad, *arguments)
    if second is not None and out[0].shape[1] > x.shape[1]:
        out = [*out[0].split((x.shape[1], second.shape[1]), 1), *out[2:]]
    present = (x, second, w1, b1, w2, b2, x if want_output else None)
    return Gradients(*cast(Any, (None if p is None else t for t, p in zip(out, present, strict=True))))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.p, seed, ctx.backend = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *tensors, seed = ctx.saved_tensors
    second, scale = tensors[1], tensors[2]
    out = backward(grad, *tensors, ctx.p, seed, False, ctx.backend)
    gs, dscale, dshift = out.second, None, None
    if gs is not None and scale is not None:
        wide = gs.to(scale.dtype)
        dscale, dshift = (wide * second).sum((0, 2, 3)), wide.sum((0, 2, 3))
        gs = (wide * scale[:, None, None]).to(second.dtype)
    return out.x, gs, dscale, dshift, out.w1, out.b1, out.w2, out.b2, None, None, None


def _standard(
    x: Tensor, second: Tensor | None, scale: Tensor | None, shift: Tensor | None, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, p: float, seed: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    number = 0 if seed is None or p == 0 else int(seed)
    return reference.pointwise_mlp(x, w1, b1, w2, b2, second=second, scale=scale, shift=shift, p=p, seed=number)


#: (x, second, scale, shift, w1, b1, w2, b2, p, seed, backend) -> output, with its gradient.
fused = differentiable(_library, "pointwise_mlp", _setup, _backward, standard=_standard, once=True)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Two inputs, dropout and all gradients; half types as wide, too, as each form on a GPU wants: (error, bound)."""
    seed, errors, p = 12345, [], selftest.pattern

    def run(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *rest: Tensor) -> list[Tensor]:
        second, scale, shift = rest
        key = torch.tensor([seed], device=x.device)
        return [
            pointwise_mlp(
                x, w1, b1, w2, b2, second=second, scale=scale, shift=shift, dropout=0.25, seed=key, backend=backend
            )
        ]

    def exact(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *rest: Tensor) -> list[Tensor]:
        second, scale, shift = rest
        return [reference.pointwise_mlp(x, w1, b1, w2, b2, second=second, scale=scale, shift=shift, p=0.25, seed=seed)]

    widths = (8, 40, choose.MLP_WEIGHTS_HELD, choose.MLP_HELD) if dtype.itemsize == 2 else (8,)
    for a in widths:
        tensors = [p(2, a, 6, 10), p(24, a + 4), p(24), p(8, 24), p(8), p(2, 4, 6, 10), p(4), p(4)]
        errors.append(selftest.against_reference(run, exact, tensors, device, dtype))
    return selftest.largest(*errors), selftest.rounding_bound(max(2 * 6 * 10, widths[-1]) + 24, dtype)
