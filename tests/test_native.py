"""The native CPU path: its numbers against float64, when it is chosen, that it never goes stale, and how it is built."""

import copy
import functools
import importlib
import itertools
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch.utils import cpp_extension
from torch.utils.flop_counter import FlopCounterMode

from small_models import images, small
from vit_linearizer import ops
from vit_linearizer.commands.doctor import DoctorConfig, doctor
from vit_linearizer.contracts import UserError
from vit_linearizer.models.long_sequences import block_goes_in_parts
from vit_linearizer.models.mamba2 import Mamba2
from vit_linearizer.models.parts import segments
from vit_linearizer.ops import native, onednn
from vit_linearizer.ops.native import build, operators
from vit_linearizer.ops.native.registration import OPS

parts = importlib.import_module("vit_linearizer.models.parts")

EPS = 1e-5
LENGTHS = (1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 200)
SHAPES = ((1, 1), (2, 3), (3, 2), (1, 5))  # batch, heads
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ROWS = ("rms_norm", "silu_mul", "to_reading_order", "add_from_reading_order")


@pytest.fixture(autouse=True)
def _needs_the_library():
    """Only a machine without a compiler may go without; a build that fails is a failure."""
    there, reason = native.status()
    if not there and ("no C++ compiler" in reason or "switched off" in reason):
        pytest.skip(reason)
    assert there, reason


@pytest.fixture
def plain(monkeypatch):
    """Calls something with the native path out of the way."""

    def run(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(operators, "available", lambda: False)
            return function(*args, **kwargs)

    return run


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of the native functions by name."""
    counter = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counter[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("mixer_core", *ROWS):
        monkeypatch.setattr(native, name, counted(name, getattr(native, name)))
    return counter


def inputs(length, batch, heads, *, dtype=torch.float32, parameters=torch.float32, scale=1.0, dt=0.0, seed=0):
    """Arguments of a mixer's core in the range of a trained one; ``dt`` is added to the raw steps."""
    generator = torch.Generator().manual_seed(seed)
    normal, uniform = (functools.partial(f, generator=generator) for f in (torch.randn, torch.rand))
    inner = heads * 64
    step = torch.exp(-6.9 + 4.6 * uniform(heads))
    zxbcdt = scale * normal(batch, length, 2 * inner + 128 + heads)
    zxbcdt[..., -heads:] += dt
    rest = (
        0.5 * normal(inner + 128, 1, 4),
        0.5 * normal(inner + 128),
        step + torch.log(-torch.expm1(-step)),
        torch.log(1 + 15 * uniform(heads)),
        normal(heads),
        1 + 0.5 * normal(inner),
    )
    return (zxbcdt.to(dtype), *(t.to(parameters) for t in rest))


def core(arguments, implementation="native", **kwargs):
    return ops.mixer_core(*arguments, EPS, 64, 64, implementation, **kwargs)


def reference(arguments, state=None):
    """The equations, token by token in float64; also the state after the last token."""
    zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight = (t.detach().double() for t in arguments)
    heads = len(D)
    inner, length = heads * 64, zxbcdt.shape[1]
    z, xBC, dt = zxbcdt.split([inner, inner + 128, heads], dim=-1)
    dt, A = F.softplus(dt + dt_bias), -torch.exp(A_log)
    state = dt.new_zeros(len(dt), heads, 64, 64) if state is None else state.double()
    rows = []
    for t in range(length):
        taps = (conv_weight[:, 0, 3 - s] * xBC[:, t - s] for s in range(min(4, t + 1)))
        x, B, C = F.silu(sum(taps, conv_bias)).split([inner, 64, 64], dim=-1)
        x = x.unflatten(-1, (heads, 64))
        added = dt[:, t, :, None, None] * B[:, None, :, None] * x[:, :, None]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
        y = torch.einsum("bn,bhnp->bhp", C, state) + D[:, None] * x
        v = y.flatten(1) * F.silu(z[:, t])
        rows.append(v / torch.sqrt(v.square().mean(-1, keepdim=True) + EPS) * norm_weight)
    return torch.stack(rows, dim=1), state


def error(actual, want):
    return float((actual.double() - want).norm() / want.norm())


def check(arguments, *, factor=1.5):
    """No further from the equations than the plain path, which takes parameters in the dtype of activations only."""
    actual, want = core(arguments), reference(arguments)[0]
    assert actual.dtype == arguments[0].dtype
    assert actual.shape == want.shape
    alike = [t.to(actual.dtype) for t in arguments]
    allowed = factor * error(core(alike, "chunked"), reference(alike)[0])
    allowed += 2e-7 if actual.dtype == torch.float32 else 2e-3  # a few rows are luck
    assert error(actual, want) <= allowed, f"{error(actual, want):.2e} > {allowed:.2e}"


# --- numbers --------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("length", LENGTHS)
def test_mixer_equals_its_equations(length, dtype):
    for batch, heads in SHAPES:
        check(inputs(length, batch, heads, dtype=dtype, seed=length))


@DTYPES
@pytest.mark.parametrize("extreme", ["forgets all", "forgets nothing", "forgets at times", "forgets once", "large", "tiny"])
def test_mixer_at_extremes(extreme, dtype):
    values = {
        "forgets all": dict(dt=60.0),
        "forgets nothing": dict(dt=-40.0),
        "large": dict(scale=300.0),
        "tiny": dict(scale=1e-3),
    }
    arguments = inputs(150, 2, 3, dtype=dtype, **values.get(extreme, {}))
    if extreme == "forgets at times":
        arguments[0][:, ::7, -3:] += 80
        arguments[0][:, 3::7, -3:] -= 80
    if extreme == "forgets once":
        arguments[0][:, 100, -3:] = 1e4  # digits of the decays after it are lost, as in the plain path
    check(arguments, factor=4 if extreme == "forgets once" else 1.5)


@DTYPES
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float64], ids=str)
def test_mixer_takes_parameters_of_another_dtype(dtype, parameters):
    arguments = inputs(70, 2, 3, dtype=dtype, parameters=parameters)
    check(arguments)
    check((*arguments[:3], *(t.float() for t in arguments[3:])))


