"""Values recorded from upstream's models in float64, and one comparison for every model recorded so.

Each .npz holds `config` (JSON), `state/*` (parameters and buffers before the run), `x`, `eval/out`, and for a training
step with the output gradient `g`: `train/out`, `train/grad_x`, `train/grad/*`, and `train/buffer/*` after it. Dropout
was 0 when they were recorded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.tolerances import GOLDEN

FOLDER = Path(__file__).parent / "golden"


def config(name: str) -> dict[str, Any]:
    with np.load(FOLDER / f"{name}.npz") as recorded:
        return json.loads(str(recorded["config"]))


def assert_reproduces(
    name: str, build: Callable[..., nn.Module], dtype: torch.dtype = torch.float64, tolerance: float = GOLDEN
) -> None:
    """`build(**config)` gives the recorded outputs, gradients and buffers, with the recorded state loaded strictly.

    Each is held to `tolerance` of its own largest value; below float64 a parameter's gradient to that of the largest
    gradient, since what cancels in a sum leaves the rounding of its terms.
    """
    arguments = {k: v for k, v in config(name).items() if k != "kind"}
    with np.load(FOLDER / f"{name}.npz") as recorded:
        arrays = {key: torch.from_numpy(recorded[key]) for key in recorded.files if key != "config"}
    model = build(**arguments, dropout=0.0).to(dtype)
    state = {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")}
    assert list(model.state_dict()) == list(state)  # an optimizer's state refers to parameters by their position
    model.load_state_dict(state, strict=True)
    compared = {"state/" + key for key in state} | {"x", "g"}
    largest = max(value.abs().max().item() for key, value in arrays.items() if key.startswith("train/grad"))

    def compare(key: str, actual: Tensor | None) -> None:
        expected = arrays[key]
        assert actual is not None, key
        assert actual.shape == expected.shape, key
        error = (actual.detach().double() - expected).abs().max().item()
        # A bias in front of a BatchNorm has no gradient: what is recorded is the rounding of sums of g.
        scale = expected.abs().max().item() if not _cancels(key, expected) else arrays["g"].abs().sum().item()
        if dtype != torch.float64 and key.startswith("train/grad/"):
            scale = max(scale, largest)
        assert error <= tolerance * scale, f"{name}: {key} is off by {error:.3g} at a scale of {scale:.3g}"
        compared.add(key)

    model.eval()
    compare("eval/out", model(arrays["x"].to(dtype)))
    model.train()
    x = arrays["x"].to(dtype, copy=True).requires_grad_()
    out = model(x)
    compare("train/out", out)
    out.backward(arrays["g"].to(dtype))
    compare("train/grad_x", x.grad)
    for key, parameter in model.named_parameters():
        compare(f"train/grad/{key}", parameter.grad)
    for key, buffer in model.named_buffers():
        compare(f"train/buffer/{key}", buffer)
    assert compared == arrays.keys(), f"{name}: never compared: {sorted(arrays.keys() - compared)}"


def _cancels(key: str, expected: Tensor) -> bool:
    return key.endswith(".bias") and expected.abs().max().item() < 1e-8
