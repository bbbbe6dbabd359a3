"""The kernels around the scan pass the compiler for Hopper GPUs, which no GPU is needed for, and load 16 bytes at once.

The interpreter forgives what the compiler does not: types that change in a loop, values that must be constants.
"""

import re

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from vit_linearizer.ops.gpu import conv, from_reading_order, gate_norm, swiglu
from vit_linearizer.ops.gpu import reading_order as order

BATCH, LENGTH, DIM, INNER, STATE = 2, 66, 768, 1536, 64


class Compiler:
    """Stands for a kernel: compiles it for what it is called with, as Triton's launcher would, and does not run it."""

    def __init__(self, kernel, compiled: dict):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, num_warps=4, enable_fp_fusion, **constants):
        signature, attributes = {}, {}
        names = self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False)) | constants
        for position, name in enumerate(names):
            value = values[name]
            if name in constants or value is None or (type(value) is int and value == 1):
                constants[name], signature[name] = value, "constexpr"
                continue
            signature[name] = mangle_type(value)
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if type(number) is int and number % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.compiled[f"{self.kernel.__module__.split('.')[-1]}.{self.kernel.__name__}"] = done.asm["ptx"]


@pytest.fixture
def compiled(monkeypatch) -> dict[str, str]:
    """PTX by kernel, for whatever is launched."""
    programs: dict[str, str] = {}
    for module in (conv, from_reading_order, gate_norm, order, swiglu):
        for name in ("_forward", "_backward", "_mean"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Compiler(getattr(module, name), programs))
    return programs


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def widths(ptx: str, what: str) -> set[int]:
    """Bytes that a thread loads or stores at once."""
    found = re.findall(rf"{what}\.global\S*?(?:\.v(\d))?\.[bf](\d+)", ptx)
    return {int(count or 1) * int(bits) // 8 for count, bits in found}


def test_convolution(compiled):
    columns = 2 * INNER + 2 * STATE + INNER // 64
    x = zeros(BATCH, LENGTH, columns)[..., INNER : 2 * INNER + 2 * STATE]
    weight, bias = zeros(x.shape[-1], 1, 4, dtype=torch.float32), zeros(x.shape[-1], dtype=torch.float32)
    conv.conv_silu_forward(x, weight, bias)
    conv.conv_silu_backward(zeros(*x.shape), x, weight, bias, x)
    assert 16 in widths(compiled["conv._forward"], "ld")
    assert widths(compiled["conv._forward"], "st") == {16}
    assert 16 in widths(compiled["conv._backward"], "ld")
    assert 16 in widths(compiled["conv._backward"], "st")
    conv.conv_silu_backward(zeros(1, 1, 1), zeros(1, 1, 1), zeros(1, 1, 2), None, zeros(1, 1, 1))


def test_gated_norm(compiled):
    z = zeros(BATCH, LENGTH, 3224)[..., :INNER]
    y, weight, scale = zeros(*z.shape), zeros(INNER, dtype=torch.float32), zeros(BATCH * LENGTH, dtype=torch.float32)
    gate_norm.gate_norm_forward(y, z, weight, 1e-5)
    gate_norm.gate_norm_backward(y, y, z, weight, scale, z)
    for name in ("_forward", "_backward"):
        assert 16 in widths(compiled[f"gate_norm.{name}"], "ld")
        assert 16 in widths(compiled[f"gate_norm.{name}"], "st")
    gate_norm.rms_norm_forward(y, weight, 1e-5)
    gate_norm.rms_norm_backward(y, y, weight, scale)
    gate_norm.rms_norm_backward(y[0, 0, :1], y[0, 0, :1], weight[:1], scale[:1])


def test_swiglu(compiled):
    gate = zeros(BATCH * LENGTH, 1920)
    swiglu.silu_mul_forward(gate, gate)
    swiglu.silu_mul_backward(gate, gate, gate)
    assert all(widths(ptx, what) == {16} for ptx in compiled.values() for what in ("ld", "st"))
    swiglu.silu_mul_backward(gate[:1, :1], gate[:1, :1], gate[:1, :1])


@pytest.mark.parametrize("flip", [False, True])
def test_reading_order(compiled, flip):
    x, longer, weight = zeros(BATCH, LENGTH, DIM), zeros(BATCH, LENGTH + 1, DIM), zeros(DIM, dtype=torch.float32)
    scale = zeros(BATCH, LENGTH, dtype=torch.float32)
    order.norm_to_reading_order_forward(x, weight, 1e-5, flip)
    order.norm_to_reading_order_backward(longer, x, weight, scale, flip, x)
    from_reading_order.add_and_norm_forward(x, longer, weight, 1e-5, flip)
    from_reading_order.add_and_norm_backward(x, x, x, weight, scale, flip)
    for name, ptx in compiled.items():
        if not name.endswith("_mean"):
            assert 16 in widths(ptx, "ld"), name
            assert 16 in widths(ptx, "st"), name
    order.to_reading_order_forward(x, flip)
    order.to_reading_order_backward(longer, flip)
    from_reading_order.add_from_reading_order_forward(x, longer, flip)
    from_reading_order.add_from_reading_order_backward(x, flip)
    order.to_reading_order_forward(x[:1, :1, :1], flip)
    order.to_reading_order_backward(longer[:1, :2, :1], flip)
    from_reading_order.add_from_reading_order_backward(x[:1, :1, :1], flip)


def test_reading_order_under_autocast(compiled):
    """Residual stream in fp32, what linear layers take and give in bf16."""
    x, longer, weight = zeros(BATCH, LENGTH, DIM, dtype=torch.float32), zeros(BATCH, LENGTH + 1, DIM), zeros(DIM).float()
    scale, low = zeros(BATCH, LENGTH, dtype=torch.float32), zeros(BATCH, LENGTH, DIM)
    order.norm_to_reading_order_forward(x, weight, 1e-5, True, torch.bfloat16)
    order.norm_to_reading_order_backward(longer, x, weight, scale, True)
    from_reading_order.add_and_norm_forward(x, longer, weight, 1e-5, True, torch.bfloat16)
    from_reading_order.add_and_norm_backward(x, low, x, weight, scale, True, torch.float32, torch.bfloat16)
    for name, ptx in compiled.items():
        if not name.endswith("_mean"):
            assert 16 in widths(ptx, "ld"), name
            assert 16 in widths(ptx, "st"), name
