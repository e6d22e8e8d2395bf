"""`python -m wavemix_kernels doctor`: every op's self-test on the CPU, and an exit status that tells the truth."""

from __future__ import annotations

import importlib

import pytest
import torch

from wavemix_kernels import doctor
from wavemix_kernels.__main__ import main
from wavemix_kernels.ops import OPS


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", OPS)
def test_self_test_holds(name: str, backend: str) -> None:
    error, bound = importlib.import_module(f"wavemix_kernels.ops.{name}").self_test(backend, torch.device("cpu"))
    assert error <= bound


def test_doctor_reports_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in OPS:
        assert f"{name} on cpu" in printed
    assert "cuda       no    " in printed or torch.cuda.is_available()
    assert "All backends that claim to work do." in printed


@pytest.mark.parametrize("wrong", [float("nan"), 1.0], ids=str)
def test_a_wrong_or_broken_backend_fails_the_doctor(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "OPS", ("haar",))
    op = importlib.import_module("wavemix_kernels.ops.haar")
    monkeypatch.setattr(op, "self_test", lambda backend, device: (wrong, 1e-6))
    assert main(["doctor"]) == 1
    assert "BROKEN: " in capsys.readouterr().out

    def broken(backend: str, device: torch.device) -> tuple[float, float]:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(op, "self_test", broken)
    assert main(["doctor"]) == 1
    assert "BROKEN RuntimeError: no such kernel" in capsys.readouterr().out
