"""README.md and docs/: every Python block runs, every link and path exists, and generated pages are what the
committed runs say, by the rules that they state.

The blocks of a page run in order in one namespace, as a reader would paste them. Two comments in front of a block,
which no rendered page shows, speak to this test:

    <!-- given: images = torch.randn(...) -->    what the reader has and the page leaves out; runs before the block
    <!-- not run: the reason -->                 leaves the block out; the reason is printed
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.harness.measure import Row
from benchmarks.report import pages, published
from benchmarks.report.published import Run
from tests.tools.helpers import ROOT, python

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(r"^(?P<comments>(?:<!--.*?-->\n)*)```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_GIVEN = re.compile(r"<!-- given: (.*?) -->", re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: (.*?) -->", re.DOTALL)


class Block(NamedTuple):
    line: int
    code: str
    given: str
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        reason = _NOT_RUN.search(match["comments"])
        given = "\n".join(_GIVEN.findall(match["comments"]))
        found.append(Block(text.count("\n", 0, match.start("code")) + 1, match["code"], given, reason and reason[1]))
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def program(page: Path) -> str:
    """The page as a script: blocks on their own lines, so that a traceback names the page's line."""
    parts = ["import torch; torch.set_num_threads(1); torch.manual_seed(0)"]
    parts += [
        f"exec(compile({block.given + chr(10)!r}, 'given', 'exec')); "
        f"exec(compile({chr(10) * (block.line - 1) + block.code!r}, {name(page)!r}, 'exec'))"
        for block in blocks(page)
        if block.not_run is None
    ]
    return "\n".join(parts)


@pytest.mark.prove
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.not_run is None for b in blocks(p))], ids=name)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    ran = python("-W", "error::DeprecationWarning:__main__", "-c", program(page), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    "page, block",
    [pytest.param(p, b, id=f"{name(p)}:{b.line}") for p in PAGES for b in blocks(p) if b.not_run is not None],
)
def test_blocks_left_out_compile(page: Path, block: Block) -> None:
    compile(block.code, f"{name(page)}:{block.line}", "exec")
    pytest.skip(f"not run: {block.not_run}")


# --- Links and paths -------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and MkDocs make them."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


#: A path in a page: a top folder and something in it, wildcards included.
_PATH = re.compile(r"`((?:benchmarks|csrc|docs|examples|tests|wavemix_kernels)/[\w./*-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_fences_are_found_and_links_and_paths_lead_somewhere(page: Path) -> None:
    """An indented or misspelt fence would otherwise never run."""
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^[ \t]*```[ \t]*(?:py|python)\b", text, re.MULTILINE)) == len(blocks(page))
    for link in re.findall(r"\]\(((?!https?://|mailto:)[^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name(page)}: {link}"
    for path in _PATH.findall(text):
        assert list(ROOT.glob(path.rstrip("/"))), f"{name(page)} names {path}"


# --- Generated pages -------------------------------------------------------------------------------------


CASE = "haar/J1/fp32/nchw/1x1x8x8/forward"


@pytest.mark.parametrize("path", pages.files(), ids=lambda path: path.name)
def test_committed_files_are_generated(path: Any) -> None:
    assert path.read_text(encoding="utf-8") == pages.files()[path], "run: python -m benchmarks publish"


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
    (result,) = published.results([run(1, upstream=8.0, ours=1.0), run(2, upstream=6.0, ours=2.0)])
    assert (result.over_upstream, result.run.number) == (3.0, 2)
    assert [earlier.number for earlier in result.earlier] == [1]


def test_both_sides_of_a_ratio_come_from_one_run() -> None:
    first, second = run(1, compile=6.0, ours=3.0), run(2, upstream=8.0, ours=2.0)
    (result,) = published.results([first, second, run(3, upstream=9.0), run(4, compile=1.0)])
    assert (result.over_upstream, result.run.number) == (4.0, 2)
    assert result.compiled is not None
    assert (result.over_compile, result.compiled.number) == (2.0, 1)


def test_other_kernels_are_another_machine() -> None:
    runs = [run(1, "avx512", upstream=8.0, ours=1.0), run(2, upstream=6.0, ours=2.0)]
    assert list(published.by_machine(runs)) == ["CPU, AVX-512", "CPU, AVX2"]
    assert published.latest(CASE, runs).run.number == 2


def test_kept_memory_is_another_machine_and_no_headline() -> None:
    kept = run(2, upstream=3.0, ours=1.0)
    kept.environment["settings"] = {"MALLOC_MMAP_MAX_": "0"}
    runs = [run(1, upstream=8.0, ours=1.0), kept]
    assert list(published.by_machine(runs)) == ["CPU, AVX2", "CPU, AVX2, memory kept"]
    assert published.latest(CASE, runs).run.number == 1


def test_refused_rows_are_left_out() -> None:
    refused = dataclasses.asdict(Row(CASE, "haar", "ours", "wrong"))
    assert published._cases({"rows": [refused]}) == {}
