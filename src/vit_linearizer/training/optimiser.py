"""AdamW, its parameter groups and its schedule (timm's), and the batch that fits a set of images."""

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from ..contracts import UserError
from ..data.sampler import steps_per_epoch
from ..tasks import Task
from .config import OptimisationConfig


def fit_batch(batch_size: int, images: int, parts: int) -> int:
    """The global batch for a set of images: no larger than the set, and a multiple of processes times accumulation.

    Raises:
        UserError: the batch asked for does not divide.
    """
    if batch_size % parts:
        near = max(parts, batch_size // parts * parts)
        remedy = f"must be a multiple of processes x gradient accumulation ({parts}); try {near}"
        raise UserError("--batch-size", batch_size, remedy)
    return min(batch_size, max(parts, images // parts * parts))


def total_steps(optimisation: OptimisationConfig, images: int) -> int:
    """Optimisation steps of a run."""
    return optimisation.epochs * steps_per_epoch(images, optimisation.batch_size)


def make_optimizer(task: Task, optimisation: OptimisationConfig) -> torch.optim.Optimizer:
    """AdamW in timm's parameter groups: no weight decay on norms, biases and what the task names; layer decay if asked."""
    return create_optimizer_v2(
        task,
        opt="adamw",
        lr=optimisation.learning_rate,
        weight_decay=optimisation.weight_decay,
        betas=optimisation.betas,
        layer_decay=optimisation.layer_decay,
    )


def make_schedule(optimizer: torch.optim.Optimizer, optimisation: OptimisationConfig, images: int) -> CosineLRScheduler:
    """timm's cosine with a linear warm-up of at most a tenth of the steps; set by step number, without a state."""
    total = total_steps(optimisation, images)
    wanted = round(optimisation.warmup_epochs * steps_per_epoch(images, optimisation.batch_size))
    warmup = min(wanted, total // 10)
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=optimisation.minimum_learning_rate,
        warmup_t=warmup,
        warmup_lr_init=optimisation.minimum_learning_rate,
        warmup_prefix=True,
        t_in_epochs=False,
    )
