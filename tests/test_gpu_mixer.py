"""A mixer's core on the GPU's kernels, interpreted here, and how an implementation is chosen."""

import pytest
import torch

from gpu_interpreter import run_checks
from vit_linearizer import UserError, ops
from vit_linearizer.ops import gpu


def test_the_core_in_the_interpreter():
    run_checks("check_mixer.py")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_core_on_the_device():
    run_checks("check_mixer.py", device="cuda")


def test_without_a_device_the_plain_path_runs_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.status.cache_clear()
    try:
        assert gpu.status() == (False, "no CUDA device")
        name, reason = ops.choose_mixer(torch.device("cuda"))
        assert name == "chunked"
        assert "no CUDA device" in reason
        x = torch.randn(1, 5, 2 * 32 + 2 * 16 + 2)
        others = [torch.randn(64, 1, 4), torch.randn(64), *torch.randn(3, 2), torch.ones(32)]
        with pytest.raises(UserError, match=r"^implementation triton: not here: no CUDA device"):
            ops.mixer_core(x, *others, 1e-5, 16, 16, "triton")
    finally:
        gpu.status.cache_clear()


def test_switched_off(monkeypatch):
    monkeypatch.setenv("VIT_LINEARIZER_TRITON", "0")
    gpu.status.cache_clear()
    try:
        assert gpu.status() == (False, "switched off by VIT_LINEARIZER_TRITON=0")
    finally:
        gpu.status.cache_clear()


@pytest.mark.parametrize(
    ("conv", "bias", "state_dim", "head_dim", "fits"),
    [
        ((64 + 128, 1, 4), True, 64, 64, True),
        ((64 + 128, 1, 4), False, 64, 64, False),
        ((64 + 128, 1, 5), True, 64, 64, False),
        ((64 + 96, 1, 4), True, 48, 64, False),
        ((96 + 128, 1, 4), True, 64, 96, False),
        ((16384 + 128, 1, 4), True, 64, 64, False),
    ],
)
def test_which_mixers_fit(conv, bias, state_dim, head_dim, fits):
    weight = torch.empty(conv, device="meta")
    assert gpu.fits_mixer(weight, weight[:, 0, 0] if bias else None, state_dim, head_dim) is fits


def test_triton_is_not_imported_before_it_is_needed():
    """By a process that runs a whole model on the CPU."""
    import subprocess
    import sys

    program = (
        "import sys, timm, torch, vit_linearizer\n"
        "model = timm.create_model('adventurer_tiny_patch16_224', depth=2, embed_dim=32, img_size=32).eval()\n"
        "model(torch.zeros(1, 3, 32, 32))\n"
        "assert 'vit_linearizer.ops.gpu.scan' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
