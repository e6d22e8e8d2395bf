"""accelerate() on WTConv's modules (tests/ops/test_haar.py has the operator with four bands side by side)."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import wavemix_kernels as wk
from tests import tolerances
from tests.models.subjects import assert_accelerates, changed
from tests.ops.contract import Case, pairwise
from wavemix_kernels import wtconv, wtconv_layer
from wavemix_kernels.accelerate import accelerate

vendored = pytest.importorskip("tests.vendored_wtconv", reason="PyWavelets is missing: WTConv makes its filters by it")

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of x and of every trained parameter."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(leaf)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.float().sin().sum(), [leaf, *trained])]


def in_float64(module: nn.Module) -> nn.Module:
    """The convolution form with the filters that float32 rounds: halves, exactly."""
    exact = copy.deepcopy(module).double()
    for filters in (exact.wt_filter, exact.iwt_filter):
        filters.copy_((2 * filters).round() / 2)
    return exact


def assert_as_good(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Off from float64 by no more than twice what the convolution form is, and a few roundings."""
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        error, other = ((t.double() - c).abs().max().item() for t in (a, b))
        allowed = 2 * other + 8 * tolerances.UNIT_ROUNDOFF[dtype] * c.abs().max().item()
        assert error <= allowed, f"tensor {i}: off by {error}, the convolution form by {other}"


@pytest.mark.parametrize(
    "case",
    pairwise(
        layout=tuple(FORMATS), dtype=(torch.float64, torch.float32, torch.bfloat16), size=((16, 24), (13, 22), (7, 9))
    ),
    ids=str,
)
def test_modules_compute_the_same(case: Case) -> None:
    size, dtype, layout = case.size, case.dtype, case.layout
    torch.manual_seed(0)
    theirs = vendored.WTConv2d(6, 6, 3, wt_levels=3).to(dtype, memory_format=FORMATS[layout])
    x = torch.randn(2, 6, *size).to(dtype).contiguous(memory_format=FORMATS[layout])
    exact = in_float64(theirs)
    ours = copy.deepcopy(theirs)
    (replaced,) = assert_accelerates(nn.Sequential(ours)).replaced
    assert (replaced.path, replaced.was, replaced.now) == (
        "0",
        "tests.vendored_wtconv.WTConv2d",
        f"{wtconv.NOW}, {wtconv_layer.NOW}",
    )
    assert isinstance(ours, vendored.WTConv2d)
    assert_as_good(step(ours, x), step(theirs, x), step(exact, x.double()), dtype)


def test_the_forward_as_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter runs a GPU's form; it goes by parts again where a part has a hook or changes."""
    torch.manual_seed(0)
    theirs = vendored.WTConv2d(2, 2, 3, wt_levels=2)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    assert accelerate(ours).replaced == ()
    calls: list[str] = []
    fused = wtconv_layer.wtconv
    monkeypatch.setattr(wtconv_layer, "wtconv", lambda *args: (calls.append("fused"), fused(*args))[1])
    x = torch.randn(1, 2, 5, 6)
    with wk.backend("triton"):
        made = step(ours, x)
    assert calls == ["fused"]
    assert_as_good(made, step(theirs, x), step(in_float64(theirs), x.double()), torch.float32)
    copied = pickle.loads(pickle.dumps(ours))
    hook = ours.wavelet_scale[1].register_forward_hook(lambda *_: None)
    with wk.backend("triton"), torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        hook.remove()
        ours.wavelet_convs[0].padding_mode = "reflect"
        ours(x)
        assert calls == ["fused"]
        copied(x)
        copied.wt_filter.mul_(2)
        copied(x)
    assert calls == ["fused"] * 2


class Strided(vendored.WTConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., ::2, ::2]


