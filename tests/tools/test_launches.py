"""Kernels that a step launches on a GPU, recorded on tensors without values: a step that read one would raise."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.tools.helpers import ROOT, python

#: Launches of a training step and of an inference: this package's kernels and PyTorch's.
MOST = {
    "waveblock/L1/nchw/64x192x64x64": (22, 6),
    "waveblock/L3/nchw/64x192x64x64": (50, 10),
    "patm/fc/nchw/64x64x56x56": (28, 5),
    "wavemix/192-16-L3/64x3x224x224": (830, 137),
    "wavemlp/T/32x3x224x224": (655, 103),  # wide MLPs are two products of the library
    "wavemlp/S/32x3x224x224": (1150, 300),
}


def _record(names: list[str]) -> Iterator[tuple[str, bool, int]]:
    from benchmarks.predict.device import CHIPS, record
    from benchmarks.predict.steps import steps

    for step in steps():
        for training in (True, False) if step.name in names else ():
            yield step.name, training, sum(map(len, record(step, "ours", training, CHIPS["h100"])))


@pytest.mark.prove
def test_small_launches_stay_merged() -> None:
    ran = python("-m", "tests.tools.test_launches", *MOST, cwd=ROOT, TRITON_INTERPRET="0")
    assert ran.returncode == 0, ran.stderr
    found = {(name, training): launches for name, training, launches in json.loads(ran.stdout)}
    for name, most in MOST.items():
        for training, launches in zip((True, False), most, strict=True):
            assert found[name, training] <= launches, name


if __name__ == "__main__":
    print(json.dumps([*_record(sys.argv[1:])]))
