"""docs/integrations.md as its reader runs it: every block, top to bottom, on a small run."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vit_linearizer.cli import main
from vit_linearizer.models.loading import save_model_folder

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"
SHAPE = dict(img_size=64, embed_dim=64, depth=4, num_classes=0, global_pool="avg")


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"```(sh|python)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def workplace(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the page names: a run, photographs, a published weight file."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model_folder(timm.create_model("adventurer_tiny_patch16_224", **SHAPE), tmp_path / "runs" / "clip" / "model")
    (tmp_path / "PHOTOS").symlink_to(photos)
    released = timm.create_model("adventurer_tiny_patch16_224").state_dict()
    torch.save({"model": released}, tmp_path / "adventurer_tiny_patch16_224.pth")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _repository, file: str(tmp_path / file))
    return tmp_path


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore::UserWarning")
def test_every_block_of_the_page_runs(workplace: Path) -> None:
    namespace: dict = {}
    for language, text in blocks():
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), namespace)
            continue
        for line in text.replace("\\\n", " ").strip().splitlines():
            line = line.replace("adventurer_base_patch16_224.pth", "adventurer_tiny_patch16_224.pth")  # the smallest will do
            assert main(shlex.split(line)[1:]) == 0, line

    backbone, images = namespace["backbone"], namespace["images"]
    assert namespace["maps"][0].shape == (2, 64, 14, 14)
    assert namespace["classifier"](images).shape == (2, 7)
    assert namespace["portrait"].patch_embed.grid_size == (16, 8)
    assert namespace["finer"].forward_features(images).shape == (2, 1 + 28 * 28, 64)
    assert [features.shape for features in namespace["features"](images)] == [(2, 64, 14, 14)] * 3
    assert namespace["accuracy"] > 0.5  # ten digits, features of a random student
    assert namespace["masks"].shape == (2, 19, 224, 224)
    with torch.no_grad():
        wanted = backbone.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
        for given, want in zip(namespace["feature_maps"], wanted, strict=True):
            torch.testing.assert_close(given, want)
    for other in (namespace["segmenter"].encoder.model, namespace["model"]):
        state = backbone.state_dict() if other is not namespace["model"] else torch.load(namespace["file"])["model"]
        assert all(torch.equal(state[name], value) for name, value in other.state_dict().items())
    assert namespace["dense"].shape == (1, 64, 16, 20)
    assert namespace["pooled"].shape == (1, 64)
    assert (workplace / "adventurer-tiny" / "README.md").exists()
    assert len(np.load("features.npz")["names"]) == 12
