"""Contracts: inputs of an op, its float64 truth and the error allowed, checked for every backend by one function.

A family's test file has a :class:`Contract` and `test_contract = each.case(contract)`, with each of tests/ops; what the
engine compares is every output and every gradient, on memory that holds NaN before a kernel writes it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerances import DTYPES, accumulation, assert_within, sum_bound
from wavemix_kernels.backends import triton_interpreted, triton_products_why_not

Tensors = dict[str, Tensor | None]
NAN = float("nan")

# ------------------------------------------------------------------------------------------------- covering sets


class Case(SimpleNamespace):
    """One combination of values; an axis that a contract does not have raises AttributeError."""

    def __str__(self) -> str:
        return "-".join(
            "x".join(map(str, v)) if isinstance(v, tuple) else str(v).removeprefix("torch.")
            for v in vars(self).values()
        )


def pairwise(**axes: Sequence[Any]) -> list[Case]:
    """Cases in which each pair of values of two axes occurs: as many as the two longest axes have pairs, or few more.

    Two axes fail together far more often than three do; hundreds of further combinations would say the same.
    """
    names = list(axes)
    if len(names) == 1:
        return [Case(**{names[0]: value}) for value in axes[names[0]]]
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(axes[a])), range(len(axes[b])))
    }
    order = sorted(missing, key=lambda pair: (pair[0][1] + pair[1][1], names.index(pair[0][0]), pair))
    cases = []
    for first in order:
        if first not in missing:
            continue
        row = dict(first)
        for name in names:
            if name not in row:
                row[name] = max(range(len(axes[name])), key=lambda i: _gain(row | {name: i}, names, missing))
        missing -= set(_pairs(row, names))
        cases.append(Case(**{name: axes[name][row[name]] for name in names}))
    return cases


def _pairs(row: Mapping[str, int], names: Sequence[str]) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    return itertools.combinations(((name, row[name]) for name in names if name in row), 2)


def _gain(row: Mapping[str, int], names: Sequence[str], missing: set[Any]) -> int:
    return sum(pair in missing for pair in _pairs(row, names))


def covering(values_of: Mapping[Any, set[Any]]) -> list[Any]:
    """A few of the keys, in their order, that have every value among them."""
    missing: set[Any] = set().union(*values_of.values())
    kept = set()
    while missing:
        most = max(values_of, key=lambda key: len(values_of[key] & missing))
        missing -= values_of[most]
        kept.add(most)
    return [key for key in values_of if key in kept]


def singles(**axes: Sequence[Any]) -> list[Case]:
    """Cases in which each value occurs."""
    most = max(map(len, axes.values()))
    return [Case(**{name: values[i % len(values)] for name, values in axes.items()}) for i in range(most)]


# -------------------------------------------------------------------------------------------------------- inputs

#: name -> (memory order, elements around the image by axis (before, after), step along w).
LAYOUTS: dict[str, tuple[str, dict[str, tuple[int, int]], int]] = {
    "nchw": ("ncbhw", {}, 1),
    "channels_last": ("nhwcb", {}, 1),
    "sliced": ("ncbhw", {"c": (1, 0), "h": (1, 1), "w": (1, 2)}, 2),  # odd offset, odd strides: nothing is aligned
    "cropped": ("ncbhw", {"h": (1, 1), "w": (1, 2)}, 1),  # unit stride along w, no row aligned
    "channels_slice": ("nhwcb", {"h": (1, 1), "w": (2, 1), "c": (3, 2)}, 1),  # of a larger channels_last image
    "transposed": ("ncbwh", {}, 1),
    "batch_inner": ("cbhwn", {}, 1),
}

#: name -> axis along which the last of a block lies more than 2**31 elements from the first, layout of the rest.
FAR = {"far": ("n", "channels_last"), "far_nchw": ("n", "nchw"), "far_channels": ("c", "nchw"),
       "far_bands": ("b", "nchw"), "far_rows": ("h", "channels_last"), "far_rows_nchw": ("h", "nchw"),
       "far_columns": ("w", "channels_last")}  # fmt: skip
APART = 2**31 + 64
#: The axes of an image in turn, and a type, for tests of offsets beyond 32 bits.
EVERY_AXIS = ("far", "far_nchw", "far_channels", "far_rows", "far_columns")
SHORT = dict.fromkeys(("cpu", "triton", "cuda"), (torch.float16,))
#: The same for families without CUDA kernels.
WITHOUT_CUDA = {backend: SHORT[backend] for backend in ("cpu", "triton")}
_places = itertools.cycle(range(0, 2**16, 2**12))


@functools.lru_cache(maxsize=1)
def _block(dtype: torch.dtype, device: str) -> Tensor:
    """Memory for all far images: the pages between are never touched."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < dtype.itemsize * (APART + 2**17):
        pytest.skip("not enough free GPU memory for 2**31 elements")
    size = APART + 2**17
    memory = torch.UntypedStorage(size * dtype.itemsize, device=device)  # which nothing fills with NaN
    return torch.empty(0, dtype=dtype, device=device).set_(memory, 0, (size,), (1,))


