"""The choice of an implementation and its log: wavemix_kernels/ops/choose.py, wavemix_kernels/log.py."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import wavemix_kernels as wk
from wavemix_kernels import _native, backends, log, ops, pytorch_wavelets
from wavemix_kernels.ops import choose
from wavemix_kernels.ops.common import selftest
from wavemix_kernels.ops.deconv import deconv
from wavemix_kernels.ops.deconv.op import BACKENDS as DECONV
from wavemix_kernels.ops.haar.op import BACKENDS as HAAR

CPU = torch.device("cpu")
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A function that returns the lines logged since the test began, by a logger that has seen nothing."""
    monkeypatch.setattr(log, "_seen", set())
    monkeypatch.setattr(log, "_told", weakref.WeakKeyDictionary())
    caplog.set_level(logging.INFO, logger="wavemix_kernels")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "wavemix_kernels"]


# --- A backend asked for by name ---------------------------------------------------------------------------


@pytest.mark.parametrize("op", ops.OPS)
def test_a_name_that_cannot_be_obeyed_raises(op: str) -> None:
    kernels = ops.load(op).BACKENDS
    for backend in backends.NAMES[1:]:
        if backend not in kernels or kernels[backend].why_not() is not None:
            why = "has no kernels for it; it has " if backend not in kernels else "is not available: "
            with pytest.raises(RuntimeError, match=f"{op}: backend='{backend}' {why}"):
                choose.select(op, kernels, backend, torch.ones(1, 4, 2, 2))


def error_of_reference(op: str, dtype: torch.dtype) -> float:
    return ops.load(op).self_test("reference", torch.device("cpu"), dtype)[0]


@pytest.mark.parametrize(
    "op, backend",
    [
        # The emulator takes eight seconds for a whole PATM of 128 channels.
        pytest.param(op, name, marks=pytest.mark.prove if (op, name) == ("patm_whole", "cuda") else ())
        for op in ops.OPS
        for name in ops.load(op).BACKENDS
    ],
    indirect=["backend"],
)
def test_self_test_runs_what_was_asked_for(op: str, backend: str, device: str, lines: Callable[[], list[str]]) -> None:
    dtype = ops.load(op).BACKENDS[backend].dtype
    error, bound = ops.load(op).self_test(backend, torch.device(device), dtype)
    name = str(dtype).removeprefix("torch.")
    # float64 is the truth beside it; a part that has no kernels of this kind runs on another backend, and says so.
    ours = [line for line in lines() if line.split()[1] == name and f"{backend}: it has no kernels" not in line]
    assert error <= (bound if dtype.itemsize > 2 else selftest.half_bound(bound, error_of_reference(op, dtype), dtype))
    assert (ours and error > 0) or backend == "reference"
    assert all(f": {backend} (asked for by name" in line for line in ours), ours


WIDE, HALF, META = (torch.ones(1, **kind) for kind in ({"dtype": FP64}, {"dtype": torch.float16}, {"device": "meta"}))
UNSERVED = [
    ("deconv", "cpu", [META], "it takes CPU tensors, got float32"),
    *((op, "triton", [WIDE], "float64") for op in ("deconv", "pointwise_mlp", "reduce_haar")),
    ("pre_norm", "cpu", [HALF, WIDE], "it takes a branch of x's dtype, or a half type in float32, got torch.float64"),
]


