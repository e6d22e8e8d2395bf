"""Convolutions folded into one against the convolutions one after the other, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.contract import Case, pairwise
from tests.tolerances import DTYPES, assert_within, sum_bound
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import plan
from wavemix_kernels.ops.common.kept import Kept
from wavemix_kernels.ops.common.layout import memory_format
from wavemix_kernels.ops.common.precision import products_in
from wavemix_kernels.ops.stem import blocks, folding, op, patches
from wavemix_kernels.ops.stem.geometry import Convolution, geometry

#: Channels, then kernel, stride and padding of each convolution.
STEMS = {
    "patches": ((3, 4, 6, 5), ((3, 1, 1), (3, 1, 1), (4, 4, 0))),
    "strided": ((3, 4, 6), ((3, 2, 1), (3, 2, 1))),
    "plain": ((1, 5, 7), ((3, 1, 1), (3, 1, 1))),
    "uneven": ((2, 3, 4, 5), ((5, 2, 3), (3, 3, 2), (2, 1, 0))),
    "overhang": ((2, 3, 4), ((2, 1, 0), (4, 1, 3))),
}
CASES = pairwise(
    stem=tuple(STEMS), dtype=DTYPES, size=((2, 12, 16), (1, 9, 13), (1, 5, 31)), layout=("nchw", "channels_last"),
    bias=(True, False), way=("patches", "blocks"),
)  # fmt: skip


def chain(x: Tensor, parameters: Sequence[Tensor | None], shapes: Sequence[tuple[int, int, int]]) -> Tensor:
    for i, (_, stride, padding) in enumerate(shapes):
        weight = parameters[2 * i]
        assert weight is not None
        x = F.conv2d(x, weight, parameters[2 * i + 1], stride, padding)
    return x


def results(out: Tensor, grad: Tensor, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, [t for t in tensors if t is not None], grad)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, device: str) -> None:
    """A result or gradient is a sum of products of x, the weights and g: absolute values give its size."""
    torch.manual_seed(0)
    channels, shapes = STEMS[case.stem]
    n, h, w = case.size
    tensors: list[Tensor | None] = [torch.randn(n, channels[0], h, w, dtype=case.dtype)]
    for (k, _, _), c, o in zip(shapes, channels, channels[1:], strict=False):
        tensors += [torch.randn(o, c, k, k, dtype=case.dtype), torch.randn(o, dtype=case.dtype) if case.bias else None]
    exact_in, sizes_in = ([None if t is None else f(t.double()).requires_grad_() for t in tensors]
                          for f in (torch.clone, torch.abs))  # fmt: skip
    exact = chain(exact_in[0], exact_in[1:], shapes)  # type: ignore[arg-type]
    g = torch.randn(exact.shape, dtype=case.dtype)
    first = 0 if case.way == "patches" else 1  # blocks give the image no gradient
    sizes = results(chain(sizes_in[0], sizes_in[1:], shapes), g.abs().double(), sizes_in[first:])  # type: ignore[arg-type]

    leaves: list[Any] = [None if t is None else t.to(device, copy=True) for t in tensors]
    if case.layout == "channels_last":
        leaves = [t if t is None or t.dim() < 4 else t.contiguous(memory_format=torch.channels_last) for t in leaves]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    x = leaves[0]
    convolutions = [
        Convolution(leaves[2 * i + 1], leaves[2 * i + 2], stride, padding)
        for i, (_, stride, padding) in enumerate(shapes)
    ]
    with products_in("ieee"):
        out = (patches if case.way == "patches" else blocks).folded(x, convolutions)
        made = results(out, g.to(device), leaves[first:])
    assert out.is_contiguous(memory_format=torch.channels_last)
    way = geometry(convolutions)
    # Terms of the longest sum: over pixels or channels and taps, and what folding adds up. Half types round the folded
    # weights or their gradients, one for each part of the border, and a pixel's gradient in every patch that has it.
    terms = (
        out[0, 0].numel() * n
        + way.window**2 * channels[-1]
        + sum(c * k * k for c, (k, _, _) in zip(channels, shapes, strict=False))
    )
    operands = 2 + 2 * -(-way.window // (way.stride * way.inner.stride))
    names = ["out", "x", *(f"{kind}{i}" for i in range(len(shapes)) for kind in ("weight", "bias")[: 1 + case.bias])]
    truth = results(exact, g.double(), exact_in[first:])
    for name, actual, right, size in zip(names[first:], made, truth, sizes, strict=True):
        assert actual.dtype == case.dtype
        assert_within(actual.cpu(), right, sum_bound(right, size, terms, case.dtype, operands=operands), name)
    if case.way == "blocks":  # as DistributedDataParallel wants them
        like = zip(made[1:], [t for t in leaves[1:] if t is not None], strict=True)
        assert all(actual.is_contiguous(memory_format=memory_format(t)) for actual, t in like if t.dim() == 4)


def test_when_it_runs() -> None:
    """By count of products, on a CPU; the rest is the library's."""

    def convolutions(dtype: torch.dtype = torch.float32, padding: int = 0, channels: int = 3) -> list[Convolution]:
        made = [torch.empty(o, c, k, k, dtype=dtype) for o, c, k in ((48, channels, 3), (96, 48, 3), (192, 96, 4))]
        return [Convolution(w, None, s, p) for w, s, p in zip(made, (1, 1, 4), (1, 1, padding), strict=True)]

    large, small = torch.empty(2, 3, 224, 224), torch.empty(1, 3, 32, 32)
    assert op.serves(large, convolutions())
    assert op.why_not(small, convolutions()) == "138719232 products as one, 62668800 apart"
    assert "float32" in str(op.why_not(large, convolutions(torch.float64)))
    assert "padding 1" in str(op.why_not(large, convolutions(padding=1)))
    assert "(48, 4, 3, 3)" in str(op.why_not(large, convolutions(channels=4)))
    assert "expected 2 or 3" in str(op.why_not(large, convolutions()[:1]))
    assert "0x0" in str(op.why_not(large[..., :3, :3], convolutions()))
    with torch.autocast("cpu", torch.bfloat16):
        assert op.serves(large.bfloat16(), convolutions())
    assert [choose.stem("cuda", 1, int(apart)) for apart in (24e9, 26e9)] == ["apart", "folded"]
    assert choose.stem("mps", 1, int(26e9)) == "apart"


