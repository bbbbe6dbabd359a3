"""Which picture stands where in which batch: a pure function of (seed, epoch, step), so that a run can go on anywhere.

Nothing here has a state to save. Every process computes the same global batch and takes its own share, so two processes
see exactly what one would, and a resumed run what an uninterrupted one would.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One use of the picture in a place of the training set: all that its view and mask depend on, besides the seed."""

    epoch: int
    place: int
    repeat: int


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches that show ``images`` draws; the last one is filled up with further draws."""
    return math.ceil(images / batch_size)


@lru_cache(maxsize=2)
def _order(images: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(images)


def global_batch(step: int, *, images: int, batch_size: int, repeats: int, seed: int) -> list[Draw]:
    """The draws of one optimisation step, over all processes and accumulation steps.

    Args:
        step: 0-based step of the whole run.
        images: pictures to draw from.
        batch_size: global batch.
        repeats: repeated augmentation: each picture is drawn so many times in a row, and an epoch, still ``images`` draws
            long, shows a share of one over ``repeats`` of the pictures (as in the DeiT recipes; the paper's table 8 names
            repeated augmentation without a number).
        seed: of the run.
    """
    epoch, within = divmod(step, steps_per_epoch(images, batch_size))
    order = _order(images, seed, epoch)
    places = range(within * batch_size, (within + 1) * batch_size)
    return [
        Draw(epoch, int(order[place // repeats % images]), place % repeats + repeats * (place // (repeats * images)))
        for place in places
    ]


class StepSampler(Sampler[list[Draw]]):
    """Batch sampler of one process: for every step from ``first`` to ``last``, its share in ``accumulation`` parts.

    Args:
        first: step to begin with.
        last: step to stop before.
        images: see `global_batch`, as ``batch_size``, ``repeats`` and ``seed``.
        process: number of this process.
        processes: how many there are; with ``accumulation`` it must divide ``batch_size``.
        accumulation: parts of a process's share.
    """

    def __init__(
        self,
        *,
        first: int,
        last: int,
        images: int,
        batch_size: int,
        repeats: int,
        seed: int,
        process: int = 0,
        processes: int = 1,
        accumulation: int = 1,
    ):
        if batch_size % (processes * accumulation):
            raise ValueError(f"batch {batch_size} does not divide by {processes} processes x {accumulation} accumulations")
        self.steps = range(first, last)
        self.draw_arguments = dict(images=images, batch_size=batch_size, repeats=repeats, seed=seed)
        self.process, self.processes, self.accumulation = process, processes, accumulation

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in self.steps:
            mine = global_batch(step, **self.draw_arguments)[self.process :: self.processes]
            size = len(mine) // self.accumulation
            for part in range(self.accumulation):
                yield mine[part * size : (part + 1) * size]
