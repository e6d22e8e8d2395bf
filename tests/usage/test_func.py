"""torch.func and forward mode: per-sample gradients, ensembles, Jacobians, through every operator, block and model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vmap

import wavemix_kernels as wk
from tests.models.subjects import normal, randomised
from wavemix_kernels import log, wavemlp
from wavemix_kernels.nn.wavemix.expansion import FusedExpansion
from wavemix_kernels.ops.deconv import deconv
from wavemix_kernels.ops.haar import haar_pyramid
from wavemix_kernels.ops.haar.bands import haar_bands, haar_from_bands
from wavemix_kernels.ops.haar.op import MODES
from wavemix_kernels.ops.mlp import pointwise_mlp
from wavemix_kernels.ops.patm import phase_aggregate
from wavemix_kernels.ops.reduce_haar import reduce_haar
from wavemix_kernels.pytorch_wavelets import DWTForward, DWTInverse
from wavemix_kernels.wavemix import SemSegment, classification, sisr

Function = Callable[[Tensor], Tensor]


def joined(tensors: Any) -> Tensor:
    low, highs = tensors
    return torch.cat([low.flatten(), *(t.flatten() for t in highs)])


def inverse(x: Tensor, mode: str) -> Tensor:
    bands = x.unflatten(1, (-1, 3))
    return wk.haar_idwt2d(bands[:, :, 0], [bands * 0.5], mode=mode, size=(2 * x.shape[2] - 1, 2 * x.shape[3]))


LINEAR: dict[str, Function] = {
    **{f"haar_dwt2d {mode}": lambda x, mode=mode: joined(wk.haar_dwt2d(x, 2, mode=mode)) for mode in MODES},
    **{f"haar_idwt2d {mode}": partial(inverse, mode=mode) for mode in ("zero", "reflect")},
    "haar_pyramid": lambda x: torch.cat([z.flatten() for z in haar_pyramid(x[..., :4, :4], 2)]),
    "haar_bands": lambda x: haar_bands(x[..., :4, :4]),
    "haar_from_bands": lambda x: haar_from_bands(torch.stack([x, 2 * x, 3 * x, x], 2)),
    "DWTForward": lambda x: joined(DWTForward(2, "haar", "symmetric")(x)),
    "DWTForward other": lambda x: joined(DWTForward(1, ((0.1, 0.5, 0.4), (0.5, -1.0, 0.5)))(x)),
    "DWTInverse": lambda x: DWTInverse("haar")((x[:, :2], [None, x.unflatten(1, (2, 3))])),
}


@pytest.mark.parametrize("name", LINEAR)
def test_tangent_of_a_wavelet_transform_is_the_transform_of_the_tangent(name, float64_buffers):
    """Forward mode through a DWT: jvp, jacfwd, linearize, dual numbers. Dual numbers lost their tangents in silence."""
    function = LINEAR[name]
    x, v = normal(1, 6, 5, 6), normal(1, 6, 5, 6, seed=2)
    want = function(v)
    torch.testing.assert_close(jvp(function, (x,), (v,)), (function(x), want))
    torch.testing.assert_close(linearize(function, x)[1](v), want)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, v)))
        torch.testing.assert_close(dual.tangent, want)
        grads = forward_ad.make_dual(x.clone().requires_grad_(), v)
        torch.testing.assert_close(forward_ad.unpack_dual(function(grads)).tangent, want)
    forwards, backwards = jacfwd(function)(x), jacrev(function)(x)
    torch.testing.assert_close(forwards, backwards)
    torch.testing.assert_close((forwards * v).sum((-4, -3, -2, -1)), want)
    curved = hessian(lambda x: function(x).pow(3).sum())(x)
    through = jacrev(jacrev(lambda x: function(x).pow(3).sum()))(x)
    torch.testing.assert_close(curved, through)


@pytest.mark.parametrize("name", LINEAR)
def test_wavelet_transforms_batch(name, float64_buffers):
    """vmap, and vmap of a gradient, over a further axis, wherever it stands."""
    function = LINEAR[name]
    x = normal(3, 1, 6, 5, 6)
    torch.testing.assert_close(vmap(function)(x), torch.stack([function(one) for one in x]))
    torch.testing.assert_close(vmap(function, in_dims=2)(x.movedim(0, 2)), torch.stack([function(one) for one in x]))
    slope = grad(lambda x: function(x).pow(2).sum())
    torch.testing.assert_close(vmap(slope)(x), torch.stack([slope(one) for one in x]))


def test_gradcheck_in_forward_mode():
    """torch.autograd.gradcheck with check_forward_ad, and forward over reverse, on the transform and its inverse."""
    x = normal(2, 1, 5, 6).requires_grad_()
    gradcheck = partial(torch.autograd.gradcheck, check_forward_ad=True)
    assert gradcheck(lambda x: joined(wk.haar_dwt2d(x, 2, mode="reflect")), (x,))
    low, high = normal(2, 1, 3, 3).requires_grad_(), normal(2, 1, 3, 3, 3).requires_grad_()
    assert gradcheck(lambda a, b: wk.haar_idwt2d(a, [b]), (low, high))
    assert torch.autograd.gradgradcheck(
        lambda x: joined(wk.haar_dwt2d(x)), (x,), check_fwd_over_rev=True, check_rev_over_rev=True
    )


def test_missing_tangents_are_zeros():
    """Only the low-pass has a tangent; the details and the residual are constants."""
    low, high, add = normal(1, 2, 3, 3), normal(1, 2, 3, 3, 3), normal(1, 2, 6, 6)
    v = normal(1, 2, 3, 3, seed=5)
    _, tangent = jvp(lambda low: wk.haar_idwt2d(low, [high], add=add), (low,), (v,))
    torch.testing.assert_close(tangent, wk.haar_idwt2d(v, [torch.zeros_like(high)]))


# --- Fused operators, blocks, models -------------------------------------------------------------------------


def operators() -> dict[str, Function]:
    of_reduction = normal(2, 4, 1, 1), normal(2)
    of_mlp = normal(8, 4), normal(8), normal(4, 8), normal(4)
    of_deconv = normal(4, 3, 4, 4), normal(3)
    of_phases = [normal(4, seed=s) for s in range(4)] + [normal(4, 2, 1, 7), normal(4, 2, 7, 1)]
    return {
        "reduce_haar": lambda x: torch.cat([z.flatten(1) for z in reduce_haar(x, *of_reduction, 2)], 1),
        "pointwise_mlp": lambda x: pointwise_mlp(x, *of_mlp),
        "deconv": lambda x: deconv(x, *of_deconv),
        "phase_aggregate": lambda x: phase_aggregate(x, 2 * x, x, x, 1 + x, *of_phases)[0],
    }


def modules() -> dict[str, nn.Module]:
    """In evaluation: BatchNorm in training writes its statistics in place, which torch.func refuses of any model."""
    block = {"final_dim": 4, "ff_channel": 4, "dropout": 0.0}
    made = {
        **{f"FusedWaveblock {u}": wk.FusedWaveblock(level=2, upsample=u, **block)
           for u in ("deconv", "bilinear", "nearest", "pixelshuffle")},
        "FusedPATM fc": wk.FusedPATM(4),
        "FusedPATM depthwise": wk.FusedPATM(4, mode="depthwise"),
        "FusedMlp": wavemlp.Mlp(4, 8),
        "FusedWaveBlock": wavemlp.WaveBlock(4),
        "FusedWaveBlock GroupNorm": wavemlp.WaveBlock(4, norm_layer=wavemlp.MyNorm),
        "FusedExpansion": FusedExpansion(4, 1, 2),
        "classification": nn.Sequential(
            nn.Conv2d(4, 3, 1), classification.WaveMix(num_classes=3, depth=1, level=1, patch_size=2, **block)
        ),
        "sisr": nn.Sequential(nn.Conv2d(4, 3, 1), sisr.WaveMix(depth=1, **block)),
        "SemSegment": nn.Sequential(nn.Conv2d(4, 3, 1), SemSegment.WaveMix(num_classes=3, depth=1, level=1, stride=1,
                                                                         **block)),
        "WaveNet": wavemlp.WaveNet([1, 1], embed_dims=[4, 6], mlp_ratios=[2, 2], in_chans=4, num_classes=3),
    }  # fmt: skip
    return {name: randomised(m).double().eval() for name, m in made.items()}


def inference_forms() -> dict[str, nn.Module]:
    return {f"inference {name}": wk.fuse_for_inference(module) for name, module in modules().items()
            if name not in ("FusedMlp",)}  # fmt: skip


def reference(function: Function) -> Function:
    @wk.backend("reference")
    def run(x: Tensor) -> Tensor:
        return function(x)

    return run


#: Step of a central difference in float64: rounding and curvature err by 1e-10 each.
STEP = 1e-5
SUBJECTS: dict[str, Function] = operators() | modules() | inference_forms()


NCHW, LAST = torch.contiguous_format, torch.channels_last
#: Operators in both memory orders; a block runs as layers of torch, in one, and its inference form in the other.
IN_ORDERS = [
    *((name, order) for name in operators() for order in (NCHW, LAST)),
    *((name, (NCHW, LAST)[i % 2]) for i, name in enumerate(modules())),
    *((f"inference {name}", (LAST, NCHW)[i % 2]) for i, name in enumerate(modules())),
]
#: Left to `make prove`.
OTHER_FORMS = [name for name in SUBJECTS if name.startswith("inference ")][1::2]


@pytest.mark.parametrize("name, order", [
    pytest.param(name, order, id=f"{name}-{'nchw' if order is NCHW else 'channels_last'}",
                 marks=pytest.mark.prove if name in OTHER_FORMS else ())
    for name, order in IN_ORDERS if name in SUBJECTS
])  # fmt: skip
def test_every_block_batches_and_has_tangents(name, order):
    """A Jacobian for a sensitivity map, and a vmap over augmentations, of any part of the package."""
    if "GroupNorm" in name:
        order = NCHW  # vmap(nn.GroupNorm) itself refuses channels_last
    function, exact = SUBJECTS[name], reference(SUBJECTS[name])
    x, v = (normal(2, 4, 8, 8, seed=s).contiguous(memory_format=order) for s in (1, 2))
    with torch.no_grad():
        tangent = (exact(x + STEP * v) - exact(x - STEP * v)) / (2 * STEP)
        near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6 * float(tangent.abs().max()))
        out, got = jvp(function, (x,), (v,))
        torch.testing.assert_close(out, exact(x))
        near(got, tangent)
        near(linearize(function, x)[1](v), tangent)
        many = torch.stack((x, v))
        torch.testing.assert_close(vmap(function)(many), torch.stack([exact(one) for one in many]))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, v)))
            near(dual.tangent, tangent)


@pytest.mark.parametrize("name", modules())
def test_gradients_of_each_sample(name):
    """Per-sample gradients of all parameters, as differential privacy and influence functions take them."""
    model = modules()[name]
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    x = normal(3, 4, 8, 8)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, (weights, buffers), (x[None],)).pow(2).sum()

    together = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    slopes = grad(loss)(weights, x[0])
    for i, one in enumerate(x):
        wanted = torch.autograd.grad(model(one[None]).pow(2).sum(), list(weights.values()), allow_unused=True)
        for (key, value), want in zip(weights.items(), wanted, strict=True):
            want = torch.zeros_like(value) if want is None else want
            torch.testing.assert_close(together[key][i], want, rtol=1e-6, atol=1e-9)
            if i == 0:
                torch.testing.assert_close(slopes[key], want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", modules())
def test_ensemble_by_stack_module_state(name):
    """Several trained copies of a model served as one: vmap over stack_module_state."""
    models = [randomised(copy.deepcopy(modules()[name]), seed) for seed in range(2)]
    weights, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0]).to("meta")
    x = normal(2, 4, 8, 8)
    together = vmap(lambda w, b: functional_call(base, (w, b), (x,)))(weights, buffers)
    torch.testing.assert_close(together, torch.stack([m(x) for m in models]))


def test_training_after_batch_norm_was_prepared():
    """replace_all_batch_norm_modules_ is PyTorch's own way to train a model with BatchNorm under torch.func."""
    model = modules()["classification"].train()
    torch.func.replace_all_batch_norm_modules_(model)
    weights = dict(model.named_parameters())
    x = normal(4, 4, 8, 8)
    slopes = grad(lambda w: functional_call(model, w, (x,)).pow(2).sum())(weights)
    for key, want in zip(weights, torch.autograd.grad(model(x).pow(2).sum(), list(weights.values())), strict=True):
        torch.testing.assert_close(slopes[key], want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["FusedWaveblock deconv", "FusedPATM fc", "inference FusedWaveblock deconv"])
