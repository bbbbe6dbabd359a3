"""The command `finetune`: what it leaves behind, from which models and data, layer decay, broken pictures, resume."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.optim import param_groups_layer_decay

from class_folders import CLASSES, break_body, write_class, write_split
from vit_linearizer.commands.distill import distill
from vit_linearizer.commands.finetune import FinetuneConfig, finetune
from vit_linearizer.contracts import LossOutput, UserError
from vit_linearizer.data.labelled import choose_labelled, open_labelled
from vit_linearizer.data.sources import ClassFolderSource, open_source
from vit_linearizer.models.loading import load
from vit_linearizer.tasks import Classification, ClassificationConfig
from vit_linearizer.training.config import OptimisationConfig, RuntimeConfig
from vit_linearizer.training.optimiser import intervals, make_optimizer, make_schedule

#: What of a line of metrics depends on the clock.
TIMES = ("_seconds", "images_per_second", "data_wait", "memory_gib")

#: 16x16 pixels in four patches, two blocks.
FROM_SCRATCH = {
    "model": "adventurer_tiny_patch16_224",
    "model_pretrained": False,
    "model_args": ("embed_dim=32", "depth=2"),
    "image_size": "16",
    "patch_size": 8,
}
FROM_WEIGHTS = {"model_pretrained": True, "model_args": (), "image_size": None, "patch_size": None}


def metrics(run: str | Path, split: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]
    return [line for line in kept if split in (None, line["split"])]


def evaluation(run: str | Path) -> dict:
    return json.loads((Path(run) / "evaluation.json").read_text())


def configuration(run: str | Path) -> dict:
    return json.loads((Path(run) / "config.json").read_text())


def skipped(run: str | Path) -> list[str]:
    """Names in skipped.txt, as often as they stand there."""
    return [line.partition("\t")[0] for line in (Path(run) / "skipped.txt").read_text().splitlines()]


def settings(data: Path | str, out: Path | str, **values) -> FinetuneConfig:
    """A run of a second; keyword arguments override."""
    common = dict(
        data=str(data), out=str(out), recipe="smoke", epochs=2, batch_size=8, device="cpu", precision="fp32", log_every=1
    )
    return FinetuneConfig(**{**common, **FROM_SCRATCH, **values})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_split(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned run that nobody changes."""
    return finetune(settings(pictures, tmp_path_factory.mktemp("run") / "run"))


def best_weights(run: Path, prefix: str = "model.") -> dict[str, torch.Tensor]:
    saved = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["model"]
    return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}


def rebuilt(run: Path):
    """The model as anybody who has timm gets it."""
    return timm.create_model(f"local-dir:{run}/model", pretrained=True).eval()


# --- what a run leaves


def test_a_run_leaves_what_the_design_promises(run: Path) -> None:
    left = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "model", "evaluation.json", "run.log"} <= left
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    train, held_out = metrics(run, "train"), metrics(run, "held_out")
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]  # 24 images in batches of 8, two epochs
    assert all({"loss", "cross_entropy", "learning_rate", "gradient_norm"} <= line.keys() for line in train)
    assert [line["step"] for line in held_out] == [0, 3, 6]
    for line in held_out:
        assert line.keys() == {"step", "stage", "split", "epoch", "loss", "top1", "top5"}
        assert 0 <= line["top1"] <= line["top5"] <= 100
        assert line["top1"] * 18 / 100 == pytest.approx(round(line["top1"] * 18 / 100))  # 18 held-out pictures
    (of_best,) = [line for line in held_out if line["step"] == evaluation(run)["step"]]
    assert evaluation(run) == {key: value for key, value in of_best.items() if key not in ("split", "epoch")}


def test_config_says_what_was_trained(run: Path, pictures: Path) -> None:
    expected = {
        "command": "finetune", "model": FROM_SCRATCH["model"], "data": str(pictures.resolve()), "images": 24, "classes": 6,
        "recipe": "smoke", "image_size": [16, 16], "patch_size": 8, "label_fraction": 1.0, "epochs": 2, "batch_size": 8,
        "label_smoothing": 0.1, "drop_path": 0.4, "augmentation": "rand", "precision": "fp32", "seed": 0,
    }  # fmt: skip
    assert expected.items() <= configuration(run).items()