def image(values: Tensor, dtype: torch.dtype = torch.float64, device: str = "cpu", layout: str = "nchw") -> Tensor:
    """`values` (n, c, h, w) or (n, c, bands, h, w) in memory as `layout` says. NaN lies around a slice.

    "expanded" repeats the first image's first column by strides of zero.
    """
    if layout == "expanded":
        return values[:1, ..., :1].to(device, dtype).contiguous().expand(values.shape)
    letters = "ncbhw" if values.ndim == 5 else "nchw"
    if layout in FAR:
        axis, rest = FAR[layout]
        strides = list(image(values, layout=rest).stride())
        if axis in letters:
            strides[letters.index(axis)] = APART // max(1, values.shape[letters.index(axis)] - 1)
        assert values.numel() <= 2**12 - 64
        return _block(dtype, device).as_strided(values.shape, strides, next(_places)).copy_(values)
    order, around, step = LAYOUTS[layout]
    order = "".join(axis for axis in order if axis in letters)
    sizes = dict(zip(letters, values.shape, strict=True))
    whole, index = [], []
    for axis in order:
        before, after = around.get(axis, (0, 0))
        size = sizes[axis] * (step if axis == "w" else 1)
        whole.append(before + size + after)
        index.append(slice(before, before + size, step if axis == "w" else 1))
    memory = torch.full(whole, NAN, dtype=dtype, device=device)
    view = memory[tuple(index)].permute([order.index(axis) for axis in letters])
    return view.copy_(values)


def untouched(view: Tensor) -> bool:
    """Whether the memory around a view of :func:`image` still holds NaN; that of a far one is not looked at."""
    base = view._base
    return base is None or base.numel() > APART or int((~base.isnan()).sum()) == int((~view.isnan()).sum())


def randn(*shape: int, seed: int = 0) -> Tensor:
    """float64 normal numbers, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + sum(shape)), dtype=torch.float64)


@contextmanager
def workspaces_hold_nan() -> Iterator[None]:
    """torch fills what `empty` returns with NaN: outputs and workspaces."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# ----------------------------------------------------------------------------------------------------- contracts


