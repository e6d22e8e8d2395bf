"""`python -m wavemix_kernels doctor`: every op's self-test on the CPU, and an exit status that tells the truth."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wavemix_kernels import doctor, ops
from wavemix_kernels.__main__ import main


def test_doctor_reports_every_op(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-tests of Triton's kernels are those of tests/ops/test_choose.py, which take the interpreter its time."""
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))
    asked = []
    for op in map(ops.load, ops.OPS):

        def self_test(backend: str, *rest: Any, own: Any = op.self_test) -> tuple[float, float]:
            asked.append(backend)
            return (0.5, 1.0) if backend == "triton" else own(backend, *rest)

        monkeypatch.setattr(op, "self_test", self_test)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert asked.count("triton") == sum("triton" in ops.load(name).BACKENDS for name in ops.OPS)
    rows = {line.split()[0]: line.split()[1:] for line in printed.split("on cpu")[1].splitlines() if line}
    for name in ops.OPS:
        cuda, *_, auto = rows[name]
        assert cuda == ("no" if "cuda" in ops.load(name).BACKENDS else doctor.NO_KERNELS)
        assert rows[name].count("ok") == len(ops.load(name).BACKENDS.keys() - {"cuda"})
        assert auto == ("cpu" if "cpu" in ops.load(name).BACKENDS else "reference")
    assert "no, cuda: " in printed
    assert "Every backend that is available here computes right." in printed


@pytest.mark.parametrize("found, said", [
    (float("nan"), "error nan"), (1.0, "error 1.0e+00"), (RuntimeError("no"), "its self-test raised RuntimeError: no"),
], ids=str)  # fmt: skip
def test_a_wrong_or_broken_backend_fails_the_doctor(found: object, said: str, monkeypatch, capsys) -> None:
    def self_test(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[object, float]:
        if dtype != torch.bfloat16 or backend != "cpu":
            return 0.0, 1e-6
        if isinstance(found, Exception):
            raise found
        return found, 1e-6

    monkeypatch.setattr(ops, "OPS", {"haar": ops.OPS["haar"]})
    monkeypatch.setattr(ops.load("haar"), "self_test", self_test)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"BROKEN: haar, backend 'cpu', bfloat16 on cpu: {said}" in printed
    assert printed.count("BROKEN: haar") == 1


@pytest.mark.parametrize("torch_cuda, sees, driver, core, said", [
    (None, False, False, {}, ["accelerate(model)"]),
    (None, False, False, {"OPENMP": False}, ["one thread: install OpenMP"]),
    (None, False, False, {"CPU_ISAS": ("avx2",)}, ["this CPU has avx512, the CPU kernels were built for avx2"]),
    (None, False, True, {}, ["install torch's CUDA build"]),
    ("13.0", False, True, {}, ["torch does not see it"]),
    ("13.0", True, True, {"HAS_CUDA": False}, ["put nvcc on PATH", "tune MODEL"]),
    ("13.0", True, True, {"HAS_CUDA": True, "CUDA_ARCHS": "80"}, ["WAVEMIX_KERNELS_CUDA_ARCHS=90", "tune MODEL"]),
    ("13.0", True, True, {"HAS_CUDA": True, "CUDA_ARCHS": "80 90"}, ["tune MODEL"]),
], ids=str)  # fmt: skip
def test_the_doctor_says_what_to_do_next(torch_cuda, sees, driver, core, said, monkeypatch) -> None:
    core = SimpleNamespace(
        **{"OPENMP": True, "HAS_CUDA": False, "CPU_ISAS": ("avx512",)} | core, CPU_ISAS_HERE=("avx512",)
    )
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    monkeypatch.setattr(doctor._native, "core", core)
    monkeypatch.setattr(doctor._native, "cpu_isa", core.CPU_ISAS[0])
    monkeypatch.setattr(doctor._native, "cuda_core", core if core.HAS_CUDA else None)
    monkeypatch.setattr(doctor._native, "cuda_reason", lambda: None)
    monkeypatch.setattr(doctor.backends, "triton_reason", lambda: None)
    lines = doctor.advice()
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True)), lines


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "doctor" in capsys.readouterr().err


def test_a_core_of_older_sources_is_not_used() -> None:
    old = "import sys, types; sys.modules['wavemix_kernels._core'] = types.ModuleType('wavemix_kernels._core'); "
    command = [sys.executable, "-c", old + "import wavemix_kernels; print(wavemix_kernels._native.core_error)"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "built from older sources); reinstall the package" in ran.stdout
    assert "RuntimeWarning" in ran.stderr


def test_sources_without_a_core_say_what_to_do(tmp_path: Path) -> None:
    """Python run in a checkout imports its sources, even with the package installed elsewhere."""
    package = Path(doctor.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("_core*", "__pycache__"))
    (tmp_path / "setup.py").touch()
    # An editable install would lend its core; the interpreter of Triton only costs time.
    alone = (
        "import runpy, sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f.__module__]; "
        "sys.argv = ['wavemix_kernels', 'doctor']; runpy.run_module('wavemix_kernels', run_name='__main__')"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    ran = subprocess.run([sys.executable, "-c", alone], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1
    assert f"pip install -e {tmp_path}" in ran.stderr  # the warning of the import
    assert "MISSING: " in ran.stdout
    assert "ok" in ran.stdout  # the reference still serves
