"""What ``distill --dry-run`` prints: models, images, steps and memory."""

import logging
from collections.abc import Iterable, Mapping

import timm.data
import torch
import torch.nn as nn

from ..data.sources import ImageSource
from ..models.teacher import Teacher
from ..objectives import masked_count
from ..recipes import DistillationRecipe
from ..tasks import Task
from ..training.optimiser import total_steps
from .distill_routes import Route, StageRecipe

logger = logging.getLogger("vit_linearizer")


def describe(
    route: Route,
    recipes: Mapping[str, StageRecipe],
    tasks: Mapping[str, Task],
    source: ImageSource,
    images: int,
    per_process: int,
) -> None:
    """Print what a run would do.

    Args:
        route: from teacher to student.
        recipes: of each stage.
        tasks: likewise.
        source: of the images.
        images: to train on.
        per_process: images of a batch in each process.
    """
    teacher: Teacher = next(iter(tasks.values())).teacher  # type: ignore[assignment]  # both tasks have it
    student = next(iter(tasks.values())).backbone
    size = (*route.image_size, *route.grid)
    logger.info("student  %.1f M parameters, image %dx%d, %d x %d patches", _count(student.parameters()) / 1e6, *size)
    logger.info("teacher  %.1f M parameters, image %dx%d", _count(teacher.model.parameters()) / 1e6, *route.teacher_size)
    normalisation = timm.data.resolve_model_data_config(teacher.model)
    logger.info("         normalised with mean %s, deviation %s", normalisation["mean"], normalisation["std"])
    logger.info("images   %d found, %d skipped, %d to train on", len(source), len(source.skipped), images)
    patches = route.grid[0] * route.grid[1]
    for name, task in tasks.items():
        recipe = recipes[name]
        hidden = masked_count(patches, recipe.objectives.mask_ratio) if isinstance(recipe, DistillationRecipe) else 0
        if len(tasks) > 1:
            logger.info("stage    %s", name)
        logger.info("tokens   %d patches, %d hidden from the student", patches, hidden)
        optimisation = recipe.optimisation
        logger.info("steps    %d epochs, %d steps of %d images, learning rate %.3g", optimisation.epochs,
                    total_steps(optimisation, images), optimisation.batch_size, optimisation.learning_rate)  # fmt: skip
        logger.info("recipe   %s", ", ".join(f"{key} {value}" for key, value in recipe.flat().items()))
        task.begin(torch.device("cpu"))
        trained = _count(parameter for parameter in task.parameters() if parameter.requires_grad)
        activations = _activation_bytes(task, route.image_size, patches, hidden)
        # Weights of both models; gradients and two moments of what is trained; fp32.
        weights = 4 * (_count(task.parameters()) + 3 * trained + _count(teacher.model.parameters()))
        gib = [size / 2**30 for size in (weights + per_process * activations, weights, activations)]
        logger.info("memory   about %.1f GiB a process in fp32 (%.1f weights and optimiser, %.2f for each of %d images)",
                    *gib, per_process)  # fmt: skip


def _activation_bytes(task: Task, image_size: tuple[int, int], patches: int, hidden: int) -> int:
    """What autograd keeps for one image, counted on a real forward pass."""
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in task.parameters()}
    batch = {"images": torch.rand(1, 3, *image_size)}
    if hidden:
        batch["mask"] = (torch.arange(patches) < hidden)[None]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        task(batch)
    return sum(size for pointer, size in kept.items() if pointer not in own)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
