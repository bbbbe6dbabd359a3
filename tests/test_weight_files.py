"""Weight files from disk and from the Hub: where they come from, and how those that do not fit are refused."""

import io
import shutil
import socket
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from vit_linearizer import load
from vit_linearizer.contracts import UserError
from vit_linearizer.models.loading import open_model, save_model_folder

TINY = "adventurer_tiny_patch16_224"
PUBLISHED = f"{TINY}.pth"
SMALL = {"embed_dim": 64, "depth": 3}


@pytest.fixture(scope="module")
def small_weights():
    """Random weights for `SMALL`, 64x64 images and 10 classes."""
    torch.manual_seed(0)
    weights = timm.create_model(TINY, img_size=64, num_classes=10, **SMALL).state_dict()
    return {name: value + 0.1 * torch.randn_like(value) for name, value in weights.items()}


def saved(folder, weights, name=PUBLISHED):
    torch.save(weights, folder / name)
    return folder / name


def assert_holds(model, weights, *, flip):
    assert model.flip == flip
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# --- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A Hub that holds the files put into the returned dictionary, by (repository, file); lists what is asked for."""
    files, asked = {}, []

    def download(repository, file, **_):
        asked.append((repository, file))
        return str(files[repository, file])

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return files, asked


def test_a_file_of_a_repository(small, tmp_path, hub):
    files, asked = hub
    files["Wangf3014/Adventurer", PUBLISHED] = saved(tmp_path, small)
    files["some/one", "sub/folder/w.pth"] = saved(tmp_path, small, "w.pth")
    model = load(f"hf-hub:Wangf3014/Adventurer/{PUBLISHED}", img_size=64, **SMALL)
    assert_holds(model, small, flip="released")
    other = open_model("hf-hub:some/one/sub/folder/w.pth", field="--model", architecture=TINY, img_size=64, **SMALL)
    assert_holds(other, small, flip="alternate")
    assert asked == list(files)


@pytest.mark.parametrize("source", ["repository", "repository file", "file"])
def test_published_weights_keep_their_flip_rule_when_the_architecture_is_named_too(small, tmp_path, hub, source):
    file = saved(tmp_path, small)
    hub[0]["Wangf3014/Adventurer", PUBLISHED] = file
    name = {"repository": "hf-hub:Wangf3014/Adventurer", "file": str(file)}.get(
        source, f"hf-hub:Wangf3014/Adventurer/{PUBLISHED}"
    )
    model = open_model(name, field="--model", architecture=TINY, img_size=64, **SMALL)
    assert_holds(model, small, flip="released")


def test_the_repository_alone_asks_for_a_file(hub):
    with pytest.raises(UserError, match=rf"^--model hf-hub:Wangf3014/Adventurer: holds several models; .*{PUBLISHED}"):
        open_model("hf-hub:Wangf3014/Adventurer", field="--model")
    assert hub[1] == []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub, and no network."""

    def unreachable(*_, **__):
        raise socket.gaierror("no network")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    return tmp_path / "cache"


def cached(cache, repository):
    """The folder that the client looks into for a repository's files."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:some/one/w.pth", r"could not be fetched \(\w+\); without network, give the file itself"),
        ("hf-hub:some/one", r"its weights could not be fetched \(\w+\); without network, give a file with --model-arch"),
    ],
)
def test_without_network_the_error_says_what_to_do(cache, name, message):
    with pytest.raises(UserError, match=f"^--model {name}: {message}$"):
        open_model(name, field="--model", architecture=TINY if name.endswith("pth") else None)
    assert not constants.HF_HUB_OFFLINE


def test_what_is_in_the_cache_needs_no_network(cache, small):
    saved(cached(cache, "Wangf3014/Adventurer"), small)
    model = load(f"hf-hub:Wangf3014/Adventurer/{PUBLISHED}", img_size=64, **SMALL)
    assert_holds(model, small, flip="released")