@DTYPES
@pytest.mark.parametrize("layout", ["slice of columns", "slice of tokens", "transposed", "expanded", "reversed taps"])
def test_mixer_takes_any_strides(layout, dtype):
    zxbcdt, *rest = inputs(70, 2, 3, dtype=dtype)
    want = core((zxbcdt, *rest))
    if layout == "slice of columns":
        zxbcdt = torch.cat([zxbcdt, zxbcdt], dim=-1)[..., : zxbcdt.shape[-1]]
    elif layout == "slice of tokens":
        zxbcdt = torch.stack([zxbcdt, zxbcdt + 1], dim=2).flatten(1, 2)[:, ::2]
    elif layout == "transposed":
        zxbcdt = zxbcdt.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded":
        zxbcdt, want = zxbcdt[:1].expand(2, -1, -1), want[:1].expand(2, -1, -1)
    else:
        rest = [t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1]) for t in rest]
        rest[1:] = [torch.stack([t, t + 1], dim=-1)[..., 0] for t in rest[1:]]
        assert not rest[0].is_contiguous()
        assert not rest[1].is_contiguous()
    assert torch.equal(core((zxbcdt, *rest)), want)


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.0])
@pytest.mark.parametrize("t", [0, 63, 64, 200, 299])
def test_a_token_shows_from_there_on(t, value, dtype):
    """What is not finite may also show before, in its own chunk, as in the plain path: products there have zeros for it."""
    arguments = inputs(300, 2, 2, dtype=dtype)
    clean = core(arguments)
    arguments[0][0, t] = value
    same = (core(arguments) == clean).all(dim=-1)
    assert not same[0, t:].any() or value == 3.0
    assert not same[0, t]
    assert same[0, : t if value == 3.0 else max(0, t - 128)].all()
    assert same[1].all(), "other sequences know nothing of it"
    if value != 3.0:
        assert not core(arguments)[0, t:].isfinite().all(dim=-1).any()


@pytest.mark.parametrize("column", [5, 128 + 5, 256 + 5, 320 + 5, 384], ids=["z", "x", "B", "C", "dt"])
def test_not_a_number_in_one_column_is_never_hidden(column):
    arguments = inputs(150, 1, 2)
    arguments[0][0, 70, column] = float("nan")
    got, want = core(arguments)[0].isnan(), reference(arguments)[0][0].isnan()
    assert want.any()
    assert (got | ~want).all()


@pytest.mark.parametrize("x", [-200.0, -87.0, -20.0, -5.0, -1.0, -1e-3, -0.0, 1e-40, 1e-3, 0.3, 1.0, 5.0, 30.0, 100.0, 1e4])
def test_step_and_decay_are_accurate(x):
    """softplus and exp to a few units in the last place, seen in the state after one token and after two."""
    arguments = [torch.zeros_like(t) for t in inputs(2, 1, 1)]
    arguments[2].fill_(1.0)  # x = B = C = SiLU(1)
    arguments[4].fill_(-1.0)
    for steps in ([x], [-2.0, x]):
        state, short = torch.zeros(1, 1, 64, 64), [arguments[0][:, : len(steps)].clone(), *arguments[1:]]
        short[0][0, :, -1] = torch.tensor(steps)
        core(short, state=state)
        torch.testing.assert_close(state.double(), reference(short)[1], rtol=1e-6, atol=1e-37)


# --- states ---------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("cuts", [(1,), (2, 3), (64,), (63, 65), (100, 101, 102, 104), (1, 2, 3, 4, 5), (130, 199)], ids=str)
def test_parts_with_a_carried_state_equal_the_whole(cuts, dtype):
    arguments = inputs(200, 2, 3, dtype=dtype)
    want, last = reference(arguments)
    state, parts = torch.zeros(2, 3, 64, 64), []
    for start, stop in itertools.pairwise((0, *cuts, 200)):
        lead = min(start, 3)
        part = core((arguments[0][:, start - lead : stop], *arguments[1:]), state=state, lead=lead)
        assert part.shape[1] == stop - start
        parts.append(part)
    exact = dtype == torch.float32
    assert error(torch.cat(parts, dim=1), want) < (1e-6 if exact else 6e-3)
    assert error(state, last) < (1e-6 if exact else 6e-3)


def test_a_given_state_is_where_the_scan_starts():
    arguments, state = inputs(70, 2, 3), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    want, last = reference(arguments, state)
    assert error(core(arguments, state=state), want) < 1e-6
    assert error(state, last) < 1e-6


