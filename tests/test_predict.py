"""``predict``: label maps, overlays and class lists equal to what the model says by hand; names, skips, stops, refusals."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from small_models import small as small_student
from vit_linearizer.commands import predict as command
from vit_linearizer.commands.predict import PredictConfig, predict
from vit_linearizer.contracts import UserError
from vit_linearizer.data.picture_files import find_pictures
from vit_linearizer.evaluation.legend import with_legend
from vit_linearizer.evaluation.segmentation import overlay, predict_logits
from vit_linearizer.models.loading import save_model_folder
from vit_linearizer.models.segmenter import Segmenter
from vit_linearizer.models.segmenter_folder import save_segmenter

SEGMENTS = ("sky", "road, or street", "tree", "Straße")
PALETTE = [(250, 250, 250), (128, 64, 128), (0, 160, 0), (10, 20, 230)]
LABELS = ("cat", "dog, wet", "Küken", "owl", "fox", "hen", "emu")


def stirred(model):
    """The same with weights that tell pictures apart."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return stirred(Segmenter(small_student(num_classes=0), num_classes=4, head="linear"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, segmenter):
    """Saves the segmenter in a run folder with what a run would note."""

    def save(**extra):
        run = tmp_path_factory.mktemp("segmentation")
        save_segmenter(segmenter, run / "model", classes=SEGMENTS, palette=PALETTE, extra=extra)
        return run

    return save


