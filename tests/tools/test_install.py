"""Decisions of setup.py, and the words of an install without the compiled core."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for variable in ("WAVEMIX_KERNELS_CUDA", "WAVEMIX_KERNELS_CUDA_ARCHS", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("platform, required", [("linux", True), ("darwin", False), ("win32", False)])
def test_linux_alone_insists_on_the_core(setup_py: ModuleType, platform: str, required: bool) -> None:
    assert setup_py.core_is_required(platform) is required


@pytest.mark.prove
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_compiler_that_fails(platform: str, tmp_path: Path) -> None:
    """On Linux the install ends with the compiler's error. Elsewhere the package lacks the core and says why."""
    script = (
        f"import setuptools, sysconfig, sys, runpy; sysconfig.get_config_vars(); sys.platform = {platform!r}; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    lib = tmp_path / "lib"
    building = ["build_py", "-d", lib, "build_ext", "-b", lib, "-t", tmp_path / "temp"]
    command = [sys.executable, "-c", script, "-q", *building]
    environment = os.environ | {"CXX": "/bin/false", "WAVEMIX_KERNELS_CUDA": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    note = lib / "wavemix_kernels" / "_core_left_out.txt"
    if platform == "linux":
        assert done.returncode != 0
        assert not note.exists()
        return
    assert done.returncode == 0, done.stderr
    assert "without the compiled core, which did not build on darwin: cmake failed" in done.stderr + done.stdout
    # An editable install would find its own core for the package here.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]; "
    code += "import wavemix_kernels; print(wavemix_kernels._native.core_error)"
    used = subprocess.run(
        [sys.executable, "-c", code], cwd=lib, env=os.environ | {"PYTHONPATH": str(lib)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert used.stdout == note.read_text(encoding="utf-8")
    assert "Until then CPU tensors run on plain PyTorch" in used.stderr
