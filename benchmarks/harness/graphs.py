"""A step as one CUDA graph: launched as a whole, so that what Python does for each kernel costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
#: Runs before the capture: kernels compile, libraries choose their algorithms and make their workspaces.
WARM_UP = 3


def why_not(device: torch.device) -> str | None:
    """The reason why there are no CUDA graphs on a device, or None."""
    return None if device.type == "cuda" else "CUDA graphs need a GPU"


def captured(step: Callable[[], T]) -> Callable[[], T]:
    """`step` as a graph. Each call replays it on the tensors that the capture saw and returns the same results anew.

    Random numbers go on from replay to replay: torch's generator takes part.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> T:
        graph.replay()
        return result

    return replay
