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
        step: optimisation steps done.
        best_score: score of the best weights so far, None before the first evaluation.
        best_step: step of those weights.
    """

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


def load_checkpoint(file: Path, model: nn.Module, optimizer: Optimizer) -> Progress:
    """Restore model and optimiser in place.

    Raises:
        UserError: the file is damaged or belongs to another model.
    """
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        set_model_state_dict(model, content["model"], options=_FULL)
        set_optimizer_state_dict(model, optimizer, content["optimizer"], options=_OPTIMIZER)
        return Progress(**content["progress"])
    except Exception as error:  # torch raises several kinds for damaged archives and foreign tensors
        detail = " ".join(str(error).split())[:200]
        raise UserError("checkpoint", file, f"cannot be read ({detail}); use --resume never to start over") from error
