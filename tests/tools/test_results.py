"""docs/results.md, the README's table and its chart: they are what the committed runs say, by the rules they state."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from benchmarks.harness.measure import Row
from benchmarks.report import pages, published
from benchmarks.report.published import Run

CASE = "haar/J1/fp32/nchw/1x1x8x8/forward"


@pytest.mark.parametrize("path", pages.files(), ids=lambda path: path.name)
def test_committed_files_are_generated(path: Any) -> None:
    assert path.read_text(encoding="utf-8") == pages.files()[path], "run: python -m benchmarks results"


def test_readme_has_at_most_six_rows() -> None:
    assert len(pages.HEADLINE) <= 6


def test_comments_point_at_headings_of_the_tuning_page() -> None:
    page = (pages.ROOT / "docs/develop/tuning.md").read_text(encoding="utf-8")
    headings = [heading.lower() for heading in re.findall(r"^## (.*)$", page, re.MULTILINE)]
    for folder in ("wavemix_kernels", "csrc"):
        for path in (p for p in (pages.ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")):
            text = re.sub(r"\s+(?:(?://|#)\s*)?", " ", path.read_text(encoding="utf-8"))
            for name in re.findall(r"tuning\.md, ([^).]+)\)", text):
                assert any(heading.startswith(name.lower()) for heading in headings), f"{path}: {name}"


def run(number: int, kernels: str = "avx2", **medians: float) -> Run:
    """A run of CASE; keyword arguments are providers and their milliseconds."""
    environment = {"cpu": "CPU", "cpu_kernels": kernels, "device": "cpu", "commit": f"{number:040x}"}
    rows = {name: Row(CASE, "haar", name, "ok", median_ms=median) for name, median in medians.items()}
    return Run(number, f"run{number}", environment, {CASE: rows})


def test_the_later_run_stands() -> None:
    (result,) = published.results([run(1, upstream=8.0, auto=1.0), run(2, upstream=6.0, auto=2.0)])
    assert (result.over_upstream, result.run.number) == (3.0, 2)
    assert [earlier.number for earlier in result.earlier] == [1]


def test_both_sides_of_a_ratio_come_from_one_run() -> None:
    first, second = run(1, compile=6.0, auto=3.0), run(2, upstream=8.0, auto=2.0)
    (result,) = published.results([first, second, run(3, upstream=9.0), run(4, compile=1.0)])
    assert (result.over_upstream, result.run.number) == (4.0, 2)
    assert result.compiled is not None
    assert (result.over_compile, result.compiled.number) == (2.0, 1)


def test_other_kernels_are_another_machine() -> None:
    runs = [run(1, "avx512", upstream=8.0, auto=1.0), run(2, upstream=6.0, auto=2.0)]
    assert list(published.by_machine(runs)) == ["CPU, AVX-512", "CPU, AVX2"]
    assert published.latest(CASE, runs).run.number == 2


def test_refused_rows_are_left_out() -> None:
    refused = dataclasses.asdict(Row(CASE, "haar", "auto", "wrong"))
    assert published._cases({"rows": [refused]}) == {}
