"""Builds the compiled core by CMake and Ninja; everything else about the package is in pyproject.toml.

Where it cannot be built, the install fails on Linux. On macOS and Windows, where no compiler has been tried, the
package is installed without it, and both the build and `python -m wavemix_kernels doctor` say why.

Environment:
    WAVEMIX_KERNELS_CUDA=0|1        leave CUDA out, or fail where it cannot be built (default: build it where nvcc is)
    WAVEMIX_KERNELS_CUDA_ARCHS=...  architectures, like "90" or "80;90", or "all" for 80;90;100;120 (default: those of
                                    the GPUs that are here; without one 80, whose PTX newer GPUs' drivers compile)
    WAVEMIX_KERNELS_CPU_ISAS=...    instruction sets of the CPU kernels, like "avx2" or "best,baseline", or "all"
                                    (default: "best", the one this CPU gains most by)
    CUDACXX, CUDA_HOME, CUDA_PATH   where nvcc is, if not on PATH
    CMAKE_ARGS, MAX_JOBS            passed on
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
ALL_ARCHS = ("80", "90", "100", "120")
OLDEST = 80  # asynchronous copies and products in bfloat16


def find_nvcc() -> str | None:
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if (home := os.environ.get(variable)) and (nvcc := shutil.which(str(Path(home, "bin", "nvcc")))):
            return nvcc
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def archs_here() -> list[str]:
    """Architectures of this machine's GPUs, as their driver tells them."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({major + minor for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", told, re.MULTILINE)}, key=int)


