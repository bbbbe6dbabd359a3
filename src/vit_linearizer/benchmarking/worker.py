"""The child: one case in a process of its own, so that its peak memory is its own.

It says when it has started, then reads lines and answers each with a line of JSON: the case first, ``go`` for each repeat,
``end``. Whatever else would be printed goes to stderr, which the parent keeps. It ends with its parent.
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import queue
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import psutil
import torch
import torch.nn.functional as F

from .. import ops
from ..models.loading import open_model
from .cases import attention_modules, build_arguments

_STATUS = Path("/proc/self/status")
_MIB = 2**20
#: A case that takes more than this share of the free memory gives it back while other cases run.
_MUCH = 1 / 8
#: How long a GPU is kept busy for one repeat.
_GPU_SECONDS = 0.05
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|bad_alloc|could not create a memory", re.I)


def main() -> None:
    """Serve one case."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which knows what to do
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    commands = _listen()
    _answer(answers, event="started")
    try:
        _serve(json.loads(commands.get()), commands, answers)
    except Exception as error:  # whatever a model may trip over becomes a row of the table
        if _is_out_of_memory(error):
            _answer(answers, event="out of memory")
        else:
            lines = str(error).strip().splitlines() or ["no message"]
            _answer(answers, event="failed", reason=f"{type(error).__name__}: {lines[0]}"[:300])


def _serve(case: dict[str, Any], commands: "queue.Queue[str]", answers: TextIO) -> None:
    torch.set_num_threads(case["threads"])
    meter = Meter(torch.device(case["device"]), case["memory_share"])
    meter.load_libraries(case["precision"])
    meter.limit()
    passes = Passes(case)
    model_mib = meter.settle()
    passes.run()
    if case["compile"] or meter.on_cuda:  # on a GPU kernels are compiled and tuned by the first pass, in memory of their own
        meter.forget_compiler(model_mib)
        passes.run()
    meter.keep_peak()
    passes.record()
    _answer(
        answers,
        event="ready",
        seconds=passes.seconds,
        memory_model_mib=model_mib,
        **({"cuda_graph": passes.graph is not None} if meter.on_cuda else {}),
    )
    passes.rest(meter)
    while commands.get() == "go":
        meter.limit()
        if meter.on_cuda:
            passes.run()  # fills the allocator's cache and wakes the clocks
            passes.record()
        passes.run()
        _answer(answers, event="repeat", seconds=passes.seconds)
        passes.rest(meter)
    _answer(answers, event="end", memory_peak_mib=meter.peak_mib())


class Passes:
    """Passes through the model of a case, forward or forward and backward; the last one took ``seconds``.

    On a GPU time is taken by its own events, over as many passes as fill a twentieth of a second, and a forward pass is
    replayed from a CUDA graph (`record`): the time of the device, without that of Python launching its kernels.
    """

    def __init__(self, case: dict[str, Any]):
        self.train, self.device, bf16 = case["train"], torch.device(case["device"]), case["precision"] == "bf16"
        torch.manual_seed(0)
        size = tuple(case["image_size"])
        arguments = build_arguments(size, case["patch_argument"])
        model = open_model(case["model"], field="--models", pretrained=False, **arguments).train(self.train)
        for module in attention_modules(model):
            module.fused_attn = case["attention"] == "fused"
        # Training keeps its weights in fp32, under autocast; inference has them in the precision itself.
        dtype = torch.bfloat16 if bf16 and not self.train else torch.float32
        self.autocast = bf16 and self.train
        self.model: Any = model.to(self.device, dtype).requires_grad_(self.train)
        if case["compile"]:
            self.model = torch.compile(self.model)
        self.images = torch.randn(case["batch_size"], 3, *size).to(self.device, dtype)
        self.seconds = 0.0
        self.graph: torch.cuda.CUDAGraph | None = None

    def record(self) -> None:
        """Put the forward pass into a CUDA graph, where there is one to be had."""
        if self.device.type != "cuda" or self.train or self.graph is not None:
            return
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._pass()
            self.graph = graph
        except RuntimeError:  # a model whose kernels ask the CPU; it is timed as it is launched
            torch.cuda.synchronize()

    def rest(self, meter: "Meter") -> None:
        """Others run now; a recorded graph would keep its memory from them."""
        if meter.takes_much():
            self.graph = None
            meter.give_back()

    def run(self) -> None:
        if self.device.type == "cuda":
            self._run_on_cuda()
            return
        self._synchronize()
        started = time.perf_counter()
        self._pass()
        self._synchronize()
        self.seconds = time.perf_counter() - started

    def _run_on_cuda(self) -> None:
        count = max(1, min(1000, math.ceil(_GPU_SECONDS / self.seconds))) if self.seconds else 1
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            if self.graph is not None:
                self.graph.replay()
            else:
                self._pass()
        end.record()
        torch.cuda.synchronize()
        self.seconds = start.elapsed_time(end) / 1e3 / count

    def _pass(self) -> None:
        if self.train:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.model(self.images).float().square().mean()
            loss.backward()
            self.model.zero_grad()
        else:
            with torch.inference_mode():
                self.model(self.images)

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


