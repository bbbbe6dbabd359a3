"""Linear attention against its explicit N x N form, written here from the equations and sharing no code with it."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vit_linearizer import UserError
from vit_linearizer.ops import linear_attention

MAPS = ("elu", "relu", "hedgehog")
every_map = pytest.mark.parametrize("name", MAPS)


def features(x, name, weight):
    x = x / math.sqrt(math.sqrt(x.shape[-1]))
    if name == "elu":
        return torch.where(x > 0, 1 + x, x.exp())
    if name == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    turned = torch.einsum("bhnd,hde->bhne", x, weight)
    return torch.softmax(torch.cat([turned, -turned], -1), -1)


def explicit(q, k, v, name, q_map=None, k_map=None):
    """Token i reads token j with weight phi(q_i) . phi(k_j) over their sum, and nothing where all weights are zero."""
    weights = torch.einsum("bhid,bhjd->bhij", features(q, name, q_map), features(k, name, k_map))
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bhjd->bhid", weights / total.where(total > 0, torch.ones_like(total)), v)


def inputs(name, *, tokens=7, batch=2, heads=3, dim=8, dtype=torch.float64, scale=1.0, seed=0):
    """q, k, v as views of one projection, as in a model, and the maps where there are such."""
    generator = torch.Generator().manual_seed(seed)
    qkv = scale * torch.randn(batch, tokens, 3, heads, dim, generator=generator, dtype=torch.float64)
    maps = (torch.randn(2, heads, dim, dim, generator=generator, dtype=torch.float64) / 2).to(dtype)
    q, k, v = qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
    return (q, k, v, *(maps if name == "hedgehog" else ()))


def run(function, tensors, name):
    return function(*tensors[:3], name, *tensors[3:])


# --- equal to the explicit form -------------------------------------------------------------------------------------


@every_map
@pytest.mark.parametrize("tokens", [1, 2, 7, 65])
def test_outputs_and_gradients_equal_the_explicit_form(name, tokens):
    tensors = [t.requires_grad_() for t in inputs(name, tokens=tokens)]
    got, want = run(linear_attention, tensors, name), run(explicit, tensors, name)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    gradients = torch.autograd.grad(got, tensors, upstream)
    for mine, theirs in zip(gradients, torch.autograd.grad(want, tensors, upstream), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.isfinite().all()


@every_map
@pytest.mark.parametrize("tokens", [2049, 3000])
def test_long_sequences_without_gradients_equal_the_explicit_form(name, tokens):
    """They go in parts, the last one shorter."""
    tensors = inputs(name, tokens=tokens)
    with torch.no_grad():
        got = run(linear_attention, tensors, name)
    torch.testing.assert_close(got, run(explicit, tensors, name))
    parameters = [t.requires_grad_() for t in tensors]
    torch.testing.assert_close(run(linear_attention, parameters, name).detach(), got)


@every_map
def test_derivatives_by_finite_differences(name):
    tensors = [t.detach().clone().requires_grad_() for t in inputs(name, tokens=5, heads=2, dim=4)]
    assert torch.autograd.gradcheck(lambda *given: run(linear_attention, given, name), tensors)


@pytest.mark.parametrize("name", ["elu", "hedgehog"])
@pytest.mark.parametrize("tokens", [7, 2500])
def test_large_magnitudes_in_fp32(name, tokens):
    """Exponentials down to e^-30 keep their digits, which 1 + (e^x - 1) would not."""
    tensors = inputs(name, tokens=tokens, scale=20.0)
    got = run(linear_attention, [t.float() for t in tensors], name)
    torch.testing.assert_close(got.double(), run(explicit, tensors, name), rtol=1e-4, atol=1e-3)
    low = [tensors[0].abs().neg(), tensors[1].abs().neg(), *tensors[2:]]
    got = run(linear_attention, [t.float() for t in low], name)
    torch.testing.assert_close(got.double(), run(explicit, low, name), rtol=1e-4, atol=1e-3)


def test_queries_and_values_may_have_other_sizes_than_keys():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 5)
    torch.testing.assert_close(linear_attention(q, k, v), explicit(q, k, v, "elu"))


def test_equal_values_come_out_as_they_are():
    q, k, _ = inputs("elu", tokens=33, dtype=torch.float32)
    value = torch.randn(2, 3, 1, 8)
    torch.testing.assert_close(linear_attention(q, k, value.expand_as(q)), value.expand_as(q))


def test_the_order_of_the_tokens_that_are_read_does_not_matter():
    q, k, v = inputs("elu", tokens=33)
    order = torch.randperm(33)
    torch.testing.assert_close(linear_attention(q, k[:, :, order], v[:, :, order]), linear_attention(q, k, v))


# --- zeros ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_features_that_are_all_zero_read_nothing_and_leave_finite_gradients(which, dtype):
    tensors = list(inputs("relu", dtype=dtype))
    tensors[which] = -tensors[which].abs()
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    got = linear_attention(*tensors, "relu")
    assert torch.equal(got, torch.zeros_like(got))
    for gradient in torch.autograd.grad(got.float().sum(), tensors):
        assert gradient.isfinite().all()


# --- lower precision ------------------------------------------------------------------------------------------------


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@every_map
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tokens", [197, 4096])
def test_bfloat16_is_as_near_as_its_own_rounding(name, grad, tokens):
    """No worse than rounding features, sum and weights once each from an exact computation; longer sums are no worse."""
    low = inputs(name, tokens=tokens, batch=1, dim=32, dtype=torch.bfloat16)
    exact = [t.double() for t in low]

    def rounded(t):
        return t.bfloat16().double()

    maps = exact[3:] or [None, None]
    phi_q, phi_k = (rounded(features(t, name, w)) for t, w in zip(exact[:2], maps, strict=True))
    weights = rounded(phi_q / rounded(phi_q @ phi_k.sum(-2, keepdim=True).mT))
    stepwise = rounded(weights @ rounded(phi_k.mT @ exact[2]))
    want = run(explicit, exact, name)
    got = run(linear_attention, [t.requires_grad_(grad) for t in low], name)
    assert got.dtype == torch.bfloat16
    assert error(got, want) < 1.3 * error(stepwise, want)


@every_map
@pytest.mark.parametrize("grad", [False, True])
def test_float16_does_not_overflow_over_many_tokens(name, grad):
    """Sums over 65536 tokens pass float16's largest number, 65504."""
    low = inputs(name, tokens=65536, batch=1, heads=1, dim=8, dtype=torch.float16)
    low = [low[0], low[1], low[2].abs() + 20, *low[3:]]
    low = [t.detach().requires_grad_(grad) for t in low]
    got = run(linear_attention, low, name)
    assert got.dtype == torch.float16
    q, k, v, *maps = [t.detach().double() for t in low]
    phi_q, phi_k = (features(t, name, w) for t, w in zip((q, k), maps or [None, None], strict=True))
    want = phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2, keepdim=True).mT)
    assert (phi_k.mT @ v).max() > 65504
    torch.testing.assert_close(got.detach().double(), want.nan_to_num(), rtol=2e-3, atol=0)


