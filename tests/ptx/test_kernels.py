"""Every kernel of the package run from its PTX, held to the contracts of tests/ops: Triton's and nvcc's, forward and
backward, in every dtype that they serve. Sessions that passed with the same sources are skipped (tests/passed.py)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.predict import core, executed
from benchmarks.predict.profile import SOURCES
from benchmarks.predict.tools import ROOT
from tests import passed
from tests.ptx import build, session
from tests.ptx.parser import Module

pytestmark = pytest.mark.prove


class Session(NamedTuple):
    """Tests of each file, run by one process: starting it takes as long as many a kernel. All Triton kernels of these
    families, or those of these .cu files, have to run."""

    tests: dict[str, str]
    kernels: tuple[str, ...]


OPS, FORMS, TRITON_FORMS = "tests/ops/test_", "tests/ptx/cuda_forms.py", "tests/ptx/triton_forms.py"
HAAR = "(test_analysis or test_synthesis or test_pyramid or test_bands or outputs)"
NORMS = "pre_norm", "batch_norm", "gelu_batch_norm", "pooled", "patm", "branch_weights"
NORM = "triton and (contract or test_pre_norm or sums_together or several_norms) and not (empty or tf32 or many_parts)"
#: The longest first.
SESSIONS = {
    "patm_whole_backward-cuda": Session(
        {f"{OPS}patm_whole.py": "cuda and contract and (gradients or statistics)"},
        (
            "whole_backward_mixed",
            "whole_mixed_sums",
            "whole_backward_waves",
            "whole_backward_image",
            "whole_statistics",
            "whole_sums",
        ),
    ),
    "patm_whole-cuda": Session(
        {f"{OPS}patm_whole.py": "cuda and contract and not (gradient or statistics)"},
        ("whole_moments", "whole_branch_weights", "whole_mix"),
    ),
    "products-triton": Session(
        {
            f"{OPS}deconv.py": "triton and (contract or wide and not triton-float16 or many_parts)",
            f"{OPS}reduce_haar.py": "triton and (contract or test_gradients) and not (every_order or only_when)",
            **dict.fromkeys((f"{OPS}mlp.py", f"{OPS}normed_mlp.py"), "triton and contract"),
            TRITON_FORMS: "many_parts or tf32",
        },
        ("deconv", "mlp", "reduce_haar"),
    ),
    "images-triton": Session(
        {
            **dict.fromkeys((f"{OPS}{of}.py" for of in NORMS), NORM),
            f"{OPS}haar.py": f"triton and {HAAR}",
            "tests/kernels/test_haar_outputs.py": f"triton and {HAAR}",
            f"{OPS}haar_axes.py": "triton and contract",
            f"{OPS}dwt.py": "triton and (test_analysis or test_synthesis or test_lines)",
            f"{OPS}filter_bank.py": "triton and (test_bank or test_transpose)",
            f"{OPS}quads.py": "triton and complex",
            TRITON_FORMS: "sums_together",
        },
        ("common", "dwt", "haar", "norm", "patm"),
    ),
    "wtconv-triton": Session(
        {f"{OPS}wtconv.py": "triton and contract and not float64"},
        ("wtconv",),
    ),
    "images-cuda": Session(
        {
            f"{OPS}haar.py": f"cuda and {HAAR}",
            "tests/kernels/test_haar_outputs.py": f"cuda and {HAAR}",
            f"{OPS}reduce_haar.py": "cuda and (contract or test_gradients) or tf32_only",
            f"{OPS}patm.py": "cuda and (contract or statistics)",
            FORMS: "cuda",
        },
        (
            "haar_analysis",
            "haar_synthesis",
            "reduce_haar",
            "reduce_haar_gradients",
            "phase_aggregate",
            "phase_aggregate_backward",
        ),
    ),
}


#: Bounds of predictions' counts of machine code, as shares of what was executed from PTX. The compiler makes divisions
#: and roots of many instructions, which shows where there is little other arithmetic.
LEAST, MOST, RARE = executed.LEAST, executed.MOST, 0.2
#: Its launch has one channel: seven of eight stores are masked by a predicate that is constantly false, and ptxas drops
#: them with their loads from shared memory, 112 of 544 passes. PTX runs those.
OTHERWISE = {("wavemix_kernels.ops.deconv.triton_backward._backward_weight_kernel", "passes")}


@functools.cache
def triton_kernels() -> list[str]:
    """`module.kernel dtype` of the compile tables; bfloat16 wherever float16 is."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from tests.aot.triton_launches import points
    from tests.ptx.launch import kernel_name

    rows = {kernel_name(point.launch) for point in points()}
    return sorted(rows | {row.replace(" float16", " bfloat16") for row in rows})


