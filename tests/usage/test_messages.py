"""Messages say what works: at import, in the doctor and in errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from tests.models.subjects import SUBJECTS
from tests.tools.helpers import ROOT, python
from wavemix_kernels import checks, doctor, pytorch_wavelets, wavemlp


@pytest.mark.parametrize(
    "name", ["waveblock 1 deconv", "waveblock 3 bilinear", "patm", "wave block", "mlp (9, 8)", "head (8, 1, 3)"]
)
def test_a_fused_block_is_differentiated_twice(name: str) -> None:
    """Gradient penalties differentiate twice."""
    module = SUBJECTS[name].fused().double()
    x = SUBJECTS[name].x().requires_grad_()
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'with wavemix_kernels\.backend\("reference"\):'):
        grad.square().sum().backward()
    with wk.backend("reference"):
        (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("function", [
    wk.haar_dwt2d, pytorch_wavelets.DWTForward(), wk.FusedWaveblock(final_dim=4), wavemlp.PATM(4),
])  # fmt: skip
def test_complex_images(function: Callable[[Tensor], Any]) -> None:
    """.float() would drop the imaginary part; what the message says works."""
    x = torch.randn(2, 4, 8, 8, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"complex64.*pass \.real and \.imag one after the other") as caught:
        function(x)
    assert ".float()" not in str(caught.value)
    assert wk.haar_dwt2d(x.real)[0].shape == (2, 4, 4, 4)


def test_integers_and_quantised_images() -> None:
    with pytest.raises(TypeError, match=r"int64.*convert by \.float\(\)"):
        checks.check_tensor("x", torch.zeros(1, 1, 2, 2, dtype=torch.int64), 4, "(N, C, H, W)")


def with_torch(folder: Path, text: str) -> dict[str, str]:
    """The environment in which `import torch` runs this."""
    (folder / "torch.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


NEEDED = "wavemix_kernels needs PyTorch 2.9 or newer"


@pytest.mark.parametrize("text, said", [
    ("__version__ = '2.7.1+cu126'", ", this is 2.7.1+cu126: pip install --upgrade torch"),
    ("raise ImportError('No module named torch')", "does not import here (No module named torch): pip install torch"),
    ("raise OSError('libcudart.so.13: no such file')", "does not import here (libcudart.so.13: no such file)"),
])  # fmt: skip
def test_torch_is_missing_or_too_old(text: str, said: str, tmp_path: Path) -> None:
    environment = {**os.environ, **with_torch(tmp_path, text)}
    imported, ran = (
        subprocess.run([sys.executable, *how], env=environment, cwd=ROOT, capture_output=True, text=True)
        for how in (("-c", "import wavemix_kernels"), ("-m", "wavemix_kernels", "doctor"))
    )
    assert imported.stderr.splitlines()[-1].startswith(f"ImportError: {NEEDED}")
    assert said in imported.stderr
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert said in line


@pytest.mark.prove
@pytest.mark.parametrize("variable, value, expected", [
    ("WAVEMIX_KERNELS_CPU_ISA", "sse9", "this build has"),
    ("WAVEMIX_KERNELS_BACKEND", "gpu", "'auto'"),
    ("WAVEMIX_KERNELS_LOG", "yes", "'1'"),
])  # fmt: skip
def test_the_doctor_meets_an_unknown_value(variable: str, value: str, expected: str) -> None:
    ran = python("-m", "wavemix_kernels", "doctor", **{variable: value})
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert variable in line
    assert value in line
    assert expected in line
    assert "Traceback" in python("-c", "import wavemix_kernels", **{variable: value}).stderr


def test_the_driver_is_too_old_for_torchs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 12020).")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        dict(doctor.environment())["GPU"] == "none: The NVIDIA driver on your system is too old (found version 12020)."
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "is built for CPUs" in dict(doctor.environment())["GPU"]


def test_the_import_leaves_the_compiler_alone() -> None:
    """It takes as long as torch itself."""
    ran = python(
        "-c", "import sys, wavemix_kernels; print([m for m in ('torch._dynamo', 'triton', 'timm') if m in sys.modules])"
    )
    assert ran.stdout == "[]\n", ran.stderr


def test_a_fallback_is_logged_while_it_is_compiled() -> None:
    """Once per reason, though the compiler is not there at import."""
    code = (
        "import torch, wavemix_kernels as wk; b = wk.FusedWaveblock(final_dim=4); b.feedforward[1] = torch.nn.ReLU();"
        "f = torch.compile(b, backend='eager', fullgraph=True); f(torch.randn(1, 4, 4, 4)); f(torch.randn(1, 4, 4, 4))"
    )
    ran = python("-c", code, WAVEMIX_KERNELS_LOG="1")
    assert ran.stderr.count("runs as plain modules: feedforward.1 is ReLU, expected GELU") == 1, ran.stderr


def test_a_part_of_another_class_has_no_folded_form() -> None:
    block = wk.FusedWaveblock(final_dim=4)
    block.feedforward[1] = nn.ReLU()
    with pytest.raises(ValueError, match=r"feedforward\.1 is ReLU, expected GELU"):
        block.fuse_for_inference()
