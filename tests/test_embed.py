"""``embed``: rows by name and equal to the features computed by hand, unreadable pictures, kills, refusals."""

import shutil
import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from vit_linearizer import EmbedConfig, ExportConfig, distill, embed, export
from vit_linearizer.cli import main
from vit_linearizer.commands import embed as command
from vit_linearizer.contracts import UserError
from vit_linearizer.data.views import centre_transform
from vit_linearizer.evaluation import embedding
from vit_linearizer.evaluation.embedding import EmbeddingFile, names_array
from vit_linearizer.models.adapters import extract_features
from vit_linearizer.models.loading import save_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A student of two blocks for 32x32 pictures in a folder, and itself."""
    torch.manual_seed(2)
    shape = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_classes=5)
    student = timm.create_model("adventurer_tiny_patch16_224", **shape).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("embed") / "model"
    save_model_folder(student, folder)
    return folder, student


@pytest.fixture
def run(model, photos, tmp_path):
    """Runs ``embed`` and reads what it wrote; keyword arguments replace its settings."""

    def embedded(**settings):
        given = dict(model=str(model[0]), data=str(photos), out=str(tmp_path / "features.npz"), batch_size=4, device="cpu")
        with np.load(embed(EmbedConfig(**given | settings)), allow_pickle=False) as arrays:
            return dict(arrays)

    return embedded


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, array in want.items():
        assert (got[key].dtype, got[key].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(got[key], array)


@torch.no_grad()
def by_hand(student, folder, names, size=(32, 32)):
    pictures = [centre_transform(size)(Image.open(folder / name).convert("RGB")) for name in names]
    return extract_features(student, torch.stack(pictures).float() / 255)


def picture_names(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.*"))


def cut(file):
    """Make a picture unreadable behind its header."""
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 3])


@pytest.fixture
def album(photos, tmp_path):
    """Nine JPEG pictures, 0.jpg to 8.jpg, of which a test may do as it likes."""
    folder = tmp_path / "album"
    folder.mkdir()
    for number, file in enumerate(sorted(photos.rglob("*.jpg"))[:9]):
        shutil.copy(file, folder / f"{number}.jpg")
    return folder


# --- the arrays -----------------------------------------------------------------------------------------------------


def test_rows_stand_in_the_order_of_the_names_and_are_the_features(run, model, photos):
    arrays = run(batch_size=5)
    assert arrays.keys() == {"names", "pooled"}
    assert arrays["names"].tolist() == picture_names(photos)
    assert arrays["names"].dtype.kind == "U"
    assert arrays["pooled"].dtype == np.float32
    want = by_hand(model[1], photos, picture_names(photos)).pooled
    torch.testing.assert_close(torch.from_numpy(arrays["pooled"]), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [None, "32x64"])
def test_dense_features_are_maps_of_the_patches(run, model, photos, size):
    height, width = (32, 64) if size else (32, 32)
    arrays = run(dense=True, image_size=size)
    assert arrays["dense"].shape == (12, height // 8, width // 8, 64)
    want = by_hand(model[1], photos, picture_names(photos), (height, width)).tokens.unflatten(1, arrays["dense"].shape[1:3])
    torch.testing.assert_close(torch.from_numpy(arrays["dense"]), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(arrays["dense"].mean((1, 2)), arrays["pooled"], rtol=1e-4, atol=1e-4)


def test_digits_have_labels_and_scikit_learn_fits_on_them(run):
    arrays = run(data="builtin:digits-test", batch_size=120)
    assert arrays["pooled"].shape == (360, 64)
    assert arrays["names"][0].startswith("digit-")
    assert np.bincount(arrays["labels"]).shape == (10,)
    scaled = (arrays["pooled"] - arrays["pooled"].mean(0)) / arrays["pooled"].std(0)
    for classifier in (LogisticRegression(max_iter=2000), KNeighborsClassifier(3)):
        classifier.fit(scaled[::2], arrays["labels"][::2])
        assert classifier.score(scaled[1::2], arrays["labels"][1::2]) > 0.3


def test_bfloat16_is_near_and_is_written_in_single_precision(run, tmp_path):
    exact, rounded = run(), run(precision="bf16", out=str(tmp_path / "rounded.npz"))
    assert rounded["pooled"].dtype == np.float32
    assert 0 < np.abs(exact["pooled"] - rounded["pooled"]).max() < 0.1 * np.abs(exact["pooled"]).max()


def test_a_run_and_its_exported_folder_give_the_same_values(run, small_run, tmp_path):
    distill(small_run(epochs=1))
    export(ExportConfig(model=str(tmp_path / "run"), format="timm", out=str(tmp_path / "exported")))
    sources = (str(tmp_path / "run"), f"local-dir:{tmp_path / 'run' / 'model'}", str(tmp_path / "exported"))
    first, *others = [run(model=source, out=str(tmp_path / f"{n}.npz"), dense=True) for n, source in enumerate(sources)]
    for other in others:
        assert_same(other, first)


def test_a_name_without_weights_has_to_be_meant(run):
    name, shape = "adventurer_tiny_patch16_224", ("img_size=32", "patch_size=8", "embed_dim=32", "depth=1")
    with pytest.raises(UserError, match=rf"^model {name}: has no published weights; .*--no-model-pretrained"):
        run(model=name, model_args=shape)
    assert run(model=name, model_args=shape, model_pretrained=False)["pooled"].shape == (12, 32)


def test_any_timm_vit_without_its_weights(run):
    shape = ("img_size=32", "patch_size=8", "embed_dim=48", "depth=1", "num_heads=3")
    assert run(model="vit_tiny_patch16_224", model_args=shape, model_pretrained=False)["pooled"].shape == (12, 48)


def test_from_the_command_line(model, photos, tmp_path, caplog):
    out = tmp_path / "new" / "features.npz"
    assert main(["embed", str(model[0]), "--data", str(photos), "--out", str(out), "--dense", "--device", "cpu"]) == 0
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    assert "embedding: image 12 of 12" in caplog.text
    assert f"{out}: features of 12 images at 32x32" in caplog.text


# --- pictures that cannot be read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [(3,), (4, 5, 6, 7), (0,), (8,), (1, 2, 3, 4, 5, 6)], ids=str)
def test_unreadable_pictures_have_no_row_and_are_listed(run, model, album, tmp_path, caplog, broken):
    for number in broken:
        cut(album / f"{number}.jpg")
    (album / "header.png").write_bytes(b"no picture")
    arrays = run(data=str(album), dense=True)
    names = [f"{number}.jpg" for number in range(9) if number not in broken]
    assert arrays["names"].tolist() == names
    want = by_hand(model[1], album, names).pooled
    torch.testing.assert_close(torch.from_numpy(arrays["pooled"]), want, rtol=1e-5, atol=1e-5)
    lines = [line.split("\t") for line in (tmp_path / "features.npz.skipped.txt").read_text().splitlines()]
    assert [name for name, _ in lines] == [*(f"{number}.jpg" for number in broken), "header.png"]
    assert all(reason for _, reason in lines)
    assert f"{len(broken) + 1} images could not be read: " in caplog.text


def test_a_folder_without_a_readable_picture_is_an_error(run, album, tmp_path):
    for file in album.iterdir():
        cut(file)
    with pytest.raises(UserError, match=r"^--data: none of the images can be read"):
        run(data=str(album))
    assert not (tmp_path / "features.npz").exists()


def test_a_new_file_lists_only_its_own_skipped_pictures(run, album, tmp_path):
    good = (album / "3.jpg").read_bytes()
    cut(album / "3.jpg")
    run(data=str(album))
    (tmp_path / "features.npz").unlink()
    (album / "3.jpg").write_bytes(good)
    assert len(run(data=str(album))["names"]) == 9
    listed = tmp_path / "features.npz.skipped.txt"
    assert not listed.exists() or listed.read_text() == ""


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stop_after(monkeypatch):
    """Lets so many batches through (None: all) with a part each; the returned list counts the pictures of each batch."""
    rows, computed = command._rows, []

    def limit(batches):
        def counted(model, source, batch, **settings):
            if len(computed) == batches:
                raise KeyboardInterrupt
            computed.append(len(batch["numbers"]))
            return rows(model, source, batch, **settings)

        computed.clear()
        monkeypatch.setattr(command, "_rows", counted)
        return computed

    monkeypatch.setattr(embedding, "_PART_SECONDS", 0)
    return limit


@pytest.mark.parametrize("seconds", [0, 30], ids=["a part a batch", "one part"])
@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_killed_run_goes_on_to_the_same_file(run, album, tmp_path, stop_after, monkeypatch, caplog, batches, seconds):
    monkeypatch.setattr(embedding, "_PART_SECONDS", seconds)
    cut(album / "3.jpg")
    settings = dict(data=str(album), batch_size=2, dense=True)
    whole = run(**settings, out=str(tmp_path / "whole.npz"))
    stop_after(batches)
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    assert not (tmp_path / "features.npz").exists()
    computed = stop_after(None)
    assert_same(run(**settings), whole)
    assert sum(computed) == 8 - (0, 2, 0, 5)[batches]
    assert batches == 0 or f"going on: {2 * batches} of 9 images are done" in caplog.text
    assert not list(tmp_path.glob("*.partial"))
    assert (tmp_path / "features.npz.skipped.txt").read_text() == (tmp_path / "whole.npz.skipped.txt").read_text()


def test_a_stopped_command_says_so_and_may_go_on(model, photos, tmp_path, stop_after, capsys):
    line = ["embed", str(model[0]), "--data", str(photos), "--out", str(tmp_path / "f.npz"), "--batch-size", "5"]
    stop_after(1)
    assert main(line) == 130
    assert "stopped" in capsys.readouterr().err
    computed = stop_after(None)
    assert main(line) == 0
    assert computed == [5, 2]


@pytest.mark.parametrize("changed", [{"dense": True}, {"image_size": "64"}, {"precision": "bf16"}], ids=str)
def test_parts_of_other_settings_are_refused(run, tmp_path, stop_after, changed):
    stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        run()
    before = sorted((tmp_path / "features.npz.partial").iterdir())
    with pytest.raises(UserError, match=r"^--out \S+features\.npz: features\.npz\.partial was begun with other settings"):
        run(**changed)
    assert sorted((tmp_path / "features.npz.partial").iterdir()) == before


def test_parts_with_names_of_other_lengths_join(run, album, monkeypatch):
    monkeypatch.setattr(embedding, "_PART_SECONDS", 0)
    (album / "4.jpg").rename(album / "4-with-a-name-much-longer-than-those-around-it-ä.jpg")
    assert run(data=str(album), batch_size=1)["names"].tolist() == picture_names(album)


def test_parts_join_to_what_was_appended(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_PART_SECONDS", 0)
    rng = np.random.default_rng(0)
    file = EmbeddingFile(tmp_path / "f.npz", {})
    file.open()
    dense = [rng.random((count, 2, 3, 4), dtype=np.float32) for count in (2, 1, 3)]
    names = [["a", "b"], ["ccc"], ["dddd", "e", ""]]
    for done, (given, array) in enumerate(zip(names, dense, strict=True), 1):
        file.append({"names": names_array(given), "dense": array}, 10 * done)
        file.append({}, 10 * done + 5)
    assert file.finish() == 6
    with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays:
        assert_same(
            dict(arrays), {"names": names_array([name for given in names for name in given]), "dense": np.concatenate(dense)}
        )


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out": "features.npy"}, r"^--out features\.npy: must end in \.npz$"),
        ({"model": "vit_tny_patch16_224"}, r"^model vit_tny_patch16_224: unknown model; did you mean"),
        ({"model": "swin_tiny_patch4_window7_224", "model_pretrained": False}, r"^model swin\S+: is not a plain backbone"),
        ({"data": "nowhere"}, r"^--data nowhere: no such folder"),
        ({"image_size": "30"}, r"image.size 30x30: must be a multiple of the patch 8x8; try 32x32$"),
        ({"image_size": "3O"}, r"^--image-size 3O: give one side"),
        ({"model_args": ("depth",)}, r"^--model-args depth: must look like name=value"),
        ({"batch_size": 0}, r"^--batch-size 0: must be at least 1$"),
        ({"num_workers": -1}, r"^--num-workers -1: must be at least 0$"),
        ({"device": "cuda"}, r"^--device cuda: not available here"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, changed, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message) as error:
        run(**changed)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_left_alone(run, tmp_path):
    (tmp_path / "features.npz").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"^--out \S+features\.npz: exists; remove it, or give another name$"):
        run()
    assert (tmp_path / "features.npz").read_bytes() == b"precious"


def test_pictures_that_changed_since_the_kill_are_refused(run, album, stop_after):
    stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        run(data=str(album), batch_size=2)
    (album / "8.jpg").rename(album / "08.jpg")
    stop_after(None)
    with pytest.raises(UserError, match="was begun with other settings"):
        run(data=str(album), batch_size=2)


def test_another_flip_rule_is_another_model(run, album, tmp_path, stop_after):
    settings = dict(model="adventurer_tiny_patch16_224", model_pretrained=False, data=str(album), batch_size=2)
    shape = ("embed_dim=32", "depth=7", "img_size=32")
    stop_after(1)
    with pytest.raises(KeyboardInterrupt):
        run(**settings, model_args=shape)
    stop_after(None)
    with pytest.raises(UserError, match="was begun with other settings"):
        run(**settings, model_args=(*shape, "flip=released"))


def test_an_interrupt_between_rows_and_count_loses_no_part(tmp_path):
    file = embedding.EmbeddingFile(tmp_path / "f.npz", {})
    file.open()
    file.append({"pooled": np.zeros((2, 1))}, 2)
    file.flush()
    file._rows.append((4, {"pooled": np.ones((2, 1))}))  # as far as append gets before it is interrupted
    file.flush()
    assert file.finish() == 4


def test_sigterm_keeps_what_is_done(run, album, tmp_path, monkeypatch):
    rows = command._rows

    def terminated(*arguments, **settings):
        signal.raise_signal(signal.SIGTERM)
        return rows(*arguments, **settings)

    before = signal.getsignal(signal.SIGTERM)
    batches = iter([rows, terminated])
    monkeypatch.setattr(command, "_rows", lambda *arguments, **settings: next(batches)(*arguments, **settings))
    with pytest.raises(KeyboardInterrupt):
        run(data=str(album), batch_size=2)
    assert [file.name for file in (tmp_path / "features.npz.partial").glob("part-*")] == ["part-000000000002.npz"]
    assert signal.getsignal(signal.SIGTERM) is before
