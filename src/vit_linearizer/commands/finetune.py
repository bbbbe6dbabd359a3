"""``finetune``: a model and labelled pictures in, a classifier out. The same for student, baseline and teacher."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
from timm.models import VisionTransformer

from ..data.datasets import CentreSet, SkippedList, TrainingSet, centre_loader, split_held_out
from ..data.labelled import LabelledData, choose_labelled, open_labelled
from ..data.sources import ImageSource
from ..data.views import TrainingView
from ..evaluation.processes import own_share
from ..models.adapters import nominal_size, patch_grid
from ..recipes import FINE_TUNING, ClassificationRecipe, find_recipe, finetuning_recipe
from ..tasks import Classification
from ..training.data import TrainingData
from ..training.loop import Stage, train
from ..training.machine import choose_workers, make_accelerator
from ..training.optimiser import total_steps
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
from .training_flags import TunedModelFlags, ViewFlags

logger = logging.getLogger("vit_linearizer")

_EVALUATION_BATCH = 64
#: Fewer steps than this are too few for what the paper's tables were made for.
_FEW_STEPS = 2000


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TunedModelFlags, ViewFlags):
    """Train a classifier on labelled pictures: a distilled student, a student from scratch, or a teacher.

    Options without a default take the recipe's value; --dry-run prints them all.

    Attributes:
        data: folder with train/ and val/ and a folder a class in each, a folder of class folders (a twentieth is held
            out), or builtin:digits.
        out: folder that the run leaves its results in.
        recipe: finetune_small, finetune_base or finetune_large (the paper; by default the one of the model's size),
            digits or smoke.
        label_fraction: share of every class's training pictures that is used.
        image_size: 224 or HEIGHTxWIDTH; by default the model's nominal size.
        global_pool: what the head reads, token or avg; by default as the model has it (a distilled student: avg).
        epochs: passes over the images.
        warmup_epochs: linear warm-up; in a shorter run no larger a share of it than the recipe's.
        label_smoothing: share of the target that is spread over all classes.
    """

    data: str
    out: str
    recipe: str | None = None
    label_fraction: float = 1.0
    image_size: str | None = None
    global_pool: Literal["token", "avg"] | None = None
    epochs: int | None = None
    warmup_epochs: float | None = None
    label_smoothing: float | None = None


def finetune(config: FinetuneConfig) -> Path:
    """Train a classifier; see `FinetuneConfig`.

    Returns:
        The run folder. Its ``model/`` holds the weights with the highest held-out top-1, in timm's folder format, with
        the names of the classes; its ``checkpoints/`` the last ones too.

    Raises:
        UserError: anything in the configuration that cannot work; found before the training starts.
    """
    show_messages()
    probe: Any = probe_model(config)
    architecture = architecture_name(probe)
    name = config.recipe or finetuning_recipe(architecture)
    table = find_recipe(FINE_TUNING, name, architecture)
    apply_flags(table, config)  # refuses what cannot be, before anything is read
    image_size = parse_size("--image-size", config.image_size) or nominal_size(probe)
    if config.patch_size is not None:
        set_patch_size(probe, config.patch_size, image_size)
    patch_grid(probe, image_size)
    data = open_labelled(config.data)
    training, held_out_source, held_out = _split(data, config)

    accelerator = make_accelerator(config)
    parts = accelerator.num_processes * config.gradient_accumulation
    recipe = fit_to_images(table, config, images=len(training), parts=parts)
    resolved = {
        "command": "finetune",
        **resolved_model(config),
        "data": resolved_data(config.data),
        "images": len(training),
        "classes": len(data.classes),
        "label_fraction": config.label_fraction,
        "recipe": name,
        "image_size": list(image_size),
        "global_pool": config.global_pool,
        **recipe.recorded(),
        **resolved_runtime(config, accelerator),
    }
    run = RunFolder(config.out, resolved)
    torch.manual_seed(config.seed)
    chosen: dict[str, Any] = {"global_pool": config.global_pool} if config.global_pool else {}
    if chosen and isinstance(probe, VisionTransformer):  # whose final norm would move, and find no weights there
        chosen["fc_norm"] = not isinstance(probe.fc_norm, nn.Identity)
    model: Any = open_at_size(config, image_size, num_classes=len(data.classes), drop_path_rate=recipe.drop_path, **chosen)
    if tuple(model.pretrained_cfg.get("label_names") or data.classes) != data.classes:
        model.reset_classifier(len(data.classes))  # as many classes, but others
    model.pretrained_cfg |= {"num_classes": len(data.classes), "label_names": list(data.classes)}
    task = Classification(model, recipe.objectives)
    if config.dry_run:
        _describe(task, recipe, data, image_size, len(training), len(held_out))
        return run.path

    with run.opened(resume=config.resume, writes=accelerator.is_main_process):
        skipped = SkippedList(run.skipped)
        if accelerator.is_main_process:
            for source in {id(source): source for source in (data.training, held_out_source)}.values():
                for file, reason in source.skipped:
                    skipped.add(file, reason)
        view = TrainingView(image_size, recipe.views, None, seed=config.seed)
        workers = choose_workers(config, accelerator.device)
        centre = CentreSet(held_out_source, own_share(held_out), image_size, skipped=skipped)
        loaded = TrainingData(
            training=TrainingSet(data.training, training, view, skipped),
            repeats=recipe.views.repeats,
            held_out=centre_loader(centre, batch_size=_EVALUATION_BATCH, num_workers=workers),
            bank=None,
            colours_in_loader=recipe.views.colours_in_loader,
        )
        steps = total_steps(recipe.optimisation, len(training))
        if steps < _FEW_STEPS and name.startswith("finetune_"):
            logger.warning("%d steps in all, by a recipe for a million pictures: a smaller --batch-size gives more", steps)
        logger.info("%s on %d images of %d classes (%d held out), %s", config.model, len(training), len(data.classes),
                    len(held_out), accelerator.device)  # fmt: skip
        stage = Stage(name="fine-tuning", task=task, optimisation=recipe.optimisation)
        train([stage], loaded, config, run, accelerator)
        best = run.read_evaluation()
        logger.info("best: top1 %.2f at step %d", best["top1"], best["step"])
        logger.info("classifier: %s", run.model)
    if config.report and accelerator.is_main_process:
        close_with_report([run.path], run.path / "report.html")
    return run.path


def _split(data: LabelledData, config: FinetuneConfig) -> tuple[np.ndarray, ImageSource, np.ndarray]:
    """Numbers of the training pictures; the source of those to judge by, and their numbers."""
    labels = data.training.labels
    assert labels is not None
    if data.validation is not None:
        training, source, held_out = np.arange(len(labels)), data.validation, np.arange(len(data.validation))
    else:
        (training, held_out), source = split_held_out(len(labels), config.seed), data.training
    return training[choose_labelled(labels[training], config.label_fraction, config.seed)], source, held_out


def _describe(
    task: Classification,
    recipe: ClassificationRecipe,
    data: LabelledData,
    image_size: tuple[int, int],
    images: int,
    held_out: int,
) -> None:
    """What ``--dry-run`` prints."""
    optimisation = recipe.optimisation
    size = (sum(p.numel() for p in task.parameters()) / 1e6, *image_size, *patch_grid(task.model, image_size))
    logger.info("model    %.1f M parameters, image %dx%d, %d x %d patches", *size)
    logger.info("images   %d to train on, %d held out, %d classes", images, held_out, len(data.classes))
    logger.info("steps    %d epochs, %d steps of %d images, learning rate %.3g", optimisation.epochs,
                total_steps(optimisation, images), optimisation.batch_size, optimisation.learning_rate)  # fmt: skip
    logger.info("recipe   %s", ", ".join(f"{name} {value}" for name, value in recipe.flat().items()))
