"""Each instruction set's kernels: the tests of this folder and the ops' contracts, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.predict.tools import ROOT
from tests import passed
from tests.emulator import build
from wavemix_kernels import _native

if _native.core is None or _native.cpu_isa is None:
    pytest.skip(f"CPU kernels: {_native.cpu_reason()}", allow_module_level=True)
VARIABLE = "WAVEMIX_KERNELS_CPU_ISA"
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/ops").glob("test_*.py"))


def test_the_instruction_set_is_the_one_asked_for() -> None:
    found = _native.core.cpu_isa()
    assert found == (os.environ.get(VARIABLE) or found)
    assert found in ("amx", "avx512", "avx2", "baseline")


@pytest.mark.skipif(bool(os.environ.get(VARIABLE)), reason=f"{VARIABLE} is set: this is one of the variants")
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])
@pytest.mark.prove
def test_variants(isa: str, request: pytest.FixtureRequest) -> None:
    """By each variant that this process did not pick."""
    if _native.cpu_isa == isa:
        pytest.skip(f"{isa} is what this process runs")
    if isa not in (built := _native.core.CPU_ISAS):
        pytest.skip(f"{isa}: built for {', '.join(built)}; `make` builds what tests need (WAVEMIX_KERNELS_CPU_ISAS)")
    if isa not in _native.core.CPU_ISAS_HERE:
        pytest.skip(f"this CPU lacks {isa}")
    sources = [f"csrc/{folder}/**/*" for folder in ("cpu", "include", "bindings")]
    made_of = (
        *passed.HELPERS,
        *FILES,
        *sources,
        "CMakeLists.txt",
        "wavemix_kernels/ops/*/*.py",
        "tests/kernels/cpu/*.py",
    )
    with passed.unless_passed(request, f"CPU {isa}", made_of, build.compiler_version()):
        environment = {**os.environ, VARIABLE: isa}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--few", "-k", "cpu or threads"]
        command += ["tests/kernels/cpu", *FILES]
        result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