def test_the_model_folder_is_the_best_classifier(run: Path) -> None:
    model, expected = rebuilt(run), best_weights(run)
    assert model.num_classes == 6
    assert tuple(model.pretrained_cfg["label_names"]) == CLASSES
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load(run)(images), model(images))
    assert "drop_path_rate" not in json.loads((run / "model" / "config.json").read_text())["model_args"]


def test_the_saved_classifier_has_the_accuracy_that_the_run_reports(run: Path, pictures: Path) -> None:
    """By hand: torchvision-free, one picture at a time, normalised as timm says."""
    model = rebuilt(run)
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    source = open_labelled(str(pictures)).validation
    right, losses = 0, []
    for index in range(len(source)):
        image = source.read(index).resize((16, 16), 3)  # bicubic
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        with torch.no_grad():
            logits = model(((pixels - mean) / std)[None])
        label = torch.tensor([source.labels[index]])
        right += int(logits.argmax(1) == label)
        losses.append(F.cross_entropy(logits, label).item())
    assert evaluation(run)["top1"] == pytest.approx(100 * right / len(source))
    assert evaluation(run)["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_dry_run_writes_nothing(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = finetune(settings(pictures, tmp_path / "run", recipe=None, dry_run=True))
    assert not out.exists()
    assert "24 to train on, 18 held out, 6 classes" in caplog.text
    assert "layer_decay 0.65" in caplog.text  # tiny takes the Small/Base column


# --- the model


def test_a_distilled_student_is_gone_on_with(small_run, pictures: Path, tmp_path: Path) -> None:
    """At a learning rate of nothing the backbone is the student still; only the head is new."""
    student = distill(small_run(recipe="smoke", epochs=None, out=str(tmp_path / "student")))
    config = settings(
        pictures, tmp_path / "run", **FROM_WEIGHTS | {"model": str(student)}, learning_rate=1e-12, weight_decay=0.0, epochs=1
    )
    tuned = finetune(config)
    before, after = rebuilt(student), rebuilt(tuned)
    assert (before.num_classes, after.num_classes, after.global_pool) == (0, 6, "avg")
    assert configuration(tuned)["image_size"] == [32, 32]
    weights = after.state_dict()
    assert set(weights) - set(before.state_dict()) == {"head.weight", "head.bias"}
    for name, value in before.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9)


def test_a_run_of_other_classes_keeps_its_backbone_and_gets_a_new_head(run: Path, tmp_path: Path) -> None:
    data = write_split(tmp_path / "pictures", classes=("no", "yes"), val=2)
    tuned = finetune(
        settings(
            data, tmp_path / "run", **FROM_WEIGHTS | {"model": str(run)}, learning_rate=1e-12, weight_decay=0.0, epochs=1
        )
    )
    model = rebuilt(tuned)
    assert model.num_classes == 2
    assert tuple(model.pretrained_cfg["label_names"]) == ("no", "yes")
    assert "top5" not in evaluation(tuned)  # of two classes the best five are always right
    for name, value in best_weights(run).items():
        if not name.startswith("head."):
            torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-9)


def test_a_run_of_the_same_classes_keeps_its_head_too(run: Path, pictures: Path, tmp_path: Path) -> None:
    tuned = finetune(
        settings(pictures, tmp_path / "run", **FROM_WEIGHTS | {"model": str(run)}, learning_rate=1e-12, weight_decay=0.0)
    )
    first = metrics(tuned, "held_out")[0]
    assert (first["top1"], first["loss"]) == pytest.approx((evaluation(run)["top1"], evaluation(run)["loss"]), rel=1e-6)


