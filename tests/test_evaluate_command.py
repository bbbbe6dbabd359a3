"""The command `evaluate`: each figure against the function it comes from, robustness by hand, refusals, what is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from class_folders import break_body, write_split
from vit_linearizer.commands.evaluate import EvaluateConfig, evaluate
from vit_linearizer.commands.finetune import FinetuneConfig, finetune
from vit_linearizer.contracts import UserError
from vit_linearizer.data.datasets import CentreSet, centre_loader
from vit_linearizer.data.labelled import open_labelled
from vit_linearizer.evaluation import (
    FidelityMeter,
    class_scores,
    collect_features,
    few_shot_accuracy,
    fit_linear_probe,
    knn_accuracy,
    linear_probe_accuracy,
)
from vit_linearizer.evaluation.classification import count_right
from vit_linearizer.evaluation.corruptions import KINDS, SEVERITIES, corrupt
from vit_linearizer.evaluation.robustness import corrupted_accuracies, summarise_corruptions
from vit_linearizer.models.adapters import extract_features, normalize
from vit_linearizer.models.loading import load, open_model, save_model_folder

CPU = torch.device("cpu")
SIZE = (16, 16)


def make_config(data: Path | str, *models: Path, **values) -> EvaluateConfig:
    return EvaluateConfig(models=tuple(map(str, models)), data=str(data), device="cpu", **values)


def fine_tuned(data: Path | str, out: Path, **values) -> Path:
    shape = dict(model="adventurer_tiny_patch16_224", model_args=("embed_dim=32", "depth=2"), image_size="16", patch_size=8)
    common = dict(data=str(data), out=str(out), recipe="smoke", model_pretrained=False, batch_size=8, device="cpu")
    return finetune(FinetuneConfig(**{**shape, **common, "epochs": 2, "precision": "fp32", **values}))


def loaders(data: Path | str, size: tuple[int, int] = SIZE, batch_size: int = 7):
    """Training and held-out pictures, centred."""
    found = open_labelled(str(data))
    sources = (found.training, found.validation)
    return tuple(centre_loader(CentreSet(source, range(len(source)), size), batch_size=batch_size) for source in sources)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("pictures"), train=6)


@pytest.fixture(scope="module")
def made(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A fine-tuned student and teacher, and a distilled student, which has no head."""
    folder = tmp_path_factory.mktemp("runs")
    vit = dict(model="vit_tiny_patch16_224", model_args=("embed_dim=32", "depth=2", "num_heads=2"))
    fast = dict(learning_rate=3e-3, layer_decay=1.0, drop_path=0.0, augmentation="none")
    runs = {
        "student": fine_tuned(pictures, folder / "student", **fast),
        "teacher": fine_tuned(pictures, folder / "teacher", **vit, **fast, epochs=6),
        "headless": folder / "headless",
    }
    torch.manual_seed(0)
    model = timm.create_model(
        "adventurer_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_classes=0, global_pool="avg"
    )
    runs["headless"].mkdir()
    save_model_folder(model, runs["headless"] / "model")
    (runs["headless"] / "config.json").write_text("{}")
    return runs


