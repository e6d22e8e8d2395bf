"""Launches of every Triton kernel on tensors without storage: default tiles on each chip, and Haar's search space.

A null address counts as 16-byte aligned, as an allocator's does. Imported only where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tests.aot.points import HALF, Point, meta
from tests.aot.table import WIDE, Demands
from tests.aot.wavelet_launches import dwt_points, haar_blocks_points, haar_points, wtconv_points
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import triton_sums
from wavemix_kernels.ops.common.chips import Products
from wavemix_kernels.ops.common.precision import input_precision, products_in
from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.deconv import tiles as deconv_tiles
from wavemix_kernels.ops.deconv import triton as deconv
from wavemix_kernels.ops.deconv import triton_backward as deconv_backward
from wavemix_kernels.ops.haar import pyramid as haar_pyramid
from wavemix_kernels.ops.haar import triton_analysis, triton_synthesis
from wavemix_kernels.ops.mlp import tiles as mlp_tiles
from wavemix_kernels.ops.mlp import triton as mlp
from wavemix_kernels.ops.mlp import triton_backward as mlp_backward
from wavemix_kernels.ops.mlp import triton_hidden as mlp_hidden
from wavemix_kernels.ops.mlp import triton_narrow as mlp_narrow
from wavemix_kernels.ops.mlp import triton_normed as mlp_normed
from wavemix_kernels.ops.mlp import triton_products as mlp_products
from wavemix_kernels.ops.norm import triton_batch_norm as norms
from wavemix_kernels.ops.norm import triton_finish as norm_finish
from wavemix_kernels.ops.norm import triton_pooled as norm_pooled
from wavemix_kernels.ops.norm import triton_pre_norm as pre_norm
from wavemix_kernels.ops.norm import triton_running as running_statistics
from wavemix_kernels.ops.patm import triton_branch_weights as branch_weights
from wavemix_kernels.ops.patm import triton_branches as branch_sum
from wavemix_kernels.ops.patm import triton_phases, triton_phases_backward, waves
from wavemix_kernels.ops.reduce_haar import triton as reductions
from wavemix_kernels.ops.reduce_haar import triton_backward as reductions_backward
from wavemix_kernels.ops.reduce_haar import triton_narrow as reductions_narrow
from wavemix_kernels.ops.reduce_haar.tiles import backward_config_for, narrow_config_for

# --- PATM ----------------------------------------------------------------------------------------------------


def patm_launch(kernel: str, dtype: torch.dtype) -> Launch:
    """A default tile on the channels of a projection to five images: slices, 16-byte vectors aligned."""
    n, c, h, w = 64, 64, 56, 56
    z, theta, third, d_z, d_theta = meta(n, 5 * c, h, w, dtype=dtype, last=True).chunk(5, 1)
    image = meta(n, c, h, w, dtype=dtype, last=True)
    if kernel.startswith("sum"):
        grad = image if "backward" in kernel else None
        return branch_sum.launch(image, (image, image, third), meta(3, n, c), grad)[0]
    branch = waves.Branch(z, theta, meta(c), meta(c), meta(c, 2, 1, 7))
    if kernel == "forward":
        return triton_phases.forward_launch(image, branch, third)[0]
    weights = meta(n, c)
    cotangent = waves.Cotangent(image, weights, weights, weights, meta(c))
    return triton_phases_backward.backward_launch(d_z, d_theta, third, cotangent, branch)[0]


def patm_points() -> Iterator[Point]:
    """The dtypes that models run; float64 is there for checks, and spills. Ten warps fit a multiprocessor's registers,
    in two blocks at least, and sines are the approximate ones in half types alone. A thread's channels move in one
    access: 16 bytes in branch_sum; in phase_aggregate four channels forward, on their way to shared memory, and two
    backward, for which registers leave room. Outputs are half as many."""
    chips = [*((90, dtype) for dtype in (torch.float32, HALF, torch.bfloat16)), (80, HALF), (100, HALF), (120, HALF)]
    made = [(*chip, kernel) for chip in chips for kernel in ("forward", "backward")]
    made += [(90, dtype, kernel) for dtype in (torch.float32, torch.bfloat16) for kernel in ("sum", "sum backward")]
    bits = {4: "", 8: r"\.64", 16: r"\.128"}
    for arch, dtype, kernel in made:
        of_chip = dtype.itemsize == 2 and not kernel.startswith("sum")
        read = r"LDGSTS\.E(\.BYPASS)?" if kernel == "forward" else r"LDG\.E"
        load, store = {"forward": (4, 2), "backward": (2, 2)}.get(kernel, (16 // dtype.itemsize,) * 2)
        demands = Demands(
            blocks=2, warps=10,
            accesses=(rf"{read}{bits[load * dtype.itemsize]}$", rf"STG\.E{bits[store * dtype.itemsize]}$"),
            products=(r"MUFU\.SIN", r"MUFU\.COS") if of_chip else (),
            never=(r"STG\.E\.U16$", *([] if of_chip else [r"MUFU\.(SIN|COS)"])),
        )  # fmt: skip
        yield Point(f"patm {kernel}", arch, dtype, patm_launch(kernel, dtype), demands)


def branch_weights_points() -> Iterator[Point]:
    """The narrowest and the widest stage of a Wave-MLP; weights of mixed precision are float32."""
    for arch, dtype, c in (
        (90, torch.float32, 64), (80, HALF, 128), (90, torch.bfloat16, 512), (80, torch.float32, 320),
        (100, HALF, 320), (120, HALF, 512), (120, torch.float32, 512),
    ):  # fmt: skip
        k, s, by_branch = c // 4, meta(64, c), meta(3, 64, c)
        weights = tuple(meta(*shape, dtype=dtype) for shape in ((k, c), (k,), (3 * c, k), (3 * c,)))
        forward = branch_weights.forward_launch(s, 1.0, weights)[0]
        launches = [forward, *branch_weights.backward_launches(by_branch, by_branch, s, 1.0, weights)[0]]
        for name, launch in zip(("forward", "backward", "weights"), launches, strict=True):
            yield Point(f"branch_weights {c} {name}", arch, dtype, launch, Demands(accesses=()))
        running = meta(c, dtype=dtype)
        moves = [running_statistics.Move(running, running, meta(dtype=torch.int64), meta(c), meta(c), 1.0)] * 3
        launch = running_statistics.move_launch(moves, 0.1)
        yield Point("running statistics", arch, dtype, launch, Demands(accesses=()))


# --- Normalisation around a Wave-MLP's branches --------------------------------------------------------------


def pre_norm_launch(kernel: str, dtype: torch.dtype) -> Launch:
    """On the first stage of a Wave-MLP in mixed precision: x and its gradients in float32."""
    branch = meta(128, 64, 56, 56, dtype=dtype, last=True)
    x = meta(128, 64, 56, 56, last=not kernel.endswith("NCHW"))
    by_image, by_both, by_channel = meta(128), meta(128, 64), meta(64)
    per_image, per_channel = pre_norm.Parameter(by_image, True), pre_norm.Parameter(by_channel)
    if kernel == "apply":
        norm = per_image, per_channel
        return pre_norm.map_launch(branch, x, pre_norm.Parameter(by_both), norm, weight=("scale", by_channel))
    if kernel == "join":
        return pre_norm.map_launch(x, branch, per_image, w=x)
    if kernel == "image sums":
        return pre_norm.image_sums_launch(branch, x, by_image, by_image)[0]
    rise = pre_norm.Parameter(by_both)
    return pre_norm.map_launch(x, x, per_image, (per_image, per_image), (branch, rise), x)


def pre_norm_points() -> Iterator[Point]:
    """float32 images of channels_last move in 16-byte accesses."""
    for kernel in ("apply", "backward", "join", "image sums", "backward of NCHW"):
        accesses = () if kernel.endswith("NCHW") else (r"LDG(STS)?\.E(\.BYPASS)?\.128$",)
        accesses += (r"STG\.E\.128$",) if kernel in ("backward", "join") else ()
        made = [(90, torch.float32), (90, torch.bfloat16)]
        made += [(arch, HALF) for arch in (80, 100, 120)] if kernel in ("backward", "image sums") else []
        for arch, dtype in made:
            launch = pre_norm_launch(kernel, dtype)
            yield Point(f"pre_norm {kernel}", arch, dtype, launch, Demands(accesses=accesses))


# --- Transposed convolution ----------------------------------------------------------------------------------


def deconv_points() -> Iterator[Point]:
    """One block at least fits every chip that takes its tile, and halves multiply by the chip's own matrix instruction.

    wgmma's forward tile is taken on sm_90 alone, whose blocks may have 227 KB.
    """
    matrices = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
    products_by: dict[int, Products] = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}

    def point(name: str, arch: int, dtype: torch.dtype, launch: Launch, products: str = "") -> Point:
        own, others = re.escape(f"PTX {matrices[arch]}"), {f"PTX {other}" for other in matrices.values()}
        others.remove(f"PTX {matrices[arch]}")
        demands = Demands(
            most_shared=(227 if arch == 90 and dtype == HALF and name.startswith(("forward", "plus")) else 99) * 1024,
            products=(own,) if products in ("exactly", "tf32") else (),
            # 32 columns beside 64 are fewer than wgmma's 64 rows, which mma.sync then takes in tf32.
            never=tuple(map(re.escape, sorted(others))) if products == "exactly" else (),
        )  # fmt: skip
        return Point(f"deconv {name}", arch, dtype, launch, demands)

    made = [(arch, HALF, 192, "ieee") for arch in (90, 80, 100, 120)]
    made += [(90, torch.float32, 96, "ieee"), (90, torch.float32, 96, "tf32"), (80, torch.float32, 96, "tf32")]
    for arch, dtype, c, precision in made:
        u, y = meta(64, c, 32, 32, dtype=dtype, last=True), meta(64, c, 64, 64, dtype=dtype, last=True)
        weight, norm = meta(c, c, 4, 4, dtype=dtype), deconv_backward.Norm(y, *(meta(c),) * 4)
        pixels = u[:, 0].numel()
        with products_in(precision):
            configs = {
                kind: deconv_tiles.config_for(
                    kind, dtype.itemsize, c, columns, rows, products_by[arch], precision
                )
                for kind, columns, rows in (("forward", c, pixels), ("input", c, pixels), ("weight", pixels, 4 * c))
            }  # fmt: skip
            gradients = (configs["input"], configs["weight"])
            launches = {
                "forward": deconv.forward_launch(y, u, weight, meta(c, dtype=dtype), True, configs["forward"])[0],
                "both gradients": deconv_backward.norm_backward_launch(u, y, norm, u, weight, gradients)[0],
            }
            if dtype == HALF and arch in (80, 90):  # what choose.deconv_residual takes
                given = (y, u, weight, meta(c, dtype=dtype), False, configs["forward"], y)
                launches["plus an image"] = deconv.forward_launch(*given)[0]
            if (arch, dtype) == (90, HALF):  # elsewhere the launch of both stands for its parts
                launches["input gradient"] = deconv_backward.backward_x_launch(u, y, norm, weight, configs["input"])
                made_weight = deconv_backward.backward_weight_launch(y, norm, u, True, configs["weight"])
                launches["weight gradient"] = made_weight[0]
        products = "exactly" if dtype == HALF else precision
        for name, launch in launches.items():
            yield point(f"{name} {precision} {c}", arch, dtype, launch, products)
    u, y, weight = (meta(*s, dtype=HALF, last=True) for s in ((64, 256, 32, 32), (64, 256, 64, 64), (256, 256, 4, 4)))
    both, partial = deconv_backward.norm_backward_launch(u, y, deconv_backward.Norm(y, *(meta(256),) * 4), u, weight)
    yield point("both gradients 256", 90, HALF, both, "exactly")
    yield point("merge", 90, torch.float32, deconv.merge_launch(meta(3, 2048, 192))[0])
    yield point("reduce", 90, HALF, deconv_backward.reduce_launch(weight, partial))


# --- The rest of a Waveblock ---------------------------------------------------------------------------------

#: Kernels of which a multiprocessor of sm_90 holds two blocks or more, in half types; config_for says where one is
#: enough.
TWO_BLOCKS = r"mlp 128\|0 .*gradient|reduce_haar (192 L3|128 L1 gradients)$"


def mlp_launches(
    dtype: torch.dtype,
    products: str,
    a: int = 192,
    b: int = 96,
    k: int = 384,
    o: int = 192,
    little_shared: bool = False,
) -> Iterator[tuple[str, Launch]]:
    """The kernels of a Waveblock's middle level, with the tiles and forms of chips that multiply matrices so."""
    rows = 65536
    x, second, g = (meta(rows, width, dtype=dtype) for width in (a, b, o))
    given = mlp.Mlp(
        x, second if b else None, *((meta(b), meta(b)) if b else (None, None)), meta(k, a + b, dtype=dtype),
        meta(k, dtype=dtype), meta(o, k, dtype=dtype), meta(o, dtype=dtype), 0.5, meta(1, dtype=torch.int64),
    )  # fmt: skip

    def config(kernel: str, each: int = 128) -> mlp_tiles.MlpConfig:
        tf32 = input_precision() == "tf32"
        return mlp_tiles.config_for(kernel, dtype.itemsize, a, b, k, o, products, tf32, little_shared, each)

    gs, name = second if b else None, f"mlp {a}|{b}"
    yield f"{name} forward", mlp.forward_launch(g, given, config("forward"))
    seen = {config("forward")}
    for each in (16, 32, 64):
        if (few := config("forward", each)) not in seen:
            seen.add(few)
            yield f"{name} forward, {each} pixels each", mlp.forward_launch(g, given, few)
    if choose.pointwise_mlp(dtype, a + b, o, True, little_shared) == "kept":
        yield f"{name} hidden layer", mlp_hidden.launch(g, given, config("hidden"))[0]
        if b:
            norm = mlp_normed.Norm(meta(b), meta(b), meta(b, dtype=dtype), meta(b, dtype=dtype))
            yield f"{name} hidden layer behind a norm", mlp_hidden.launch(g, given, config("hidden"), norm)[0]
            dw1, db1 = meta(k, a + b, dtype=dtype), meta(k, dtype=dtype)
            yield f"sums of a norm, {name}", mlp_normed.line_launch(dw1, db1, meta(k), given, norm)[0]
    else:
        yield f"{name} input gradient", mlp_backward.backward_x_launch(x, gs, g, given, config("input"))[0]
        (launch,), _ = mlp_backward.backward_weight_launches(g, given, config("weight"))
        yield f"{name} weights' gradients", launch
    if dtype.itemsize == 4:
        return  # whose products are never the library's
    hidden, hidden_grad = (meta(rows, k, dtype=dtype) for _ in range(2))
    yield f"{name} between, forward", mlp_products.between_launch(hidden, None, given)[0]
    yield f"{name} between, backward", mlp_products.between_launch(hidden, hidden_grad, given)[0]