@pytest.mark.parametrize("trained", [False, True], ids=["from scratch", "from a run"])
@pytest.mark.parametrize(
    ("flags", "size", "grid"),
    [
        ({"patch_size": 4}, (16, 16), (4, 4)),
        ({"image_size": "24", "patch_size": 4}, (24, 24), (6, 6)),
        ({"image_size": "16x32", "patch_size": 8}, (16, 32), (2, 4)),
        ({"image_size": "32"}, (32, 32), (4, 4)),
    ],
    ids=str,
)
def test_other_sizes_survive_saving_and_loading(run, pictures, tmp_path, flags, size, grid, trained) -> None:
    start = FROM_WEIGHTS | {"model": str(run)} if trained else {}
    tuned = finetune(settings(pictures, tmp_path / "run", **start | flags, epochs=1))
    model = rebuilt(tuned)
    assert tuple(model.patch_embed.img_size) == size
    assert tuple(model.patch_embed.grid_size) == grid
    expected = best_weights(tuned)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(load(tuned)(images), model(images))
    again = finetune(settings(pictures, tmp_path / "again", **FROM_WEIGHTS | {"model": str(tuned)}, epochs=1))
    assert tuple(rebuilt(again).patch_embed.grid_size) == grid


def test_other_patches_of_trained_weights_are_resampled_not_drawn(run: Path, pictures: Path, tmp_path: Path) -> None:
    """A flat picture looks alike through a resampled patch: its embedding stays what it was."""
    model = rebuilt(run)
    tuned = finetune(
        settings(
            pictures,
            tmp_path / "run",
            **FROM_WEIGHTS | {"model": str(run), "image_size": "32", "patch_size": 16},
            learning_rate=1e-12,
            weight_decay=0.0,
            epochs=1,
        )
    )
    flat = torch.tensor([0.3, -0.4, 0.9]).view(1, 3, 1, 1)
    with torch.no_grad():
        before = model.patch_embed(flat.expand(1, 3, 16, 16))[0, 0]
        after = rebuilt(tuned).patch_embed(flat.expand(1, 3, 32, 32))[0, 0]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_head_reads_what_it_is_told_to(run: Path, pictures: Path, tmp_path: Path, pool: str) -> None:
    tuned = finetune(settings(pictures, tmp_path / "run", **FROM_WEIGHTS | {"model": str(run)}, global_pool=pool, epochs=1))
    model = rebuilt(tuned)
    assert model.global_pool == pool
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        tokens = model.forward_features(images)
        read = tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1)
        torch.testing.assert_close(model(images), model.head(read), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "adventurer_tiny_patch16_223"}, r"^--model adventurer_tiny_patch16_223: unknown model"),
        ({"model": "resnet18", "model_args": ()}, r"^--model resnet18: is not a plain backbone"),
        ({"recipe": "finetune_tiny"}, r"^--recipe finetune_tiny: unknown recipe; .*did you mean finetune_"),
        ({"patch_size": 5}, r"^--patch-size 5: does not divide the image size 16x16; try that at 15x15"),
        ({"patch_size": 0}, r"^--patch-size 0: must be at least 1"),
        ({"image_size": "20"}, r"^--patch-size 8: does not divide the image size 20x20; try that at 16x16"),
        ({"label_fraction": 0.0}, r"^--label-fraction 0\.0: must be in \(0, 1\]"),
        ({"label_fraction": 1.5}, r"^--label-fraction 1\.5: must be in \(0, 1\]"),
        ({"label_smoothing": 1.0}, r"^--label-smoothing 1\.0: must be in \[0, 1\)"),
        ({"layer_decay": 0.0}, r"^--layer-decay 0\.0: must be in \(0, 1\]"),
        ({"layer_decay": 1.1}, r"^--layer-decay 1\.1: must be in \(0, 1\]"),
        ({"epochs": 0}, r"^--epochs 0: must be above 0"),
        ({"gradient_accumulation": 3}, r"^--batch-size 8: must be a multiple of .* try 6"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(pictures, tmp_path, values, message) -> None:
    with pytest.raises(UserError, match=message):
        finetune(settings(pictures, tmp_path / "run", **values))
    assert not (tmp_path / "run").exists()


def test_flags_reach_model_views_and_loop(pictures, tmp_path, monkeypatch) -> None:
    """Drop path rises in a line to the last block."""
    seen = {}

    class EnoughError(Exception):
        pass

    def train(stages, data, *_args):
        seen.update(task=stages[0].task, data=data, optimisation=stages[0].optimisation)
        raise EnoughError

    monkeypatch.setattr("vit_linearizer.commands.finetune.train", train)
    flags = dict(drop_path=0.3, layer_decay=0.5, weight_decay=0.2, clip_norm=1.0, label_smoothing=0.05, repeats=2)
    shape = dict(model_args=("embed_dim=32", "depth=4"), smallest_crop=0.5, horizontal_flip=0.25, augmentation="crop")
    with pytest.raises(EnoughError):
        finetune(settings(pictures, tmp_path / "run", **flags, **shape))
    drops = [layer.drop_path.drop_prob for layer in seen["task"].model.layers if hasattr(layer.drop_path, "drop_prob")]
    assert drops == pytest.approx([0.1, 0.2, 0.3])  # none in the first
    optimisation = seen["optimisation"]
    assert (optimisation.layer_decay, optimisation.weight_decay, optimisation.clip_norm) == (0.5, 0.2, 1.0)
    assert seen["task"].config.label_smoothing == 0.05
    assert seen["data"].repeats == 2
    crop, flip = seen["data"].training.view.transform.transforms[:2]
    assert (crop.scale, flip.p) == ((0.5, 1.0), 0.25)


# --- the loss


def small_classifier(kind: str, classes: int = 5):
    torch.manual_seed(0)
    shape = dict(img_size=16, patch_size=8, embed_dim=32, depth=3, num_classes=classes)
    if kind == "vit":
        return timm.create_model("vit_tiny_patch16_224", **shape, num_heads=2)
    return timm.create_model("adventurer_tiny_patch16_224", **shape)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_the_loss_is_smoothed_cross_entropy_on_normalised_images(smoothing: float) -> None:
    model = small_classifier("vit")
    task = Classification(model, ClassificationConfig(label_smoothing=smoothing))
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 4, 2, 2])
    output = task({"images": images, "labels": labels})
    assert isinstance(output, LossOutput) and not output.terms["cross_entropy"].requires_grad
    logs = model((images - 0.5) / 0.5).log_softmax(1)  # this model's own mean and deviation
    expected = -((1 - smoothing) * logs[range(4), labels] + smoothing * logs.mean(1)).mean()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.terms["cross_entropy"], output.loss.detach())


