"""The command `segment`: three layouts and the built-in shapes, its loss, its schedule, layer decay, resume, refusals."""

import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.optim import param_groups_layer_decay

from segmentation_folders import write_ade20k, write_cityscapes, write_folder
from vit_linearizer.commands.evaluate import EvaluateConfig, evaluate
from vit_linearizer.commands.segment import SegmentConfig, segment
from vit_linearizer.contracts import UserError
from vit_linearizer.data.segmentation import evaluation_view, open_segmentation
from vit_linearizer.evaluation.segmentation import ConfusionMatrix, predict_logits
from vit_linearizer.models.segmenter import Segmenter
from vit_linearizer.models.segmenter_folder import load_segmenter
from vit_linearizer.tasks import Segmentation, SegmentationConfig
from vit_linearizer.training.config import OptimisationConfig
from vit_linearizer.training.optimiser import make_optimizer, make_schedule

TIMES = ("_seconds", "images_per_second", "data_wait", "memory_gib")


def metrics(run: str | Path, split: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if not key.endswith(TIMES)} for line in lines]
    return [line for line in kept if split in (None, line["split"])]


def evaluation(run: str | Path) -> dict:
    return json.loads((Path(run) / "evaluation.json").read_text())


def configuration(run: str | Path) -> dict:
    return json.loads((Path(run) / "config.json").read_text())


def settings(data: Path | str, out: Path | str, **values) -> SegmentConfig:
    """A run of a second on crops of 16x16 pixels; keyword arguments override."""
    common = dict(
        model="adventurer_tiny_patch16_224", model_pretrained=False, model_args=("embed_dim=32", "depth=4"), data=str(data),
        dataset="folder", out=str(out), recipe="smoke", crop="16", patch_size=8, device="cpu", precision="fp32", log_every=1,
    )  # fmt: skip
    return SegmentConfig(**{**common, **values})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures"), size=(24, 32))


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody changes."""
    return segment(settings(pictures, tmp_path_factory.mktemp("run") / "run"))


# --- what a run leaves


def test_a_run_leaves_what_the_design_promises(run: Path) -> None:
    left = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "model", "evaluation.json", "run.log"} <= left
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.pt", "best.pt"}
    train, held_out = metrics(run, "train"), metrics(run, "held_out")
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    assert [line["step"] for line in held_out] == [0, 1, 2, 3, 4]
    for line in held_out:
        assert line.keys() == {
            "step", "stage", "split", "epoch", "miou", "pixel_accuracy", "mean_accuracy", "images", "skipped",
        }  # fmt: skip  # numbers alone
        assert (line["images"], line["skipped"]) == (4, 0)
    found = evaluation(run)
    assert found["iou"].keys() == {"ground", "disc", "box"}
    assert found["miou"] == pytest.approx(np.mean([value for value in found["iou"].values() if value is not None]))
    assert found["miou"] == max(line["miou"] for line in held_out[1:])
    (of_best,) = [line for line in held_out if line["step"] == found["step"]]
    assert of_best.items() - {"split": "held_out", "epoch": of_best["epoch"]}.items() <= {
        (key, value) for key, value in found.items() if key != "iou"
    }


def test_the_saved_segmenter_has_the_score_that_the_run_reports(run: Path, pictures: Path) -> None:
    """By hand: each picture alone, its logits brought to the mask's size at once."""
    segmenter, info = load_segmenter(run)
    assert info.classes == ("ground", "disc", "box")
    assert info.extra == {"crop": [16, 16], "resize": None, "mode": "whole", "stride": None}
    source = open_segmentation(str(pictures), "folder", "val")
    assert [list(colour) for colour in info.palette] == source.palette.tolist()
    counts = ConfusionMatrix(3)
    for index in range(len(source)):
        image, mask = source.read(index)
        pixels = evaluation_view(image, (16, 16), None)[None].float() / 255
        with torch.no_grad():
            logits = F.interpolate(segmenter(pixels).logits, size=mask.shape, mode="bilinear", align_corners=False)
        counts.update(logits[0].argmax(0), torch.from_numpy(mask))
    scores = counts.scores()
    found = evaluation(run)
    assert found["miou"] == pytest.approx(scores["miou"], abs=0.05)
    assert list(found["iou"].values()) == pytest.approx(scores["iou"], abs=0.1)


