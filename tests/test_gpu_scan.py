"""The GPU kernels of the scan: checked in Triton's interpreter everywhere, and on a GPU, there at full size too."""

import pytest
import torch
import torch.nn.functional as F

from gpu_interpreter import poison_new_memory, run_checks
from vit_linearizer.ops import ssd_chunked

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_kernels_in_the_interpreter():
    run_checks("check_scan.py")


def test_kernels_compile_for_hopper():
    run_checks("check_scan_compile.py", device="cuda")


@pytest.mark.gpu
@on_a_gpu
def test_kernels_on_the_device():
    run_checks("check_scan.py", device="cuda")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("batch", "length"), [(2, 2050), (1, 16385), (128, 198)])
def test_full_shapes_on_the_device(monkeypatch, batch, length):
    """24 heads of 64 with states of 64 in bf16, beside the plain scan in fp32."""
    from vit_linearizer.ops.gpu.scan import scan_forward
    from vit_linearizer.ops.gpu.scan_backward import scan_backward

    heads, size = 24, 64
    generator = torch.Generator("cuda").manual_seed(0)
    columns = torch.randn(batch, length, heads * size + 2 * size + heads, generator=generator, device="cuda")
    columns = columns.to(torch.bfloat16)
    x, B, C, dt_raw = columns.split([heads * size, size, size, heads], dim=-1)
    x, dt_raw = x.unflatten(-1, [heads, size]), dt_raw - 3
    dt_bias, D = torch.randn(2, heads, generator=generator, device="cuda")
    A_log = torch.linspace(0, 2.7, heads, device="cuda")
    gy = torch.randn(x.shape, generator=generator, device="cuda").to(torch.bfloat16)

    inputs = [t.float().requires_grad_() for t in (x, B, C, dt_raw, dt_bias, A_log, D)]
    dt = F.softplus(inputs[3] + inputs[4])
    want_y = ssd_chunked(inputs[0], dt, -torch.exp(inputs[5]), inputs[1], inputs[2], inputs[6])
    want = (want_y.detach(), *torch.autograd.grad(want_y, inputs, gy.float()))

    poison_new_memory(monkeypatch)
    y, states = scan_forward(x, B, C, dt_raw, dt_bias, A_log, D)
    got = (y, *scan_backward(gy, x, B, C, dt_raw, dt_bias, A_log, D, states))
    for name, g, w in zip(("y", "x", "B", "C", "dt_raw", "dt_bias", "A_log", "D"), got, want, strict=True):
        error = float((g.float() - w).norm() / w.norm())
        assert error < 2e-2, f"{name}: relative error {error:.1e}"
