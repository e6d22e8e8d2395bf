"""``haar_dwt2d`` and ``haar_idwt2d``: the 2-D Haar transform on every backend.

The transform is orthonormal and symmetric, so two operators close under differentiation: the gradient of
``analysis`` is ``synthesis`` (in the same mode: its exact adjoint) and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wavemix_kernels import _native, backends, checks, fx
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import layout, selftest
from wavemix_kernels.ops.common.autograd import differentiable
from wavemix_kernels.ops.common.library import Library
from wavemix_kernels.ops.haar import batching, reference
from wavemix_kernels.ops.haar.tiles import MAX_LEVELS

MODES = tuple(reference.MODES)

_library = Library("DEF")
_library.define("haar_analysis(Tensor x, int levels, str mode, str backend) -> Tensor[]")
_library.define(
    "haar_synthesis(Tensor ll, Tensor[] highs, SymInt[] size, str mode, Tensor? add, bool channels_last, "
    "str backend) -> Tensor"
)


# --- Public functions ------------------------------------------------------------------------------------


def haar_dwt2d(
    x: Tensor, levels: int = 1, *, mode: str = "zero", backend: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Orthonormal 2-D Haar wavelet analysis.

    Per 2x2 block ``a b / c d``: ``LL=(a+b+c+d)/2, LH=(a+b-c-d)/2, HL=(a-b+c-d)/2, HH=(a-b-c+d)/2``; further
    levels transform LL again. All levels run in one pass over ``x``; half types are computed in fp32 and each
    output is rounded once. Differentiable any number of times.

    Args:
        x: (N, C, H, W), float64, float32, float16 or bfloat16, any strides. N or C may be 0.
        levels: how many, at least 1.
        mode: what stands past the end where a level's size is odd; PyWavelets' names: ``"zero"``, ``"constant"``,
            ``"symmetric"``, ``"periodic"``, ``"periodization"`` (``"per"``), ``"reflect"``, ``"smooth"``,
            ``"antisymmetric"``, ``"antireflect"``. All agree on even sizes.
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        ``(ll, highs)``: ll (N, C, h_L, w_L) and ``highs[l-1]`` (N, C, 3, h_l, w_l) with LH, HL, HH, the finest
        level first, ``h_l = ceil(h_{l-1} / 2)``; in x's dtype. From a channels_last ``x`` they are laid out so that
        ``highs[i].flatten(1, 2)`` is a channels_last view.

    Raises:
        TypeError: x or levels of the wrong type, an integer or complex x.
        ValueError: wrong rank, empty rows or columns, unknown mode or backend, or ``"reflect"`` and
            ``"antireflect"`` on a single sample (PyWavelets has no such extension either).
        RuntimeError: the backend asked for is not installed.

    Source: Haar 1910; Mallat 1989; band order and modes as PyWavelets and pytorch_wavelets have them.
    """
    if isinstance(x, fx.Proxy):
        return fx.call_function(haar_dwt2d, x, levels, mode=mode, backend=backends.requested(backend))
    checks.check_tensor("x", x, 4, "(N, C, H, W)")
    checks.check_positive_int("levels", levels)
    checks.check_choice("mode", mode, MODES)
    if mode in reference.NEEDS_TWO:
        _check_extendable(mode, levels, x.shape[-2:])
    chosen = backends.requested(backend)
    out = (_analysis if inlined(chosen) else analysis)(x, levels, mode, chosen)
    return out[0], out[1:]