def test_nothing_but_lead_gives_nothing_and_keeps_the_state():
    state = torch.ones(2, 3, 64, 64)
    assert core(inputs(3, 2, 3), state=state, lead=3).shape == (2, 0, 192)
    assert torch.equal(state, torch.ones_like(state))


def test_the_plain_path_says_that_it_carries_no_state():
    for kwargs in (dict(state=torch.zeros(2, 3, 64, 64)), dict(lead=1)):
        with pytest.raises(UserError, match="carries no state"):
            core(inputs(5, 2, 3), "chunked", **kwargs)


@pytest.mark.parametrize("wrong", ["columns", "state", "state dtype", "lead", "taps", "norm"])
def test_shapes_that_do_not_fit_are_refused(wrong):
    zxbcdt, *rest = inputs(5, 2, 3)
    state, lead = torch.zeros(2, 3, 64, 64), 0
    if wrong == "columns":
        zxbcdt = zxbcdt[..., 1:]
    elif wrong == "state":
        state = state[:1]
    elif wrong == "state dtype":
        state = state.double()
    elif wrong == "lead":
        lead = 6
    elif wrong == "taps":
        rest[0] = rest[0][1:]
    else:
        rest[-1] = rest[-1][1:]
    with pytest.raises(RuntimeError):
        native.mixer_core(zxbcdt, *rest, EPS, state=state, lead=lead)


@pytest.mark.parametrize("segment", [1, 7, 1024])
@pytest.mark.parametrize("length", [1, 2, 10, 11, 1535, 1536, 1537, 4000])
def test_segments_cover_exactly_with_parts_of_nearly_one_size(monkeypatch, segment, length):
    monkeypatch.setattr(parts, "SEGMENT", segment)
    found = segments(length)
    assert [t for start, stop in found for t in range(start, stop)] == [*range(length)]
    sizes = {stop - start for start, stop in found}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= segment * 3 / 2 + 1
    assert len(found) == 1 or min(sizes) >= segment * 2 // 3


def test_only_long_sequences_on_a_cpu_in_evaluation_are_cut(monkeypatch):
    monkeypatch.setattr(parts, "SEGMENT", 16)
    block, x = small(depth=1).layers[0], torch.zeros(1, 25, 32)
    assert not block_goes_in_parts(block, x)
    with torch.no_grad():
        assert block_goes_in_parts(block, x)
        assert not block_goes_in_parts(block, x[:, :24])
        assert not block_goes_in_parts(block, x.to("meta"))
        assert not block_goes_in_parts(block.train(), x)
        block.eval()
        for handle in (
            block.mlp.w3.register_forward_hook(lambda *_: None),
            block.mixer.register_forward_pre_hook(lambda *_: None),
        ):
            assert not block_goes_in_parts(block, x), "hooks are to see everything"
            handle.remove()
        with monkeypatch.context() as patch:
            patch.setattr(block.mlp, "forward", lambda x: x)
            assert not block_goes_in_parts(block, x), "another forward is to be called"
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert not block_goes_in_parts(block, x)
        handle.remove()
        assert block_goes_in_parts(block, x)


@DTYPES
@pytest.mark.parametrize("segment", [1, 4, 10, 33])
def test_long_sequences_pass_in_parts_as_in_one_go(monkeypatch, calls, segment, dtype):
    torch.manual_seed(0)
    model, pictures = small(img_size=160).to(dtype), images(160, 160).to(dtype)
    assert {block.flip for block in model.layers} == {False, True}
    with torch.inference_mode():
        want = model.forward_features(pictures)
        before = calls["mixer_core"]
        monkeypatch.setattr(parts, "SEGMENT", segment)
        got = model.forward_features(pictures)
        assert calls["mixer_core"] == before + 4 * len(segments(100)) > before + 4
        token = model.forward_class_token(pictures)[:, 0]
    assert error(got, want.double()) < (2e-6 if dtype == torch.float32 else 0.02)
    for class_token in (got[:, 0], token):
        assert error(class_token, want[:, 0].double()) < (2e-6 if dtype == torch.float32 else 0.03)


