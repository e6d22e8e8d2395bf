"""The backward pass of one wave branch of PATM in Triton; the forward pass is :mod:`.triton_phases`.

Waves are made again. The window in registers is of the outputs' gradient, so that each amplitude and phase is met once.
"""

# No `from __future__ import annotations` here: Triton reads its kernels' annotations.
# mypy: disable-error-code="no-untyped-def, has-type, no-redef"
# (Triton's functions are traced, not called: their arguments have no Python types.)
import triton
import triton.language as tl
from torch import Tensor

from wavemix_kernels.ops.common.triton_launch import Launch
from wavemix_kernels.ops.patm.triton_phases import SIZES, PhaseConfig, launch_by_name, make_plan
from wavemix_kernels.ops.patm.triton_waves import even_odd, gradient, interleave, position, sincos, tap
from wavemix_kernels.ops.patm.waves import Branch, Cotangent

_BACKWARD_STRIDES = tuple(f"{t}_{d}" for t in ("grad", "z", "theta", "d_z", "d_theta", "d_c") for d in "nla")


@triton.jit
def _store_tap(row, mask, value, NUMBER: tl.constexpr):
    tl.store(row + NUMBER, tl.sum(value, 0), mask=mask)


@triton.jit(do_not_specialize=("units", "splits", *SIZES, *_BACKWARD_STRIDES))
def _backward_kernel(
    d_z, d_theta, d_c, partial_taps, partial_sums, grad, a, a_c, b, z, theta, scale, shift, center, taps,
    units, splits, channels, length, lines, line_blocks, segment, segments,
    grad_n: tl.int64, grad_l: tl.int64, grad_a: tl.int64, z_n: tl.int64, z_l: tl.int64, z_a: tl.int64,
    theta_n: tl.int64, theta_l: tl.int64, theta_a: tl.int64, d_z_n: tl.int64, d_z_l: tl.int64, d_z_a: tl.int64,
    d_theta_n: tl.int64, d_theta_l: tl.int64, d_theta_a: tl.int64, d_c_n: tl.int64, d_c_l: tl.int64, d_c_a: tl.int64,
    WEIGHTED: tl.constexpr, THIRD: tl.constexpr, CENTERED: tl.constexpr, ALIGN: tl.constexpr,
    LINES: tl.constexpr, CHANNELS: tl.constexpr, REAL: tl.constexpr,
    OF_CHIP: tl.constexpr,
):  # fmt: skip
    """d = grad * a + b is the gradient of the outputs. The window is of d, so that amplitudes and phases are met once.

    `partial_taps` (splits, C, 2, 7), `partial_sums` (splits, 2, C).
    """
    channels *= ALIGN
    blocks = tl.cdiv(channels, CHANNELS)
    split = tl.program_id(0) // blocks
    block = tl.program_id(0) - split * blocks
    pairs = channels // 2
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    pair = block * (CHANNELS // 2) + tl.arange(0, CHANNELS // 2)
    in_channels = channel < channels
    rise = tl.load(scale + channel, mask=in_channels, other=0.0)[None, :]
    offset = tl.load(shift + channel, mask=in_channels, other=0.0)[None, :]
    output = pair[:, None] + (tl.arange(0, 2) * pairs)[None, :]
    exists = (pair < pairs)[:, None] & (tl.arange(0, 2) < 2)[None, :]
    row = taps + output * 14
    even0 = tap(row, exists, 0)
    even1 = tap(row, exists, 1)
    even2 = tap(row, exists, 2)
    even3 = tap(row, exists, 3)
    even4 = tap(row, exists, 4)
    even5 = tap(row, exists, 5)
    even6 = tap(row, exists, 6)
    odd0 = tap(row, exists, 7)
    odd1 = tap(row, exists, 8)
    odd2 = tap(row, exists, 9)
    odd3 = tap(row, exists, 10)
    odd4 = tap(row, exists, 11)
    odd5 = tap(row, exists, 12)
    odd6 = tap(row, exists, 13)
    zero = tl.zeros((LINES, CHANNELS // 2, 2), REAL)
    d_even0 = zero
    d_even1 = zero
    d_even2 = zero
    d_even3 = zero
    d_even4 = zero
    d_even5 = zero
    d_even6 = zero
    d_odd0 = zero
    d_odd1 = zero
    d_odd2 = zero
    d_odd3 = zero
    d_odd4 = zero
    d_odd5 = zero
    d_odd6 = zero
    sum_pre = tl.zeros((LINES, CHANNELS), REAL)
    sum_pre_theta = tl.zeros((LINES, CHANNELS), REAL)
    middle = tl.zeros((1, CHANNELS), REAL)
    if CENTERED:
        middle = tl.load(center + channel, mask=in_channels, other=0.0)[None, :]
    for unit in range(split, units, splits):
        image, line, begin, end = position(unit, line_blocks, segments, segment, length, LINES)
        mask = (line < lines)[:, None] & in_channels[None, :]
        out_mask = (line < lines)[:, None] & (pair < pairs)[None, :]
        z_at = z + image * (z_n * ALIGN) + (line * (z_l * ALIGN))[:, None] + channel[None, :]
        theta_at = theta + image * (theta_n * ALIGN) + (line * (theta_l * ALIGN))[:, None] + channel[None, :]
        d_z_at = d_z + image * (d_z_n * ALIGN) + (line * (d_z_l * ALIGN))[:, None] + channel[None, :]
        d_theta_at = d_theta + image * (d_theta_n * ALIGN) + (line * (d_theta_l * ALIGN))[:, None] + channel[None, :]
        line_at = grad + image * (grad_n * ALIGN) + (line * (grad_l * ALIGN))[:, None]
        pair_at = line_at + pair[None, :]
        term = tl.load(b + image * channels + output, mask=exists, other=0.0)[None, :, :]
        factor = tl.full((1, CHANNELS // 2, 2), 1.0, REAL)
        if WEIGHTED:
            factor = tl.load(a + image * channels + output, mask=exists, other=0.0)[None, :, :]
        step = grad_a * ALIGN
        # d0 ... d6: 3 pixels behind the one at work to 3 ahead; zero outside the image.
        d0 = gradient(pair_at, begin - 3, step, pairs, length, out_mask, factor, term, REAL)
        d1 = gradient(pair_at, begin - 2, step, pairs, length, out_mask, factor, term, REAL)
        d2 = gradient(pair_at, begin - 1, step, pairs, length, out_mask, factor, term, REAL)
        d3 = gradient(pair_at, begin, step, pairs, length, out_mask, factor, term, REAL)
        d4 = gradient(pair_at, begin + 1, step, pairs, length, out_mask, factor, term, REAL)
        d5 = gradient(pair_at, begin + 2, step, pairs, length, out_mask, factor, term, REAL)
        for i in range(begin, end):
            d6 = gradient(pair_at, i + 3, step, pairs, length, out_mask, factor, term, REAL)
            amplitude = tl.load(z_at + i * (z_a * ALIGN), mask=mask, other=0.0).to(REAL)
            value = tl.load(theta_at + i * (theta_a * ALIGN), mask=mask, other=0.0).to(REAL)
            pre = value * rise + offset
            sine, cosine = sincos(pre, OF_CHIP)
            cos_even, cos_odd = even_odd(amplitude * cosine)
            sin_even, sin_odd = even_odd(amplitude * sine)
            even = tl.join(cos_even, sin_even)
            odd = tl.join(cos_odd, sin_odd)
            d_even0 += d6 * even
            d_even1 += d5 * even
            d_even2 += d4 * even
            d_even3 += d3 * even
            d_even4 += d2 * even
            d_even5 += d1 * even
            d_even6 += d0 * even
            d_odd0 += d6 * odd
            d_odd1 += d5 * odd
            d_odd2 += d4 * odd
            d_odd3 += d3 * odd
            d_odd4 += d2 * odd
            d_odd5 += d1 * odd
            d_odd6 += d0 * odd
            even = d6 * even0 + d5 * even1 + d4 * even2 + d3 * even3 + d2 * even4 + d1 * even5 + d0 * even6
            odd = d6 * odd0 + d5 * odd1 + d4 * odd2 + d3 * odd3 + d2 * odd4 + d1 * odd5 + d0 * odd6
            real_even, imaginary_even = tl.split(even)
            real_odd, imaginary_odd = tl.split(odd)
            real = interleave(real_even, real_odd)
            imaginary = interleave(imaginary_even, imaginary_odd)
            d_pre = tl.where(pre <= 0, 0.0, amplitude * (imaginary * cosine - real * sine))
            sum_pre += d_pre
            sum_pre_theta += d_pre * (value - middle)
            amplitude = real * cosine + imaginary * sine
            tl.store(d_z_at + i * (d_z_a * ALIGN), amplitude.to(d_z.dtype.element_ty), mask=mask)
            tl.store(d_theta_at + i * (d_theta_a * ALIGN), (d_pre * rise).to(d_theta.dtype.element_ty), mask=mask)
            d0 = d1
            d1 = d2
            d2 = d3
            d3 = d4
            d4 = d5
            d5 = d6
        if THIRD:
            # The same pixels once more, from cache: in the loop above, registers would not suffice.
            factor = tl.load(a_c + image * channels + channel, mask=in_channels, other=0.0)[None, :]
            term = tl.load(b + image * channels + channel, mask=in_channels, other=0.0)[None, :]
            natural_at = line_at + channel[None, :]
            d_c_at = d_c + image * (d_c_n * ALIGN) + (line * (d_c_l * ALIGN))[:, None] + channel[None, :]
            for i in range(begin, end):
                g = tl.load(natural_at + i * step, mask=mask, other=0.0).to(REAL) * factor + term
                tl.store(d_c_at + i * (d_c_a * ALIGN), g.to(d_c.dtype.element_ty), mask=mask)
    row = partial_taps + split.to(tl.int64) * (channels * 14) + output * 14
    _store_tap(row, exists, d_even0, 0)
    _store_tap(row, exists, d_even1, 1)
    _store_tap(row, exists, d_even2, 2)
    _store_tap(row, exists, d_even3, 3)
    _store_tap(row, exists, d_even4, 4)
    _store_tap(row, exists, d_even5, 5)
    _store_tap(row, exists, d_even6, 6)
    _store_tap(row, exists, d_odd0, 7)
    _store_tap(row, exists, d_odd1, 8)
    _store_tap(row, exists, d_odd2, 9)
    _store_tap(row, exists, d_odd3, 10)
    _store_tap(row, exists, d_odd4, 11)
    _store_tap(row, exists, d_odd5, 12)
    _store_tap(row, exists, d_odd6, 13)
    at = partial_sums + split.to(tl.int64) * (channels * 2) + channel
    tl.store(at, tl.sum(sum_pre, 0), mask=in_channels)
    tl.store(at + channels, tl.sum(sum_pre_theta, 0), mask=in_channels)


def backward_launch(
    d_z: Tensor, d_theta: Tensor, d_c: Tensor | None, cotangent: Cotangent, branch: Branch,
    config: PhaseConfig | None = None,
) -> tuple[Launch, Tensor, Tensor]:  # fmt: skip
    """A launch and the partial sums it fills: (splits, C, 2, 7) of the taps' gradients, (splits, 2, C)."""
    grad, a, b, a_c, center = cotangent
    images = {"grad": grad, "z": branch.z, "theta": branch.theta, "d_z": d_z, "d_theta": d_theta,
              "d_c": d_z if d_c is None else d_c}  # fmt: skip
    plan = make_plan(branch, images, True, config)
    # Each program gets the same number of units: the smallest that leaves enough programs.
    each = max(1, plan.units * plan.blocks // plan.programs)
    splits = triton.cdiv(plan.units, each)
    c = branch.z.shape[1]
    partial_taps = b.new_empty((splits, c, 2, 7))
    partial_sums = b.new_empty((splits, 2, c))
    given = {
        **branch._asdict(), **images, "partial_taps": partial_taps, "partial_sums": partial_sums,
        "a": b if a is None else a, "b": b, "a_c": b if a_c is None else a_c, "center": b if center is None else center,
        "units": plan.units, "splits": splits, **plan.sizes, **plan.strides,
    }  # fmt: skip
    constants = {
        **plan.constants, "WEIGHTED": a is not None, "THIRD": d_c is not None, "CENTERED": center is not None
    }  # fmt: skip
    return launch_by_name(_backward_kernel, splits * plan.blocks, given, constants), partial_taps, partial_sums


def backward(
    d_z: Tensor, d_theta: Tensor, d_c: Tensor | None, cotangent: Cotangent, branch: Branch,
    config: PhaseConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes the gradients of z, theta (through a constant affine map) and, where there is one, of the third branch.

    Returns those of the taps, and (2, C) the sums of d and of ``d * (theta - center)``, with d the gradient of the
    phase before ReLU.
    """
    launch, taps, sums = backward_launch(d_z, d_theta, d_c, cotangent, branch, config)
    launch.run(d_z)
    return taps.sum(0).view(branch.taps.shape), sums.sum(0)
