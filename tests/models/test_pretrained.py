"""Published weights: the table beside what is on record of the files, and loading them from files made here."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from wavemix_kernels import pretrained
from wavemix_kernels.wavemix import classification
from wavemix_kernels.wavemix.SemSegment import CityscapesWaveMix

SMALL = {"depth": 2, "mult": 2, "ff_channel": 8, "final_dim": 8}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, torch.Tensor]]:
    """A small model's state dict on a file:// URL under the name "tiny", and an empty cache."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    state = classification.WaveMix(**SMALL, level=1, num_classes=3).state_dict()
    path = tmp_path / "tiny.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    arguments = SMALL | {"level": 1, "num_classes": 3}
    monkeypatch.setitem(pretrained.WEIGHTS, "tiny", pretrained.Weights(path.as_uri(), arguments, digest))
    return path, state


def tiny() -> nn.Module:
    return classification.WaveMix(**SMALL, level=1, num_classes=3, pretrained="tiny")


@pytest.mark.parametrize("digest", [True, False], ids=["hash", "no hash"])
def test_pretrained_loads_and_caches(
    published: tuple[Path, dict[str, torch.Tensor]], digest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = published
    if not digest:
        monkeypatch.setitem(pretrained.WEIGHTS, "tiny", replace(pretrained.WEIGHTS["tiny"], sha256=None))
    loaded = tiny().state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    cached = Path(torch.hub.get_dir()) / "checkpoints" / pretrained.WEIGHTS["tiny"].file_name
    assert cached.read_bytes() == path.read_bytes()
    path.unlink()  # from the cache from now on
    assert torch.equal(tiny().state_dict()["pool.2.weight"], state["pool.2.weight"])


def test_pretrained_checks_the_hash(published: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, state = published
    torch.save({key: value + 1 for key, value in state.items()}, path)
    with pytest.raises(RuntimeError, match=r"pretrained='tiny'.*not the published file.*invalid hash"):
        tiny()
    assert not list((Path(torch.hub.get_dir()) / "checkpoints").glob("*"))


def test_pretrained_offline_says_what_to_do(published: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, _ = published
    path.unlink()
    with pytest.raises(RuntimeError, match=r"could not fetch file://.*tiny.pth.*save it there.*load_state_dict"):
        tiny()


#: Sizes of the published files, in megabytes as their host lists them, or in bytes as a commit does.
SIZES = {
    "imagenet_75.06": 111_681_543, "imagenet_75.04": 112, "imagenet_73.03": 198, "imagenet_71.49": 112,
    "imagenet_70.66": 50_080_583, "imagenet_70.42": 251, "places365_54.94": 114, "cifar10_95.37": 68.4,
    "cifar10_94.58": 12.2, "cifar100_78.81": 54.5, "cifar100_77.82": 43.9, "tinyimagenet_62.51": 54.6,
    "cityscapes_83.04": 113_013_887,
}  # fmt: skip


@pytest.mark.parametrize("name", pretrained.WEIGHTS)
def test_published_weights_fit_their_arguments(name: str) -> None:
    """The recorded arguments give a model as large as the published file, where that is on record."""
    entry = pretrained.weights(name)
    with torch.device("meta"):
        state = entry.build().state_dict()
    # Beside the numbers a file has about 350 bytes for each tensor: its name, shape and place in the archive.
    size = sum(t.numel() * t.element_size() for t in state.values()) + 350 * len(state)
    listed = SIZES.get(name, size)
    if isinstance(listed, int) and listed > 1000:
        assert abs(size - listed) < 100 * len(state)
    else:
        assert size / 1e6 == pytest.approx(SIZES.get(name, size / 1e6), rel=5e-3)
    assert entry.file_name.endswith(".pth")
    assert entry.sha256 is None or len(entry.sha256) == 64
    assert entry.pinned or "/resolve/main/" in entry.url


def test_every_file_has_a_name_of_its_own_in_the_cache() -> None:
    assert len({entry.file_name for entry in pretrained.WEIGHTS.values()}) == len(pretrained.WEIGHTS)


@pytest.mark.parametrize("name", ["sr_bsd100_x2_div2k_33.08", "wavepaint_imagenet_2_modules", "cifar10_94.58"])
def test_a_file_of_the_published_shapes_becomes_the_model(
    name: str, published: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = published
    entry = pretrained.weights(name)
    state = entry.build().state_dict()
    torch.save(state, path)
    monkeypatch.setitem(pretrained.WEIGHTS, name, replace(entry, url=path.as_uri(), sha256=None))
    model = pretrained.load_model(name, progress=False)
    assert type(model).__name__ == entry.model.rpartition(".")[2]
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    if name.startswith("sr_"):
        assert model.path1[0].mode == "bilinear"


def test_weights_of_another_model_are_named_with_theirs() -> None:
    with pytest.raises(ValueError, match=r"these weights are of CityscapesWaveMix\(\), not of this model"):
        classification.WaveMix(pretrained="cityscapes_83.04")


def test_cityscapes_has_the_head_of_the_published_script() -> None:
    arguments = SMALL | {"level": 2, "num_classes": 5}
    model, twin = CityscapesWaveMix(**arguments), classification.WaveMix(**arguments)
    twin.pool = nn.Sequential(
        nn.ConvTranspose2d(8, 128, 4, stride=2, padding=1),
        nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1),
        nn.Conv2d(64, 5, 1),
    )
    assert list(model.state_dict()) == list(twin.state_dict())
    twin.load_state_dict(model.state_dict(), strict=True)
    model, twin = model.double().eval(), twin.double().eval()
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-10, atol=1e-10)
    assert model(x).shape == (2, 5, 32, 48)
