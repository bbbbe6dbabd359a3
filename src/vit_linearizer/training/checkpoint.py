"""Checkpoints: written aside and renamed, read as tensors only, the same for one process and many.

Model and optimiser go through torch's distributed state-dict functions, so DDP and sharded (FSDP2) runs leave the same
files. There is no random state to keep: every random choice of a run is a function of its seed and step.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ..contracts import UserError

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
#: The optimiser holds nothing for a parameter that never had a gradient (the final norm under activation matching alone).
_OPTIMIZER = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


@dataclass(kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        stage: 0-based number of the stage that these steps belong to last.
        step: optimisation steps done, over all stages.
        best_score: score of the stage's best weights so far, None before the first evaluation.
        best_step: step of those weights.
    """

    stage: int = 0
    step: int = 0
    best_score: float | None = None
    best_step: int = 0


def save_checkpoint(file: Path, model: nn.Module, optimizer: Optimizer, progress: Progress, *, writes: bool) -> None:
    """Write model, optimiser and progress; every process takes part, one writes."""
    content = {
        "model": get_model_state_dict(model, options=_FULL),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=_FULL),
        "progress": vars(progress),
    }
    if writes:
        fresh = file.with_name(file.name + ".new")
        with fresh.open("wb") as opened:
            torch.save(content, opened)
            opened.flush()
            os.fsync(opened.fileno())
        fresh.replace(file)


class Checkpoint:
    """A checkpoint that has been read, to be put into model and optimiser.

    Args:
        file: as `save_checkpoint` left it.

    Attributes:
        progress: where that run stood.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self._content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            self.progress = Progress(**self._content["progress"])
        except Exception as error:  # torch raises several kinds for damaged archives
            raise self._unreadable(error) from error

    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Set model and optimiser in place.

        Raises:
            UserError: it belongs to another model.
        """
        try:
            set_model_state_dict(model, self._content["model"], options=_FULL)
            set_optimizer_state_dict(model, optimizer, self._content["optimizer"], options=_OPTIMIZER)
            self._content = {}  # three times the weights; this object lives as long as the run
        except Exception as error:  # and for foreign tensors
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> UserError:
        detail = " ".join(str(error).split())[:200]
        return UserError("checkpoint", self.file, f"cannot be read ({detail}); use --resume never to start over")
