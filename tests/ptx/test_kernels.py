"""Every kernel of the package run from its PTX, held to the contracts of tests/ops: Triton's and nvcc's, forward and
backward, in every dtype that they serve."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from benchmarks.predict.tools import ROOT
from tests.ptx import build, session
from tests.ptx.parser import Module

pytestmark = pytest.mark.prove


class Session(NamedTuple):
    """Tests of tests/ops/test_<family>.py and of `more` files; all kernels of these Triton modules, or .cu files, have
    to run."""

    tests: str
    kernels: tuple[str, ...]
    more: tuple[str, ...] = ()


OUTPUTS, FORMS = "tests/kernels/test_haar_outputs.py", "tests/ptx/cuda_forms.py"
TRITON_FORMS = "tests/ptx/triton_forms.py"
HAAR = "(test_analysis or test_synthesis or test_pyramid or test_bands or outputs)"
#: By family and backend, the longest first.
SESSIONS = {
    "deconv-triton": Session(
        "triton and (contract or wide or many_parts)", ("deconv.triton", "deconv.triton_backward"), (TRITON_FORMS,)
    ),
    "haar-triton": Session(f"triton and {HAAR}", ("haar.triton_analysis", "haar.triton_synthesis"), (OUTPUTS,)),
    "reduce_haar-triton": Session(
        "triton and (contract or test_gradients or tf32) and not every_order and not only_when",
        ("reduce_haar.triton", "reduce_haar.triton_backward"),
        (TRITON_FORMS,),
    ),
    "mlp-triton": Session("triton and contract", ("mlp.triton", "mlp.triton_backward", "mlp.triton_products")),
    "haar-cuda": Session(f"cuda and {HAAR}", ("haar_analysis", "haar_synthesis"), (OUTPUTS, FORMS)),
    "reduce_haar-cuda": Session(
        "cuda and (contract or test_gradients or widths) or tf32_only", ("reduce_haar",), (FORMS,)
    ),
    "pre_norm-triton": Session(
        "triton and not (empty or tf32 or many_parts)",
        ("norm.triton_pre_norm", "norm.triton_finish", "common.triton_sums"),
        (TRITON_FORMS,),
    ),
    "patm-triton": Session(
        "triton and contract", ("patm.triton_phases", "patm.triton_phases_backward", "patm.triton_branches")
    ),
    "patm-cuda": Session(
        "cuda and (contract or statistics)", ("phase_aggregate", "phase_aggregate_backward"), (FORMS,)
    ),
    "patm_whole-cuda": Session(
        "cuda and contract",
        (
            "whole_moments",
            "whole_branch_weights",
            "whole_mix",
            "whole_backward_mixed",
            "whole_backward_waves",
            "whole_backward_image",
            "whole_sums",
        ),
    ),
    "batch_norm-triton": Session("triton and contract", ("norm.triton_batch_norm",)),
}


#: Bounds of predictions' counts of machine code, as shares of what was executed from PTX. The compiler makes divisions
#: and roots of many instructions, which shows where there is little other arithmetic.
LEAST, MOST, RARE = 0.8, 1.25, 0.2
#: A reason for each ratio outside.
_SINE = "phases beyond 8192 take the long way of a sine, with its table; predictions take the short one"
_UNUSED = "four loads whose values nobody uses are not in machine code, which shows in a launch as short as this"
OTHERWISE = {
    ("phase_forward", "requests"): _SINE,
    ("phase_forward", "sectors"): _SINE,
    ("wavemix_kernels.ops.deconv.triton_backward._backward_weight_kernel", "passes"): _UNUSED,
}


@functools.cache
def triton_kernels() -> list[str]:
    """`module.kernel dtype` of the compile tables; bfloat16 wherever float16 is."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    command, environment = [sys.executable, "-m", "tests.ptx.tables"], os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    rows = done.stdout.split("\n")[:-1]
    return sorted({*rows, *(row.replace(" float16", " bfloat16") for row in rows)})


def expected(name: str) -> set[str]:
    if name.endswith("triton"):
        prefixes = [f"wavemix_kernels.ops.{module}." for module in SESSIONS[name].kernels]
        return {row for row in triton_kernels() if row.rpartition(".")[0] + "." in prefixes}
    return {kernel for source in SESSIONS[name].kernels for kernel in Module(build.core().ptx[source]).names()}


@pytest.mark.parametrize("name", SESSIONS)
def test_kernels_run_from_ptx(name: str) -> None:
    wanted = expected(name)  # or skips
    family, one = name.split("-")[0], SESSIONS[name]
    last, rows = session.run([f"tests/ops/test_{family}.py", *one.more], one.tests)
    launches, compared = [], {}
    for row in rows:
        if "compared" in row:
            compared[row["kernel"]] = row["compared"]
        else:
            launches.append(row["kernel"])
    met = set(launches)
    print(f"{name}: {len(met)} kernels, {len(launches)} launches, {last}")
    assert wanted - met == set(), f"{len(wanted - met)} of {len(wanted)} kernels were never run"
    assert compared
    wrong = [f"{kernel}: {line}" for kernel, pairs in compared.items() for line in differences(kernel, pairs)]
    assert not wrong, "predictions count otherwise than was executed:\n" + "\n".join(wrong)


def differences(kernel: str, pairs: dict[str, tuple[float, float]]) -> list[str]:
    """A line for each count that differs between machine code, as predictions follow it, and PTX."""
    ratios = {what: static / executed for what, (static, executed) in pairs.items() if executed}
    print(f"{kernel}:", ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items()))
    executed = pairs.pop("all")[1]
    if pairs["floating point"][1] < RARE * executed:
        del pairs["floating point"]
    return [
        f"{what}: {static:.0f} counted, {found} executed"
        for what, (static, found) in pairs.items()
        if not LEAST * found <= static <= MOST * found and (kernel, what) not in OTHERWISE
    ]


def test_no_kernel_is_left_out() -> None:
    """The sessions answer for every Triton kernel of the compile tables, and for every .cu file."""
    answered = {name: expected(name) for name in SESSIONS}
    assert set().union(*(rows for name, rows in answered.items() if name.endswith("triton"))) == set(triton_kernels())
    sources = {source for name, one in SESSIONS.items() if name.endswith("cuda") for source in one.kernels}
    assert sources == set(build.core().ptx)
    assert all(answered.values())
