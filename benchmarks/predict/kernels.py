"""Every CUDA and Triton kernel at the shapes of the benchmark cases, recorded as its operator launches it."""

from __future__ import annotations

import fnmatch
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import BF16, Case, sized, vector
from .case import operator as _op
from .chips import Chip
from .executed import kernel_of
from .record import Launch, image, recording
from .reduce_haar import norm_reduce_haar_cases, reduce_haar_cases
from .wtconv import wtconv_cases


@dataclass(frozen=True)
class Recorded:
    """One of our kernels, as a case launches it; `name` is the case's, and of several kernels the function's too."""

    name: str
    launch: Launch
    flops: float


# --- Haar --------------------------------------------------------------------------------------------------


def _bands(n: int, c: int, h: int, w: int, last: bool) -> Tensor:
    if last:
        return torch.empty(n, h, w, c, 3, dtype=BF16).permute(0, 3, 4, 1, 2)
    return torch.empty(n, c, 3, h, w, dtype=BF16)


def _haar(backend: str, levels: int, shape: tuple[int, int, int, int], last: bool, inverse: bool) -> Callable[[], Any]:
    from wavemix_kernels import haar_dwt2d, haar_idwt2d

    def run() -> Any:
        if not inverse:
            return haar_dwt2d(image(shape, BF16, last), levels, backend=backend)
        n, c, h, w = shape
        sizes = [(-(-h >> level), -(-w >> level)) for level in range(1, levels + 1)]
        highs = [_bands(n, c, *size, last) for size in sizes]
        return haar_idwt2d(image((n, c, *sizes[-1]), BF16, last), highs, size=(h, w), backend=backend)

    return run


def haar_cases() -> Iterator[Case]:
    """Both directions and layouts, levels 1 to 5; rows that are no whole words of 16 bytes; 36 channels."""
    big = (4, 64, 256, 256)
    made = [(level, big, last) for level in (1, 2, 3, 4, 5) for last in (False, True)]
    for size, channels in ((56, 64), (28, 128), (14, 320)):
        made.append((1, (64, channels, size, size), False))
    made.append((2, (64, 36, 64, 64), True))
    for backend in ("cuda", "triton"):
        for level, shape, last in made:
            for inverse in (False, True):
                what = f"{'synthesis' if inverse else 'analysis'} L{level} {'channels_last' if last else 'nchw'}"
                yield Case(f"{backend} haar {what} {sized(shape)}", _haar(backend, level, shape, last, inverse))


def _haar_blocks(
    x: tuple[int, ...], convention: str, inverse: bool, dtype: torch.dtype, last: bool
) -> Callable[[], Any]:
    def run() -> Any:
        from wavemix_kernels.ops.haar import CONVENTIONS, blocks

        of = CONVENTIONS[convention]
        order = (0, 4, 1, 2, 3) if last else (0, 1, 2, 3, 4)
        given = torch.empty([x[i] for i in ((0, 2, 3, 4, 1) if last else order)], dtype=dtype).permute(order)
        axes, front = list(range(5 - of.axes, 5)), int(of.first_frame)
        inside = "bands" if of.layout == "separate" else of.layout
        if not inverse:
            return blocks.split(given, axes, of.order, of.weight, front=front, layout=inside, backend="triton")
        bands = blocks._empty_bands(given, axes, front, inside)
        rest = {"front": front, "repeat": False, "layout": inside, "channels_last": last, "backend": "triton"}
        return blocks.join(bands, axes, of.order, of.inverse, x[2:], **rest)

    return run


def haar_blocks_cases() -> Iterator[Case]:
    """Video tokenizers' level of 17 frames, networks' bands in each layout, and a line of one axis."""
    video, images = (8, 16, 17, 128, 128), (8, 64, 1, 256, 256)
    made = [("cosmos3d", video, torch.float32, False), ("cosmos3d", video, BF16, False), ("wfvae3d", video, BF16, True)]
    made += [("mwcnn", images, torch.float32, False), ("mwcnn", images, BF16, True), ("wtconv", images, BF16, True)]
    for convention, shape, dtype, last in made:
        for inverse in (False, True):
            way, order = "synthesis" if inverse else "analysis", "channels_last" if last else "nchw"
            name = f"triton haar_blocks {way} {convention} {order} {str(dtype)[6:]} {sized(shape)}"
            yield Case(name, _haar_blocks(shape, convention, inverse, dtype, last))