def reduction_launches(
    dtype: torch.dtype, c: int, levels: int, products: str, last: bool = True, forward: bool = False
) -> Iterator[tuple[str, Launch]]:
    """All gradients, and what precedes them, with the tiles of chips that multiply matrices so."""
    x, weight, bias = meta(64, c, 64, 64, dtype=dtype, last=last), meta(c // 4, c, dtype=dtype), meta(c // 4)
    zs = [meta(64, c, 64 >> level, 64 >> level, dtype=dtype, last=True) for level in range(1, levels + 1)]
    name = f"reduce_haar {c} L{levels}{'' if last else ' of rows'}"
    if forward:
        yield name, reductions.launch(zs, x, weight, bias.to(dtype), True)
    config = backward_config_for(dtype.itemsize, levels, c // 4, c, not last, products)
    yield f"{name} gradients", reductions_backward.launch(x, zs, x, weight, x, True, config)[0]


def narrow_launches(dtype: torch.dtype, products: str, c: int) -> Iterator[tuple[str, Launch]]:
    """The kernels of a narrow WaveMix-Lite that stand for the ones above."""
    x, z = meta(64, c, 32, 32, dtype=dtype, last=True), meta(64, c, 16, 16, dtype=dtype, last=True)
    weight, bias = meta(c // 4, c, dtype=dtype), meta(c // 4, dtype=dtype)
    yield f"reduce_haar {c} narrow", reductions_narrow.launch(z, x, weight, bias)
    config = narrow_config_for(c, True, products)
    yield f"reduce_haar {c} narrow gradients", reductions_narrow.backward_launch(x, z, x, weight, x, True, config)[0]
    if mlp_tiles.runs_together(dtype.itemsize, c, 0, 2 * c, c):
        rows, *weights = (meta(*s, dtype=dtype) for s in ((16384, c), (2 * c, c), (2 * c,), (c, 2 * c), (c,)))
        given = mlp.Mlp(rows, None, None, None, *weights, 0.5, meta(1, dtype=torch.int64))
        yield f"mlp {c}|0 all gradients", mlp_narrow.backward_launch(rows, rows, rows, given)[0]


def waveblock_point(name: str, arch: int, dtype: torch.dtype, launch: Launch, tf32: bool = False) -> Point:
    """Halves and TF32 multiply by tensor cores; rows are not loaded pixel by pixel."""
    half_on_hopper = (arch, dtype) == (90, HALF)
    products, never = [], []
    if name.startswith(("mlp", "reduce_haar")) and "between" not in name and (dtype == HALF or tf32):
        products.append("H?GMMA|HMMA|UTCHMMA")
    # Products of a warp group have 64 rows.
    if half_on_hopper and re.search(r"mlp .* (forward(?!, 16)|input gradient)", name) and "between" not in name:
        products.append("HGMMA")
    if dtype == HALF and re.search(r"192 L(3 of rows|[12] of rows gradients)$", name):
        never.append(r"LDG\b.*\.[US](8|16)\b")
    two = half_on_hopper and re.search(TWO_BLOCKS, name) is not None
    # A pixel of 8 halves is 16 bytes, which two threads may share.
    wide = WIDE.replace("128", "(64|128)") if re.match(r"(reduce_haar|mlp) 8\b", name) else WIDE
    accesses = () if name == "batch_norm pool line" else (wide,)  # values of a few channels, 16 to 32 bytes apart
    demands = Demands(blocks=2 if two else 1, accesses=accesses, products=tuple(products), never=tuple(never))
    return Point(("tf32 " if tf32 else "") + name, arch, dtype, launch, demands)


def waveblock_points() -> Iterator[Point]:
    def on(arch: int, launches: Iterable[tuple[str, Launch]], dtype: torch.dtype = HALF, tf32: bool = False) -> Any:
        return (waveblock_point(name, arch, dtype, launch, tf32) for name, launch in launches)

    for arch in (80, 100):
        yield from on(arch, mlp_launches(HALF, "tcgen05" if arch == 100 else "mma"))
    for arch, products in ((80, "mma"), (90, "wgmma"), (100, "tcgen05"), (120, "mma")):
        for c in (128, 64):
            yield from on(arch, mlp_launches(HALF, products, c, 0, 4 * c, c, arch == 120))
    # A second input on tiles of two sizes.
    yield from on(90, mlp_launches(HALF, "wgmma", 128, 64, 256, 128))
    yield from on(120, mlp_launches(HALF, "mma", 64, 32, 128, 64, True))
    for arch, levels, products in ((80, 4, "mma"), (90, 3, "wgmma"), (100, 2, "tcgen05"), (120, 1, "mma")):
        yield from on(arch, reduction_launches(HALF, 192, levels, products, False))
    for c, levels in ((192, 3), (128, 1)):
        yield from on(90, reduction_launches(HALF, c, levels, "wgmma"))
    for arch, products in ((80, "mma"), (90, "wgmma"), (100, "tcgen05"), (120, "mma")):
        for c in (8, 32 if arch < 100 else 16):
            yield from on(arch, narrow_launches(HALF, products, c))
    yield from on(90, narrow_launches(torch.bfloat16, "wgmma", 16), torch.bfloat16)
    with products_in("tf32"):
        made = [*reduction_launches(torch.float32, 192, 1, "wgmma", forward=True)]
        made += mlp_launches(torch.float32, "wgmma")
    yield from on(90, made, torch.float32, tf32=True)
    for dtype in (HALF, torch.float32):
        yield from on(90, middle_launches(dtype, 192, 3), dtype)


def middle_launches(dtype: torch.dtype, c: int, levels: int) -> Iterator[tuple[str, Launch]]:
    x, rows = meta(64, c, 64, 64, dtype=dtype, last=True), meta(64, c, 64, 64, dtype=dtype)
    weight, bias = meta(c // 4, c, dtype=dtype), meta(c // 4, dtype=dtype)
    reduced = meta(64, c // 4, 64, 64, dtype=dtype, last=True)
    zs = [meta(64, c, 64 >> level, 64 >> level, dtype=dtype, last=True) for level in range(1, levels + 1)]
    lows, highs = zip(*map(haar_pyramid._parts, zs), strict=True)
    yield "haar_pyramid", triton_analysis.launch(reduced, lows[-1], highs, lows=lows[:-1])
    yield "haar_pyramid backward", triton_synthesis.launch(reduced, lows[-1], highs, lows=lows[:-1])
    yield f"reduce_haar {c} L{levels}", reductions.launch(zs, x, weight, bias, True)
    yield f"reduce_haar {c} L{levels} of rows", reductions.launch(zs, rows, weight, bias, True)
    yield from mlp_launches(dtype, "wgmma")
    stats, partial = norms.stats_launch(x)
    yield "batch_norm stats", stats
    yield "batch_norm statistics", norm_finish.statistics_launch(partial, meta(c), meta(c), 1e-5)[0]
    reduce, partial = norms.reduce_launch(x, x, meta(c), meta(c))
    yield "batch_norm reduce", reduce
    weight, count = meta(c, dtype=dtype), x[:, :1].numel()
    yield "batch_norm line", norm_finish.line_launch(partial, meta(c), meta(c), weight, count, True, False)[0]
    yield "batch_norm image line", norm_finish.image_line_launch(meta(2, 7, 64, c), meta(64), weight, count, True)[0]
    parts = (meta(11, 384, 288), meta(11, 384), meta(11, 192, 384), meta(2048, 192))
    yield "sums", triton_sums.finish_launch(*((meta(*part.shape[1:], dtype=dtype), part) for part in parts))
    yield "batch_norm affine", norms.affine_launch(x, x, meta(c), meta(c), rows)
    gelu = norms.stats_launch(x, gelu=True)[0], norms.reduce_launch(x, x, meta(c), meta(c), gelu=True)[0]
    yield from zip(("batch_norm stats of gelu", "batch_norm reduce of gelu"), gelu, strict=True)
    yield "batch_norm affine of gelu", norms.affine_launch(x, x, meta(c), meta(c), gelu=True)
    yield "batch_norm affine by gelu", norms.affine_launch(x, x, meta(c), meta(c), x, meta(c), gelu=True)
    pool, each, means = norm_pooled.pool_launch(x, meta(c), meta(c), x)
    yield "batch_norm pool", pool
    yield "batch_norm pool line", norm_pooled.line_launch(each, means, meta(c), meta(c), weight, 64 * 64)[0]
    of_images = norms.affine_launch(x, each.expand(x.shape), meta(c), meta(c), x, meta(c))
    yield "batch_norm affine of images", of_images


@functools.cache
def points() -> list[Point]:
    families = (
        deconv_points,
        waveblock_points,
        haar_points,
        haar_blocks_points,
        dwt_points,
        wtconv_points,
        patm_points,
        branch_weights_points,
        pre_norm_points,
    )
    return [point for family in families for point in family()]
