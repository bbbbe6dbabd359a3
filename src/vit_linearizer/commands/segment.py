"""``segment``: a model and pictures with masks in, a segmentation model out."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from ..contracts import UserError
from ..data.datasets import SkippedList
from ..data.segmentation import (
    SegmentationEvaluationSet,
    SegmentationKind,
    SegmentationTrainingSet,
    SegmentationView,
    evaluation_loader,
    open_segmentation,
)
from ..evaluation.processes import own_share
from ..evaluation.segmentation import Mode
from ..models.adapters import nominal_size, patch_grid
from ..models.segmenter import Head, Segmenter, tap_blocks
from ..models.segmenter_folder import is_segmenter
from ..recipes import SEGMENTATION, find_recipe
from ..tasks import Segmentation
from ..training.data import TrainingData
from ..training.loop import Stage, train
from ..training.machine import choose_workers, make_accelerator
from ..training.progress import show_messages
from ..training.run_folder import RunFolder
from .arguments import parse_size
from .closing import close_with_report
from .resolution import (
    apply_flags,
    architecture_name,
    fit_to_images,
    open_at_size,
    probe_model,
    resolved_data,
    resolved_model,
    resolved_runtime,
    set_patch_size,
)
from .training_flags import TunedModelFlags

logger = logging.getLogger("vit_linearizer")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(TunedModelFlags):
    """Train a segmentation model on ADE20K, Cityscapes or a folder of pictures and masks.

    Options without a default take the recipe's value; --dry-run prints them all.

    Attributes:
        data: ADEChallengeData2016, the folder of Cityscapes, or one with images/{train,val}, masks/{train,val}, classes.txt.
        dataset: what lies there.
        out: folder that the run leaves its results in.
        recipe: segment_ade20k, segment_cityscapes, segment_folder (by default the one of the data set) or smoke.
        head: upernet (needs the extra segmentation) or linear.
        head_width: channels inside UperNet.
        auxiliary_weight: of UperNet's auxiliary head in the loss.
        crop: what the model is trained on, 512 or HEIGHTxWIDTH; by default the recipe's, or the model's nominal size.
        mode: held-out pictures are judged whole or by sliding windows of the crop's size.
        stride: from window to window, 341 or HEIGHTxWIDTH; by default two thirds of the crop.
        iterations: steps of the run.
        warmup_iterations: linear warm-up, at most a tenth of the run.
        scales: least and greatest random factor on a picture's size.
        horizontal_flip: probability of mirroring.
        colour: photometric distortion.
        largest_class_share: a crop that one class fills more than this is drawn again.
    """

    data: str
    dataset: SegmentationKind
    out: str
    recipe: str | None = None
    head: Head | None = None
    head_width: int | None = None
    auxiliary_weight: float | None = None
    crop: str | None = None
    mode: Mode | None = None
    stride: str | None = None
    iterations: int | None = None
    warmup_iterations: int | None = None
    scales: tuple[float, float] | None = None
    horizontal_flip: float | None = None
    colour: bool | None = None
    largest_class_share: float | None = None


def segment(config: SegmentConfig) -> Path:
    """Train a segmentation model; see `SegmentConfig`.

    Returns:
        The run folder. Its ``model/`` holds the weights with the highest held-out mIoU: the backbone in timm's folder
        format, and the head and the classes beside it; ``evaluation.json`` has the score of every class.

    Raises:
        UserError: anything in the configuration that cannot work; found before the training starts.
    """
    show_messages()
    probe: Any = probe_model(config)
    tap_blocks(len(probe.feature_info))
    name = config.recipe or f"segment_{config.dataset}"
    table = find_recipe(SEGMENTATION, name, architecture_name(probe))
    crop = parse_size("--crop", config.crop) or table.objectives.crop or nominal_size(probe)
    parsed: dict[str, Any] = {"crop": crop, "stride": parse_size("--stride", config.stride)}
    apply_flags(table, config, **parsed)  # refuses what cannot be, before anything is read
    if parsed["stride"] and any(step > side for step, side in zip(parsed["stride"], crop, strict=True)):
        raise UserError("--stride", config.stride, f"must be no larger than the crop {crop[0]}x{crop[1]}")
    if config.patch_size is not None:
        set_patch_size(probe, config.patch_size, crop)
    patch_grid(probe, crop)
    training, held_out = (open_segmentation(config.data, config.dataset, split) for split in ("train", "val"))
    if training.classes != held_out.classes:
        raise UserError("--data", config.data, "train and val have other classes")

    if is_segmenter(config.model):
        logger.warning("%s: of a segmentation run the backbone is taken, not the head", config.model)
    if unseen := [name for number, name in enumerate(training.classes) if number not in training.seen]:
        level = logging.WARNING if config.dataset == "folder" else logging.INFO
        logger.log(level, "in none of the masks looked at: %s", ", ".join(unseen[:8]) + (" ..." if len(unseen) > 8 else ""))

    accelerator = make_accelerator(config)
    parts = accelerator.num_processes * config.gradient_accumulation
    recipe = fit_to_images(table, config, images=len(training), parts=parts, **parsed)
    objectives = recipe.objectives
    resolved = {
        "command": "segment",
        **resolved_model(config),
        "data": resolved_data(config.data),
        "dataset": config.dataset,
        "images": len(training),
        "classes": len(training.classes),
        "recipe": name,
        **recipe.flat(),
        **resolved_runtime(config, accelerator),
    }
    run = RunFolder(config.out, resolved)
    torch.manual_seed(config.seed)
    backbone = open_at_size(config, crop, num_classes=0, drop_path_rate=recipe.drop_path, dynamic_img_size=True)
    segmenter = Segmenter(
        backbone, num_classes=len(training.classes), head=objectives.head, head_width=objectives.head_width
    )
    noted = {"crop": crop, "resize": training.resize, "mode": objectives.mode, "stride": objectives.stride}
    task = Segmentation(
        segmenter,
        objectives,
        classes=training.classes,
        palette=training.palette,
        noted=noted,
        passed_over=len(held_out.skipped),
    )
    optimisation = recipe.optimisation
    if optimisation.batch_size // parts < 2 and objectives.head == "upernet":
        remedy = f"UperNet's norms need 2 images at a time: at least {2 * parts} for processes x gradient accumulation"
        raise UserError("--batch-size", optimisation.batch_size, remedy)
    if config.dry_run:
        millions = sum(parameter.numel() for parameter in segmenter.parameters()) / 1e6
        logger.info("model    %.1f M parameters, head %s, crop %dx%d", millions, objectives.head, *crop)
        logger.info("images   %d to train on, %d held out, %d classes", len(training), len(held_out), len(training.classes))
        logger.info("steps    %d of %d images, learning rate %.3g", optimisation.iterations, optimisation.batch_size,
                    optimisation.learning_rate)  # fmt: skip
        logger.info("recipe   %s", ", ".join(f"{name} {value}" for name, value in recipe.flat().items()))
        return run.path

    with run.opened(resume=config.resume, writes=accelerator.is_main_process):
        skipped = SkippedList(run.skipped)
        if accelerator.is_main_process:
            for file, reason in (*training.skipped, *held_out.skipped):
                skipped.add(file, reason)
        view = SegmentationView(crop, recipe.views, resize=training.resize, seed=config.seed)
        judged_on = SegmentationEvaluationSet(held_out, crop, skipped)
        workers = choose_workers(config, accelerator.device)
        loaded = TrainingData(
            training=SegmentationTrainingSet(training, view, skipped),
            repeats=1,
            held_out=evaluation_loader(
                Subset(judged_on, own_share(range(len(judged_on))).tolist()),
                batch_size=optimisation.batch_size // parts,
                num_workers=workers,
            ),
            bank=None,
        )
        logger.info("%s on %d images of %d classes (%d held out, %d skipped), %s", config.model, len(training),
                    len(training.classes), len(held_out), len(training.skipped) + len(held_out.skipped),
                    accelerator.device)  # fmt: skip
        stage = Stage(name="segmentation", task=task, optimisation=optimisation)
        train([stage], loaded, config, run, accelerator)
        scores = run.read_evaluation()
        worst = sorted((value, name) for name, value in scores["iou"].items() if value is not None)
        logger.info("mIoU %.2f; lowest: %s", scores["miou"], ", ".join(f"{name} {value:.1f}" for value, name in worst[:5]))
        logger.info("segmentation model: %s", run.model)
    if config.report and accelerator.is_main_process:
        close_with_report([run.path], run.path / "report.html")
    return run.path
