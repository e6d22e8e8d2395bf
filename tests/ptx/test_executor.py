"""The executor of PTX itself: instructions against known values, what it counts, and the faults it has to catch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.ptx import build, session
from tests.ptx.executor import launch
from tests.ptx.launch import Core, recorded
from tests.ptx.memory import POISON, TAG_BITS, Counts, Fault, Global, Range
from tests.ptx.parser import Module

pytestmark = pytest.mark.prove

COUNT = 64
NAN, INF = float("nan"), float("inf")
TYPES = {"u16": np.uint16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "f16": np.float16,
         "f32": np.float32, "f64": np.float64}  # fmt: skip


def run(body: str, arrays: list[np.ndarray], threads: int = 32, blocks: int = 1, registers: str = "") -> Counts:
    """A kernel whose parameters %rd0, %rd1 … are arrays' addresses; %r0 is the thread, %r1 the block."""
    names = [f"p{i}" for i in range(len(arrays))]
    text = f"""
    .visible .entry kernel({", ".join(f".param .u64 {n}" for n in names)}) {{
      .shared .align 16 .b8 tile[4096];
      .reg .pred %p<9>; .reg .b16 %h<99>; .reg .b32 %r<99>; .reg .b64 %rd<99>; {registers}
      {" ".join(f"ld.param.u64 %rd{i}, [{n}];" for i, n in enumerate(names))}
      mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x;
      {body}
      ret;
    }}"""
    ranges = [Range(i + 1, a.ctypes.data, a.nbytes, a.itemsize) for i, a in enumerate(arrays)]
    parameters = b"".join(r.start.to_bytes(8, "little") for r in ranges)
    return launch(Module(text), "kernel", (blocks,), threads, 0, parameters, Global(ranges))


def at(array: int, to: str, size: int, index: str = "%r0") -> str:
    """Address of an element."""
    return f"mul.wide.u32 %rd{to}, {index}, {size}; add.s64 %rd{to}, %rd{array}, %rd{to};"


def evaluate(instruction: str, kinds: list[str], *values: list[float]) -> np.ndarray:
    """`instruction` of %d and the sources %a, %b, %c, on one value of each by every thread; `kinds` ends with %d's."""
    arrays = [np.resize(np.array(v, TYPES[k]), 32) for v, k in zip(values, kinds, strict=False)]
    kind = kinds[-1]
    out = np.zeros(32, TYPES["u32" if kind == "pred" else kind])
    body, registers = "", ""
    for i, (name, kind_of) in enumerate(zip("abcde", kinds[:-1], strict=False)):
        bits = 8 * arrays[i].itemsize
        registers += f".reg .b{bits} %{name};"
        body += at(i, f"{20 + i}", arrays[i].itemsize) + f"ld.global.b{bits} %{name}, [%rd{20 + i}];"
        assert kind_of in TYPES
    registers += ".reg .pred %d; .reg .b32 %e;" if kind == "pred" else f".reg .b{8 * out.itemsize} %d;"
    body += instruction + ";" + at(len(arrays), "40", out.itemsize)
    body += "selp.u32 %e, 1, 0, %d;" if kind == "pred" else ""
    body += f"st.global.b{8 * out.itemsize} [%rd40], {'%e' if kind == 'pred' else '%d'};"
    run(body, [*arrays, out], registers=registers)
    return out[: max(map(len, values))]


