"""The GPU kernels of the scan against the recurrence in float64: outputs and all gradients.

Not collected by itself: test_gpu_scan.py runs it in Triton's interpreter, and on a GPU where there is one. In the former
numpy warns, and so fails, wherever an exponential overflows or infinities meet.
"""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F

from gpu_interpreter import DEVICE, poison_new_memory
from vit_linearizer.ops import ssd_reference
from vit_linearizer.ops.gpu import scan_backward as backward_module
from vit_linearizer.ops.gpu import scan_states
from vit_linearizer.ops.gpu.scan import scan_forward
from vit_linearizer.ops.gpu.scan_backward import scan_backward

NAMES = ("x", "B", "C", "dt_raw", "dt_bias", "A_log", "D")
#: The gradient of A_log sums terms of both signs over all tokens: in fp32 the plain scan loses up to eight times as much.
LEAST = {"A_log": 1e-3}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


def make_inputs(length, batch=1, heads=3, head_dim=16, state_dim=16, dtype=FP32, seed=0):
    """Inputs on the device as a mixer has them: x, B, C columns of one tensor, dt_raw of another; parameters in fp32."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator)
    inner = heads * head_dim
    xBC = normal(batch, length, inner + 2 * state_dim).to(DEVICE, dtype)
    zxbcdt = (normal(batch, length, 7 + heads) - 1).to(DEVICE, dtype)
    x, B, C = xBC.split([inner, state_dim, state_dim], dim=-1)
    parameters = (normal(heads), torch.log(1 + 15 * torch.rand(heads, generator=generator)), normal(heads))
    return [x.unflatten(-1, [heads, head_dim]), B, C, zxbcdt[..., 7:], *(p.to(DEVICE) for p in parameters)]


def reference(inputs, gy):
    """y and the gradients of the seven inputs, in float64 on the CPU."""
    inputs = [t.detach().cpu().double().requires_grad_() for t in inputs]
    x, B, C, dt_raw, dt_bias, A_log, D = inputs
    # A threshold would cut off what softplus adds to large arguments.
    dt = F.softplus(dt_raw + dt_bias, threshold=1e3)
    y = ssd_reference(x, dt, -torch.exp(A_log), B, C, D)
    return y.detach(), torch.autograd.grad(y, inputs, gy.cpu().double())


def check(inputs, *, chunk=scan_states.CHUNK, tolerance=2e-5, gy=None):
    """Outputs and gradients agree with the recurrence, each relative to its own size; returns the gradients."""
    x = inputs[0]
    if gy is None:
        gy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    y, states = scan_forward(*inputs, chunk=chunk)
    gradients = scan_backward(gy, *inputs, states, chunk=chunk)
    want_y, want_gradients = reference(inputs, gy)
    assert y.is_contiguous() and y.dtype == x.dtype
    assert states.shape == (x.shape[0], (x.shape[1] - 1) // chunk, x.shape[2], inputs[1].shape[2], x.shape[3])
    for name, got, want in zip(("y", *NAMES), (y, *gradients), (want_y, *want_gradients), strict=True):
        assert got.shape == want.shape, name
        error, size = float((got.cpu().double() - want).norm()), float(want.norm())
        assert error <= max(tolerance, LEAST.get(name, 0)) * size, f"{name}: error {error:.2e} for a norm of {size:.2e}"
    assert [g.dtype for g in gradients] == [x.dtype] * 3 + [inputs[3].dtype] + [FP32] * 3
    return gradients


@pytest.mark.parametrize(
    ("length", "batch", "heads", "head_dim", "state_dim"),
    [
        (1, 1, 1, 16, 16),
        (2, 3, 1, 16, 16),
        (15, 1, 3, 32, 64),
        (63, 3, 1, 16, 16),
        (64, 1, 3, 64, 64),
        (65, 3, 3, 16, 16),
        (128, 1, 1, 16, 32),
        (129, 1, 1, 64, 16),
        (130, 3, 1, 32, 64),
        (200, 1, 3, 64, 64),
        (100, 1, 1, 128, 128),
        (400, 1, 1, 16, 16),
    ],
)
def test_equals_the_recurrence(length, batch, heads, head_dim, state_dim):
    check(make_inputs(length, batch, heads, head_dim, state_dim))


@pytest.mark.parametrize(("chunk", "tile"), [(16, 16), (64, 64), (64, 16), (32, 32)])
def test_chunks_and_tiles_change_nothing(monkeypatch, chunk, tile):
    """Many chunks carry states; several tiles of a chunk read each other."""
    monkeypatch.setattr(scan_states, "TILE", tile)
    check(make_inputs(150, heads=2), chunk=chunk)


def test_a_program_takes_several_heads(monkeypatch):
    monkeypatch.setattr(backward_module, "_PROGRAMS", 1)
    check(make_inputs(70, heads=3), chunk=64)
    monkeypatch.setattr(backward_module, "_PROGRAMS", 4)  # two groups, of two heads and of one
    check(make_inputs(70, heads=3), chunk=64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(BF16, 1.5e-2), (FP16, 3e-3)])
@pytest.mark.parametrize("length", [65, 200])
def test_half_precision_loses_a_few_roundings(length, dtype, tolerance):
    check(make_inputs(length, heads=2, head_dim=32, state_dim=64, dtype=dtype), tolerance=tolerance)


def test_dt_and_parameters_of_other_dtypes():
    inputs = make_inputs(20)
    inputs[3] = inputs[3].to(BF16)
    inputs[4:] = [p.to(BF16) for p in inputs[4:]]
    gradients = reference(inputs, torch.ones_like(inputs[0]))[1]
    got = check(inputs, gy=torch.ones(()).to(DEVICE).expand(inputs[0].shape), tolerance=1e-2)
    for name, g, want in zip(NAMES[4:], got[4:], gradients[4:], strict=True):  # sums in fp32 all the same
        torch.testing.assert_close(g.cpu().double(), want, rtol=1e-4, atol=1e-4, msg=name)


def test_decays_that_underflow():
    inputs = make_inputs(150, heads=2)
    inputs[3] = inputs[3] + 20
    check(inputs, chunk=64)


def test_long_memory_and_sudden_forgetting():
    """a falls by hundreds at some tokens, and its differences between the others keep what fp32 holds of such sums."""
    inputs = make_inputs(150, heads=2)
    inputs[3] = inputs[3] - 8
    inputs[3][:, ::40] += 60
    check(inputs, chunk=64, tolerance=2e-3)


def test_tiny_steps_keep_their_digits():
    inputs = make_inputs(70, heads=2)
    inputs[3] = inputs[3] - 40
    inputs[6] = torch.zeros_like(inputs[6])
    check(inputs, chunk=64)


def test_any_strides():
    inputs = make_inputs(70, batch=2)
    x, B, C, dt_raw = inputs[:4]
    inputs[0] = x.transpose(1, 2).contiguous().transpose(1, 2)
    inputs[1] = B.transpose(1, 2).contiguous().transpose(1, 2)
    inputs[2] = C.flip(1).contiguous()[:, :, :1].expand(C.shape)
    inputs[3] = dt_raw.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    inputs[4:] = torch.stack(inputs[4:], dim=1).unbind(dim=1)
    gy = torch.randn(2, 3, 16, 70, generator=torch.Generator().manual_seed(1)).to(DEVICE).permute(0, 3, 1, 2)
    check(inputs, chunk=64, gy=gy)


def test_states_are_made_again_where_none_are_kept():
    inputs = make_inputs(150, heads=2)
    gy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y, states = scan_forward(*inputs, chunk=64)
    without, none = scan_forward(*inputs, chunk=64, keep_states=False)
    assert none is None and torch.equal(y, without)
    for name, kept, made in zip(
        NAMES,
        scan_backward(gy, *inputs, states, chunk=64),
        scan_backward(gy, *inputs, None, chunk=64),
        strict=True,
    ):
        assert torch.equal(kept, made), name


def test_states_are_those_of_the_recurrence():
    """Slot k is the state behind chunk k: read out by the next token with C = e_n, dt = 0 and D = 0 it is y."""
    inputs = make_inputs(49, heads=2)
    x, B, _, dt_raw, dt_bias, A_log, _ = (t.cpu().double() for t in inputs)
    _, states = scan_forward(*inputs, chunk=16)
    dt, A = F.softplus(dt_raw + dt_bias), -torch.exp(A_log)
    state = torch.zeros(1, 2, 16, 16, dtype=torch.float64)
    for t in range(48):
        update = torch.einsum("bh,bn,bhp->bhnp", dt[:, t], B[:, t], x[:, t])
        state = torch.exp(dt[:, t] * A)[:, :, None, None] * state + update
        if t % 16 == 15:
            torch.testing.assert_close(states[:, t // 16].cpu().double(), state, rtol=1e-4, atol=1e-5)


def test_gradients_go_into_views():
    inputs = make_inputs(70)
    gy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    _, states = scan_forward(*inputs)
    want = scan_backward(gy, *inputs, states)
    whole = torch.full((1, 70, 5 + 48 + 32 + 4 + 3), 9.0, device=DEVICE)
    edge, gx, gB, gC, other, gdt_raw = whole.split([5, 48, 16, 16, 4, 3], dim=-1)
    into = (gx.unflatten(-1, [3, 16]), gB, gC, gdt_raw)
    got = scan_backward(gy, *inputs, states, into=into)
    for name, view, g, w in zip(NAMES[:4], into, got[:4], want[:4], strict=True):
        assert g is view and torch.equal(g, w), name
    assert (edge == 9).all() and (other == 9).all()


def test_gradients_are_the_same_each_time():
    inputs = make_inputs(70, batch=2)
    gy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    _, states = scan_forward(*inputs, chunk=64)
    first, second = (scan_backward(gy, *inputs, states, chunk=64) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("state_dim", "head_dim", "dtype", "fits"), [(64, 64, BF16, True), (64, 48, FP32, False)])
def test_which_sizes_fit(state_dim, head_dim, dtype, fits):
    module = importlib.import_module("vit_linearizer.ops.gpu.scan")
    x, B = torch.zeros(1, 1, 1, head_dim, dtype=dtype), torch.zeros(1, 1, state_dim, dtype=dtype)
    assert module.fits_scan(x, B) == fits
