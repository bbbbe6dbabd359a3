"""``export`` as a command: model cards, what is sent where, failures that leave nothing, refusals in one line."""

import contextlib
import importlib
import json
import re
import shutil
import types

import huggingface_hub
import pytest
import timm
import torch

from vit_linearizer import DistillConfig, ExportConfig, UserError, distill, export
from vit_linearizer.cli import main
from vit_linearizer.exporting import parity
from vit_linearizer.exporting.model_card import Origin, find_origin, write_card
from vit_linearizer.models.loading import load, save_model_folder

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A backbone of one block, as a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("export") / "source"
    shape = dict(img_size=32, patch_size=8, embed_dim=32, depth=1, num_classes=0)
    save_model_folder(timm.create_model("adventurer_tiny_patch16_224", **shape), folder)
    return folder


@pytest.fixture
def make(source, tmp_path):
    """Settings of an export; keyword arguments replace them."""

    def config(**settings):
        given = dict(model=str(source), format="timm", out=str(tmp_path / "out"))
        return ExportConfig(**given | settings)

    return config


def contents(folder):
    return sorted(file.name for file in folder.iterdir())


# --- the card -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, photos, small_teacher):
    """A finished run of a student given as a weight file, from a teacher given as a folder."""
    folder = tmp_path_factory.mktemp("run")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4}
    torch.save(timm.create_model("adventurer_tiny_patch16_224", **shape).state_dict(), folder / "start.pth")
    given = dict(teacher=str(small_teacher), student=str(folder / "start.pth"), student_arch="adventurer_tiny_patch16_224")
    args = tuple(f"{name}={value}" for name, value in shape.items())
    distill(DistillConfig(**given, student_args=args, data=str(photos), out=str(folder / "my|run"), epochs=1, batch_size=4,
                          drop_path=0.0, device="cpu", precision="fp32"))  # fmt: skip
    return folder / "my|run"


def test_the_card_of_a_run_says_where_it_comes_from(run_folder, small_teacher, photos, make, tmp_path):
    export(make(model=str(run_folder)))
    card, config = ((tmp_path / "out" / name).read_text() for name in ("README.md", "config.json"))
    figures = json.loads((run_folder / "evaluation.json").read_text())
    assert figures
    for line in [r"\| teacher \| `model` \|", r"\| licence of the teacher \| not known here", r"\| recipe \| \w+ \|",
                 r"\| epochs \| 1 \|", r"\| batch_size \| 4 \|", r"\| flip rule \| `alternate` \|",
                 *(rf"\| {name} \| \S+ \|" for name in figures)]:  # fmt: skip
        assert re.search(line, card), line
    assert "license:" not in card
    for place in (run_folder.parent, small_teacher, photos, tmp_path):
        assert str(place) not in card + config


def test_the_card_of_a_fine_tuned_student_names_the_teacher_too(run_folder, source, tmp_path):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "metrics.jsonl").touch()
    (tuned / "config.json").write_text(json.dumps({"command": "finetune", "model": str(run_folder)}))
    (tuned / "evaluation.json").write_text(json.dumps({"top1": 90.0, "evaluate": [{"data": "/home/me"}]}))
    card = write_card(find_origin(str(tuned)), load(source))
    assert "distilled without labels from `model` and then trained on labels, with vit-linearizer" in card
    assert "| top1 | 90 |" in card and "/home/me" not in card


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_the_card_never_shows_folders_of_the_machine(source, small_teacher, prefix):
    teacher = f"{prefix}{small_teacher if prefix else '/home/me/secret/teacher'}"
    card = write_card(Origin(name="n", settings={"teacher": teacher}), load(source))
    assert str(small_teacher.parent) not in card
    assert "secret" not in card


def test_a_run_and_its_model_folder_have_the_same_card(run_folder, make, tmp_path):
    for number, model in enumerate((run_folder, run_folder / "model", f"local-dir:{run_folder}")):
        export(make(model=str(model), out=str(tmp_path / f"{number}")))
    first, *others = [(tmp_path / f"{number}" / "README.md").read_text() for number in range(3)]
    assert "\n# my\\|run\n" in first
    assert others == [first, first]


def test_cells_of_the_card_cannot_break_the_table(source):
    origin = Origin(name="a|<b>\nc", settings={"teacher": "t|<x>\ny", "recipe": "r|<s>"}, figures={"f|<g>": 0.123456})
    card = write_card(origin, load(source), {"input|": "<images>\n|"})
    assert "# a\\|&lt;b>" in card
    assert "| f\\|&lt;g> | 0.1235 |" in card
    assert "| recipe | r\\|&lt;s> |" in card
    assert "| input\\| | &lt;images> \\| |" in card
    for line in card.splitlines():
        assert not line.startswith("|") or len(re.findall(r"(?<!\\)\|", line)) == 3


def test_the_licence_of_a_known_teacher_is_in_the_front_matter(source):
    settings = {"teacher": "vit_small_patch14_dinov2.lvd142m"}
    licence = timm.get_pretrained_cfg("vit_small_patch14_dinov2.lvd142m").license
    assert licence
    card = write_card(Origin(name="n", settings=settings), load(source))
    assert f'\nlicense: "{licence}"\n' in card.split("---")[1]
    assert f"| licence of the teacher | {licence} |" in card


