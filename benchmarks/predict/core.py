"""The compiled core with its CUDA kernels, whose launches go to a callback instead of a card.

Host code and machine code are the real ones: nvcc compiles csrc/cuda, for other chips than the oldest when they are
asked for, and a runtime that runs nothing (stub/runtime.cpp) is linked in place of NVIDIA's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from .tools import CACHE, ROOT, Missing, key, locked, program, run

ARCHS = (80, 90, 100, 120)
PTX = 80  # the chip that the module is compiled for, and whose PTX is kept: every later chip runs it
MODULE = "_predicted"
_CODE = f"-gencode=arch=compute_{PTX},code=[sm_{PTX},compute_{PTX}]"
_OPTIONS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
_CSRC = ROOT / "csrc"
_STUB = Path(__file__).parent / "stub"
_MOST = _STUB / "most.h"  # included before every source
#: Takes the kernel's mangled name, the grid, threads of a block, bytes of dynamic shared memory and the addresses of
#: the arguments, valid until it returns; it returns null, or the message of an error.
Callback = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


def kernels() -> list[Path]:
    """The sources with CUDA kernels."""
    return sorted((_CSRC / "cuda").rglob("*.cu"))


@functools.cache
def nvcc_version() -> str:
    """The answer of nvcc to `--version`.

    Raises:
        Missing: it is not installed.
    """
    if shutil.which("nvcc") is None:
        raise Missing("nvcc is not on PATH: the CUDA toolkit compiles the CUDA kernels whose speed is predicted")
    return run(["nvcc", "--version"])


def _read(source: Path) -> set[Path]:
    """The source and, of csrc and its own folder, all that it includes."""
    found, new = set(), {source}
    while new:
        found |= new
        names = {name for file in new for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.M)}
        paths = {folder / name for name in names for folder in (_CSRC, _CSRC / "include", source.parent)}
        new = {path for path in paths if path.is_file()} - found
    return found


@functools.cache
def key_of(source: Path) -> str:
    """Changes with all that a source is compiled from, whatever the chip.

    Raises:
        Missing: nvcc is not installed.
    """
    return key({*_read(source), _MOST}, nvcc_version(), *_OPTIONS)


@functools.cache
def _made_of(source: Path) -> str:
    """Names what is compiled here. Where a checkout lies goes into the names of kernels without external linkage."""
    return key([], sys.version, ROOT, key_of(source))


@functools.cache
def build() -> Path:
    """The folder with the module, and one chip's cubins and PTX, made where the sources have changed.

    Raises:
        Missing: nvcc or cuobjdump is not installed.
        RuntimeError: a source does not compile.
    """
    sources = [_CSRC / "emulator" / "bindings.cpp", *kernels(), _STUB / "runtime.cpp"]
    made_of = key([], *map(_made_of, sources))
    with locked("cuda"):
        folder = CACHE / f"cuda-{made_of}"
        if not (folder / "done").exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(_object, sources))
            for old in CACHE.glob("cuda-*/"):
                shutil.rmtree(old)
            folder.mkdir()
            run(["nvcc", "-shared", "-cudart", "none", _CODE, *objects, "-o", folder / f"{MODULE}.so"])
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                cuda = [(source, made) for source, made in zip(sources, objects, strict=True) if source.suffix == ".cu"]
                list(pool.map(lambda one: _extract(*one, folder), cuda))
            (folder / "done").touch()
    return folder


def _extract(source: Path, made: Path, folder: Path) -> None:
    """Machine code and PTX out of an object."""
    for what, suffix in (("-xelf", "cubin"), ("-xptx", "ptx")):
        run([program("cuobjdump"), what, f"{source.stem}.sm_{PTX}.{suffix}", made], cwd=folder)
        (found,) = folder.glob(f"{source.stem}.*sm_{PTX}.{suffix}")
        found.rename(folder / f"{source.stem}.{suffix}")


def _object(source: Path) -> Path:
    """The object of a source, made where the source or a header has changed."""
    made = CACHE / "objects" / f"{source.name}-{_made_of(source)}.o"
    includes = [sysconfig.get_path("include")]
    defines = [
        *(f"WAVEMIX_MODULE_NAME={MODULE}", "WAVEMIX_WITH_CPU=0", "WAVEMIX_WITH_CUDA=1"),
        *('WAVEMIX_BUILD_NOTE="launches are recorded"', f'WAVEMIX_CUDA_ARCHS="{PTX}"'),
    ]
    return _made(made, source, [_CODE, *(f"-I{path}" for path in includes), *(f"-D{name}" for name in defines), "-c"])


def _made(made: Path, source: Path, options: Iterable[object]) -> Path:
    """A file that nvcc makes of a source, in place of one that it made before a change."""
    if made.exists():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    for old in made.parent.glob(f"{made.name.rpartition('-')[0]}-*"):
        old.unlink()
    includes = [f"-I{path}" for path in (_CSRC, _CSRC / "include")]
    strict = ["-Werror", "all-warnings"] if source.suffix == ".cu" else []
    partial = made.with_name(f"partial-{made.name}")
    run(["nvcc", *_OPTIONS, *strict, *includes, "-include", _MOST, *options, source, "-o", partial])
    return partial.rename(made)


def cubin(source: Path, arch: int) -> Path:
    """Machine code of the kernels of a source for a chip of :data:`ARCHS`.

    Raises:
        Missing, RuntimeError: see :func:`build`.
    """
    if arch == PTX and source in kernels():
        return build() / f"{source.stem}.cubin"
    made = CACHE / "cubins" / f"{source.stem}.sm_{arch}-{_made_of(source)}.cubin"
    with locked(made.stem):
        return _made(made, source, ["-cubin", f"-arch=sm_{arch}"])


@functools.cache
def load() -> ModuleType:
    """The module, with the functions that the package's core has for CUDA."""
    spec = importlib.util.spec_from_file_location(MODULE, build() / f"{MODULE}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ptx() -> dict[str, str]:
    """PTX of the CUDA kernels for chip :data:`PTX`, by the stem of the source.

    Raises:
        Missing, RuntimeError: see :func:`build`.
    """
    return {path.stem: path.read_text() for path in sorted(build().glob("*.ptx"))}


@functools.cache
def _source_of() -> dict[str, Path]:
    """kernel (mangled) -> its source."""
    sources = {source.stem: source for source in kernels()}
    entries = {stem: re.findall(r"\.entry\s+([\w$]+)", text) for stem, text in ptx().items()}
    return {name: sources[stem] for stem, names in entries.items() for name in names}


def source_of(kernel: str) -> Path:
    """The source that defines a CUDA kernel, by its mangled name.

    Raises:
        Missing, RuntimeError: see :func:`build`.
    """
    return _source_of()[kernel]


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