def test_a_forward_that_does_more_stays() -> None:
    model = Strided(2, 2, 3)
    (replaced,) = accelerate(model).replaced
    assert (replaced.now, type(model)) == (wtconv.NOW, Strided)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of our functions as they are called."""
    calls: list[str] = []
    for name in ("haar_bands", "haar_from_bands"):
        function = getattr(wtconv, name)
        monkeypatch.setattr(wtconv, name, lambda t, f=function, n=name: (calls.append(n), f(t))[1])
    return calls


def test_what_changes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks and modes stay; other filters, loaded or trained, go to the convolutions again."""
    torch.manual_seed(0)
    theirs = vendored.WTConv2d(4, 4, 3, wt_levels=2)
    ours = copy.deepcopy(theirs).eval()
    seen: list[str] = []
    ours.register_forward_hook(lambda *_: seen.append("hook"))
    accelerate(ours)
    calls = counted(monkeypatch)
    x = torch.randn(1, 4, 8, 8)
    ours(x)
    assert seen == ["hook"]
    assert not ours.training
    assert calls == ["haar_bands"] * 2 + ["haar_from_bands"] * 2

    copied = copy.deepcopy(ours)
    saved = io.BytesIO()
    torch.save(ours.wt_function, saved)
    with torch.no_grad():
        copied.wavelet_convs[0].weight.zero_()
    assert not torch.equal(copied(x), ours(x))
    assert copied.wt_function.filters is copied.wt_filter
    assert copied.wt_function.original.keywords["filters"] is copied.wt_filter

    state = theirs.state_dict()
    state["wt_filter"], state["iwt_filter"] = -state["wt_filter"], 2 * state["iwt_filter"]
    for model in (theirs, ours):
        model.load_state_dict(state)
    calls.clear()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert calls == []
    ours.load_state_dict(copied.state_dict())
    ours.wt_filter.requires_grad_()
    ours(x).sum().backward()
    assert ours.wt_filter.grad is not None
    assert calls == ["haar_from_bands"] * 2


def test_autocast_compile_and_export() -> None:
    torch.manual_seed(0)
    theirs = vendored.WTConv2d(4, 4, 3, wt_levels=2)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    x = torch.randn(2, 4, 10, 12)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x), theirs(x)
        assert ours.wt_function(x).dtype == theirs.wt_function(x).dtype == torch.bfloat16
    exact = in_float64(theirs)(x.double())
    assert_as_good([a.detach()], [b.detach()], [exact.detach()], torch.bfloat16)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x), rtol=1e-5, atol=1e-5)
    program = torch.export.export(wk.export_form(ours), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert not any("wavemix" in str(node.target) for node in program.graph.nodes)
    y = torch.randn(3, 4, 10, 12)
    torch.testing.assert_close(program.module()(y), theirs(y).detach(), rtol=1e-5, atol=1e-5)


def conv(**arguments: str) -> nn.Module:
    return vendored.WTConv2d(4, 4, 3, **arguments)


def learning(module: nn.Module) -> nn.Module:
    module.iwt_filter.requires_grad_()
    return module


def with_methods() -> nn.Module:
    module = type("Other", (vendored.WTConv2d,), {"wt_function": lambda self, x: x})(4, 4)
    del module.wt_function  # the instance's
    return module


def flipped(x: Tensor) -> Tensor:
    return vendored.wavelet_transform(x, conv().wt_filter).flip(2)


NO_FILTERS = partial(vendored.inverse_wavelet_transform, filters=torch.zeros(3, 1, 2, 2))


@pytest.mark.parametrize(
    "build, named",
    [
        (lambda: conv(wt_type="db2"), r"its wt_filter have shape \(16, 1, 4, 4\)"),
        (lambda: learning(conv()), "its iwt_filter are trainable"),
        (lambda: changed(conv(), wt_function=flipped), "compute something else"),
        (lambda: changed(conv(), iwt_function=NO_FILTERS), "could not be run beside ours"),
        (lambda: with_methods(), "its wt_function is a method"),
        (lambda: conv().to("meta"), "its wt_filter are on the meta device"),
    ],
)
def test_modules_it_leaves(build: Callable[[], nn.Module], named: str) -> None:
    module = build()
    functions = [module.wt_function, module.iwt_function]
    report = accelerate(module)
    assert report.replaced == ()
    (left,) = report.left
    assert re.search(named, left.reason), left.reason
    assert functions == [module.wt_function, module.iwt_function]
