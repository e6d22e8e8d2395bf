"""IDX, the format of MNIST's and Fashion-MNIST's files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

_GZIP = b"\x1f\x8b"
_UNSIGNED_BYTES = b"\x00\x00\x08"  # two zeros, then the code of the element type


def read_idx(path: Path) -> Tensor:
    """The array of an IDX file of unsigned bytes, uint8, in the shape that its header gives.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, or its length is not what its header says.
    """
    data = path.read_bytes()
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if len(data) < 4 or not data.startswith(_UNSIGNED_BYTES) or data[3] == 0:
        raise ValueError(
            f"{path}: starts with {data[:4].hex(' ') or 'nothing'}, where an IDX file of unsigned bytes has 00 00 08 "
            "and its number of dimensions"
        )
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise ValueError(f"{path}: ends inside its header, after {len(data)} of {header} bytes; fetch it again")
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise ValueError(
            f"{path}: {len(data)} bytes, where its header of shape {shape} makes {expected}; fetch it again"
        )
    if not math.prod(shape):
        raise ValueError(f"{path}: holds nothing, its shape is {shape}")
    # frombuffer shares memory: a bytearray, since tensors are writable and bytes are not.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=header).view(shape)
