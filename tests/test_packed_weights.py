"""Packed copies of weights: the same numbers, never stale, gone with their weight; and layers read in part."""

import copy
import gc
import importlib
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from small_models import images, small
from vit_linearizer.models.linear import Linear, prepared
from vit_linearizer.ops import native, onednn, packed_weights

parts = importlib.import_module("vit_linearizer.models.parts")


@pytest.fixture(autouse=True)
def packs(monkeypatch):
    """Every weight pays; counts how often one is packed."""
    there, reason = native.status()
    if not there and ("no C++ compiler" in reason or "switched off" in reason):
        pytest.skip(reason)
    assert there, reason
    if not onednn._THERE:
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(onednn, "prefers_onednn", lambda: True)
    monkeypatch.setattr(packed_weights, "LEAST_ELEMENTS", 1)
    monkeypatch.setattr(packed_weights, "LEAST_ROWS", 1)
    monkeypatch.setattr(packed_weights, "DTYPES", (torch.float32, torch.bfloat16))  # any CPU can have the first
    count, pack = Counter(), onednn.pack
    monkeypatch.setattr(onednn, "pack", lambda *args: count.update(packs=1) or pack(*args))
    return count


# --- fingerprint ----------------------------------------------------------------------------------------------------


def words(count, seed=0):
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 511, 512, 513, 8191, 8192, 8193, 40000])
def test_every_bit_and_place_shows(count):
    t = words(count)
    seen = {native.fingerprint(t)}
    for place in {0, count // 3, count // 2, count - 1}:
        for bit in (0, 15, 31, 32, 47, 62):
            edited = t.clone()
            edited[place] ^= 1 << bit
            seen.add(native.fingerprint(edited))
        edited = t.clone()
        edited[place] = -edited[place]
        seen.add(native.fingerprint(edited))
    assert len(seen) == 1 + 7 * len({0, count // 3, count // 2, count - 1})
    assert native.fingerprint(t.clone()) == native.fingerprint(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_of_many_places_show(dtype):
    """Such as cancel in a plain sum, exclusive or, or polynomial."""
    t = torch.randn(96, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    swapped, shifted, two_signs = t.clone(), t.roll(1), t.clone()
    swapped.view(-1)[[0, 512]] = swapped.view(-1)[[512, 0]]
    two_signs.view(-1)[[3, 3 + 1024 // t.itemsize]] *= -1
    rows = t[torch.randperm(96)]
    edits = [t, -t, 2 * t, t.T.contiguous(), t.flip(0), t.flip(1), rows, swapped, shifted, two_signs, torch.zeros_like(t)]
    assert len({native.fingerprint(edit) for edit in edits}) == len(edits)


def test_zeros_of_every_length_differ():
    assert len({native.fingerprint(torch.zeros(n, dtype=torch.uint8)) for n in range(1, 1200)}) == 1199


def test_threads_do_not_matter():
    t, threads = words(300_000), torch.get_num_threads()
    want = native.fingerprint(t)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert native.fingerprint(t) == want
    finally:
        torch.set_num_threads(threads)


def test_random_edits_show():
    generator = torch.Generator().manual_seed(1)
    t, seen = torch.randn(64, 64, generator=generator), set()
    for _ in range(2000):
        t.view(-1)[torch.randint(t.numel(), (2,), generator=generator)] += 1e-3
        seen.add(native.fingerprint(t))
    assert len(seen) == 2000


# --- copies ---------------------------------------------------------------------------------------------------------


def test_packed_once_for_equal_weights_and_the_same_product(packs):
    layer, x = Linear(40, 72), torch.randn(3, 5, 40)
    with torch.no_grad():
        for rows in (x, x[:1], x[0, 0]):
            torch.testing.assert_close(layer(rows), F.linear(rows, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert packs["packs"] == 1


def test_every_way_to_edit_counts_at_once(packs):
    layer, other, x = Linear(40, 72), Linear(40, 72), torch.randn(9, 40)
    average = ModelEmaV3(other, decay=0.3)

    def through_numpy():
        layer.weight.detach().numpy()[7, 3] += 1

    edits = [
        lambda: layer.weight.add_(1),
        lambda: layer.weight.data.mul_(-1),
        lambda: layer.weight.data[71, 39].add_(0.5),
        lambda: setattr(layer.weight, "data", torch.randn(72, 40)),
        lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn(72, 40))),
        through_numpy,
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: average.update(Linear(40, 72)) or layer.load_state_dict(average.module.state_dict(), assign=True),
        lambda: layer.bias.data.add_(1),
    ]
    with torch.no_grad():
        before = layer(x)
        for number, edit in enumerate(edits):
            edit()
            got = layer(x)
            torch.testing.assert_close(got, F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(got, before, rtol=1e-3, atol=1e-3), f"edit {number} must show"
            before = got
    assert packs["packs"] == len(edits), "all but the bias's"


def test_another_dtype_and_back(packs):
    if not onednn._HAS_BF16:
        pytest.skip("this CPU has no bf16")
    layer, x = Linear(40, 72), torch.randn(9, 40)
    with torch.no_grad():
        want = layer(x)
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(layer.float()(x), want, rtol=0.05, atol=0.05)
    assert packs["packs"] == 3


def test_a_copy_goes_with_its_weight():
    before = len(packed_weights._copies)
    layer = Linear(40, 72)
    with torch.no_grad():
        layer(torch.randn(9, 40))
    assert len(packed_weights._copies) == before + 1
    del layer
    gc.collect()
    assert len(packed_weights._copies) == before


def test_models_are_copied_and_pickled_without_their_copies(packs):
    model, x = small(depth=1), images()
    with torch.no_grad():
        want = model(x)
        size, plain = len(pickle.dumps(model)), len(pickle.dumps(small(depth=1)))
        assert abs(size - plain) < 0.01 * plain
        twin = copy.deepcopy(model)
        twin.layers[0].mlp.w1.weight.data.neg_()
        assert not torch.allclose(twin(x), want)
        assert torch.equal(model(x), want)


def test_inference_mode_and_after(packs):
    layer, x = Linear(40, 72), torch.randn(9, 40)
    with torch.inference_mode():
        want = layer(x)
    layer.requires_grad_(False)
    assert torch.equal(layer(x), want)
    layer.requires_grad_(True)
    loss = layer(x).sum()
    loss.backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(72, 40))
    assert packs["packs"] == 1


REASONS = ("rows", "few rows", "elements", "no parameter", "dtype", "strided", "no library", "autocast", "gradients")


@pytest.mark.parametrize("why", REASONS)
def test_left_as_it_is_where_it_does_not_pay(packs, monkeypatch, why):
    layer, x = Linear(40, 72), torch.randn(9, 40)
    if why == "rows":
        monkeypatch.setattr(packed_weights, "MOST_ROWS", 8)
    elif why == "few rows":
        monkeypatch.setattr(packed_weights, "LEAST_ROWS", 10)
    elif why == "elements":
        monkeypatch.setattr(packed_weights, "LEAST_ELEMENTS", 72 * 40 + 1)
    elif why == "no parameter":
        weight = layer.weight.detach()
        del layer.weight
        layer.weight = weight
    elif why == "dtype":
        monkeypatch.setattr(packed_weights, "DTYPES", (torch.bfloat16,))
    elif why == "strided":
        layer.weight.data = torch.randn(40, 72).T
    elif why == "no library":
        monkeypatch.setattr(native, "available", lambda: False)
    with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        got, want = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not packs


def test_compiled_programs_hold_the_weight_itself(packs):
    layer, x = Linear(40, 72), torch.randn(9, 40)
    program = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        want = program(x)
        layer.weight.data.neg_()
        torch.testing.assert_close(program(x) - layer.bias, layer.bias - want, rtol=1e-4, atol=1e-5)
    assert not packs


def test_an_edit_while_it_is_packed_leaves_no_copy(packs, monkeypatch):
    """As by a thread that swaps in an average and takes it out again."""
    layer, x, pack = Linear(40, 72), torch.randn(9, 40), onednn.pack

    def meanwhile(weight, rows):
        weight.data.neg_()
        packed = pack(weight, rows)
        monkeypatch.setattr(onednn, "pack", pack)
        return packed

    monkeypatch.setattr(onednn, "pack", meanwhile)
    with torch.no_grad():
        layer(x)
        layer.weight.data.neg_()
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_a_recorded_program_packs_nothing(packs):
    layer, x, other = Linear(40, 72, bias=False), torch.randn(9, 40), torch.randn(72, 40)
    with torch.no_grad():
        layer(x)
        program = make_fx(lambda weight, x: torch.func.functional_call(layer, {"weight": weight}, (x,)))(layer.weight, x)
        torch.testing.assert_close(program(other, x), x @ other.T, rtol=1e-4, atol=1e-4)


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 24, 71])
@pytest.mark.parametrize("rows", [10, 2000, 5000])
@pytest.mark.parametrize("biased", [False, True])
def test_prepared_layers_equal_the_layer(packs, first, rows, biased):
    layer, x = Linear(40, 72, bias=biased), torch.randn(10, 40)
    with torch.no_grad():
        run = prepared(layer, rows, first)
        torch.testing.assert_close(run(x), layer(x)[:, first:], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run(x[:3]), layer(x[:3])[:, first:], rtol=1e-5, atol=1e-5)


# --- a mixer of which only the last output is read ------------------------------------------------------------------


@pytest.mark.parametrize("segment", [16, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_that_nobody_reads_do_not_matter(monkeypatch, segment, dtype):
    monkeypatch.setattr(parts, "SEGMENT", segment)
    model, pictures = small(img_size=160, depth=2).to(dtype), images(160, 160).to(dtype)
    with torch.inference_mode():
        want = model.forward_head(model.forward_features(pictures))
        torch.testing.assert_close(model(pictures), want, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
        gates = model.layers[-1].mixer.in_proj.weight[: model.layers[-1].mixer.inner_dim]
        gates.neg_()
        changed = model.forward_head(model.forward_features(pictures))
        assert not torch.allclose(changed.float(), want.float(), rtol=1e-2, atol=1e-2), "the last gate must matter"
        torch.testing.assert_close(model(pictures), changed, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def whole(model, pictures):
    """What the model says with every token of its last block."""
    return model.forward_head(model.forward_features(pictures))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # PyTorch's own
def test_forward_derivatives_know_nothing_of_it(monkeypatch):
    monkeypatch.setattr(importlib.import_module("vit_linearizer.models.linear"), "SEGMENT", 8)
    model, pictures, along = small(depth=1), images(), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(pictures, along)
        got, want = (forward_ad.unpack_dual(output).tangent for output in (model(dual), whole(model, dual)))
    assert want.norm() > 0.1
    torch.testing.assert_close(got, want)


def test_a_bias_that_somebody_gave_it_counts():
    model, pictures = small(depth=1), images()
    in_proj = model.layers[0].mixer.in_proj
    in_proj.bias = torch.nn.Parameter(torch.randn(in_proj.out_features))
    with torch.no_grad():
        torch.testing.assert_close(model(pictures), whole(model, pictures))


class NoParts(torch.Tensor):
    """A weight of a kind that cannot be cut, as quantised ones are."""

    weight = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert args[0] is not cls.weight or function is not torch.Tensor.__getitem__
        return super().__torch_function__(function, types, args, kwargs)


def test_weights_of_another_kind_stay_whole():
    model, pictures = small(depth=1), images()
    in_proj = model.layers[0].mixer.in_proj
    NoParts.weight = in_proj.weight = torch.nn.Parameter(in_proj.weight.detach().as_subclass(NoParts), requires_grad=False)
    with torch.no_grad():
        torch.testing.assert_close(model(pictures), whole(model, pictures))


def test_a_hook_on_all_modules_sees_the_first_layer():
    model, pictures, seen = small(depth=1), images(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    with torch.no_grad():
        model(pictures)
    handle.remove()
    assert model.layers[0].mixer.in_proj in seen


def test_a_first_layer_that_somebody_replaced_is_still_called():
    model, pictures = small(depth=1), images()
    mixer = model.layers[0].mixer
    mixer.in_proj = torch.nn.Sequential(mixer.in_proj, torch.nn.Tanh())
    with torch.no_grad():
        want = model.forward_head(model.forward_features(pictures))
        torch.testing.assert_close(model(pictures), want)
