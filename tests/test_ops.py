"""Scans, convolution, norms and position embeddings against their equations, and how FX and torch.compile see them."""

import functools
import importlib
import math
import operator
from collections import Counter

import pytest
import timm
import torch
import torch.fx.experimental._config as shapes_config
import torch.nn.functional as F
from timm.layers import create_feature_extractor, get_notrace_functions
from torch.utils.flop_counter import FlopCounterMode

from vit_linearizer import ops
from vit_linearizer.contracts import UserError
from vit_linearizer.ops.ssd_chunked import MAX_CHUNK, choose_chunk, ssd_plain

# The package exports the function under the module's name, so the module itself is asked for by name.
chunked_module = importlib.import_module("vit_linearizer.ops.ssd_chunked")

NAMES = ("x", "dt", "A", "B", "C", "D")
LENGTHS = (1, 7, 63, 64, 65, 197)


def scan_inputs(length, *, batch=2, heads=3, head_dim=4, state_dim=5, seed=0):
    """Inputs of a scan in float64, with steps and decays in the range of a trained Mamba-2."""
    generator = torch.Generator().manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    uniform = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    return (
        normal(batch, length, heads, head_dim),
        torch.exp(math.log(1e-3) + math.log(1e3) * uniform(batch, length, heads)),
        -(1 + 15 * uniform(heads)),
        normal(batch, length, state_dim),
        normal(batch, length, state_dim),
        normal(heads),
    )


