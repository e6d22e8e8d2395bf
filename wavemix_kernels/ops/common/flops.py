"""FLOPs of the operators, for ``torch.utils.flop_counter.FlopCounterMode``: what the reference modules count.

Products and convolutions count, as PyTorch counts them, forward and backward. What a backward pass makes again does
not, nor do batch statistics: a step has the same FLOPs whatever a block keeps.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

from wavemix_kernels.ops.dwt.reference import coefficient_size

_COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]
#: The arguments of a call by their names, tensors as their shapes.
Shapes = Mapping[str, Any]


def _product(image: Shape, outputs: int) -> int:
    """A 1x1 convolution of an image (N, C, H, W)."""
    return 2 * prod(image) * outputs


def _mlp(a: Shapes) -> int:
    hidden, inputs = a["w1"][:2]
    n, _, h, w = a["x"]
    return _product((n, inputs + a["w2"][0], h, w), hidden)


def _deconv(weight: Shape, pixels: int) -> int:
    """A transposed convolution of so many pixels; each of its gradients takes as many."""
    return 2 * pixels * prod(weight)


def _pixels(image: Shape) -> int:
    return image[0] * image[2] * image[3]


def _taps(z: Shape, taps: Shape) -> int:
    """The 7-tap convolution of a wave, of twice the channels of its amplitude ``z``."""
    return 2 * _pixels(z) * prod(taps)


def _taps_backward(z: Shape, taps: Shape) -> int:
    # PyTorch counts the weight's gradient of a grouped convolution as if there was one group.
    return _taps(z, taps) * (1 + z[1])


def _both(of_one: Callable[[Shape, Shape], int], z: Shape, a: Shapes) -> int:
    return of_one(z, a["taps_h"]) + of_one(z, a["taps_w"])


def _branch_weights(images: int, a: Shapes) -> int:
    """An MLP of one pixel."""
    return 2 * images * (prod(a["fc1"]) + prod(a["fc2"]))


def _patm(a: Shapes, of_taps: Callable[[Shape, Shape], int], passes: int) -> int:
    """Whole PATM in mode "fc": six products of the image, the taps, and the branch weights."""
    n, channels = a["x"][:2]
    return passes * (6 * _product(a["x"], channels) + _branch_weights(n, a)) + _both(of_taps, a["x"], a)


def _dwt(image: Shape, low: Shape, filters: Sequence[Shape]) -> int:
    """A level along W makes two images, then along H four; along one axis alone it makes two."""
    taps = [prod(f) for f in filters[::2]]
    if len(taps) == 1:
        return 4 * prod(low) * taps[0]
    return 4 * prod(image[:-1]) * low[-1] * taps[0] + 8 * prod(low) * taps[1]


def _filter_banks(a: Shapes, image: Shape) -> int:
    """Like a level of analysis for each bank, on lattices (start, count, stride, step)."""
    filters = a["filters"]
    return sum(
        _dwt(image, (*image[:2], a["h"][i + 1], a["w"][i + 1]), filters[i : i + 4]) for i in range(0, len(filters), 4)
    )


def _dwt_analysis(a: Shapes) -> int:
    low = list(a["x"])
    for dim, f in zip((-1, -2) if len(a["filters"]) == 4 else (2,), a["filters"][::2], strict=True):
        low[dim] = coefficient_size(low[dim], prod(f), a["mode"])
    return _dwt(a["x"], low, a["filters"])


#: Operator -> its FLOPs. Where there is none it has no product, as Haar and the norms.
FORMULAS: dict[str, Callable[[Shapes], int]] = {
    "dwt_analysis": _dwt_analysis,
    "dwt_synthesis": lambda a: _dwt((*a["ll"][:2], *a["size"]), a["ll"], a["filters"]),
    "filter_banks": lambda a: _filter_banks(a, a["x"]),
    "filter_banks_transpose": lambda a: _filter_banks(a, (*a["ll"][0][:2], *a["size"])),
    "reduce_haar": lambda a: _product(a["x"], a["weight"][0]),
    "reduce_haar_backward": lambda a: 2 * _product(a["x"], a["weight"][0]),
    "norm_reduce_haar": lambda a: _product(a["x"], a["weight"][0]),
    "norm_reduce_haar_backward": lambda a: 2 * _product(a["image"], a["weight"][0]),
    "pointwise_mlp": _mlp,
    "pointwise_mlp_backward": lambda a: 2 * _mlp(a),
    "normed_mlp_backward": lambda a: 2 * _mlp(a),
    "channel_mlp": _mlp,
    "channel_mlp_backward": lambda a: 2 * _mlp(a),
    "deconv": lambda a: _deconv(a["weight"], _pixels(a["u"])),
    "deconv_residual": lambda a: _deconv(a["weight"], _pixels(a["u"])),
    "deconv_stats": lambda a: _deconv(a["weight"], _pixels(a["u"])),
    "deconv_backward_x": lambda a: _deconv(a["weight"], _pixels(a["grad"]) // 4),
    "deconv_backward_weight": lambda a: _deconv((a["u"][1], a["grad"][1], 4, 4), _pixels(a["u"])),
    "deconv_norm_backward": lambda a: 2 * _deconv(a["weight"], _pixels(a["u"])),
    "phase_aggregate": lambda a: _both(_taps, a["z_h"], a),
    "phase_aggregate_backward": lambda a: _both(_taps_backward, a["z_h"], a),
    "branch_weights": lambda a: _branch_weights(a["s"][0], a),
    "branch_weights_backward": lambda a: 2 * _branch_weights(a["mean"][0], a),
    "patm_whole": lambda a: _patm(a, _taps, 1),
    "patm_whole_backward": lambda a: _patm(a, _taps_backward, 2),
    "project_backward_weight": lambda a: _product(a["image"], a["grad"][1]),
}


def _formula(count: Callable[[Shapes], int], op: Any) -> Callable[..., int]:
    names = [argument.name for argument in op.default._schema.arguments]

    def flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return count(dict(zip(names, args, strict=False)) | kwargs)

    return flops


def _register(counter: ModuleType) -> None:
    for name, count in FORMULAS.items():
        op = getattr(torch.ops.wavemix_kernels, name)
        counter.register_flop_formula(op)(_formula(count, op))
    # oneDNN's product, which stands for 1x1 convolutions on a CPU (ops/common/products.py).
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is not None and linear not in counter.flop_registry:
        counter.register_flop_formula(linear)(lambda rows, weight, *_, out_shape=None, **__: 2 * prod(rows) * weight[0])


class _Import(importlib.abc.MetaPathFinder):
    """Registers the formulas when somebody imports the counter. To import it here would import Triton, which has to
    see TRITON_INTERPRET first."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register(module)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Once all operators are defined."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Import())


# --- Recomputation ---------------------------------------------------------------------------------------


def counted() -> list[tuple[Any, Any]] | None:
    """The counts of the counters at work so far, for :func:`forget_since`; None where nobody counts."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0 or _COUNTER not in sys.modules:
        return None
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    kind: Any = getattr(sys.modules[_COUNTER], "_FlopCounterMode", ())
    counters = [mode.counter for mode in _get_current_dispatch_mode_stack() if isinstance(mode, kind)]
    return [(c, {path: dict(by_op) for path, by_op in c.flop_counts.items()}) for c in counters]


def forget_since(before: list[tuple[Any, Any]] | None) -> None:
    """Takes back what was counted after :func:`counted`, where the reference has no product for it."""
    for counter, counts in before or ():
        for path, by_op in counter.flop_counts.items():
            for op in by_op:
                by_op[op] = counts.get(path, {}).get(op, 0)