def test_the_segmenter_is_that_of_the_best_checkpoint(run: Path) -> None:
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["model"]
    state = load_segmenter(run)[0].state_dict()
    assert {f"segmenter.{name}" for name in state} == best.keys()
    assert all(torch.equal(value, best[f"segmenter.{name}"]) for name, value in state.items())
    backbone = timm.create_model(f"local-dir:{run}/model", pretrained=True)
    assert tuple(backbone.patch_embed.grid_size) == (2, 2)
    assert all(torch.equal(value, state[f"backbone.{name}"]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "write", "classes", "noted"),
    [
        ("folder", write_folder, 3, {"crop": [16, 16], "resize": None, "mode": "whole", "stride": None}),
        ("ade20k", write_ade20k, 150, {"crop": [16, 16], "resize": None, "mode": "sliding", "stride": [8, 16]}),
        ("cityscapes", write_cityscapes, 19, {"crop": [16, 16], "resize": [512, 1024], "mode": "whole", "stride": None}),
    ],
)
def test_every_kind_of_data(tmp_path: Path, kind: str, write, classes: int, noted: dict) -> None:
    write(tmp_path / "data", pictures=2, size=(24, 32))
    flags = {"mode": noted["mode"], "stride": "8x16" if noted["stride"] else None}
    if kind == "cityscapes":  # resized to 512x1024, whatever the crop
        flags["patch_size"] = 16
    made = segment(settings(tmp_path / "data", tmp_path / "run", dataset=kind, iterations=1, **flags))
    segmenter, info = load_segmenter(made)
    assert (segmenter.num_classes, len(info.classes)) == (classes, classes)
    assert info.extra == noted
    found = evaluation(made)
    assert len(found["iou"]) == classes and found["images"] == 2
    assert configuration(made)["images"] == 2
    drawn = [name for name, value in found["iou"].items() if value is not None]
    expected = {"folder": {"ground"}, "ade20k": {"wall"}, "cityscapes": {"road"}}[kind]
    assert expected <= set(drawn)


def test_builtin_shapes_need_no_files(tmp_path: Path) -> None:
    made = segment(settings("builtin:shapes", tmp_path / "run", iterations=1, crop="24"))
    source = open_segmentation("builtin:shapes", "folder", "val")
    assert evaluation(made)["iou"].keys() == set(source.classes)
    assert evaluation(made)["images"] == len(source)
    assert configuration(made)["data"] == "builtin:shapes"


def test_evaluate_says_what_the_run_said(pictures: Path, tmp_path: Path) -> None:
    made = segment(settings(pictures, tmp_path / "run", mode="sliding", stride="8"))
    before = evaluation(made)
    (values,) = evaluate(EvaluateConfig(models=(str(made),), data=str(pictures), dataset="folder", device="cpu")).values()
    found, expected = dict(values), {key: value for key, value in before.items() if key not in ("step", "stage")}
    assert found.pop("iou") == pytest.approx(expected.pop("iou"))
    assert found == pytest.approx(expected)
    (record,) = evaluation(made).pop("evaluate")
    assert record["data"] == str(pictures.resolve())
    assert {key: record[key] for key in values} == values


