"""The one training loop: every task, every recipe, one process or many.

A step is a function of (seed, step): its images, crops and masks (data/sampler.py), its drop path (seeded below) and its
learning rate. So a run can be stopped anywhere and goes on bit for bit from its last checkpoint.
"""

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

from ..contracts import UserError
from ..data.datasets import SkippedList, to_device, training_loader
from ..data.sampler import StepSampler, steps_per_epoch
from ..models.loading import save_model_folder
from ..tasks import Task
from .checkpoint import Progress, load_checkpoint, save_checkpoint
from .config import OptimisationConfig, RuntimeConfig
from .data import TrainingData
from .progress import ProgressLine, duration
from .run_folder import MetricsWriter, RunFolder

logger = logging.getLogger("vit_linearizer")

_NOT_FINITE = "not finite; the last good checkpoint is kept; try a lower --learning-rate or --precision fp32"


def make_accelerator(runtime: RuntimeConfig, *, find_unused: bool = False) -> Accelerator:
    """accelerate's view of this machine.

    Raises:
        UserError: the device asked for is not there, or cannot do the precision asked for.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(runtime.device, True):
        raise UserError("--device", runtime.device, "not available here; use auto or cpu (vit-linearizer doctor tells why)")
    on_gpu = runtime.device == "cuda" or (runtime.device == "auto" and available["cuda"])
    precision = choose_precision("cuda" if on_gpu else "cpu")[0] if runtime.precision == "auto" else runtime.precision
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process may have used another
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        cpu=runtime.device == "cpu",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
    )
    if not accelerator.is_main_process:
        logger.setLevel(logging.ERROR)
    return accelerator


def choose_precision(device: str) -> tuple[str, str]:
    """What ``--precision auto`` means on a kind of device (``cuda``, else the CPU), and why."""
    if device == "cuda":
        native = torch.cuda.is_bf16_supported()
        return ("bf16", "this GPU computes in bf16") if native else ("fp32", "this GPU has no bf16")
    native = any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return ("bf16", "this CPU has bf16 instructions") if native else ("fp32", "this CPU has no bf16 instructions")


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


def train(
    task: Task,
    data: TrainingData,
    optimisation: OptimisationConfig,
    runtime: RuntimeConfig,
    run: RunFolder,
    accelerator: Accelerator,
    *,
    title: str,
) -> dict[str, float]:
    """Train a task, leaving checkpoints, metrics and the best weights in the run folder.

    Returns:
        Metrics of the weights in ``model/``.

    Raises:
        UserError: a loss that is not finite; the last good checkpoint stays.
    """
    images = len(data.training)
    per_epoch, total = steps_per_epoch(images, optimisation.batch_size), total_steps(optimisation, images)
    task.to_other_devices(accelerator.device)
    if runtime.gradient_checkpointing:
        task.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    if runtime.compile:
        task.compile_blocks()
    optimizer = make_optimizer(task, optimisation)
    schedule = make_schedule(optimizer, optimisation, images)
    model, optimizer = accelerator.prepare(task, optimizer)
    raw_optimizer = getattr(optimizer, "optimizer", optimizer)

    last = run.checkpoints / "last.pt"
    progress = Progress()
    if last.exists():
        progress = load_checkpoint(last, model, raw_optimizer)
        logger.info("resumed at step %d of %d", progress.step, total)
    run.cut_metrics(progress.step if last.exists() else -1)
    accelerator.wait_for_everyone()

    sampler = StepSampler(
        first=progress.step,
        last=total,
        images=images,
        batch_size=optimisation.batch_size,
        repeats=data.repeats,
        seed=runtime.seed,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        accumulation=runtime.gradient_accumulation,
    )
    loader = training_loader(
        data.training,
        sampler,
        num_workers=choose_workers(runtime, accelerator.device),
        pin_memory=accelerator.device.type == "cuda",
    )
    metrics = MetricsWriter(run, progress.step)
    saved_at = time.monotonic()

    def evaluate() -> None:
        values = task.evaluate(data.held_out, data.bank, accelerator.device)  # in fp32, whatever the training does
        metrics.write(progress.step, "held_out", {"epoch": progress.step / per_epoch, **values})
        logger.info("held out, step %d: %s", progress.step, "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
        name, lower = task.score
        score = values[name] if lower else -values[name]
        if not math.isfinite(score):
            raise UserError("held-out loss", f"{values[name]} at step {progress.step}", _NOT_FINITE)
        if progress.step > 0 and (progress.best_score is None or score < progress.best_score):
            progress.best_score, progress.best_step = score, progress.step
            if run.writes:
                save_model_folder(task.backbone, run.model)
                run.write_evaluation({"step": progress.step, **values})
            save_checkpoint(run.checkpoints / "best.pt", model, raw_optimizer, progress, writes=run.writes)

    def save() -> None:
        nonlocal saved_at
        save_checkpoint(last, model, raw_optimizer, progress, writes=run.writes)
        saved_at = time.monotonic()

    line = ProgressLine(title, first=progress.step, total=total, shown=accelerator.is_main_process)
    clock = _Clock(optimisation.batch_size)
    try:
        if progress.step == 0:
            evaluate()
        task.train()
        with line, _StopRequest() as stop:
            batches = iter(loader)
            clock.start()
            while progress.step < total:
                schedule.step_update(progress.step)
                # Drop path: one stream per step and process, so that nothing random has to be saved.
                torch.manual_seed(_step_seed(runtime.seed, progress.step, accelerator.process_index))
                terms, waited = _optimise(model, optimizer, batches, optimisation, runtime, accelerator, progress.step)
                progress.step += 1
                speed = clock.tick(waited)
                if progress.step % runtime.log_every == 0 or progress.step in (1, total):
                    learning_rate = max(group["lr"] for group in raw_optimizer.param_groups)
                    values = {"epoch": progress.step / per_epoch, **terms, "learning_rate": learning_rate}
                    metrics.write(progress.step, "train", {**values, **speed, "memory_gib": _memory_gib(accelerator.device)})
                shown = {name: speed[name] for name in ("images_per_second", "data_wait")}
                line.update(progress.step, loss=terms["loss"], **shown)
                epochs, beyond = divmod(progress.step, per_epoch)
                if progress.step == total or (beyond == 0 and epochs % runtime.evaluate_every == 0):
                    with clock.paused():
                        evaluate()
                        save()
                elif beyond == 0 or _agree(accelerator, time.monotonic() - saved_at > 60 * runtime.checkpoint_minutes):
                    save()
                if stop.requested:
                    if accelerator.num_processes == 1:  # the others may be a step behind, and saving needs all of them
                        save()
                    logger.info("stopped after step %d; the same command goes on from the last checkpoint", progress.step)
                    raise KeyboardInterrupt
    finally:
        metrics.close()
        if run.writes:
            SkippedList(run.skipped).tidy()
    logger.info("%s: done, %d steps, the last %d in %s", title, total, clock.steps, duration(clock.elapsed))
    accelerator.wait_for_everyone()
    return run.read_evaluation()


class _Clock:
    """Speed and data wait since the loop began."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.steps, self.waited = 0, 0.0
        self.start()

    def start(self) -> None:
        self.started = self.last = time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave something out of the speed: an evaluation."""
        before = time.perf_counter()
        yield
        pause = time.perf_counter() - before
        self.started, self.last = self.started + pause, self.last + pause

    def tick(self, waited: float) -> dict[str, float]:
        """Count a step: its seconds, images per second and share of time spent waiting for data, both over the loop."""
        now = time.perf_counter()
        self.steps += 1
        self.waited += waited
        step_seconds, self.last = now - self.last, now
        elapsed = max(now - self.started, 1e-9)
        speed = self.steps * self.batch_size / elapsed
        return {"step_seconds": step_seconds, "images_per_second": speed, "data_wait": self.waited / elapsed}


def choose_workers(runtime: RuntimeConfig, device: torch.device) -> int:
    """Loader processes: those asked for; else none on a CPU, which is busy computing, and up to eight beside a GPU."""
    if runtime.num_workers is not None:
        return runtime.num_workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def _optimise(
    model: nn.Module,
    optimizer: Any,
    batches: Iterator[dict[str, torch.Tensor]],
    optimisation: OptimisationConfig,
    runtime: RuntimeConfig,
    accelerator: Accelerator,
    step: int,
) -> tuple[dict[str, float], float]:
    """One optimisation step; returns the loss and its terms over the global batch, and seconds waited for data."""
    parts = runtime.gradient_accumulation
    sums: dict[str, torch.Tensor] = {}
    waited = 0.0
    for part in range(parts):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        syncing = contextlib.nullcontext() if part == parts - 1 else accelerator.no_sync(model)
        with syncing:
            output = model(to_device(batch, accelerator.device))
            accelerator.backward(output.loss / parts)
        for name, value in {"loss": output.loss.detach(), **output.terms}.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.float() / parts
    together = accelerator.reduce(torch.stack(list(sums.values())), reduction="mean").tolist()
    values = dict(zip(sums, together, strict=True))
    for name, value in reversed(values.items()):
        if not math.isfinite(value):
            raise UserError("loss", f"{name} = {value} at step {step + 1}", _NOT_FINITE)
    if optimisation.clip_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), optimisation.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return values, waited


def _step_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _agree(accelerator: Accelerator, wish: bool) -> bool:
    """The first process's wish, in every process: clocks differ, collective calls must not."""
    if accelerator.num_processes == 1:
        return wish
    flag = torch.tensor([int(wish and accelerator.is_main_process)], device=accelerator.device)
    return bool(accelerator.reduce(flag, reduction="sum").item())


def _memory_gib(device: torch.device) -> float:
    """The most allocated so far on a GPU; elsewhere what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


class _StopRequest:
    """Ctrl-C and SIGTERM (batch systems) end the run between two steps; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        logger.info("stopping after this step")

    def __enter__(self) -> "_StopRequest":
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
