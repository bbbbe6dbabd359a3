"""Evaluations shared by several processes: each takes every n-th picture, and exact sums go round."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def own_share(numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Every n-th of the pictures, from this process's place on; all of them in a single process."""
    there = dist.is_available() and dist.is_initialized()
    return np.asarray(numbers)[dist.get_rank() :: dist.get_world_size()] if there else np.asarray(numbers)


def sum_over_processes(counts: Tensor, device: torch.device) -> Tensor:
    """The sum of every process's counts, on the CPU; ``device`` is where the processes can speak to each other."""
    if not (dist.is_available() and dist.is_initialized()):
        return counts.cpu()
    moved = counts.to(device, torch.float32 if device.type == "mps" else counts.dtype)
    dist.all_reduce(moved)
    return moved.to("cpu", counts.dtype)
