"""The compiled core with its CUDA kernels, whose launches go to a callback instead of a card.

Host code and machine code are the real ones: nvcc compiles csrc/cuda for each chip, and a runtime that runs nothing
(stub/runtime.cpp) is linked in place of NVIDIA's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from .tools import CACHE, ROOT, Missing, key, locked, program, run

ARCHS = (80, 90, 100, 120)
PTX = 80  # the chip whose PTX is kept, beside its machine code: every later chip runs it
MODULE = "_predicted"
_CODES = [f"-gencode=arch=compute_{arch},code={f'[sm_{arch},compute_{arch}]' if arch == PTX else f'sm_{arch}'}"
          for arch in ARCHS]  # fmt: skip
_OPTIONS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--threads=0", *_CODES]
_CSRC = ROOT / "csrc"
_STUB = Path(__file__).parent / "stub"
#: Takes the kernel's mangled name, the grid, threads of a block, bytes of dynamic shared memory and the addresses of
#: the arguments, valid until it returns; it returns null, or the message of an error.
Callback = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


def _sources() -> list[Path]:
    return [*(_CSRC / "cuda").rglob("*.cu"), _CSRC / "emulator" / "bindings.cpp", _STUB / "runtime.cpp"]


def build() -> Path:
    """The folder with the module, each chip's cubins and one chip's PTX, made where the sources have changed.

    Raises:
        Missing: nvcc or cuobjdump is not installed.
        RuntimeError: a source does not compile.
    """
    if shutil.which("nvcc") is None:
        raise Missing("nvcc is not on PATH: the CUDA toolkit compiles the CUDA kernels whose speed is predicted")
    headers = [p for folder in ("cuda", "include") for p in (_CSRC / folder).rglob("*.*h")] + [_STUB / "most.h"]
    bindings = [*(_CSRC / "bindings").iterdir()]
    versions = run(["nvcc", "--version"]), sys.version, *_OPTIONS
    made_of = key([*_sources(), *headers, *bindings], *versions)
    with locked("cuda"):
        folder = CACHE / f"cuda-{made_of}"
        if not (folder / "done").exists():
            read = {".cu": headers, ".cpp": [*headers, *bindings]}
            objects = {
                source: _compiled(source, key([source, *read[source.suffix]], *versions)) for source in _sources()
            }
            for old in CACHE.glob("cuda-*/"):
                shutil.rmtree(old)
            for arch in ARCHS:
                (folder / str(arch)).mkdir(parents=True)
            module = folder / f"{MODULE}.so"
            run(["nvcc", "-shared", "-cudart", "none", *_CODES, *objects.values(), "-o", module])
            for arch in ARCHS:
                run([program("cuobjdump"), "-xelf", f"sm_{arch}", module], cwd=folder / str(arch))
            for source in (_CSRC / "cuda").rglob("*.cu"):
                run([program("cuobjdump"), "-xptx", f"{source.stem}.sm_{PTX}.ptx", objects[source]], cwd=folder)
            (folder / "done").touch()
    return folder


def _compiled(source: Path, made_of: str) -> Path:
    """The object of a source, made where the source or a header has changed."""
    folder = CACHE / "objects"
    made = folder / f"{source.name}-{made_of}.o"
    if made.exists():
        return made
    folder.mkdir(exist_ok=True)
    for old in folder.glob(f"{source.name}-*.o"):
        old.unlink()
    includes = [_CSRC, _CSRC / "include", sysconfig.get_path("include")]
    defines = [
        *(f"WAVEMIX_MODULE_NAME={MODULE}", "WAVEMIX_WITH_CPU=0", "WAVEMIX_WITH_CUDA=1"),
        *('WAVEMIX_BUILD_NOTE="launches are recorded"', f'WAVEMIX_CUDA_ARCHS="{" ".join(map(str, ARCHS))}"'),
    ]
    names = [*(f"-I{path}" for path in includes), *(f"-D{name}" for name in defines)]
    names += ["-include", str(_STUB / "most.h")]
    strict = ["-Werror", "all-warnings"] if source.suffix == ".cu" else []
    partial = made.with_suffix(".partial.o")
    run(["nvcc", *_OPTIONS, *strict, *names, "-c", source, "-o", partial])
    partial.rename(made)
    return made


@functools.cache
def load() -> ModuleType:
    """The module, with the functions that the package's core has for CUDA."""
    spec = importlib.util.spec_from_file_location(MODULE, build() / f"{MODULE}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cubins(arch: int) -> list[Path]:
    """Machine code of every CUDA kernel for a chip of :data:`ARCHS`.

    Raises:
        Missing, RuntimeError: see :func:`build`.
    """
    return sorted((build() / str(arch)).glob("*.cubin"))


def ptx() -> dict[str, str]:
    """PTX of the CUDA kernels for chip :data:`PTX`, by the stem of the source.

    Raises:
        Missing, RuntimeError: see :func:`build`.
    """
    return {path.name.split(".")[0]: path.read_text() for path in sorted(build().glob("*.ptx"))}


@contextmanager
def launches_to(callback: Callable[[str, int, int, int, list[int]], None], arguments: int = 1) -> Iterator[None]:
    """Inside, launches of :func:`load`'s module go to ``callback``; outside, they return at once.

    Args:
        callback: takes what :data:`Callback` does, blocks in place of the grid.
        arguments: how many arguments every kernel has.
    """

    @Callback
    def called(name: bytes, grid: ctypes._Pointer, threads: int, shared: int, addresses: ctypes._Pointer) -> None:
        blocks = grid[0] * grid[1] * grid[2]
        callback(name.decode(), blocks, threads, shared, [addresses[i] for i in range(arguments)])

    register = ctypes.CDLL(load().__file__).wavemix_on_launch
    register(called)
    try:
        yield
    finally:
        register(None)
