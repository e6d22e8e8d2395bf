"""Test sessions of their own in which kernels run from PTX: Triton's do not compile where its interpreter is on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predict.tools import ROOT


def run(tests: Mapping[str, str]) -> tuple[str, list[dict[str, Any]]]:
    """pytest on files, each with the expression that picks tests, and `--device ptx`: (its last line, what each launch
    executed). A test that fails, or is skipped, fails here."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    with tempfile.TemporaryDirectory(prefix="wavemix-ptx-") as folder:
        launches = Path(folder) / "launches.jsonl"
        picked = " or ".join(f"{Path(file).name} and ({expression})" for file, expression in tests.items())
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-pno:cacheprovider", "-pno:xdist", "--device=ptx", "--few"),
            *(f"--launches={launches}", *tests, "-k", picked),
        ]
        environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        if done.returncode != 0 or "skipped" in last:
            pytest.fail(f"{' '.join(command)}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}", pytrace=False)
        lines = launches.read_text().splitlines() if launches.is_file() else []
        return last, [json.loads(line) for line in lines]
