"""The one training loop: every task, every recipe, one process or many.

A step is a function of (seed, step): its images, crops and masks (data/sampler.py), its drop path (seeded below) and its
learning rate. So a run can be stopped anywhere and goes on bit for bit from its last checkpoint.
"""

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from ..contracts import UserError
from ..data.datasets import SkippedList, to_device, training_loader
from ..data.sampler import StepSampler, steps_per_epoch
from ..tasks import Task
from .checkpoint import Checkpoint, Progress, save_checkpoint
from .config import OptimisationConfig, RuntimeConfig
from .data import TrainingData
from .machine import choose_workers, memory_gib
from .optimiser import intervals, make_optimizer, make_schedule, total_steps
from .progress import ProgressLine, duration
from .run_folder import MetricsWriter, RunFolder

logger = logging.getLogger("vit_linearizer")

_NOT_FINITE = "not finite; the last good checkpoint is kept; try a lower --learning-rate or --precision fp32"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: what is done, in every line of the metrics.
        task: what is trained; the tasks of a run's stages share their backbone.
        optimisation: how long and how.
    """

    name: str
    task: Task
    optimisation: OptimisationConfig


def train(
    stages: Sequence[Stage],
    data: TrainingData,
    runtime: RuntimeConfig,
    run: RunFolder,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Train one task after another, leaving checkpoints, metrics and the last stage's best weights in the run folder.

    Steps are counted over all stages; each begins with the weights that the one before ended with.

    Returns:
        Metrics of the weights in ``model/``.

    Raises:
        UserError: a loss that is not finite; the last good checkpoint stays.
    """
    images = len(data.training)  # type: ignore[arg-type]  # it has a length
    last = run.checkpoints / "last.pt"
    accelerator.wait_for_everyone()  # until the first process has removed what is not to be gone on with
    checkpoint = Checkpoint(last) if last.exists() else None
    resumed = checkpoint.progress if checkpoint is not None else Progress(step=-1)
    run.cut_metrics(resumed.step, [stage.name for stage in stages[: resumed.stage + 1]])
    accelerator.wait_for_everyone()
    first = 0
    for number, stage in enumerate(stages):
        end = first + total_steps(stage.optimisation, images)
        if number >= resumed.stage:
            going_on = checkpoint if number == resumed.stage else None
            if len(stages) > 1 and resumed.step < end:
                logger.info("stage %d of %d: %s", number + 1, len(stages), stage.name)
            progress = going_on.progress if going_on is not None else Progress(stage=number, step=first)
            _train_stage(stage, progress, first, end, going_on, data, runtime, run, accelerator)
            accelerator.free_memory()  # and the hooks that distributed training put on the backbone
        first = end
    return run.read_evaluation()