LANES = list(range(32))
F = ["f32", "f32", "f32", "f32"]
KNOWN = [
    ("add.s32 %d, %a, %b", ["s32"] * 3, [[2**31 - 1], [1]], [-(2**31)]),
    ("mul.hi.s32 %d, %a, %b", ["s32"] * 3, [[-2, 2**30], [3, 12]], [-1, 3]),
    ("mul.hi.u64 %d, %a, %b", ["u64"] * 3, [[2**64 - 1, 2**63], [2**64 - 1, 6]], [2**64 - 2, 3]),
    ("mul.hi.s64 %d, %a, %b", ["s64"] * 3, [[-1, -(2**62)], [1, 8]], [-1, -2]),
    ("mul.wide.s32 %d, %a, %b", ["s32", "s32", "s64"], [[-(2**31)], [2**31 - 1]], [-(2**31) * (2**31 - 1)]),
    ("mad.lo.s32 %d, %a, %b, %c", ["s32"] * 4, [[7], [-3], [1]], [-20]),
    ("mad.wide.u32 %d, %a, %b, %c", ["u32", "u32", "u64", "u64"], [[2**32 - 1], [2**32 - 1], [1]], [2**64 - 2**33 + 2]),
    ("div.s32 %d, %a, %b", ["s32"] * 3, [[-7, 7, -6, 1], [2, -2, 3, 0]], [-3, -3, -2, -1]),
    ("rem.s32 %d, %a, %b", ["s32"] * 3, [[-7, 7], [2, -2]], [-1, 1]),
    ("shl.b32 %d, %a, %b", ["u32"] * 3, [[1, 1], [31, 32]], [2**31, 0]),
    ("shr.s32 %d, %a, %b", ["s32", "u32", "s32"], [[-8, -8], [1, 99]], [-4, -1]),
    ("shf.l.wrap.b32 %d, %a, %b, 8", ["u32"] * 3, [[0x11223344], [0x55667788]], [0x66778811]),
    ("shf.r.wrap.b32 %d, %a, %b, 8", ["u32"] * 3, [[0x11223344], [0x55667788]], [0x88112233]),
    ("bfe.u32 %d, %a, 4, 8", ["u32"] * 2, [[0xABCDE]], [0xCD]),
    ("bfe.s32 %d, %a, 4, 4", ["s32"] * 2, [[0x80, 0x70]], [-8, 7]),
    ("bfi.b32 %d, %a, %b, 8, 4", ["u32"] * 3, [[0xFF], [0]], [0xF00]),
    ("prmt.b32 %d, %a, %b, 0x5410U", ["u32"] * 3, [[0x44332211], [0x88776655]], [0x66552211]),
    ("prmt.b32 %d, %a, 0, 0x9180U", ["u32"] * 2, [[0x80]], [0xFF80]),
    ("fma.rn.f32 %d, %a, %b, %c", F, [[1 + 2**-12], [1 + 2**-12], [-1 - 2**-11]], [2.0**-24]),
    ("fma.rn.f64 %d, %a, %b, %c", ["f64"] * 4, [[1 + 2**-30], [1 + 2**-30], [-1 - 2**-29]], [2.0**-60]),
    ("mul.ftz.f32 %d, %a, %b", F[:3], [[2.0**-100], [2.0**-30]], [0.0]),
    ("mul.f32 %d, %a, %b", F[:3], [[2.0**-100], [2.0**-30]], [2.0**-130]),
    ("min.f32 %d, %a, %b", F[:3], [[NAN, 1], [2, NAN]], [2, 1]),
    ("min.NaN.f32 %d, %a, %b", F[:3], [[NAN, 1], [2, 3]], [NAN, 1]),
    ("setp.lt.f32 %d, %a, %b", ["f32", "f32", "pred"], [[1, NAN], [2, 1]], [1, 0]),
    ("setp.geu.f32 %d, %a, %b", ["f32", "f32", "pred"], [[1, NAN], [2, 1]], [0, 1]),
    ("setp.ne.f32 %d, %a, %b", ["f32", "f32", "pred"], [[1, NAN, 1], [2, 1, 1]], [1, 0, 0]),
    ("setp.lt.u32 %d, %a, %b", ["u32", "u32", "pred"], [[2**32 - 1], [1]], [0]),
    ("setp.lt.s32 %d, %a, %b", ["u32", "u32", "pred"], [[2**32 - 1], [1]], [1]),
    ("selp.f32 %d, %a, 0f3F800000, %p1", ["f32"] * 2, [[5]], [1.0]),
    ("ex2.approx.f32 %d, %a", F[:2], [[3, -1, -INF]], [8, 0.5, 0]),
    ("rsqrt.approx.f32 %d, %a", F[:2], [[4]], [0.5]),
    ("sin.approx.f32 %d, %a", F[:2], [[0, -6, 7]], [2**-20.5, math.sin(-6) + 2**-20.5, NAN]),
    ("cos.approx.f32 %d, %a", F[:2], [[0, -6, 7]], [1 + 2**-20.5, math.cos(-6) + 2**-20.5, NAN]),
    ("copysign.f32 %d, %a, %b", F[:3], [[-0.0, 2], [3, -4]], [-3, 4]),
    ("cvt.sat.f32.f32 %d, %a", F[:2], [[-1, 0.25, 7, NAN]], [0, 0.25, 1, 0]),
    ("cvt.rn.f16.f32 %d, %a", ["f32", "f16"], [[1 + 2**-11, 1 + 3 * 2**-11, 65520]], [1, 1 + 2**-9, INF]),
    ("cvt.rn.bf16.f32 %d, %a", ["f32", "u16"], [[1 + 2**-8, 1 + 3 * 2**-8, -INF]], [0x3F80, 0x3F82, 0xFF80]),
    # A tie to even, above it, below it by a product that float32 would lose, infinity.
    ("fma.rn.bf16 %d, %a, %b, %c", ["u16", "u16", "u16", "u16"],
     [[0x3F80, 0x3F80, 0x1E80, 0x7F80], [0x3F81, 0x3F80, 0x9E80, 0x3F80], [0x3B80, 0x3B81, 0x3F80, 0x3F80]],
     [0x3F82, 0x3F81, 0x3F80, 0x7F80]),
    ("cvt.f32.bf16 %d, %a", ["u16", "f32"], [[0x3F82, 0xC000]], [1 + 2**-6, -2]),
    ("cvt.rn.bf16x2.f32 %d, %a, %b", ["f32", "f32", "u32"], [[1.0], [-2.0]], [0x3F80C000]),
    ("cvt.rna.tf32.f32 %d, %a", ["f32", "f32"], [[1 + 2**-11, 1 + 2**-12]], [1 + 2**-10, 1]),
    ("cvt.rzi.s32.f32 %d, %a", ["f32", "s32"], [[-1.9, 3e9, NAN]], [-1, 2**31 - 1, 0]),
    ("cvt.rni.s32.f32 %d, %a", ["f32", "s32"], [[2.5, 3.5]], [2, 4]),
    ("cvt.s64.s32 %d, %a", ["s32", "s64"], [[-5]], [-5]),
    ("cvt.u64.u32 %d, %a", ["u32", "u64"], [[2**32 - 5]], [2**32 - 5]),
    ("cvt.rn.f32.u64 %d, %a", ["u64", "f32"], [[2**24 + 1, 2**24 + 3]], [2**24, 2**24 + 4]),
    ("redux.sync.max.s32 %d, %a, -1", ["s32"] * 2, [list(range(-16, 16))], [15] * 32),
    ("shfl.sync.bfly.b32 %d, %a, 5, 31, -1", ["u32"] * 2, [LANES], [i ^ 5 for i in LANES]),
    ("shfl.sync.down.b32 %d, %a, 3, 31, -1", ["u32"] * 2, [LANES], [i + 3 if i < 29 else i for i in LANES]),
    ("shfl.sync.up.b32 %d, %a, 3, 0, -1", ["u32"] * 2, [LANES], [i - 3 if i > 2 else i for i in LANES]),
    ("shfl.sync.idx.b32 %d, %a, 9, 7199, -1", ["u32"] * 2, [LANES], [i // 4 * 4 + 1 for i in LANES]),
]  # fmt: skip


@pytest.mark.parametrize("instruction, kinds, values, expected", KNOWN, ids=[row[0] for row in KNOWN])
def test_instruction(instruction: str, kinds: list[str], values: list[list[float]], expected: list[float]) -> None:
    prologue = "setp.eq.u32 %p1, 1, 0;" if "%p1" in instruction else ""
    got = evaluate(prologue + instruction, kinds, *values)
    np.testing.assert_array_equal(got, np.array(expected, got.dtype))


def test_branches_meet_again() -> None:
    """A loop of as many rounds as a thread's number, whose body stands before its head, then an aligned instruction."""
    out = np.zeros(32, np.uint32)
    run(
        "mov.u32 %r2, 0; mov.u32 %r3, 0; bra HEAD;"
        "BODY: add.u32 %r3, %r3, %r2; add.u32 %r2, %r2, 1;"
        "HEAD: setp.lt.u32 %p1, %r2, %r0; @%p1 bra BODY;"
        f"shfl.sync.bfly.b32 %r4, %r3, 0, 31, -1; {at(0, '9', 4)} st.global.u32 [%rd9], %r4;", [out],
    )  # fmt: skip
    np.testing.assert_array_equal(out, [i * (i - 1) // 2 for i in range(32)])


@pytest.mark.parametrize("stride, size, sectors, wavefronts, least", [
    (4, 4, 4, 1, 1), (8, 4, 8, 2, 1), (128, 4, 32, 32, 1), (0, 4, 1, 1, 1), (16, 16, 16, 4, 4), (32, 16, 32, 8, 4),
])  # fmt: skip
def test_counts(stride: int, size: int, sectors: int, wavefronts: int, least: int) -> None:
    """Sectors of 32 bytes; passes over 32 banks of 4 bytes, words of 16 bytes by quarters of a warp."""
    memory = np.zeros(1032, np.uint32)
    data = memory[-memory.ctypes.data % 32 // 4 :]
    vector, registers = (".v4", "{%r4, %r5, %r6, %r7}") if size == 16 else ("", "%r4")
    counts = run(
        f"{at(0, '9', stride)} ld.global{vector}.u32 {registers}, [%rd9];"
        f"mul.lo.u32 %r2, %r0, {stride}; mov.u32 %r3, tile; add.u32 %r2, %r2, %r3;"
        f"st.shared{vector}.u32 [%r2], {registers};", [data],
    )  # fmt: skip
    assert (counts.requests, counts.sectors) == (1, sectors)
    assert (counts.shared_requests, counts.wavefronts, counts.conflict_free) == (1, wavefronts, least)
    assert counts.instructions["load/store"] == 3  # the parameter's among them


def test_unknown_instructions_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"vabsdiff\.u32\.u32\.u32"):
        run("vabsdiff.u32.u32.u32 %r2, %r0, %r0, %r0;", [])


def test_address_tags_leave_host_addresses_alone() -> None:
    data = np.zeros(4, np.uint32)
    assert Range(3, data.ctypes.data, data.nbytes, 4).start & ((1 << TAG_BITS) - 1) == data.ctypes.data


# --- Faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body, message", [
    ("st.global.u32 [%rd0], %r0;", "a block writes what another block of the same launch writes"),
    (f"{at(0, '9', 4, '%r1')} ld.global.u32 %r2, [%rd0]; st.global.u32 [%rd9], %r2;",
     "writes what another block of the same launch reads"),
    ("ld.global.v2.u32 {%r2, %r3}, [%rd0+4];", "misaligned access of 8 bytes"),
    ("ld.global.u32 %r2, [%rd0+-4];", "out of bounds, to byte -4 of range 1 of 256 bytes"),
    ("ld.global.u32 %r2, [%rd1];", "reads global memory that nobody wrote: element 0"),
    ("mov.u64 %rd9, 64; ld.global.u32 %r2, [%rd9];", "out of bounds, to address 0x40 of any range"),
    ("mov.u32 %r2, tile; ld.shared.u32 %r3, [%r2+4094];", "misaligned access of 4 bytes to shared"),
    ("mov.u32 %r2, tile; ld.shared.u32 %r3, [%r2+8192];", "out of bounds: ends at byte 8196"),
    ("mov.u32 %r2, tile; setp.lt.u32 %p1, %r0, 9; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];",
     "divergent ldmatrix: 9 of 32 threads"),
    ("AGAIN: bra AGAIN;", "still running"),
], ids=lambda value: value[:40])  # fmt: skip
def test_fault_is_caught(body: str, message: str) -> None:
    written, unwritten = np.zeros(64, np.uint32), np.full(128, POISON, np.uint16).view(np.uint32)
    with pytest.raises(Fault, match=message):
        run(body, [written, unwritten], blocks=2)


#: Kernel of tests/emulator/wrong_kernels.cu -> what its wrong form is caught at. Its atomic sum is left out, as none of
#: the package's kernels has an atomic instruction.
CAUGHT = {
    "global_out_of_bounds": r"access of 4 bytes out of bounds, to byte 260 of range \d of 256 bytes",
    "global_misaligned": "misaligned access of 16 bytes",
    "shared_out_of_bounds": "between two variables of shared memory|out of bounds",
    "missing_barrier": r"race: reads what thread \d+ wrote",
    "missing_read_barrier": "race: writes what another warp reads",
    "missing_warp_barrier": r"race: reads what thread \d+ wrote",
    "uninitialised_shared": "reads shared memory that nobody wrote, at byte 0",
    "divergent_barrier": "divergent barrier: 32 of 64 threads",
    "early_return": "divergent barrier: 63 of 64 threads",
    "divergent_shuffle": r"divergent shfl\.sync",
    "shuffle_from_outside": "reads a lane that is not in its mask",
    "missing_copy_wait": "asynchronous copy writes and nobody has waited for",
    "copy_wait_too_short": "asynchronous copy writes and nobody has waited for",
    "missing_copy_barrier": r"race: reads what thread \d+ wrote",
}


def cuda(name: str, wrong: bool) -> torch.Tensor:
    core = Core(build.test_kernels(), lambda counts: None)
    with recorded(core):
        data, output = torch.arange(1.0, COUNT + 1), torch.empty(COUNT)
        core.run_wrong_kernel(name, wrong, data.data_ptr(), output.data_ptr(), COUNT)
    assert torch.equal(data, torch.arange(1.0, COUNT + 1))
    return output


@pytest.mark.parametrize("name", CAUGHT)
def test_wrong_cuda_kernel_is_caught(name: str) -> None:
    data = torch.arange(1.0, COUNT + 1)
    assert torch.equal(cuda(name, False), data + data.roll(-1))
    with pytest.raises(RuntimeError, match=CAUGHT[name]):
        cuda(name, True)


@pytest.mark.parametrize("name, dtype, k", [
    ("f16", torch.float16, 16), ("bf16", torch.bfloat16, 16), ("tf32", torch.float32, 8),
])  # fmt: skip
def test_matrix_product(name: str, dtype: torch.dtype, k: int) -> None:
    """By ldmatrix, both ways, cp.async and mma; whole numbers are exact in each type."""
    core = Core(build.test_kernels(), lambda counts: None)
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-8, 9, shape, generator=draw).to(dtype) for shape in ((16, k), (k, 16)))
    with recorded(core):
        d = torch.empty(16, 16)
        getattr(core, f"matmul_{name}")(a.data_ptr(), b.data_ptr(), d.data_ptr())
    assert torch.equal(d, a.float() @ b.float())


def test_wrong_triton_kernels_are_caught() -> None:
    """tests/ptx/wrong_triton_kernels.py, where Triton compiles."""
    assert "passed" in session.run({"tests/ptx/wrong_triton_kernels.py": "wrong"})[0]
