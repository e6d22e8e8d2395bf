"""Bytes that each operator moves through device memory in a training step, counted and not measured.

``python -m benchmarks traffic`` prints the table. A dispatch mode sees every operator of PyTorch's and of this package,
on fake tensors: nothing is computed, no device is needed, and the sequence is that of a GPU. The count assumes

- an operator reads each input from memory once and writes each output once, parameters and statistics included, and
  what a kernel reads again while it works comes from a cache, as what it makes for itself of one image at a time does
  (`patm_whole`: 2 sizes of the image a thread forward, 5 backward; 4 MB at 64 channels, 56x56);
- views, metadata and allocation cost nothing; a broadcast tensor costs the elements that it has; an operator in place
  reads and writes, unless it only overwrites;
- partial sums, 25 MB at most, stay in L2 between the kernel that makes them and the one that adds them up;
- an operator is one kernel, except for those of this package that are several: `PLANS` says which, and why. PyTorch's
  own are one kernel each even where cuDNN makes several (batch normalisation in training reads its input twice, a
  convolution's backward the gradient up to three times), for upstream and for us alike: upstream's totals, which are
  all of such operators, are lower bounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common.dtypes import MULTIPLIED

from .rivals import Unavailable, UpstreamPATM, UpstreamWaveblock, upstream_wavelets


def footprint(tensor: Tensor) -> int:
    """Bytes of the elements that `tensor` has in memory: a broadcast dimension has one."""
    sizes = (min(n, 1) if stride == 0 else n for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.element_size() * math.prod(sizes)


# --- What the kernels of this package read or write beyond "each input and output once" ------------------------

Tensors = Sequence[Tensor | None]


def _batch_norm_backward(result: Any, grad: Tensor, x: Tensor, *_: Any) -> Tensors:
    """The sums over the batch have to be complete before the first gradient can be written: both are read again."""
    return grad, x


def _phase_aggregate_backward(result: Any, *arguments: Any) -> Tensors:
    """A second pass for batch statistics: it reads theta and its gradient so far, and writes the latter."""
    theta_h, theta_w, mean = arguments[6], arguments[7], arguments[14]
    return () if mean is None else (theta_h, theta_w) * 3


def _deconv_norm_gradients(result: Any, grad: Tensor, y: Tensor, *_: Any) -> Tensors:
    """The sums over the batch come first here too; then one pass makes both gradients."""
    return grad, y


def _patm_whole(result: Any, x: Tensor, *_: Any) -> Tensors:
    """Branch weights need a whole image before its first output: x is read once for each."""
    return (x,)


def _patm_whole_backward(result: Any, *arguments: Any) -> Tensors:
    """x is read twice here too. The gradient through batch statistics reads x again and adds to the image's."""
    x, batch_statistics = arguments[6], arguments[2] is not None
    return (x, x, *(result[0],) * 2) if batch_statistics else (x,)


def _patm_whole_backward_on_a_gpu(result: Any, grad: Tensor, *arguments: Any) -> Tensors:
    """The branch weights' gradient needs whole images before the first one of x: x and grad are read for each. The
    gradients of the five projections are written, and read with x for the last two."""
    x = arguments[5]
    return (x, x, grad, *(x,) * 10)


def _mlp_backward_on_a_gpu(result: Any, grad: Tensor, x: Tensor, second: Tensor | None, *_: Any) -> Tensors:
    """One kernel makes the inputs' gradients, and the output where it is asked for; another all weights' gradients."""
    return grad, x, second


def _normed_mlp_backward(result: Any, grad: Tensor, x: Tensor, y: Tensor, *_: Any) -> Tensors:
    """The MLP's two kernels; the gradient of the norm's output is read again with y, for that of y."""
    return grad, x, y, y, y


def _deconv_stats_on_a_gpu(result: Any, *_: Any) -> Tensors:
    """The statistics are a pass of their own over the library's output."""
    return (result[0],)


@dataclass(frozen=True)
class Plan:
    """The kernels that are counted.

    Attributes:
        dtype: dtype of images and parameters; it decides which kernels serve.
        whole_patm: up to how many channels PATM is taken from end to end.
        again: operator -> the tensors that its kernels read or write once more, from its result and arguments.
        blocks: the plan is counted for blocks whose names begin so.
    """

    dtype: torch.dtype
    whole_patm: int
    again: dict[str, Callable[..., Tensors]]
    blocks: str = ""