def test_a_part_that_somebody_replaced_is_still_called(monkeypatch):
    """As adapters do: a layer of another kind in the place of ours."""
    model, pictures = small(img_size=160, depth=1), images(160, 160)
    model.layers[0].mlp.w3 = torch.nn.Sequential(model.layers[0].mlp.w3, torch.nn.Tanh())
    with torch.no_grad():
        want = model(pictures)
        monkeypatch.setattr(parts, "SEGMENT", 16)
        assert error(model(pictures), want.double()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_sequences_pass_in_parts_under_autocast(monkeypatch, dtype):
    torch.manual_seed(0)
    model, pictures = small(img_size=160), images(160, 160)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        want = model(pictures)
        monkeypatch.setattr(parts, "SEGMENT", 16)
        assert error(model(pictures), want.double()) < 0.02


def test_long_sequences_pass_in_one_go_where_the_library_is_missing(monkeypatch, plain):
    model, pictures = small(img_size=160), images(160, 160)
    with torch.no_grad():
        want = model(pictures)
        monkeypatch.setattr(parts, "SEGMENT", 16)
        assert error(plain(model, pictures), want.double()) < 2e-6


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@DTYPES
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.usefixtures("two_threads")
def test_two_threads_give_what_one_gives(batch, dtype):
    functions = [functools.partial(core, inputs(130, batch, heads, dtype=dtype)) for heads in (1, 2, 3, 5)]
    x, mixed = (torch.randn(batch, n, 48).to(dtype) for n in (130, 131))
    functions += [functools.partial(ops.to_reading_order, x, flip) for flip in (False, True)]
    functions += [functools.partial(ops.add_from_reading_order, x, mixed, flip) for flip in (False, True)]
    functions += [functools.partial(ops.rms_norm, x, torch.ones(48)), functools.partial(ops.silu_mul, x, x)]
    for function in functions:
        got = function()
        torch.set_num_threads(1)
        want = function()
        torch.set_num_threads(2)
        torch.testing.assert_close(got, want, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


def test_callers_on_several_threads_do_not_meet():
    several = [inputs(70 + seed, 1 + seed % 2, 1 + seed % 3, seed=seed) for seed in range(12)]
    want = [core(arguments) for arguments in several]
    with ThreadPoolExecutor(2) as pool:
        for got, alone in zip(pool.map(core, several), want, strict=True):
            assert torch.equal(got, alone)


# --- rows -----------------------------------------------------------------------------------------------------------


def row_operations(length, width, dtype):
    """What each operator is called with, and its plain form on float64."""
    generator = torch.Generator().manual_seed(length)
    x, y, mixed = (torch.randn(2, n, width, generator=generator).to(dtype) for n in (length, length, length + 1))
    weight = torch.randn(width, generator=generator)
    yield ops.rms_norm, (x, weight, 0.1)
    yield ops.silu_mul, (3 * x, y)
    for flip in (False, True):
        yield ops.to_reading_order, (x, flip)
        yield ops.add_from_reading_order, (x, mixed, flip)


@DTYPES
@pytest.mark.parametrize("width", [16, 48, 64, 40, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 65, 129])
def test_rows_equal_float64(calls, length, width, dtype):
    for operation, arguments in row_operations(length, width, dtype):
        got = operation(*arguments)
        want = operation(*(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
        assert got.dtype == dtype
        rounding = 2**-8 if width % 16 == 0 else 2**-6  # the plain path rounds in between
        tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=rounding, atol=1e-5)
        torch.testing.assert_close(got.double(), want, **tolerance)
    once = {"rms_norm": 1, "silu_mul": 1, "to_reading_order": 2, "add_from_reading_order": 2}
    assert calls == (once if width % 16 == 0 else {})


@DTYPES
def test_rows_take_any_strides(calls, dtype):
    for operation, arguments in row_operations(17, 48, dtype):
        strided = [
            torch.stack([t, t + 1], dim=-1)[..., 0].transpose(0, -1).contiguous().transpose(0, -1)
            if isinstance(t, torch.Tensor) and t.ndim == 3
            else t
            for t in arguments
        ]
        assert not strided[0].is_contiguous()
        assert torch.equal(operation(*strided), operation(*arguments))
    assert sum(calls.values()) == 12


def test_silu_is_accurate_everywhere(calls):
    special = torch.tensor(
        [-1e4, -100, -89, -88, -87.4, -20, -1, -1e-3, -1e-40, -0.0, 0.0, 1e-40, 1e-3, 1, 20, 88, 100, 1e30]
    )
    x = torch.cat([special, torch.linspace(-90, 90, 46 + 48 * 1000)]).view(-1, 16)
    got = ops.silu_mul(x, torch.ones_like(x))
    torch.testing.assert_close(got.double(), F.silu(x.double()), rtol=6e-7, atol=1e-34)
    assert torch.equal(torch.signbit(got), torch.signbit(x))
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).repeat(4)
    finite = ops.silu_mul(x, torch.ones_like(x)).isfinite()
    assert finite.tolist() == [False, False, False, True] * 4
    assert ops.silu_mul(x, torch.ones_like(x))[1] == float("inf")
    assert calls["silu_mul"] == 3


def test_bf16_rounds_to_the_nearest_even():
    """Sums that lie between two bf16 numbers, ties among them; infinities and not-a-number as they are."""
    generator = torch.Generator().manual_seed(0)
    x, mixed = (torch.randn(1, n, 1024, generator=generator).bfloat16() for n in (64, 65))
    x[0, 0, :16], mixed[0, 1, :16] = 1.0, torch.tensor([2**-8, 3 * 2**-8] * 8, dtype=torch.bfloat16)
    x[0, 1, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.38e38])
    mixed[0, 2, 3] = 3e38
    got, want = ops.add_from_reading_order(x, mixed, False), (x.float() + mixed[:, 1:].float()).bfloat16()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_rms_norm_of_large_and_small_rows():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-12], [1e-3], [1.0], [1e15]])
    want = ops.rms_norm(x.double(), torch.ones(64, dtype=torch.float64), 1e-6)
    torch.testing.assert_close(ops.rms_norm(x, torch.ones(64), 1e-6).double(), want, rtol=1e-6, atol=0)


# --- never stale ----------------------------------------------------------------------------------------------------


def assert_current(model, x, plain, before, *, tolerance=5e-6):
    """The native output is the plain one with the weights as they are now, which differs from ``before``."""
    with torch.no_grad():
        got, want = model(x), plain(model, x)
    assert error(got, want.double()) < tolerance
    assert before is None or error(before, want.double()) > 10 * tolerance, "the change must show"
    return want