def test_a_dry_run_writes_nothing(pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = segment(settings(pictures, tmp_path / "run", recipe=None, dry_run=True))
    assert not out.exists()
    assert "head linear, crop 16x16" in caplog.text
    assert "4 to train on, 4 held out, 3 classes" in caplog.text
    assert "2000 of 4 images" in caplog.text  # the recipe of the data set, with a batch that fits


# --- the loss


def small_segmenter(head: str = "linear", kind: str = "adventurer", width: int = 16) -> Segmenter:
    torch.manual_seed(0)
    shape = dict(img_size=16, patch_size=8, embed_dim=32, depth=4, num_classes=0, dynamic_img_size=True)
    name = f"{kind}_tiny_patch16_224"
    backbone = timm.create_model(name, **shape, **({"num_heads": 2} if kind == "vit" else {}))
    return Segmenter(backbone, num_classes=3, head=head, head_width=width)


def task_of(segmenter: Segmenter, **values) -> Segmentation:
    config = SegmentationConfig(head=segmenter.head, crop=(16, 16), **values)
    palette = np.zeros((3, 3), dtype=np.uint8)
    return Segmentation(segmenter, config, classes=("a", "b", "c"), palette=palette, noted={})


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randint(3, (2, 16, 16), generator=generator, dtype=torch.uint8)
    masks[0, :5] = 255
    return {"images": torch.rand(2, 3, 16, 16, generator=generator), "masks": masks}


def test_the_loss_is_the_sum_over_labelled_pixels_over_all() -> None:
    task, given = task_of(small_segmenter().eval()), batch()
    output = task(given)
    with torch.no_grad():
        logs = task.segmenter(given["images"]).logits.log_softmax(1)
    kept = [(b, y, x) for b in range(2) for y in range(16) for x in range(16) if given["masks"][b, y, x] != 255]
    expected = -np.sum([logs[b, int(given["masks"][b, y, x]), y, x].item() for b, y, x in kept]) / (2 * 16 * 16)
    assert len(kept) < 2 * 16 * 16
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.terms.keys() == {"cross_entropy"}


def test_what_is_ignored_has_no_part_in_the_gradient() -> None:
    """The same as if the logits of those pixels were anything."""
    task, given = task_of(small_segmenter().eval()), batch()
    honest = task.segmenter.forward
    kept = {}

    def forward(images):
        output = honest(images)
        kept["logits"] = output.logits
        output.logits.retain_grad()
        return output

    task.segmenter.forward = forward
    task(given).loss.backward()
    ignored = (given["masks"] == 255)[:, None].expand(-1, 3, -1, -1)
    assert not kept["logits"].grad[ignored].any()
    assert kept["logits"].grad[~ignored].abs().min() > 0


def test_nothing_but_ignored_pixels_is_a_loss_of_nothing() -> None:
    task, given = task_of(small_segmenter("upernet")), batch()
    output = task({**given, "masks": torch.full_like(given["masks"], 255)})
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in task.parameters() if p.grad is not None)


@pytest.mark.parametrize("weight", [0.0, 0.4, 2.0])
def test_the_auxiliary_head_counts_by_its_weight(weight: float) -> None:
    task = task_of(small_segmenter("upernet"), auxiliary_weight=weight)
    output = task(batch())
    assert output.terms.keys() == {"cross_entropy", "auxiliary_cross_entropy"}
    assert output.terms["auxiliary_cross_entropy"] > 0
    expected = output.terms["cross_entropy"] + weight * output.terms["auxiliary_cross_entropy"]
    torch.testing.assert_close(output.loss.detach(), expected)


def test_a_run_with_upernet_trains_both_heads(pictures: Path, tmp_path: Path) -> None:
    made = segment(settings(pictures, tmp_path / "run", head="upernet", head_width=16, iterations=2))
    line = metrics(made, "train")[-1]
    assert line["loss"] == pytest.approx(line["cross_entropy"] + 0.4 * line["auxiliary_cross_entropy"], rel=1e-5)
    segmenter, info = load_segmenter(made)
    assert (info.head, info.head_width) == ("upernet", 16)
    assert segmenter.auxiliary is not None


# --- layer decay


@pytest.mark.parametrize("kind", ["adventurer", "vit"])
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_layer_decay_leaves_the_head_alone_and_is_timms_below_it(kind: str, head: str) -> None:
    """The head takes the place of the classifier: 1, then a half from block to block, down to the patches."""
    task = task_of(small_segmenter(head, kind))
    recipe = OptimisationConfig(
        iterations=4, batch_size=2, learning_rate=1.0, minimum_learning_rate=0.0, schedule="poly", layer_decay=0.5
    )
    names = {id(parameter): name for name, parameter in task.segmenter.named_parameters()}
    groups = make_optimizer(task, recipe).param_groups
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == {name for name, p in task.segmenter.named_parameters() if p.requires_grad}
    blocks = "layers" if kind == "adventurer" else "blocks"
    for name, (scale, decay) in found.items():
        if not name.startswith("backbone."):
            assert scale == 1.0, name
            assert (decay == 0) == (task.segmenter.get_parameter(name).ndim == 1), name
        elif place := re.match(rf"backbone\.{blocks}\.(\d)\.", name):
            assert scale == pytest.approx(0.5 ** (4 - int(place[1]))), name
        else:  # patches and positions
            assert scale == pytest.approx(0.5**5), name

    torch.manual_seed(0)
    shape = dict(img_size=16, patch_size=8, embed_dim=32, depth=4, num_classes=3)
    bare = timm.create_model(f"{kind}_tiny_patch16_224", **shape, **({"num_heads": 2} if kind == "vit" else {}))
    theirs = param_groups_layer_decay(
        bare, weight_decay=recipe.weight_decay, no_weight_decay_list=bare.no_weight_decay(), layer_decay=0.5
    )
    names = {id(parameter): name for name, parameter in bare.named_parameters()}
    for group in theirs:
        for parameter in group["params"]:
            mine = found.get(f"backbone.{names[id(parameter)]}")
            assert mine in (None, (group["lr_scale"], group["weight_decay"])), names[id(parameter)]


