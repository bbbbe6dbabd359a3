"""Triton kernels around the scan: convolution, norms, gate and reading order, see tests/gpu_checks."""

import pytest
import timm
import torch
from timm.layers import create_feature_extractor, get_notrace_functions

from gpu_interpreter import run_checks
from vit_linearizer import ops

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_interpreted():
    run_checks("check_rows.py")


def test_they_compile_for_hopper():
    run_checks("check_rows_compile.py", device="cuda")


@pytest.mark.gpu
@on_a_gpu
def test_on_the_gpu():
    run_checks("check_rows.py", device="cuda")


# --- norms in one pass with the reading order -------------------------------------------------------------------------


def test_fused_norms_in_the_interpreter():
    run_checks("check_fused_norms.py")


@pytest.mark.gpu
@on_a_gpu
def test_fused_norms_on_the_gpu():
    run_checks("check_fused_norms.py", device="cuda")


FUSED = (ops.norm_to_reading_order, ops.add_and_norm)


def composed(x, mixed, weight, flip):
    added = ops.add_from_reading_order(x, mixed, flip)
    return ops.to_reading_order(ops.rms_norm(x, weight, 1e-5), flip), added, ops.rms_norm(added, weight, 1e-5)


def at_once(x, mixed, weight, flip: bool):
    added, normed = ops.add_and_norm(x, mixed, weight, 1e-5, flip)
    return ops.norm_to_reading_order(x, weight, 1e-5, flip), added, normed


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("width", [5, 32])
def test_on_a_cpu_they_are_their_parts(width, flip):
    x, mixed, weight = torch.randn(2, 4, width), torch.randn(2, 5, width), torch.randn(width)
    want = composed(x, mixed, weight, flip)
    for got, wanted in zip(at_once(x, mixed, weight, flip), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_they_can_be_scripted():
    x, mixed, weight = torch.randn(2, 4, 5), torch.randn(2, 5, 5), torch.randn(5)
    program = torch.jit.script(at_once)
    torch.testing.assert_close(program(x, mixed, weight, True), composed(x, mixed, weight, True))


def test_they_are_leaves_and_the_cpu_does_not_claim_them():
    assert set(FUSED) <= set(get_notrace_functions())
    for function in FUSED:
        assert hasattr(torch.ops.vit_linearizer_gpu, function.__name__)
        assert not hasattr(torch.ops.vit_linearizer_native, function.__name__)


def test_an_fx_graph_keeps_the_norms():
    model = timm.create_model("adventurer_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_classes=0).eval()
    extractor = create_feature_extractor(model, ["layers.0.norm", "layers.1.norm_mlp", "layers.1"])
    assert not {node.target for node in extractor.graph.nodes} & set(FUSED)
    seen = []
    model.layers[1].norm_mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        model.forward_features(images)
        torch.testing.assert_close(extractor(images)["layers.1.norm_mlp"], seen[0])
