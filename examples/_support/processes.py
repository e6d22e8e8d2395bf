"""The processes that torchrun starts, or this one alone: who they are, what they agree on, and what they add up."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from . import cli

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PATIENCE = datetime.timedelta(minutes=10)  # for a rank that is late; torchrun ends the others of a dead one long before


@dataclass(frozen=True)
class Processes:
    """This process among all of a run.

    Attributes:
        rank, world: its number, and the number of processes.
        device: where it computes.
        control: a gloo group for words about the run, which so never wait for a GPU; None for a single process.
    """

    rank: int
    world: int
    device: torch.device
    control: ProcessGroup | None

    def any(self, yes: bool) -> bool:
        """Whether any process says yes; all get the same answer."""
        if self.control is None:
            return yes
        answer = torch.tensor(float(yes))
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self.control)
        return bool(answer)

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the processes."""
        totals = torch.tensor(values, dtype=torch.float64)
        if self.control is not None:
            dist.all_reduce(totals, group=self.control)
        return totals.tolist()

    def same_buffers(self, model: nn.Module) -> None:
        """Rank 0's buffers for all: BatchNorm's running statistics come from the batches that a rank saw."""
        if self.control is not None:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError) as error:
        raise cli.Refused(
            f"{name}={environment.get(name)!r}: expected the numbers that torchrun gives each process "
            "(torchrun --nproc_per_node N -m examples.train_imagenet DIR)"
        ) from error


@contextmanager
def joined(device: str, environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Joins the processes of a run, and parts from them.

    Args:
        device: "cuda", joined by NCCL, or "cpu", by gloo.
        environment: torchrun's variables RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; a single process without.

    Raises:
        Refused: a part of these variables missing, or more processes on this machine than it has GPUs.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        yield Processes(0, 1, torch.device(device), None)
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    rank, world, local, here = (_number(environment, name) for name in names)
    place = torch.device(device)
    if device == "cuda":
        if here > torch.cuda.device_count():
            raise cli.Refused(
                f"{here} processes here share {torch.cuda.device_count()} GPUs: --nproc_per_node is one each"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", timeout=PATIENCE, device_id=place if device == "cuda" else None
    )
    try:
        yield Processes(rank, world, place, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        dist.destroy_process_group()


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one that prints."""
    return environment.get("RANK", "0") == "0"


def leave_the_word_to_the_first(environment: Mapping[str, str] = os.environ) -> None:
    """Waits before an end with an error: torchrun ends all processes with the first, and rank 0 must report before."""
    if not is_first(environment):
        time.sleep(5)