class Meter:
    """The memory of this process beyond what Python and its libraries take, and a limit to it.

    On a GPU that is the device's memory, elsewhere the process's own.
    """

    def __init__(self, device: torch.device, share: float):
        self.device, self.share, self.on_cuda = device, share, device.type == "cuda"
        self.free = torch.cuda.mem_get_info()[0] if self.on_cuda else psutil.virtual_memory().available
        self.baseline = 0
        self.kept_peak: float | None = None

    def load_libraries(self, precision: str) -> None:
        """What loads on first use (math libraries, a kernel of our own) is not the model's either."""
        ops.choose_mixer(self.device)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        few = torch.zeros(1, 1, 8, 8, device=self.device, dtype=dtype)
        F.linear(F.conv2d(few, few), few[0, 0, :, :1])
        gc.collect()
        _trim()
        self.baseline = 0 if self.on_cuda else _resident()

    def limit(self) -> None:
        """Let allocations beyond most of the free memory fail, before the machine runs out of it."""
        if not sys.platform.startswith("linux"):
            return
        # Should it come to the kernel's choice after all, it is to be this process and no other.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
        if self.device.type == "cpu":  # drivers of GPUs reserve addresses without end
            import resource

            most = psutil.Process().memory_info().vms + int(self.share * psutil.virtual_memory().available)
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def settle(self) -> float:
        """Give back what building left over, and count the peak from here; returns the MiB held now."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / _MIB
        _trim()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return (_resident() - self.baseline) / _MIB

    def forget_compiler(self, model_mib: float) -> None:
        """What the compiler left behind in this process is not the model's, which held ``model_mib`` before it came."""
        held = self.settle()
        if not self.on_cuda:
            self.baseline += int((held - model_mib) * _MIB)

    def takes_much(self) -> bool:
        """Whether this case should give memory back while others run."""
        return self.peak_mib() * _MIB > _MUCH * self.free

    def give_back(self) -> None:
        """Free memory, to the device or the system."""
        if self.on_cuda:
            torch.cuda.empty_cache()
        else:
            _trim()

    def keep_peak(self) -> None:
        """A CUDA graph holds memory of its own, which is not the model's."""
        if self.on_cuda:
            self.kept_peak = self.peak_mib()

    def peak_mib(self) -> float:
        if self.kept_peak is not None:
            return self.kept_peak
        if self.on_cuda:
            return torch.cuda.max_memory_allocated() / _MIB
        return (_peak() - self.baseline) / _MIB


def _resident() -> int:
    return psutil.Process().memory_info().rss


def _peak() -> int:
    """Bytes at the highest so far; on Linux since `Meter.settle`, elsewhere since the process began."""
    if _STATUS.exists():
        found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _trim() -> None:
    """Make the C library give freed memory back to the system, where it can."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _listen() -> "queue.Queue[str]":
    """The parent's lines as they come. Its end, however it came about, is the end of this process too."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line.strip())
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _answer(answers: TextIO, **content: Any) -> None:
    answers.write(json.dumps(content) + "\n")


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_NO_MEMORY.search(str(error)))


if __name__ == "__main__":
    main()
