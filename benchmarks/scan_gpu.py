"""The scan of Mamba-2 on a GPU, forward and backward: ours in Triton, the plain one, compiled, and flash-linear-attention's.

    python benchmarks/scan_gpu.py --precision bf16

Shapes are those of Adventurer-B/16. flash-linear-attention is measured where it is installed (`pip install
'vit-linearizer[gpu]'`); its kernel takes no group, so keys and values are expanded to the heads outside the timing. Prints
medians by CUDA events, and the floor: bytes that must be read and written over what copying a large tensor reaches.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from figures import show
from torch import Tensor

from vit_linearizer.contracts import UserError
from vit_linearizer.ops.ssd_chunked import ssd_plain

HEADS, SIZE = 24, 64


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(str(UserError("device", "cuda", "no CUDA device here; run this on a machine with one")))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[ARGUMENTS.precision]
    rows = []
    for batch, length in ARGUMENTS.shapes:
        x, B, C, dt_raw, dt_bias, A_log, D = tensors(batch, length, dtype)
        floor = 1e3 * bytes_of(x, B, C, dt_raw, x) / bandwidth()
        medians: dict[str, tuple[float, float]] = {}
        for name, make in CANDIDATES.items():
            try:
                forward, inputs = make(x, B, C, dt_raw, dt_bias, A_log, D)
            except ImportError:
                continue
            both = functools.partial(differentiate, forward, inputs, torch.randn_like(x))
            medians[name] = milliseconds(forward), milliseconds(both)
        for name, (forward_ms, both_ms) in medians.items():
            rows.append(
                {
                    "shape": f"{batch} x {length}",
                    "what": name,
                    "forward ms": round(forward_ms, 3),
                    "with backward ms": round(both_ms, 3),
                    "over ours": round(both_ms / medians["triton"][1], 2),
                    "forward's floor ms": round(floor, 3),
                }
            )
    title = f"The scan on a GPU, {HEADS} heads of {SIZE}, states of {SIZE}, {ARGUMENTS.precision}"
    command = f"python benchmarks/scan_gpu.py --precision {ARGUMENTS.precision}"
    show(title, command, rows, ARGUMENTS.out, device="cuda")


def differentiate(forward: Callable[[], Tensor], inputs: list[Tensor], g: Tensor) -> None:
    torch.autograd.grad(forward(), inputs, g)


def tensors(batch: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """What a mixer's convolution hands to its scan: views of one tensor."""
    columns = torch.randn(batch, length, HEADS * SIZE + 2 * SIZE + HEADS, device="cuda").to(dtype)
    x, B, C, dt_raw = columns.split([HEADS * SIZE, SIZE, SIZE, HEADS], dim=-1)
    dt_bias, D = torch.randn(2, HEADS, device="cuda") - 3
    return [x.unflatten(-1, (HEADS, SIZE)), B, C, dt_raw, dt_bias, torch.linspace(0, 2.7, HEADS, device="cuda"), D]


def ours(*given: Tensor) -> tuple[Callable[[], Tensor], list[Tensor]]:
    from vit_linearizer.ops.gpu.scan import scan_forward
    from vit_linearizer.ops.gpu.scan_backward import scan_backward

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            y, states = scan_forward(*inputs)
            ctx.save_for_backward(*inputs, states)
            return y

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
            return scan_backward(g, *ctx.saved_tensors)

    inputs = [t.detach().requires_grad_() for t in given]
    return lambda: Scan.apply(*inputs), inputs


def plain(*given: Tensor, compiled: bool = False) -> tuple[Callable[[], Tensor], list[Tensor]]:
    inputs = [t.detach().requires_grad_() for t in given]

    def run() -> Tensor:
        x, B, C, dt_raw, dt_bias, A_log, D = inputs
        dt = F.softplus(dt_raw.float() + dt_bias)
        return ssd_plain(x, dt, -torch.exp(A_log), B, C, D, at_once=False)

    return torch.compile(run) if compiled else run, inputs


def flash_linear_attention(*given: Tensor) -> tuple[Callable[[], Tensor], list[Tensor]]:
    from fla.ops.simple_gla import chunk_simple_gla

    x, B, C, dt_raw, dt_bias, A_log, D = given
    k, q = (t.unsqueeze(2).expand(-1, -1, HEADS, -1).contiguous().detach().requires_grad_() for t in (B, C))
    x, dt_raw, D = (t.detach().requires_grad_() for t in (x, dt_raw, D))

    def run() -> Tensor:
        dt = F.softplus(dt_raw.float() + dt_bias)
        v = x * dt.unsqueeze(-1).to(x.dtype)
        y, _ = chunk_simple_gla(q, k, v, g=-torch.exp(A_log) * dt, scale=1.0)
        return y + x * D.unsqueeze(-1).to(x.dtype)

    return run, [x, k, q, dt_raw, D]


CANDIDATES: dict[str, Callable[..., tuple[Callable[[], Tensor], list[Tensor]]]] = {
    "triton": ours,
    "plain": plain,
    "plain, compiled": lambda *given: plain(*given, compiled=True),
    "flash-linear-attention": flash_linear_attention,
}


def milliseconds(run: Callable[[], object]) -> float:
    """Median over repeats, by the device's own clock."""
    for _ in range(5):
        run()
    found = []
    for _ in range(ARGUMENTS.repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def bytes_of(*moved: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in moved)


def bandwidth() -> float:
    """Bytes a second that copying 1 GiB reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * milliseconds(lambda: target.copy_(source)))


def shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(1, 2050), (1, 8194), (1, 50178), (128, 198)])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", help="file for write_docs.py")
    ARGUMENTS = parser.parse_args()
    main()
