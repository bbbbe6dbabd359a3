"""The kernels around the scan against the plain operators in float64, outputs and gradients; on a GPU at full shapes too."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_interpreter import DEVICE, INTERPRETED, poison_new_memory
from vit_linearizer.ops import causal_conv, norm, reading_order
from vit_linearizer.ops.gpu import conv, from_reading_order, gate_norm, swiglu, tiles
from vit_linearizer.ops.gpu import reading_order as order

EPS = 1e-5
LOW = (torch.bfloat16, torch.float16)
FLIPS = pytest.mark.parametrize("flip", [False, True], ids=["straight", "flipped"])
TOKENS = [(3, 17, 100), (1, 1, 8), (1, 2, 48), (3, 3, 96), (1, 5, 100), (1, 17, 768), (3, 66, 48), (1, 2, 2600)]
FULL_TOKENS = [(2, 2050, 768), (128, 198, 192), (1, 16385, 768), (2, 50, 8192)]
CONVOLUTIONS = [(3, 17, 100, 4), (1, 1, 8, 4), (3, 2, 48, 4), (1, 3, 100, 4), (3, 5, 96, 4), (1, 5, 768, 4), (2, 66, 48, 3),
                (1, 17, 8, 2), (2, 40, 20, 1)]  # fmt: skip
FULL_CONVOLUTIONS = [(2, 2050, 1664, 4), (128, 198, 512, 4), (1, 16385, 1664, 4)]


def cases(shapes: list[tuple[int, ...]], full: list[tuple[int, ...]]) -> pytest.MarkDecorator:
    """Dtypes and shapes: all of them on a GPU, in the interpreter all in fp32 and the first in the others."""
    some = [(torch.float32, shape) for shape in shapes] + [(dtype, shapes[0]) for dtype in LOW]
    every = [(dtype, shape) for dtype in (torch.float32, *LOW) for shape in (*shapes, *full)]
    return pytest.mark.parametrize(("dtype", "shape"), some if INTERPRETED else every, ids=str)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random numbers, the same on every device."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * scale).to(DEVICE, dtype)


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same numbers in float64, to be differentiated."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def within(t: Tensor, columns: int, first: int) -> Tensor:
    """The same numbers as columns of a wider tensor that is NaN everywhere else."""
    wide = torch.full((*t.shape[:-1], columns), float("nan"), dtype=t.dtype, device=t.device)
    wide[..., first : first + t.shape[-1]] = t
    return wide[..., first : first + t.shape[-1]]


def close(got: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Equal but for the rounding of a dtype. The interpreter cuts numbers off where it should round: one unit, not half."""
    assert got.shape == expected.shape
    unit = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    floor = 1e-5 * max(1e-2, expected.abs().max().item())
    torch.testing.assert_close(got.double(), expected.detach(), rtol=unit * 1.01, atol=floor)


# ---- convolution


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, gout: Tensor, columns: int, first: int) -> None:
    """Compare all that comes out, with x and its gradient as columns of wider tensors."""
    exact = leaves(x, weight, bias)
    expected = causal_conv.causal_conv_silu(*exact)
    expected.backward(gout.double())
    view = within(x, columns, first)
    out = conv.conv_silu_forward(view, weight, bias)
    assert out.is_contiguous()
    close(out, expected, x.dtype)

    gx = within(torch.full_like(x, float("nan")), columns, first)
    got, gweight, gbias = conv.conv_silu_backward(gout, view, weight, bias, gx)
    assert got is gx
    assert gx._base.isnan().sum() == gx._base.numel() - gx.numel()
    close(gx, exact[0].grad, x.dtype)
    close(gweight, exact[1].grad)
    if bias is not None:
        close(gbias, exact[2].grad)
    else:
        assert gbias is None


