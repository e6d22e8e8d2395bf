"""Kernels that a step launches on a GPU, recorded on tensors without values: a step that read one would raise."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.tools.helpers import ROOT, python

#: Launches of a training step and of an inference: this package's kernels, and PyTorch's.
MOST = {
    "waveblock/L1/nchw/64x192x64x64": ((13, 14), (3, 3)),
    "waveblock/L3/nchw/64x192x64x64": ((29, 30), (5, 5)),
    "patm/fc/nchw/64x64x56x56": ((15, 60), (3, 16)),
    "wavemix/192-16-L3/64x3x224x224": ((464, 500), (64, 73)),
    "wavemlp/T/32x3x224x224": ((340, 560), (60, 148)),
}


def _record(names: list[str]) -> Iterator[tuple[str, bool, dict[str, int]]]:
    from benchmarks.predict.device import CHIPS, record
    from benchmarks.predict.steps import steps

    for step in steps():
        for training in (True, False) if step.name in names else ():
            launches = itertools.chain(*record(step, "ours", training, CHIPS["h100"]))
            yield step.name, training, Counter("theirs" if one.kind == "aten" else "ours" for one in launches)


@pytest.mark.prove
def test_small_launches_stay_merged() -> None:
    ran = python("-m", "tests.tools.test_launches", *MOST, cwd=ROOT, TRITON_INTERPRET="0")
    assert ran.returncode == 0, ran.stderr
    found = {(name, training): (kinds["ours"], kinds["theirs"]) for name, training, kinds in json.loads(ran.stdout)}
    for name, most in MOST.items():
        for training, (ours, theirs) in zip((True, False), most, strict=True):
            assert found[name, training][0] <= ours, name
            assert found[name, training][1] <= theirs, name


if __name__ == "__main__":
    print(json.dumps([*_record(sys.argv[1:])]))