def test_edited_parameters_count_at_once(calls, plain):
    model, x = small(depth=2), images()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    want = assert_current(model, x, plain, None)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
        want = assert_current(model, x, plain, want)
        parameter.data.mul_(0.2 if "A_log" in name else -0.5)
        want = assert_current(model, x, plain, want)
        parameter.data = torch.randn_like(parameter)
        want = assert_current(model, x, plain, want)
        with torch.no_grad():
            parameter.mul_(0.1)
        want = assert_current(model, x, plain, None)
    assert all(calls[name] for name in ("mixer_core", *ROWS))


def test_other_weights_count_at_once(plain):
    model, other, x = small(depth=2), small(depth=2, seed=5), images()
    want = assert_current(model, x, plain, None)
    model.load_state_dict(other.state_dict())
    want = assert_current(model, x, plain, want)
    model.load_state_dict(small(depth=2, seed=6).state_dict(), assign=True)
    want = assert_current(model, x, plain, want)
    average = ModelEmaV3(model, decay=0.5)
    average.update(other)
    want = assert_current(average.module, x, plain, want)
    model.load_state_dict(average.module.state_dict())
    assert_current(model, x, plain, None)
    with torch.no_grad():
        want = model(x)
        assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert_current(model, x.bfloat16(), plain, None, tolerance=0.03)
    assert_current(model.float(), x, plain, want, tolerance=1e-5)
    assert_current(copy.deepcopy(other), x, plain, None)


# --- dispatch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "set_grad_enabled", "frozen", "autocast", "bf16"])
def test_native_is_used_where_nothing_needs_a_gradient(calls, way):
    model, x = small(depth=2), images()
    if way == "frozen":
        model.requires_grad_(False)
    if way == "bf16":
        model, x = model.bfloat16(), x.bfloat16()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast")
    with torch.inference_mode(way == "inference_mode"), torch.set_grad_enabled(way == "frozen"), autocast:
        model.forward_features(x)
    rows = {"rms_norm": 5, "silu_mul": 2, "to_reading_order": 2, "add_from_reading_order": 2}
    if way == "autocast":
        del rows["add_from_reading_order"]  # there its two arguments differ in dtype
    assert calls["mixer_core"] == 2
    assert {name: calls[name] for name in rows} == rows


@pytest.mark.parametrize("why", ["meta", "float64", "reference", "chunked"])
def test_native_is_not_used(calls, why):
    implementation = {"implementation": why} if why in ("reference", "chunked") else {}
    model, x = small(depth=1, **implementation), images()
    if why in ("meta", "float64"):
        model, x = (model.to("meta"), x.to("meta")) if why == "meta" else (model.double(), x.double())
    with torch.no_grad():
        model(x)
    assert calls["mixer_core"] == 0
    assert not calls or implementation


@pytest.mark.parametrize("wanted", ["parameters", "inputs", "one parameter"])
def test_gradients_are_those_of_the_plain_path(plain, wanted):
    model, x = small(depth=2).requires_grad_(wanted == "parameters"), images()
    of = {"parameters": [*model.parameters()], "inputs": [x], "one parameter": [model.layers[0].mixer.A_log]}[wanted]
    for t in of:
        t.requires_grad_()
    found = [call(lambda: torch.autograd.grad(model(x).square().sum(), of)) for call in (lambda f: f(), plain)]
    for got, want in zip(*found, strict=True):
        assert error(got, want.double()) < 1e-4


def derivatives_of(arguments, implementation, weight):
    arguments = [t.detach().clone().requires_grad_() for t in arguments]
    return torch.autograd.grad(core(arguments, implementation), arguments, weight)


@pytest.mark.parametrize("extreme", ["usual", "strong decay", "long steps"])
@pytest.mark.parametrize(
    ("length", "batch", "heads"), [(1, 2, 1), (2, 1, 3), (65, 3, 2), (80, 1, 5), (81, 2, 1), (330, 1, 2)]
)
def test_gradients_equal_float64(length, batch, heads, extreme):
    arguments = list(inputs(length, batch, heads, dt=50.0 if extreme == "long steps" else 0.0))
    if extreme == "strong decay":
        arguments[4] = torch.full_like(arguments[4], 6.0)
    weight = torch.randn(batch, length, 64 * heads)
    want = derivatives_of([t.double() for t in arguments], "chunked", weight.double())
    for got, w, t in zip(derivatives_of(arguments, "native", weight), want, arguments, strict=True):
        assert got.shape == t.shape
        # One token decays nothing: the gradient of A is exactly zero there, and next to it where everything is forgotten.
        assert (got.double() - w).norm() < 1e-3 * w.norm() + 1e-5


@pytest.mark.parametrize(("length", "batch", "heads"), [(66, 2, 3), (200, 1, 2)])
def test_gradients_in_bf16_are_near_float64(length, batch, heads):
    arguments = inputs(length, batch, heads, dtype=torch.bfloat16)
    weight = torch.randn(batch, length, 64 * heads).bfloat16()
    want = derivatives_of([t.double() for t in arguments], "chunked", weight.double())
    for got, w, t in zip(derivatives_of(arguments, "native", weight), want, arguments, strict=True):
        assert got.dtype == t.dtype
        assert error(got, w) < 0.03