@pytest.fixture
def runs(made: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies, to be written to."""
    return {name: Path(shutil.copytree(run, tmp_path / name)) for name, run in made.items()}


# --- each figure is the function's


def test_every_metric_of_the_digits(tmp_path: Path) -> None:
    """Two runs, by default all that is possible; every number again from the function that it should come from."""
    both = [fine_tuned("builtin:digits", tmp_path / f"{seed}", seed=seed, label_fraction=0.01, epochs=1) for seed in (0, 1)]
    results = evaluate(make_config("builtin:digits", *both, shots=2, draws=2))
    assert list(results) == [str(run) for run in both]
    train, test = loaders("builtin:digits", batch_size=64)
    for run, values in zip(both, results.values(), strict=True):
        model = load(run)
        features = (*collect_features(model, train, CPU), *collect_features(model, test, CPU))
        scores = class_scores(model, test, CPU)
        assert values == pytest.approx(
            {
                "top1": scores["top1"],
                "top5": scores["top5"],
                "knn": knn_accuracy(*features),
                "linear_probe": linear_probe_accuracy(*features),
                "few_shot": few_shot_accuracy(*features, shots=2, draws=2),
                "skipped": 0,
            }
        )
        assert values["top1"] == json.loads((run / "evaluation.json").read_text())["top1"]
    assert results[str(both[0])] != results[str(both[1])]


def test_top1_and_loss_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 9, generator=generator), torch.randint(9, (40,), generator=generator)
    ranks = [
        sorted(range(9), key=lambda number: -row[number]).index(label) for row, label in zip(logits, labels, strict=True)
    ]
    loss, top1, top5, images = count_right(logits, labels).tolist()
    assert (top1, top5, images) == (ranks.count(0), sum(rank < 5 for rank in ranks), 40)
    expected = -sum(float(row.log_softmax(0)[label]) for row, label in zip(logits, labels, strict=True))
    assert loss == pytest.approx(expected, rel=1e-5)
    few = count_right(logits[:, :3], labels % 3).tolist()
    assert few[2] == few[3] == 40  # of three classes, five guesses name all


def test_scores_weigh_every_picture_alike(made: dict[str, Path], pictures: Path) -> None:
    """Batches of 7 and less say what one of 18 says; images reach the model normalised."""
    model = load(made["student"])
    _, test = loaders(pictures)
    scores = class_scores(model, test, CPU)
    images = torch.cat([batch["images"] for batch in test]).float() / 255
    labels = torch.cat([batch["labels"] for batch in test])
    with torch.no_grad():
        logits = model(normalize(model, images))
    assert scores["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    five = logits.argsort(1, descending=True)[:, :5]
    assert scores["top5"] == pytest.approx(100 * (five == labels[:, None]).any(1).double().mean().item())


def test_fidelity_is_the_meters(runs: dict[str, Path], pictures: Path) -> None:
    config = make_config(pictures, runs["student"], metrics=("fidelity",), teacher=str(runs["teacher"]), stages=2)
    (values,) = evaluate(config).values()
    student, teacher = load(runs["student"]), load(runs["teacher"])
    _, test = loaders(pictures)
    meter = FidelityMeter(18)
    with torch.no_grad():
        for batch in test:
            images = batch["images"].float() / 255
            meter.update(extract_features(student, images, stages=2), extract_features(teacher, images, stages=2))
    assert values.pop("skipped") == 0
    assert values == pytest.approx(meter.scores(), rel=1e-3)
    assert set(values) == {"agreement_stage1", "agreement_stage2", "final_cosine", "cka"}


def test_a_model_is_faithful_to_itself_and_less_to_another(runs: dict[str, Path], pictures: Path) -> None:
    config = make_config(
        pictures, runs["teacher"], runs["student"], metrics=("fidelity",), teacher=str(runs["teacher"]), stages=2
    )
    itself, other = evaluate(config).values()
    assert itself["agreement_stage1"] == pytest.approx(1, abs=1e-5)
    assert itself["agreement_stage2"] == pytest.approx(1, abs=1e-5)
    assert itself["cka"] == pytest.approx(1, abs=1e-5)
    assert itself["final_cosine"] > 0.99
    assert all(other[name] < itself[name] - 1e-3 for name in itself if name != "skipped")


def test_by_default_a_headless_model_is_measured_by_its_features(runs: dict[str, Path], pictures: Path) -> None:
    results = evaluate(
        make_config(pictures, runs["headless"], runs["student"], shots=2, draws=2, teacher=str(runs["teacher"]), stages=2)
    )
    headless, student = results.values()
    assert set(student) - set(headless) == {"top1", "top5"}
    assert {"knn", "linear_probe", "few_shot", "cka"} <= set(headless)


def test_weight_files_come_with_their_architecture(pictures: Path, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(open_labelled(str(pictures)).training.classes))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    wanted = dict(metrics=("top1",), image_size="32")
    with pytest.raises(UserError, match=r"name its architecture too: --models-arch vit_base_patch16_224$"):
        evaluate(make_config(pictures, tmp_path / "weights.pth", **wanted))
    with pytest.raises(UserError, match=r"^--models-arch a b: there are 1 weight files among the models"):
        evaluate(make_config(pictures, tmp_path / "weights.pth", models_arch=("a", "b"), **wanted))
    config = make_config(pictures, tmp_path / "weights.pth", models_arch=("vit_tiny_patch16_224",), **wanted)
    (result,) = evaluate(config).values()
    assert 0 <= result["top1"] <= 100


def test_class_folders_alone_have_nothing_to_learn_from(runs: dict[str, Path], pictures: Path) -> None:
    """All pictures are judged on, and only the head can be."""
    (values,) = evaluate(make_config(pictures / "val", runs["student"])).values()
    _, test = loaders(pictures)
    expected = class_scores(load(runs["student"]), test, CPU)
    assert values == pytest.approx({"top1": expected["top1"], "top5": expected["top5"], "skipped": 0})


def test_another_image_size_is_given_to_every_model(runs: dict[str, Path], pictures: Path) -> None:
    (values,) = evaluate(make_config(pictures, runs["student"], metrics=("top1",), image_size="16x32")).values()
    model = open_model(str(runs["student"]), field="model", img_size=(16, 32)).eval()
    _, test = loaders(pictures, (16, 32))
    assert values["top1"] == class_scores(model, test, CPU)["top1"]


def test_a_picture_that_cannot_be_read_is_not_scored(runs: dict[str, Path], tmp_path: Path) -> None:
    data = write_split(tmp_path / "data")
    file = data / "val" / "cat" / "00.png"
    break_body(file)
    config = make_config(data, runs["student"], metrics=("top1", "knn", "linear_probe"))
    (before,) = evaluate(config).values()
    assert before.pop("skipped") == 1
    file.unlink()
    (after,) = evaluate(config).values()
    assert after == before | {"skipped": 0}


# --- corruptions


def by_hand(model, source, numbers, kind: str, severity: int) -> float:
    """Accuracy on pictures spoilt one at a time."""
    pictures = CentreSet(source, numbers, SIZE)
    right = 0
    for place, number in enumerate(numbers):
        image = pictures[place]["images"][None].float() / 255
        with torch.no_grad():
            logits = model(normalize(model, corrupt(image, kind, severity, [number])))
        right += int(logits.argmax() == source.labels[number])
    return 100 * right / len(numbers)


def test_corrupted_pictures_are_the_same_for_every_model_and_batch(
    runs: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    twin = shutil.copytree(runs["student"], tmp_path / "twin")
    common = dict(metrics=("top1", "corruptions"), corruption_images=4)
    first, same, other = evaluate(make_config(pictures, runs["student"], twin, runs["teacher"], **common)).values()
    (alone,) = evaluate(make_config(pictures, runs["student"], **common, batch_size=3)).values()
    assert first == same == alone
    assert first["corruptions"] != other["corruptions"]
    assert list(first["corruptions"]) == list(KINDS)
    assert {len(row) for row in first["corruptions"].values()} == {len(SEVERITIES)}
    assert first["corruption_images"] == 4
    source, model = open_labelled(str(pictures)).validation, load(runs["teacher"])
    numbers = [0, 5, 11, 17]  # evenly spread over 18
    for kind, severity in (("gaussian_noise", 5), ("contrast", 3), ("jpeg_compression", 1)):
        expected = by_hand(model, source, numbers, kind, severity)
        assert other["corruptions"][kind][severity - 1] == pytest.approx(expected)


def test_what_is_lost_is_counted_against_the_same_clean_pictures(runs: dict[str, Path], pictures: Path) -> None:
    """With a teacher of its own row, over the teacher's loss too; the teacher has no loss over itself."""
    config = make_config(
        pictures,
        runs["student"],
        runs["teacher"],
        teacher=str(runs["teacher"]),
        metrics=("corruptions",),
        corruption_images=6,
    )
    results = evaluate(config)
    source = open_labelled(str(pictures)).validation
    drops = {}
    for name, values in results.items():
        mean = np.mean([value for row in values["corruptions"].values() for value in row])
        model, numbers = load(name), np.linspace(0, 17, 6).astype(int)
        clean = centre_loader(CentreSet(source, numbers, SIZE), batch_size=6)
        top1 = class_scores(model, clean, CPU)["top1"]
        assert values["corruption_top1"] == pytest.approx(mean)
        assert values["corruption_drop"] == pytest.approx(top1 - mean)
        assert values["corruption_relative_drop"] == pytest.approx(100 * (top1 - mean) / top1)
        drops[name] = top1 - mean
    student, teacher = (results[str(runs[name])] for name in ("student", "teacher"))
    assert drops[str(runs["teacher"])] > 0  # the pictures are such that it loses something
    expected = drops[str(runs["student"])] / drops[str(runs["teacher"])]
    assert student["corruption_drop_over_teacher"] == pytest.approx(expected)
    assert "corruption_drop_over_teacher" not in teacher


def test_a_teacher_outside_the_list_is_compared_with_and_not_reported(runs: dict[str, Path], pictures: Path) -> None:
    common = dict(metrics=("corruptions",), corruption_images=6, teacher=str(runs["teacher"]))
    both = evaluate(make_config(pictures, runs["student"], runs["teacher"], **common))
    alone = evaluate(make_config(pictures, runs["student"], **common))
    assert list(alone) == [str(runs["student"])]
    assert alone[str(runs["student"])] == both[str(runs["student"])]
    (saved,) = json.loads((runs["teacher"] / "evaluation.json").read_text())["evaluate"]
    assert saved == recorded(pictures, both[str(runs["teacher"])], teacher=str(runs["teacher"]))


def test_a_headless_model_is_read_by_a_probe_on_its_features(runs: dict[str, Path], pictures: Path) -> None:
    (values,) = evaluate(make_config(pictures, runs["headless"], metrics=("corruptions",), corruption_images=6)).values()
    train, _ = loaders(pictures)
    model = load(runs["headless"])
    probe = fit_linear_probe(*collect_features(model, train, CPU))
    source, numbers = open_labelled(str(pictures)).validation, np.linspace(0, 17, 6).astype(int)
    images = torch.stack([CentreSet(source, numbers, SIZE)[place]["images"] for place in range(6)]).float() / 255
    for kind, severity in (("brightness", 2), ("pixelate", 4)):
        spoilt = corrupt(images, kind, severity, numbers.tolist())
        with torch.no_grad():
            guesses = probe.predict(extract_features(model, spoilt).pooled.numpy())
        expected = 100 * np.mean(guesses == source.labels[numbers])
        assert values["corruptions"][kind][severity - 1] == pytest.approx(expected)


def test_the_summary_by_hand() -> None:
    found = summarise_corruptions(80.0, {"a": [70.0, 50.0], "b": [60.0, 20.0]})
    assert found == {"corruption_top1": 50.0, "corruption_drop": 30.0, "corruption_relative_drop": 37.5}
    assert summarise_corruptions(0.0, {"a": [0.0]})["corruption_relative_drop"] == 0.0


def test_accuracies_of_known_readers() -> None:
    """One that is always right, one that is right on every other picture, whatever the corruption."""
    labels = torch.tensor([2, 0, 1, 2])

    def batches():
        for part in (slice(0, 3), slice(3, 4)):
            size = len(labels[part])
            yield {"images": torch.full((size, 3, 8, 8), 128, dtype=torch.uint8), "labels": labels[part],
                   "numbers": torch.arange(4)[part]}  # fmt: skip

    calls = {"right": 0, "half": 0}

    def reader(name, answers):
        def read(images):
            start = 0 if len(images) == 3 else 3
            calls[name] += len(images)
            return answers[start : start + len(images)]

        return read

    readers = {"right": reader("right", labels), "half": reader("half", torch.tensor([2, 2, 1, 0]))}
    found = corrupted_accuracies(readers, batches(), CPU, kinds=("contrast", "fog"))
    assert found == {
        "right": {"contrast": [100.0] * 5, "fog": [100.0] * 5},
        "half": {"contrast": [50.0] * 5, "fog": [50.0] * 5},
    }
    assert calls == {"right": 4 * 2 * 5, "half": 4 * 2 * 5}


# --- what is written


def recorded(data: Path, values: dict, **settings) -> dict:
    """A record as files hold it: what the numbers depend on, and the numbers."""
    depends = dict(dataset=None, image_size=None, teacher=None, stages=4, shots=5, draws=20)
    return {"data": str(data.resolve()), **depends, **settings, **values}


def test_results_go_to_the_file_and_to_each_run(runs: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "results.json"
    before = json.loads((runs["student"] / "evaluation.json").read_text())
    results = evaluate(make_config(pictures, runs["student"], runs["headless"], metrics=("knn",), out=str(out)))
    assert json.loads(out.read_text()) == recorded(pictures, {"models": results})
    for name in ("student", "headless"):
        saved = json.loads((runs[name] / "evaluation.json").read_text())
        assert saved.pop("evaluate") == [recorded(pictures, results[str(runs[name])])]
        assert saved == (before if name == "student" else {})


def test_later_results_stand_beside_earlier_ones(runs: dict[str, Path], pictures: Path) -> None:
    run = runs["student"]
    knn = evaluate(make_config(pictures, run, metrics=("knn",)))[str(run)]
    top1 = evaluate(make_config(pictures, run, metrics=("top1",)))[str(run)]
    larger = evaluate(make_config(pictures, run, metrics=("top1",), image_size="32"))[str(run)]
    elsewhere = evaluate(make_config(pictures / "val", run, metrics=("top1",)))[str(run)]
    saved = json.loads((run / "evaluation.json").read_text())
    assert saved["evaluate"] == [
        recorded(pictures, knn | top1),
        recorded(pictures, larger, image_size="32"),
        recorded(pictures / "val", elsewhere),
    ]


def test_a_folder_that_a_model_was_trained_on_is_refused(tmp_path: Path) -> None:
    """Without val/ nobody could say which of its pictures the run has seen."""
    data = write_split(tmp_path / "data") / "train"
    run = fine_tuned(data, tmp_path / "run")
    with pytest.raises(UserError, match=r"^--models .*run: was trained on most of these pictures"):
        evaluate(make_config(data, run, metrics=("top1",)))


def test_a_head_for_other_classes_is_refused(runs: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(pictures, renamed)
    for split in ("train", "val"):
        (renamed / split / "cat").rename(renamed / split / "zebra")
    with pytest.raises(UserError, match=r"--metrics top1: .*student has classes of other names"):
        evaluate(make_config(renamed, runs["student"], metrics=("top1",)))
    (values,) = evaluate(make_config(renamed, runs["student"])).values()
    assert "knn" in values
    assert "top1" not in values


def test_a_model_outside_a_run_has_nothing_written_to_it(runs: dict[str, Path], pictures: Path) -> None:
    folder = runs["student"] / "model"
    before = sorted(path.name for path in folder.iterdir())
    (values,) = evaluate(make_config(pictures, Path(f"local-dir:{folder}"), metrics=("top1",))).values()
    assert values["top1"] == json.loads((runs["student"] / "evaluation.json").read_text())["top1"]
    assert sorted(path.name for path in folder.iterdir()) == before


# --- what is refused


@pytest.mark.parametrize(
    ("who", "values", "message"),
    [
        (("headless",), {"metrics": ("top1",)}, r"--metrics top1: .*headless has no classifier, the data 6 classes"),
        (("student", "headless"), {"metrics": ("top5",)}, r"--metrics top5: .*headless has no classifier"),
        (("student",), {"metrics": ("knn",), "part": "val"}, r"--metrics knn: needs labelled pictures to learn from"),
        (("student",), {"metrics": ("linear_probe",), "part": "val"}, r"--metrics linear_probe: needs labelled pictures"),
        (("student",), {"metrics": ("few_shot",), "part": "val"}, r"--metrics few_shot: needs labelled pictures"),
        (("student",), {"metrics": ("fidelity",)}, r"--metrics fidelity: needs a --teacher"),
        (("headless",), {"metrics": ("corruptions",), "part": "val"}, r"--metrics corruptions: .*no classifier for these 6"),
        (("headless",), {"part": "val"}, r"--data .*allows no metric for these models"),
        (("student", "student"), {}, r"--models .*names a model twice"),
        ((), {}, r"--models: name at least one"),
        (("student",), {"shots": 0}, r"--shots 0: must be at least 1"),
        (("student",), {"corruption_images": 0}, r"--corruption-images 0: must be at least 1"),
        (("student",), {"metrics": ("fidelity",), "teacher": "vit_tiny_patch16_225"}, r"--teacher vit_tiny_patch16_225: un"),
        (("student",), {"metrics": ("fidelity",), "teacher": "@teacher", "stages": 3}, r"--stages 3: must be between"),
        (("student",), {"image_size": "20"}, r"image size 20x20: must be a multiple of the patch 8x8|could not be built"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_first(runs, pictures, tmp_path, who, values, message) -> None:
    values = dict(values)
    data = pictures / values.pop("part", "")
    if values.get("teacher", "").startswith("@"):
        values["teacher"] = str(runs[values["teacher"][1:]])
    out = tmp_path / "results.json"
    with pytest.raises(UserError, match=f"^{message}"):
        evaluate(make_config(data, *(runs[name] for name in who), out=str(out), **values))
    assert not out.exists()
    assert "evaluate" not in json.loads((runs["student"] / "evaluation.json").read_text())


def test_a_teacher_is_not_probed_on_the_pictures_it_is_judged_on(runs: dict[str, Path], pictures: Path) -> None:
    config = make_config(
        pictures / "val", runs["student"], metrics=("corruptions",), teacher=str(runs["headless"]), corruption_images=2
    )
    with pytest.raises(UserError, match=r"^--metrics corruptions: .*headless has no classifier .*no train/ to fit one on"):
        evaluate(config)


def test_five_of_five_classes_say_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    data = write_split(tmp_path / "data", classes=("a", "b", "c", "d", "e"), train=2, val=1)
    run = fine_tuned(data, tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match=r"^--metrics top5: says nothing of 5 classes"):
        evaluate(make_config(data, run, metrics=("top5",)))
    (values,) = evaluate(make_config(data, run, shots=1, draws=1)).values()
    assert "top1" in values and "top5" not in values
    with pytest.raises(UserError, match=r"^--metrics top1: .* has 6 outputs, the data 5 classes"):
        evaluate(make_config(data, runs["student"], metrics=("top1",)))


def test_an_unknown_model_is_named(pictures: Path) -> None:
    with pytest.raises(UserError, match=r"^--models adventurer_tiny_patch16_22: unknown model; did you mean"):
        evaluate(make_config(pictures, Path("adventurer_tiny_patch16_22")))