_ALWAYS: dict[str, Callable[..., Tensors]] = {
    "wavemix_kernels::batch_norm_backward": _batch_norm_backward,
    "wavemix_kernels::gelu_batch_norm": lambda result, x, *_: (x,),  # for the statistics
    "wavemix_kernels::gelu_batch_norm_backward": _batch_norm_backward,
    "wavemix_kernels::phase_aggregate_backward": _phase_aggregate_backward,
    "wavemix_kernels::pre_norm_backward": _batch_norm_backward,
    "wavemix_kernels::deconv_norm_backward": _deconv_norm_gradients,
    "wavemix_kernels::patm_whole": _patm_whole,
    "wavemix_kernels::patm_whole_backward": _patm_whole_backward,
}
_TRITON = _ALWAYS | {
    "wavemix_kernels::pointwise_mlp_backward": _mlp_backward_on_a_gpu,
    "wavemix_kernels::normed_mlp_backward": _normed_mlp_backward,
}
PLANS = {
    # The compiled kernels of the CPU: what is measured there is what is counted here.
    "cpu": Plan(torch.float32, choose.WHOLE, _ALWAYS),
    # `auto` takes half types in cuDNN's transposed convolution, with BatchNorm's passes of their own around it.
    "gpu": Plan(
        torch.bfloat16,
        choose.WHOLE,
        _TRITON
        | {
            "wavemix_kernels::deconv_stats": _deconv_stats_on_a_gpu,
            "wavemix_kernels::patm_whole_backward": _patm_whole_backward_on_a_gpu,
        },
    ),
    # Every op in Triton, by name. The operators are those of the CPU in float32, whose kernels also make BatchNorm's
    # statistics as they write y and its backward as they read; the sizes in bfloat16 are half of everything.
    # The gradients of the transposed convolution are one launch, ordered by image: programs that read the same pixels
    # are neighbours in the grid, and what one has read the other finds in L2. Those of the reduction are one kernel.
    "triton": Plan(torch.float32, 0, _TRITON, "Waveblock"),
}

_ALLOCATIONS = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
# The first is a view whose schema does not say so, the second a question to a fake tensor.
_FREE = _ALLOCATIONS | {"aten::_unsafe_view", "prim::device"}
_OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::mm", "aten::addmm"}  # the last two: out=


def bytes_moved(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, plan: Plan) -> int:
    """Bytes that one call of an operator reads and writes, by the rules above."""
    schema = func._schema
    made = [result] if len(schema.returns) == 1 else list(result or ())
    aliased = [described.alias_info for described in schema.returns]
    if schema.name in _FREE or (aliased and all(alias is not None and not alias.is_write for alias in aliased)):
        return 0
    named = {described.name: described for described in schema.arguments}
    given = dict(zip(named, args, strict=False)) | kwargs
    moved = 0
    for name, value in given.items():
        if schema.name.endswith("_like") or schema.name.startswith("aten::new_"):
            break  # a shape is asked for, no value
        alias = named[name].alias_info
        in_place = alias is not None and alias.is_write and schema.name not in _OVERWRITES
        moved += _size(value) * (2 if in_place else 1)
    if schema.name == "aten::convolution_backward":
        # The input's gradient needs no input, the weight's no weight.
        need_input, need_weight, _ = given["output_mask"]
        moved -= (0 if need_weight else _size(given["input"])) + (0 if need_input else _size(given["weight"]))
    moved += sum(_size(value) for value, alias in zip(made, aliased, strict=True) if alias is None)
    if schema.name in plan.again:
        moved += _size(plan.again[schema.name](result, *args))
    return moved


