"""The kernels of the scan pass the compiler for Hopper GPUs, which no GPU is needed for.

The interpreter forgives what the compiler does not: types that change in a loop, values that must be constants. Not
collected by itself: test_gpu_scan.py runs it.
"""

import contextlib

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from vit_linearizer.ops.gpu import scan, scan_backward, scan_states

KERNELS = (
    (scan_states, ("_steps_kernel", "_own_states_kernel", "_carry_kernel")),
    (scan, ("_outputs_kernel",)),
    (scan_backward, ("read_kernel", "reader_kernel", "_steps_backward_kernel")),
)


class Compiler:
    """Stands for a kernel: compiles it for what it is called with, as Triton's launcher would, and does not run it."""

    def __init__(self, kernel, compiled: dict):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, num_warps=4, **constants):
        kernel = self.kernel
        options = {"num_warps": num_warps, "enable_fp_fusion": constants.pop("enable_fp_fusion")}
        if hasattr(kernel, "configs"):
            config, kernel = kernel.configs[0], kernel.fn
            constants |= config.kwargs
            options |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
        signature, attributes = {}, {}
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        for position, name in enumerate(kernel.arg_names):
            value, free = values.get(name), name in scan_states.UNSPECIALISED
            if value is None or (type(value) is int and value == 1 and not free):
                constants.setdefault(name, value)
                signature[name] = "constexpr"
                continue
            signature[name] = mangle_type(value)
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if number % 16 == 0 and not free:
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        self.compiled[kernel.__name__] = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize(
    ("dtype", "length", "heads"),
    [(torch.bfloat16, 2050, 24), (torch.float32, 66, 1)],
    ids=["bf16", "fp32, one chunk"],
)
def test_kernels_compile(monkeypatch, dtype, length, heads):
    compiled: dict = {}
    for module, names in KERNELS:
        for name in names:
            monkeypatch.setattr(module, name, Compiler(getattr(module, name), compiled))
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    xBC = torch.zeros(2, length, (heads + 2) * 64, dtype=dtype)
    x, B, C = xBC.split([heads * 64, 64, 64], dim=-1)
    x = x.unflatten(-1, [heads, 64])
    dt_raw = torch.zeros(2, length, 7 + heads, dtype=dtype)[..., 7:]
    parameters = torch.zeros(3, heads).unbind()
    y, states = scan.scan_forward(x, B, C, dt_raw, *parameters)
    scan_backward.scan_backward(y, x, B, C, dt_raw, *parameters, states)
    between = {"_own_states_kernel", "_carry_kernel"} if length > scan_states.CHUNK else set()
    assert (
        set(compiled)
        == {"_steps_kernel", "_outputs_kernel", "read_kernel", "reader_kernel", "_steps_backward_kernel"} | between
    )
    for name, kernel in compiled.items():
        assert kernel.metadata.shared <= 160 * 1024, name
        if dtype == torch.bfloat16 and name in ("_own_states_kernel", "_outputs_kernel", "read_kernel", "reader_kernel"):
            assert "wgmma" in kernel.asm["ptx"], f"{name} does without Hopper's matrix units"
            assert "cp.async.cg.shared.global" in kernel.asm["ptx"], f"{name} copies less than 16 bytes at once"
