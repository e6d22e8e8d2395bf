"""The backend "triton" of ops/dwt/op.py: one level on allocated tensors, in as few passes as filters and mode allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from wavemix_kernels.ops.common.dtypes import accumulate_dtype
from wavemix_kernels.ops.dwt import triton_images, triton_lines
from wavemix_kernels.ops.dwt.tiles import ONE_PASS


def check_sizes(sizes: Sequence[int], mode: str) -> None:
    if mode in ("reflect", "antireflect") and 1 in sizes:
        axis = "H" if len(sizes) == 2 and sizes[0] == 1 else "W"
        raise ValueError(
            f"mode={mode!r}: a level meets a single sample along {axis}, which has nothing to reflect; use fewer "
            f"levels or mode='symmetric'"
        )


def run(
    analysis: bool, image: Tensor, low: Tensor, high: Tensor | None, filters: Sequence[Tensor], mode: str,
    first_sample: Callable[[int, str], int],
) -> None:  # fmt: skip
    """Writes the bands from the image, or the transpose the other way.

    Args:
        image: (N, C, H, W), or (N, C, L), any strides. Half types compute in fp32.
        low, high: (N, C, h, w) and (N, C, 3, h, w); without the bands' axis where only H, or L, is transformed. Of a
            transpose `high` may be None.

    Raises:
        ValueError: mode "reflect" or "antireflect" at a size of 1.
    """
    if image.numel() == 0:
        return
    exact = accumulate_dtype(image.dtype)
    taps = [f.detach().to(exact).flatten().contiguous() for f in filters]
    starts = [first_sample(f.numel(), mode) for f in taps[::2]]
    if len(taps) == 2:
        if image.ndim == 3:
            image, low, high = image.unsqueeze(2), low.unsqueeze(2), None if high is None else high.unsqueeze(2)
        else:
            image, low, high = image.mT, low.mT, None if high is None else high.mT
        check_sizes(image.shape[-1:], mode)
        _line(analysis, image, low, high, taps, starts[0], mode)
        return
    check_sizes(image.shape[2:], mode)
    if max(f.numel() for f in taps) <= ONE_PASS and _in_one_pass(analysis, image, mode):
        image, low = (t if t.stride(-1) == 1 else t.contiguous() for t in (image, low))
        high = high if high is None or high.stride(-1) == 1 else high.contiguous()
        triton_images.launch(analysis, image, low, high, taps, (starts[1], starts[0]), mode).run(image)
        return
    rows = image.new_empty((2, *image.shape[:3], low.shape[3]), dtype=exact)
    bands = [low, *(high.unbind(2) if high is not None else (None,) * 3)]

    def along_h(i: int) -> None:
        other = bands[2 * i + 1]
        _line(analysis, rows[i].mT, bands[2 * i].mT, None if other is None else other.mT, taps[2:], starts[1], mode)

    halves: Any = (0, 1) if high is not None else (0,)
    if not analysis:
        for i in halves:
            along_h(i)
    _line(analysis, image, rows[0], rows[1] if high is not None else None, taps[:2], starts[0], mode)
    if analysis:
        for i in halves:
            along_h(i)


def _in_one_pass(analysis: bool, image: Tensor, mode: str) -> bool:
    if analysis:
        return mode not in triton_lines.LINEAR
    return mode == "zero" or (mode == "periodization" and all(n % 2 == 0 for n in image.shape[2:]))


def _line(
    analysis: bool, image: Tensor, low: Tensor, high: Tensor | None, taps: Sequence[Tensor], start: int, mode: str
) -> None:
    triton_lines.launch(analysis, image, low, high, (taps[0], taps[1]), start, mode).run(image)
