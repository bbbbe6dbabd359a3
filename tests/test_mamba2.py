"""The Mamba-2 mixer against the independent implementation in transformers, its initialisation and its causality."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from vit_linearizer.models.mamba2 import Mamba2

SIZES = {
    "as in Adventurer": {"dim": 64, "state_dim": 64, "head_dim": 64, "expand": 2, "conv_width": 4},
    "others": {"dim": 24, "state_dim": 6, "head_dim": 8, "expand": 3, "conv_width": 3},
}


def mixer_and_counterpart(*, dim, state_dim, head_dim, expand, conv_width):
    """Our mixer with random values in every parameter, and transformers' with the same ones."""
    torch.manual_seed(0)
    ours = Mamba2(dim, state_dim=state_dim, head_dim=head_dim, expand=expand, conv_width=conv_width)
    with torch.no_grad():
        for parameter in (ours.conv1d.bias, ours.D, ours.norm.weight):
            parameter.uniform_(-1, 2)
    config = Mamba2Config(
        hidden_size=dim,
        state_size=state_dim,
        head_dim=head_dim,
        num_heads=expand * dim // head_dim,
        expand=expand,
        conv_kernel=conv_width,
        n_groups=1,
        chunk_size=16,
        num_hidden_layers=1,
        hidden_act="silu",
        use_bias=False,
        use_conv_bias=True,
        layer_norm_epsilon=1e-5,
        time_step_limit=(0.0, math.inf),
    )
    theirs = Mamba2Mixer(config, layer_idx=0)
    theirs.load_state_dict(ours.state_dict())  # strict: also the names are Mamba-2's
    return ours, theirs


@pytest.mark.parametrize("length", [1, 5, 37, 101])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_equals_transformers(size, length):
    ours, theirs = mixer_and_counterpart(**size)
    u = torch.randn(2, length, size["dim"])
    weight = torch.randn(2, length, size["dim"])
    results = []
    for mixer in (ours, theirs):
        inputs = u.clone().requires_grad_()
        y = mixer(inputs)
        gradients = torch.autograd.grad(y, [inputs, *mixer.parameters()], weight)
        results.append({"y": y, "u": gradients[0]} | dict(zip(dict(mixer.named_parameters()), gradients[1:], strict=True)))
    for name, want in results[1].items():
        error = (results[0][name] - want).norm()
        assert error <= 2e-5 * want.norm() + 1e-7, f"{name}: error {error:.2e} for a norm of {want.norm():.2e}"


def test_initialisation():
    torch.manual_seed(0)
    mixer = Mamba2(512, head_dim=1, state_dim=1, out_scale=0.25)  # 1024 heads, to see the distributions
    dt, A = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 1e-3 * 0.999 <= dt.min() < 1.1e-3
    assert 0.9e-1 < dt.max() <= 1e-1 * 1.001
    assert 0.45 < (dt < 1e-2).float().mean() < 0.55, "log-uniform: half of the steps are below the geometric middle"
    assert 1 <= A.min() < 1.1
    assert 15.9 < A.max() <= 16.001
    assert 8.0 < A.mean() < 9.0, "uniform in [1, 16]"
    assert torch.equal(mixer.D, torch.ones(1024))
    assert torch.equal(mixer.conv1d.bias, torch.zeros_like(mixer.conv1d.bias))
    assert torch.equal(mixer.norm.weight, torch.ones(1024))
    bound = 0.25 / math.sqrt(1024)  # Kaiming-uniform with a = sqrt(5) is +-1 / sqrt(fan_in), then scaled
    assert 0.99 * bound < mixer.out_proj.weight.abs().max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("t", [0, 1, 36, 71, 72, 99])
def test_causality(t):
    """Changing token t changes its own output and later ones, none before; 100 tokens are two chunks."""
    torch.manual_seed(0)
    mixer = Mamba2(32).double()
    u = torch.randn(1, 100, 32, dtype=torch.float64)
    changed = u.clone()
    changed[:, t] += 1
    with torch.no_grad():
        same = (mixer(changed) == mixer(u)).all(dim=-1)[0]
    assert same[:t].all()
    assert not same[t:].any()


def test_bf16_autocast_stays_near_fp32():
    """Outputs and gradients as mixed-precision training computes them."""
    torch.manual_seed(0)
    mixer = Mamba2(64)
    u, weight = torch.randn(2, 100, 64), torch.randn(2, 100, 64)

    def run(enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = mixer(u)
        return [y.detach(), *torch.autograd.grad(y, list(mixer.parameters()), weight.to(y.dtype))]

    for name, got, want in zip(["y", *dict(mixer.named_parameters())], run(True), run(False), strict=True):
        assert (got - want).norm() < 0.03 * want.norm(), name


def test_refuses_a_width_that_does_not_fit_the_heads():
    with pytest.raises(ValueError, match=r"inner width 96 \(expand 2 x dim 48\) must be a multiple of 64"):
        Mamba2(48)
