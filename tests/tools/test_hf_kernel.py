"""The Triton half as a kernel for Hugging Face's ``kernels``: it loads from a path, beside the installed package."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from release import hf_kernel

_USE = """
import sys
from pathlib import Path
import torch
import wavemix_kernels, wavemix_kernels.reference
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, register_kernel_mapping
from kernels import replace_kernel_forward_from_hub

path = Path(sys.argv[1])
kernel = get_local_kernel(path)
assert kernel.__file__.startswith(str(path)), kernel.__file__
x = torch.randn(1, 8, 8, 8, requires_grad=True)
with kernel.backend("triton"):
    ll, highs = kernel.haar_dwt2d(x, 2)
    restored = kernel.haar_idwt2d(ll, highs)
expected = wavemix_kernels.haar_dwt2d(x, 2)
torch.testing.assert_close((ll, highs), expected)
torch.testing.assert_close(restored, x)
mine, theirs = (torch.autograd.grad(made[0].square().sum(), x)[0] for made in ((ll,), expected))
torch.testing.assert_close(mine, theirs)

for layer, module in (
    ("Waveblock", wavemix_kernels.reference.Waveblock(level=1, final_dim=8, ff_channel=8, dropout=0.0)),
    ("PATM", wavemix_kernels.reference.PATM(8)),
):
    like = type(layer, (type(module),), {"__module__": "a_users_own"})
    module.__class__ = like
    expected = module(x)
    replace_kernel_forward_from_hub(like, layer)
    register_kernel_mapping({layer: {"cpu": LocalLayerRepository(path, layer_name=layer)}})
    fused = kernelize(torch.nn.Sequential(module), mode=Mode.TRAINING, device="cpu")
    with kernel.backend("triton"):
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    twin = kernel.layers._twins[module]
    assert type(twin).__name__.startswith("Fused"), twin
    assert all(a is b for a, b in zip(twin.parameters(), module.parameters(), strict=True))
print("right")
"""


def test_the_package_is_whole_and_by_itself(tmp_path: Path) -> None:
    """Everything relative, operators in a namespace of their own, and it imports without ``kernels``."""
    folder = hf_kernel.write(tmp_path / "repository") / "build" / hf_kernel.VARIANT
    for path in folder.rglob("*.py"):
        assert hf_kernel._imports(path.read_text(encoding="utf-8")) == [], path
    code = (
        f"import sys; sys.path.insert(0, {str(folder.parent)!r}); sys.modules['wavemix_kernels'] = None; "
        f"kernel = __import__({hf_kernel.VARIANT!r}); import torch; x = torch.ones(1, 2, 4, 4); "
        "assert kernel.haar_dwt2d(x)[0].eq(2).all(); print(*torch.ops)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.prove
@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="needs Hugging Face's kernels")
def test_kernels_loads_and_maps_it(tmp_path: Path) -> None:
    folder = hf_kernel.write(tmp_path / "repository") / "build" / hf_kernel.VARIANT
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _USE, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("right\n")