def test_the_schedule_scales_every_layer() -> None:
    task = task_of(small_segmenter())
    recipe = OptimisationConfig(
        iterations=100, batch_size=2, learning_rate=1e-2, minimum_learning_rate=0.0, schedule="poly", layer_decay=0.5
    )
    optimizer = make_optimizer(task, recipe)
    schedule = make_schedule(optimizer, recipe, images=4)
    for step, share in ((0, 1.0), (25, 0.75), (99, 0.01)):
        schedule.step_update(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(1e-2 * share * group["lr_scale"])


# --- the loop


@pytest.mark.parametrize(
    ("iterations", "every", "expected"),
    [
        (20, None, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),  # ten, and one before the first step
        (5, None, [0, 1, 2, 3, 4, 5]),
        (7, 3, [0, 3, 6, 7]),
        (4, 10, [0, 4]),
    ],
)
def test_evaluations_of_a_run_of_iterations(pictures, tmp_path, iterations, every, expected) -> None:
    made = segment(settings(pictures, tmp_path / "run", iterations=iterations, evaluate_every=every))
    assert [line["step"] for line in metrics(made, "held_out")] == expected
    assert len(metrics(made, "train")) == iterations


def test_learning_rates_of_a_run_fall_in_a_line(pictures: Path, tmp_path: Path) -> None:
    flags = dict(iterations=20, warmup_iterations=2, learning_rate=1e-3, evaluate_every=20)
    made = segment(settings(pictures, tmp_path / "run", **flags))
    rates = [line["learning_rate"] for line in metrics(made, "train")]
    assert rates == pytest.approx([0.0, 5e-4, *(1e-3 * (20 - step) / 18 for step in range(2, 20))])


@pytest.mark.parametrize("step", [1, 3])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(pictures, tmp_path, monkeypatch, caplog, step) -> None:
    """The running statistics of the head's BatchNorm too."""
    flags = dict(iterations=5, evaluate_every=2, drop_path=0.3, layer_decay=0.6)
    whole = segment(settings(pictures, tmp_path / "whole", **flags))
    parts = settings(pictures, tmp_path / "parts", **flags)
    honest, calls = Segmentation.forward, []

    def forward(self, given):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, given)

    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "forward", forward)
        with pytest.raises(KeyboardInterrupt):
            segment(parts)
    segment(parts)
    assert f"resumed at step {step} of 5" in caplog.text
    assert metrics(parts.out) == metrics(whole)
    assert evaluation(parts.out) == evaluation(whole)
    saved, expected = (torch.load(Path(out) / "checkpoints" / "last.pt", weights_only=True) for out in (parts.out, whole))
    assert all(torch.equal(saved["model"][name], value) for name, value in expected["model"].items())
    assert any("running_mean" in name for name in expected["model"])


def test_the_best_weights_are_those_of_the_highest_miou(pictures, tmp_path, monkeypatch) -> None:
    told = iter((99.0, 10.0, 30.0, 30.0, 20.0))
    monkeypatch.setattr(Segmentation, "evaluate", lambda *_: {"miou": next(told), "iou": {"a": None}})
    made = segment(settings(pictures, tmp_path / "run"))
    assert evaluation(made) == {"step": 3, "stage": "segmentation", "miou": 30.0, "iou": {"a": None}}
    assert all("iou" not in line for line in metrics(made))