def _dwt(
    wave: str, mode: str, inverse: bool, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> Callable[[], Any]:
    taps = _TAPS[wave]

    def run() -> Any:
        from wavemix_kernels.ops.dwt import Filters, dwt2d, idwt2d
        from wavemix_kernels.ops.dwt.reference import coefficient_size

        filters = Filters(*(vector(taps) for _ in range(4)))
        if not inverse:
            return dwt2d(image(shape, dtype, False), filters, mode=mode, backend="triton")
        n, c, h, w = shape
        h, w = (coefficient_size(size, taps, mode) for size in (h, w))
        ll, high = torch.empty(n, c, h, w, dtype=dtype), torch.empty(n, c, 3, h, w, dtype=dtype)
        return idwt2d(ll, [high], filters, mode=mode, backend="triton")

    return run


def _filter_banks(
    lattice: str, taps: int, mode: str, inverse: bool, shape: tuple[int, int, int, int]
) -> Callable[[], Any]:
    """The second level of an undecimated transform, or of the dual-tree transform, which is four banks."""

    def run() -> Any:
        from wavemix_kernels.ops.dwt.bank import filter_banks, filter_banks_transpose
        from wavemix_kernels.ops.dwt.reference import Filters, Lattice

        n, c, *size = shape
        filters = Filters(*(vector(taps) for _ in range(4)))
        banks = [(filters, *(Lattice(2 - taps, s, 1, 2) for s in size))]
        if lattice == "tree":
            trees = [[Lattice(2 - taps + tree, s // 4, 4, 2) for tree in (0, 1)] for s in size]
            banks = [(filters, h, w) for h in trees[0] for w in trees[1]]
        if not inverse:
            return filter_banks(image(shape, torch.float32, False), banks, mode=mode, backend="triton")
        bands = [torch.empty(n, c, 4, h.length, w.length) for _, h, w in banks]
        ll, high = [b[:, :, 0] for b in bands], [b[:, :, 1:] for b in bands]
        return filter_banks_transpose(ll, high, banks, size, mode=mode, backend="triton")

    return run


def _quads(trees: bool, back: bool, shape: tuple[int, int, int, int]) -> Callable[[], Any]:
    def run() -> Any:
        from wavemix_kernels.ops.dwt.quads import from_complex, to_complex

        n, c, h, w = shape
        if back:
            low, z = torch.empty(shape), torch.empty(n, c, 6, h // 2, w // 2, 2)
            return from_complex(low, z, 2, 5, trees, backend="triton")
        bands = [torch.empty(n, c, 4, h // 2, w // 2) for _ in range(4)] if trees else [torch.empty(n, c, 4, h, w)]
        return to_complex(bands, 2, 5, backend="triton")

    return run


_TAPS = {"haar": 2, "db2": 4, "db4": 8, "db20": 40}


def dwt_cases() -> Iterator[Case]:
    shape = (8, 16, 256, 256)
    made = [(wave, "zero", torch.float32) for wave in _TAPS]
    made += [("db4", "symmetric", torch.float32), ("db4", "periodization", torch.float32), ("db4", "zero", BF16)]
    for wave, mode, dtype in made:
        for inverse in (False, True) if mode != "symmetric" else (False,):
            way = "synthesis" if inverse else "analysis"
            name = f"triton dwt {way} {wave} {mode} {str(dtype)[6:]} {sized(shape)}"
            yield Case(name, _dwt(wave, mode, inverse, dtype, shape))
    for lattice, taps, mode, inverse in (
        ("swt", 8, "periodic", False),
        ("swt", 8, "periodic", True),
        ("tree", 10, "symmetric", False),
        ("tree", 10, "symmetric", True),
    ):
        way = "synthesis" if inverse else "analysis"
        name = f"triton filter_bank {way} {lattice} {taps} {mode} float32 {sized(shape)}"
        yield Case(name, _filter_banks(lattice, taps, mode, inverse, shape))
    for trees, back in itertools.product((False, True), repeat=2):
        name = f"triton quads {'from' if back else 'to'} complex {'trees' if trees else 'image'} float32 {sized(shape)}"
        yield Case(name, _quads(trees, back, shape))


# --- A Waveblock's operators -------------------------------------------------------------------------------


def _mlp(a: int, b: int, k: int, o: int, size: tuple[int, int, int], what: str) -> Callable[[], Any]:
    def run() -> Any:
        n, h, w = size
        x, second = (image((n, c, h, w), BF16, True) if c else None for c in (a, b))
        affine = (vector(b), vector(b)) if b else (None, None)
        weights = image((k, a + b)), image((k,)), image((o, k)), image((o,))
        p, seed = (0.5, torch.empty(1, dtype=torch.int64)) if b or a < 64 else (0.0, None)
        arguments = (x, second, *affine, *weights, p, seed)
        if what == "forward":
            return _op("pointwise_mlp")(*arguments, "triton")
        grad = image((n, o, h, w), BF16, True)
        if what == "gradients through a norm":
            norm = [vector(b) for _ in range(6)]
            return _op("normed_mlp_backward")(grad, x, second, *norm, *weights, p, seed, "triton")
        return _op("pointwise_mlp_backward")(grad, *arguments, what == "gradients and output", "triton")

    return run


def mlp_cases() -> Iterator[Case]:
    """A Waveblock's middle level, its last level, and the channel MLPs of Wave-MLP's stages."""
    made = [(192, 96, 384, 192, (64, 32, 32)), (192, 0, 384, 192, (64, 8, 8))]
    made += [(c, 0, 4 * c, c, (128, size, size)) for c, size in ((64, 56), (128, 28), (320, 14))]
    for a, b, k, o, size in made:
        rows, shape = float(size[0] * size[1] * size[2]), f"{a}|{b} to {k} to {o}, {sized(size)} pixels"
        flops = {
            "_forward_kernel": 2 * rows * k * (a + b + o),
            "_backward_x_kernel": 2 * rows * k * (2 * (a + b) + o),
            "_backward_weight_kernel": 4 * rows * k * (a + b + o),
            "_hidden_kernel": 2 * rows * k * (a + b + o),
        }
        of_second = ["gradients and output", "gradients through a norm"] if b else []
        for what in ("forward", "gradients", *of_second):
            yield Case(f"triton mlp {what} {shape}", _mlp(a, b, k, o, size, what), flops)
    for what in ("forward", "gradients and output"):  # WaveMix-Lite's narrowest
        made_of = _mlp(8, 0, 16, 8, (1024, 14, 14), what)
        yield Case(f"triton mlp {what} 8|0 to 16 to 8, 1024x14x14 pixels", made_of)


def _deconv(c: int, size: int, what: str) -> Callable[[], Any]:
    def run() -> Any:
        u = image((64, c, size, size), BF16, True)
        y, grad = (image((64, c, 2 * size, 2 * size), BF16, True) for _ in range(2))
        weight, bias = image((c, c, 4, 4)), image((c,))
        if what == "forward":
            return _op("deconv_stats")(u, weight, bias, bias, bias, 1e-5, "triton")
        return _op("deconv_norm_backward")(grad, y, *(vector(c) for _ in range(3)), True, u, weight, "triton")

    return run


def deconv_cases() -> Iterator[Case]:
    product = 2.0 * 64 * 32 * 32 * 16 * 192 * 192
    yield Case("triton deconv forward 64x192x32x32", _deconv(192, 32, "forward"), {"_forward_kernel": product})
    flops = {"_backward_kernel": 2 * product}
    yield Case("triton deconv gradients 64x192x32x32", _deconv(192, 32, "backward"), flops)


def _batch_norm(shape: tuple[int, int, int, int], what: str) -> Callable[[], Any]:
    c = shape[1]

    def run() -> Any:
        x, other = (image(shape, BF16, True) for _ in range(2))
        if what == "statistics":
            return _op("batch_norm_stats")(x, vector(c), vector(c), 1e-5, "triton")
        if what == "apply":
            return _op("batch_norm_apply")(x, vector(c), vector(c), other, True, "triton")
        if what == "of gelu":
            return _op("gelu_batch_norm")(x, vector(c), vector(c), 1e-5, "triton")
        if what == "of gelu, gradients":
            return _op("gelu_batch_norm_backward")(other, x, *(vector(c) for _ in range(3)), "triton")
        if what == "pool":
            return _op("batch_norm_pool")(x, vector(c), vector(c), other, "triton")
        if what == "gradients of the pool":
            means, grad = image((shape[0], c)).float(), image((shape[0], c, 1, 1), BF16)
            return _op("batch_norm_pool_backward")(grad, means, x, *(vector(c) for _ in range(3)), "triton")
        return _op("batch_norm_backward")(other, x, vector(c), vector(c), vector(c), True, True, "triton")

    return run


def batch_norm_cases() -> Iterator[Case]:
    for shape in ((64, 192, 64, 64), (1024, 8, 28, 28)):  # WaveMix's, WaveMix-Lite's
        more = ("of gelu", "of gelu, gradients", "pool", "gradients of the pool") if shape[1] == 192 else ()
        for what in ("statistics", "apply", "gradients", *more):
            yield Case(f"triton batch_norm {what} {sized(shape)}", _batch_norm(shape, what))


# --- Wave-MLP's operators ----------------------------------------------------------------------------------


def _pre_norm(c: int, size: int, by_image: bool, what: str) -> Callable[[], Any]:
    def run() -> Any:
        n = 128
        x, branch = (image((n, c, size, size), dtype, True) for dtype in (torch.float32, BF16))
        of = vector(n if by_image else c)
        if what == "statistics":
            return _op("pre_norm_stats")(x, 1e-5, by_image, "triton")
        if what == "apply":
            return _op("pre_norm_apply")(x, of, of, vector(c), vector(c), by_image, BF16, "triton")
        if what == "join":
            return _op("pre_norm_join")(x, branch, vector(n), "triton")
        return _op("pre_norm_backward")(branch, x, x, of, of, vector(c), by_image, True, "triton")

    return run


def pre_norm_cases() -> Iterator[Case]:
    for by_image in (False, True):
        for what in ("statistics", "apply", "gradients", *(["join"] if by_image else [])):
            name = f"triton pre_norm {what} of {'images' if by_image else 'the batch'} 128x64x56x56"
            yield Case(name, _pre_norm(64, 56, by_image, what))


def _patm(backend: str, shape: tuple[int, int, int, int], what: str) -> Callable[[], Any]:
    def run() -> Any:
        n, c, h, w = shape
        z_h, theta_h, z_w, theta_w, z_c = image((n, 5 * c, h, w), BF16, True).chunk(5, 1)
        vectors, taps = [vector(c) for _ in range(4)], [image((c, 2, 1, 7)), image((c, 2, 7, 1))]
        full = image(shape, BF16, True)
        if what == "forward":
            return _op("phase_aggregate")(z_h, z_w, z_c, theta_h, theta_w, *vectors, *taps, backend)
        if what == "sum":
            return _op("branch_sum")(full, full, z_c, torch.empty(3, n, c), backend)
        if what == "sum gradients":
            return _op("branch_sum_backward")(full, full, full, z_c, torch.empty(3, n, c), backend)
        a, s = torch.empty(3, n, c), torch.empty(n, c)
        grads, batch = (full, full, s, a, z_h, z_w), (vector(2 * c).view(2, c), vector(2 * c).view(2, c))
        return _op("phase_aggregate_backward")(*grads, theta_h, theta_w, *vectors, *taps, *batch, True, backend)

    return run


def _patm_whole(shape: tuple[int, int, int, int], what: str) -> Callable[[], Any]:
    c = shape[1]

    def run() -> Any:
        from wavemix_kernels.ops.patm import whole
        from wavemix_kernels.ops.patm.weights import Affine, Weights

        x = whole.Image(image(shape, BF16, True), None, None)
        if what == "moments":
            return whole.moments(x, "cuda")
        taps = torch.empty(c, 2, 1, 7), torch.empty(c, 2, 7, 1)
        mlp = torch.empty(c // 4, c, 1, 1), vector(c // 4), torch.empty(3 * c, c // 4, 1, 1), vector(3 * c)
        convolutions = (image((c, c, 1, 1)), None) * 3 + (image((c, c, 1, 1)), image((c,))) * 3
        maps, path, weights = (
            Affine(*(vector(c) for _ in range(4))),
            vector(shape[0]),
            Weights(*convolutions, *taps, *mlp),
        )
        if what == "forward":
            return whole.forward(x, path, True, weights, maps, "cuda")
        wide = torch.empty(c, dtype=torch.float64), torch.empty(c, c, dtype=torch.float64)
        batch = whole.Batch(*(vector(2 * c).view(2, c) for _ in range(2)), *wide)
        mean = torch.empty(shape[:2])
        return whole.backward(image(shape, BF16, True), mean, batch, x, path, weights, maps, "cuda")

    return run


def patm_cases() -> Iterator[Case]:
    for shape in ((64, 64, 56, 56), (64, 128, 28, 28)):
        pixels = float(shape[0] * shape[2] * shape[3])
        product = 2 * pixels * shape[1] ** 2
        flops = {
            "patm_products": product,
            "patm_branch_sums": 4 * product,
            "patm_mix": 6 * product + 56 * pixels * shape[1],
            "patm_mixed_gradients": 7 * product,
            "patm_wave_gradients": 5 * product + 112 * pixels * shape[1],
            "patm_image_gradients": 11 * product,
        }
        for what in ("moments", "forward", "backward"):
            yield Case(f"cuda patm_whole {what} {sized(shape)}", _patm_whole(shape, what), flops)
    for shape in ((64, 64, 56, 56), (64, 320, 14, 14), (128, 320, 14, 14)):
        for backend in ("cuda", "triton") if shape[0] == 64 else ("cuda",):
            for what in ("forward", "gradients"):
                name = f"{backend} phase_aggregate {what} {sized(shape)}"
                yield Case(name, _patm(backend, shape, what))
    for what in ("sum", "sum gradients"):
        yield Case(f"triton branch_{what.replace(' ', '_')} 64x64x56x56", _patm("triton", (64, 64, 56, 56), what))


FAMILIES = (
    haar_cases, haar_blocks_cases, dwt_cases, wtconv_cases, reduce_haar_cases, norm_reduce_haar_cases, mlp_cases,
    deconv_cases, batch_norm_cases, pre_norm_cases, patm_cases,
)  # fmt: skip
#: Kernels beside the one that a case is about: they add up a few partial sums.
_SMALL = (
    "_statistics_kernel",
    "_line_kernel",
    "_image_line_kernel",
    "_sums_kernel",
    "_merge_kernel",
    "phase_sum_rows",
    "patm_sum_products",
    "patm_mixed_sums",
    "patm_through_statistics",
    "patm_branch_mlp",
    "reduce_haar_sums",
    "patm_sum_rows",
)


def function_of(launch: Launch) -> str:
    """The kernel's name in the source."""
    return kernel_of(launch.name) if launch.kind == "cuda" else launch.name


def cases(pattern: str = "*") -> list[Case]:
    """Those whose name matches a pattern as the shell has them."""
    return [case for family in FAMILIES for case in family() if fnmatch.fnmatch(case.name, pattern)]


def recorded(case: Case, chip: Chip) -> list[Recorded]:
    """Our kernels that a case launches."""
    with recording(chip.capability) as step:
        case.run()
    named = [(function_of(launch), launch) for launch in step.launches if launch.kind != "aten"]
    named = [(name, launch) for name, launch in named if name not in _SMALL]
    found, seen = [], Counter[str]()
    for name, launch in named:
        seen[name] += 1
        which = f" {seen[name]}" if seen[name] > 1 else ""
        full = f"{case.name}: {name}{which}" if len(named) > 1 else case.name
        found.append(Recorded(full, launch, case.flops.get(name, 0.0)))
    return found


def kernels(chip: Chip, pattern: str = "*") -> list[Recorded]:
    """Our kernels of every case whose name matches."""
    return [one for case in cases(pattern) for one in recorded(case, chip)]
