"""compute-sanitizer over the self-tests, for our kernels alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from benchmarks.gpu import exercise
from benchmarks.gpu.jobs import End, Job, Verdict, verdict
from benchmarks.gpu.requirements import cuda_tool

PACKAGE = Path(__file__).resolve().parents[2] / "wavemix_kernels"
#: Each tool with the faults that it finds, most important first.
KINDS = {
    "memcheck": "accesses out of bounds or misaligned",
    "racecheck": "races in shared memory",
    "synccheck": "barriers that not all threads reach",
    "initcheck": "reads of global memory that nobody wrote",
}
#: Our CUDA kernels lie in this namespace.
NAMESPACE = "wavemix"
FOUND = 9  # exit status


@cache
def triton_kernels() -> tuple[str, ...]:
    """Names of our Triton kernels as the device has them; what they call is inlined."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        found |= set(re.findall(r"^@triton\.jit[^\n]*\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    return tuple(sorted(found))


def jobs(backend: str, batches: Sequence[Sequence[str]]) -> Iterator[Job]:
    """A job for each kind and each batch of ops."""
    tool = cuda_tool("compute-sanitizer") or "compute-sanitizer"
    for kind in KINDS:
        for names in batches:
            name = f"{kind}-{backend}" + (f"-{names[0]}" if len(names) == 1 else "")
            # An API error that torch provokes and handles is none of ours; without host frames, in which the path of
            # our package would occur.
            options = ["--tool", kind, "--error-exitcode", str(FOUND), "--show-backtrace", "no"]
            if kind == "memcheck":
                options += ["--report-api-errors", "no"]
            command = [tool, *options, *_filters(kind, backend), sys.executable]
            command += ["-m", "benchmarks.gpu.exercise", backend, *names]
            # An allocation for each tensor: an access past the end must not land in a neighbour's block of the cache.
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            needs = ("compute-sanitizer", "core" if backend == "cuda" else "triton")
            yield Job(name, command, ",".join(names), backend, needs, environment, read=read, about=(kind, names))


def _filters(kind: str, backend: str) -> list[str]:
    """initcheck has to see who writes, torch's kernels too: what it says of them is left out when it is read."""
    if kind == "initcheck":
        return []
    if backend == "cuda":
        return ["--kernel-name", f"kernel_substring={NAMESPACE}"]
    return [part for name in triton_kernels() for part in ("--kernel-name", f"kernel_name={name}")]


def reports(said: str) -> list[str]:
    """The tool's reports, each of the lines up to an empty one."""
    blocks, lines = [], list[str]()
    for line in said.splitlines():
        if not line.startswith("========="):
            continue
        text = line.removeprefix("=========").rstrip()
        if text:
            lines.append(text)
        elif lines:
            blocks.append("\n".join(lines))
            lines = []
    blocks += ["\n".join(lines)] if lines else []
    return [block for block in map(_without_frame, blocks) if block]


def _without_frame(block: str) -> str:
    """A report without the tool's headings and sums."""
    kept = [line for line in block.splitlines() if not re.match(r" (COMPUTE-SANITIZER|\w+ SUMMARY|No \w+)", line)]
    return "\n".join(kept)


def ours(block: str) -> bool:
    """Whether a report names a kernel of ours."""
    return NAMESPACE in block or any(re.search(rf"(?<!\w){name}\b", block) for name in triton_kernels())


def read(job: Job, end: End) -> tuple[list[Verdict], list[Job]]:
    """FAIL for a report about a kernel of ours, or a wrong result; others' reports are only counted."""
    kind, names = job.about
    blocks = reports(end.said)
    mine = [block for block in blocks if ours(block)]
    others = f"; {len(blocks) - len(mine)} reports about kernels that are not ours" if len(blocks) > len(mine) else ""
    done = exercise.measured(end)
    wrong = [name for name, (error, bound) in done.items() if not error <= bound]
    if mine:
        word, note = "FAIL", f"{len(mine)} reports, first: {' '.join(mine[0].split())[:300]}"
    elif wrong:
        word, note = "FAIL", f"wrong result of {', '.join(wrong)}"
    elif end.stopped:
        word, note = "TIME", f"{end.stopped}, {len(done)} of {len(names)} ops done"
    elif len(done) == len(names) and end.status in (0, FOUND):
        word, note = "PASS", KINDS[kind]
    elif not done and "Traceback" not in end.said:
        word, note = "SKIP", f"the tool did not run: {end.crash}"
    else:
        word, note = "FAIL", end.crash
    return [verdict(job, end, word, f"{kind}: {note}{others}")], []
