"""README.md and docs/: every Python block runs, every link and every path that they name exists.

The blocks of a page run in order in one namespace, as a reader would paste them. Two comments in front of a block,
which no rendered page shows, speak to this test:

    <!-- given: images = torch.randn(...) -->    what the reader has and the page leaves out; runs before the block
    <!-- not run: the reason -->                 leaves the block out; the reason is printed
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

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