def test_an_exported_folder_on_the_hub_opens_in_timm(cache, small, tmp_path, monkeypatch):
    model = load(saved(tmp_path, small), img_size=64, **SMALL)
    save_model_folder(model, tmp_path / "model")
    shutil.copytree(tmp_path / "model", cached(cache, "some/one"), dirs_exist_ok=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_holds(timm.create_model("hf-hub:some/one", pretrained=True), small, flip="released")
    assert_holds(load("hf-hub:some/one"), small, flip="released")
    assert timm.create_model("hf-hub:some/one", pretrained=True, num_classes=3).head.out_features == 3


# --- files that do not fit ------------------------------------------------------------------------------------------


def with_unknown(weights):
    return weights | {"layers.0.mixer.surprise": torch.zeros(1)}


def without_one(weights):
    return {name: value for name, value in weights.items() if name != "layers.2.mlp.w2.bias"}


def with_another_shape(weights):
    return weights | {"layers.1.mixer.A_log": torch.zeros(5)}


@pytest.mark.parametrize(
    ("change", "named", "message"),
    [
        (with_unknown, r"layers\.0\.mixer\.surprise", r"unknown layers\.0\.mixer\.surprise"),
        (without_one, r"layers\.2\.mlp\.w2\.bias", r"missing layers\.2\.mlp\.w2\.bias"),
        (with_another_shape, r"layers\.1\.mixer\.A_log", r"another shape layers\.1\.mixer\.A_log \[5\] for \[2\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(small, tmp_path, change, named, message):
    file = saved(tmp_path, change(small))
    with pytest.raises(RuntimeError, match=named):
        timm.create_model(TINY, checkpoint_path=str(file), img_size=64, num_classes=10, **SMALL)
    with pytest.raises(UserError, match=rf"^--model \S+: its weights do not fit the architecture: {message}$"):
        open_model(str(file), field="--model", img_size=64, **SMALL)


def test_a_file_of_another_size_is_refused_by_name(small, tmp_path):
    with pytest.raises(
        UserError, match=r"unknown layers\.2\..*; another shape cls_token \[1, 1, 64\] for \[1, 1, 32\]"
    ) as error:
        load(saved(tmp_path, small), img_size=64, embed_dim=32, depth=2)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def cut(whole):
    return whole[: len(whole) // 2]


def garbage(_whole):
    return b"this is no weight file\n" * 100


def nothing(_whole):
    return b""


def archive(_whole):
    with zipfile.ZipFile(content := io.BytesIO(), "w") as file:
        file.writestr("readme.txt", "no tensors")
    return content.getvalue()


@pytest.mark.parametrize(
    ("damage", "suffix"),
    [(damage, suffix) for damage in (cut, garbage, archive) for suffix in (".pth", ".safetensors")]
    + [(nothing, ".safetensors")]
    + [pytest.param(nothing, ".pth")],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(small, tmp_path, damage, suffix):
    save = save_file if suffix == ".safetensors" else torch.save
    save(small, file := tmp_path / f"weights{suffix}")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=rf"^--model \S+{suffix}: cannot be read \(.*\S.*\); save it as") as error:
        open_model(str(file), field="--model", architecture=TINY, img_size=64, **SMALL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [lambda mark, small: small | {"x": Trap(mark)}, lambda mark, _: Trap(mark),
                                     lambda mark, small: {"model": small, "args": Trap(mark)}],
                         ids=["among the weights", "alone", "beside the weights"])  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "legacy"])
def test_code_in_a_file_is_not_run(small, tmp_path, content, zipped):
    mark = tmp_path / "was here"
    torch.save(content(mark, small), tmp_path / PUBLISHED, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=rf"^--model \S+{PUBLISHED}: cannot be read \(.*\); save it as") as error:
        open_model(str(tmp_path / PUBLISHED), field="--model", img_size=64, **SMALL)
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="weights_only"):
        timm.create_model(TINY, checkpoint_path=str(tmp_path / PUBLISHED), img_size=64, num_classes=10, **SMALL)
    assert not mark.exists()


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {"model": torch.zeros(3)}, {}, {"epoch": 3}], ids=str)
def test_tensors_that_are_no_state_dict_are_refused_in_one_line(tmp_path, content):
    with pytest.raises(UserError, match=r"^--model \S+: .") as error:
        open_model(str(saved(tmp_path, content)), field="--model", img_size=64, **SMALL)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_found_with_another_number_of_classes_too(small, tmp_path):
    with pytest.raises(UserError, match=r"missing layers\.2\.mlp\.w2\.bias"):
        load(saved(tmp_path, without_one(small)), img_size=64, num_classes=3, **SMALL)