def test_shapes_are_learnt(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", pictures=6, size=(32, 32))
    made = segment(settings(data, tmp_path / "run", crop="32", iterations=60, batch_size=6, learning_rate=3e-3,
                            evaluate_every=60, scales=(1.0, 1.0), colour=False))  # fmt: skip
    first, last = metrics(made, "held_out")
    assert last["miou"] > first["miou"] + 10
    losses = [line["loss"] for line in metrics(made, "train")]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_another_configuration_in_the_same_folder_is_refused(run: Path, pictures: Path) -> None:
    with pytest.raises(UserError, match=r"^--out .*another configuration: .*mode \(whole there, sliding here\)"):
        segment(settings(pictures, run, mode="sliding"))
    with pytest.raises(UserError, match=r"^--out .*another configuration: .*crop \(\[16, 16\] there, \[24, 24\] here\)"):
        segment(settings(pictures, run, crop="24"))


# --- the model


def test_the_recipes_drop_path_is_trained_with_and_not_saved(run, pictures, tmp_path, monkeypatch) -> None:
    """Rising in a line to the last block; the head's model and optimisation reach the loop as the flags say."""
    seen = {}

    class EnoughError(Exception):
        pass

    def train(stages, data, *_args):
        seen.update(task=stages[0].task, data=data, optimisation=stages[0].optimisation)
        raise EnoughError

    monkeypatch.setattr("vit_linearizer.commands.segment.train", train)
    flags = dict(drop_path=0.3, iterations=7, layer_decay=0.5, weight_decay=0.2, clip_norm=1.0, auxiliary_weight=0.1)
    with pytest.raises(EnoughError):
        segment(settings(pictures, tmp_path / "run", **flags, scales=(1.0, 1.5), horizontal_flip=0.0, colour=False))
    drops = [layer.drop_path.drop_prob for layer in seen["task"].backbone.layers if hasattr(layer.drop_path, "drop_prob")]
    assert drops == pytest.approx([0.1, 0.2, 0.3])  # none in the first
    optimisation = seen["optimisation"]
    assert (optimisation.iterations, optimisation.layer_decay, optimisation.weight_decay) == (7, 0.5, 0.2)
    assert (optimisation.clip_norm, seen["task"].config.auxiliary_weight) == (1.0, 0.1)
    view = seen["data"].training.view.config
    assert (view.scales, view.horizontal_flip, view.colour) == ((1.0, 1.5), 0.0, False)
    assert "drop_path_rate" not in json.loads((run / "model" / "config.json").read_text())["model_args"]


def test_a_trained_backbone_is_gone_on_with(run: Path, pictures: Path, tmp_path: Path) -> None:
    """At a learning rate of nothing it stays what it was; a new crop resamples nothing but its positions."""
    flags = dict(
        model=str(run), model_pretrained=True, model_args=(), patch_size=None, learning_rate=1e-12, weight_decay=0.0
    )
    made = segment(settings(pictures, tmp_path / "run", **flags, crop="24x16"))
    before, after = (load_segmenter(folder)[0].backbone.state_dict() for folder in (run, made))
    for name, value in before.items():
        if name != "pos_embed":
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)
    assert after["pos_embed"].shape[1] - before["pos_embed"].shape[1] == 3 * 2 - 2 * 2


def test_patches_of_another_size_survive_saving_and_loading(run: Path, pictures: Path, tmp_path: Path) -> None:
    flags = dict(model=str(run), model_pretrained=True, model_args=(), patch_size=4)
    made = segment(settings(pictures, tmp_path / "run", **flags, iterations=1))
    segmenter, _ = load_segmenter(made)
    assert tuple(segmenter.backbone.patch_embed.patch_size) == (4, 4)
    best = torch.load(made / "checkpoints" / "best.pt", weights_only=True)["model"]
    assert all(torch.equal(value, best[f"segmenter.{name}"]) for name, value in segmenter.state_dict().items())


def test_the_stride_is_two_thirds_of_the_crop_unless_given() -> None:
    """341 for crops of 512: windows of a picture of 853 pixels begin at 0 and 341, and no third is needed."""
    starts = []

    class Watching(torch.nn.Module):
        def forward(self, images):
            starts.append(int(images[0, 0, 0, 0]))
            return type("Output", (), {"logits": images[:, :1]})

    columns = torch.arange(853.0).expand(1, 3, 512, 853)
    with torch.no_grad():
        predict_logits(Watching(), columns, crop=(512, 512), mode="sliding")
    assert starts == [0, 341]


