"""MkDocs hooks: pages made of files that already stand in the repository's root, so that no fact is written twice."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINKED = ("LICENSE", "CITATION.cff")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in PAGES.items():
        # Links are relative to the root there, and to docs/ here.
        content = re.sub(r"\]\((?:docs/)?([\w/-]+\.(?:md|svg))", _target, (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=content))
    for name in LINKED:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def _target(link: re.Match[str]) -> str:
    page = next((page for page, source in PAGES.items() if source == link[1]), link[1])
    return f"]({page}"
