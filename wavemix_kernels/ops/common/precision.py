"""How fp32 values are multiplied on a GPU: as torch would multiply them in the convolutions that kernels replace.

Every product of this package stands for a convolution (1x1 or transposed), so its setting is that of convolutions:
TF32 by default, where matrix products have it off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    """Convolutions, the library's and ours, in ``"ieee"`` or ``"tf32"``."""
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision={precision!r}: must be 'ieee' or 'tf32'")
    where, name = (_convolutions, "fp32_precision") if _BY_OP else (torch.backends.cudnn, "allow_tf32")
    before = getattr(where, name)
    setattr(where, name, precision if _BY_OP else precision == "tf32")
    try:
        yield
    finally:
        setattr(where, name, before)