def test_autocast_does_not_take_the_sums_to_half_precision():
    q, k, v = inputs("elu", tokens=65536, batch=1, heads=1, dtype=torch.float32)
    plain = linear_attention(q, k, v.abs() + 20)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(linear_attention(q, k, v.abs() + 20), plain)


# --- recorded programs and cost -------------------------------------------------------------------------------------


@every_map
def test_an_exported_program_holds_for_any_number_of_tokens(name):
    class Program(torch.nn.Module):
        def forward(self, *given):
            return run(linear_attention, given, name)

    dim = torch.export.Dim("tokens", min=2, max=2**16)
    tensors = inputs(name, tokens=9, dtype=torch.float32)
    shapes = (tuple({2: dim} if n < 3 else {} for n in range(len(tensors))),)
    exported = torch.export.export(Program(), tensors, dynamic_shapes=shapes)
    for tokens in (2, 9, 1500):
        given = inputs(name, tokens=tokens, dtype=torch.float32)
        torch.testing.assert_close(exported.module()(*given), run(linear_attention, given, name))


def test_function_transforms():
    q, k, v = inputs("elu")
    one_by_one = torch.vmap(lambda *t: linear_attention(*(s[None] for s in t))[0])(q, k, v)
    torch.testing.assert_close(one_by_one, linear_attention(q, k, v))
    gradient = torch.func.grad(lambda t: linear_attention(t, k, v).square().sum())(q)
    leaf = q.detach().clone().requires_grad_()
    linear_attention(leaf, k, v).square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)


@every_map
@pytest.mark.parametrize("grad", [False, True])
def test_cost_grows_with_the_tokens_not_with_their_square(name, grad):
    def operations(tokens):
        tensors = [t.requires_grad_(grad) for t in inputs(name, tokens=tokens, batch=1, dtype=torch.float32)]
        with FlopCounterMode(display=False) as counter:
            run(linear_attention, tensors, name).sum().backward() if grad else run(linear_attention, tensors, name)
        return counter.get_total_flops()

    assert operations(4096) == 16 * operations(256) > 0


# --- bad input ------------------------------------------------------------------------------------------------------


def test_unknown_feature_maps_are_refused():
    with pytest.raises(UserError, match="feature_map hedgehogs: choose from elu, relu, hedgehog; did you mean hedgehog"):
        linear_attention(*inputs("elu"), "hedgehogs")


def test_a_learnable_map_needs_its_parameters():
    with pytest.raises(UserError, match="needs q_map and k_map"):
        linear_attention(*inputs("elu"), "hedgehog")
