"""Hooks on all modules, and forwards put on an instance, are seen in every fused module and model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as all_modules

import wavemix_kernels as wk
from tests.models.subjects import SUBJECTS, Subject, changed, normal
from wavemix_kernels import wavemlp

KINDS = ("forward", "forward_pre", "full_backward", "full_backward_pre")


@contextmanager
def heard(kind: str) -> Iterator[list[str]]:
    """torch's own modules for which a hook of one kind on all modules is called, by class and tensors."""
    seen: list[str] = []
    handle = getattr(all_modules, f"register_module_{kind}_hook")(
        lambda module, *_: seen.append(f"{type(module).__name__} {list(module.state_dict())}")
        if type(module).__module__.startswith("torch.") else None
    )  # fmt: skip
    try:
        yield seen
    finally:
        handle.remove()


def step(module: nn.Module, subject: Subject, backend: str) -> None:
    with wk.backend(backend):
        out = module(subject.x().requires_grad_())
    out.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [
    "waveblock 2 deconv", "patm", "wave block", "mlp (9, 8)", "head (8, 1, 3)", "classification", "super-resolution",
    "lite", "wave net",
])  # fmt: skip
def test_a_memory_tracker_registers_a_hook_on_all_modules(name: str, kind: str) -> None:
    subject = SUBJECTS[name]
    fused, _ = subject.pair()
    with heard(kind) as of_ours:
        step(fused, subject, "auto")
    with heard(kind) as of_the_reference:
        step(fused, subject, "reference")
    assert len(of_ours) > 0
    assert sorted(of_ours) == sorted(of_the_reference)
    with heard(kind) as later:
        pass
    step(fused, subject, "auto")  # fused again
    assert later == []


@pytest.mark.parametrize("name", ["waveblock 1 deconv", "waveblock 3 pixelshuffle", "patm", "wave block", "mlp (9, 8)",
                                  "head (8, 1, 3)"])  # fmt: skip
def test_an_offloader_puts_a_forward_of_its_own_on_each_part(name: str) -> None:
    """Hugging Face's accelerate moves weights in and out in such a forward."""
    subject = SUBJECTS[name]
    fused, _ = subject.pair()
    parts = [part for part in fused.modules() if not list(part.children()) and list(part.parameters())]
    called: list[nn.Module] = []

    def counted(part: nn.Module) -> Callable[..., Any]:
        original = part.forward

        def forward(*args: Any) -> Any:
            called.append(part)
            return original(*args)

        return forward

    for part in parts:
        part.forward = counted(part)
    torch.manual_seed(0)
    expected = fused(subject.x())
    assert {id(part) for part in called} == {id(part) for part in parts}
    for part in parts:
        del part.forward
    torch.manual_seed(0)
    torch.testing.assert_close(fused(subject.x()), expected, rtol=1e-9, atol=1e-9)


class Doubled(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_part_is_put_in_a_container_with_a_forward_of_its_own() -> None:
    block = wk.FusedWaveblock(final_dim=8, ff_channel=8, dropout=0.0).double()
    x = normal(2, 8, 4, 4)
    once = block(x)
    block.feedforward = Doubled(*block.feedforward)
    torch.testing.assert_close(block(x), 2 * once, rtol=1e-10, atol=1e-10)


def test_a_part_is_compiled_by_itself() -> None:
    block = wk.FusedWaveblock(final_dim=8, ff_channel=8, dropout=0.0).double()
    x = normal(2, 8, 4, 4)
    expected = block(x)
    block.feedforward = torch.compile(block.feedforward, backend="eager")
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build, part", [
    (lambda: wk.FusedWaveblock(final_dim=8, ff_channel=8), "reduction"),
    (lambda: wavemlp.PATM(8), "fc_h"),
    (lambda: wavemlp.Mlp(8), "fc1"),
])  # fmt: skip
def test_the_log_says_whose_hook_unfuses(build: Callable[[], Any], part: str) -> None:
    module = build()
    with heard("forward"):
        assert "hooks on all modules are registered" in module.why_not_fused()
    assert module.why_not_fused() is None
    changed(module, part, forward=lambda x: x)
    assert module.why_not_fused() == f"{part} has a forward of its own on the instance"


def test_a_model_is_folded_while_a_logger_listens_to_all_modules() -> None:
    """Its hook would not see the folded parts, so folding says whose hook is in the way."""
    reason = r"hooks on all modules are registered \(torch\.nn\.modules\.module\)"
    with heard("forward"), pytest.raises(ValueError, match=reason):
        wk.fuse_for_inference(wk.FusedWaveblock())