def cuda_plan() -> tuple[str | None, list[str], str]:
    """(nvcc or None, architectures, the line that says why)."""
    asked = os.environ.get("WAVEMIX_KERNELS_CUDA", "").strip()
    if asked not in ("", "0", "1"):
        sys.exit(f"WAVEMIX_KERNELS_CUDA={asked!r}: expected 0, 1 or nothing")
    if asked == "0":
        return None, [], "built without CUDA kernels: WAVEMIX_KERNELS_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None:
        reason = "no nvcc on PATH, in CUDACXX or in CUDA_HOME"
        if asked == "1":
            sys.exit(f"WAVEMIX_KERNELS_CUDA=1, but the CUDA kernels cannot be built: {reason}")
        return None, [], f"built without CUDA kernels: {reason} (the Triton kernels need no compiler)"
    try:
        known = re.findall(
            r"compute_(\d+)",
            subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        if asked == "1":
            sys.exit(f"WAVEMIX_KERNELS_CUDA=1, but nvcc does not run: {error}")
        return None, [], f"built without CUDA kernels: nvcc does not run ({type(error).__name__})"
    if wanted := os.environ.get("WAVEMIX_KERNELS_CUDA_ARCHS", "").strip():
        archs = [a for a in re.split(r"[;, ]+", wanted) if a]
        if archs == ["all"]:
            archs = [a for a in ALL_ARCHS if a in known]
        unknown = [a for a in archs if not (m := re.match(r"\d+", a)) or m[0] not in known]
        if unknown:
            sys.exit(
                f"WAVEMIX_KERNELS_CUDA_ARCHS={wanted!r}: this nvcc knows {' '.join(known)}, not {' '.join(unknown)}"
            )
    else:
        archs = [a for a in archs_here() if a in known and int(a) >= OLDEST] or [str(OLDEST)]
    return nvcc, archs, f"built with CUDA kernels for sm_{', sm_'.join(archs)} and, as PTX, for newer GPUs"


#: Instruction sets of the CPU kernels, best first, and what a CPU needs for them (csrc/cpu/isa.cpp asks the same). The
#: kernels of AMX are a part of avx512's.
NEEDS = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"}, "avx2": {"avx2", "fma"}, "baseline": set()}


def cpu_features() -> set[str] | None:
    """The feature flags of this machine's CPU, or None where the system does not tell."""
    try:
        told = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return set(told[1].split()) if told else None


def cpu_plan(wanted: str, features: Collection[str] | None, machine: str) -> list[str]:
    """The instruction sets to build for, best first.

    Args:
        wanted: value of WAVEMIX_KERNELS_CPU_ISAS.
        features: of this CPU; None where it does not tell, and then "best" is all of them.
    """
    known = [*NEEDS] if machine.lower() in ("x86_64", "amd64") else ["baseline"]
    names = [name for name in re.split(r"[;, ]+", wanted.strip()) if name] or ["best"]
    if unknown := [name for name in names if name not in (*known, "best", "all")]:
        sys.exit(
            f"WAVEMIX_KERNELS_CPU_ISAS={wanted!r}: expected all, best or some of {', '.join(known)}, "
            f"not {', '.join(unknown)}"
        )
    best = known if features is None else [next(name for name in known if NEEDS[name] <= set(features))]
    chosen = {*names, *(best if "best" in names else []), *(known if "all" in names else [])}
    return [name for name in known if name in chosen]


#: Rough seconds of one core for a build: what every build needs, each instruction set and each CUDA architecture.
SECONDS, ISA_SECONDS, CUDA_SECONDS = 15, {"avx512": 60, "avx2": 65, "baseline": 30}, 120
#: One build serves every Python from 3.10 on, except for those without the global lock.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
#: In the package, where the core is left out: why. wavemix_kernels/_native.py reads it.
LEFT_OUT = "_core_left_out.txt"


def core_is_required(platform: str = sys.platform) -> bool:
    """Whether a core that does not build stops the install."""
    return platform.startswith("linux")


class CMakeBuild(build_ext):
    def finalize_options(self) -> None:
        if self.build_temp is None:  # one place, whoever asks: the next install compiles only what has changed
            self.build_temp = str(ROOT / "build" / "core" / sys.implementation.cache_tag)
        super().finalize_options()

    def run(self) -> None:
        self.beside_sources = bool(self.inplace or getattr(self, "editable_mode", False))
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folders = {target.parent, *([ROOT / "wavemix_kernels"] if self.beside_sources else [])}
        notes = [folder / LEFT_OUT for folder in folders]
        for note in notes:
            note.unlink(missing_ok=True)
        try:
            self.build_core(target)
            for old in (file for folder in folders for file in folder.glob("_core.*") if file.name != target.name):
                old.unlink()  # of another name, which Python might prefer
        except (OSError, subprocess.CalledProcessError) as error:
            if not ext.optional:
                raise
            failed = isinstance(error, subprocess.CalledProcessError)
            why = f"{error.cmd[0]} failed; `pip install -v` shows how" if failed else str(error)
            why = f"this install is without the compiled core, which did not build on {sys.platform}: {why}"
            for note in notes:
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(f"{why}\n")
            raise CompileError(why) from error

    def build_core(self, target: Path) -> None:
        """The core as the file `target`.

        Raises:
            OSError: a tool is missing.
            subprocess.CalledProcessError: one failed.
        """
        nvcc, archs, note = cuda_plan()
        isas = cpu_plan(os.environ.get("WAVEMIX_KERNELS_CPU_ISAS", ""), cpu_features(), platform.machine())
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        seconds = (SECONDS + sum(ISA_SECONDS[isa] for isa in isas) + CUDA_SECONDS * len(archs)) / int(jobs)
        print(
            f"wavemix_kernels: CPU kernels for {', '.join(isas)}; {note}. "
            f"The first build takes about {seconds:.0f} s on {jobs} cores",
            file=sys.stderr,
            flush=True,
        )
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DWAVEMIX_ABI3={'ON' if ABI3 else 'OFF'}",
            f"-DWAVEMIX_CPU_ISAS={';'.join(isas)}",
            f"-DWAVEMIX_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DWAVEMIX_BUILD_NOTE={note}",
        ]
        if ninja := shutil.which("ninja"):
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        if nvcc:
            configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DWAVEMIX_CUDA_ARCHS={';'.join(archs)}"]
        if ccache := shutil.which("ccache"):
            languages = ("CXX", "CUDA") if nvcc else ("CXX",)
            configure += [f"-DCMAKE_{language}_COMPILER_LAUNCHER={ccache}" for language in languages]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        # A build folder configured by another (isolated) environment points at tools that are gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_core", "--parallel", jobs], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        shutil.copy2(build / target.name, part)
        os.replace(part, target)  # a process that has the older one loaded keeps it


if __name__ == "__main__":
    core = Extension("wavemix_kernels._core", sources=[], optional=not core_is_required(), py_limited_api=ABI3)
    tag = {"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {}
    packages = find_packages(include=["wavemix_kernels*"])
    harness = ("benchmarks", *(f"benchmarks.{part}" for part in ("cases", "harness", "report")))
    packages += [f"wavemix_kernels.{name}" for name in harness]
    setup(packages=packages, ext_modules=[core], options=tag, cmdclass={"build_ext": CMakeBuild})
