"""The commands as a user meets them: help, dry run, errors in one line, the quickstart, every command of the README."""

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch

import vit_linearizer
from segmentation_folders import write_ade20k
from vit_linearizer.cli import main
from vit_linearizer.commands.arguments import parse_model_args, parse_size
from vit_linearizer.commands.distill import distill
from vit_linearizer.commands.distill_flags import DistillConfig
from vit_linearizer.contracts import UserError
from vit_linearizer.models.loading import save_model_folder
from vit_linearizer.models.segmenter import Segmenter
from vit_linearizer.models.segmenter_folder import save_segmenter

REPO = Path(__file__).parent.parent


@pytest.fixture
def distill_arguments(photos: Path, small_teacher: Path, tmp_path: Path):
    """Arguments of a small ``distill``; keyword arguments replace or add flags (None leaves one out)."""

    def make(**flags) -> list[str]:
        given = {
            "teacher": str(small_teacher),
            "student": "adventurer_tiny_patch16_224",
            "data": str(photos),
            "out": str(tmp_path / "run"),
            "student-args": "img_size=32 patch_size=8 embed_dim=32 depth=4",
            "recipe": "smoke",
            "device": "cpu",
            **{name.replace("_", "-"): value for name, value in flags.items()},
        }
        return ["distill", *(w for n, v in given.items() if v is not None for w in (f"--{n}", *shlex.split(str(v))))]

    return make