class Contract:
    """An op family's inputs, truth and bounds. Subclasses give `name`, `axes`, `inputs`, `run`, `exact` and either
    `sizes` and `terms` (a sum of products: most ops) or `bounds`."""

    name = ""
    #: Values of each axis of a case. `dtype` comes first by itself.
    axes: Mapping[str, Sequence[Any]] = MappingProxyType({})
    #: backend -> dtypes it serves. The reference rounds half types at every step and is the truth for the others.
    dtypes: Mapping[str, Sequence[torch.dtype]] = MappingProxyType({
        "reference": (torch.float64, torch.float32), "cpu": DTYPES, "triton": DTYPES, "cuda": DTYPES,
    })  # fmt: skip
    #: Whether Triton's kernels multiply matrices (`tl.dot`): they take no float64, and no bfloat16 in the interpreter.
    products = False
    #: Values that are enough for Triton, whose interpreter takes a second where the other backends take a hundredth.
    interpreted: Mapping[str, Sequence[Any]] = MappingProxyType(
        {"layout": ("nchw", "channels_last", "channels_slice", "sliced", "expanded")}
    )
    #: Values of which Triton has each once, where its interpreter takes a second for a case.
    few: Mapping[str, Sequence[Any]] = MappingProxyType({})
    #: Inputs whose gradients are compared; none for an op without a backward pass.
    differentiable: Sequence[str] = ()

    def __init__(self, dtypes: Mapping[str, Sequence[torch.dtype]] | None = None, **axes: Sequence[Any]) -> None:
        """The contract on other values of some axes."""
        self.axes = {**self.axes, **axes}
        self.few = {axis: values for axis, values in self.few.items() if axis not in axes}
        self.dtypes = dtypes or self.dtypes

    def inputs(self, case: Case, device: str) -> Tensors:
        raise NotImplementedError

    def run(self, case: Case, tensors: Any, backend: str) -> Tensors:
        """Outputs by name, on one backend."""
        raise NotImplementedError

    def exact(self, case: Case, tensors: Any) -> Tensors:
        """The same in float64, differentiable."""
        raise NotImplementedError

    def sizes(self, case: Case, tensors: Any, backend: str) -> Tensors:
        """The same of absolute values and with plus signs only: what rounding errors scale with."""
        raise NotImplementedError

    def terms(self, case: Case, name: str, backend: str) -> float:
        """Roundings that an output (or gradient, `d_<input>`) has behind it, each of at most its size."""
        raise NotImplementedError

    def operands(self, case: Case, name: str, backend: str) -> float:
        """How many roundings to the storage dtype lie before the last one."""
        return 0

    def bounds(self, case: Case, tensors: Any, cotangents: Any, exact: Any, backend: str) -> Tensors:
        """Error allowed for each output and gradient, from the float64 inputs, cotangents and results."""
        leaves = {n: t.detach().abs().requires_grad_(n in self.differentiable) if floating(t) else t
                  for n, t in tensors.items()}  # fmt: skip
        sizes = dict(self.sizes(case, leaves, backend))
        if cotangents:
            made = _gradients(self, leaves, [sizes[n] for n in cotangents], [c.abs() for c in cotangents.values()])
            sizes |= made
        return {
            name: sum_bound(
                exact[name].detach(), sizes[name].detach(), self.terms(case, name, backend), case.dtype,
                operands=self.operands(case, name, backend), backend=backend,
            )
            for name in exact if exact[name] is not None
        }  # fmt: skip

    def cotangent(self, case: Case, name: str, out: Tensor, seed: int) -> Tensor:
        """The gradient of an output, in the layout `case.cotangents` if there is that axis."""
        values = randn(*out.shape, seed=seed)
        if out.ndim < 4:
            return values.to(out.device, out.dtype)
        return image(values, out.dtype, str(out.device), getattr(case, "cotangents", case.layout))

    def also(self, case: Case, tensors: Any, results: Any) -> None:
        """More that must hold of results and gradients: strides, for example."""

    def cases(self, backend: str) -> list[Case]:
        if type(self).few and backend == "triton":
            return singles(dtype=self.dtypes[backend], **{**self.axes, **self.few})
        axes = {n: self.fewer(n, values) if backend == "triton" else values for n, values in self.axes.items()}
        if self.products and backend == "triton":
            served = [dtype for dtype in (torch.float32, torch.float16) if dtype in self.dtypes[backend]]
            half = [dtype for dtype in (torch.bfloat16,) if dtype in self.dtypes[backend]]
            return pairwise(dtype=served, **axes) + (
                singles(dtype=half, **axes) if half else []
            )  # skipped if interpreted
        return pairwise(dtype=self.dtypes[backend], **axes)

    def fewer(self, axis: str, values: Sequence[Any]) -> Sequence[Any]:
        return [value for value in values if value in self.interpreted.get(axis, ())] or values

    def backends(self) -> list[str]:
        return list(self.dtypes)

    def __str__(self) -> str:
        return self.name