def test_a_teacher_without_its_weights_lends_no_licence(source):
    settings = {"teacher": "vit_small_patch14_dinov2.lvd142m", "teacher_pretrained": False}
    assert "license:" not in write_card(Origin(name="n", settings=settings), load(source))


# --- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch):
    """What would have gone to the Hub."""
    calls = []

    class Recorder:
        def create_repo(self, name, **given):
            calls.append(("create_repo", name, given))
            return types.SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

        def upload_folder(self, **given):
            calls.append(("upload_folder", given["repo_id"], given))

    monkeypatch.setattr(huggingface_hub, "HfApi", Recorder)
    return calls


def test_nothing_is_sent_unless_asked_for(make, sent):
    export(make())
    assert sent == []


@pytest.mark.parametrize("name", ["me/it", "it"])
def test_the_folder_is_sent_when_asked_for(make, sent, tmp_path, caplog, name):
    export(make(push_to_hub=name))
    assert [call[:2] for call in sent] == [("create_repo", name), ("upload_folder", "me/it")]
    assert sent[1][2]["folder_path"] == tmp_path / "out"
    assert caplog.text.rstrip().endswith("sent to the Hub: hf-hub:me/it")


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUFFIXES)
@pytest.mark.parametrize("before", [None, b"older"], ids=["new", "existing"])
def test_a_difference_too_large_leaves_everything_as_it_was(source, tmp_path, monkeypatch, capsys, name, before):
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)
    out = tmp_path / f"model{SUFFIXES[name]}"
    if before:
        out.write_bytes(before)
    assert main(["export", str(source), "--format", name, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"vit-linearizer: error: export: at 1x32x32 its outputs differ .* not written\n", error)
    assert contents(tmp_path) == ([out.name] if before else [])
    assert not before or out.read_bytes() == before


@pytest.mark.parametrize("before", [None, "older"], ids=["new", "existing"])
def test_a_timm_folder_too_different_leaves_everything_as_it_was(make, source, tmp_path, monkeypatch, before):
    out = tmp_path / "out"
    if before:
        shutil.copytree(source, out)
        (out / "README.md").write_text(before)
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match="not written"):
        export(make())
    assert contents(tmp_path) == (["out"] if before else [])
    assert not before or (out / "README.md").read_text() == before


@pytest.mark.parametrize("other", ["thesis.tex", ".git/HEAD", "checkpoints/last.pt"])
def test_other_files_beside_a_model_are_never_removed(make, source, tmp_path, other):
    shutil.copytree(source, tmp_path / "out")
    (tmp_path / "out" / other).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / other).write_text("precious")
    with contextlib.suppress(UserError):
        export(make())
    assert (tmp_path / "out" / other).read_text() == "precious"


@pytest.mark.parametrize("name", SUFFIXES)
def test_a_crash_while_writing_leaves_an_existing_file(make, tmp_path, monkeypatch, name):
    out = tmp_path / f"model{SUFFIXES[name]}"
    out.write_bytes(b"older")

    def crash(*_, **__):
        raise OSError("disk full")

    module = importlib.import_module(f"vit_linearizer.exporting.{'onnx_file' if name == 'onnx' else 'torch_program'}")
    monkeypatch.setattr(module, "largest_difference", crash)
    with pytest.raises(OSError, match="disk full"):
        export(make(format=name, out=str(out)))
    assert contents(tmp_path) == [out.name]
    assert out.read_bytes() == b"older"