@pytest.fixture(scope="module")
def segmentation_run(saved):
    return saved(crop=(64, 64), resize=None, mode="whole", stride=None)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier in a run folder, as ``finetune`` leaves one, and itself."""
    model = stirred(small_student(num_classes=7, img_size=32, depth=2))
    model.pretrained_cfg |= {"num_classes": 7, "label_names": list(LABELS)}
    run = tmp_path_factory.mktemp("classification")
    save_model_folder(model, run / "model")
    return run, model


@pytest.fixture
def album(tmp_path):
    """Pictures of several kinds and sizes: colours, greys, a palette, and one that its EXIF turns upright."""
    china, folder = Image.fromarray(load_sample_image("china.jpg")), tmp_path / "album"
    (folder / "schöne Häuser").mkdir(parents=True)
    china.crop((0, 0, 150, 100)).save(folder / "a house.png")
    china.crop((200, 50, 290, 170)).convert("L").save(folder / "grau.png")
    china.crop((100, 0, 250, 100)).quantize(16).save(folder / "schöne Häuser" / "grau.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    china.crop((300, 200, 440, 300)).save(folder / "turned.jpg", exif=exif)
    return folder


NAMES = ["a house.png", "grau.png", "schöne Häuser/grau.png", "turned.jpg"]
SIZES = {"a house.png": (100, 150), "grau.png": (120, 90), "schöne Häuser/grau.png": (100, 150), "turned.jpg": (140, 100)}


@pytest.fixture
def run(album, segmentation_run, tmp_path):
    """Runs ``predict``, by default the segmenter over the album; what it returns is what it wrote."""

    def predicted(**settings):
        given = dict(
            model=str(segmentation_run), images=(str(album),), out=str(tmp_path / "out"), batch_size=3, device="cpu"
        )
        answer = predict(PredictConfig(**given | settings))
        written = json.loads((Path((given | settings)["out"]) / "predictions.json").read_text(encoding="utf-8"))
        assert json.dumps(written) == json.dumps(answer)  # in the same order too
        return answer

    return predicted


def upright(file):
    """By hand: the one turned picture of the album, and RGB of all."""
    with Image.open(file) as image:
        return (image.transpose(Image.Transpose.ROTATE_270) if file.name == "turned.jpg" else image).convert("RGB")


def files_in(folder):
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def cut(file):
    """Make a picture unreadable behind its header."""
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 3])


# --- segmentation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def labels_by_hand(segmenter, image, size, **settings):
    """The best class of every pixel of a picture that the model sees at a size."""
    view = resize(pil_to_tensor(image), list(size), antialias=True).float() / 255
    logits = predict_logits(segmenter, view, **settings) if settings else segmenter(view[None]).logits
    return F.interpolate(logits, size=(image.height, image.width), mode="bilinear", align_corners=False)[0].argmax(0).numpy()


def label_map(out, name):
    with Image.open(out / Path(name).with_suffix(".labels.png")) as opened:
        opened.load()
    return opened


def test_label_maps_are_the_models_own_at_the_pictures_size(run, segmenter, album, tmp_path):
    answer = run()
    assert list(answer) == NAMES
    several = 0
    for name in NAMES:
        image = upright(album / name)
        assert (image.height, image.width) == SIZES[name]
        fitted = {(100, 150): (64, 96), (120, 90): (85, 64), (140, 100): (90, 64)}[SIZES[name]]
        want = labels_by_hand(segmenter, image, fitted)
        got = np.asarray(label_map(tmp_path / "out", name))
        assert (got.dtype, got.shape) == (np.uint8, SIZES[name])
        assert (got == want).mean() > 0.999  # a batch may round a tie the other way
        assert answer[name] == pytest.approx(
            {SEGMENTS[number]: 100 * (got == number).mean() for number in np.unique(got)}, rel=1e-12
        )
        assert list(answer[name].values()) == sorted(answer[name].values(), reverse=True)
        assert sum(answer[name].values()) == pytest.approx(100)
        several += len(answer[name]) > 1
    assert several > 1


def test_label_maps_are_palette_pictures_of_eight_bits(run, tmp_path):
    run()
    file = tmp_path / "out" / "a house.labels.png"
    assert file.read_bytes()[24:26] == bytes([8, 3])  # of the header: bits, and "palette"
    opened = label_map(tmp_path / "out", "a house.png")
    assert opened.mode == "P"
    assert opened.getpalette()[:12] == [value for colour in PALETTE for value in colour]
    numbers = np.asarray(opened)
    assert (np.asarray(opened.convert("RGB")) == np.array(PALETTE)[numbers]).all()


def test_the_runs_own_resize_mode_and_stride_are_used(run, saved, segmenter, album, tmp_path):
    sliding = dict(crop=(64, 64), mode="sliding", stride=(32, 48))
    run(model=str(saved(resize=(96, 160), **sliding)), images=(str(album / "grau.png"),))
    got = np.asarray(label_map(tmp_path / "out", "grau.png"))
    image = upright(album / "grau.png")
    assert (got == labels_by_hand(segmenter, image, (96, 160), **sliding)).mean() > 0.999
    assert (got != labels_by_hand(segmenter, image, (96, 160))).any()


def test_a_segmenter_without_notes_sees_its_nominal_size_whole(run, saved, segmenter, album, tmp_path):
    run(model=str(saved() / "model"), images=(str(album / "grau.png"),))
    want = labels_by_hand(segmenter, upright(album / "grau.png"), (85, 64))
    assert (np.asarray(label_map(tmp_path / "out", "grau.png")) == want).mean() > 0.999


def test_overlays_are_the_picture_with_colours_and_a_legend_below(run, album, tmp_path):
    run()
    for name in NAMES:
        with Image.open(tmp_path / "out" / Path(name).with_suffix(".overlay.jpg")) as drawn:
            drawn.load()
        height, width = SIZES[name]
        assert (drawn.mode, drawn.format) == ("RGB", "JPEG")
        assert drawn.height > height
        assert drawn.width >= width
        want = overlay(upright(album / name), np.asarray(label_map(tmp_path / "out", name)), PALETTE)
        difference = np.asarray(drawn.crop((0, 0, width, height)), dtype=float) - np.asarray(want, dtype=float)
        assert np.abs(difference).mean() < 8  # of JPEG


def test_a_legend_shows_each_colour_beside_its_text_and_keeps_the_picture():
    picture = Image.new("RGB", (500, 300), (9, 9, 9))
    rows = [(f"class {number}", colour) for number, colour in enumerate(PALETTE)]
    drawn = with_legend(picture, rows)
    assert drawn.crop((0, 0, 500, 300)).tobytes() == picture.tobytes()
    below = np.asarray(drawn)[300:]
    for _, colour in rows:
        assert (below == colour).all(-1).sum() >= 12 * 12
    assert ((below < 60).all(-1)).sum() > 100 * len(rows) / 2  # letters
    tops = [np.argwhere((below == colour).all(-1))[0].tolist() for colour in PALETTE[1:]]
    assert tops == sorted(tops, key=lambda place: (place[1] // 100, place[0]))


@pytest.mark.parametrize("size", [(4, 3), (2000, 40), (40, 900)], ids=str)
def test_a_legend_fits_pictures_of_any_shape(size):
    rows = [("a class with a name of some length  12.3 %", (200, 30, 30))] * 7
    drawn = np.asarray(with_legend(Image.new("RGB", size, "blue"), rows))
    edges = np.concatenate([drawn[size[1] :, -1], drawn[-1]])
    assert (edges == 255).all()  # nothing is cut off
    assert (drawn[size[1] :] == (200, 30, 30)).all(-1).sum() >= 7 * 12 * 12


def test_classes_of_one_name_are_added(tmp_path):
    labels = np.array([[0, 0, 1, 2, 2, 2, 1, 3]], dtype=np.uint8)
    info = command.SegmentationInfo(head="linear", head_width=1, classes=("a", "b", "c", "b"), palette=tuple(PALETTE))
    shares = command._write_segmented(tmp_path / "x.jpg", Image.new("RGB", (8, 1)), labels, info)
    assert list(shares.items()) == [("c", 37.5), ("b", 37.5), ("a", 25.0)]


# --- classification -------------------------------------------------------------------------------------------------


@torch.no_grad()
def scores_by_hand(model, image, side):
    """Softmax of the centre square, in percent."""
    factor = side / min(image.size)
    scaled = image.resize([max(side, int(length * factor)) for length in image.size], Image.Resampling.BICUBIC)
    left, top = round((scaled.width - side) / 2), round((scaled.height - side) / 2)
    pixels = torch.from_numpy(np.array(scaled.crop((left, top, left + side, top + side)))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return 100 * model(((pixels - mean) / std)[None])[0].softmax(0)


def test_best_classes_are_the_models_own(run, classifier, album, caplog, tmp_path):
    answer = run(model=str(classifier[0]), top=3)
    assert list(answer) == NAMES
    for name in NAMES:
        want = scores_by_hand(classifier[1], upright(album / name), 32)
        numbers = want.argsort(descending=True)[:3].tolist()
        assert [best["class"] for best in answer[name]] == numbers
        assert [best["name"] for best in answer[name]] == [LABELS[number] for number in numbers]
        assert [best["score"] for best in answer[name]] == pytest.approx(want[numbers].tolist(), rel=1e-4)
        line = ", ".join(f"{best['name']} {best['score']:.1f}" for best in answer[name])
        assert f"{name}: {line}" in [record.getMessage() for record in caplog.records]
    assert files_in(tmp_path / "out") == ["predictions.json"]


def test_scores_of_all_classes_sum_to_a_hundred(run, classifier):
    for best in run(model=f"local-dir:{classifier[0] / 'model'}", top=50).values():
        assert sorted(each["class"] for each in best) == list(range(7))
        assert sum(each["score"] for each in best) == pytest.approx(100)
        assert [each["score"] for each in best] == sorted((each["score"] for each in best), reverse=True)


def test_another_image_size_is_another_answer(run, classifier, album):
    model = timm.create_model(f"local-dir:{classifier[0] / 'model'}", pretrained=True, img_size=64).eval()
    answer = run(model=str(classifier[0]), image_size="64", top=7)
    for name in NAMES:
        want = scores_by_hand(model, upright(album / name), 64)
        assert {best["class"]: best["score"] for best in answer[name]} == pytest.approx(
            dict(enumerate(want.tolist())), rel=1e-3
        )
    assert answer != run(model=str(classifier[0]), top=7)


def test_batches_do_not_matter(run, classifier):
    one, four = (run(model=str(classifier[0]), batch_size=size) for size in (1, 4))
    for name in NAMES:
        assert [best["class"] for best in one[name]] == [best["class"] for best in four[name]]
        assert [best["score"] for best in one[name]] == pytest.approx([best["score"] for best in four[name]], rel=1e-4)


def test_bfloat16_is_near(run, classifier):
    exact, rounded = (run(model=str(classifier[0]), precision=precision, top=7) for precision in ("fp32", "bf16"))
    near = [{best["class"]: best["score"] for best in answer["grau.png"]} for answer in (exact, rounded)]
    assert near[0] == pytest.approx(near[1], abs=5)
    assert near[0] != near[1]


TINY = ("img_size=32", "patch_size=8", "embed_dim=48", "depth=1", "num_heads=3")


@pytest.mark.parametrize(
    ("classes", "named", "short"), [(1000, "tabby, tabby cat", "tabby"), (999, "281", "281")], ids=["ImageNet", "numbers"]
)
def test_names_where_the_model_has_none(run, caplog, album, classes, named, short):
    settings = dict(model="vit_tiny_patch16_224", model_args=(*TINY, f"num_classes={classes}"), model_pretrained=False)
    best = run(**settings, images=(str(album / "grau.png"),), top=classes)["grau.png"]
    assert {each["class"]: each["name"] for each in best}[281] == named
    assert f" {short} 0." in caplog.text


def test_a_model_of_a_fixed_size_is_made_for_the_size_asked_for(run, album):
    settings = dict(model="vit_tiny_patch16_224", model_args=(*TINY[1:], "num_classes=4"), model_pretrained=False)
    best = run(**settings, images=(str(album / "grau.png"),), image_size="40x24")["grau.png"]
    assert sum(each["score"] for each in best) == pytest.approx(100)


def test_label_names_by_number_and_of_another_head():
    model = small_student(num_classes=3, depth=1)
    model.pretrained_cfg |= {"label_names": {"0": "a", "1": "b", "2": "c"}}
    assert command._class_names(model)[0] == ["a", "b", "c"]
    model.pretrained_cfg |= {"label_names": ["a", "b"]}
    assert command._class_names(model)[0] == ["0", "1", "2"]


@pytest.mark.parametrize("size", [None, "40x72"])
def test_a_convolutional_classifier(run, tmp_path, album, size):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    save_model_folder(model, tmp_path / "resnet")
    best = run(model=str(tmp_path / "resnet"), image_size=size, images=(str(album / "a house.png"),))["a house.png"]
    assert sorted(each["class"] for each in best) == [0, 1, 2, 3]
    if size is None:
        side = timm.data.resolve_model_data_config(model)["input_size"][1]
        want = scores_by_hand(model, upright(album / "a house.png"), side).tolist()
        assert {each["class"]: each["score"] for each in best} == pytest.approx(dict(enumerate(want)), rel=1e-3)


# --- names ----------------------------------------------------------------------------------------------------------


def test_files_lie_by_the_names_of_the_pictures(run, tmp_path):
    run()
    stems = ["a house", "grau", "schöne Häuser/grau", "turned"]
    want = [f"{stem}.{kind}" for stem in stems for kind in ("labels.png", "overlay.jpg")]
    assert files_in(tmp_path / "out") == sorted([*want, "predictions.json"])


def test_equal_names_are_numbered_and_said(run, album, tmp_path, caplog):
    shutil.copy(album / "grau.png", album / "GRAU.jpeg")
    shutil.copy(album / "grau.png", album / "grau-2.png")
    files = [album / "grau.png", album / "schöne Häuser" / "grau.png", album / "GRAU.jpeg", album / "grau-2.png"]
    answer = run(images=tuple(map(str, files)))
    assert list(answer) == ["grau.png", "grau-3.png", "GRAU-4.jpeg", "grau-2.png"]
    assert "schöne Häuser/grau.png is called grau-3.png" in caplog.text
    assert label_map(tmp_path / "out", "grau-3.png").size == (150, 100)
    assert len(files_in(tmp_path / "out")) == 4 * 2 + 1


def test_a_picture_named_twice_is_taken_once(run, album, monkeypatch):
    monkeypatch.chdir(album)
    assert list(run(images=("turned.jpg", str(album), "../album/grau.png"))) == ["turned.jpg", *NAMES[:3]]


def test_no_name_leads_upwards(album, tmp_path, monkeypatch):
    monkeypatch.chdir(album / "schöne Häuser")
    given = ("../turned.jpg", "..", "../../album/a house.png")
    for picture in find_pictures(given, tmp_path / "out"):
        assert ".." not in picture.name.parts
        assert not picture.name.is_absolute()
        assert picture.file.exists()


def test_answers_below_the_pictures_are_no_pictures_of_the_next_run(run, album):
    first = run(out=str(album / "answers"))
    files = files_in(album)
    assert run(out=str(album / "answers")) == first
    assert files_in(album) == files


@pytest.mark.skipif(os.name == "nt", reason="file names are Unicode there")
def test_a_name_that_is_no_unicode(run, album, classifier, caplog):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        shutil.copy(album / "grau.png", album / name)
    except OSError:
        pytest.skip("this file system takes Unicode alone")
    answer = run(model=str(classifier[0]))
    assert answer[name] == answer["grau.png"]
    caplog.text.encode()  # as a console has to
    assert "caf\\udce9.png: " in caplog.text


# --- pictures that cannot be read, and stops ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken", [("a house.png",), ("turned.jpg",), ("a house.png", "grau.png", "schöne Häuser/grau.png")]
)
def test_unreadable_pictures_are_listed_and_left_out(run, classifier, album, tmp_path, caplog, broken):
    whole = run(model=str(classifier[0]), out=str(tmp_path / "whole"))
    for name in broken:
        cut(album / name)
    (album / "text.jpg").write_bytes(b"no picture")
    (album / "notes.txt").write_text("not looked at")
    answer = run(model=str(classifier[0]))
    assert list(answer) == [name for name in NAMES if name not in broken]
    for name, best in answer.items():
        assert [each["class"] for each in best] == [each["class"] for each in whole[name]]
    lines = [line.split("\t") for line in (tmp_path / "out" / "skipped.txt").read_text(encoding="utf-8").splitlines()]
    assert [name for name, _ in lines] == sorted([*broken, "text.jpg"])
    assert all(reason for _, reason in lines)
    assert f"{len(broken) + 1} images could not be read: " in caplog.text


def test_nothing_readable_is_an_error(run, album, tmp_path):
    for name in NAMES:
        cut(album / name)
    with pytest.raises(UserError, match=r"^--images: none of the 4 images can be read; see \S+skipped\.txt$"):
        run()
    assert files_in(tmp_path / "out") == ["skipped.txt"]


@pytest.fixture
def _ctrl_c_is_heard():
    """A process that a shell has put into the background ignores Ctrl-C, and so would this test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_is_heard")
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stopped_run_leaves_what_is_done_and_whole_files(run, album, tmp_path, monkeypatch, by):
    write, before = command._write_segmented, signal.getsignal(signal.SIGTERM)

    def stopped(path, *arguments):
        if path.name == "turned.jpg":
            signal.raise_signal(by)
        return write(path, *arguments)

    monkeypatch.setattr(command, "_write_segmented", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(batch_size=1)
    done = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert list(done) == NAMES[:3]
    assert len(files_in(tmp_path / "out")) == 3 * 2 + 1
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert list(run(batch_size=1)) == NAMES


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    (tmp_path / "x.png").write_bytes(b"old")

    def write(file):
        file.write_bytes(b"ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command._write_whole(tmp_path / "x.png", write)
    assert files_in(tmp_path) == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"old"


def test_a_second_run_replaces_the_first_and_its_list(run, album, tmp_path):
    good = (album / "turned.jpg").read_bytes()
    cut(album / "turned.jpg")
    run()
    (album / "turned.jpg").write_bytes(good)
    assert list(run()) == NAMES
    assert "skipped.txt" not in files_in(tmp_path / "out")


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": ()}, r"^--images: give at least one"),
        ({"images": ("nowhere.jpg",)}, r"^--images nowhere\.jpg: no such file or folder$"),
        ({"images": ("empty",)}, r"^--images empty: holds no images; expected \.jpg "),
        ({"out": "album"}, r"^--out album: \S+album lies in it; give a folder for the results alone$"),
        ({"images": ("album/grau.png",), "out": "album"}, r"^--out album: album/grau\.png lies in it"),
        ({"out": "file"}, r"^--out file: cannot be made a folder \(File exists\)"),
        ({"top": 0}, r"^--top 0: must be at least 1$"),
        ({"batch_size": 0}, r"^--batch-size 0: must be at least 1$"),
        ({"image_size": "96"}, r"^--image-size 96: \S+ is a segmentation run"),
        ({"model_args": ("depth=4",)}, r"^--model-args depth=4: \S+ is a segmentation run"),
        ({"model": "nowhere"}, r"^--model nowhere: unknown model"),
        ({"model": "headless"}, r"^--model headless: has no classifier; run finetune or segment on it"),
        (
            {"model": "classifier", "image_size": "30"},
            r"image size 30x30: must be a multiple of the patch 16x16; try 32x32$",
        ),
        ({"model": "classifier", "image_size": "3O"}, r"^--image-size 3O: give one side"),
        ({"device": "cuda"}, r"^--device cuda: not available here"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_in_one_line_and_leaves_nothing(
    run, classifier, album, tmp_path, monkeypatch, changed, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("empty").mkdir()
    Path("file").touch()
    shutil.copytree(classifier[0] / "model", "classifier")
    save_model_folder(small_student(num_classes=0, depth=1), Path("headless"))
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        run(**changed)
    assert "\n" not in str(error.value)
    assert files_in(tmp_path) == before
    assert not Path("out").exists()