def test_blocks_go_by_plans() -> None:
    torch.manual_seed(0)
    channels, shapes = STEMS["patches"]
    parameters = [torch.randn(o, c, k, k) for (k, _, _), c, o in zip(shapes, channels, channels[1:], strict=False)]
    leaves = [t.requires_grad_() for t in parameters]
    given = [Convolution(w, None, s, p) for w, (_, s, p) in zip(leaves, shapes, strict=True)]
    x = torch.randn(2, 3, 16, 16)

    def step() -> list[Tensor]:
        out = blocks.folded(x, given)
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    want = step()
    with plan.everywhere():
        made = [step() for _ in range(3)]
        kept = [plan.tables[f"_ByBlocks.{way}"].plans for way in ("forward", "backward")]
        assert [[callable(one) for one in plans.values()] for plans in kept] == [[True]] * 2
    for got in made:
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("way", [blocks, patches], ids=["blocks", "patches"])
def test_weights_are_folded_once(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again where a weight, the kind of image or its border is another."""
    torch.manual_seed(0)
    channels, shapes = STEMS["patches"]
    weights = [torch.randn(o, c, k, k) for (k, _, _), c, o in zip(shapes, channels, channels[1:], strict=False)]
    given = [Convolution(w, None, s, p) for w, (_, s, p) in zip(weights, shapes, strict=True)]
    folds: list[int] = []
    real = folding.taps_of
    monkeypatch.setattr(folding, "taps_of", lambda *arguments: folds.append(1) or real(*arguments))
    kept = Kept()

    def made(x: Tensor, times: int, of: Kept = kept) -> Tensor:
        folds.clear()
        out = way.folded(x, given, of)
        assert len(folds) == times
        torch.testing.assert_close(out, way.folded(x, given))
        return out

    x, other = torch.randn(2, 3, 16, 16), torch.randn(1, 3, 17, 15)
    before = made(x, 1)
    assert torch.equal(made(x, 0), before)
    made(torch.randn_like(x), 0)
    made(other, 1)
    weights[1].mul_(2)
    assert not torch.equal(made(x, 1), before)
    made(x.double().float(), 0)
    made(x, 1, copy.deepcopy(kept))
    made(x, 1, pickle.loads(pickle.dumps(kept)))
    with torch.inference_mode():
        made(x, 0)
    weights[0].data = weights[0].data.clone()  # as Module.to does
    made(x, 1)
    weights[0].requires_grad_()
    made(x, 1)  # which has a gradient
    with torch.no_grad():
        made(x, 0)
    if way is patches:
        return
    with plan.everywhere(), torch.no_grad():
        results = [made(x, 0) for _ in range(3)]
        assert all(map(callable, plan.tables["stem_of_kept_weights"].plans.values()))
    assert torch.equal(results[0], results[2])
