"""The steps that `benchmarks predict` predicts, measured kernel by kernel.

``python -m benchmarks.gpu.kernels OUT.json SECONDS [STEP ...]`` runs each step in training and in inference, and writes
after each what the device's profiler saw: every kernel with its launches and microseconds, beside the time of the host
and of the whole step. ``python -m benchmarks predict --measured OUT.json`` puts the predictions beside it. For
``SECONDS`` of 0 each step runs once, so that Triton compiles what it needs, and nothing is written.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cli import LOST
from benchmarks.gpu.jobs import End, Job, Verdict, verdict
from benchmarks.harness.machine import environment
from benchmarks.predict.steps import Step, run, steps
from wavemix_kernels.ops.verify import device_is_lost

#: Names of steps, most important first; those that a run with little time reaches.
FIRST = (
    "waveblock/L3/channels_last/64x192x64x64", "patm/fc/nchw/64x64x56x56", "haar/J4/nchw/4x64x256x256",
    "wavemix/192-16-L3/64x3x224x224", "wavemlp/T/128x3x224x224", "wavemix/lite-8-5/1024x1x28x28",
)  # fmt: skip
WARM_UP, ROUNDS = 3, 10
#: Steps under the profiler; a kernel's time is the median of its launches.
PROFILED = 4
#: More than any L2 cache holds.
FLUSH_BYTES = 256 << 20
#: In the name of the kernel that fills the cache between steps, and of no other that a step launches.
FLUSH = "bitwise_not"
LIMIT_S = 150.0


def names() -> list[str]:
    """Every step, those of :data:`FIRST` first."""
    every = [step.name for step in steps()]
    return [*FIRST, *(name for name in every if name not in FIRST)]


def _runs(step: Step, training: bool, device: torch.device) -> Callable[[], None]:
    """Ours on the device, in bf16; on a CPU, which only rehearses, with few channels and pixels."""
    layout = torch.channels_last if step.channels_last else torch.contiguous_format
    with torch.device(device):
        made = step.make("ours", training=training, narrow=device.type != "cuda")
        size = step.size if device.type == "cuda" else step.few
        x = torch.randn(size, dtype=torch.bfloat16).contiguous(memory_format=layout)
    x.requires_grad_(training and not step.image)
    cotangents: dict[torch.Size, torch.Tensor] = {}

    def cotangent(out: torch.Tensor) -> torch.Tensor:
        if out.shape not in cotangents:
            cotangents[out.shape] = torch.randn_like(out)
        return cotangents[out.shape]

    return lambda: run(made, x, training=training, cotangent=cotangent)


def measure(step: Step, training: bool, device: torch.device) -> dict[str, Any]:
    """A row of the file: microseconds of the device, the host and the step, and the kernels."""
    go = _runs(step, training, device)
    warm_up, rounds = (WARM_UP, ROUNDS) if device.type == "cuda" else (0, 1)
    for _ in range(warm_up):
        go()
    host, whole = [], []
    for _ in range(rounds):
        _wait(device)
        begin = time.perf_counter()
        go()
        queued = time.perf_counter()
        _wait(device)
        host.append(queued - begin)
        whole.append(time.perf_counter() - begin)
    kernels = list(_profiled(go, device))
    return {
        "step": step.name,
        "training": training,
        "device_us": sum(kernel["us"] for kernel in kernels),
        "host_us": statistics.median(host) * 1e6,
        "step_us": statistics.median(whole) * 1e6,
        "kernels": kernels,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profiled(go: Callable[[], None], device: torch.device) -> Iterator[dict[str, Any]]:
    """A step's kernels and copies in the order in which they first ran; ``us`` of all launches of a step."""
    if device.type != "cuda":
        return
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            torch.bitwise_not(flush, out=flush)
            go()
        _wait(device)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profiler.export_chrome_trace(path)
        events = json.loads(Path(path).read_text())["traceEvents"]
    yield from summed(events, PROFILED)