# --- layer decay


def scales(task: Classification, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Factor on the learning rate and weight decay of each parameter of the model."""
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("kind", ["adventurer", "vit"])
def test_layer_decay_falls_from_the_head_to_the_patches(kind: str) -> None:
    """Three blocks: 1 for the head, then one factor of a half for each block, and one more for what stands before them."""
    task = Classification(small_classifier(kind), ClassificationConfig())
    recipe = OptimisationConfig(epochs=1, batch_size=4, learning_rate=1.0, minimum_learning_rate=0.0, layer_decay=0.5)
    found = scales(task, make_optimizer(task, recipe))
    assert found.keys() == dict(task.model.named_parameters()).keys()
    blocks = "layers" if kind == "adventurer" else "blocks"
    expected = {"head": 1.0, f"{blocks}.2": 0.5, f"{blocks}.1": 0.25, f"{blocks}.0": 0.125, "patch_embed": 0.0625}
    expected |= {"cls_token": 0.0625, "pos_embed": 0.0625}
    for name, (scale, _) in found.items():
        for prefix, value in expected.items():
            if name == prefix or name.startswith(prefix + "."):
                assert scale == pytest.approx(value), name
    spared = {"cls_token", "pos_embed"} | {name for name in found if name.endswith(("A_log", "mixer.D", "dt_bias"))}
    spared |= {name for name, value in task.model.named_parameters() if value.ndim == 1}  # norms and biases
    assert {name for name, (_, decay) in found.items() if decay == 0} == spared
    assert (len([name for name in spared if "mixer" in name]) > 0) == (kind == "adventurer")


@pytest.mark.parametrize("kind", ["adventurer", "vit"])
def test_layer_decay_is_timms_for_the_bare_model(kind: str) -> None:
    model = small_classifier(kind)
    task = Classification(model, ClassificationConfig())
    recipe = OptimisationConfig(epochs=1, batch_size=4, learning_rate=1.0, minimum_learning_rate=0.0, layer_decay=0.65)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(
        model, weight_decay=recipe.weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.65
    )
    expected = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert scales(task, make_optimizer(task, recipe)) == expected


def test_a_step_moves_each_layer_at_its_own_rate() -> None:
    """AdamW's first step is the learning rate in size, wherever the gradient is not nothing."""
    task = Classification(small_classifier("vit"), ClassificationConfig())
    recipe = OptimisationConfig(
        epochs=10, batch_size=4, learning_rate=1e-3, minimum_learning_rate=1e-4, weight_decay=0.0, layer_decay=0.5,
        warmup_epochs=2, warmup_share=0.5,
    )  # fmt: skip
    optimizer = make_optimizer(task, recipe)
    schedule = make_schedule(optimizer, recipe, images=8)  # two steps an epoch, four of warm-up
    schedule.step_update(2)  # half-way up
    before = {name: value.detach().clone() for name, value in task.model.named_parameters()}
    task({"images": torch.rand(4, 3, 16, 16), "labels": torch.arange(4)}).loss.backward()
    optimizer.step()
    halfway = (1e-3 + 1e-4) / 2
    for name, factor in (("head.weight", 1.0), ("blocks.2.mlp.fc2.weight", 0.5), ("blocks.0.mlp.fc1.weight", 0.125),
                         ("patch_embed.proj.weight", 0.0625)):  # fmt: skip
        moved = (dict(task.model.named_parameters())[name].detach() - before[name]).abs()
        assert moved.median().item() == pytest.approx(halfway * factor, rel=0.02), name


def test_a_run_trains_with_layer_decay(pictures: Path, tmp_path: Path) -> None:
    tuned = finetune(settings(pictures, tmp_path / "run", layer_decay=0.5, epochs=1))
    saved = torch.load(tuned / "checkpoints" / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in saved} == {1.0, 0.5, 0.25, 0.125}  # two blocks
    rate = metrics(tuned, "train")[-1]["learning_rate"]
    for group in saved:
        assert group["lr"] == pytest.approx(rate * group["lr_scale"])


# --- labels


def test_a_share_of_every_class_is_chosen_by_the_seed() -> None:
    labels = np.repeat([3, 0, 7], [40, 10, 1])
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    chosen = choose_labelled(labels, 0.2, seed=5)
    assert Counter(labels[chosen].tolist()) == {3: 8, 0: 2, 7: 1}
    assert sorted(set(chosen)) == chosen.tolist()
    assert np.array_equal(chosen, choose_labelled(labels, 0.2, seed=5))
    assert not np.array_equal(chosen, choose_labelled(labels, 0.2, seed=6))
    assert Counter(labels[choose_labelled(labels, 1e-6, seed=0)].tolist()) == {3: 1, 0: 1, 7: 1}
    assert np.array_equal(choose_labelled(labels, 1.0, seed=0), np.arange(len(labels)))


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(UserError, match=r"^--label-fraction .*must be in \(0, 1\]"):
        choose_labelled([0, 1], fraction, seed=0)


def test_a_run_on_a_share_of_the_labels_is_judged_on_all_held_out_pictures(pictures: Path, tmp_path: Path, caplog) -> None:
    tuned = finetune(settings(pictures, tmp_path / "run", label_fraction=0.25, batch_size=6, epochs=1))
    assert configuration(tuned)["images"] == 6  # one of each class
    assert "on 6 images of 6 classes (18 held out)" in caplog.text
    assert len(metrics(tuned, "train")) == 1


# --- folders


def test_two_splits_of_class_folders(pictures: Path) -> None:
    data = open_labelled(str(pictures))
    assert data.classes == CLASSES
    assert Counter(data.training.labels.tolist()) == dict.fromkeys(range(6), 4)
    assert Counter(data.validation.labels.tolist()) == dict.fromkeys(range(6), 3)
    for source in (data.training, data.validation):
        assert all(f"/{CLASSES[label]}/" in f"/{source.name(index)}" for index, label in enumerate(source.labels))


def test_a_twentieth_of_class_folders_alone_is_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate(CLASSES):
        write_class(tmp_path / "data" / name, number, 10)
    tuned = finetune(settings(tmp_path / "data", tmp_path / "run", epochs=1, batch_size=19))
    assert "on 57 images of 6 classes (3 held out)" in caplog.text
    assert len(metrics(tuned, "train")) == 3


def test_pictures_lie_at_any_depth_below_their_class(tmp_path: Path) -> None:
    write_class(tmp_path / "b" / "deep" / "a", 0, 2)
    write_class(tmp_path / "a", 1, 1)
    source = ClassFolderSource(tmp_path)
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [0, 1, 1]


def test_a_class_without_validation_pictures_is_a_class_still(tmp_path: Path) -> None:
    write_split(tmp_path, classes=("a", "b", "c"), val=2)
    for file in (tmp_path / "val" / "b").iterdir():
        file.unlink()
    data = open_labelled(str(tmp_path))
    assert data.classes == ("a", "b", "c")
    assert data.validation.labels.tolist() == [0, 0, 2, 2]


def test_a_class_folder_without_pictures_is_no_class(tmp_path: Path) -> None:
    write_split(tmp_path, classes=("a", "b"))
    (tmp_path / "train" / "aa").mkdir()
    (tmp_path / "train" / "zz").mkdir()
    (tmp_path / "train" / "zz" / "notes.txt").write_text("none yet")
    assert open_labelled(str(tmp_path)).classes == ("a", "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unknown", r"val/other: is no class folder of the training images \(6 classes, ant, bee, cat, \.\.\.\)"),
        ("no val", r"holds train/ but no val/"),
        ("no train", r"holds val/ but no train/"),
        ("loose alone", r"train: holds no class folders with images"),
        ("nowhere", r"no such folder"),
    ],
)
def test_folders_that_cannot_be_are_named(tmp_path: Path, change: str, message: str) -> None:
    write_split(tmp_path / "data", train=1, val=1)
    match change:
        case "unknown":
            write_class(tmp_path / "data" / "val" / "other", 0, 1)
        case "no val" | "no train":
            (tmp_path / "data" / change.removeprefix("no ")).rename(tmp_path / "elsewhere")
        case "loose alone":
            for file in sorted((tmp_path / "data" / "train").rglob("*.png")):
                file.rename(tmp_path / "data" / "train" / f"{file.parent.name}.png")
        case "nowhere":
            (tmp_path / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"^--data .*{message}"):
        finetune(settings(tmp_path / "data", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_labels_of_distill_are_those_of_the_folders(photos: Path) -> None:
    assert open_source(str(photos), "none").labels is None
    source = open_source(str(photos), "folder")
    assert source.classes == ("a", "b")
    assert [source.name(index)[0] for index in range(len(source))] == ["ab"[label] for label in source.labels]


def test_distill_with_labels_scores_neighbours_and_trains_the_same(small_run, tmp_path: Path) -> None:
    plain = distill(small_run(epochs=1, out=str(tmp_path / "plain")))
    labelled = distill(small_run(epochs=1, out=str(tmp_path / "labelled"), labels="folder"))
    lines = metrics(labelled)
    extra = [line.pop("knn") for line in lines if line["split"] == "held_out"]
    assert lines == metrics(plain)
    assert len(extra) == 2 and all(0 <= value <= 100 for value in extra)


# --- pictures that cannot be used


def test_loose_pictures_are_listed_and_not_used(tmp_path: Path) -> None:
    data = write_split(tmp_path / "data", train=2, val=1)
    for part in ("train", "val"):  # of the same name, and both of them
        write_class(data / part, 0, 1)
    tuned = finetune(settings(data, tmp_path / "run", epochs=1))
    assert configuration(tuned)["images"] == 12
    assert skipped(tuned) == ["train/00.png", "val/00.png"]


def test_a_broken_training_picture_is_replaced_and_listed(tmp_path: Path) -> None:
    data = write_split(tmp_path / "data", train=2, val=1)
    break_body(data / "train" / "cat" / "00.png")
    tuned = finetune(settings(data, tmp_path / "run", epochs=1))
    assert skipped(tuned) == ["train/cat/00.png"]
    assert configuration(tuned)["images"] == 12
    assert len(metrics(tuned, "train")) == 2  # all the same a batch is full


def test_a_broken_held_out_picture_counts_in_no_score(tmp_path: Path) -> None:
    """The run judges as if the file was not there."""
    data = write_split(tmp_path / "data", val=2)
    file = data / "val" / "cat" / "00.png"
    break_body(file)
    with_it = finetune(settings(data, tmp_path / "with"))
    file.unlink()
    without = finetune(settings(data, tmp_path / "without"))
    assert skipped(with_it) == ["val/cat/00.png"]
    assert not (without / "skipped.txt").exists()
    assert metrics(with_it) == metrics(without)


def test_no_readable_held_out_picture_ends_the_run_in_words(tmp_path: Path) -> None:
    data = write_split(tmp_path / "data", val=1)
    for file in sorted((data / "val").rglob("*.png")):
        break_body(file)
    with pytest.raises(UserError, match=r"^--data held-out images: none of them can be read"):
        finetune(settings(data, tmp_path / "run"))


# --- the loop


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the process asked to stop (SIGTERM, as batch systems do) during a training step."""
    honest, calls = Classification.forward, []

    def forward(self, batch):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, batch)

    monkeypatch.setattr(Classification, "forward", forward)


@pytest.mark.parametrize("step", [2, 3, 5])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(pictures, tmp_path, monkeypatch, caplog, step) -> None:
    flags = dict(drop_path=0.3, layer_decay=0.6, warmup_epochs=1.0, epochs=3, batch_size=12)
    whole = finetune(settings(pictures, tmp_path / "whole", **flags))
    parts = settings(pictures, tmp_path / "parts", **flags)
    with monkeypatch.context() as patch:
        interrupted_at(step, patch)
        with pytest.raises(KeyboardInterrupt):
            finetune(parts)
    assert metrics(parts.out, "train")[-1]["step"] == step
    finetune(parts)
    assert f"resumed at step {step} of 6" in caplog.text
    assert metrics(parts.out) == metrics(whole)
    assert evaluation(parts.out) == evaluation(whole)
    saved, expected = (torch.load(Path(run) / "checkpoints" / "last.pt", weights_only=True) for run in (parts.out, whole))
    assert all(torch.equal(saved["model"][name], value) for name, value in expected["model"].items())
    assert (Path(parts.out) / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 2e-3}, r"learning_rate \(0\.001 there, 0\.002 here\)"),
        ({"label_fraction": 0.5}, r"label_fraction \(1\.0 there, 0\.5 here\)"),
        ({"global_pool": "avg"}, r"global_pool \(None there, avg here\)"),
        ({"label_smoothing": 0.0}, r"label_smoothing"),
        ({"layer_decay": 0.9}, r"layer_decay"),
        ({"seed": 1}, r"seed"),
    ],
    ids=str,
)
def test_another_configuration_in_the_same_folder_is_refused(run: Path, pictures: Path, change: dict, named: str) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=rf"^--out .*holds a run of another configuration: .*{named}"):
        finetune(settings(pictures, run, **change))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_left_as_it_is(run: Path, pictures: Path) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    finetune(settings(pictures, run))
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("top1", "best"), [((90, 50, 70, 70, 60), 3), ((0, 10, 5, 5, 5), 1), ((0, 20, 20, 20, 20), 4), ((99, 1, 2, 3, 4), 4)]
)
def test_the_best_weights_are_those_of_the_highest_top1(pictures, tmp_path, monkeypatch, top1, best) -> None:
    """Of equals the later ones; never the untrained ones. The loss, which falls throughout here, has no say."""
    told, states = iter(top1), []

    def evaluate(self, held_out, bank, device):
        states.append({name: value.clone() for name, value in self.model.state_dict().items()})
        return {"loss": 1.0 / len(states), "top1": float(next(told))}

    monkeypatch.setattr(Classification, "evaluate", evaluate)
    tuned = finetune(settings(pictures, tmp_path / "run", epochs=4, batch_size=24))
    stage = {"step": best, "stage": "fine-tuning"}
    assert evaluation(tuned) == {**stage, "loss": 1.0 / (best + 1), "top1": float(top1[best])}
    weights = rebuilt(tuned).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in states[best].items())
    last = torch.load(tuned / "checkpoints" / "last.pt", weights_only=True)["progress"]
    assert (last["step"], last["best_step"], last["best_score"]) == (4, best, -top1[best])


def test_a_score_that_is_not_finite_stops_the_run(pictures, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Classification, "evaluate", lambda *_: {"loss": 1.0, "top1": float("nan")})
    with pytest.raises(UserError, match=r"nan at step 0: not finite"):
        finetune(settings(pictures, tmp_path / "run"))


def test_evaluations_come_every_so_many_epochs(pictures: Path, tmp_path: Path) -> None:
    tuned = finetune(settings(pictures, tmp_path / "run", epochs=5, batch_size=24, evaluate_every=2))
    assert [line["step"] for line in metrics(tuned, "held_out")] == [0, 2, 4, 5]


@pytest.mark.parametrize(
    ("length", "every", "expected"),
    [
        ({"epochs": 3}, None, (4, 4)),  # 30 images in batches of 8
        ({"epochs": 3}, 2, (8, 4)),
        ({"iterations": 160_000}, None, (16_000, 16_000)),
        ({"iterations": 7}, None, (1, 1)),
        ({"iterations": 25}, None, (3, 3)),
        ({"iterations": 160_000}, 500, (500, 500)),
    ],
    ids=str,
)
def test_how_often_a_run_evaluates_and_saves(length: dict, every: int | None, expected: tuple[int, int]) -> None:
    recipe = OptimisationConfig(**length, batch_size=8, learning_rate=1.0, minimum_learning_rate=0.0)
    assert intervals(recipe, RuntimeConfig(evaluate_every=every), images=30) == expected


@pytest.mark.parametrize("length", [{}, {"epochs": 1, "iterations": 1}], ids=str)
def test_a_run_is_counted_in_epochs_or_iterations(length: dict) -> None:
    with pytest.raises(ValueError, match="either epochs or iterations"):
        OptimisationConfig(**length, batch_size=1, learning_rate=1.0, minimum_learning_rate=0.0)


def test_the_loss_falls_and_the_classes_are_learnt(tmp_path: Path) -> None:
    data = write_split(tmp_path / "data", train=8, noise=20.0)
    config = settings(
        data, tmp_path / "run", epochs=12, batch_size=12, learning_rate=5e-3, layer_decay=1.0, drop_path=0.0,
        augmentation="none", evaluate_every=12,
    )  # fmt: skip
    tuned = finetune(config)
    first, last = metrics(tuned, "held_out")
    assert last["top1"] >= 90 > first["top1"]
    assert last["loss"] < first["loss"]


def command(config: FinetuneConfig) -> list[str]:
    """A configuration as the command line that gives it."""
    arguments = ["finetune"]
    defaults = {field.name: field.default for field in fields(config)}
    for name, value in vars(config).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and value != defaults[name]:
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value != defaults[name]:
            arguments += [f"--{flag}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return arguments


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Losses, and scores of held-out pictures that the two share: an odd number of them, one that cannot be read."""
    data = write_split(tmp_path / "data", val=2)
    (data / "val" / "fox" / "01.png").unlink()
    break_body(data / "val" / "bee" / "00.png")
    flags = dict(drop_path=0.0, epochs=2, batch_size=12)
    one = finetune(settings(data, tmp_path / "one", **flags))
    config = settings(data, tmp_path / "two", **flags)
    script = tmp_path / "started.py"
    script.write_text(
        "import pathlib, sys, torch.distributed as dist\n"
        "from vit_linearizer.cli import main\n"
        "code = main()\n"
        "pathlib.Path(__file__).with_name(f'process-{dist.get_rank()}-of-{dist.get_world_size()}').touch()\n"
        "sys.exit(code)\n"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    done = subprocess.run([sys.executable, *launcher, *command(config)], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(file.name for file in tmp_path.glob("process-*")) == ["process-0-of-2", "process-1-of-2"]
    for lines in zip(metrics(config.out), metrics(one), strict=True):
        for name in ("step", "split", "top1", "top5"):
            assert lines[0].get(name) == pytest.approx(lines[1].get(name))
        torch.testing.assert_close(lines[0]["loss"], lines[1]["loss"], rtol=5e-5, atol=0)
    assert skipped(config.out) == skipped(one) == ["val/bee/00.png"]


def test_the_log_says_what_was_trained_on(run: Path) -> None:
    text = (run / "run.log").read_text()
    assert "on 24 images of 6 classes (18 held out)" in text
    assert f"classifier: {run / 'model'}" in text
