"""Minimal filtering of the transposed convolution in float64 (csrc/cpu/deconv.cpp, deconv_gradients.cpp).

With `sizes`, of absolute values and with plus signs only: what the kernels' rounding errors scale with.
"""

from __future__ import annotations

import torch
from torch import Tensor


def matrix(*rows: str) -> Tensor:
    return torch.tensor([[float(x) for x in row.split()] for row in rows], dtype=torch.float64)


# rows 2i-1 .. 2i+2 -> what each product multiplies; taps -> of each product; products -> rows 4t .. 4t+3
INPUT = matrix("1 -1 0 0", "0 1 0 0", "0 1 -1 0", "0 1 -1 0", "0 0 1 0", "0 0 1 -1")
WEIGHT = matrix("0 0 0 1", "0 1 0 1", "0 1 0 0", "0 0 1 0", "1 0 1 0", "1 0 0 0")
OUTPUT = matrix("1 1 0 0 0 0", "0 0 0 1 1 0", "0 1 -1 0 0 0", "0 0 0 0 1 -1")
# rows 4t-1 .. 4t+4 of the gradient -> what each product of its pass multiplies; taps -> of each product; sums of two
# products -> rows 2t, 2t+1
GRAD = matrix("1 0 -1 0 0 0", "0 0 1 0 0 0", "0 0 1 0 -1 0", "0 1 0 -1 0 0", "0 0 0 1 0 0", "0 0 0 1 0 -1")
GRAD_WEIGHT = matrix("1 0 0 0", "1 0 1 0", "0 0 1 0", "0 1 0 0", "0 1 0 1", "0 0 0 1")
SUMS = matrix("1 1 0", "0 1 -1")


def both(matrix: Tensor, patch: Tensor) -> Tensor:
    """Along both of the last two axes."""
    return matrix @ patch @ matrix.t()


def tiles(image: Tensor, side: int, step: int, first: int, rows: int, columns: int) -> Tensor:
    """Patches (N, C, rows, columns, side, side) beginning at ``step * tile + first``, zero outside."""
    n, c, h, w = image.shape
    whole = image.new_zeros(n, c, step * rows + 8, step * columns + 8)
    whole[:, :, 2 : 2 + h, 2 : 2 + w] = image
    cut = whole[:, :, 2 + first :, 2 + first :].unfold(2, side, step).unfold(3, side, step)
    return cut[:, :, :rows, :columns]


def forward(u: Tensor, weight: Tensor, *, sizes: bool = False) -> Tensor:
    n, _, h, w = u.shape
    rows, columns = -(-h // 2), -(-w // 2)
    forms, taps, out = (m.abs() if sizes else m for m in (INPUT, WEIGHT, OUTPUT))
    u, weight = (t.abs() if sizes else t for t in (u, weight))
    v = both(forms, tiles(u, 4, 2, -1, rows, columns))
    y = both(out, torch.einsum("nfrcij,foij->norcij", v, both(taps, weight)))
    return y.permute(0, 1, 2, 4, 3, 5).reshape(n, weight.shape[1], 4 * rows, 4 * columns)[:, :, : 2 * h, : 2 * w]


def input_gradient(grad: Tensor, weight: Tensor, *, sizes: bool = False) -> Tensor:
    """The gradient of u, likewise."""
    h, w = grad.shape[2] // 2, grad.shape[3] // 2
    rows, columns = -(-h // 2), -(-w // 2)
    sums = SUMS.abs() if sizes else SUMS
    forms, taps = (m.abs() if sizes else m for m in (GRAD, GRAD_WEIGHT))
    grad, weight = (t.abs() if sizes else t for t in (grad, weight))
    v = both(forms, tiles(grad, 6, 4, -1, rows, columns))
    products = torch.einsum("norcij,foij->nfrcij", v, both(taps, weight))
    u = both(torch.cat((sums, sums), 1), products)  # both halves of the products go into the same sums
    return u.permute(0, 1, 2, 4, 3, 5).reshape(grad.shape[0], weight.shape[0], 2 * rows, 2 * columns)[:, :, :h, :w]


def gradient_sizes(u: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The same for both gradients, of absolute values: that of weight is the transposed map."""
    weight = weight.abs().requires_grad_()
    d_u = input_gradient(grad, weight, sizes=True)
    return d_u.detach(), torch.autograd.grad(d_u, weight, u.abs())[0]