def test_gradients_of_rows_equal_float64():
    for length in (1, 2, 70):
        for operation, arguments in row_operations(length, 48, torch.float32):
            weight, results = None, []
            for dtype in (torch.float64, torch.float32):
                tensors = [t.to(dtype).requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments]
                wanted = [t for t in tensors if isinstance(t, torch.Tensor)]
                y = operation(*tensors)
                weight = torch.randn_like(y) if weight is None else weight
                results.append(torch.autograd.grad(y, wanted, weight.to(dtype)))
            for want, got in zip(*results, strict=True):
                assert error(got, want) < 1e-6


def test_second_derivatives_are_refused_rather_than_wrong():
    several = [(lambda *arguments: core(arguments), inputs(9, 1, 1)), *row_operations(9, 48, torch.float32)]
    for operation, arguments in several:
        tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
        gradients = torch.autograd.grad(
            operation(*[t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments]).square().sum(),
            tensors,
            create_graph=True,
        )
        with pytest.raises(NotImplementedError, match="differentiated twice"):
            sum(gradient.square().sum() for gradient in gradients).backward()


def test_a_state_is_not_silently_forgotten_where_gradients_are_wanted():
    arguments = inputs(5, 1, 1)
    arguments[0].requires_grad_()
    with pytest.raises(ValueError, match="without gradients only"):
        core(arguments, state=torch.zeros(1, 1, 64, 64))


def test_bf16_without_onednn():
    arguments = inputs(70, 1, 2, dtype=torch.bfloat16)
    want = core(arguments)
    torch._C._set_mkldnn_enabled(False)
    try:
        got = core(arguments)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert error(got, want.double()) < 0.01


@pytest.mark.filterwarnings("ignore")  # of torch.func itself
def test_forward_derivatives_are_not_lost():
    """The plain scan has none and says so; native operators must not take a missing one for zero."""
    model, x = small(depth=1).requires_grad_(False), images()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(model, (x,), (x,))


@pytest.mark.parametrize(
    "changes", [dict(state_dim=32), dict(head_dim=32), dict(conv_width=3), dict(dtype=torch.float16)], ids=str
)
def test_native_is_not_used_for_mixers_of_other_shapes(calls, changes):
    mixer = Mamba2(64, **changes)
    with torch.no_grad():
        mixer(torch.randn(1, 9, 64, dtype=changes.get("dtype")))
    assert not calls


@pytest.mark.parametrize("way", ["script", "trace", "export", "onnx"])
@pytest.mark.filterwarnings("ignore")
def test_recorded_programs_do_not_see_native_operators(calls, tmp_path, way):
    model, x = small(depth=1).requires_grad_(False), images()
    with torch.no_grad():
        if way == "script":
            program = str(torch.jit.script(model).inlined_graph)
        elif way == "trace":
            program = str(torch.jit.trace(model, x, check_trace=False).inlined_graph)
        elif way == "export":
            program = str(torch.export.export(model, (x,)).graph)
        else:
            program = str(torch.onnx.export(model, (x,), dynamo=True, verbose=False).model)
    assert "native" not in program.replace("aten::native", "")
    assert "_linear_pointwise" not in program
    assert not calls


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_images_equals_the_batch():
    model, x = small(depth=1), images()
    with torch.no_grad():
        got = torch.func.vmap(lambda image: model(image[None])[0])(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


def fresh_status(monkeypatch):
    """As in a new process: the library has not been looked for yet."""
    monkeypatch.setattr(operators, "_found", None)
    return operators.status


def test_switched_off_by_the_environment(monkeypatch, calls):
    model, x = small(depth=1), images()
    with torch.no_grad():
        want = model(x)
        calls.clear()
        monkeypatch.setenv("VIT_LINEARIZER_NATIVE", "0")
        fresh_status(monkeypatch)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        with pytest.raises(UserError, match=r"native: not here: switched off by VIT_LINEARIZER_NATIVE=0"):
            small(depth=1, implementation="native")(x)
    assert not calls
    assert ops.choose_mixer(torch.device("cpu"))[0] == "chunked"
    monkeypatch.undo()
    assert ops.choose_mixer(torch.device("cpu"))[0] == "native"


# --- compiled, counted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_model_calls_the_operators_and_equals_eager(backend):
    torch._dynamo.reset()
    model, x, seen = small(depth=2), images(), Counter()

    def recorder(graph, example_inputs):
        seen.update(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    with torch.no_grad():
        want = model(x)
        got = torch.compile(model, backend=recorder, fullgraph=True)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for name in ("mixer_core", *ROWS):
        assert any(f"vit_linearizer_native.{name}" in target for target in seen), name


@DTYPES
def test_operators_keep_their_schemas_and_fakes(dtype):
    tests = ("test_schema", "test_faketensor")
    mixer = (*inputs(9, 2, 3, dtype=dtype), EPS)
    torch.library.opcheck(OPS.mixer_core.default, mixer, test_utils=tests)
    torch.library.opcheck(OPS.mixer_core_carrying.default, (*mixer, torch.zeros(2, 3, 64, 64), 3), test_utils=tests)
    for length in (1, 80, 81, 330):  # chunks of several sizes
        mixer = (*inputs(length, 2, 3, dtype=dtype), EPS)
        torch.library.opcheck(OPS.mixer_core_keeping.default, mixer, test_utils=tests)
        kept = OPS.mixer_core_keeping(*mixer)
        backward = (torch.randn_like(kept[0]), *mixer, *kept)
        torch.library.opcheck(OPS.mixer_core_backward.default, backward, test_utils=tests)
    for operation, arguments in row_operations(9, 32, dtype):
        operator = getattr(OPS, operation.__name__).default
        torch.library.opcheck(operator, arguments, test_utils=tests)


def count(model, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def test_flops_are_those_of_the_plain_path(monkeypatch, plain):
    model, x = small(depth=2, embed_dim=192), images(224, 224, batch=1)
    with monkeypatch.context() as patch:
        patch.setattr(onednn, "prefers_onednn", lambda: False)
        without, want = count(model, x), plain(count, model, x)
        assert abs(without - want) < 0.03 * want
        native_part = without - plain(count, model.patch_embed, x)
        assert native_part > 0
    assert count(model, x) == without, "oneDNN's products count too"


# --- linear ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def onednn_calls(monkeypatch):
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN")
    found, function = Counter(), onednn.onednn_linear
    monkeypatch.setattr(onednn, "prefers_onednn", lambda: True)
    monkeypatch.setattr(onednn, "onednn_linear", lambda *args: found.update(linear=1) or function(*args))
    return found


def test_linear_in_bf16_needs_a_cpu_that_has_it(onednn_calls, monkeypatch):
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((3, 20), (33, 20), (33,)))
    for there in (False, torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        monkeypatch.setattr(onednn, "_HAS_BF16", there)
        torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias))
        assert onednn_calls["linear"] == int(there)


@pytest.mark.parametrize("biased", [False, True])
def test_linear_by_onednn_equals_torch(onednn_calls, biased):
    weight, bias = torch.randn(33, 20), torch.randn(33) if biased else None
    several = [torch.randn(*shape, 20) for shape in ((), (1,), (2, 7), (2, 3, 5))] + [torch.randn(20, 9, 3).transpose(0, 2)]
    for x in several:
        torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.linear(several[2], weight.T.contiguous().T, bias), F.linear(several[2], weight, bias))
    assert onednn_calls["linear"] == len(several) + 1