@cases(CONVOLUTIONS, FULL_CONVOLUTIONS)
def test_convolution(dtype, shape):
    batch, length, channels, width = shape
    x, gout = (normal(batch, length, channels, dtype=dtype, seed=seed) for seed in (1, 2))
    weight, bias = normal(channels, 1, width, seed=3), normal(channels, seed=4)
    # Where rows start decides how much is loaded at once: 8 and 1 are the greatest common factors with 16.
    columns, first = (3224, 1536) if channels == 1664 else (channels + 24 + -channels % 8, 8)
    convolution(x, weight, bias, gout, columns, first)


def test_convolution_of_rows_that_start_anywhere_and_without_bias():
    x, gout, weight = normal(3, 17, 20, seed=1), normal(3, 17, 20, seed=2), normal(20, 1, 4, seed=3)
    convolution(x, weight, None, gout, 37, 5)
    gout = within(gout, 31, 9)
    convolution(x, weight, None, gout, 37, 5)
    convolution(x, weight, None, torch.ones_like(gout[:1, :1, :1]).expand(x.shape), 37, 5)


def test_convolution_of_large_numbers():
    """SiLU of -400 to 400 and its derivative, which is 0 or 1 there."""
    x = 100 * torch.sign(normal(1, 17, 8, seed=1))
    weight, bias = torch.ones(8, 1, 4, device=DEVICE), torch.zeros(8, device=DEVICE)
    convolution(x, weight, bias, normal(1, 17, 8, seed=2), 8, 0)


def test_what_a_convolution_does_not_take():
    x, out = normal(1, 5, 8), normal(1, 5, 8)
    with pytest.raises(ValueError, match="width must be at most 4, not 5"):
        conv.conv_silu_forward(x, normal(8, 1, 5), None)
    with pytest.raises(ValueError, match="weight is for 6 channels, x has 8"):
        conv.conv_silu_forward(x, normal(6, 1, 4), None)
    with pytest.raises(ValueError, match="side by side"):
        conv.conv_silu_backward(out, x, normal(8, 1, 4), None, normal(1, 8, 5).transpose(1, 2))


# ---- norms


def norms(y: Tensor, z: Tensor | None, weight: Tensor, gout: Tensor) -> None:
    columns = y.shape[-1]
    exact = leaves(y, weight, z)
    expected = norm.rms_norm(*exact[:2], EPS, exact[2])
    expected.backward(gout.double())
    view = within(z, columns + 16, 8) if z is not None else None
    out, scale = gate_norm.gate_norm_forward(y, view, weight, EPS)
    close(out, expected, y.dtype)
    value = (exact[0] * F.silu(exact[2]) if z is not None else exact[0]).flatten(0, -2)
    close(scale, torch.rsqrt(value.square().mean(-1) + EPS))

    gz = within(torch.full_like(z, float("nan")), columns + 16, 8) if z is not None else None
    gy, got, gweight = gate_norm.gate_norm_backward(gout, y, view, weight, scale, gz)
    assert got is gz
    close(gy, exact[0].grad, y.dtype)
    close(gweight, exact[1].grad)
    if gz is not None:
        close(gz, exact[2].grad, y.dtype)
        assert gz._base.isnan().sum() == gz._base.numel() - gz.numel()


