"""Predicted times of the compiled kernels, held to floors: a kernel that gets slower is red.

Predictions compile and follow machine code, so they run in processes where kernels are not interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.predict import arithmetic, execute, kept, registers, sass, warps
from benchmarks.predict.tools import ROOT

pytestmark = pytest.mark.prove


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without Triton's interpreter; skips where a compiler is missing."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if "tools.Missing" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return done


def answer(program: str) -> Any:
    """The last line that a program prints, as JSON."""
    done = python("-c", program)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_kernel_is_below_its_floor() -> None:
    """Share of the chip, products made twice, and that the followed threads move the bytes of the plan; of kernels
    that have not changed, the kept results."""
    done = python("-m", "benchmarks.predict.gates")
    assert done.returncode == 0, f"{done.stderr[-6000:]}\nfloors of today:\n{done.stdout}"


#: A middle level's MLP with a tile: its share of the chip, its products for each one needed, and what gates say.
MLP = """
import json
from benchmarks.predict import gates, kernels
from benchmarks.predict.chips import CHIPS
from wavemix_kernels.ops.mlp import tiles
given = {config}
if given:
    tiles.config_for = lambda *a, **k: tiles.MlpConfig(*given)
    import wavemix_kernels.ops.mlp.triton as mlp
    mlp.config_for = tiles.config_for
(name,) = [case.name for case in kernels.cases("triton mlp forward 192|96 *")]
((one, key, _),) = gates._of_case(name, gates.CHIP)
floors = json.loads(gates.FLOORS.read_text())
print(json.dumps([one.share, one.waste, gates.complaints([one], floors), key]))
"""


def test_a_worse_tile_is_red() -> None:
    """16 rows are fewer than eight warps cover: fragments are repeated, and each block does less for its weights."""
    share, waste, complaints, key = answer(MLP.format(config=None))
    assert not complaints
    worse_share, worse_waste, complaints, worse_key = answer(MLP.format(config=(16, 16, 0, 8, 2)))
    assert key != worse_key  # no kept result stands for it
    assert worse_share < 0.7 * share
    assert worse_waste > 1.5 * waste
    assert len(complaints) == 2


def test_a_tile_that_does_not_fit_is_refused() -> None:
    done = python("-c", MLP.format(config=(128, 64, 0, 8, 3)))
    assert done.returncode != 0
    assert "258304 bytes of shared memory, a block of H100 SXM has 232448" in done.stderr


def test_kept_results_serve_unless_they_changed_or_it_is_their_day(tmp_path: Path) -> None:
    file = tmp_path / "kept.json"
    made = {f"kernel {i}": kept.Kept(kept.key("code", i), [i, "memory"]) for i in range(200)}
    kept.write(file, made, made)
    kept.write(file, {"kernel 3": kept.Kept("other", [0, "L2"])}, [name for name in made if name != "kernel 4"])
    rows = kept.read(file)
    assert rows["kernel 5"].result == [5, "memory"]
    assert rows["kernel 3"] == ("other", [0, "L2"])
    assert "kernel 4" not in rows
    served = [name for name, row in made.items() if kept.serves(rows.get(name), row.key)]
    assert 150 < len(served) < 198
    assert "kernel 3" not in served
    assert not any(kept.serves(rows.get(name), row.key, anew=True) for name, row in made.items())


# --- The reading of machine code ------------------------------------------------------------------------------

#: A loop of c[0x0][0x210] rounds, four at a time, that loads 16 bytes a round; then one division.
CODE = """
		Function : loop
        /*0000*/                   ULDC UR4, c[0x0][0x210] ;
        /*0010*/                   MOV R2, 0x1000 ;
        /*0020*/                   MOV R3, RZ ;
        /*0030*/                   MOV R4, RZ ;
        /*0040*/                   LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0050*/                   IADD3 R2, P0, R2, 0x10, RZ ;
        /*0060*/                   IADD3.X R3, RZ, R3, RZ, P0, !PT ;
        /*0070*/                   IADD3 R4, R4, 0x4, RZ ;
        /*0080*/                   ISETP.LT.AND P1, PT, R4, UR4, PT ;
        /*0090*/               @P1 BRA 0x40 ;
        /*00a0*/                   FSETP.GT.AND P2, PT, R8, 1, PT ;
        /*00b0*/              @!P2 BRA 0xd0 ;
        /*00c0*/                   FADD R8, R8, R8 ;
        /*00d0*/                   EXIT ;
"""


def kernel(text: str) -> sass.Kernel:
    ((name, code),) = sass.parse(text).items()
    return sass.Kernel(sass.elf.Entry(name, 0x210, ((0, 4),), 16, 0, 0), code)


def test_loops_run_as_often_as_parameters_say() -> None:
    constants = bytearray(0x400)
    constants[0x210:0x214] = (20).to_bytes(4, "little")
    way = execute.trace(kernel(CODE), bytes(constants), (0, 0, 0), 0)
    assert [address for _, address in way.accesses] == [0x1000 + 16 * i for i in range(5)]
    # Data decide the branch behind: the shorter way is taken, and it is said.
    assert dict(way.guessed) == {0xB0: 1}
    assert 12 not in way.path


#: A spill and its way back, a jump by the compiler's table, and a copy of zeros.
SPILLED = """
		Function : spilled
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   STL [R1+0x8], R0 ;
        /*0020*/                   LDG.E R0, [R2.64] ;
        /*0030*/                   LDL R4, [R1+0x8] ;
        /*0040*/                   ULDC UR6, c[0x2][0x4] ;
        /*0050*/                   BRXU UR6 -0x60 ;
        /*0060*/                   EXIT ;
        /*0070*/                   STS.64 [R4.X16+0x10], R8 ;
        /*0080*/                   ISETP.EQ.AND P0, PT, R4, 0x3, PT ;
        /*0090*/                   LDGSTS.E.128 [R4+0x400], [R2.64], P0 ;
        /*00a0*/                   EXIT ;
