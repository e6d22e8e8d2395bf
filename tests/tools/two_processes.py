"""Two processes joined by gloo, kept for all tests: starting one costs more than what the tests do there."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
PATIENCE = datetime.timedelta(minutes=30)  # no test fails by the clock, but a hang ends


def _serve(rank: int, store: str, connection: Any) -> None:
    torch.set_num_threads(1)
    torch.set_warn_always(True)  # also in the second test: the reducer would warn once a process
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=PATIENCE)
    while (task := connection.recv()) is not None:
        function, arguments = task
        try:
            connection.send((function(*arguments), None))
        except Exception:  # noqa: BLE001 - whatever a test raises is the test's, and goes back to it
            connection.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class TwoProcesses:
    """``run(function, *arguments)``: what a function of a module returns on rank 0 and on rank 1."""

    def __init__(self, folder: Path) -> None:
        context = mp.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for connection in self.connections:
            connection.send((function, arguments))
        replies = [connection.recv() for connection in self.connections]
        failures = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(replies) if error]
        assert not failures, "\n".join(failures)
        return [result for result, _ in replies]

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(PATIENCE.total_seconds())
            assert process.exitcode == 0, f"exit code {process.exitcode}"