def test_linear_goes_to_torch_where_onednn_does_not_serve(onednn_calls):
    x, weight = torch.randn(3, 20), torch.nn.Parameter(torch.randn(33, 20))
    assert ops.linear(x, weight, None).requires_grad
    ops.linear(torch.randn(0, 20), weight.detach(), None)
    with torch.no_grad():
        ops.linear(x.double(), weight.double(), None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ops.linear(x, weight, None).dtype == torch.bfloat16
    assert not onednn_calls


# --- the build ------------------------------------------------------------------------------------------------------

#: Stands for a compiler: takes a moment, links by handing out the library that is there, and leaves a line for each call.
_COMPILER = """#!/bin/sh
case "$*" in *-dumpversion*|*--version*|*" -v"*) exec c++ "$@";; esac
echo "$*" >> "{log}"
{action}
while [ $# -gt 0 ]; do
  case "$1" in -o) out="$2";; -MF) : > "$2";; esac
  shift
done
case "$out" in *.so) sleep 0.3; cp "{library}" "$out";; *) : > "$out";; esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A cache of its own and a stand-in for the compiler; nothing is loaded into this process."""
    library, log = native.status()[1], tmp_path / "calls"
    cpp_extension.JIT_EXTENSION_VERSIONER.entries.clear()  # of earlier tests, as in a new process

    def set_compiler(action=""):
        file = tmp_path / "compiler"
        file.write_text(_COMPILER.format(log=log, library=library, action=action))
        file.chmod(0o755)
        monkeypatch.setenv("CXX", str(file))

    set_compiler.cache = tmp_path / "cache" / "vit_linearizer"
    set_compiler.calls = lambda: len(log.read_text().splitlines()) if log.exists() else 0
    set_compiler.breaks = functools.partial(set_compiler, 'echo "x.cpp:1: error: no such thing" >&2; exit 1')
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    set_compiler()
    yield set_compiler
    cpp_extension.JIT_EXTENSION_VERSIONER.entries.clear()


def test_a_build_leaves_one_file_that_needs_no_compiler_again(machine, monkeypatch):
    file = build.load_library()
    assert [*machine.cache.iterdir()] == [file]
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert build.load_library() == file


@pytest.mark.parametrize("compiler", ["/nowhere/c++", "no-such-compiler -x", "", " "])
def test_without_a_compiler_there_is_a_reason_and_the_plain_path(machine, monkeypatch, calls, compiler):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("PATH", "")
    fresh_status(monkeypatch)
    with torch.no_grad():
        assert small(depth=1)(images()).isfinite().all()
    assert not calls
    finding = doctor(DoctorConfig())["scan"]
    assert finding.startswith("chunked: plain PyTorch; the native one is not here: there is no C++ compiler")
    assert "\n" not in finding
    assert not [*machine.cache.parent.glob("*/*.failed")], "a compiler may come"


def test_a_failed_build_is_told_and_tried_again_only_on_demand(machine):
    machine.breaks()
    with pytest.raises(build.BuildError, match=r"^the build failed: .*error: no such thing$"):
        build.load_library()
    assert [file.suffix for file in machine.cache.iterdir()] == [".failed"]
    before = machine.calls()
    machine()
    with pytest.raises(build.BuildError, match=r"no such thing \(vit-linearizer doctor tries again\)"):
        build.load_library()
    assert machine.calls() == before > 0
    file = build.load_library(retry=True)
    assert [*machine.cache.iterdir()] == [file]


def test_doctor_tries_a_failed_build_again(machine, monkeypatch):
    machine.breaks()
    fresh_status(monkeypatch)
    assert doctor(DoctorConfig())["scan"].startswith("chunked")
    machine()
    fresh_status(monkeypatch)
    assert doctor(DoctorConfig())["scan"].startswith("native")


def test_asking_twice_is_allowed(machine, monkeypatch):
    status = fresh_status(monkeypatch)
    assert status()[0]
    assert status(retry=True)[0]


def test_leftovers_of_killed_builds_block_nobody(machine):
    machine.cache.mkdir(parents=True)
    old, new = machine.cache / "build-old", machine.cache / "build-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "lock").touch()
    os.utime(old, (time.time() - 7200,) * 2)
    file = build.load_library()
    assert sorted(machine.cache.iterdir()) == sorted([new, file])


def test_a_cache_that_cannot_be_written_is_a_reason(machine):
    machine.cache.parent.write_text("a file where a folder should be")
    with pytest.raises(
        build.BuildError, match=r"no folder to keep the library in: .*vit_linearizer.*; set TORCH_EXTENSIONS_DIR"
    ):
        build.load_library()


@pytest.mark.parametrize("where", ["not readable", "no home"])
def test_a_home_that_is_not_ours_is_a_reason(machine, monkeypatch, where):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied") if where == "not readable" else RuntimeError("no home directory")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(*((Path, "is_file") if where == "not readable" else (Path, "home")), refuse)
    with pytest.raises(build.BuildError):
        build.load_library()


def test_the_name_in_the_cache_stands_for_all_that_the_library_depends_on(monkeypatch, tmp_path):
    keys = [build._key(["-O3"]), build._key(["-O2"])]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        keys.append(build._key(["-O3"]))
    with monkeypatch.context() as patch:
        patch.setattr(build, "_cpu_features", lambda: ["neon"])
        keys.append(build._key(["-O3"]))
    for name in (*build._SOURCES, *build._HEADERS):
        folder = tmp_path / name
        folder.mkdir()
        for other in (*build._SOURCES, *build._HEADERS):
            (folder / other).write_bytes((build._HERE / other).read_bytes() + (b"//" if other == name else b""))
        with monkeypatch.context() as patch:
            patch.setattr(build, "_HERE", folder)
            keys.append(build._key(["-O3"]))
    assert len({*keys}) == len(keys)
    assert build._key(["-O3"]) == keys[0]
    assert {*build._SOURCES, *build._HEADERS} == {
        file.name for file in build._HERE.iterdir() if file.suffix in (".cpp", ".h")
    }


def start(code, **environment):
    """Python in a process of its own, with this folder's modules."""
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}; {code}"
    environment = os.environ | environment
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process):
    output = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, output
    return output


