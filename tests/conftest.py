"""Backends under test, on whatever machine this is.

Without a GPU the Triton kernels run in Triton's interpreter and the CUDA kernels in the host emulation of the
same .cu sources, both on CPU tensors. With `--device cuda` everything runs on the GPU. With `--device ptx` both run
from what was compiled (tests/ptx), on CPU tensors again; Triton then needs TRITON_INTERPRET=0 in the environment.
"""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    places = ("cpu", "cuda", "ptx")
    parser.addoption("--device", default="cpu", choices=places, help="where the tensors under test live")
    parser.addoption("--few", action="store_true", help="contracts by each value, instead of each pair of values")
    parser.addoption("--renew", action="store_true", help="write what is kept of tests that pass (tests/passed.py)")
    parser.addoption("--launches", help="with --device ptx: a file for what every launch executed, a line each")


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports triton: it reads the variable when kernels are defined.
    if config.getoption("--device") == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if config.getoption("--device") == "ptx":
        gc.disable()  # kernels made ready are many objects, and stay
    # The tests verify the kernels themselves: one that fails must show, instead of giving way to the next backend.
    os.environ["WAVEMIX_KERNELS_VERIFY"] = "0"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what runs in the emulator, by its fixtures: no name can drift out of the sanitizers' run."""
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if backend == "cuda" or {"core", "emulated_core"} & set(item.fixturenames):
            item.add_marker(pytest.mark.emulated)
    if config.getoption("--few"):
        items[:] = thinned(config, items)


def thinned(config: pytest.Config, items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests, with only as many cases of a contract as have each value of each axis in each dtype: `make test` runs
    each pair of values, and the same sources compiled once more need not."""
    from tests.ops.contract import covering  # imports torch

    cases: dict[Any, dict[pytest.Item, set[Any]]] = defaultdict(dict)
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if {"contract", "case"} <= set(given):
            case = given["case"]
            dtype = getattr(case, "types", case.dtype)
            values = {(dtype, axis, str(value)) for axis, value in vars(case).items()}
            cases[item.function, given["contract"], given.get("backend")][item] = values
    left = {item for values_of in cases.values() for item in values_of.keys() - set(covering(values_of))}
    config.hook.pytest_deselected(items=list(left))
    return [item for item in items if item not in left]


def pytest_collection_finish() -> None:
    """Imported modules stay, in millions of objects: the collector looks only at what tests make, and less often."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # libraries in C++ count what is left at exit
    if file := session.config.getoption("--launches"):
        from tests.ptx import launch

        launch.compare(file)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name = request.config.getoption("--device")
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.exit("--device cuda: torch sees no CUDA device", returncode=4)
    return "cpu" if name == "ptx" else name


@pytest.fixture(scope="session")
def emulated_core() -> object:
    """The host build of csrc/cuda, as `wavemix_kernels.backends.emulated_cuda` takes it."""
    from tests.emulator.build import emulated_core

    return emulated_core()


def from_ptx(request: pytest.FixtureRequest, backend: str) -> AbstractContextManager[None]:
    from tests.ptx import launch

    if backend not in launch.EXECUTED:
        pytest.skip(f"{backend} has no PTX")
    return launch.EXECUTED[backend](launch.recorder(request.config.getoption("--launches")))


@pytest.fixture
def core(request: pytest.FixtureRequest, device: str) -> Iterator[ModuleType | None]:
    """Backend "cuda" at work: the emulated core, serving CPU tensors; None on a GPU, and for kernels run from PTX."""
    from tests.emulator.build import launches
    from wavemix_kernels import backends

    if request.config.getoption("--device") == "ptx":
        with from_ptx(request, "cuda"):
            yield None
        return
    if device == "cuda":
        if (reason := backends.cuda_why_not()) is not None:
            pytest.skip(f"cuda: {reason}")
        yield None
        return
    core = request.getfixturevalue("emulated_core")
    with backends.emulated_cuda(core):
        launches(core)  # forgets those of tests before
        yield core


@pytest.fixture(params=("cpu", "triton", "cuda"))
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """The name of each kernel backend in turn, ready to serve tensors of `device`. tests/ops/contract.py names them,
    and "reference", itself."""
    from wavemix_kernels import backends

    name = request.param
    if request.config.getoption("--device") == "ptx":
        with from_ptx(request, name):
            yield name
        return
    if name == "cpu" and device != "cpu":
        pytest.skip("the CPU kernels take CPU tensors")
    if name == "cuda" and device == "cpu":
        with backends.emulated_cuda(request.getfixturevalue("emulated_core")):
            yield name
        return
    if name != "auto" and (reason := getattr(backends, f"{name}_why_not")()) is not None:
        pytest.skip(f"{name}: {reason}")
    yield name


@pytest.fixture(autouse=True, scope="session")
def exact_products() -> Iterator[None]:
    """fp32 is multiplied in fp32: bounds are those of its roundings."""
    from wavemix_kernels.ops.common.precision import products_in

    with products_in("ieee"):
        yield


@pytest.fixture(autouse=True, scope="session")
def spared_interpreter() -> None:
    from wavemix_kernels import backends

    if backends.triton_interpreted():
        from tests.interpreter import spare_work

        spare_work()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor write the user's cache."""
    from wavemix_kernels import cache
    from wavemix_kernels.ops import verify

    monkeypatch.setenv(cache.VARIABLE, str(tmp_path_factory.getbasetemp() / "cache"))
    cache.forget()
    verify.forget()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs hold NaN before a kernel writes them, so that an element left out shows."""
    from wavemix_kernels.ops.common import layout

    empty = layout.empty
    monkeypatch.setattr(layout, "empty", lambda *args: empty(*args).fill_(float("nan")))


@pytest.fixture
def float64_buffers() -> Iterator[None]:
    """torch's default dtype is float64, so that a module's filters are exact."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