@cases([*TOKENS, (17, 96)], FULL_TOKENS)
def test_gated_norm(dtype, shape):
    y, z, gout = (normal(*shape, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    norms(y, z, normal(shape[-1], seed=4), gout)


@cases([(3, 17, 100), (1, 96)], FULL_TOKENS)
def test_plain_norm(dtype, shape):
    x, gout, weight = normal(*shape, dtype=dtype, seed=1), normal(*shape, dtype=dtype, seed=3), normal(shape[-1], seed=4)
    norms(x, None, weight, gout)
    out, scale = gate_norm.rms_norm_forward(x, weight, EPS)
    gx, gweight = gate_norm.rms_norm_backward(gout, x, weight, scale)
    assert torch.equal(out, gate_norm.gate_norm_forward(x, None, weight, EPS)[0])
    again = gate_norm.gate_norm_backward(gout, x, None, weight, scale, None)
    assert torch.equal(gx, again[0])
    assert torch.equal(gweight, again[2])


def test_norm_of_rows_that_start_anywhere():
    """Gradients as autograd hands them out: rows with gaps, one number expanded, and transposed."""
    y, z, weight, gout = normal(3, 17, 10, seed=1), normal(3, 17, 10, seed=2), normal(10, seed=4), normal(3, 17, 10, seed=3)
    norms(within(y, 13, 1), z, weight, within(gout, 11, 1))
    norms(y, z, weight, gout[:1, :1, :1].expand(y.shape))
    norms(y, z, weight, gout.transpose(0, 1).contiguous().transpose(0, 1))


def test_norm_with_a_gate_that_is_wide_open_or_shut():
    """Shut, all is zero but for the last row, and the scale is that of eps."""
    y, gout, weight = normal(3, 8, seed=1), normal(3, 8, seed=2), normal(8, seed=3)
    gate = torch.tensor([100.0, -100.0, 0.0], device=DEVICE)[:, None].expand(3, 8)
    norms(y, gate, weight, gout)
    norms(1e15 * y, gate, weight, gout)


def test_what_a_norm_does_not_take():
    with pytest.raises(ValueError, match="1 to 8192 columns, not 8193"):
        gate_norm.rms_norm_forward(normal(1, 8193), normal(8193), EPS)
    y = normal(2, 8)
    with pytest.raises(ValueError, match="give both or neither"):
        gate_norm.gate_norm_backward(y, y, y, y[0], y[0, :2], None)
    with pytest.raises(ValueError, match="rows without gaps"):
        gate_norm.gate_norm_backward(y, y, y, y[0], y[0, :2], normal(8, 2).t())


# ---- the middle of SwiGLU


@cases([(1, 17, 100), (1, 1), (8,), (3, 5, 8), (2, 9, 260)], [(16, 2050, 1920)])
def test_swiglu(dtype, shape):
    gate, x, gout = (normal(*shape, dtype=dtype, seed=seed, scale=2.0) for seed in (1, 2, 3))
    exact = leaves(gate, x)
    expected = F.silu(exact[0]) * exact[1]
    expected.backward(gout.double())
    close(swiglu.silu_mul_forward(gate, x), expected, dtype)
    for got, leaf in zip(swiglu.silu_mul_backward(gout, gate, x), exact, strict=True):
        close(got, leaf.grad, dtype)
    gate, x = within(gate, 2 * shape[-1] + 3, 0), within(x, 2 * shape[-1] + 3, shape[-1])
    close(swiglu.silu_mul_forward(gate, x), expected, dtype)
    for got, leaf in zip(swiglu.silu_mul_backward(gout.expand(shape), gate, x), exact, strict=True):
        close(got, leaf.grad, dtype)


def test_swiglu_of_large_numbers():
    gate = torch.tensor([[-1e4, -100.0, -90.0, 0.0, 90.0, 100.0, 1e4]], device=DEVICE)
    one = torch.ones_like(gate)
    alike = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-30)
    alike(swiglu.silu_mul_forward(gate, one), gate.clamp_min(0))
    slope, value = swiglu.silu_mul_backward(one, gate, one)
    alike(slope, torch.heaviside(gate, gate.new_tensor(0.5)))
    alike(value, gate.clamp_min(0))


# ---- reading order


@FLIPS
@cases(TOKENS, FULL_TOKENS)
def test_norm_and_into_reading_order(dtype, shape, flip):
    batch, length, columns = shape
    x, residual = normal(*shape, dtype=dtype, seed=1), normal(*shape, dtype=dtype, seed=2)
    weight, gout = normal(columns, seed=4), normal(batch, length + 1, columns, dtype=dtype, seed=3)
    exact = leaves(x, weight)
    expected = reading_order.to_reading_order(norm.rms_norm(*exact, EPS), flip)
    expected.backward(gout.double())

    out, scale = order.norm_to_reading_order_forward(x, weight, EPS, flip)
    close(out, expected, dtype)
    close(scale, torch.rsqrt(exact[0].square().mean(-1) + EPS))
    gx, gweight = order.norm_to_reading_order_backward(gout, x, weight, scale, flip)
    close(gx, exact[0].grad, dtype)
    close(gweight, exact[1].grad)
    gx, again = order.norm_to_reading_order_backward(gout, x, weight, scale, flip, residual)
    close(gx, exact[0].grad + residual.double(), dtype)
    assert torch.equal(again, gweight)


@FLIPS
@cases(TOKENS, FULL_TOKENS)
def test_into_reading_order(dtype, shape, flip):
    batch, length, columns = shape
    x, gout = normal(*shape, dtype=dtype, seed=1), normal(batch, length + 1, columns, dtype=dtype, seed=3)
    (exact,) = leaves(x)
    expected = reading_order.to_reading_order(exact, flip)
    expected.backward(gout.double())
    out = order.to_reading_order_forward(x, flip)
    assert torch.equal(out[:, 1:], reading_order.to_reading_order(x, flip)[:, 1:])
    close(out[:, :1], expected[:, :1], dtype)
    close(order.to_reading_order_backward(gout, flip), exact.grad, dtype)


@FLIPS
@cases(TOKENS, FULL_TOKENS)
def test_out_of_reading_order_and_norm(dtype, shape, flip):
    batch, length, columns = shape
    x, mixed = normal(*shape, dtype=dtype, seed=1), normal(batch, length + 1, columns, dtype=dtype, seed=2)
    weight, gadded, gout = normal(columns, seed=5), normal(*shape, dtype=dtype, seed=3), normal(*shape, dtype=dtype, seed=4)
    expected = reading_order.add_from_reading_order(*leaves(x, mixed), flip)

    added, out, scale = from_reading_order.add_and_norm_forward(x, mixed, weight, EPS, flip)
    close(added, expected, dtype)
    assert torch.equal(added, from_reading_order.add_from_reading_order_forward(x, mixed, flip))
    kept, exact_weight = leaves(added, weight)
    normed = norm.rms_norm(kept, exact_weight, EPS)
    close(out, normed, dtype)
    close(scale, torch.rsqrt(kept.square().mean(-1) + EPS))

    torch.autograd.backward([kept, normed], [gadded.double(), gout.double()])
    first, second = leaves(x, mixed)
    reading_order.add_from_reading_order(first, second, flip).backward(kept.grad)
    gx, gmixed, gweight = from_reading_order.add_and_norm_backward(gadded, gout, added, weight, scale, flip)
    close(gx, first.grad, dtype)
    close(gmixed, second.grad, dtype)
    close(gweight, exact_weight.grad)


@FLIPS
@pytest.mark.parametrize("shape", TOKENS, ids=str)
def test_out_of_reading_order_backward_moves_rows(shape, flip):
    batch, length, columns = shape
    gadded, mixed = normal(*shape, seed=1), normal(batch, length + 1, columns).requires_grad_()
    reading_order.add_from_reading_order(torch.zeros_like(gadded), mixed, flip).backward(gadded)
    assert torch.equal(from_reading_order.add_from_reading_order_backward(gadded, flip), mixed.grad)


@FLIPS
def test_dtypes_may_differ(flip):
    """The residual stream in fp32 and the layers in bf16, as under autocast."""
    x, mixed, weight = normal(2, 9, 16, seed=1), normal(2, 10, 16, dtype=torch.bfloat16, seed=2), normal(16, seed=3)
    low, _ = order.norm_to_reading_order_forward(x, weight, EPS, flip, torch.bfloat16)
    assert low.dtype == torch.bfloat16
    close(low, reading_order.to_reading_order(norm.rms_norm(x, weight, EPS), flip).double(), torch.bfloat16)
    added, out, scale = from_reading_order.add_and_norm_forward(x, mixed, weight, EPS, flip, torch.bfloat16)
    assert (added.dtype, out.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(added, reading_order.add_from_reading_order(x, mixed, flip))
    close(out, norm.rms_norm(added, weight, EPS).double(), torch.bfloat16)
    gx, gmixed, _ = from_reading_order.add_and_norm_backward(
        added, out, added, weight, scale, flip, mixed_dtype=torch.bfloat16
    )
    assert (gx.dtype, gmixed.dtype) == (torch.float32, torch.bfloat16)
    close(gmixed[:, 1:], reading_order.to_reading_order(gx, flip)[:, 1:].double(), torch.bfloat16)
    assert from_reading_order.add_from_reading_order_backward(x, flip, torch.bfloat16).dtype == torch.bfloat16


def test_reading_order_of_tensors_with_gaps():
    x, mixed, weight = normal(2, 9, 16, seed=1), normal(2, 10, 16, seed=2), normal(16, seed=3)
    gaps = functools.partial(within, columns=19, first=2)
    back = from_reading_order
    assert torch.equal(order.to_reading_order_forward(gaps(x), True), order.to_reading_order_forward(x, True))
    assert torch.equal(order.to_reading_order_backward(gaps(mixed), True), order.to_reading_order_backward(mixed, True))
    (out, scale), (same, _) = (order.norm_to_reading_order_forward(t, weight, EPS, True) for t in (x, gaps(x)))
    assert torch.equal(out, same)
    expected = order.norm_to_reading_order_backward(mixed, x, weight, scale, True, x)
    for got in (
        order.norm_to_reading_order_backward(gaps(mixed), gaps(x), weight, scale, True, gaps(x)),
        order.norm_to_reading_order_backward(mixed, x, weight, scale, True, x),
    ):
        assert all(map(torch.equal, got, expected))
    added, _, scale = back.add_and_norm_forward(x, mixed, weight, EPS, True)
    assert torch.equal(added, back.add_from_reading_order_forward(gaps(x), gaps(mixed), True))
    expected = back.add_and_norm_backward(x, added, added, weight, scale, True)
    assert all(map(torch.equal, back.add_and_norm_backward(gaps(x), gaps(added), added, weight, scale, True), expected))
    expected = back.add_from_reading_order_backward(x, True)
    assert torch.equal(back.add_from_reading_order_backward(gaps(x), True), expected)
    with pytest.raises(ValueError, match="one token more than x"):
        back.add_from_reading_order_forward(x, x, False)


def test_a_mean_of_many_tokens_is_taken_in_several_rounds(monkeypatch):
    """More partial sums than one round of the second kernel adds up."""
    monkeypatch.setattr(order, "cut", lambda *shape: (tiles.RowTile(1, 8, 1), 70, 1))
    x = normal(2, 70, 5)
    close(order.to_reading_order_forward(x, True)[:, 0], x.double().mean(1))


if not INTERPRETED:

    def test_twice_gives_the_same_bits():
        x, weight, gout = (normal(*shape, dtype=torch.bfloat16) for shape in [(64, 300, 512), (512, 1, 4), (64, 300, 512)])
        runs = [conv.conv_silu_backward(gout, x, weight, None, torch.empty_like(x))[1] for _ in range(5)]
        assert all(torch.equal(run, runs[0]) for run in runs)

    def test_more_than_two_to_the_31_elements():
        """The last images of a batch come out as they do alone."""
        base = torch.randn(700, 1025, 3224, dtype=torch.bfloat16, device=DEVICE)
        assert base.numel() > 2**31
        x, weight, alone = base[..., 1536:3200], normal(1664, 1, 4), slice(-2, None)
        out = conv.conv_silu_forward(x, weight, None)
        assert torch.equal(out[alone], conv.conv_silu_forward(x[alone], weight, None))
        conv.conv_silu_backward(out, x, weight, None, x)
        assert not x[alone].isnan().any()
        rows = base.view(-1, 3224)
        _, scale = gate_norm.rms_norm_forward(rows, normal(3224), EPS)
        assert torch.equal(scale[-5:], gate_norm.rms_norm_forward(rows[-5:], normal(3224), EPS)[1])
        ordered = order.to_reading_order_forward(base, True)
        assert torch.equal(ordered[alone], order.to_reading_order_forward(base[alone], True))
        assert torch.equal(from_reading_order.add_from_reading_order_forward(base, ordered, True)[alone], 2 * base[alone])
