"""How training runs: what a recipe says about optimisation, and what the user says about this machine and this run."""

import math
from dataclasses import dataclass
from typing import Literal

from ..contracts import UserError


@dataclass(frozen=True, kw_only=True)
class OptimisationConfig:
    """AdamW with linear warm-up and a decay; as long as either ``epochs`` or ``iterations`` say.

    Attributes:
        epochs: passes over the images.
        iterations: steps, instead of epochs.
        batch_size: global, over all processes and accumulation steps.
        learning_rate: at the end of the warm-up.
        minimum_learning_rate: at both ends of the schedule.
        weight_decay: not applied to norms, biases, positions, class token and scan parameters.
        betas: of AdamW.
        schedule: of the decay: ``cosine``, or ``poly`` of power 1, a straight line.
        warmup_epochs: how long to warm up.
        warmup_iterations: the same in steps.
        warmup_share: no more than this share of the run's steps is warmed up, however short it is made.
        layer_decay: factor on the learning rate from layer to layer, last to first; None for none.
        clip_norm: largest norm of the gradient; None for no clipping.
    """

    epochs: int | None = None
    iterations: int | None = None
    batch_size: int
    learning_rate: float
    minimum_learning_rate: float
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "poly"] = "cosine"
    warmup_epochs: float = 0
    warmup_iterations: int = 0
    warmup_share: float = 0.1
    layer_decay: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.iterations is None):
            raise ValueError("either epochs or iterations say how long a run is")
        positive = ("epochs", "iterations", "batch_size", "learning_rate")
        not_negative = ("minimum_learning_rate", "weight_decay", "warmup_epochs", "warmup_iterations", "warmup_share")
        for name in (*positive, *not_negative):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and (value > 0 if name in positive else value >= 0)):
                bound = "above 0" if name in positive else "0 or more"
                raise UserError(f"--{name.replace('_', '-')}", value, f"must be {bound}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError("--layer-decay", self.layer_decay, "must be in (0, 1]; 1 for none")
        if self.minimum_learning_rate > self.learning_rate:
            remedy = f"must not be above the learning rate, {self.learning_rate}"
            raise UserError("--minimum-learning-rate", self.minimum_learning_rate, remedy)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """This machine and this run.

    Attributes:
        seed: of everything random.
        device: where to train.
        precision: arithmetic of forward and backward; ``auto`` is bf16 where the device has it, else fp32.
        num_workers: processes that load images; None for a choice that fits the device.
        gradient_accumulation: parts that a process's share of a batch is cut into.
        gradient_checkpointing: recompute blocks in the backward pass, for less memory.
        compile: ``torch.compile`` each block.
        resume: ``auto`` goes on from the last checkpoint, ``never`` starts over.
        evaluate_every: epochs between evaluations on the held-out images (iterations, where a run is counted in them); by
            default every epoch, or ten times in a run of iterations.
        log_every: steps between lines of ``metrics.jsonl``.
        checkpoint_minutes: longest time between checkpoints.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    num_workers: int | None = None
    gradient_accumulation: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    resume: Literal["auto", "never"] = "auto"
    evaluate_every: int | None = None
    log_every: int = 10
    checkpoint_minutes: float = 10

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("gradient_accumulation", 1), ("evaluate_every", 1), ("log_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')}", value, f"must be at least {least}")
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError("--num-workers", self.num_workers, "must be 0 or more")