# --- what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head": "upernet", "head_width": 16, "batch_size": 1}, r"--batch-size 1: UperNet's norms need 2 images at a time"),
        ({"head": "upernet", "head_width": 16, "gradient_accumulation": 2}, r"--batch-size 2: UperNet's .* at least 4 for"),
        ({"stride": "17"}, r"--stride 17: must be no larger than the crop 16x16"),
        ({"stride": "8x17"}, r"--stride 8x17: must be no larger than the crop 16x16"),
        ({"crop": "20"}, r"--patch-size 8: does not divide the image size 20x20; try that at 16x16"),
        ({"crop": "0"}, r"--crop 0: give one side"),
        ({"model_args": ("embed_dim=32", "depth=3")}, r"model of 3 blocks: segmentation reads four of them"),
        ({"model": "resnet18", "model_args": ()}, r"--model resnet18: is not a plain backbone"),
        ({"recipe": "segment_ade"}, r"--recipe segment_ade: unknown recipe; .*did you mean segment_ade20k"),
        ({"auxiliary_weight": -1.0}, r"--auxiliary-weight -1\.0: must be 0 or more"),
        ({"head_width": 0}, r"--head-width 0: must be at least 1"),
        ({"iterations": 0}, r"--iterations 0: must be above 0"),
        ({"warmup_iterations": -1}, r"--warmup-iterations -1: must be 0 or more"),
        ({"scales": (2.0, 0.5)}, r"--scales 2\.0 0\.5: must be two numbers above 0"),
        ({"data": "builtin:shape"}, r"--data builtin:shape: "),
        ({"dataset": "ade20k"}, r"--data .*has no folder images/training"),
        ({"dataset": "cityscapes"}, r"--data .*has no folder leftImg8bit/train"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(pictures, tmp_path, values, message) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        segment(dataclasses.replace(settings(pictures, tmp_path / "run"), **values))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["images/val", "images/train", "classes.txt", "."])
def test_what_is_missing_of_a_folder_is_named(tmp_path: Path, missing: str) -> None:
    data = write_folder(tmp_path / "data", pictures=1)
    (data / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"^--data .*{'no such folder' if missing == '.' else missing}"):
        segment(settings(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_single_picture_trains_a_linear_head(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", pictures=1)
    made = segment(settings(data, tmp_path / "run", iterations=2, crop="32"))
    assert configuration(made)["batch_size"] == 1
    assert all(math.isfinite(line["loss"]) for line in metrics(made, "train"))


# --- pictures that cannot be used


def skipped(made: Path) -> list[str]:
    return [line.partition("\t")[0] for line in (made / "skipped.txt").read_text().splitlines()]


def test_broken_pictures_are_replaced_in_training_and_counted_in_a_score(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data")
    for split in ("train", "val"):
        file = data / "images" / split / "02.png"
        file.write_bytes(file.read_bytes()[:-200])
    (data / "masks/train/03.png").unlink()
    made = segment(settings(data, tmp_path / "run", iterations=3))
    assert skipped(made) == ["images/train/02.png", "images/train/03.png", "images/val/02.png"]
    assert configuration(made)["images"] == 3
    assert (evaluation(made)["images"], evaluation(made)["skipped"]) == (3, 1)

    (data / "images/val/02.png").unlink()
    without = segment(settings(data, tmp_path / "without", iterations=3))
    found, expected = evaluation(made), evaluation(without)
    assert (found.pop("skipped"), expected.pop("skipped")) == (1, 0)
    assert found == expected


def test_masks_that_ignore_everything_are_trained_through(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", pictures=2)
    for number in range(2):
        Image.fromarray(np.full((48, 64), 255, dtype=np.uint8)).save(data / f"masks/train/{number:02d}.png")
    made = segment(settings(data, tmp_path / "run"))
    assert [line["loss"] for line in metrics(made, "train")] == [0.0] * 4
    for name, value in load_segmenter(made)[0].named_parameters():
        assert torch.isfinite(value).all(), name
