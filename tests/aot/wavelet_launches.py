"""Launches of the wavelets' Triton kernels for :mod:`tests.aot.triton_launches`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from tests.aot.points import HALF, Point, meta
from tests.aot.table import Demands
from wavemix_kernels.ops.dwt import triton_bank, triton_images, triton_lines, triton_quads
from wavemix_kernels.ops.haar import blocks as haar_blocks
from wavemix_kernels.ops.haar import triton_analysis, triton_blocks, triton_plan, triton_synthesis
from wavemix_kernels.ops.haar.tiles import MAX_LEVELS, TileConfig, config_for, search_space
from wavemix_kernels.ops.wtconv import triton as wtconv
from wavemix_kernels.ops.wtconv import triton_weights as wtconv_weights

BIG = (64, 192, 64, 64)  # dense, every size and stride a multiple of a vector at all levels
ODD = (3, 35, 55, 57)


# --- Haar ----------------------------------------------------------------------------------------------------


def haar_image(layout: str, dtype: torch.dtype, *shape: int) -> Tensor:
    if layout == "strided":
        return meta(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    if layout == "rows":
        return meta(*shape, dtype=dtype)
    order = (0, 3, 4, 1, 2) if len(shape) == 5 else (0, 2, 3, 1)
    dense = meta(*(shape[axis] for axis in order), dtype=dtype)
    return dense.permute([order.index(axis) for axis in range(len(shape))])


def haar_point(
    arch: int, dtype: torch.dtype, layout: str, levels: int, synthesis: bool,
    config: TileConfig | None = None, shape: tuple[int, ...] = BIG, edge: int = 0, add: bool = False,
) -> Point:  # fmt: skip
    """Aligned images move in 16-byte accesses: all of level 1; of deeper transforms the finest level at least, whose
    share is three quarters. Level 1 exchanges nothing between threads, but for the row-major synthesis, which stores
    whole rows through shared memory."""
    bands = [triton_plan.band_shape(shape, level) for level in range(1, levels + 1)]
    image = functools.partial(haar_image, layout, dtype)
    tensors = image(*shape), image(*shape[:2], *bands[-1][3:]), [image(*band) for band in bands]
    if synthesis:
        launch = triton_synthesis.launch(*tensors, edge=edge, add=image(*shape) if add else None, config=config)
    else:
        launch = triton_analysis.launch(*tensors, edge=edge, config=config)
    demands = Demands(accesses=())
    if shape == BIG and layout != "strided":
        local = levels == 1 and not (layout == "rows" and synthesis)
        demands = Demands(
            accesses=(r"LDG\b.*\.128", r"STG\b.*\.128"), only_wide=levels == 1,
            never=(r"BAR\.SYNC",) if local else (), most_shared=0 if local else None,
        )  # fmt: skip
    c, direction = launch.constants, "synthesis" if synthesis else "analysis"
    name = f"haar {layout} L{levels} {direction} {c['ROWS']}x{c['COLS']}x{c['PLANES']}{' + add' if add else ''}"
    return Point(name, arch, dtype, launch, demands)


def haar_points() -> Iterator[Point]:
    """fp16 on sm_90: the default tile in both directions, the largest other tile of the search space in one of them.
    The default tiles of the other chips, dtypes and cases."""
    both, dense = (False, True), ("rows", "channels")
    for layout in dense:
        for levels in range(1, MAX_LEVELS + 1):
            default = config_for(layout, levels, 2, BIG)
            others = (config for config in search_space(layout, levels, 2) if config != default)
            for synthesis in both:
                yield haar_point(90, HALF, layout, levels, synthesis)
            largest = max(others, key=lambda config: config.samples)
            yield haar_point(90, HALF, layout, levels, levels % 2 == 0, largest)
        yield haar_point(90, HALF, layout, 1, True, add=True)
    for synthesis in both:
        for layout, levels in (("rows", 1), ("channels", 4)):
            for arch in (80, 100, 120):
                yield haar_point(arch, torch.bfloat16, layout, levels, synthesis)
        for layout in dense:
            yield haar_point(90, torch.float32, layout, 1, synthesis)
            yield haar_point(90, torch.float64, layout, 3, synthesis)
        for layout in (*dense, "strided"):
            yield haar_point(90, torch.float32, layout, 2, synthesis, shape=ODD, edge=1)


def haar_blocks_points() -> Iterator[Point]:
    """Aligned volumes and images move in 16-byte accesses alone, in each layout of the bands."""
    made = [(90, HALF, "bands", False), (90, HALF, "channels", True), (90, torch.float32, "bands", True)]
    made += [(90, torch.float64, "batch", False)]
    made += [(arch, torch.bfloat16, "channels", False) for arch in (80, 100, 120)]
    for arch, dtype, layout, last in made:
        axes = (2, 3, 4) if dtype.itemsize == 2 else (3, 4)
        x = meta(8, 32, 8, 64, 64, dtype=dtype)
        x = x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3) if last else x
        bands = haar_blocks._empty_bands(x, axes, 0, layout)
        count = 2 ** len(axes)
        for analysis in (True, False):
            rule = axes, range(count), [0.5] * count, "zero", 0, False
            launch = triton_blocks.launch(analysis, x, bands, *rule)
            demands = Demands(accesses=(r"LDG\b.*\.128", r"STG\b.*\.128"), only_wide=True)
            order = "channels_last" if last else "nchw"
            name = f"haar_blocks {'analysis' if analysis else 'synthesis'} {layout} {order} {len(axes)}-D"
            yield Point(name, arch, dtype, launch, demands)


# --- Wavelets of any filters ---------------------------------------------------------------------------------


def dwt_points() -> Iterator[Point]:
    """Lanes take neighbouring coefficients, sample by sample: lines of any length are no whole vectors."""
    demands = Demands(accesses=())
    for arch, dtype in ((90, HALF), (80, torch.float32)):
        exact = torch.float32
        image, low = meta(8, 16, 64, 64, dtype=dtype), meta(8, 16, 33, 33, dtype=dtype)
        high, taps = meta(8, 16, 3, 33, 33, dtype=dtype), [meta(4, dtype=exact) for _ in range(4)]
        lines, bands = meta(64, 1, 32, 4096, dtype=dtype), [meta(64, 1, 32, 2049, dtype=dtype) for _ in range(2)]
        for analysis, way in ((True, "analysis"), (False, "synthesis")):
            launch = triton_images.launch(analysis, image, low, high, taps, (-2, -2), "zero")
            yield Point(f"dwt images {way}", arch, dtype, launch, demands)
            launch = triton_lines.launch(analysis, lines, *bands, (taps[0], taps[1]), -2, "symmetric")
            yield Point(f"dwt lines {way}", arch, dtype, launch, demands)
            coefficients = meta(8, 16, 4, 64, 64, dtype=dtype)
            # A tree's transpose writes its own samples, of which it takes one phase at a time.
            tree = ((-8, 16, 4, 2), image) if analysis else ((-4, 16, 2, 1), image[..., ::2, ::2])
            for name, length, (lattice, samples), mode in (
                ("bank", 8, ((-6, 64, 1, 2), image), "periodic"),
                ("tree", 10, tree, "symmetric" if analysis else "zero"),
            ):
                some = coefficients[..., : lattice[1], : lattice[1]]
                filters = [meta(length, dtype=exact) for _ in range(4)]
                launch = triton_bank.launch(
                    analysis, samples, some[:, :, 0], some[:, :, 1:], filters, lattice, lattice, mode
                )
                # On sm_90 ptxas keeps a little of a transpose in local memory, at one row as at sixteen; not on sm_80.
                allowed = Demands(accesses=(), most_local=0 if analysis or arch == 80 else 4)
                yield Point(f"dwt {name} {way}", arch, dtype, launch, allowed)
        for trees in (False, True):
            bands = meta(8, 16, 4, 64, 64, dtype=dtype)
            corners = [bands] * 4 if trees else [bands[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
            low, z = (
                meta(8, 16, *(128, 128) if trees else (64, 64), dtype=dtype),
                meta(8, 16, 6, *corners[0].shape[3:], 2, dtype=dtype),
            )
            for back in (False, True):
                name = f"quads {'from' if back else 'to'} complex {'trees' if trees else 'image'}"
                yield Point(name, arch, dtype, triton_quads.launch(back, corners, low, z, trees), demands)


# --- WTConv --------------------------------------------------------------------------------------------------


def wtconv_points() -> Iterator[Point]:
    """The finest level of a stage of 56x56, and how the sums of taps' gradients begin. Rows move by pairs of pixels."""
    for arch, dtype, last, size in (
        (80, HALF, True, 5),
        (90, torch.float32, False, 5),
        (100, torch.float32, True, 3),
        (120, HALF, False, 3),
    ):
        x, low = (meta(64, 96, side, side, dtype=dtype, last=last) for side in (56, 28))
        taps, order = meta(size, size, 4, 96), "channels_last" if last else "nchw"
        launches = {
            "level": wtconv.level_launch(x, x, low, x, taps),
            "weights": wtconv_weights.weights_launch(x, x, size, last)[0],
        }
        if arch == 90:
            launches["low"] = wtconv.low_launch(low, x)
        for name, launch in launches.items():
            # On sm_90 seven rows of fp32 sums want a few registers more than there are; fewer rows read more again.
            most = 4 if (arch, name) == (90, "level") else 0
            demands = Demands(accesses=(), most_local=most)
            yield Point(f"wtconv {size}x{size} {name} {order}", arch, dtype, launch, demands)