def expected(name: str) -> set[str]:
    if name.endswith("triton"):
        prefixes = tuple(f"wavemix_kernels.ops.{family}." for family in SESSIONS[name].kernels)
        return {row for row in triton_kernels() if row.startswith(prefixes)}
    return {kernel for source in SESSIONS[name].kernels for kernel in Module(build.core().ptx[source]).names()}


def made_of(name: str) -> tuple[str, ...]:
    """Patterns of the files that decide how a session ends."""
    if name.endswith("triton"):
        own, families = (), set(SESSIONS[name].kernels)
    else:
        kernels = [path for path in core.kernels() if path.stem in SESSIONS[name].kernels]
        module = [ROOT / "csrc/emulator/bindings.cpp", *(ROOT / "csrc/bindings").iterdir()]
        own = sorted({str(path.relative_to(ROOT)) for source in (*kernels, *module) for path in core._read(source)})
        families = {path.parent.name for path in kernels}
    ops = [f"wavemix_kernels/ops/{family}/*.py" for family in sorted({"common", *families})]
    counting = {*SOURCES, *(Path(core.__file__).with_name(f"{name}.py") for name in ("core", "compiled", "executed"))}
    predicted = *(str(path.relative_to(ROOT)) for path in counting), "benchmarks/predict/stub/*"
    return *passed.HELPERS, "tests/ptx/*.py", *SESSIONS[name].tests, *ops, *predicted, *own


@pytest.mark.parametrize("name", SESSIONS)
def test_kernels_run_from_ptx(name: str, request: pytest.FixtureRequest) -> None:
    compiler = pytest.importorskip("triton").__version__ if name.endswith("triton") else core.nvcc_version()
    with passed.unless_passed(request, f"PTX {name}", made_of(name), compiler):
        run_session(name, request)


def run_session(name: str, request: pytest.FixtureRequest) -> None:
    wanted = expected(name)  # or skips
    last, rows = session.run(SESSIONS[name].tests)
    launches = [row["kernel"] for row in rows if "compared" not in row]
    own = {executed.kernel_of(kernel.split()[0]) for kernel in wanted}
    compared = {row["kernel"]: {"source": row["source"]} | row["compared"] for row in rows if row.get("kernel") in own
                and "compared" in row}  # fmt: skip
    met = set(launches)
    print(f"{name}: {len(met)} kernels, {len(launches)} launches, {last}")
    assert wanted - met == set(), f"{len(wanted - met)} of {len(wanted)} kernels were never run"
    assert compared
    wrong = [f"{kernel}: {line}" for kernel, row in compared.items() for line in differences(kernel, row)]
    assert not wrong, "predictions count otherwise than was executed:\n" + "\n".join(wrong)
    if request.config.getoption("--renew"):
        executed.renew(compared)
    stale = [kernel for kernel, row in compared.items() if not fresh(executed.records().get(kernel), row)]
    command = f"python -m pytest tests/ptx/test_kernels.py -k {name} --renew"
    assert not stale, f"{executed.DATA.name} has other counts of {', '.join(stale)}, or of other sources: {command}"


def fresh(record: Mapping[str, Any] | None, row: Mapping[str, Any]) -> bool:
    """Whether predictions scale by what was executed now: of the same sources, and but for the compiler the same."""
    return record is not None and record["source"] == row["source"] and all(
        abs(record[what][1] * row[what][0] - row[what][1] * record[what][0]) <= 0.02 * record[what][0] * row[what][0]
        for what in executed.SCALED
    )  # fmt: skip


def differences(kernel: str, row: Mapping[str, Any]) -> list[str]:
    """A line for each count that differs between machine code, as predictions follow it, and PTX."""
    pairs = {what: pair for what, pair in row.items() if what not in ("source", "guessed")}
    ratios = {what: static / found for what, (static, found) in pairs.items() if found}
    print(f"{kernel}:", ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items()))
    if pairs["floating point"][1] < RARE * pairs.pop("all")[1]:
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
