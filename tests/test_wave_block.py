"""Wave-MLP's block as two functions against the modules it is made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from wavemix_kernels.benchmarks.harness import memory

from tests.test_wavemlp import TINY, normal, randomised
from tests.tolerances import UNIT_ROUNDOFF
from wavemix_kernels.nn.wavemlp import reference as patm
from wavemix_kernels.nn.wavemlp.reference import WaveBlock as ReferenceBlock
from wavemix_kernels.ops.common import layout
from wavemix_kernels.ops.mlp import channel as channel_mlp
from wavemix_kernels.ops.patm import op as patm_op
from wavemix_kernels.wavemlp import MyNorm, WaveBlock, WaveNet


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of a seeded step."""
    torch.manual_seed(5)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = module(leaf)
    out.backward(normal(*out.shape, seed=3).to(out.dtype))
    values = {"out": out.detach(), "x": leaf.grad} | {name: p.grad for name, p in module.named_parameters()}
    return values | {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same_step(actual: nn.Module, expected: nn.Module, x: Tensor, rtol: float = 1e-10) -> None:
    """A tensor is off by at most ``rtol`` of its largest value."""
    got, want = step(actual, x), step(expected, x.contiguous())
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        # What stands before batch statistics has a gradient of 0, and the reference has its rounding errors.
        in_front = name.endswith("_conv.0.bias")
        scale = want["x"].abs().sum().item() if in_front else value.abs().max().item()
        assert (got[name] - value).abs().max().item() <= rtol * scale, name


def blocks(dim: int = 8, recompute: str = "amplitudes", **kwargs: object) -> tuple[WaveBlock, ReferenceBlock]:
    exact = randomised(ReferenceBlock(dim, **kwargs).double())
    fused = WaveBlock(dim, **kwargs, recompute=recompute).double()
    fused.load_state_dict(exact.state_dict(), strict=True)
    return fused, exact


norms = pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, MyNorm])
modes = pytest.mark.parametrize("mode", patm.MODES)