@pytest.mark.parametrize("name", SUFFIXES)
def test_an_existing_file_is_replaced(make, tmp_path, name):
    out = tmp_path / f"model{SUFFIXES[name]}"
    out.write_bytes(b"older")
    export(make(format=name, out=str(out)))
    assert contents(tmp_path) == [out.name, f"{out.name}.md"]
    assert out.read_bytes() != b"older"


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_remedy(make, monkeypatch, tmp_path, name):
    found = importlib.import_module

    def missing(module, *rest):
        if module == name:
            raise ImportError(name)
        return found(module, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=rf"^--format onnx: needs {name}; pip install 'vit-linearizer\[export\]'$"):
        export(make(format="onnx", out=str(tmp_path / "model.onnx")))
    assert not contents(tmp_path)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--format onnx --out model.pt2", r"--out model\.pt2: must end in \.onnx for --format onnx"),
        ("--format torch-export --out model", r"--out model: must end in \.pt2 for --format torch-export"),
        ("--format timm --out new --dynamic", r"--dynamic: not for --format timm"),
        ("--format timm --out new --dense", r"--dense: not for --format timm"),
        ("--format timm --out new --no-normalize", r"--no-normalize: not for --format timm"),
        ("--format timm --out papers", r"--out papers: holds other files \(thesis\.tex\); give a new folder"),
        ("--format timm --out run", r"--out run: is a run or part of one; give a new folder"),
        ("--format timm --out letter.txt", r"--out letter\.txt: is a file; give a folder"),
        ("--format onnx --out folder.onnx", r"--out folder\.onnx: is a folder"),
        ("--format onnx --out new.onnx --push-to-hub me/it", r"--push-to-hub me/it: needs --format timm"),
        ("--format timm --out new --push-to-hub me/it/too", r"--push-to-hub me/it/too: must be NAME or OWNER/NAME"),
        ("--format timm --out new --image-size 30", r"image.size 30x30: must be a multiple of the patch 8x8; try 32x32"),
        ("--format onnx --out new.onnx --image-size 3O", r"--image-size 3O: give one side \(224\) or height x width.*"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_and_leaves_nothing(
    source, tmp_path, monkeypatch, capsys, sent, flags, message
):
    monkeypatch.chdir(tmp_path)
    for file in ("papers/thesis.tex", "run/config.json", "run/metrics.jsonl", "folder.onnx/x", "letter.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(source), *flags.split()]) == 2
    assert re.fullmatch(rf"vit-linearizer: error: (--)?{message}\n", capsys.readouterr().err)
    assert (sorted(tmp_path.rglob("*")), sent) == (before, [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tny_patch16_224", r"model vit_tny_patch16_224: unknown model; did you mean vit_tiny_patch16_224.*"),
        ("swin_tiny_patch4_window7_224", r"model swin_tiny_patch4_window7_224: is not a plain backbone.*"),
        ("nowhere.pth", r"model nowhere\.pth: no such file"),
        ("nothing/here", r"model nothing/here: unknown model.*"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_in_one_line(tmp_path, capsys, name, message):
    line = ["export", name, "--format", "timm", "--out", str(tmp_path / "new"), "--no-model-pretrained"]
    assert main(line) == 2
    assert re.fullmatch(rf"vit-linearizer: error: {message}\n", capsys.readouterr().err)
    assert not contents(tmp_path)


def test_what_was_found_is_said(make, caplog, tmp_path):
    export(make())
    assert f"written: {tmp_path / 'out'}" in caplog.text
    assert "at 1x32x32 the largest relative difference to PyTorch is 0.0e+00" in caplog.text


def test_neighbours_of_the_folder_stay(source, tmp_path):
    for neighbour in ("student.new", "student.old"):
        (tmp_path / neighbour).mkdir()
        (tmp_path / neighbour / "precious.txt").touch()
    for _ in range(2):
        assert main(["export", str(source), "--format", "timm", "--out", str(tmp_path / "student")]) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["student", "student.new", "student.old"]
    assert len(list(tmp_path.rglob("precious.txt"))) == 2


@pytest.mark.parametrize(
    "teacher", ["adventurer_tiny_patch16_224.pth", "vit_base_patch16_224.pth", "vit_tiny_patch16_224.none"]
)
def test_a_teacher_that_only_looks_like_a_name_of_timm_has_no_licence(teacher):
    assert Origin(name="n", settings={"teacher": teacher}).licence is None


def test_a_free_program_keeps_the_positions_of_the_model(tmp_path):
    """Recorded at another size, its positions are still those of the model: nothing is resampled twice."""
    model = timm.create_model("adventurer_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=64, depth=1, num_classes=3)
    torch.nn.init.normal_(model.pos_embed)
    save_model_folder(model.eval(), tmp_path / "model")
    program = tmp_path / "m.pt2"
    settings = dict(format="torch-export", dynamic=True, image_size="16", normalize=False)
    export(ExportConfig(model=str(tmp_path / "model"), out=str(program), **settings))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        (logits,) = torch.export.load(program).module()(images)
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-4)


def test_random_weights_are_called_random(tmp_path):
    shape = ("depth=1", "embed_dim=32", "img_size=32", "patch_size=8")
    export(ExportConfig(model="adventurer_tiny_patch16_224", model_args=shape, format="timm", out=str(tmp_path / "m")))
    assert "with **random weights**" in (tmp_path / "m" / "README.md").read_text()
    trial = Origin(name="n", settings={"teacher": "vit_tiny_patch16_224", "teacher_pretrained": False})
    assert "with **random weights**: it knows nothing" in write_card(trial, load(tmp_path / "m"))


def test_the_model_of_a_run_is_not_overwritten(source, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="is a run or part of one; give a new folder"):
        export(ExportConfig(model=str(source), format="timm", out=str(tmp_path / "run" / "model")))


def test_an_architecture_is_for_weight_files(source, tmp_path):
    with pytest.raises(UserError, match=r"^--model-arch vit_tiny_patch16_224: is for weight files only"):
        export(ExportConfig(model=str(source), model_arch="vit_tiny_patch16_224", format="timm", out=str(tmp_path / "m")))


def test_a_hub_that_does_not_answer_is_one_line(source, tmp_path, monkeypatch):
    class Unreachable:
        def create_repo(self, name, **_):
            raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    with pytest.raises(UserError, match=r"^--push-to-hub me/it: could not be sent \(no route\); .* is written"):
        export(ExportConfig(model=str(source), format="timm", out=str(tmp_path / "m"), push_to_hub="me/it"))