def _train_stage(
    stage: Stage,
    progress: Progress,
    first: int,
    end: int,
    checkpoint: Checkpoint | None,
    data: TrainingData,
    runtime: RuntimeConfig,
    run: RunFolder,
    accelerator: Accelerator,
) -> None:
    """Steps ``first`` to ``end`` of the run, or what is left of them."""
    task, optimisation = stage.task, stage.optimisation
    images = len(data.training)  # type: ignore[arg-type]  # it has a length
    per_epoch = steps_per_epoch(images, optimisation.batch_size)
    evaluate_steps, save_steps = intervals(optimisation, runtime, images)
    task.begin(accelerator.device)
    if runtime.gradient_checkpointing:
        task.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    if runtime.compile:
        task.compile_blocks()
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(task)  # in place; on a CPU it does not run
    optimizer = make_optimizer(task, optimisation)
    schedule = make_schedule(optimizer, optimisation, images)
    if not task.uses_every_parameter:
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    model, optimizer = accelerator.prepare(task, optimizer)
    raw_optimizer = getattr(optimizer, "optimizer", optimizer)
    if checkpoint is not None:
        checkpoint.restore(model, raw_optimizer)
        logger.info("resumed at step %d of %d", progress.step - first, end - first)

    last = run.checkpoints / "last.pt"
    sampler = StepSampler(
        first=progress.step,
        last=end,
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
    metrics = MetricsWriter(run, stage.name, progress.step)
    saved_at = time.monotonic()

    def evaluate() -> None:
        if accelerator.num_processes > 1:
            for buffer in task.buffers():  # norms' statistics, which each process has of its own share
                torch.distributed.broadcast(buffer, src=0)
        with torch.compiler.set_stance("force_eager"):  # its shapes and modes would each be compiled anew
            values = task.evaluate(data.held_out, data.bank, accelerator.device)  # in fp32, whatever the training does
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        metrics.write(progress.step, "held_out", {"epoch": progress.step / per_epoch, **numbers})
        logger.info("held out, step %d: %s", progress.step, "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        name, lower = task.score
        score = values[name] if lower else -values[name]
        if not math.isfinite(score):
            raise UserError(f"held-out {name}", f"{values[name]} at step {progress.step}", _NOT_FINITE)
        if progress.step > first and (progress.best_score is None or score <= progress.best_score):  # of equals the latest
            progress.best_score, progress.best_step = score, progress.step
            if run.writes:
                task.save(run.model)
                run.write_evaluation({"step": progress.step, "stage": stage.name, **values})
            save_checkpoint(run.checkpoints / "best.pt", model, raw_optimizer, progress, writes=run.writes)

    def save() -> None:
        nonlocal saved_at
        save_checkpoint(last, model, raw_optimizer, progress, writes=run.writes)
        saved_at = time.monotonic()

    line = ProgressLine(
        stage.name,
        first=progress.step - first,
        total=end - first,
        shown=accelerator.is_main_process,
        hint=_wait_hint(data, accelerator.device),
    )
    clock = _Clock(optimisation.batch_size)
    try:
        if progress.step == first:
            evaluate()
        task.train()
        with line, _StopRequest() as stop:
            batches = iter(loader)
            clock.start()
            while progress.step < end:
                schedule.step_update(progress.step - first)
                # Drop path: one stream per step and process, so that nothing random has to be saved.
                torch.manual_seed(_step_seed(runtime.seed, progress.step, accelerator.process_index))
                terms, waited = _optimise(model, optimizer, batches, optimisation, runtime, accelerator, progress.step, stop)
                progress.step += 1
                speed = clock.tick(waited)
                if progress.step % runtime.log_every == 0 or progress.step in (first + 1, end):
                    learning_rate = max(group["lr"] for group in raw_optimizer.param_groups)
                    values = {"epoch": progress.step / per_epoch, **terms, "learning_rate": learning_rate}
                    metrics.write(progress.step, "train", {**values, **speed, "memory_gib": memory_gib(accelerator.device)})
                shown = {name: speed[name] for name in ("images_per_second", "data_wait")}
                line.update(progress.step - first, loss=terms["loss"], **shown)
                if progress.step == end or (progress.step - first) % evaluate_steps == 0:
                    with clock.paused():
                        evaluate()
                        save()
                elif (progress.step - first) % save_steps == 0 or _agree(
                    accelerator, time.monotonic() - saved_at > 60 * runtime.checkpoint_minutes
                ):
                    save()
                if stop.agreed:
                    save()
                    logger.info("stopped after step %d; the same command goes on from the last checkpoint", progress.step)
                    raise KeyboardInterrupt
    finally:
        metrics.close()
        if run.writes:
            SkippedList(run.skipped).tidy()
    logger.info("%s: done, %d steps, the last %d in %s", stage.name, end - first, clock.steps, duration(clock.elapsed))
    accelerator.wait_for_everyone()


def _wait_hint(data: TrainingData, device: torch.device) -> str:
    """What to try when the loop waits for data."""
    spared = data.colours_in_loader and device.type == "cuda"
    return "more --num-workers" + (", or in a new run --device-augmentation" if spared else "")


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


def _optimise(
    model: nn.Module,
    optimizer: Any,
    batches: Iterator[dict[str, torch.Tensor]],
    optimisation: OptimisationConfig,
    runtime: RuntimeConfig,
    accelerator: Accelerator,
    step: int,
    stop: "_StopRequest",
) -> tuple[dict[str, float], float]:
    """One optimisation step.

    Returns:
        The loss and its terms over the global batch with the gradient's norm, and seconds waited for data.
    """
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
    sums["stop"] = torch.tensor(float(stop.requested), device=accelerator.device)
    together = accelerator.reduce(torch.stack(list(sums.values())), reduction="mean").tolist()
    values = dict(zip(sums, together, strict=True))
    stop.agreed = values.pop("stop") > 0  # asked of any process, so that all stop after the same step
    if optimisation.clip_norm is not None:
        norm = accelerator.clip_grad_norm_(model.parameters(), optimisation.clip_norm)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    values = {"gradient_norm": float(norm), **values}
    for name, value in reversed(values.items()):
        if not math.isfinite(value):
            raise UserError("loss", f"{name} = {value} at step {step + 1}", _NOT_FINITE)
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


class _StopRequest:
    """Ctrl-C and SIGTERM (batch systems) end the run between two steps; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.requested = False  # of this process
        self.agreed = False  # over all processes, see `_optimise`
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