@pytest.mark.parametrize("op, backend, given, why", UNSERVED, indirect=["backend"])
def test_a_call_that_a_named_backend_cannot_serve_raises(op: str, backend: str, given: list[Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{backend}' cannot serve this call: .*{why}"):
        choose.select(op, ops.load(op).BACKENDS, backend, *given)


def test_a_driver_older_than_the_build_leaves_the_op_to_the_next_backend() -> None:
    core = ModuleType("core")
    core.CUDA_VERSION, core.cuda_driver_version = 13000, lambda: 12080
    with backends.emulated_cuda(core):
        assert "the NVIDIA driver serves CUDA 12, these kernels were built with CUDA 13" in backends.cuda_why_not()
        assert choose.pick("haar", HAAR, "auto", torch.zeros(1, 4, 2, 2), order=("cuda", "cpu")) == "cpu"


def test_deconv_on_the_cpu_by_name_is_ours(lines: Callable[[], list[str]]) -> None:
    """Few channels and many are the library's by measurement, not for whoever asks for "cpu"."""
    u, weight = torch.ones(1, 16, 2, 2), torch.ones(16, 80, 4, 4)
    for backend, want in (("auto", "reference"), ("cpu", "cpu")):
        deconv(u, weight, backend=backend)
        assert lines()[-1].startswith(f"deconv float32 (1, 16, 2, 2), (16, 80, 4, 4): {want} (")


# --- The rules ---------------------------------------------------------------------------------------------

OURS, LIBRARY = choose.AUTO["cpu"], ("reference",)
FEW = 1024
RULES: list[tuple[Any, list[tuple[Any, ...]]]] = [
    (choose.order, [("cpu", ("cpu", "reference")), ("cuda", ("cuda", "triton", "reference")), ("mps", LIBRARY)]),
    (choose.deconv, [
        ("cpu", FP32, 32, 32, FEW, False, False, OURS), ("cpu", FP32, 16, 65, FEW, False, False, LIBRARY),
        ("cpu", FP32, 31, 64, FEW, False, False, LIBRARY), ("cpu", FP32, 32, 64, FEW, False, False, OURS),
        ("cpu", FP64, 16, 65, FEW, False, False, OURS), ("cpu", BF16, 16, 16, FEW, True, False, OURS),
        ("cpu", BF16, 16, 17, FEW, True, False, LIBRARY), ("cpu", BF16, 16, 17, FEW, False, False, OURS),
        ("cpu", BF16, 16, 17, FEW, True, True, OURS), ("cuda", FP32, 64, 64, FEW, False, False, LIBRARY),
    ]),
    (choose.reduce_haar, [
        (("cuda", "triton", "reference"), True, ("triton", "cuda", "reference")),
        (("cuda", "triton", "reference"), False, ("cuda", "triton", "reference")), (OURS, True, OURS),
    ]),
    (choose.waveblocks, [("auto", 24, "joined"), ("auto", 16, "apart"), ("cuda", 16, "joined")]),
    (choose.deconv_residual, [
        (BF16, 16, "wgmma", False, choose.AUTO["cuda"]), (BF16, 16, "mma", False, choose.AUTO["cuda"]),
        (FP32, 16, "wgmma", False, LIBRARY), (BF16, 16, "mma", True, LIBRARY), (BF16, 16, "tcgen05", False, LIBRARY),
        (BF16, 16, "mfma", False, LIBRARY), (BF16, 8, "wgmma", False, LIBRARY),
    ]),
    (choose.deconv_backward_weight, [("cpu", OURS), ("cuda", LIBRARY)]),
    (choose.waveblock_recompute, [("cpu", "mlp"), ("cuda", "hidden")]),
    (choose.head, [(144, 72, 3, "folded"), (64, 8, 16, "apart")]),
    (choose.channel_mlp, [
        ("cpu", BF16, 128, 320, True, False, LIBRARY), ("cpu", BF16, 127, 320, True, False, OURS),
        ("cpu", BF16, 319, 320, True, False, LIBRARY), ("cpu", BF16, 320, 320, True, False, OURS),
        ("cpu", BF16, 128, 320, False, False, OURS), ("cpu", FP32, 128, 320, True, False, OURS),
        ("cpu", BF16, 128, 320, True, True, OURS),
    ]),
    (choose.convolution, [
        ("cpu", BF16, False, "float32"), ("cpu", BF16, True, "given"), ("cpu", FP32, False, "given"),
        ("cuda", BF16, False, "given"),
    ]),
    (choose.product, [("cpu", FP32, 1, "onednn"), ("cpu", FP32, 0, "convolution"), ("cpu", BF16, 1, "convolution")]),
    (choose.product_backward_weight, [("cpu", FP64, "core"), ("cpu", BF16, "convolution")]),
    (choose.patm, [
        ("cpu", 128, False, "whole"), ("cpu", 129, False, "parts"), ("cpu", 128, True, "parts"),
        ("cuda", 128, False, "whole"), ("cuda", 129, False, "parts"), ("cuda", 128, True, "parts"),
    ]),
    (choose.projections, [("cpu", 128, "joined"), ("cpu", 129, "apart"), ("cuda", 129, "joined")]),
    (choose.wtconv, [("cuda", FP32, "fused"), ("cuda", BF16, "parts"), ("cpu", FP32, "parts")]),
    (choose.for_part, [("cpu", DECONV, "cpu"), ("cuda", DECONV, "auto")]),
    (choose.with_kernels, [("norm_backward", DECONV, "cpu", OURS)]),
]  # fmt: skip


@pytest.mark.parametrize("rule, arguments", [(rule, arguments) for rule, rows in RULES for arguments in rows])
def test_rules(rule: Any, arguments: tuple[Any, ...]) -> None:
    *given, want = arguments
    assert rule(*given) == want


def test_the_core_says_how_many_channels_are_few() -> None:
    assert _native.core is None or _native.core.DECONV_NARROW == FEW


# --- The log -----------------------------------------------------------------------------------------------


def test_a_new_call_is_logged_once(lines: Callable[[], list[str]]) -> None:
    for size in (4, 4, 6):
        wk.haar_dwt2d(torch.ones(1, 2, size, size))
    ran = choose.pick("haar_dwt2d", ops.load("haar").BACKENDS, "auto", torch.ones(1))
    assert [line.split(" (cuda: ")[0] for line in lines()] == [
        f"haar_dwt2d float32 (1, 2, {n}, {n}): {ran}" for n in (4, 6)
    ]
    assert all("; triton: " in line for line in lines())


def test_calls_without_end_are_not_kept(lines: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MOST", 2)
    for size in range(1, 6):
        wk.haar_dwt2d(torch.ones(1, 1, size, size))
    assert len(lines()) == 3
    assert lines()[-1] == "more than 2 different calls: later ones are not logged"


def changed_block() -> wk.FusedWaveblock:
    block = wk.FusedWaveblock(level=1, final_dim=8, ff_channel=4, dropout=0.0)
    block.feedforward[5] = nn.SyncBatchNorm(8).eval()
    return block


WHY = "FusedWaveblock: runs as plain modules: feedforward.5 is SyncBatchNorm, expected BatchNorm2d"


def test_a_fallback_is_logged_once_per_module_and_reason(lines: Callable[[], list[str]]) -> None:
    block, x = changed_block(), torch.ones(1, 8, 4, 4)
    block(x)
    block(x)
    changed_block()(x)
    handle = block.reduction.register_forward_hook(lambda *_: None)
    block(x)
    handle.remove()
    learned = pytorch_wavelets.DWTForward()
    learned.h0_col.requires_grad_()
    learned(x)
    block.feedforward[5] = nn.BatchNorm2d(8)
    block(x)
    assert [line for line in lines() if "runs as" in line] == [
        WHY,
        WHY,
        "FusedWaveblock: runs as plain modules: reduction has hooks",
        "DWTForward: runs as plain convolutions: its filters are learned and need a gradient of their own",
    ]


def test_compiled_modules_log_at_trace_time(lines: Callable[[], list[str]]) -> None:
    block, x = changed_block(), torch.ones(1, 8, 4, 4)
    out = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, block(x))
    assert lines().count(WHY) == 2  # traced, and run


def test_nothing_is_logged_or_kept_when_off(lines: Callable[[], list[str]], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="wavemix_kernels")
    changed_block()(torch.ones(1, 8, 4, 4))
    assert not lines()
    assert not log._seen
    assert not log._told


def test_the_variable_prints_on_stderr() -> None:
    program = "import torch, wavemix_kernels as wk; wk.haar_dwt2d(torch.ones(1, 2, 4, 4))"
    environment = {**os.environ, log.VARIABLE: "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0
    assert "wavemix_kernels: haar_dwt2d float32 (1, 2, 4, 4): " in run.stderr


def test_other_values_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(log.logger.handlers), log.enabled()  # which a root logger that another test set up may say
    for value in ("", "0"):
        monkeypatch.setenv(log.VARIABLE, value)
        log.install()
        assert (log.logger.handlers, log.enabled()) == before
    monkeypatch.setenv(log.VARIABLE, "yes")
    with pytest.raises(ValueError, match="WAVEMIX_KERNELS_LOG='yes': expected"):
        log.install()
