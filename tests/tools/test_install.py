"""Decisions of setup.py, and the words of an install without the compiled core."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from wavemix_kernels import _native

ROOT = Path(__file__).resolve().parents[2]


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for variable in (
        "WAVEMIX_KERNELS_CUDA",
        "WAVEMIX_KERNELS_CUDA_ARCHS",
        "WAVEMIX_KERNELS_CPU_ISAS",
        "CUDACXX",
        "CUDA_HOME",
        "CUDA_PATH",
    ):
        monkeypatch.delenv(variable, raising=False)
    return loaded("setup.py")


@pytest.mark.parametrize(
    "cmake, ninja, wanted",
    [
        ("cmake version 3.25.1", "1.11.1", []),
        ("cmake version 4.0.0-rc1\n", "1.13.2.git.kitware", []),
        ("cmake version 3.9.6", "1.9.0", ["cmake>=3.24", "ninja>=1.10"]),
        (None, "1.11.1", ["cmake>=3.24"]),
        ("ModuleNotFoundError", None, ["cmake>=3.24", "ninja>=1.10"]),
    ],
)
def test_tools_that_serve_are_not_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cmake: str | None, ninja: str | None, wanted: list[str]
) -> None:
    for tool, told in (("cmake", cmake), ("ninja", ninja)):
        if told is not None:
            ends = "exit 1" if "Error" in told else "exit 0"
            (tmp_path / tool).write_text(f"#!/bin/sh\necho '{told}'\n{ends}\n")
            (tmp_path / tool).chmod(0o755)
    backend = loaded("release/backend.py")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=None)
    assert backend.missing_tools() == wanted
    assert backend.get_requires_for_build_wheel()[-len(wanted) :] == wanted or not wanted


@pytest.mark.parametrize("system, required", [("linux", True), ("darwin", False), ("win32", False)])
def test_linux_alone_insists_on_the_core(setup_py: ModuleType, system: str, required: bool) -> None:
    assert setup_py.core_is_required(system) is required


AVX2 = {"avx", "avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@pytest.mark.parametrize("wanted, features, machine, isas", [
    ("", AVX2, "x86_64", ["avx2"]),
    ("", AVX512, "AMD64", ["avx512"]),
    ("", AVX512 - {"avx512vl"}, "x86_64", ["avx2"]),
    ("", {"sse2"}, "x86_64", ["baseline"]),
    ("", None, "x86_64", ["avx512", "avx2", "baseline"]),
    ("", None, "aarch64", ["baseline"]),
    ("all", AVX2, "x86_64", ["avx512", "avx2", "baseline"]),
    ("all", set(), "arm64", ["baseline"]),
    ("baseline, best", AVX512, "x86_64", ["avx512", "baseline"]),
    ("baseline;avx512", AVX2, "x86_64", ["avx512", "baseline"]),
])  # fmt: skip
def test_instruction_sets_of_a_build(setup_py: ModuleType, wanted, features, machine, isas) -> None:
    assert setup_py.cpu_plan(wanted, features, machine) == isas


@pytest.mark.parametrize("wanted, machine, said", [
    ("avx3", "x86_64", "'avx3': expected all, best or some of avx512, avx2, baseline, not avx3"),
    ("avx2", "aarch64", "'avx2': expected all, best or some of baseline, not avx2"),
])  # fmt: skip
def test_unknown_instruction_sets(setup_py: ModuleType, wanted: str, machine: str, said: str) -> None:
    with pytest.raises(SystemExit, match=f"WAVEMIX_KERNELS_CPU_ISAS={said}"):
        setup_py.cpu_plan(wanted, AVX2, machine)


def test_this_cpu_is_known(setup_py: ModuleType) -> None:
    """The build and the core ask in different ways."""
    core = _native.core
    features = setup_py.cpu_features()
    if core is None or features is None:
        pytest.skip(_native.core_error or "the system does not tell of its CPU")
    here = [isa for isa in core.CPU_ISAS_HERE if isa != "amx"]  # a part of avx512's build
    assert setup_py.cpu_plan("best", features, platform.machine()) == here[:1]


def test_a_build_for_other_cpus() -> None:
    """Its CPU kernels stay away, loudly; the rest serves."""
    code = (
        "import sys, torch; from importlib.util import module_from_spec, spec_from_file_location as at; "
        "name = 'wavemix_kernels._core'; core = module_from_spec(at(name, sys.argv[1])); sys.modules[name] = core; "
        "core.CPU_ISAS, core.CPU_ISAS_HERE = ('avx512',), ('avx2', 'baseline'); "
        "import wavemix_kernels as w; from wavemix_kernels import _native; "
        "assert _native.cpu_isa is None; print(_native.cpu_reason()); w.haar_dwt2d(torch.ones(1, 1, 2, 2))"
    )
    if _native.core is None:
        pytest.skip(str(_native.core_error))
    command = [sys.executable, "-c", code, str(_native.core.__file__)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the CPU kernels were built for avx512, which this CPU lacks (it has avx2, baseline)")
    assert "RuntimeWarning: the CPU kernels were built for avx512" in done.stderr


@pytest.mark.prove
@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_compiler_that_fails(system: str, tmp_path: Path) -> None:
    """On Linux the install ends with the compiler's error. Elsewhere the package lacks the core and says why."""
    script = (
        f"import setuptools, sysconfig, sys, runpy; sysconfig.get_config_vars(); sys.platform = {system!r}; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    lib = tmp_path / "lib"
    building = ["build_py", "-d", lib, "build_ext", "-b", lib, "-t", tmp_path / "temp"]
    command = [sys.executable, "-c", script, "-q", *building]
    environment = os.environ | {"CXX": "/bin/false", "WAVEMIX_KERNELS_CUDA": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    note = lib / "wavemix_kernels" / "_core_left_out.txt"
    if system == "linux":
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