def haar_idwt2d(
    ll: Tensor,
    highs: Sequence[Tensor],
    *,
    mode: str = "zero",
    size: tuple[int, int] | None = None,
    add: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Orthonormal 2-D Haar wavelet synthesis: the inverse of :func:`haar_dwt2d`.

    Args:
        ll: (N, C, h_L, w_L), any strides.
        highs: the bands of each level, finest first, (N, C, 3, h_l, w_l), same dtype and device as ``ll``.
        mode: the mode of the analysis. Accepted for symmetry: Haar's inverse crops in every mode.
        size: (H, W) of the output; default ``(2*h_1, 2*w_1)``. Give it to get an odd size back.
        add: (N, C, H, W) to add to the result in the same pass (a residual connection).
        backend: for this call instead of the ambient :class:`wavemix_kernels.backend`.

    Returns:
        (N, C, H, W) in ll's dtype.

    Raises:
        TypeError: wrong types or mixed dtypes (under autocast the widest is taken instead).
        ValueError: ranks, shapes or devices that do not belong together, unknown mode or backend.
        RuntimeError: the backend asked for is not installed.
    """
    if isinstance(ll, fx.Proxy):
        name = backends.requested(backend)
        return fx.call_function(haar_idwt2d, ll, highs, mode=mode, size=size, add=add, backend=name)
    checks.check_choice("mode", mode, MODES)
    checks.check_tensor("ll", ll, 4, "(N, C, h_L, w_L)")
    if isinstance(highs, Tensor) or not isinstance(highs, Sequence) or len(highs) == 0:
        raise TypeError(
            f"highs: expected a list with one tensor (N, C, 3, h, w) for each level, got {checks.describe(highs)}"
        )
    for i, high in enumerate(highs):
        checks.check_tensor(f"highs[{i}]", high, 5, "(N, C, 3, h, w)")
        checks.check_same_device(f"highs[{i}]", high, "ll", ll)
    if add is not None:
        checks.check_tensor("add", add, 4, "(N, C, H, W)")
        checks.check_same_device("add", add, "ll", ll)
    ll, highs, add = _one_dtype(ll, list(highs), add)
    full = _check_pyramid(ll, highs, size, add)
    channels_last = layout.is_channels_last(highs[0][:, :, 0])
    chosen = backends.requested(backend)
    return (_synthesis if inlined(chosen) else synthesis)(ll, highs, full, "zero", add, channels_last, chosen)


def inlined(backend: str) -> bool:
    """Whether a graph is being made that is to consist of standard operators."""
    return backend == "reference" and (torch.compiler.is_exporting() or torch.jit.is_tracing())


# --- Checks ----------------------------------------------------------------------------------------------


def _check_extendable(mode: str, levels: int, shape: Sequence[int]) -> None:
    for axis, n in zip("HW", shape, strict=True):
        for level in range(1, levels + 1):
            if n == 1:
                raise ValueError(
                    f"mode={mode!r}: level {level} meets a single sample along {axis}, which has nothing to reflect; "
                    "use fewer levels or mode='symmetric'"
                )
            n = reference.half_up(n)


def _one_dtype(ll: Tensor, highs: list[Tensor], add: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor | None]:
    others = [(f"highs[{i}]", h) for i, h in enumerate(highs)] + ([] if add is None else [("add", add)])
    if all(t.dtype == ll.dtype for _, t in others):
        return ll, highs, add
    if not torch.is_autocast_enabled(ll.device.type):
        for name, tensor in others:
            checks.check_same_dtype(name, tensor, "ll", ll)
    wide = ll.dtype
    for _, t in others:
        wide = torch.promote_types(wide, t.dtype)
    return ll.to(wide), [h.to(wide) for h in highs], None if add is None else add.to(wide)


def _check_pyramid(ll: Tensor, highs: list[Tensor], size: tuple[int, int] | None, add: Tensor | None) -> list[int]:
    n, c = ll.shape[0], ll.shape[1]
    for i, high in enumerate(highs):
        if high.shape[0] != n or high.shape[1] != c or high.shape[2] != 3:
            raise ValueError(
                f"highs[{i}]: expected shape ({n}, {c}, 3, h, w) as ll {tuple(ll.shape)} has, got {tuple(high.shape)}"
            )
        if i > 0:
            finer = highs[i - 1].shape
            want = [reference.half_up(finer[-2]), reference.half_up(finer[-1])]
            if list(high.shape[-2:]) != want:
                raise ValueError(
                    f"highs[{i}]: expected {want[0]}x{want[1]}, half of highs[{i - 1}]'s {finer[-2]}x{finer[-1]} "
                    f"rounded up, got {high.shape[-2]}x{high.shape[-1]}; levels go finest first"
                )
    if ll.shape[-2:] != highs[-1].shape[-2:]:
        raise ValueError(
            f"ll: expected the coarsest level's {highs[-1].shape[-2]}x{highs[-1].shape[-1]}, "
            f"got {ll.shape[-2]}x{ll.shape[-1]}"
        )
    h, w = highs[0].shape[-2:]
    if size is None:
        size = (2 * h, 2 * w) if add is None else (add.shape[-2], add.shape[-1])
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size: expected (H, W), got {checks.describe(size)}")
    if reference.half_up(size[0]) != h or reference.half_up(size[1]) != w:
        raise ValueError(
            f"{'size' if add is None else 'size of add'}: expected {2 * h - 1} or {2 * h} rows and {2 * w - 1} or "
            f"{2 * w} columns for the {h}x{w} bands of highs[0], got {size[0]}x{size[1]}"
        )
    if add is not None and list(add.shape) != [n, c, size[0], size[1]]:
        raise ValueError(f"add: expected shape ({n}, {c}, {size[0]}, {size[1]}), got {tuple(add.shape)}")
    return [size[0], size[1]]


# --- Allocation ------------------------------------------------------------------------------------------


def _level_sizes(h: int, w: int, levels: int) -> list[tuple[int, int]]:
    sizes = []
    for _ in range(levels):
        h, w = reference.half_up(h), reference.half_up(w)
        sizes.append((h, w))
    return sizes


def _empty_pyramid(x: Tensor, levels: int) -> list[Tensor]:
    n, c, h, w = x.shape
    channels_last = layout.is_channels_last(x)
    sizes = _level_sizes(h, w, levels)
    highs = [layout.empty(x, [n, c, 3, *size], channels_last) for size in sizes]
    return [layout.empty(x, [n, c, *sizes[-1]], channels_last), *highs]


# --- Backends: (image, ll, highs, edge) on allocated tensors, up to MAX_LEVELS levels; `lows`: the LL of the
# levels above the last, kept by analysis and added by synthesis (ops/haar/pyramid.py) ---------------------


def _compiled(device: str, probe: Callable[..., str | None]) -> backends.Backend:
    """The C++ kernels of the CPU or of CUDA."""

    def call(direction: str, image: Tensor, planes: Sequence[Any], highs: Any, edge: float, lows: Any) -> None:
        a, name = _native.address, f"haar_{direction}_{device}"
        args = (
            _native.DTYPES[image.dtype], len(highs), image.shape, edge, a(image), *map(a, planes), [*map(a, highs)],
        )  # fmt: skip
        if device == "cpu":
            getattr(_native.core, name)(*args, torch.get_num_threads(), [*map(a, lows)])
        else:
            _native.launch(name, image.device, *args, lows=[*map(a, lows)])

    def analyse(image: Tensor, ll: Tensor, highs: Sequence[Tensor], edge: float, lows: Sequence[Tensor] = ()) -> None:
        call("analysis", image, (ll,), highs, edge, lows)

    def synthesise(
        image: Tensor, ll: Tensor, highs: Sequence[Tensor], edge: float, add: Tensor | None, lows: Sequence[Tensor] = ()
    ) -> None:
        call("synthesis", image, (add, ll), highs, edge, lows)

    return backends.Backend(probe, {"analysis": analyse, "synthesis": synthesise})


def _triton_analysis(
    image: Tensor, ll: Tensor, highs: Sequence[Tensor], edge: float, lows: Sequence[Tensor] = ()
) -> None:
    from wavemix_kernels.ops.haar.triton_analysis import analysis

    analysis(image, ll, highs, levels=len(highs), edge=edge, lows=lows)


def _triton_synthesis(
    image: Tensor, ll: Tensor, highs: Sequence[Tensor], edge: float, add: Tensor | None, lows: Sequence[Tensor] = ()
) -> None:
    from wavemix_kernels.ops.haar.triton_synthesis import synthesis

    synthesis(image, ll, highs, levels=len(highs), edge=edge, add=add, lows=lows)


BACKENDS: dict[str, backends.Backend] = {
    "cuda": _compiled("cuda", backends.cuda_why_not),
    "triton": backends.Backend(backends.triton_why_not, {"analysis": _triton_analysis, "synthesis": _triton_synthesis}),
    "cpu": _compiled("cpu", backends.cpu_why_not),
    "reference": backends.Backend(backends.reference_why_not, {}),
}


# --- The operators ---------------------------------------------------------------------------------------


def _spans(x_size: Sequence[int], levels: int, mode: str) -> list[int]:
    """How many levels each launch takes. Where the missing sample of an odd size lies elsewhere in the row
    (reflect, periodic …) a tile cannot see it, so that level is launched alone and its border mended."""
    edge = reference.MODES[mode]
    if edge.local:
        return [MAX_LEVELS] * (levels // MAX_LEVELS) + ([levels % MAX_LEVELS] if levels % MAX_LEVELS else [])
    spans: list[int] = []
    size = (x_size[0], x_size[1])
    fresh = True
    for _ in range(levels):
        odd = size[0] % 2 or size[1] % 2
        if odd or fresh or spans[-1] == MAX_LEVELS:
            spans.append(1)
        else:
            spans[-1] += 1
        fresh = bool(odd)
        size = (reference.half_up(size[0]), reference.half_up(size[1]))
    return spans


def _analysis_standard(x: Tensor, levels: int, mode: str, backend: str) -> list[Tensor]:
    ll, highs = reference.analysis(x, levels, mode)
    return [ll, *highs]


def _synthesis_standard(
    ll: Tensor, highs: list[Tensor], size: Sequence[int], mode: str, add: Tensor | None, channels_last: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    return reference.synthesis(ll, highs, (size[0], size[1]), mode, add)


def _analysis(x: Tensor, levels: int, mode: str, backend: str) -> list[Tensor]:
    chosen = choose.select("haar_dwt2d", BACKENDS, backend, x)
    if not chosen.functions:
        channels_last = layout.is_channels_last(x)
        return [layout.laid_out(t, channels_last) for t in _analysis_standard(x, levels, mode, backend)]
    edge = reference.MODES[mode]
    out: list[Tensor] = []
    image = x
    for span in _spans(x.shape[-2:], levels, mode):
        ll, *highs = _empty_pyramid(image, span)
        chosen.functions["analysis"](image, ll, highs, edge.last if edge.local else 0.0)
        if not edge.local:
            _mend_border(image, ll, highs[0], mode)
        out += highs
        image = ll
    return [image, *out]


def _synthesis(
    ll: Tensor, highs: list[Tensor], size: Sequence[int], mode: str, add: Tensor | None, channels_last: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    tensors = [ll, *highs] if add is None else [ll, *highs, add]
    chosen = choose.select("haar_idwt2d", BACKENDS, backend, *tensors)
    if not chosen.functions:
        image = _synthesis_standard(ll, highs, size, mode, add, channels_last, backend)
        return layout.laid_out(image, channels_last)
    edge = reference.MODES[mode]
    done = len(highs)
    for span in reversed(_spans(size, len(highs), mode)):
        first = done - span
        target = size if first == 0 else highs[first - 1].shape[-2:]
        image = layout.empty(ll, [*ll.shape[:2], *target], channels_last)
        chosen.functions["synthesis"](
            image, ll, highs[first:done], edge.last if edge.local else 0.0, add if first == 0 else None
        )
        if not edge.local:
            _fold_border(image, ll, highs[first], mode)
        ll, done = image, first
    return ll


def _mend_border(x: Tensor, ll: Tensor, high: Tensor, mode: str) -> None:
    """Computes again the last row and column of one level where they see a sample from elsewhere in the image.
    Only strips two pixels wide are touched."""
    for dim in (-2, -1):
        n = x.shape[dim]
        if n % 2:
            strip = torch.cat([x.narrow(dim, n - 1, 1), reference.virtual_sample(x, dim, mode)], dim)
            border_ll, (border_high,) = reference.analysis(strip, 1, mode)
            last = ll.shape[dim] - 1
            ll.narrow(dim, last, 1).copy_(border_ll)
            high.narrow(dim, last, 1).copy_(border_high)


def _fold_border(image: Tensor, ll: Tensor, high: Tensor, mode: str) -> None:
    """Adjoint of :func:`_mend_border`: adds the virtual row's and column's values where they came from."""
    accumulate = reference.accumulate_dtype(image.dtype)
    for dim in (-2, -1):
        n = image.shape[dim]
        if n % 2 == 0:
            continue
        last = ll.shape[dim] - 1
        strip_ll, strip_high = ll.narrow(dim, last, 1).to(accumulate), high.narrow(dim, last, 1).to(accumulate)
        # The row strip folds its columns as the mode says. The column strip crops its rows: what the virtual
        # row adds there the row strip has already brought.
        size = [2 if d == dim else image.shape[d] for d in (-2, -1)]
        fold_mode = mode if dim == -2 else "zero"
        strip = reference.synthesis(strip_ll, [strip_high], (size[0], size[1]), fold_mode)
        virtual = strip.narrow(dim, 1, 1)
        for weight, index in zip(reference.edge_of(mode, n), (n - 1, n - 2, 0), strict=True):
            if weight:
                image.narrow(dim, index, 1).add_(virtual.to(image.dtype), alpha=weight)


def _analysis_fake(x: Tensor, levels: int, mode: str, backend: str) -> list[Tensor]:
    return _empty_pyramid(x, levels)


def _synthesis_fake(
    ll: Tensor, highs: list[Tensor], size: Sequence[int], mode: str, add: Tensor | None, channels_last: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    return layout.empty(ll, [*ll.shape[:2], *size], channels_last)


_library.impl("haar_analysis", _analysis, "CompositeExplicitAutograd")
_library.impl("haar_synthesis", _synthesis, "CompositeExplicitAutograd")
torch.library.register_fake("wavemix_kernels::haar_analysis", _analysis_fake, lib=_library)
torch.library.register_fake("wavemix_kernels::haar_synthesis", _synthesis_fake, lib=_library)


# --- Gradients: each is the other ------------------------------------------------------------------------


def _analysis_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, _, ctx.mode, ctx.backend = inputs
    ctx.size = x.shape[-2:]
    ctx.channels_last = layout.is_channels_last(x)


def _analysis_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad = synthesis(grads[0], list(grads[1:]), ctx.size, ctx.mode, None, ctx.channels_last, ctx.backend)
    return grad, None, None, None


def _synthesis_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, highs, _, ctx.mode, add, _, ctx.backend = inputs
    ctx.levels, ctx.add = len(highs), add is not None


def _synthesis_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    out = analysis(grad, ctx.levels, ctx.mode, ctx.backend)
    return out[0], out[1:], None, None, grad if ctx.add else None, None, None


#: The operators with their gradients: (x, levels, mode, backend) -> [ll, high_1 …], and
#: (ll, highs, size, mode, add, channels_last, backend) -> image.
analysis = differentiable(
    _library, "haar_analysis", _analysis_setup, _analysis_backward, standard=_analysis_standard, linear=True
)
synthesis = differentiable(
    _library, "haar_synthesis", _synthesis_setup, _synthesis_backward, standard=_synthesis_standard, linear=True
)


# --- torch.func.vmap: the mapped dimension joins the batch -----------------------------------------------


torch.library.register_vmap("wavemix_kernels::haar_analysis", batching.analysis, lib=_library)
torch.library.register_vmap("wavemix_kernels::haar_synthesis", batching.synthesis, lib=_library)


def self_test(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """An odd-sized three-level transform and its gradient: (error, bound)."""

    def flat(out: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
        return [out[0], *out[1]]

    error = selftest.against_reference(
        lambda x: flat(haar_dwt2d(x, 3, mode="symmetric", backend=backend)),
        lambda x: flat(reference.analysis(x, 3, "symmetric")),
        [selftest.pattern(2, 4, 21, 24)],
        device,
        dtype,
    )
    return error, selftest.rounding_bound(4**3, dtype)
