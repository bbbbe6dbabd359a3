"""What several test files share: a folder of photographs, and a teacher small enough to train against in seconds."""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Tiny tensors gain nothing from threads, and the processes that tests start would fight over the cores.
os.environ["OMP_NUM_THREADS"] = "1"


import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from vit_linearizer.commands import closing
from vit_linearizer.commands.distill import DistillConfig
from vit_linearizer.models.loading import save_model_folder
from vit_linearizer.models.released import RELEASED

torch.set_num_threads(1)

#: A student to go with `small_teacher`: the same 16 patches, four blocks.
SMALL_STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4}


@pytest.fixture(autouse=True)
def _package_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vit_linearizer")


@pytest.fixture(scope="session", autouse=True)
def _no_reports() -> Iterator[None]:
    """Trainings end with a page of some megabytes, which tests of other things can do without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(closing, "write_report", lambda _folders, file: Path(file))
        yield


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve crops of scikit-learn's two photographs, in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(12):
        picture = load_sample_images().images[number % 2]
        top, left = rng.integers(0, picture.shape[0] - 240), rng.integers(0, picture.shape[1] - 300)
        file = folder / ("a" if number % 2 else "b") / f"photo-{number:02d}.{'jpg' if number < 9 else 'png'}"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(picture[top : top + 240, left : left + 300]).save(file)
    return folder


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of four blocks for 32x32 pictures, with random weights, in timm's folder format."""
    torch.manual_seed(1)
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=0)
    folder = tmp_path_factory.mktemp("teacher") / "model"
    save_model_folder(timm.create_model("vit_tiny_patch16_224", **shape), folder)
    return folder


@pytest.fixture
def small_run(photos: Path, small_teacher: Path, tmp_path: Path):
    """Makes configurations of runs that take a second; keyword arguments override."""

    def make(**values) -> DistillConfig:
        settings = dict(
            teacher=str(small_teacher),
            student="adventurer_tiny_patch16_224",
            student_args=tuple(f"{name}={value}" for name, value in SMALL_STUDENT.items()),
            data=str(photos),
            out=str(tmp_path / "run"),
            epochs=3,
            batch_size=4,
            learning_rate=1e-3,
            drop_path=0.0,
            device="cpu",
            precision="fp32",
            log_every=1,
        )
        return DistillConfig(**{**settings, **values})

    return make


@pytest.fixture
def small(small_weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A test file's ``small_weights``, for which the table of published files is made to speak of 64x64 images."""
    name = "adventurer_tiny_patch16_224.pth"
    monkeypatch.setitem(RELEASED, name, dataclasses.replace(RELEASED[name], image_size=64))
    return small_weights