class TestFusedBlock:
    @norms
    @modes
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("recompute", patm_op.RECOMPUTE)
    @pytest.mark.parametrize("size", [(6, 5), (2, 1)], ids=str)  # more pixels than hidden channels, and fewer
    def test_matches_reference(
        self, size: tuple[int, int], recompute: str, training: bool, mode: str, norm_layer: object
    ) -> None:
        fused, exact = blocks(mode=mode, norm_layer=norm_layer, drop_path=0.5, recompute=recompute, qkv_bias=True)
        x = normal(4, 8, *size)
        assert_same_step(fused.train(training), exact.train(training), x)

    @norms
    def test_far_from_zero_mean(self, norm_layer: object) -> None:
        """Statistics in fp32 do not cancel: a mean of 1000 deviations costs 1000 roundings, not their square."""
        fused, exact = blocks(norm_layer=norm_layer)
        x = 1000 + normal(2, 8, 6, 5)
        out = fused.float()(x.float()) - x.float()
        want = exact(x) - x
        # The norm reads an x that is off by u |x|, and the sum is rounded at the size of x; ten layers follow.
        assert (out - want).abs().max() <= 20 * 1000 * UNIT_ROUNDOFF[torch.float32] * want.abs().max()

    @norms
    def test_keeps_the_memory_format(self, norm_layer: object) -> None:
        fused, exact = blocks(norm_layer=norm_layer)
        wide = normal(4, 17, 9, 12)
        for x in (wide[:, :8], wide[:, 1::2, ::2].contiguous(memory_format=torch.channels_last)):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = fused(leaf)
            out.sum().backward()
            for value in (out, leaf.grad):
                assert layout.is_channels_last(value) == layout.is_channels_last(x)
        for module in (fused, exact):
            module.zero_grad()
        fused.load_state_dict(exact.state_dict())
        assert_same_step(fused, exact, wide[1:, 1::2, 2:-1, ::3])

    def test_frozen_and_untracked_norms(self) -> None:
        fused, exact = blocks()
        for module in (fused, exact):
            module.norm1.eval()
            module.norm2 = nn.BatchNorm2d(8, affine=False, track_running_stats=False).double()
        assert_same_step(fused, exact, normal(2, 8, 5, 4))
        for module in (fused, exact):
            module.zero_grad()
        assert_same_step(fused.eval(), exact.eval(), normal(2, 8, 5, 4))

    def test_stochastic_depth_draws_as_the_modules_do(self) -> None:
        fused, exact = blocks(drop_path=0.5)
        x = normal(16, 8, 3, 3)
        for seed in range(3):
            results = []
            for module in (fused, exact):
                torch.manual_seed(seed)
                results.append((module(x), torch.rand(1)))
            torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)

    def test_gradients(self) -> None:
        fused, _ = blocks(4, norm_layer=MyNorm)
        names = [name for name, _ in fused.named_parameters()]

        def function(x: Tensor, *parameters: Tensor) -> Tensor:
            return torch.func.functional_call(fused, dict(zip(names, parameters, strict=True)), x)

        inputs = (normal(2, 4, 2, 3).requires_grad_(), *(p.detach().requires_grad_() for p in fused.parameters()))
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast_keeps_the_sum_in_the_inputs_dtype(self, dtype: torch.dtype) -> None:
        fused, _ = blocks(norm_layer=MyNorm)
        fused.float()
        leaf = normal(2, 8, 6, 5).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = fused(leaf)
        assert out.dtype == dtype
        out.float().sum().backward()
        assert leaf.grad.dtype == dtype
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in fused.parameters())

    def test_dtypes_must_agree(self) -> None:
        with pytest.raises(
            TypeError, match=r"x: expected the dtype of the weights, torch\.float32, got torch\.float64"
        ):
            WaveBlock(8)(normal(2, 8, 3, 3))
        with pytest.raises(ValueError, match="recompute='none': expected one of 'amplitudes', 'all'"):
            WaveBlock(8, recompute="none")

    @pytest.mark.parametrize(
        "part, branches",
        [
            ("norm1", "channels"), ("attn", "channels"), ("attn.proj_drop", "channels"), ("attn.fc_c", "channels"),
            ("norm2", "tokens"), ("mlp", "tokens"), ("mlp.act", "tokens"), ("drop_path", ""), ("", "tokens channels"),
        ],
    )  # fmt: skip
    def test_hooks_send_their_branch_to_the_modules(
        self, part: str, branches: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fused, exact = blocks(drop_path=0.5)
        seen: list[nn.Module] = []
        fused.get_submodule(part).register_forward_hook(lambda module, *_: seen.append(module))
        ran: list[str] = []
        for name, owner, function in (
            ("tokens", patm_op._Whole, "apply"),
            ("channels", channel_mlp._Branch, "apply"),
        ):
            original = getattr(owner, function)

            def noted(*args: object, name: str = name, original: object = original) -> object:
                # PATM by itself, in a branch of modules, has no norm.
                if name == "channels" or args[0].kind is not None:
                    ran.append(name)
                return original(*args)

            monkeypatch.setattr(owner, function, noted)
        assert_same_step(fused, exact, normal(4, 8, 5, 4))
        assert seen
        assert ran == branches.split()

    @pytest.mark.parametrize(
        "change",
        [
            lambda block: setattr(block, "norm2", nn.GroupNorm(2, 8).double()),
            lambda block: setattr(block, "norm1", nn.InstanceNorm2d(8).double()),
            lambda block: setattr(block.mlp, "act", nn.GELU(approximate="tanh")),
            lambda block: setattr(block.mlp, "act", nn.ReLU()),
            lambda block: setattr(block, "attn", nn.Conv2d(8, 8, 3, padding=1).double()),
        ],
        ids=["two groups", "instance norm", "tanh", "relu", "convolution"],
    )
    def test_other_parts_run_themselves(self, change: Callable[[nn.Module], None]) -> None:
        fused, exact = blocks()
        for module in (fused, exact):
            torch.manual_seed(0)
            change(module)
        assert_same_step(fused, exact, normal(2, 8, 5, 4))

    @norms
    @modes
    @pytest.mark.parametrize("recompute, images", [("amplitudes", 4.2), ("all", 2.2)])
    def test_images_kept_for_backward(self, recompute: str, images: float, mode: str, norm_layer: object) -> None:
        x = torch.randn(2, 32, 28, 28).contiguous(memory_format=torch.channels_last)
        fused = WaveBlock(32, mode=mode, norm_layer=norm_layer, recompute=recompute)
        exact = ReferenceBlock(32, mode=mode, norm_layer=norm_layer)

        def kept(module: nn.Module) -> float:
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            known = [*module.parameters(), *module.buffers()]
            return memory.saved_bytes(lambda: module(leaf), known) / (x.numel() * x.element_size())

        assert kept(fused) <= images
        assert kept(exact) > 30

    def test_peak_of_a_training_step(self) -> None:
        """Live bytes above parameters and gradients, against upstream's order of operations."""
        x = torch.randn(2, 3, 128, 128)
        sizes = {"layers": [2, 2, 3, 2], "embed_dims": [32, 48, 64, 64], "mlp_ratios": [4, 4, 4, 4], "num_classes": 10}

        def peak(model: nn.Module) -> int:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            known = [x, *model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
            return memory.tracked_peak_bytes(lambda: model(x).square().mean().backward(), known)

        upstream = peak(WaveNet(**sizes, norm_layer=MyNorm, block=ReferenceBlock, token_mixer=patm.PATM))
        assert peak(WaveNet(**sizes, norm_layer=MyNorm)) <= 0.45 * upstream

    def test_models_choose_their_block(self) -> None:
        def kinds(**kwargs: object) -> set[type]:
            return {type(m) for m in WaveNet(**TINY, **kwargs).modules() if isinstance(m, ReferenceBlock)}

        assert kinds() == {WaveBlock}
        assert kinds(token_mixer=patm.PATM) == {ReferenceBlock}  # upstream's order of operations throughout
        assert kinds(token_mixer=patm.PATM, block=WaveBlock) == {WaveBlock}

    def test_works_in_channels_last(self) -> None:
        """One conversion, at the stem; feature maps come back in the image's own format."""
        model = WaveNet(**TINY, fork_feat=True).eval()
        between: list[bool] = []
        for stage in model.network:
            stage.register_forward_hook(lambda _, inputs, out: between.append(layout.is_channels_last(out)))
        x = normal(2, 3, 96, 80, dtype=torch.float32)
        assert not any(layout.is_channels_last(out) for out in model(x))
        assert all(layout.is_channels_last(out) for out in model(x.contiguous(memory_format=torch.channels_last)))
        assert len(between) == 2 * 7
        assert all(between)

    def test_compiles_with_group_norm_and_depthwise_phases(self) -> None:
        torch._dynamo.reset()
        fused, exact = blocks(4, mode="depthwise", norm_layer=MyNorm, recompute="all")
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        x = normal(2, 4, 6, 5)
        got, want = [], []
        for module, results in ((compiled, got), (exact, want)):
            leaf = x.clone().requires_grad_()
            module(leaf).sin().sum().backward()
            results += [leaf.grad, *(p.grad for p in (fused if module is compiled else exact).parameters())]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
