"""How fp32 values are multiplied on a GPU: as torch would multiply them in the convolutions that kernels replace.

Every product of this package stands for a convolution (1x1 or transposed), so its setting is that of convolutions:
TF32 by default, where matrix products have it off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_convolutions: Any = getattr(torch.backends.cudnn, "conv", None)
#: torch 2.9 on, ``fp32_precision``; reading the older flag beside it is an error there.
_BY_OP = hasattr(_convolutions, "fp32_precision")


def tf32() -> bool:
    """Whether torch's setting for convolutions lets fp32 be multiplied in TF32."""
    return _convolutions.fp32_precision == "tf32" if _BY_OP else bool(torch.backends.cudnn.allow_tf32)


def input_precision() -> str:
    """The setting as ``tl.dot`` takes it."""
    return "tf32" if tf32() else "ieee"


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """fp32 products, the library's and ours, in ``"ieee"`` or ``"tf32"``. The switches are the process's: other threads
    multiply so meanwhile."""
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision={precision!r}: must be 'ieee' or 'tf32'")
    allowed, cudnn = precision == "tf32", torch.backends.cudnn
    # Both sets of switches must agree, or whoever reads the older one gets an error.
    newer: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn] if _BY_OP else []  # type: ignore[attr-defined]
    matmul = _unless_mixed(lambda: torch.backends.cuda.matmul.allow_tf32)
    both, conv = _unless_mixed(torch.get_float32_matmul_precision), _unless_mixed(lambda: cudnn.allow_tf32)
    before = [switch.fp32_precision for switch in newer]
    try:
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        cudnn.allow_tf32 = allowed
        for switch in newer:
            switch.fp32_precision = precision
        yield
    finally:
        if matmul is not None:
            torch.backends.cuda.matmul.allow_tf32 = matmul
        if both is not None:
            torch.set_float32_matmul_precision(both)
        if conv is not None:
            cudnn.allow_tf32 = conv
        for switch, value in zip(newer, before, strict=True):
            switch.fp32_precision = value


def _unless_mixed(read: Callable[[], Any]) -> Any:
    """None where the user has set the switches apart."""
    try:
        return read()
    except RuntimeError:
        return None
