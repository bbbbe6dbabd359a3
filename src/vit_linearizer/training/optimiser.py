"""AdamW, its parameter groups and its schedule (timm's), and the batch that fits a set of images."""

import math

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler

from ..contracts import UserError
from ..data.sampler import steps_per_epoch
from ..tasks import Task
from .config import OptimisationConfig, RuntimeConfig

#: Evaluations of a run that is counted in iterations.
_EVALUATIONS = 10


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
    if optimisation.iterations is not None:
        return optimisation.iterations
    assert optimisation.epochs is not None
    return optimisation.epochs * steps_per_epoch(images, optimisation.batch_size)


def intervals(optimisation: OptimisationConfig, runtime: RuntimeConfig, images: int) -> tuple[int, int]:
    """Steps from evaluation to evaluation, and from checkpoint to checkpoint (each epoch; in iterations, as evaluations)."""
    if optimisation.iterations is not None:
        steps = runtime.evaluate_every or math.ceil(optimisation.iterations / _EVALUATIONS)
        return steps, steps
    per_epoch = steps_per_epoch(images, optimisation.batch_size)
    return (runtime.evaluate_every or 1) * per_epoch, per_epoch


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


def make_schedule(optimizer: torch.optim.Optimizer, optimisation: OptimisationConfig, images: int) -> Scheduler:
    """timm's cosine or polynomial decay with a linear warm-up; set by step number, without a state."""
    total = total_steps(optimisation, images)
    wanted = round(optimisation.warmup_epochs * steps_per_epoch(images, optimisation.batch_size))
    warmup = min(wanted + optimisation.warmup_iterations, math.floor(total * optimisation.warmup_share + 1e-9))
    shape = dict(
        t_initial=total - warmup,
        lr_min=optimisation.minimum_learning_rate,
        warmup_t=warmup,
        warmup_lr_init=optimisation.minimum_learning_rate,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    if optimisation.schedule == "poly":
        return PolyLRScheduler(optimizer, power=1.0, **shape)  # type: ignore[arg-type]
    return CosineLRScheduler(optimizer, **shape)  # type: ignore[arg-type]