def test_processes_that_build_at_once_both_end_well(machine):
    code = "from vit_linearizer.ops import native; print(native.status())"
    several = [start(code) for _ in range(2)]
    for process in several:
        assert "(True" in finish(process)
    (file,) = machine.cache.iterdir()
    calls = machine.calls()
    assert str(file) in finish(start(code, CXX="/nowhere/c++"))
    assert machine.calls() == calls > 0


def test_a_library_built_meanwhile_by_another_process_does_no_harm(machine):
    """It takes the other's file where that came last: the same operators must not be registered twice."""
    code = (
        "import pathlib, shutil; from vit_linearizer.ops import native; b = native.build; build = b._build_and_load\n"
        "def late(file, flags): build(file, flags); shutil.copy(file, f'{file}2'); pathlib.Path(f'{file}2').replace(file)\n"
        "b._build_and_load = late; print(native.status())"
    )
    assert "(True" in finish(start(code))


def run_variant(*flags):
    """The numeric tests of this file with a library for other instructions; called in a process of its own."""
    operators.load_library = functools.partial(build.load_library, flags)
    print(native.status())
    for dtype, (length, (batch, heads)) in itertools.product(
        (torch.float32, torch.bfloat16), zip((1, 3, 65, 200), SHAPES, strict=True)
    ):
        check(inputs(length, batch, heads, dtype=dtype))
        for operation, arguments in row_operations(length, 48, dtype):
            want = operation(*(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
            tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float32 else dict(rtol=2**-8, atol=1e-5)
            torch.testing.assert_close(operation(*arguments).double(), want, **tolerance)
    for x in (-200.0, -1.0, -0.0, 1e-3, 30.0):
        test_step_and_decay_are_accurate(x)
    test_silu_is_accurate_everywhere(Counter(silu_mul=3))
    test_bf16_rounds_to_the_nearest_even()


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="instructions of x86-64")
@pytest.mark.parametrize("flags", [("-mavx2", "-mfma"), ("-msse2",)], ids=str)
def test_builds_for_older_machines_are_right_too(flags):
    """In the usual cache: they are compiled once."""
    output = finish(start(f"import test_native as t; t.run_variant(*{flags!r})"))
    assert "(True" in output
