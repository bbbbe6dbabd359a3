"""What runs where: accelerate's view of this machine, what ``auto`` means on it, and how it asks a program to end."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from ..contracts import UserError
from .config import RuntimeConfig

logger = logging.getLogger("vit_linearizer")


def choose_device(device: str) -> torch.device:
    """The device that ``--device`` means: ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: it is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(device):
        raise UserError("--device", device, "not available here; use auto or cpu (vit-linearizer doctor tells why)")
    return torch.device(device)


def make_accelerator(runtime: RuntimeConfig) -> Accelerator:
    """accelerate's view of this machine.

    Raises:
        UserError: the device asked for is not there, or cannot do the precision asked for.
    """
    device = choose_device(runtime.device).type
    precision = choose_precision(device)[0] if runtime.precision == "auto" else runtime.precision
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process may have used another
    try:
        accelerator = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=runtime.device == "cpu")
    except ValueError as error:
        raise UserError("--precision", precision, f"cannot be had here ({error}); use fp32") from error
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        remedy = "sharded training is not supported yet; launch without it (data parallel)"
        raise UserError("accelerate", accelerator.distributed_type.value, remedy)
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


def choose_workers(runtime: RuntimeConfig, device: torch.device) -> int:
    """Loader processes: those asked for; else none on a CPU, which is busy computing, and up to eight beside a GPU."""
    if runtime.num_workers is not None:
        return runtime.num_workers
    return 0 if device.type == "cpu" else min(8, os.cpu_count() or 1)


def memory_gib(device: torch.device) -> float:
    """The most allocated so far on a GPU; elsewhere what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: what is done is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
