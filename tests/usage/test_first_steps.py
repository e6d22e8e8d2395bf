"""First steps: progress without a terminal, Python's -OO, a folder with a space, and what the README runs."""

from __future__ import annotations

import io
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tools.helpers import ROOT, python
from wavemix_kernels import _native

EXAMPLES = ("fashion_mnist", "super_resolution", "train_imagenet", "export")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_program_writes_to_a_file(terminal: bool) -> None:
    """Ten lines in an epoch, where nothing draws a bar; a quiet console prints none."""
    console_of = pytest.importorskip("rich.console", reason="rich is not installed: pip install rich").Console
    from examples._support.progress import Progress

    for quiet in (False, True):
        file = io.StringIO()
        console = console_of(file=file, force_terminal=terminal, quiet=quiet, width=100)
        with Progress(console, total=60, done=20, epoch=20) as bar:
            for step in range(40):
                bar.advance("epoch 2", f"loss {step}" if step % 2 == 0 else None)
        lines = [line for line in file.getvalue().splitlines() if line.startswith("epoch 2: ")]
        assert len(lines) == (0 if terminal or quiet else 20)
        if lines:
            assert lines[0] == "epoch 2: 22 of 60 steps, loss 0"


@pytest.mark.prove
@pytest.mark.parametrize("name", EXAMPLES)
def test_programs_start_without_docstrings_and_assertions(name: str) -> None:
    ran = python("-OO", "-m", f"examples.{name}", "--help", cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert "usage: " in ran.stdout


@pytest.mark.prove
def test_blocks_compute_without_docstrings_and_assertions() -> None:
    code = (
        "import torch, wavemix_kernels as wk; b = wk.FusedWaveblock(final_dim=4, dropout=0);"
        "x = torch.ones(1, 4, 4, 4);"
        "y = b(x); y.sum().backward(); print(wk.accelerate(torch.nn.Sequential(b)));"
        "torch.testing.assert_close(wk.backend('reference')(b)(x), y)"
    )
    ran = python("-OO", "-c", code)
    assert ran.returncode == 0, ran.stderr


def test_a_checkout_lies_in_a_folder_with_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command in the message can be pasted."""
    folder = tmp_path / "my checkout" / "wavemix_kernels"
    folder.mkdir(parents=True)
    (folder.parent / "setup.py").touch()
    monkeypatch.setattr(_native, "__file__", str(folder / "_native.py"))
    said = _native._why_missing(ImportError())
    command = said.split("`")[1]
    assert shlex.split(command) == ["pip", "install", "-e", str(folder.parent)]


def test_no_hint_names_a_package_that_no_index_has() -> None:
    """`pip install wavemix-kernels[...]` finds nothing; a checkout's `pip install -e ".[...]"` does."""
    places = [*ROOT.glob("wavemix_kernels/**/*.py"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/**/*.py"),
              *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]  # fmt: skip
    assert [str(p) for p in places if "wavemix-kernels[" in p.read_text() or "install wavemix" in p.read_text()] == []


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13", "3.14"])
def test_another_python_reads_every_file(version: str) -> None:
    """The oldest that the package promises to the newest."""
    interpreter = shutil.which(f"python{version}")
    if interpreter is None or subprocess.run([interpreter, "--version"], capture_output=True).returncode:
        pytest.skip(f"there is no python{version} here")
    code = (
        "import ast, sys, pathlib\nfor folder in sys.argv[1:]:\n"
        "    for path in pathlib.Path(folder).rglob('*.py'): ast.parse(path.read_text('utf8'), str(path))"
    )
    folders = [str(ROOT / name) for name in ("wavemix_kernels", "examples", "benchmarks", "tests")]
    done = subprocess.run([interpreter, "-W", "error", "-c", code, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