def floating(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


def _gradients(contract: Contract, leaves: Any, outputs: list[Tensor], cotangents: list[Tensor]) -> Tensors:
    names = [n for n in contract.differentiable if leaves.get(n) is not None]
    made = torch.autograd.grad(outputs, [leaves[n] for n in names], cotangents, allow_unused=True)
    return {f"d_{n}": torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, made, strict=True)}


def results(contract: Contract, case: Case, backend: str, device: str) -> tuple[Any, Any, Any]:
    """(inputs, cotangents, outputs and gradients) of one run."""
    if contract.products and backend == "triton":
        probe = torch.empty(0, dtype=case.dtype, device=device)
        if (reason := triton_products_why_not(probe)) is not None:
            pytest.skip(reason)
    if backend == "triton" and getattr(case, "layout", None) in FAR and triton_interpreted():
        from tests import interpreter

        if not interpreter.changes():
            pytest.skip(f"Triton's interpreter, but {interpreter.VERSION}, has 32 bits for arguments annotated with 64")
    given = contract.inputs(case, device)
    leaves = {n: t.detach().requires_grad_(n in contract.differentiable) if floating(t) else t
              for n, t in given.items()}  # fmt: skip
    before = {n: t.detach().clone() for n, t in leaves.items() if t is not None}
    with workspaces_hold_nan():
        out = {n: t for n, t in contract.run(case, leaves, backend).items() if t is not None}
        made = dict(out)
        cotangents = {n: contract.cotangent(case, n, t, 50 + i) for i, (n, t) in enumerate(out.items())
                      if t.requires_grad}  # fmt: skip
        if cotangents:
            made |= _gradients(contract, leaves, [out[n] for n in cotangents], list(cotangents.values()))
    for name, kept in before.items():
        same = torch.equal(leaves[name].nan_to_num(), kept.nan_to_num())
        assert same, f"{contract.name} on {backend} changed its input {name}: {case}"
    return leaves, cotangents, made


def truth(contract: Contract, case: Case, leaves: Any, cotangents: Any, made: Any) -> tuple[Any, Any, Any]:
    """(inputs, cotangents, outputs and gradients) in float64."""
    wide = {n: t.detach().cpu().double().requires_grad_(n in contract.differentiable) if floating(t) else t
            for n, t in leaves.items()}  # fmt: skip
    wide_cotangents = {n: c.cpu().double() for n, c in cotangents.items()}
    exact = dict(contract.exact(case, wide))
    if cotangents:
        exact |= _gradients(contract, wide, [exact[n] for n in cotangents], list(wide_cotangents.values()))
    return wide, wide_cotangents, {n: t for n, t in exact.items() if n in made}


def check(contract: Contract, case: Case, backend: str, device: str) -> dict[str, Tensor]:
    """Every output and gradient of one run within its bound of the float64 truth; the inputs are left alone."""
    leaves, cotangents, made = results(contract, case, backend, device)
    compare(contract, case, backend, leaves, made, *limits(contract, case, backend, leaves, cotangents, made))
    return made


def limits(
    contract: Contract, case: Case, backend: str, leaves: Any, cotangents: Any, made: Any
) -> tuple[Tensors, Tensors]:
    """The float64 truth of results, and their bounds."""
    wide, wide_cotangents, exact = truth(contract, case, leaves, cotangents, made)
    return exact, contract.bounds(case, wide, wide_cotangents, exact, backend)


def compare(contract: Contract, case: Case, backend: str, leaves: Any, made: Any, exact: Any, bounds: Any) -> None:
    for name, got in made.items():
        assert got.dtype in (case.dtype, accumulation(case.dtype)), f"{name} is {got.dtype}"
        assert_within(got, exact[name], bounds[name], f"{contract.name}: {name} on {backend}, {case}")
    contract.also(case, leaves, made)


def on(*backends: str) -> pytest.MarkDecorator:
    """The fixture `backend` for these alone, where others have no kernels for the op."""
    return pytest.mark.parametrize("backend", backends, indirect=True)
