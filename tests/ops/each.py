"""The tests that every family states: `test_contract = each.case(Contract(), ...)`, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.ops.contract import (
    Case,
    Contract,
    check,
    compare,
    covering,
    floating,
    limits,
    pairwise,
    results,
    singles,
    truth,
)  # fmt: skip

Rows = Sequence[tuple[Contract, str, Case]]


def _test(rows: Sequence[Any], body: Callable[[Contract, Case, str, str], Any]) -> Callable[..., None]:
    @pytest.mark.parametrize("contract, backend, case", rows, indirect=["backend"], ids=str)
    def test(contract: Contract, backend: str, case: Case, device: str) -> None:
        body(contract, case, backend, device)

    return test


def case(*contracts: Contract) -> Callable[..., None]:
    """The test of contracts: every backend by every case of its covering set."""
    return _test([(c, b, case) for c in contracts for b in c.backends() for case in c.cases(b)], check)


def empty_batch(*contracts: Contract) -> Callable[..., None]:
    """The test that sums of nothing are what the float64 truth says (zero, or NaN for a mean), and shapes right."""

    def body(contract: Contract, case: Case, backend: str, device: str) -> None:
        leaves, cotangents, made = results(contract, case, backend, device)
        _, _, exact = truth(contract, case, leaves, cotangents, made)
        for name, got in made.items():
            torch.testing.assert_close(got.double().cpu(), exact[name], rtol=0, atol=0, equal_nan=True)

    return pytest.mark.filterwarnings("ignore")(_test(_few(torch.float32, contracts), body))  # NumPy's, of 0 / 0


def gradient(*contracts: Contract) -> Callable[..., None]:
    """The test of first and second derivatives by finite differences in float64."""

    def body(contract: Contract, case: Case, backend: str, device: str) -> None:
        if backend == "triton" and contract.products:
            pytest.skip("its matrix products accumulate in float32: no float64")
        given = contract.inputs(case, device)
        leaves = {n: given[n].detach().requires_grad_() for n in contract.differentiable if given.get(n) is not None}

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(contract.run(case, given | dict(zip(leaves, values, strict=True)), backend).values())

        assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)

    return _test([row for row in _few(torch.float64, contracts) if row[1] != "reference"], body)


def _few(dtype: torch.dtype, contracts: Sequence[Contract]) -> Rows:
    return [(c, b, case) for c in contracts for b in c.backends() for case in singles(dtype=(dtype,), **c.axes)]


class Calls(TorchDispatchMode):
    """The calls of this project's operators, with their arguments; names of all others."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, Any]] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "wavemix_kernels":
            self.made.append((op, args))
        else:
            self.others.append(op._schema.name)
        return op(*args, **(kwargs or {}))


def opcheck(function: Callable[[], Any]) -> None:
    """Schema, fake tensors' strides and aliases of each operator that `function` calls; if it has one, its gradient."""
    with Calls() as calls:
        function()
    assert calls.made
    for op, args in calls.made:
        leaf = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "AutogradCPU")
        given = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(leaf and floating(t)), args)  # noqa: B023
        torch.library.opcheck(op, given)


def operator(*contracts: Contract, backends: Sequence[str] = ("auto", "reference")) -> Callable[..., None]:
    """The test of all operators that contracts call: each value on "auto", which takes the CPU's kernels, or on the
    only backend; under `make prove` each value on each backend, and each pair of values on one."""

    def body(contract: Contract, case: Case, backend: str, device: str) -> None:
        opcheck(lambda: results(contract, case, backend, device))

    rows: list[Any] = []
    for contract in contracts:
        served = [name for name in backends if name in (*contract.dtypes, "auto")]
        cases = pairwise(backend=served, dtype=(torch.float32,), **contract.axes)
        few = covering({i: set(map(str, vars(case).items())) for i, case in enumerate(cases)
                        if case.backend == served[0]})  # fmt: skip
        for i, case in enumerate(cases):
            marks = () if i in few else pytest.mark.prove
            rows.append(pytest.param(contract, vars(case).pop("backend"), case, marks=marks))
    return _test(rows, body)


def thread_count(*contracts: Contract, same: bool = True) -> Callable[..., None]:
    """The test of the CPU's kernels by several threads: within the bounds, and with `same` bit for bit those of one."""

    def body(contract: Contract, case: Case, backend: str, device: str) -> None:
        before = torch.get_num_threads()
        runs = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                runs.append(results(contract, case, backend, device))
        finally:
            torch.set_num_threads(before)
        within = limits(contract, case, backend, *runs[0])
        for leaves, _, made in runs:
            compare(contract, case, backend, leaves, made, *within)
        (_, _, one), *others = runs
        for name in one if same else ():
            assert all(torch.equal(one[name], made[name]) for _, _, made in others), f"{name} depends on threads"

    rows = [(c, "cpu", case) for c in contracts for case in c.cases("cpu")
            if case.dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
    return _test(rows, body)


def backend_repeats(*contracts: Contract) -> Callable[..., None]:
    """The test that a second run gives the same bits, on every backend's own (the library's sums may differ)."""

    def body(contract: Contract, case: Case, backend: str, device: str) -> None:
        first, second = (results(contract, case, backend, device)[2] for _ in range(2))
        for name, got in first.items():
            assert torch.equal(got, second[name]), f"{contract.name}: {name} on {backend} differs from run to run"

    return _test([(c, b, c.cases(b)[0]) for c in contracts for b in c.backends() if b != "reference"], body)
