"""The examples that give images, short: what they start from, how they score, and what they leave."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from torch import Tensor

from examples import inpainting, segmentation, super_resolution
from examples._support import cli
from tests.tools.helpers import PNG, needs

pytestmark = needs("examples", cli.EXTRAS)


@pytest.fixture
def small_photograph(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """(3, 96, 96), in place of every photograph."""
    image = super_resolution.photograph("astronaut")[:, 60:156, 160:256]
    for module in (super_resolution, inpainting):
        for name, value in {"TRAINING": ("astronaut",), "HELD_OUT": ("astronaut",), "PATCH": 32}.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module, "photograph", lambda *_: image)
    return image


# --- Super-resolution by WaveMixSR-V2 ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 4])
def test_sr_v2_begins_at_bicubic_doublings_and_trains(scale, small_photograph, tmp_path, refused) -> None:
    model = super_resolution.build("sr-v2", 8, 1, scale)
    small = super_resolution.shrink(small_photograph[None], scale)
    want = small
    for _ in range(scale // 2):
        want = super_resolution.bicubic(want)
    torch.testing.assert_close(super_resolution.enlarge(model, small[0]), want[0], rtol=0, atol=1e-5)
    arguments = ["--model", "sr-v2", "--scale", str(scale), "--steps", "2", "--width", "8", "--depth", "1"]
    assert super_resolution.main([*arguments, "--out", str(tmp_path)]) in (0, 1)
    assert (tmp_path / "astronaut.png").read_bytes().startswith(PNG)
    said = refused(super_resolution.main, ["--scale", "4", "--out", str(tmp_path)])
    assert said == "super_resolution: --scale 4: --model wavemix doubles; --model sr-v2 has both scales\n"


# --- Inpainting ----------------------------------------------------------------------------------------------


def test_masks_and_fillings() -> None:
    generator = np.random.default_rng(0)
    mask = inpainting.masks(3, 32, generator)
    assert mask.shape == (3, 1, 32, 32)
    assert set(mask.unique().tolist()) == {0, 1}
    image = torch.rand(3, 3, 32, 32)
    for fill in (inpainting.mean_filled, inpainting.spread):
        filled = fill(image * (1 - mask), mask)
        torch.testing.assert_close(filled * (1 - mask), image * (1 - mask))
        flat = torch.full_like(image, 0.3)
        torch.testing.assert_close(fill(flat * (1 - mask), mask), flat)
        everything = torch.ones_like(mask)
        assert torch.equal(fill(torch.zeros_like(image), everything), torch.full_like(image, 0.5))


def test_only_what_is_missing_counts() -> None:
    truth, mask = torch.full((3, 8, 8), 100 / 255), torch.zeros(1, 8, 8)
    mask[:, 2:4] = 1
    image = truth + 5 / 255
    image[:, 6] = 1
    assert inpainting.psnr(image, truth, mask) == pytest.approx(20 * np.log10(255 / 5), abs=1e-6)


def test_inpainting_begins_at_the_surroundings_and_trains(small_photograph, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(inpainting, "EXTRAS", cli.EXTRAS)
    monkeypatch.setattr(inpainting, "telea", lambda image, mask: inpainting.spread(image[None], mask[None])[0])
    model = inpainting.Painter(8, 1, 2)
    mask = inpainting.masks(1, 40, np.random.default_rng(1))[0]
    given = small_photograph[:, :40, :40] * (1 - mask)
    start = inpainting.painted(model, given, mask)
    torch.testing.assert_close(start, inpainting.spread(given[None], mask[None])[0], rtol=0, atol=1e-5)
    given, mask = given[:, :36], mask[:, :36]  # sides that the blocks do not take
    torch.testing.assert_close(inpainting.painted(model, given, mask) * (1 - mask), given)
    arguments = ["--steps", "2", "--width", "8", "--depth", "1", "--out", str(tmp_path)]
    assert inpainting.main(arguments) in (0, 1)
    assert "mean gain over Telea" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "scores.csv").open(newline=""))
    assert tuple(row) == inpainting.COLUMNS
    assert float(row["psnr_wavepaint"]) != float(row["psnr_spread"]) > float(row["psnr_mean"])
    assert (tmp_path / "astronaut.png").read_bytes().startswith(PNG)
    assert torch.load(tmp_path / inpainting.CHECKPOINT, weights_only=True)["steps"] == 2


# --- Segmentation --------------------------------------------------------------------------------------------


def test_mosaics_hold_what_their_labels_say() -> None:
    textures = [torch.full((40, 50), float(k)) for k in range(6)]
    images, labels = segmentation.mosaics(textures, 5, 32, np.random.default_rng(0))
    assert images.shape == (5, 3, 32, 32)
    assert torch.equal(images, labels[:, None].expand(-1, 3, -1, -1).float())


def test_trained_and_tested_parts_of_a_texture_are_apart() -> None:
    for name in segmentation.TEXTURES:
        one, other = (segmentation.texture(name, test) for test in (False, True))
        assert min(*one.shape, *other.shape) >= segmentation.SIDE
        assert min(other.shape) >= segmentation.TEST_SIDE
        assert abs(float(one.mean())) < 1e-4
        assert float(one.std()) == pytest.approx(1, abs=1e-3)


def test_segmentation_scores_are_those_of_their_definitions() -> None:
    labels = torch.tensor([[[0, 0, 0, 1], [1, 2, 3, 4], [5, 5, 5, 5]]])
    found = labels.clone()
    found[0, 0, 0] = 1
    scores = segmentation.scored(found, labels)
    assert (scores.accuracy, scores.majority) == (11 / 12, 4 / 12)
    assert scores.iou == [2 / 3, 2 / 3, 1, 1, 1, 1]


def test_segmentation_beats_the_majority_class(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(segmentation, "SIDE", 32)
    monkeypatch.setattr(segmentation, "TESTS", 4)
    assert segmentation.main(["--steps", "120", "--width", "16", "--depth", "1", "--out", str(tmp_path)]) == 0
    assert "by the majority class" in capsys.readouterr().out
    assert len(list(csv.DictReader((tmp_path / "scores.csv").open(newline="")))) == len(segmentation.TEXTURES)
    assert (tmp_path / "mosaics.png").read_bytes().startswith(PNG)