"""


@pytest.mark.parametrize("lane", [0, 3])
def test_spills_tables_and_copies_of_zeros(lane: int) -> None:
    made = kernel(SPILLED)
    entry = replace(made.entry, literals=b"\0\0\0\0\x70\0\0\0")
    way = execute.trace(sass.Kernel(entry, made.code), bytes(0x400), (0, 0, 0), lane)
    assert [made.code[i].at for i in way.path[-4:]] == [0x70, 0x80, 0x90, 0xA0]
    assert [address for _, address in way.shared] == [16 * lane + 0x10, lane + 0x400]
    assert way.accesses[-1][1] == (0 if lane == 3 else execute.ABSENT)


#: Threads go round as often as their index says; those of one half take another way, and each its own memory.
PARTING = """
		Function : parting
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   S2R R9, SR_CTAID.X ;
        /*0020*/                   LOP3.LUT R4, R0, 0x3, RZ, 0xc0, !PT ;
        /*0030*/                   ISETP.GT.AND P0, PT, R4, 0x1, PT ;
        /*0040*/                   MOV R6, 0x7 ;
        /*0050*/                @P0 IADD3 R6, R9, 0x100, RZ ;
        /*0060*/               @!P0 LDG.E R8, desc[UR6][R2.64+0x40] ;
        /*0070*/                   LDS R10, [R6+0x10] ;
        /*0080*/                   IADD3 R6, R6, 0x20, RZ ;
        /*0090*/                   IADD3 R4, R4, -0x1, RZ ;
        /*00a0*/                   ISETP.GT.AND P1, PT, R4, RZ, PT ;
        /*00b0*/               @P1 BRA 0x70 ;
        /*00c0*/                   STL [R1], R0 ;
        /*00d0*/               @P0 EXIT ;
        /*00e0*/                   LDL R11, [R1] ;
        /*00f0*/                   STS [R11.X4], R9 ;
        /*0100*/                   FSETP.GT.AND P2, PT, R8, 1, PT ;
        /*0110*/               @P2 MOV R11, 0x1 ;
        /*0120*/                   STS [R11], R9 ;
        /*0130*/                   MOV R0, 0x80 ;
        /*0140*/                   STS [R0], R9 ;
        /*0150*/                   STS [R6], R9 ;
        /*0160*/                   EXIT ;
"""


@pytest.mark.parametrize("most", [3, 8, 100])
def test_a_warp_goes_the_ways_of_its_threads(most: int) -> None:
    made, threads = kernel(PARTING), range(32, 64)
    ways = warps.Warps(made, bytes(0x400)).beginnings((5, 0, 0), threads, most)
    alone = [execute.trace(made, bytes(0x400), (5, 0, 0), thread, most) for thread in threads]
    assert [(way.path, way.accesses, way.shared) for way in ways] == [(w.path, w.accesses, w.shared) for w in alone]
    if most == 100:
        assert len({tuple(way.path) for way in ways}) == 3
        assert [address for _, address in ways[1].shared] == [0x17, 4 * 33, None, 0x80, 0x27]
        assert [address for _, address in ways[3].shared] == [0x115, 0x135, 0x155]


@pytest.mark.parametrize(
    ("line", "before", "after"),
    [
        ("IMAD.HI.U32 R1, R2, R3, RZ", {"R2": 0xFFFFFFFF, "R3": 0x10}, {"R1": 0xF}),
        ("IMAD.WIDE R4, R2, 0x4, R6", {"R2": 0xFFFFFFFF, "R6": 8, "R7": 0}, {"R4": 4, "R5": 0}),
        ("LEA.HI.X R1, R2, R3, R4, 0x2, P0", {"R2": 0xC0000000, "R3": 1, "R4": 1, "P0": True}, {"R1": 9}),
        ("SHF.R.S32.HI R1, RZ, 0x1f, R2", {"R2": 0x80000000}, {"R1": 0xFFFFFFFF}),
        ("LOP3.LUT R1, R2, 0xf0, R3, 0x78, !PT", {"R2": 0xFF, "R3": 0x0F}, {"R1": 0xF0 ^ 0x0F}),
        ("ISETP.LT.AND.EX P0, PT, R2, R3, PT, P1", {"R2": 5, "R3": 5, "P1": True}, {"P0": True}),
        ("IADD3 R1, P0, -R2, R3, RZ", {"R2": 0, "R3": 0}, {"R1": 0, "P0": True}),
        ("HFMA2.MMA R1, -RZ, RZ, 0, 5.9604644775390625e-08", {}, {"R1": 1}),
        ("PRMT R1, R2, 0x7632, R3", {"R2": 0x11223344, "R3": 0x55667788}, {"R1": 0x55661122}),
        ("VIADDMNMX.RELU R1, R2, R3, 0x8, PT", {"R2": 0xFFFFFFF0, "R3": 4}, {"R1": 0}),
        ("FADD R1, R2, R3", {"R1": 7, "R2": 1, "R3": 1}, {"R1": None}),
    ],
)
def test_integers_and_predicates(line: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """By hand, modulo 2^32, with carries; what is not computed becomes unknown."""
    (instruction,) = kernel(f"\n\t\tFunction : one\n        /*0000*/      {line} ;\n").code
    thread = registers.Thread(b"", {})
    for name, value in before.items():
        (thread.predicates if name.startswith("P") else thread.values)[name] = value
    arithmetic.step(instruction, thread)
    assert {name: {**thread.values, **thread.predicates}.get(name) for name in after} == after