def _size(value: Any) -> int:
    return sum(footprint(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


# --- Counting -------------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Adds up `bytes_moved` by operator, where `moved` is a dictionary to add to."""

    def __init__(self, moved: dict[str, int], plan: Plan) -> None:
        super().__init__()
        self._moved, self._plan = moved, plan

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        self._moved[name] = self._moved.get(name, 0) + bytes_moved(func, args, kwargs or {}, result, self._plan)
        return result


@dataclass(frozen=True)
class Traffic:
    """Bytes moved in a training step by operator, in sizes of its input."""

    forward: dict[str, float]
    backward: dict[str, float]

    @property
    def totals(self) -> tuple[float, float]:
        return sum(self.forward.values()), sum(self.backward.values())


def traffic(
    build: Callable[[], Callable[[Tensor], Tensor]], size: Sequence[int], plan: Plan, *, channels_last: bool
) -> Traffic:
    """Traffic of a step of `build`'s module or function on an input of `size`: its output, and all gradients.

    Args:
        build: called on fake tensors; a module in training mode, or a function.
    """
    passes: list[dict[str, int]] = [{}, {}]
    order = torch.channels_last if channels_last else torch.contiguous_format
    with FakeTensorMode(), _serving(plan):  # made in it: a fake parameter cannot change its dtype
        step = build()
        parameters = list(step.parameters()) if isinstance(step, nn.Module) else []
        x = torch.empty(size).to(memory_format=order).requires_grad_()
        with Counter(passes[0], plan):
            out = step(x)
        cotangent = torch.empty_like(out)
        with Counter(passes[1], plan):
            torch.autograd.grad(out, [x, *parameters], cotangent)
        unit = footprint(x)
    forward, backward = ({name: count / unit for name, count in one.items()} for one in passes)
    return Traffic(forward, backward)


@contextmanager
def _serving(plan: Plan) -> Iterator[None]:
    before, new = (torch.get_default_dtype(), choose.WHOLE), {plan.dtype} - MULTIPLIED
    torch.set_default_dtype(plan.dtype)
    choose.WHOLE = plan.whole_patm
    MULTIPLIED.update(new)  # a GPU multiplies them, whatever this CPU does
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        choose.WHOLE = before[1]
        MULTIPLIED.difference_update(new)


class _DeviceDropout(nn.Dropout):
    """Dropout as one operator with a mask of bytes, as CUDA has it; PyTorch's own on a CPU is three."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, self.training)[0] if self.p > 0 else x


def as_on_a_gpu(module: nn.Module) -> nn.Module:
    """The module with the operators that a GPU has for it."""
    for name, part in module.named_modules():
        if type(part) is nn.Dropout:
            module.set_submodule(name, _DeviceDropout(part.p))
    return module


class _Residual(nn.Module):
    """A Waveblock as the models run it: its input added to its output, ours in the pass that normalises."""

    def __init__(self, block: nn.Module, fused: bool) -> None:
        super().__init__()
        self.block, self.fused = block, fused

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, residual=True) if self.fused else self.block(x) + x


def _waveblock(level: int, ours: bool) -> nn.Module:
    from wavemix_kernels import FusedWaveblock

    config: dict[str, Any] = {"level": level, "mult": 2, "ff_channel": 192, "final_dim": 192, "dropout": 0.5}
    if ours:
        return _Residual(FusedWaveblock(**config), True)
    return as_on_a_gpu(_Residual(UpstreamWaveblock(**config), False))


def _patm(ours: bool) -> nn.Module:
    from wavemix_kernels import FusedPATM

    return FusedPATM(64) if ours else as_on_a_gpu(UpstreamPATM(64))


@dataclass(frozen=True)
class Budget:
    """A block whose traffic is counted.

    Attributes:
        build: called with whether ours is wanted, or upstream's.
        size: of its input. Few images would let the weights' bytes show.
        forward, backward: the budget of the fused plan, in sizes of the input.
    """

    build: Callable[[bool], nn.Module]
    size: tuple[int, int, int, int]
    forward: float
    backward: float


_WIDE = (64, 192, 64, 64)
BUDGETS = {
    "Waveblock L1, C=192": Budget(functools.partial(_waveblock, 1), _WIDE, 6.5, 12.0),
    "Waveblock L3, C=192": Budget(functools.partial(_waveblock, 3), _WIDE, 7.5, 13.0),
    "Waveblock L4, C=192": Budget(functools.partial(_waveblock, 4), _WIDE, 7.6, 13.5),
    "PATM fc, C=64": Budget(_patm, (64, 64, 56, 56), 5.0, 16.1),  # 16 on a GPU, see above
}


def count(name: str, plan: str) -> Traffic:
    """Traffic of a block of `BUDGETS` by one of `PLANS`, in channels_last as the models run it, or by "upstream".

    Raises:
        Unavailable: upstream's wavelets are not installed.
    """
    budget = BUDGETS[name]
    if plan == "upstream":
        upstream_wavelets()  # imported outside of the fake tensors
        return traffic(lambda: budget.build(False), budget.size, PLANS["gpu"], channels_last=False)
    return traffic(lambda: budget.build(True), budget.size, PLANS[plan], channels_last=True)


def report() -> str:
    """The table that ``benchmarks traffic`` prints: per block, every operator of ours that moves 0.01 input sizes."""
    lines = ["bytes moved in a training step, in sizes of the block's input (cpu: float32; others: bfloat16)"]
    for name, budget in BUDGETS.items():
        size = "x".join(map(str, budget.size))
        for plan in (plan for plan in PLANS if name.startswith(PLANS[plan].blocks)):
            lines += ["", f"{f'{name}, {size}, {plan}':<50}{'forward':>8}  {'backward':>8}"]
            ours = count(name, plan)
            for operator in dict.fromkeys([*ours.forward, *ours.backward]):
                forward, backward = ours.forward.get(operator, 0.0), ours.backward.get(operator, 0.0)
                if max(forward, backward) >= 0.01:
                    lines.append(_line(operator, forward, backward))
            lines.append(_line("ours", *ours.totals))
        lines.append(_line("budget", budget.forward, budget.backward))
        try:
            lines.append(_line("upstream", *count(name, "upstream").totals))
        except Unavailable as reason:
            lines.append(f"  upstream: {reason}")
    return "\n".join(lines)


def _line(what: str, forward: float, backward: float) -> str:
    return f"  {what:<48}{forward:>8.2f}  {backward:>8.2f}"