def outputs_and_gradients(scan, inputs, weight=None):
    """``scan``'s output, and the gradients of all six inputs for a random gradient of the output."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = scan(*inputs)
    if weight is None:
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return y.detach(), torch.autograd.grad(y, inputs, weight.to(y.dtype))


@functools.cache
def reference(length):
    return outputs_and_gradients(ops.ssd_reference, scan_inputs(length))


def assert_same(actual, expected, *, tolerance=1e-10):
    """Outputs and the six gradients agree, each relative to its own size."""
    for name, got, want in zip(("y", *NAMES), (actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert got.shape == want.shape, name
        error, size = float((got.double() - want.double()).norm()), float(want.double().norm())
        assert error <= tolerance * size, f"{name}: error {error:.2e} for a norm of {size:.2e}"


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


# --- the scan -------------------------------------------------------------------------------------------------------


def test_reference_equals_its_closed_form():
    """y_t = sum_{s <= t} exp(A sum_{s < m <= t} dt_m) (C_t . B_s) dt_s x_s + D x_t, written as loops over scalars."""
    length = 5
    x, dt, A, B, C, D = scan_inputs(length, batch=1, heads=2)
    y = ops.ssd_reference(x, dt, A, B, C, D)
    for h in range(2):
        for t in range(length):
            want = D[h] * x[0, t, h]
            for s in range(t + 1):
                decay = torch.exp(A[h] * dt[0, s + 1 : t + 1, h].sum())
                want = want + decay * (C[0, t] @ B[0, s]) * dt[0, s, h] * x[0, s, h]
            torch.testing.assert_close(y[0, t, h], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 16, 64, 256])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_equals_reference(length, chunk_size):
    scan = functools.partial(ops.ssd_chunked, chunk_size=chunk_size)
    assert_same(outputs_and_gradients(scan, scan_inputs(length)), reference(length))


@pytest.mark.parametrize("chunk_size", [None, 7, 64, 256])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_without_gradients_equals_reference(length, chunk_size):
    y = ops.ssd_chunked(*scan_inputs(length), chunk_size=chunk_size)
    assert relative_error(y, reference(length)[0]) < 1e-12


@pytest.mark.parametrize("chunks_a_segment", [1, 2, 3])
def test_inference_walks_in_segments(monkeypatch, chunks_a_segment):
    """197 tokens in chunks of 16 are 13 chunks; a small budget cuts them into segments that hand on the state."""
    inputs, calls = scan_inputs(197), Counter()

    def counted(*args, forward=chunked_module._forward, **kwargs):
        calls["forward"] += 1
        return forward(*args, **kwargs)

    monkeypatch.setattr(chunked_module, "_forward", counted)
    monkeypatch.setattr(chunked_module, "_SEGMENT_ELEMENTS", chunks_a_segment * 2 * 3 * 16 * 16)
    y = ops.ssd_chunked(*inputs, chunk_size=16)
    assert calls["forward"] == math.ceil(13 / chunks_a_segment)
    assert relative_error(y, reference(197)[0]) < 1e-12


def test_gradients_of_some_inputs_only():
    inputs = [t.clone() for t in scan_inputs(65)]
    inputs[3].requires_grad_()
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(ops.ssd_chunked(*inputs, chunk_size=16), inputs[3], weight)
    assert relative_error(gradient, reference(65)[1][3]) < 1e-12


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("layout", ["transposed", "slice of channels", "reversed storage"])
def test_chunked_takes_any_strides(layout, grad):
    def lay_out(t):
        if layout == "transposed" and t.ndim > 2:
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "slice of channels" and t.ndim > 2:
            return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]
        return t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1])

    inputs = [lay_out(t) for t in scan_inputs(64)]
    scan = functools.partial(ops.ssd_chunked, chunk_size=16)
    if grad:
        assert_same(outputs_and_gradients(scan, inputs), reference(64))
    else:
        assert relative_error(scan(*inputs), reference(64)[0]) < 1e-12


@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_chunked_takes_output_gradients_of_any_strides(layout):
    inputs = scan_inputs(64)
    weight = torch.ones((), dtype=torch.float64).expand(inputs[0].shape)
    if layout == "transposed":
        weight = torch.randn(inputs[0].transpose(1, 2).shape, dtype=torch.float64).transpose(1, 2)
    actual = outputs_and_gradients(functools.partial(ops.ssd_chunked, chunk_size=16), inputs, weight)
    assert_same(actual, outputs_and_gradients(ops.ssd_reference, inputs, weight))


@pytest.mark.parametrize("compiled", [False, True])
def test_long_memory_and_sudden_forgetting_stay_finite(compiled):
    """Decays that underflow to zero overflow above the diagonal, which must not turn into NaN, nor in the gradients."""
    torch._dynamo.reset()
    x, dt, A, B, C, D = scan_inputs(65)
    dt[:, ::5] *= 1e3
    dt[:, 1::5] *= 1e-6
    inputs = (x, dt, A, B, C, D)
    scan = functools.partial(ops.ssd_chunked, chunk_size=16)
    scan = torch.compile(scan, backend="aot_eager", fullgraph=True) if compiled else scan
    assert_same(outputs_and_gradients(scan, inputs), outputs_and_gradients(ops.ssd_reference, inputs), tolerance=1e-9)


@pytest.mark.parametrize(("dtype", "bound", "gradient_bound"), [(torch.float32, 5e-6, 2e-5), (torch.bfloat16, 0.01, 0.02)])
def test_error_of_lower_precision(dtype, bound, gradient_bound):
    """Against float64 on the same rounded inputs; steps, decays and skips stay in fp32, as in the mixer."""
    x, dt, A, B, C, D = scan_inputs(197, heads=4, head_dim=16, state_dim=16)
    low = (x.to(dtype), dt.float(), A.float(), B.to(dtype), C.to(dtype), D.float())
    want_y, want_gradients = outputs_and_gradients(ops.ssd_reference, [t.double() for t in low])
    y, gradients = outputs_and_gradients(ops.ssd_chunked, low)
    assert y.dtype == dtype
    assert relative_error(y, want_y) < bound
    assert relative_error(ops.ssd_chunked(*low), want_y) < bound  # the path without gradients
    for name, argument, gradient, want in zip(NAMES, low, gradients, want_gradients, strict=True):
        assert gradient.dtype == argument.dtype, name
        assert relative_error(gradient, want) < gradient_bound, name


def test_scan_is_not_touched_by_autocast():
    inputs = [t.float() for t in scan_inputs(65)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.ssd_chunked(*inputs, chunk_size=16)
    assert torch.equal(y, ops.ssd_chunked(*inputs, chunk_size=16))


def test_choose_chunk_cuts_into_equal_parts():
    for length in range(1, 3000):
        chunk = choose_chunk(length)
        chunks = math.ceil(length / chunk)
        assert 1 <= chunk <= MAX_CHUNK
        assert 0 <= chunks * chunk - length < chunks, length


@pytest.mark.parametrize(
    ("length", "chunk"), [(1, 1), (50, 50), (66, 66), (72, 72), (73, 37), (144, 72), (198, 66), (786, 72)]
)
def test_choose_chunk_by_value(length, chunk):
    assert choose_chunk(length, 72) == chunk


def test_gradcheck_of_the_scan():
    inputs = [t.requires_grad_() for t in scan_inputs(5, batch=1, heads=2, head_dim=2, state_dim=2)]
    assert torch.autograd.gradcheck(functools.partial(ops.ssd_chunked, chunk_size=2), inputs)


@pytest.mark.parametrize("implementation", ["auto", "chunked"])
def test_dispatch_by_name(implementation):
    inputs = scan_inputs(65)
    want = ops.ssd(*inputs, implementation="reference")
    assert torch.equal(want, ops.ssd_reference(*inputs))
    assert relative_error(ops.ssd(*inputs, implementation=implementation), want) < 1e-12


def test_dispatch_of_an_unknown_name():
    with pytest.raises(UserError, match=r"implementation chunkd: choose from .*reference.*did you mean chunked"):
        ops.ssd(*scan_inputs(1), implementation="chunkd")


@pytest.mark.parametrize("train", [False, True])
def test_scan_flops_are_linear_in_length(train):
    def flops(length):
        inputs = [t.float().requires_grad_(train) for t in scan_inputs(length, batch=1, head_dim=8, state_dim=8)]
        with FlopCounterMode(display=False) as counter:
            y = ops.ssd(*inputs)
            if train:
                y.sum().backward()
        return counter.get_total_flops()

    base = flops(2 * MAX_CHUNK)
    assert base > 0
    assert [flops(n * 2 * MAX_CHUNK) for n in (2, 4, 8)] == [2 * base, 4 * base, 8 * base]


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_compiled_scan_equals_eager(chunk_size):
    torch._dynamo.reset()
    scan = functools.partial(ops.ssd_chunked, chunk_size=chunk_size)
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    assert_same(outputs_and_gradients(compiled, scan_inputs(65)), reference(65))


# --- convolution and norms ------------------------------------------------------------------------------------------


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("width", [1, 4])
def test_causal_conv_equals_its_equation(length, width):
    x, weight, bias = normal(2, length, 3, seed=0), normal(3, 1, width, seed=1), normal(3, seed=2)
    y = ops.causal_conv_silu(x, weight, bias)
    for b in range(2):
        for t in range(length):
            for c in range(3):
                total = bias[c]
                for s in range(width):
                    if t - width + 1 + s >= 0:
                        total = total + weight[c, 0, s] * x[b, t - width + 1 + s, c]
                torch.testing.assert_close(y[b, t, c], total * torch.sigmoid(total))


def test_causal_conv_takes_a_slice_and_returns_contiguous():
    x, weight, bias = normal(2, 9, 7, seed=0), normal(3, 1, 4, seed=1), normal(3, seed=2)
    y = ops.causal_conv_silu(x[..., 2:5], weight, bias)
    assert y.is_contiguous()
    torch.testing.assert_close(y, ops.causal_conv_silu(x[..., 2:5].contiguous(), weight, bias))


def test_gradcheck_of_the_convolution():
    arguments = [t.requires_grad_() for t in (normal(2, 5, 3, seed=0), normal(3, 1, 4, seed=1), normal(3, seed=2))]
    assert torch.autograd.gradcheck(ops.causal_conv_silu, arguments)


def rms_norm_formula(x, weight, eps, gate):
    value = x if gate is None else x * gate * torch.sigmoid(gate)
    return value / torch.sqrt((value**2).sum(-1, keepdim=True) / value.shape[-1] + eps) * weight


@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("gated", [False, True])
def test_rms_norm_equals_its_formula(gated, eps):
    arguments = [normal(2, 3, 6, seed=0), normal(6, seed=1), *([normal(2, 3, 6, seed=2)] if gated else [])]
    arguments = [t.requires_grad_() for t in arguments]
    x, weight, gate = (*arguments, None)[:3]
    got, want = ops.rms_norm(x, weight, eps=eps, gate=gate), rms_norm_formula(x, weight, eps, gate)
    torch.testing.assert_close(got, want)
    direction = normal(2, 3, 6, seed=3)
    for g, w in zip(*(torch.autograd.grad(y, arguments, direction) for y in (got, want)), strict=True):
        torch.testing.assert_close(g, w)
    with torch.no_grad():
        torch.testing.assert_close(ops.rms_norm(x, weight, eps=eps, gate=gate), want)


@pytest.mark.parametrize("gated", [False, True])
def test_gradcheck_of_rms_norm(gated):
    arguments = [normal(2, 3, 5, seed=0), normal(5, seed=1), *([normal(2, 3, 5, seed=2)] if gated else [])]

    def norm(x, weight, gate=None):
        return ops.rms_norm(x, weight, gate=gate)

    assert torch.autograd.gradcheck(norm, [t.requires_grad_() for t in arguments])


@pytest.mark.parametrize("gated", [False, True])
def test_rms_norm_in_bf16_computes_in_fp32(gated):
    """Its error is the rounding of the result alone: a relative step of bf16 is 2^-8."""
    x, weight = normal(4, 256, seed=0).bfloat16(), normal(256, seed=1).float()
    gate = normal(4, 256, seed=2).bfloat16() if gated else None
    want = rms_norm_formula(x.double(), weight.double(), 1e-5, gate.double() if gated else None)
    y = ops.rms_norm(x, weight, gate=gate)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-6)


# --- position embeddings --------------------------------------------------------------------------------------------


def test_position_embedding_of_the_same_grid_is_returned_as_it_is():
    embedding = normal(1, 13, 8, seed=0)
    assert ops.resample_position_embedding(embedding, (3, 4), (3, 4)) is embedding


@pytest.mark.parametrize(("old", "new"), [((3, 4), (6, 5)), ((4, 4), (2, 7)), ((3, 4), (4, 3))])
def test_position_embedding_resamples_the_patches_and_keeps_the_last_slot(old, new):
    embedding = normal(1, old[0] * old[1] + 1, 8, seed=0).float()
    resampled = ops.resample_position_embedding(embedding, old, new)
    image = embedding[:, :-1].unflatten(1, old).permute(0, 3, 1, 2)
    want = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    assert resampled.shape == (1, new[0] * new[1] + 1, 8)
    assert torch.equal(resampled[:, -1], embedding[:, -1])
    torch.testing.assert_close(resampled[:, :-1], want.permute(0, 2, 3, 1).flatten(1, 2))


# --- what a graph sees ----------------------------------------------------------------------------------------------

LEAVES = (
    ops.mixer_core,
    ops.ssd,
    ops.causal_conv_silu,
    ops.rms_norm,
    ops.silu_mul,
    ops.linear,
    ops.to_reading_order,
    ops.add_from_reading_order,
    ops.resample_position_embedding,
)


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_operations_are_leaves_for_timm(leaf):
    assert leaf in get_notrace_functions()


def test_fx_graph_shows_the_mixers_core_as_one_node():
    model = timm.create_model("adventurer_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_classes=0).eval()
    extractor = create_feature_extractor(model, ["layers.0", "layers.2"])
    calls = Counter(node.target for node in extractor.graph.nodes if node.op == "call_function")
    assert calls[ops.mixer_core] == calls[ops.silu_mul] == calls[ops.to_reading_order] == 3
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        traced = extractor(images)["layers.2"]
        ((patches, class_token),) = model.forward_intermediates(
            images, indices=[2], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    torch.testing.assert_close(traced, torch.cat([patches, class_token], dim=1))


# --- what other programs see: the plain scan and its company --------------------------------------------------------

PLAIN_LENGTHS = (1, 2, 71, 72, 73, 145, 576, 577, 1300)
WAYS = pytest.mark.parametrize("at_once", [False, True], ids=["loop", "at once"])


def plain(at_once):
    return functools.partial(ssd_plain, at_once=at_once)


@WAYS
@pytest.mark.parametrize("length", PLAIN_LENGTHS)
def test_plain_scan_equals_reference(length, at_once):
    assert_same(outputs_and_gradients(plain(at_once), scan_inputs(length)), reference(length))


@WAYS
@pytest.mark.parametrize("longest", [1, 5, 16])
def test_plain_scan_in_short_chunks_equals_reference(longest, at_once):
    """197 tokens are 197, 40 or 13 chunks: several groups of eight."""
    scan = functools.partial(plain(at_once), longest=longest)
    assert_same(outputs_and_gradients(scan, scan_inputs(197)), reference(197))


@WAYS
@pytest.mark.parametrize("length", [73, 1300])
@pytest.mark.parametrize(
    ("every", "factor"), [(1, 1e-9), (1, 1e4), (5, 1e4), (5, 1e-9)], ids=["none", "all", "some all", "some none"]
)
def test_plain_scan_forgets_nothing_or_everything(length, at_once, every, factor):
    """Where all is forgotten at each token the gradient of A is exactly zero: rounding is measured by that of dt."""
    x, dt, *rest = scan_inputs(length)
    dt[:, ::every] *= factor
    y, gradients = outputs_and_gradients(plain(at_once), (x, dt, *rest))
    want_y, want_gradients = outputs_and_gradients(ops.ssd_reference, (x, dt, *rest))
    assert relative_error(y, want_y) < 1e-10
    for name, gradient, want in zip(NAMES, gradients, want_gradients, strict=True):
        assert gradient.isfinite().all(), name
        size = max(float(want.norm()), float((want_gradients[1] * dt).norm()) if name == "A" else 0)
        assert float((gradient - want).norm()) <= 1e-9 * size, name


@pytest.mark.parametrize("chunks", [1, 2, 7, 8, 9, 16, 17, 70])
def test_states_carried_at_once_equal_the_loop(chunks):
    local, log_whole = normal(2, chunks, 5, 3, 4, seed=0), -3 * normal(2, chunks, 3, seed=1).square()
    log_whole[:, ::4] *= 1e4
    local, log_whole = local.requires_grad_(), log_whole.requires_grad_()
    direction, found = normal(2, chunks, 5, 3, 4, seed=2), []
    loop, at_once = chunked_module._carry(local, log_whole.exp(), None)[0], chunked_module._carry_at_once(local, log_whole)
    for entering in (loop, at_once):
        depends = entering + 0 * local  # the state entering a first and only chunk is a constant
        found.append((entering, torch.autograd.grad(depends, (local, log_whole), direction, materialize_grads=True)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
    assert not found[1][0][:, 0].any(), "nothing enters the first chunk"


def test_flops_of_the_plain_scan_are_near_linear():
    def flops_per_token(length):
        inputs = [t.float().to("meta") for t in scan_inputs(length, batch=1, heads=8, head_dim=64, state_dim=64)]
        with FlopCounterMode(display=False) as counter:
            ssd_plain(*inputs, at_once=True)
        return counter.get_total_flops() / length

    few, more, most = (flops_per_token(tokens) for tokens in (2048, 8192, 16384))
    assert 0 < max(few, more, most) < 1.5 * min(few, more, most)


@pytest.mark.parametrize("length", PLAIN_LENGTHS)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_scan_equals_eager(length):
    """One program, whatever implementation it is asked for."""
    program = torch.jit.script(ops.ssd)
    assert_same(outputs_and_gradients(program, scan_inputs(length)), reference(length))
    assert relative_error(program(*scan_inputs(length), implementation="reference"), reference(length)[0]) < 1e-12


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_rms_norm_equals_eager(gated, dtype):
    program = torch.jit.script(ops.rms_norm)
    x, weight, gate = normal(2, 3, 6, seed=0).to(dtype), normal(6, seed=1), normal(2, 3, 6, seed=2).to(dtype)
    arguments = [t.requires_grad_() for t in (x, weight, *([gate] if gated else []))]
    found = []
    for function in (ops.rms_norm, program):
        y = function(arguments[0], arguments[1], 0.1, arguments[2] if gated else None)
        found.append((y, torch.autograd.grad(y, arguments, normal(2, 3, 6, seed=3).to(dtype))))
    torch.testing.assert_close(found[1], found[0], **({} if dtype == torch.float64 else dict(rtol=2**-7, atol=1e-6)))
    with torch.no_grad():
        torch.testing.assert_close(program(x, weight), ops.rms_norm(x, weight))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("form", ["scripted", "exported"])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_other_forms_of_the_convolution_equal_the_ordinary_one(monkeypatch, form, length, biased):
    x, weight, bias = normal(2, length, 3, seed=0), normal(3, 1, 4, seed=1), normal(3, seed=2) if biased else None
    arguments = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    direction, found = normal(2, length, 3, seed=3), []
    y = ops.causal_conv_silu(x, weight, bias)
    found.append((y, torch.autograd.grad(y, arguments, direction)))
    if form == "exported":
        monkeypatch.setattr("vit_linearizer.ops.causal_conv.exporting", lambda: True)
        monkeypatch.setattr("vit_linearizer.ops.causal_conv.F.conv2d", None)  # not called in this form
        y = ops.causal_conv_silu(x, weight, bias)
    else:
        y = torch.jit.script(ops.causal_conv_silu)(x, weight, bias)
    found.append((y, torch.autograd.grad(y, arguments, direction)))
    torch.testing.assert_close(found[1], found[0])
    assert y.is_contiguous()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_position_embedding_equals_eager():
    program, embedding = torch.jit.script(ops.resample_position_embedding), normal(1, 13, 8, seed=0).float()
    for grid in ((3, 4), (6, 5), (4, 3), (1, 1)):
        torch.testing.assert_close(
            program(embedding, (3, 4), grid), ops.resample_position_embedding(embedding, (3, 4), grid)
        )


class Scan(torch.nn.Module):
    def forward(self, x, dt, A, B, C, D):
        return ops.ssd(x, dt, A, B, C, D)


@pytest.mark.parametrize("example", [100, 577])
def test_exported_scan_replays_at_any_length(example):
    """Whatever length it was recorded at, one group of chunks or two, and of ATen's operators and size arithmetic alone."""
    length = torch.export.Dim("length", min=1)
    along = {1: length}
    with shapes_config.patch(backed_size_oblivious=True):
        program = torch.export.export(
            Scan(),
            scan_inputs(example),
            dynamic_shapes=(along, along, None, along, along, None),
        )
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(operator, node.target.__name__, None) is not node.target:
            assert isinstance(node.target, torch._ops.OpOverload), node.target
            assert node.target.namespace == "aten", node.target
    for tokens in (1, 2, 72, 73, 577, 1500):
        inputs = scan_inputs(tokens)
        assert relative_error(program.module()(*inputs), ops.ssd(*inputs)) < 1e-12
