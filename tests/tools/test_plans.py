"""Python's part of a step that goes by plans, by what it calls: no clock decides."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.prove
ROOT = Path(__file__).resolve().parents[2]
#: Calls of functions in Python and in C that a step may take. As the functions are written, a Waveblock's training step
#: takes 7,700.
MOST = {
    "haar/J1/nchw/4x64x256x256 training": 400,
    "haar/J1/nchw/4x64x256x256 inference": 120,
    "waveblock/L3/nchw/64x192x64x64 training": 2300,
    "waveblock/L3/nchw/64x192x64x64 inference": 900,
    "patm/fc/nchw/64x64x56x56 training": 1800,
    "patm/fc/nchw/64x64x56x56 inference": 450,
}


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest) -> dict[str, Any]:
    pytest.importorskip("triton")
    if request.config.getoption("--device") != "cpu" or shutil.which("nvcc") is None:
        pytest.skip("it compiles the CUDA kernels for a GPU that is none: no nvcc on PATH, or another device asked for")
    environment = {**os.environ, "WAVEMIX_KERNELS_VERIFY": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    names = sorted({name.split()[0] for name in MOST})
    command = [sys.executable, "-W", "ignore", "-m", "tests.tools.plans_on_stub", *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    made: dict[str, Any] = json.loads(done.stdout)
    return made


@pytest.mark.parametrize("name", MOST)
def test_few_calls(steps: dict[str, Any], name: str) -> None:
    assert steps[name]["python"] + steps[name]["c"] <= MOST[name]


def test_the_same_launches(steps: dict[str, Any]) -> None:
    assert steps["waveblock/L3/nchw/64x192x64x64 training"]["launches"] > 10
    assert all(step["alike"] for step in steps.values())
