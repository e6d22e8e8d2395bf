"""The examples on data made here: formats and their errors, an exact continuation, Ctrl-C, pictures and scores."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import shutil
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from examples import fashion_mnist, super_resolution
from examples._support import cli, curves, idx, interrupt
from tests.tools.helpers import PNG, needs

needs_extras = needs("examples", cli.EXTRAS)


# --- IDX -----------------------------------------------------------------------------------------------------


def idx_bytes(array: Tensor) -> bytes:
    return struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape) + array.numpy().tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_idx_gives_back_what_was_written(pack, shape, tmp_path):
    array = torch.randint(256, shape, dtype=torch.uint8)
    (tmp_path / "file").write_bytes(pack(idx_bytes(array)))
    read = idx.read_idx(tmp_path / "file")
    assert read.dtype == torch.uint8
    assert torch.equal(read, array)


WHOLE = idx_bytes(torch.arange(24, dtype=torch.uint8).view(2, 3, 4))


@pytest.mark.parametrize("data, message", [
    (b"", "starts with nothing"),
    (b"\x89PNG\r\n", "starts with 89 50 4e 47, where an IDX file"),
    (b"\x00\x00\x0d\x01" + WHOLE[4:], "starts with 00 00 0d 01"),  # floats
    (WHOLE[:10], "ends inside its header, after 10 of 16 bytes"),
    (WHOLE[:-1], r"39 bytes, where its header of shape \(2, 3, 4\) makes 40"),
    (WHOLE + b"\x00", "41 bytes, where"),
    (struct.pack(">HBBI", 0, 8, 1, 0), "holds nothing"),
    (gzip.compress(WHOLE)[:-9], "damaged gzip file"),
    (gzip.compress(WHOLE)[:-8] + bytes(8), "damaged gzip file"),
], ids=["empty", "magic", "type", "header", "truncated", "trailing", "nothing", "gzip", "checksum"])  # fmt: skip
def test_a_damaged_idx_file_is_named_with_what_is_wrong(data, message, tmp_path):
    (tmp_path / "train-images").write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        idx.read_idx(tmp_path / "train-images")
    assert str(tmp_path / "train-images") in str(raised.value)


# --- Fashion-MNIST -------------------------------------------------------------------------------------------

IMAGES = 256
EPOCH = IMAGES // fashion_mnist.BATCH  # batches


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes that are easy to tell apart: a bright bar whose height names the class, in noise."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", IMAGES), ("t10k", 64)):
        labels = torch.randint(10, (count,), generator=generator)
        images = torch.randint(60, (count, 28, 28), generator=generator)
        rows = torch.arange(28).view(1, 28, 1)
        images += 190 * ((rows >= 4 + 2 * labels.view(-1, 1, 1)) & (rows < 6 + 2 * labels.view(-1, 1, 1)))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(labels.byte()))
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images.byte())))
    return folder


def train(data: Path, out: Path, *more: str) -> int:
    return fashion_mnist.main(["train", "--data", str(data), "--epochs", "2", "--out", str(out), *more])


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs without a stop, dropout on: its masks are part of what a continuation must repeat."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    assert train(data, out, "--dropout", "0.1") == 0
    return out


def model(variant: str, data: Path) -> fashion_mnist.Training:
    recipe = fashion_mnist.Recipe(variant, 2, 1e-2, 0.1, None, 1, "auto", "cpu")
    return fashion_mnist.Training(recipe, *fashion_mnist.load(data))


def read_log(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / fashion_mnist.LOG).open(newline="")))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


@needs_extras
def test_a_run_leaves_log_curves_and_weights_that_load(straight: Path, data: Path) -> None:
    rows = read_log(straight)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert tuple(rows[0]) == fashion_mnist.COLUMNS
    assert all(float(row["seconds"]) > 0 and float(row["lr"]) > 0 for row in rows)
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert (straight / fashion_mnist.CURVES).read_bytes().startswith(PNG)
    assert not list(straight.glob("*.part"))
    tensors, about = read_safetensors(straight / fashion_mnist.BEST)
    best = max(rows, key=lambda row: float(row["test_accuracy"]))
    assert about == {"variant": "deconv", "epoch": best["epoch"], "test_accuracy": best["test_accuracy"]}
    other = model("deconv", data)
    other.model.load_state_dict(tensors, strict=True)
    assert round(other.accuracy(), 2) == float(best["test_accuracy"])


def same(one: object, other: object) -> bool:
    (left, form), (right, its) = tree_flatten(one), tree_flatten(other)
    pairs = zip(left, right, strict=False)
    return form == its and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@needs_extras
@pytest.mark.parametrize("batches", [EPOCH - 1, EPOCH], ids=["after the first epoch", "within the second"])
def test_an_interrupted_run_goes_on_bit_for_bit(batches, data, straight, tmp_path, monkeypatch, capsys):
    out, augment, seen = tmp_path / "stopped", fashion_mnist.augment, []

    def interrupting(images: Tensor, generator: torch.Generator) -> Tensor:
        if len(seen) == batches:  # Ctrl-C during the batch after so many
            signal.raise_signal(signal.SIGINT)
        seen.append(None)
        return augment(images, generator)

    with monkeypatch.context() as patched:
        patched.setattr(fashion_mnist, "augment", interrupting)
        assert train(data, out, "--dropout", "0.1") == 130
    printed = capsys.readouterr().out
    assert "interrupted in epoch 2" in printed
    assert printed.strip().endswith(f"--out {out} --dropout 0.1 --resume")
    stopped = torch.load(out / fashion_mnist.CHECKPOINT, weights_only=True)
    assert (stopped["epoch"], stopped["batch"]) == (1, batches + 1 - EPOCH)
    torch.manual_seed(12345)  # a new process has another state
    assert train(data, out, "--dropout", "0.1", "--resume") == 0
    left, right = (torch.load(run / fashion_mnist.CHECKPOINT, weights_only=True) for run in (out, straight))
    for state in (left, right):  # the clock is all that may differ
        for row in state["rows"]:
            del row["seconds"]
    assert same(left, right)
    (got, about), (want, wanted) = (read_safetensors(folder / fashion_mnist.BEST) for folder in (out, straight))
    assert about == wanted
    assert same(got, want)


@needs_extras
def test_both_backends_and_both_variants_train(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--backend", "reference", "--variant", "upsample", "--limit", "32") == 0
    tensors, about = read_safetensors(tmp_path / fashion_mnist.BEST)
    assert about["variant"] == "upsample"
    assert not any(name.endswith("4.weight") for name in tensors)  # no transposed convolution


@pytest.mark.parametrize("variant, count", [("deconv", 7_156), ("upsample", 3_566)])
def test_variants_have_the_published_sizes(variant: str, count: int, data: Path) -> None:
    assert sum(parameter.numel() for parameter in model(variant, data).model.parameters()) == count


def test_augmentation_mirrors_half_of_the_images() -> None:
    images = torch.randint(256, (400, 28, 28), dtype=torch.uint8)
    result = fashion_mnist.augment(images, torch.Generator().manual_seed(0))
    kept = (result == images).flatten(1).all(1)
    mirrored = (result.flip(2) == images).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 140 < int(mirrored.sum()) < 260  # six standard deviations of 10 around 200


@needs_extras
def test_plot_draws_two_runs_into_one_picture(straight: Path, tmp_path: Path, refused) -> None:
    other = shutil.copytree(straight, tmp_path / "other")
    logs = [str(folder / fashion_mnist.LOG) for folder in (straight, other)]
    assert fashion_mnist.main(["plot", *logs, "--out", str(tmp_path / "both.png")]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)
    arguments = ["plot", logs[0], logs[0], "--out", str(tmp_path / "twice.png")]
    assert "names must differ" in refused(fashion_mnist.main, arguments)


# --- Refusals ------------------------------------------------------------------------------------------------


@needs_extras
def test_missing_data_says_where_it_was_sought_and_what_helps(tmp_path: Path, monkeypatch, refused) -> None:
    monkeypatch.setattr(fashion_mnist, "FOLDERS", (tmp_path / "system",))
    message = refused(fashion_mnist.main, ["train", "--out", str(tmp_path / "out")])
    said = (str(tmp_path / "system"), "apt install dataset-fashion-mnist", "--data")
    assert not [words for words in said if words not in message]
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"")
    message = refused(fashion_mnist.main, ["train", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert ("train-images-idx3-ubyte" in message, "t10k-images" in message) == (True, False)
    assert not (tmp_path / "out").exists()


@needs_extras
def test_bad_arguments_get_one_line(data: Path, straight: Path, tmp_path: Path, monkeypatch, refused) -> None:
    new, below = str(tmp_path / "new"), str(tmp_path / "file" / "below")
    (tmp_path / "file").write_text("")
    for arguments, said in [
        (f"{straight}", "--resume continues it"),
        (f"{new} --resume", "there is no"),
        (f"{straight} --epochs 9 --dropout 0.1 --resume", "--epochs 9: the run"),
        (f"{new} --dropout 1", "--dropout 1: expected"),
        (f"{new} --lr 0", "--lr 0: expected"),
        (f"{new} --epochs 0", "0: expected at least 1"),
        (below, "cannot be made"),
        *([] if torch.cuda.is_available() else [(f"{new} --device cuda", "sees no GPU")]),
    ]:
        assert said in refused(fashion_mnist.main, f"train --data {data} --out {arguments}".split())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert "rich missing: pip install rich" in refused(fashion_mnist.main, ["plot", "log.csv"])


def test_a_log_without_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(",".join(fashion_mnist.COLUMNS) + "\n")
    with pytest.raises(ValueError, match="no lines"):
        curves.read(tmp_path / "log.csv")


def test_a_second_ctrl_c_stops_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupt.Interrupt() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# --- Super-resolution ----------------------------------------------------------------------------------------


@pytest.fixture
def small_photograph(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """(3, 128, 160), in place of every photograph, with patches that fit it."""
    image = super_resolution.photograph("astronaut")[:, 60:188, 160:320]
    names = {"TRAINING": ("astronaut",), "HELD_OUT": ("astronaut",), "PATCH": 32, "photograph": lambda *_: image}
    for name, value in names.items():
        monkeypatch.setattr(super_resolution, name, value)
    return image


@needs_extras
def test_the_model_begins_at_bicubic(small_photograph: Tensor) -> None:
    torch.manual_seed(0)
    model = super_resolution.OverBicubic(width=8, depth=1)
    small = super_resolution.shrink(small_photograph[None])
    assert small.shape == (1, 3, 64, 80)
    assert torch.equal(super_resolution.enlarge(model, small[0]), super_resolution.bicubic(small)[0])


@needs_extras
def test_scores_are_those_of_their_definitions() -> None:
    # Grey values r = g = b have Y = 16 + 219 r: a shift by 5/255 is one of 219 * 5/255 = 4.294 of 255.
    grey = torch.full((3, 32, 32), 100 / 255)
    found = super_resolution.score(grey + 5 / 255, grey)
    assert found.psnr == pytest.approx(20 * np.log10(255 / (219 * 5 / 255)), abs=1e-6)
    spoilt = grey.clone()
    spoilt[:, :2], spoilt[:, :, -2:] = 0, 1  # only the borders that are left out
    spoilt[:, 8, 8] += 1 / 255  # one pixel of the 28 x 28 that count, 219/255 of a grey value
    assert super_resolution.score(spoilt, grey).psnr == pytest.approx(20 * np.log10(255 * 28 / (219 / 255)), abs=1e-6)


@needs_extras
def test_super_resolution_beats_bicubic_on_a_photograph_it_knows(small_photograph, tmp_path, capsys, refused):
    arguments = ["--steps", "300", "--width", "16", "--depth", "1", "--out", str(tmp_path)]
    assert super_resolution.main(arguments) == 0, capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "scores.csv").open(newline=""))
    assert tuple(row) == super_resolution.COLUMNS
    assert float(row["psnr_wavemix"]) > float(row["psnr_bicubic"]) + 0.5
    assert (tmp_path / "astronaut.png").read_bytes().startswith(PNG)
    state = torch.load(tmp_path / super_resolution.CHECKPOINT, weights_only=True)
    assert state["steps"] == 300
    model = super_resolution.build(*(state[key] for key in ("name", "width", "depth", "scale")))
    model.load_state_dict(state["model"], strict=True)
    small = super_resolution.shrink(small_photograph[None])[0]
    again = super_resolution.score(super_resolution.enlarge(model, small), small_photograph)
    assert again.psnr == pytest.approx(float(row["psnr_wavemix"]), abs=0.01)
    said = refused(super_resolution.main, ["--width", "30", "--out", str(tmp_path)])
    assert said == "super_resolution: --width 30: expected a multiple of 4\n"


@needs_extras
@pytest.mark.parametrize("name", [*super_resolution.TRAINING, *super_resolution.HELD_OUT])
def test_photographs_are_in_the_wheel(name: str) -> None:
    image = super_resolution.photograph(name)
    assert image.shape[0] == 3
    assert image.shape[1] % 4 == image.shape[2] % 4 == 0
    assert min(image.shape[1:]) >= super_resolution.PATCH
    assert 0 <= image.min() < image.max() <= 1


@needs_extras
def test_an_interrupted_super_resolution_keeps_what_it_learnt(small_photograph, tmp_path, monkeypatch, capsys):
    shrink = super_resolution.shrink

    def interrupting(images: Tensor, scale: int) -> Tensor:
        if len(images) > 1:  # a batch
            signal.raise_signal(signal.SIGINT)
        return shrink(images, scale)

    monkeypatch.setattr(super_resolution, "shrink", interrupting)
    assert super_resolution.main(["--width", "8", "--depth", "1", "--out", str(tmp_path)]) == 130
    assert "interrupted after 1 of" in capsys.readouterr().out
    assert torch.load(tmp_path / super_resolution.CHECKPOINT, weights_only=True)["steps"] == 1
