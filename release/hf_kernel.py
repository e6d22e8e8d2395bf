"""Writes the Triton half of the package as a kernel for Hugging Face's ``kernels``: ``python release/hf_kernel.py``.

build/hf-kernel/ becomes a repository of that kind: a card, and a folder build/torch-cuda/ with the modules that
release/hf/ imports, directly or not. Such a package has to load from any path, twice in one process too: imports are
relative, and operators live in a namespace of their own, named after the sources' hash. The compiled core stays out:
it would need a build for each CUDA and Python.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "wavemix_kernels"
NAME = PACKAGE.name
TEMPLATES = ROOT / "release" / "hf"
OUT = ROOT / "build" / "hf-kernel"
VARIANT = "torch-cuda"

_NO_CORE = 'core, core_error = None, "this is the Triton half of wavemix_kernels, without its C++ and CUDA kernels"\n'


def main() -> int:
    for line in (f"{write()}", "upload it by `hf upload`, or load it by kernels.get_local_kernel"):
        print(line)
    return 0


def write(out: Path = OUT) -> Path:
    """Writes the repository anew; returns its folder."""
    shutil.rmtree(out, ignore_errors=True)
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.py"))}
    sources |= {name: (PACKAGE / name).read_text(encoding="utf-8") for name in sorted(_needed(sources))}
    digest = hashlib.sha256("".join(f"{name}\0{text}\0" for name, text in sources.items()).encode()).hexdigest()[:12]
    namespace = f"_{NAME}_{digest}"
    variant = out / "build" / VARIANT
    for name, text in sources.items():
        path = variant / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_moved(name, text, namespace), encoding="utf-8")
    shutil.copytree(PACKAGE / "tuned", variant / "tuned")
    shutil.copy2(ROOT / "LICENSE", out)
    shutil.copy2(TEMPLATES / "CARD.md", out / "README.md")
    metadata = {
        "id": namespace,
        "name": NAME.replace("_", "-"),
        "version": 1,
        "license": "MIT",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return out


def _needed(entries: dict[str, str]) -> set[str]:
    """Files of the package that `entries` import, and those that these import: all that any function would."""
    found: set[str] = set()
    # The operators are imported by name (wavemix_kernels/ops/__init__.py).
    modules = re.findall(r'\bOp\(\s*"([\w.]+)"', (PACKAGE / "ops/__init__.py").read_text())
    wanted = [f"{NAME}.ops.{module}" for module in modules]
    wanted += [module for text in entries.values() for module in _imports(text)]
    while wanted:
        for file in _files(wanted.pop()) - found - entries.keys():
            found.add(file)
            wanted += _imports((PACKAGE / file).read_text(encoding="utf-8"))
    return found


def _imports(text: str) -> list[str]:
    """Names of modules of the package, and of what is imported from them, which may be modules too."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == NAME:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == NAME for alias in node.names):
            raise ValueError(f"line {node.lineno}: `import {NAME}` cannot be made relative; import from it")
    return names


def _files(module: str) -> set[str]:
    """The module's file and those of the packages around it; nothing for a name that is no module."""
    parts = module.split(".")[1:]
    files = {"/".join([*parts[:depth], "__init__.py"]) for depth in range(1, len(parts) + 1)}
    files.add("/".join(parts) + ".py")
    return {file for file in files if (PACKAGE / file).is_file()}


def _moved(name: str, text: str, namespace: str) -> str:
    """`text` of the file `name` with relative imports and operators in `namespace`."""
    if name == "_native.py":
        text, count = re.subn(
            rf"^try:\n    from {NAME} import _core .*?, stacklevel=2\)\n", _NO_CORE, text, flags=re.M | re.S
        )
        if count != 1:
            raise ValueError("_native.py: expected one import of the compiled core")
    dots = "." * (name.count("/") + 1)
    text = re.sub(rf"^(\s*from ){NAME}\.?([\w.]*)(?= import)", rf"\1{dots}\2", text, flags=re.M)
    text = re.sub(rf"\btorch\.ops\.{NAME}\b", f"torch.ops.{namespace}", text)
    # Names of operators, of the library and of its namespace; the logger's stays.
    return re.sub(rf'(?<!getLogger\()(f?"){NAME}(::|")', rf"\1{namespace}\2", text)


if __name__ == "__main__":
    sys.exit(main())
