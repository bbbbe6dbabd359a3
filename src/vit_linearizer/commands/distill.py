"""``distill``: a teacher and a folder of unlabelled images in, a linear-time student out."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
import torch.nn as nn

from ..data.datasets import SkippedList, split_held_out
from ..data.sources import ImageSource, Labels, open_source
from ..data.views import MaskConfig
from ..models.adapters import check_plain, nominal_size, patch_grid
from ..models.loading import create_backbone, model_folder, probe_backbone
from ..models.teacher import agreeing_size, load_teacher
from ..objectives import Masking, MatchedTokens, Target, masked_count
from ..recipes import DISTILLATION, DistillationRecipe, find_recipe
from ..tasks import Distillation
from ..training.data import prepare_data
from ..training.loop import train
from ..training.machine import choose_workers, make_accelerator
from ..training.optimiser import total_steps
from ..training.progress import show_messages
from ..training.run_folder import RunFolder
from .arguments import parse_model_args, parse_size
from .resolution import apply_flags, fit_to_images, resolved_data, resolved_runtime
from .training_flags import TrainingFlags, ViewFlags

logger = logging.getLogger("vit_linearizer")


#: Fewer held-out images than this deserve a word of caution.
_FEW_HELD_OUT = 20


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainingFlags, ViewFlags):
    """Distil a Vision Transformer into a linear-time student, from images without labels.

    Options without a default take the recipe's value; --dry-run prints them all.

    Attributes:
        teacher: timm name, hf-hub:OWNER/NAME, local-dir:FOLDER, a run folder, or a weight file (with --teacher-arch).
        student: timm name, e.g. adventurer_base_patch16_224, or a run folder or weight file to go on from.
        data: folder of images, searched recursively, or builtin:digits.
        labels: folder where subfolders are classes: then nearest neighbours are scored on the way, and nothing else changes.
        out: folder that the run leaves its results in.
        recipe: linearizer (the paper), regression (the baseline), digits or smoke.
        teacher_arch: timm name of the architecture, when the teacher is a weight file.
        teacher_pretrained: load the teacher's pretrained weights.
        student_arch: timm name of the architecture, when the student is a weight file.
        student_args: arguments of the student's architecture, as name=value (e.g. depth=4 flip=released).
        image_size: what the student sees, 224 or HEIGHTxWIDTH; by default the student's nominal size.
        teacher_image_size: what the teacher sees; by default the size at which the patch grids agree.
        epochs: passes over the images.
        warmup_epochs: linear warm-up, at most a tenth of the run.
        stages: number of stages whose activation maps are matched.
        mask_ratio: share of patches hidden from the student.
        masking: token-wise or block-wise masks.
        activation_matching_weight: factor on the activation-matching loss.
        activation_matching_tokens: tokens that enter the activation maps.
        masked_prediction_weight: factor on the masked-prediction loss.
        masked_prediction_target: LayerNorm of the teacher's last block, or as it is.
        feature_regression_weight: factor on plain regression of the final tokens.
        feature_regression_target: as for masked prediction.
    """

    teacher: str
    student: str
    data: str
    out: str
    labels: Labels = "none"
    recipe: str = "linearizer"
    teacher_arch: str | None = None
    teacher_pretrained: bool = True
    student_arch: str | None = None
    student_args: tuple[str, ...] = ()
    image_size: str | None = None
    teacher_image_size: str | None = None
    epochs: int | None = None
    warmup_epochs: float | None = None
    stages: int | None = None
    mask_ratio: float | None = None
    masking: Masking | None = None
    activation_matching_weight: float | None = None
    activation_matching_tokens: MatchedTokens | None = None
    masked_prediction_weight: float | None = None
    masked_prediction_target: Target | None = None
    feature_regression_weight: float | None = None
    feature_regression_target: Target | None = None


def distill(config: DistillConfig) -> Path:
    """Distil a teacher into a student; see `DistillConfig`.

    Returns:
        The run folder. Its ``model/`` holds the student with the lowest held-out loss, in timm's folder format.

    Raises:
        UserError: anything in the configuration that cannot work; found before the training starts.
    """
    show_messages()
    student_args = parse_model_args("--student-args", config.student_args)
    named: dict[str, Any] = {"field": "--student", "architecture": config.student_arch}
    probe: Any = probe_backbone(config.student, **named, **student_args)
    check_plain(probe, config.student, field="--student")
    table = find_recipe(DISTILLATION, config.recipe, probe.pretrained_cfg["architecture"])
    apply_flags(table, config)  # refuses what cannot be, before anything is read
    image_size = parse_size("--image-size", config.image_size) or nominal_size(probe)
    grid = patch_grid(probe, image_size)
    teacher_size = agreeing_size(
        config.teacher,
        student_grid=grid,
        architecture=config.teacher_arch,
        image_size=parse_size("--teacher-image-size", config.teacher_image_size),
    )
    source = open_source(config.data, config.labels)
    train_numbers, held_out_numbers = split_held_out(len(source), config.seed)

    accelerator = make_accelerator(config)
    parts = accelerator.num_processes * config.gradient_accumulation
    recipe = fit_to_images(table, config, images=len(train_numbers), parts=parts)
    per_process = recipe.optimisation.batch_size // parts

    resolved = {
        "command": "distill",
        "teacher": config.teacher,
        "teacher_arch": config.teacher_arch,
        "teacher_pretrained": config.teacher_pretrained,
        "student": config.student,
        "student_arch": config.student_arch,
        "student_args": list(config.student_args),
        "data": resolved_data(config.data),
        "images": len(source),
        "recipe": config.recipe,
        "image_size": list(image_size),
        "teacher_image_size": list(teacher_size),
        **recipe.flat(),
        **resolved_runtime(config, accelerator),
    }
    run = RunFolder(config.out, resolved)
    torch.manual_seed(config.seed)  # of a teacher with random weights
    teacher = load_teacher(
        config.teacher, image_size=teacher_size, architecture=config.teacher_arch, pretrained=config.teacher_pretrained
    )
    torch.manual_seed(config.seed)
    student_args |= {"img_size": image_size, "drop_path_rate": recipe.drop_path}
    if timm.is_model(config.student):  # what nothing trains, the class token, is not what the student should answer with
        student_args.setdefault("global_pool", "avg")
    from_hub = config.student.startswith("hf-hub:")
    student: Any = create_backbone(config.student, **named, pretrained=from_hub, **student_args)
    student._model_args.pop("drop_path_rate", None)  # a matter of this training, not of the model
    task = Distillation(student, teacher, recipe.objectives)
    if not config.teacher_pretrained and not model_folder(config.teacher) and not Path(config.teacher).is_file():
        logger.warning("the teacher has random weights: this run shows that things work, and teaches nothing")
    if len(held_out_numbers) < _FEW_HELD_OUT:
        logger.warning("held out: %d images only; read their numbers as rough signs", len(held_out_numbers))
    if config.dry_run:
        logger.info("machine  %s, %s", accelerator.device, resolved["precision"])
        _describe(task, recipe, source, image_size, len(train_numbers), per_process)
        return run.path

    run.prepare(resume=config.resume, writes=accelerator.is_main_process)
    skipped = SkippedList(run.skipped)
    if accelerator.is_main_process:
        for name, reason in source.skipped:
            skipped.add(name, reason)
    mask = None
    if recipe.objectives.mask_ratio > 0:
        mask = MaskConfig(grid=grid, ratio=recipe.objectives.mask_ratio, masking=recipe.objectives.masking)
    data = prepare_data(
        source,
        train_numbers,
        held_out_numbers,
        image_size=image_size,
        views=recipe.views,
        mask=mask,
        seed=config.seed,
        batch_size=per_process,
        num_workers=choose_workers(config, accelerator.device),
        skipped=skipped,
    )
    with run.logging_to_file():
        logger.info("%s -> %s on %d images (%d held out, %d skipped), %s", config.teacher, config.student,
                    len(train_numbers), len(held_out_numbers), len(source.skipped), accelerator.device)  # fmt: skip
        train(task, data, recipe.optimisation, config, run, accelerator, title="distilling")
        logger.info("student: %s", run.model)
    return run.path


def _describe(
    task: Distillation,
    recipe: DistillationRecipe,
    source: ImageSource,
    image_size: tuple[int, int],
    images: int,
    per_process: int,
) -> None:
    """What ``--dry-run`` prints."""
    grid, tokens = task.teacher.grid, task.teacher.grid[0] * task.teacher.grid[1]
    parameters = {"student": _count(task.student), "teacher": _count(task.teacher.model), "trained": _count(task)}
    hidden = masked_count(tokens, recipe.objectives.mask_ratio)
    activations = _activation_bytes(task, image_size, hidden)
    weights = 4 * (4 * parameters["trained"] + parameters["teacher"])  # weights, gradients, two moments; fp32
    optimisation = recipe.optimisation
    size = (*image_size, *grid)
    logger.info("student  %.1f M parameters, image %dx%d, %d x %d patches", parameters["student"] / 1e6, *size)
    logger.info("teacher  %.1f M parameters, image %dx%d", parameters["teacher"] / 1e6, *task.teacher.image_size)
    normalisation = timm.data.resolve_model_data_config(task.teacher.model)
    logger.info("         normalised with mean %s, deviation %s", normalisation["mean"], normalisation["std"])
    logger.info("tokens   %d patches, %d hidden from the student", tokens, hidden)
    logger.info("images   %d found, %d skipped, %d to train on", len(source), len(source.skipped), images)
    logger.info("steps    %d epochs, %d steps of %d images, learning rate %.3g", optimisation.epochs,
                total_steps(optimisation, images), optimisation.batch_size, optimisation.learning_rate)  # fmt: skip
    logger.info("recipe   %s", ", ".join(f"{name} {value}" for name, value in recipe.flat().items()))
    gib = [size / 2**30 for size in (weights + per_process * activations, weights, activations)]
    logger.info("memory   about %.1f GiB a process in fp32 (%.1f weights and optimiser, %.2f for each of %d images)",
                *gib, per_process)  # fmt: skip


def _activation_bytes(task: Distillation, image_size: tuple[int, int], hidden: int) -> int:
    """What autograd keeps for one image, counted on a real forward pass."""
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
    batch = {"images": torch.rand(1, 3, *image_size)}
    if hidden:
        batch["mask"] = (torch.arange(task.teacher.grid[0] * task.teacher.grid[1]) < hidden)[None]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        task(batch)
    return sum(size for pointer, size in kept.items() if pointer not in own)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