def test_the_fallback_is_logged(name, caplog):
    """Slower for a reason: the log names torch.func, once."""
    log._told.clear()
    module = SUBJECTS[name]
    with caplog.at_level(logging.INFO, "wavemix_kernels"):
        vmap(module)(normal(2, 1, 4, 8, 8))
        assert "torch.func is at work" in caplog.text
        caplog.clear()
        module(normal(1, 4, 8, 8))
        vmap(module)(normal(2, 1, 4, 8, 8))
        assert "torch.func" not in caplog.text


COMPILED: dict[str, Callable[[], Function]] = {
    "haar": lambda: lambda x: joined(wk.haar_dwt2d(x, 2)),
    "FusedWaveblock": lambda: wk.FusedWaveblock(final_dim=4, ff_channel=4, dropout=0.0).double().eval(),
    **{name: partial(SUBJECTS.__getitem__, name) for name in ("FusedMlp", "inference FusedPATM fc")},
}


@pytest.mark.parametrize(
    "name", [name if name in ("haar", "FusedWaveblock") else pytest.param(name, marks=pytest.mark.prove)
             for name in COMPILED],
)  # fmt: skip
def test_transforms_inside_a_compiled_function(name):
    """torch.compile of a function that takes per-sample gradients inside, where there are any."""
    function = COMPILED[name]()
    x = normal(2, 1, 4, 8, 8)
    transforms = [vmap, lambda f: vmap(grad(lambda x: f(x).pow(2).sum()))]
    for transform in transforms[: 1 if "inference" in name else 2]:
        torch._dynamo.reset()
        per_sample = transform(lambda x: function(x))
        torch.testing.assert_close(torch.compile(per_sample, backend="aot_eager", fullgraph=True)(x), per_sample(x))
