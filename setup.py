"""Builds the compiled core by CMake and Ninja; everything else about the package is in pyproject.toml.

Where it cannot be built, the install fails on Linux. On macOS and Windows, where no compiler has been tried, the
package is installed without it, and both the build and `python -m wavemix_kernels doctor` say why.

Environment:
    WAVEMIX_KERNELS_CUDA=0|1        leave CUDA out, or fail where it cannot be built (default: build it where nvcc is)
    WAVEMIX_KERNELS_CUDA_ARCHS=...  architectures, like "90" or "80;90", or "all" for 80;90;100;120 (default: those of
                                    the GPUs that are here; without one 80, whose PTX newer GPUs' drivers compile)
    CUDACXX, CUDA_HOME, CUDA_PATH   where nvcc is, if not on PATH
    CMAKE_ARGS, MAX_JOBS            passed on
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
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


#: Rough seconds of one core for a build of everything: the CPU's part, and each CUDA architecture.
CPU_SECONDS, CUDA_SECONDS = 100, 60
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
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        notes = [folder / LEFT_OUT for folder in (target, *([ROOT / "wavemix_kernels"] if self.beside_sources else []))]
        for note in notes:
            note.unlink(missing_ok=True)
        try:
            self.build_core(target)
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
        """The core into the folder `target`.

        Raises:
            OSError: a tool is missing.
            subprocess.CalledProcessError: one failed.
        """
        import pybind11

        nvcc, archs, note = cuda_plan()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        seconds = (CPU_SECONDS + CUDA_SECONDS * len(archs)) / int(jobs)
        print(
            f"wavemix_kernels: {note}. The first build takes about {seconds:.0f} s on {jobs} cores",
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
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
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
        target.mkdir(parents=True, exist_ok=True)
        for built in (*build.glob("_core*.so"), *build.glob("_core*.pyd")):
            # Renamed into place: a process that has the older one loaded keeps it.
            shutil.copy2(built, target / f"{built.name}.part")
            os.replace(target / f"{built.name}.part", target / built.name)


if __name__ == "__main__":
    core = Extension("wavemix_kernels._core", sources=[], optional=not core_is_required())
    packages = find_packages(include=["wavemix_kernels*"])
    harness = ("benchmarks", *(f"benchmarks.{part}" for part in ("cases", "harness", "report")))
    packages += [f"wavemix_kernels.{name}" for name in harness]
    setup(packages=packages, ext_modules=[core], cmdclass={"build_ext": CMakeBuild})