COMMANDS = (
    "distill", "finetune", "segment", "evaluate", "predict", "maps", "report", "export", "embed", "benchmark", "quickstart",
    "doctor",
)  # fmt: skip


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert ("--teacher-image-size" in text and "--no-teacher-pretrained" in text) or command != "distill"


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vit-linearizer {vit_linearizer.__version__}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"teacher": "vit_tny_patch16_224"},
            r"--teacher vit_tny_patch16_224: unknown model; did you mean vit_tiny_patch16_224",
        ),
        (
            {"student": "adventurer_tiny"},
            r"--student adventurer_tiny: unknown model; did you mean adventurer_tiny_patch16_224",
        ),
        ({"teacher": "nowhere.safetensors"}, r"--teacher nowhere.safetensors: no such file"),
        ({"teacher": "swin_tiny_patch4_window7_224"}, r"is not a plain backbone"),
        ({"recipe": "linearizr"}, r"--recipe linearizr: unknown recipe.*did you mean linearizer"),
        ({"data": "nowhere"}, r"--data nowhere: no such folder"),
        ({"data": "builtin:digit"}, r"--data builtin:digit: unknown built-in data; did you mean builtin:digits"),
        ({"image_size": "30"}, r"image size 30x30: must be a multiple of the patch 8x8; try 32x32"),
        ({"image_size": "3O"}, r"--image-size 3O: give one side \(224\) or height x width"),
        ({"teacher_image_size": "64"}, r"--teacher-image-size 64x64: .*use 32x32"),
        ({"mask_ratio": "1.2"}, r"--mask-ratio 1.2: must be in \[0, 1\)"),
        ({"mask_ratio": "0"}, r"--mask-ratio 0.0: masked prediction has nothing to predict"),
        ({"stages": "9"}, r"--stages 9: must be between 1 and the backbone's 4 blocks"),
        ({"batch_size": "-2"}, r"--batch-size -2: must be above 0"),
        ({"epochs": "0"}, r"--epochs 0: must be above 0"),
        ({"seed": "-1"}, r"--seed -1: must be at least 0"),
        ({"device": "cuda"}, r"--device cuda: not available here"),
        ({"student_args": "depth"}, r"--student-args depth: must look like name=value"),
        ({"student_args": "dept=4"}, r"--student adventurer_tiny_patch16_224: could not be built: .*dept"),
        ({"student_args": "flip=both"}, r"could not be built: flip='both': choose from alternate, released"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    distill_arguments, flags: dict, message: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    if flags.get("device") == "cuda" and torch.cuda.is_available():
        flags, message = {"device": "mps"}, "--device mps: not available here"
    assert main(distill_arguments(**flags)) == 2
    error = capsys.readouterr().err.strip()
    assert re.fullmatch(r"vit-linearizer: error: [^\n]*", error), error
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(distill_arguments) -> None:
    with pytest.raises(UserError):
        main([*distill_arguments(mask_ratio="2"), "--debug"])


def test_empty_and_broken_folders(distill_arguments, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    assert main(distill_arguments(data=folder)) == 2
    assert "holds no images" in capsys.readouterr().err
    (folder / "broken.jpg").write_bytes(b"no picture")
    assert main(distill_arguments(data=folder)) == 2
    assert "none of its 1 image files can be read" in capsys.readouterr().err


def test_weights_without_network(distill_arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
                                 tmp_path: Path) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert main(distill_arguments(teacher="vit_tiny_patch16_224", student_args="depth=1")) == 2
    error = capsys.readouterr().err
    assert re.search(r"--teacher vit_tiny_patch16_224: its weights could not be fetched .*--no-teacher-pretrained", error)
    assert not (tmp_path / "run").exists()


def test_out_in_use_by_another_configuration(distill_arguments, capsys: pytest.CaptureFixture) -> None:
    assert main(distill_arguments()) == 0
    assert main(distill_arguments(seed=3, learning_rate=0.5)) == 2
    error = capsys.readouterr().err
    assert "learning_rate (0.001 there, 0.5 here), " in error
    assert "seed (0 there, 3 here)" in error


def test_dry_run_describes_and_stops(
    distill_arguments, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*distill_arguments(), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()
    said = caplog.text
    for fact in (r"student +0.1 M parameters, image 32x32, 4 x 4 patches", r"teacher +0.1 M", r"12 found, 0 skipped",
                 r"16 patches, 12 hidden", r"1 epochs, 3 steps of 4 images", r"memory +about"):  # fmt: skip
        assert re.search(fact, said), fact


def test_skipped_files_are_listed(distill_arguments, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in (photos / "a").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "header.png").write_bytes(b"no picture")
    whole = (photos / "b" / "photo-00.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 3])
    assert main(distill_arguments(data=folder, epochs=4)) == 0
    lines = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["cut.jpg", "header.png"]


def test_any_vit_any_photos_any_size(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["distill", "--teacher", "vit_tiny_patch16_224", "--no-teacher-pretrained", "--student",
                 "adventurer_tiny_patch16_224", "--data", str(photos), "--out", str(run), "--epochs", "1",
                 "--batch-size", "8"]  # fmt: skip
    assert main(arguments) == 0
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["model"]
    student = timm.create_model("adventurer_tiny_patch16_224", num_classes=0, global_pool="avg").eval()
    student.load_state_dict({n.removeprefix("student."): v for n, v in best.items() if n.startswith("student.")})
    model = timm.create_model(f"local-dir:{run}/model", pretrained=True).eval()
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images), student(images), rtol=0, atol=0)
        for size in ((224, 224), (224, 448)):
            features = model.forward_features(torch.rand(1, 3, *size))
            assert features.shape == (1, 1 + size[0] * size[1] // 256, 256)
            assert torch.isfinite(features).all()
    assert all(torch.equal(a, b) for a, b in zip(vit_linearizer.load(run).parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("recipe", ["linearizer", "regression", "digits"])
def test_each_recipe_runs_small(distill_arguments, recipe: str) -> None:
    assert main(distill_arguments(recipe=recipe, epochs=1, batch_size=4)) == 0


@pytest.mark.parametrize("flags", [
    {"masking": "block"}, {"activation_matching_tokens": "all"}, {"activation_matching_tokens": "class"},
    {"masked_prediction_weight": 0}, {"activation_matching_weight": 0, "masked_prediction_target": "none"},
    {"feature_regression_weight": 0.5, "feature_regression_target": "none"}, {"image_size": "32x64"},
])  # fmt: skip
def test_each_objective_and_mode_runs(distill_arguments, flags: dict) -> None:
    assert main(distill_arguments(**flags)) == 0


def test_labels_give_knn(distill_arguments, tmp_path: Path) -> None:
    assert main(distill_arguments(data="builtin:digits-test", batch_size=128)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["knn"] <= 100 for line in lines if line["split"] == "held_out")


def test_doctor_names_device_and_scan(caplog: pytest.LogCaptureFixture) -> None:
    assert main(["doctor"]) == 0
    for topic in ("torch", "cpu", "cuda", "device", "precision", "scan"):
        assert re.search(rf"^\S+ +\S+ {topic} +\S|{topic} +\S", caplog.text, re.MULTILINE), topic


def test_quickstart_in_its_smallest_form(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """First without --full; then with it, which keeps what is there and adds its rows."""
    check_quickstart(tmp_path / "q", capsys, full=False)
    check_quickstart(tmp_path / "q", capsys, full=True)


def check_quickstart(out: Path, capsys: pytest.CaptureFixture, *, full: bool) -> None:
    assert main(["quickstart", "--out", str(out), "--smoke", *(["--full"] if full else [])]) == 0
    results = json.loads((out / "quickstart.json").read_text())
    both = {"finetuned_100_percent", "finetuned_10_percent"}
    tuned = {"teacher": {"finetuned_100_percent"}, "distilled": both, "supervised": {"finetuned_10_percent"}}
    tuned |= {"teacher": both, "supervised": both} if full else {}
    assert results.keys() == {"teacher", "distilled", "adala", "untrained", "regression", "supervised"}
    for row, values in results.items():
        frozen = {"knn", "linear_probe", "few_shot"} | ({"top1"} if row in ("teacher", "adala") else set())
        frozen = set() if row == "supervised" else frozen
        others = {"train_seconds"} | (set() if row == "teacher" else {"final_cosine"}) if frozen else set()
        assert values.keys() == frozen | tuned.get(row, set()) | others
        assert -1 <= values.get("final_cosine", 0) <= 1
        assert all(10 < values[name] <= 100 for name in frozen - {"top1"})
        assert all(0 <= values[name] <= 100 for name in tuned.get(row, set()))
    assert results["teacher"]["finetuned_100_percent"] == results["teacher"]["top1"]
    said = capsys.readouterr().out
    assert "5 labels" in said
    assert "all labels" in said


def readme_commands() -> list[str]:
    """Every command line of the README's and docs' console blocks that starts with ours or with make.

    Those of docs/integrations.md run in tests/test_integrations.py.
    """
    found = []
    for page in (REPO / "README.md", *sorted(set((REPO / "docs").glob("*.md")) - {REPO / "docs" / "integrations.md"})):
        for block in re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(), re.DOTALL):
            joined = block.replace("\\\n", " ")
            found += [
                " ".join(line.split()) for line in joined.splitlines() if line.startswith(("vit-linearizer ", "make "))
            ]
    return sorted(set(found))


@pytest.mark.parametrize("line", [line for line in readme_commands() if line.startswith("vit-linearizer ")])
def test_every_documented_command_runs(line: str, photos: Path, small_teacher: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """With the placeholders filled in; trainings keep their flags and are made small."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)[1:]
    tiny = ["patch_size=8", "embed_dim=32", "depth=4"]

    def put(flag: str, *values: str) -> None:
        """Replace what follows a flag up to the next one, or add both."""
        start = words.index(flag) + 1 if flag in words else len(words)
        if flag not in words:
            words.append(flag)
            start += 1
        stop = next((at for at in range(start, len(words)) if words[at].startswith("--")), len(words))
        words[start:stop] = values

    if words[0] in ("quickstart", "benchmark"):
        words += ["--smoke"]
    (tmp_path / "PHOTOS").symlink_to(photos)
    for split in ("train", "val"):
        for name, folder in (("cat", "a"), ("dog", "b")):
            (tmp_path / "IMAGENET" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "IMAGENET" / split / name).symlink_to(photos / folder)
    if words[0] in ("embed", "export"):
        save_small_student(tmp_path / words[1], num_classes=0)
    if words[0] in ("finetune", "segment", "evaluate") and "runs/clip" in words:
        save_small_student(tmp_path / "runs" / "clip", num_classes=0)
        save_small_student(tmp_path / "runs" / "classifier", num_classes=2)
    if words[0] in ("report", "maps"):
        small = dict(image_size="32", epochs=1, batch_size=4)
        distill(DistillConfig(teacher=str(small_teacher), student="adventurer_tiny_patch16_224", student_args=tuple(tiny),
                              data=str(photos), out="runs/clip", **small))  # fmt: skip
    if words[0] == "maps":
        if "--image-size" in words:
            put("--image-size", "32x64")
        words = [str(small_teacher) if word.startswith("vit_") else word for word in words]
    if words[0] == "predict":
        save_small_segmenter(tmp_path / "runs" / "scenes")
    if words[0] == "evaluate":
        put("--teacher", str(small_teacher))
        words += ["--draws", "1"]
    if words[0] in ("finetune", "segment"):
        put("--recipe", "smoke")
        put("--image-size" if words[0] == "finetune" else "--crop", "32")
        if "ade20k" in words:
            write_ade20k(tmp_path / "ADEChallengeData2016")
        if "--model-args" in words:
            put("--model-args", "embed_dim=32", "depth=4")
    if words[0] == "distill":
        put("--data", str(photos))
        put("--teacher", str(small_teacher))
        if "adala" not in words:
            put("--student-args", *tiny)
        size = words[words.index("--image-size") + 1] if "--image-size" in words else "32"
        put("--image-size", size if size == "32" else "64x128" if "x" in size else "64")
        put("--epochs", "1")
        put("--batch-size", "4")
        words = [word for word in words if word != "--compile"]
    assert main(words) == 0


def save_small_student(run: Path, *, num_classes: int) -> None:
    shape = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_classes=num_classes)
    save_model_folder(timm.create_model("adventurer_tiny_patch16_224", **shape), run / "model")


def save_small_segmenter(run: Path) -> None:
    backbone = timm.create_model(
        "adventurer_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=4, num_classes=0
    )
    segmenter = Segmenter(backbone, num_classes=2, head="linear")
    noted = {"crop": [32, 32], "resize": None, "mode": "whole", "stride": None}
    save_segmenter(segmenter, run / "model", classes=["sky", "sea"], palette=[(0, 0, 255), (0, 255, 0)], extra=noted)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (REPO / "docs").glob("*.md"))]
)
def test_links_lead_somewhere_and_names_stand_where_they_are_said_to(page: str) -> None:
    text = (REPO / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    folder = (REPO / page).parent
    assert not [link for link in links if not (folder / link).exists()]
    said = re.findall(r"`(?:\w+\.)?(\w+)`(?:, `\w+`)* in \[[^\]]+\]\(([^)#]+\.py)\)", text)
    assert said or page != "docs/paper_map.md"
    wrong = [(name, file) for name, file in said if not re.search(rf"\b{name}\b", (folder / file).read_text())]
    assert not wrong


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert {line.split()[1] for line in readme_commands() if line.startswith("make ")} <= targets


def test_readme_map_names_every_package_and_file() -> None:
    readme = (REPO / "README.md").read_text()
    for file in (REPO / "src" / "vit_linearizer").rglob("*.py"):
        if file.name not in ("__init__.py", "__main__.py"):
            assert f"`{file.name}`" in readme or f"{file.name} " in readme, file


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("512x1024", (512, 1024)), (None, None)])
def test_sizes(text: str | None, size: tuple | None) -> None:
    assert parse_size("--image-size", text) == size


def test_model_arguments() -> None:
    parsed = parse_model_args("--student-args", ("depth=4", "flip=released", "img_size=(32, 64)"))
    assert parsed == {"depth": 4, "flip": "released", "img_size": (32, 64)}