def summed(events: Sequence[dict[str, Any]], times: int) -> Iterator[dict[str, Any]]:
    """One step's kernels, from the profiler's events of ``times`` equal steps."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for event in sorted((e for e in events if e.get("cat") in _DEVICE), key=lambda e: e["ts"]):
        if FLUSH in event["name"]:
            continue
        about = event.get("args", {})
        key = (event["name"], *(json.dumps(about.get(name)) for name in _ABOUT))
        found.setdefault(key, []).append(event["dur"])
    for (name, *about), took in found.items():
        facts = {word: json.loads(value) for word, value in zip(_ABOUT.values(), about, strict=True)}
        launches = len(took) / times
        yield {"name": name, "launches": launches, "us": launches * statistics.median(took), **facts}


_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
#: The profiler's words, and ours.
_ABOUT = {"grid": "grid", "block": "block", "registers per thread": "registers", "shared memory": "shared"}


def main(out: str, seconds: str, *wanted: str) -> int:
    """1 where a step raised; the others are measured. Rows of a process before this one stay in the file. The process
    ends, with :data:`LOST`, at an error that stays in the GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end = time.monotonic() + float(seconds)
    rows: list[dict[str, Any]] = json.loads(Path(out).read_text())["rows"] if Path(out).is_file() else []
    failed: list[str] = []
    known = {step.name: step for step in steps()}
    for name in wanted or names():
        for training in (True, False):
            what = f"{name}, {'training' if training else 'inference'}"
            try:
                if not float(seconds):
                    _runs(known[name], training, device)()
                    _wait(device)
                    continue
                if time.monotonic() > end:
                    print(f"no time for {what}")
                    continue
                print(f"begins {name}", flush=True)
                rows.append(measure(known[name], training, device))
            except Exception as error:  # noqa: BLE001 - one step's fault is its own
                failed.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                print(f"failed {failed[-1]}", flush=True)
                if device_is_lost(device):
                    os._exit(LOST)  # an orderly end would hang or abort in destructors
                continue
            row = rows[-1]
            print(f"{what}: {row['device_us']:.0f} us on the device, {row['host_us']:.0f} on the host, "
                  f"{row['step_us']:.0f} in all", flush=True)  # fmt: skip
            Path(out).write_text(json.dumps({"environment": environment(device), "rows": rows}, indent=1))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 1 if failed else 0


# --- Jobs ----------------------------------------------------------------------------------------------------


class _About(NamedTuple):
    out: Path
    wanted: list[str]
    again: int


def job(folder: Path) -> Job:
    """The measurement of all steps."""
    out = folder / "kernels.json"
    out.unlink(missing_ok=True)
    return _job(_About(out, names(), 0))


def _job(about: _About) -> Job:
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", str(about.out), "{seconds}", *about.wanted]
    return Job("kernels" + (f"+{about.again}" if about.again else ""), command, read=read, about=about)


def warm(name: str) -> Job:
    """Compiles beforehand what a step needs of Triton."""
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", os.devnull, "0", name]
    return Job(f"compile-step-{name}", command, name.split("/")[0], "triton", ("triton",), seconds=LIMIT_S)


def read(job: Job, end: End) -> tuple[list[Verdict], list[Job]]:
    """PASS for all, FAIL where a step raised or the process was lost, TIME where some were not reached. Behind the step
    at which a process was lost another takes up the rest."""
    about: _About = job.about
    text = about.out.read_text() if about.out.exists() else ""
    rows = json.loads(text)["rows"] if text else []
    failed = [line.removeprefix("failed ") for line in end.said.splitlines() if line.startswith("failed ")]
    late = sum(line.startswith("no time for ") for line in end.said.splitlines())
    if not failed and not end.stopped and end.status != 0:
        failed = [end.crash]
    word = "FAIL" if failed else "TIME" if end.stopped or late else "PASS"
    note = f"{len(rows)} of {2 * len(names())} steps measured"
    begun = [line.removeprefix("begins ") for line in end.said.splitlines() if line.startswith("begins ")]
    follow = []
    if end.status not in (0, 1) and not end.stopped and not end.over and begun:
        left = about.wanted[about.wanted.index(begun[-1]) + 1 :]
        follow = [_job(about._replace(wanted=left, again=about.again + 1))] if left else []
    return [verdict(job, end, word, "; ".join([note, *failed[:5]]))], follow


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
