"""The whole core of a mixer, and a block of Adventurer, on the GPU's operators beside the plain path."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gpu_interpreter import DEVICE, INTERPRETED, poison_new_memory
from vit_linearizer import ops
from vit_linearizer.models.adventurer_block import AdventurerBlock
from vit_linearizer.ops import gpu
from vit_linearizer.ops.gpu.registration import OPS

EPS = 1e-5
SHAPES = [(1, 1, 1, 16, 16), (2, 35, 3, 16, 32), (1, 131, 2, 32, 16)]
FULL = [(2, 2050, 24, 64, 64), (128, 198, 24, 64, 64)]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


def inputs(batch: int, length: int, heads: int, head_dim: int, state_dim: int, dtype=torch.float32) -> list[Tensor]:
    """As `ops.mixer_core` takes them, from zxbcdt to the norm's weight."""
    inner, generator = heads * head_dim, torch.Generator().manual_seed(length)
    conv = inner + 2 * state_dim
    shapes = [(batch, length, inner + conv + heads), (conv, 1, 4), (conv,), (heads,), (heads,), (heads,), (inner,)]
    made = [torch.randn(shape, generator=generator) * (0.3 if len(shape) == 3 else 0.5) for shape in shapes]
    made[4] = made[4].abs()
    return [t.to(DEVICE, dtype if place == 0 else torch.float32).requires_grad_() for place, t in enumerate(made)]


def plain(tensors: list[Tensor], head_dim: int, state_dim: int) -> Tensor:
    return ops.mixer_core(*tensors, EPS, state_dim, head_dim, "chunked")


@pytest.mark.parametrize("shape", SHAPES if INTERPRETED else [*SHAPES, *FULL], ids=str)
def test_mixer_core_with_all_its_gradients(shape):
    *_, head_dim, state_dim = shape
    tensors = inputs(*shape)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    wanted = plain(doubles, head_dim, state_dim)
    g = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = ops.mixer_core(*tensors, EPS, state_dim, head_dim, "triton")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    pairs = zip(torch.autograd.grad(found, tensors, g), torch.autograd.grad(wanted, doubles, g.double()), strict=True)
    for place, (own, expected) in enumerate(pairs):
        assert own.dtype == torch.float32
        error = float((own.double() - expected).norm() / expected.norm().clamp(min=1e-6))
        assert error < 1e-3, f"gradient {place}: {error:.1e}"


def test_without_gradients_the_same_comes_out_and_nothing_is_kept():
    tensors = inputs(*SHAPES[1])
    with torch.no_grad():
        alone = gpu.mixer_core(*tensors, EPS)
    assert torch.equal(alone, gpu.mixer_core(*tensors, EPS).detach())


def test_bf16_is_near():
    *_, head_dim, state_dim = SHAPES[1]
    tensors = inputs(*SHAPES[1], dtype=torch.bfloat16)
    wanted = plain([t.detach().double() for t in tensors], head_dim, state_dim)
    found = gpu.mixer_core(*tensors, EPS)
    assert found.dtype == torch.bfloat16
    assert float((found.detach().double() - wanted).norm() / wanted.norm()) < 2e-2
    found.sum().backward()
    assert [t.grad.dtype for t in tensors] == [t.dtype for t in tensors]


@pytest.mark.parametrize("flip", [False, True])
def test_a_block_takes_the_kernels_and_equals_the_plain_one(monkeypatch, flip):
    """Forward and backward; every operator of the block is asked for."""
    torch.manual_seed(0)
    block = AdventurerBlock(64, depth=4, flip=flip, mlp_ratio=2.0, drop_path=0.0, implementation="auto").to(DEVICE)
    x = torch.randn(2, 20, 64, device=DEVICE, requires_grad=True)
    called = set()
    asked = {"mixer_core", "silu_mul", "norm_to_reading_order", "add_and_norm"}
    for name in asked:
        run = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *a, run=run, name=name: called.add(name) or run(*a))
    monkeypatch.setattr(ops.native, "serves", lambda *_: False)
    monkeypatch.setattr(ops.native, "serves_rows", lambda *_: False)
    parameters = [x, *block.parameters()]
    y = block(x)
    own = (y, *torch.autograd.grad(y.square().sum(), parameters))
    assert called == asked
    monkeypatch.setattr(gpu, "serves", lambda *_: False)
    monkeypatch.setattr(gpu, "serves_rows", lambda *_: False)
    monkeypatch.setattr(ops, "takes_triton", lambda *_: False)
    y = block(x)
    plainly = (y, *torch.autograd.grad(y.square().sum(), parameters))
    for a, b in zip(own, plainly, strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < 1e-3


def test_operators_are_registered_as_pytorch_wants_them():
    """Schemas, fakes and derivatives agree with what runs."""
    *tensors, norm_weight = inputs(1, 20, 2, 16, 16)
    torch.library.opcheck(
        OPS.mixer_core_keeping, (*tensors, norm_weight, EPS), test_utils=("test_schema", "test_faketensor")
    )
    out, y, states, scale = OPS.mixer_core_keeping(*tensors, norm_weight, EPS)
    g, kept = torch.randn_like(out).detach(), [t.detach() for t in (out, y, states, scale)]
    given = [t.detach() for t in (*tensors, norm_weight)]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.mixer_core_backward, (g, *given, EPS, *kept), test_utils=checks)
    x = torch.randn(2, 5, 16, device=DEVICE)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPS.rms_norm, (x.requires_grad_(), torch.ones(16, device=DEVICE), EPS), test_utils=checks)
    torch.library.opcheck(OPS.to_reading_order, (x, True), test_utils=checks)


def test_flops_are_counted_as_on_the_plain_path():
    *_, head_dim, state_dim = shape = (1, 128, 2, 16, 16)
    tensors = [t.detach() for t in inputs(*shape)]
    counts = []
    for run in (lambda: gpu.mixer_core(*tensors, EPS), lambda: plain(tensors, head_dim, state_dim)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] > 0
    assert 0.5 < counts[0] / counts[1] < 2
