"""Adventurer against its description written a second time, its reading order, and everything timm expects of a model."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode

from vit_linearizer import ops
from vit_linearizer.models.adventurer import Adventurer
from vit_linearizer.models.loading import create_backbone, save_model_folder

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_classes": 7}


def small_model(*, seed=0, dtype=torch.float32, **changes):
    """A model of a few thousand parameters, every one of them random (no zero bias, no unit norm)."""
    torch.manual_seed(seed)
    model = timm.create_model("adventurer_tiny_patch16_224", **{**SMALL, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def images(height=32, width=32, *, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3), dtype=dtype)


# --- sizes and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "hidden", "depth", "patch", "millions"),
    [
        ("adventurer_tiny_patch16_224", 256, 640, 12, 16, 11.6),
        ("adventurer_small_patch16_224", 512, 1280, 12, 16, 44),
        ("adventurer_small_patch14_224", 512, 1280, 12, 14, 44),
        ("adventurer_base_patch16_224", 768, 1920, 12, 16, 99),
        ("adventurer_base_patch14_224", 768, 1920, 12, 14, 99),
        ("adventurer_base_patch8_224", 768, 1920, 12, 8, 99),
        ("adventurer_large_patch16_224", 1024, 2560, 24, 16, 346),
        ("adventurer_large_patch14_224", 1024, 2560, 24, 14, 346),
    ],
)
def test_sizes_of_the_table(name, width, hidden, depth, patch, millions):
    model = timm.create_model(name, device="meta")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    inner, heads, state = 2 * width, 2 * width // 64, 64
    assert len(model.layers) == depth
    assert shapes["patch_embed.proj.weight"] == (width, 3, patch, patch)
    assert shapes["pos_embed"] == (1, (224 // patch) ** 2 + 1, width)
    assert shapes["layers.0.mixer.in_proj.weight"] == (2 * inner + 2 * state + heads, width)
    assert shapes["layers.0.mixer.conv1d.weight"] == (inner + 2 * state, 1, 4)
    assert shapes["layers.0.mlp.w1.weight"] == (hidden, width)
    assert shapes["head.weight"] == (1000, width)
    counted = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(counted - millions) < (0.05 if millions < 20 else 0.5), counted


def test_every_registered_name_is_in_the_table():
    table = next(m for m in test_sizes_of_the_table.pytestmark if m.name == "parametrize").args[1]
    assert sorted(row[0] for row in table) == sorted(timm.list_models("adventurer*"))


def test_state_dict_names_are_the_published_ones():
    around = ("cls_token", "pos_embed", "norm_f.weight")
    around += tuple(f"{layer}.{kind}" for layer in ("patch_embed.proj", "head") for kind in ("weight", "bias"))
    block = ("norm.weight", "norm_mlp.weight")
    block += tuple(f"mixer.{name}" for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D"))
    block += tuple(f"mixer.{name}" for name in ("norm.weight", "out_proj.weight"))
    block += tuple(f"mlp.{layer}.{kind}" for layer in ("w1", "w2", "w3") for kind in ("weight", "bias"))
    model = timm.create_model("adventurer_large_patch14_224", device="meta")
    assert set(model.state_dict()) == {*around, *(f"layers.{n}.{name}" for n in range(24) for name in block)}


def test_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("adventurer_tiny_patch16_224", depth=4)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        if name.endswith(("norm.weight", "norm_mlp.weight", "norm_f.weight", "mixer.D")):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    for parameter in (model.pos_embed, model.cls_token, model.head.weight):
        assert 0.017 < parameter.std() < 0.023
    assert 0.9 < model.patch_embed.proj.weight.std() * (3 * 16 * 16) ** 0.5 < 1.1, "LeCun normal"
    largest = model.layers[1].mixer.out_proj.weight.abs().max()
    assert torch.isclose(largest, torch.tensor(0.5 / 512**0.5), rtol=0.01), "Kaiming-uniform over the root of the depth"


# --- the model written a second time --------------------------------------------------------------------------------


def rms_norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * weight


def mamba2(u, w):
    """Mamba-2 from its equations: one token, one head at a time."""
    batch, length, dim = u.shape
    inner, state = 2 * dim, 64
    heads = inner // 64
    projected = u @ w["mixer.in_proj.weight"].T
    z, xBC, dt = projected[..., :inner], projected[..., inner : 2 * inner + 2 * state], projected[..., -heads:]
    kernel, convolved = w["mixer.conv1d.weight"][:, 0], torch.empty_like(xBC)
    for t in range(length):
        convolved[:, t] = w["mixer.conv1d.bias"]
        for back in range(min(t + 1, 4)):
            convolved[:, t] += kernel[:, 3 - back] * xBC[:, t - back]
    convolved = convolved * torch.sigmoid(convolved)
    x, B, C = convolved[..., :inner], convolved[..., inner : inner + state], convolved[..., inner + state :]
    dt = torch.log1p(torch.exp(dt + w["mixer.dt_bias"]))
    A = -torch.exp(w["mixer.A_log"])
    y = torch.empty_like(x)
    for head in range(heads):
        channels = slice(64 * head, 64 * (head + 1))
        h = torch.zeros(batch, 64, state, dtype=u.dtype)
        for t in range(length):
            step = dt[:, t, head, None, None]
            h = torch.exp(step * A[head]) * h + step * x[:, t, channels, None] * B[:, t, None, :]
            y[:, t, channels] = (h @ C[:, t, :, None])[..., 0] + w["mixer.D"][head] * x[:, t, channels]
    return rms_norm(y * z * torch.sigmoid(z), w["mixer.norm.weight"]) @ w["mixer.out_proj.weight"].T


def adventurer(image, weights, *, depth, patch, flips):
    """Logits, and the final features as [patches, class token]."""
    filters = weights["patch_embed.proj.weight"].flatten(1)
    pixels = F.unfold(image, patch, stride=patch).transpose(1, 2)
    tokens = [pixels @ filters.T + weights["patch_embed.proj.bias"], weights["cls_token"].expand(len(image), -1, -1)]
    x = torch.cat(tokens, dim=1) + weights["pos_embed"]
    for n in range(depth):
        w = {name.removeprefix(f"layers.{n}."): value for name, value in weights.items() if name.startswith(f"layers.{n}.")}
        u = rms_norm(x, w["norm.weight"])
        order = list(range(u.shape[1]))
        if flips(n):
            order = order[-2::-1] + order[-1:]
        mixed = mamba2(torch.cat([u.mean(1, keepdim=True), u[:, order]], dim=1), w)[:, 1:]
        undone = torch.empty_like(mixed)
        undone[:, order] = mixed
        x = x + undone
        u = rms_norm(x, w["norm_mlp.weight"])
        gate, value = (u @ w[f"mlp.{k}.weight"].T + w[f"mlp.{k}.bias"] for k in ("w1", "w2"))
        x = x + (gate * torch.sigmoid(gate) * value) @ w["mlp.w3.weight"].T + w["mlp.w3.bias"]
    x = rms_norm(x, weights["norm_f.weight"])
    return x[:, -1] @ weights["head.weight"].T + weights["head.bias"], x


@pytest.mark.parametrize(
    ("flip", "flips"),
    [("alternate", lambda n: (n // 2) % 2 == 1), ("released", lambda n: n // 2 == 1)],
    ids=["alternate", "released"],
)
@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_equals_the_description(flip, flips, implementation):
    """Seven blocks, so that the two flip rules differ (in block 6)."""
    model = small_model(depth=7, flip=flip, dtype=torch.float64, implementation=implementation)
    image = images(24, 40, dtype=torch.float64)
    model.set_input_size((24, 40))
    with torch.no_grad():
        logits, features = adventurer(image, model.state_dict(), depth=7, patch=8, flips=flips)
        torch.testing.assert_close(model(image), logits, rtol=1e-10, atol=1e-10)
        class_first = torch.cat([features[:, -1:], features[:, :-1]], dim=1)
        torch.testing.assert_close(model.forward_features(image), class_first, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("flip", "blocks"), [("alternate", [2, 3, 6, 7, 10, 11]), ("released", [2, 3])])
def test_flip_rules(flip, blocks):
    model = timm.create_model("adventurer_tiny_patch16_224", flip=flip, device="meta")
    assert [n for n, block in enumerate(model.layers) if block.flip] == blocks


def test_flip_rule_by_default_is_the_papers():
    model = timm.create_model("adventurer_tiny_patch16_224", device="meta")
    assert [n for n, block in enumerate(model.layers) if block.flip] == [2, 3, 6, 7, 10, 11]


def mix(block, u):
    """What a block's mixer makes of normalised tokens, each in its own place."""
    mixed = block.mixer(ops.to_reading_order(u, block.flip))
    return ops.add_from_reading_order(torch.zeros_like(u), mixed, block.flip)


@pytest.mark.parametrize("n", [0, 2], ids=["forward", "reverse"])
@pytest.mark.parametrize(("first", "second"), [(1, 6), (5, 7), (3, 9)])
def test_a_block_reads_in_order_after_the_heading_average(n, first, second):
    """Two changed tokens that leave the mean as it was change no output read before them; slot 9 is the class token."""
    block = small_model(dtype=torch.float64).layers[n]
    u = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = u.clone()
    changed[:, first] += 0.5
    changed[:, second] -= 0.5
    with torch.no_grad():
        difference = (mix(block, changed) - mix(block, u)).abs().amax(dim=-1)[0]
    order = [*range(10)] if n == 0 else [*range(8, -1, -1), 9]
    start = min(order.index(first), order.index(second))
    assert difference[order[:start]].max() < 1e-12
    assert difference[order[start:]].min() > 1e-9


@pytest.mark.parametrize("n", [0, 2], ids=["forward", "reverse"])
def test_the_heading_average_lets_every_token_see_every_other(n):
    block = small_model(dtype=torch.float64).layers[n]
    u = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        for token in range(10):
            changed = u.clone()
            changed[:, token] += 0.5
            assert (mix(block, changed) - mix(block, u)).abs().amax(dim=-1).min() > 1e-9


# --- features -------------------------------------------------------------------------------------------------------


def test_forward_features_is_class_token_then_patches():
    model = small_model()
    with torch.no_grad():
        features = model.forward_features(images())
        assert features.shape == (2, 1 + 16, 32)
        assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 0])
        assert torch.equal(model(images()), model.head(features[:, 0]))
        model.global_pool = "avg"
        torch.testing.assert_close(model(images()), model.head(features[:, 1:].mean(1)))
        model.global_pool = ""
        torch.testing.assert_close(model(images()), model.head(features))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("output_fmt", ["NLC", "NCHW"])
def test_forward_intermediates_are_the_outputs_of_the_blocks(output_fmt, norm):
    model, image, outputs = small_model(), images(24, 40), []
    with torch.no_grad():
        features = model.forward_features(image)
        for block in model.layers:
            block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        final, found = model.forward_intermediates(image, return_prefix_tokens=True, output_fmt=output_fmt, norm=norm)
        plain = model.forward_intermediates(image, output_fmt=output_fmt, norm=norm, intermediates_only=True)
        assert torch.equal(final, features)
        assert len(found) == len(plain) == len(model.layers)
        for (patches, class_token), alone, output in zip(found, plain, outputs, strict=False):
            want = model.norm_f(output) if norm else output
            assert torch.equal(alone, patches)
            assert torch.equal(class_token, want[:, -1:])
            if output_fmt == "NCHW":
                assert patches.shape == (2, 32, 3, 5)
                patches = patches.permute(0, 2, 3, 1).flatten(1, 2)
            assert torch.equal(patches, want[:, :-1])
        if norm:
            assert torch.equal(patches, features[:, 1:])
            assert torch.equal(class_token, features[:, :1])


@pytest.mark.parametrize(("indices", "taken"), [(2, [1, 2]), ([0], [0]), ([0, 2], [0, 2]), ([-1], [2]), (None, [0, 1, 2])])
@pytest.mark.parametrize("stop_early", [False, True])
def test_forward_intermediates_takes_the_blocks_named(indices, taken, stop_early):
    model, ran = small_model(), []
    with torch.no_grad():
        every = model.forward_intermediates(images(), intermediates_only=True)
        for n, block in enumerate(model.layers):
            block.register_forward_hook(lambda *_args, n=n: ran.append(n))
        found = model.forward_intermediates(images(), indices=indices, stop_early=stop_early, intermediates_only=True)
    assert len(found) == len(taken)
    assert all(torch.equal(got, every[n]) for got, n in zip(found, taken, strict=True))
    assert ran == list(range(taken[-1] + 1 if stop_early else 3))


def test_forward_intermediates_refuses_an_unknown_format():
    with pytest.raises(ValueError, match="output_fmt=NHWC: choose NCHW or NLC"):
        small_model().forward_intermediates(images(), output_fmt="NHWC")


def test_timms_features_only():
    model = timm.create_model("adventurer_tiny_patch16_224", features_only=True, out_indices=(0, 2), **SMALL).eval()
    with torch.no_grad():
        maps = model(images(24, 40))
    assert [m.shape for m in maps] == [(2, 32, 3, 5)] * 2
    assert model.feature_info.channels() == [32, 32]
    assert model.feature_info.reduction() == [8, 8]


def test_prune_intermediate_layers():
    model = small_model()
    with torch.no_grad():
        want = model.forward_intermediates(images(), indices=[1], intermediates_only=True)[0]
        assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
        assert len(model.layers) == 2
        features = model.forward_features(images())
        torch.testing.assert_close(features[:, 1:], want.flatten(2).transpose(1, 2))
    assert isinstance(model.head, torch.nn.Identity)


# --- image sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 64), (64, 32), (48, 40), (8, 104)])
def test_any_image_size_in_one_model(height, width):
    """A size given on the fly is the same as the size set beforehand."""
    model = small_model(dtype=torch.float64)
    image = images(height, width, dtype=torch.float64)
    resized = copy.deepcopy(model)
    resized.set_input_size((height, width))
    assert resized.patch_embed.grid_size == (height // 8, width // 8)
    assert resized.pos_embed.shape == (1, height * width // 64 + 1, 32)
    assert torch.equal(resized.pos_embed[:, -1], model.pos_embed[:, -1])
    with torch.no_grad():
        features = model.forward_features(image)
        assert features.shape == (2, 1 + height * width // 64, 32)
        torch.testing.assert_close(resized.forward_features(image), features, rtol=1e-12, atol=1e-12)


def test_set_input_size_of_another_patch():
    model = small_model()
    model.set_input_size(img_size=(24, 16), patch_size=4)
    assert model.patch_embed.proj.weight.shape == (32, 3, 4, 4)
    assert model.forward_features(images(24, 16)).shape == (2, 1 + 24, 32)


def test_one_size_only_when_asked():
    model = small_model(dynamic_img_size=False)
    assert model(images()).shape == (2, 7)
    with pytest.raises(AssertionError, match="32"):
        model(images(64, 64))


def test_flops_per_token_are_constant_from_224_to_896():
    """Counted without computing; a ViT of the same size is the control that a quadratic cost would be seen."""

    def flops_per_token(name, side):
        model = timm.create_model(name, img_size=side, device="meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, side, side, device="meta"))
        return counter.get_total_flops() / ((side // 16) ** 2 + 1)

    small, large = (flops_per_token("adventurer_tiny_patch16_224", side) for side in (224, 896))
    assert large / small == pytest.approx(1, abs=0.02)
    assert flops_per_token("vit_tiny_patch16_224", 896) > 2 * flops_per_token("vit_tiny_patch16_224", 224)


# --- the class token alone --------------------------------------------------------------------------------------------


def counted_flops(model, pictures):
    with FlopCounterMode(display=False) as counter:
        model(pictures)
    return counter.get_total_flops()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (8, 104)])
def test_a_head_on_the_class_token_spares_the_last_blocks_patches(depth, size):
    model, pictures = small_model(depth=depth, dtype=torch.float64), images(*size, dtype=torch.float64)
    want = model.forward_head(model.forward_features(pictures))
    torch.testing.assert_close(model(pictures), want, rtol=1e-12, atol=1e-12)
    model.requires_grad_(False)
    weights = [p for name, p in model.layers[-1].mlp.named_parameters() if "weight" in name]
    tokens, mlp = size[0] * size[1] // 64, sum(weight.numel() for weight in weights)
    spared = 2 * 2 * tokens * (mlp + model.layers[-1].mixer.out_proj.weight.numel())
    spared += 2 * 2 * model.layers[-1].mixer.out_proj.weight.numel()  # of the heading average
    whole = counted_flops(lambda x: model.forward_head(model.forward_features(x)), pictures)
    assert whole - counted_flops(model, pictures) == spared


def test_gradients_are_those_of_the_whole_features():
    model = small_model(dtype=torch.float64).train()
    _, want = loss_and_gradients(model, lambda x: model.forward_head(model.forward_features(x)), torch.float64)
    _, got = loss_and_gradients(model, dtype=torch.float64)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("pool", ["avg", ""])
def test_other_heads_read_every_token(pool):
    model, pictures = small_model(global_pool=pool), images()
    torch.testing.assert_close(model(pictures), model.forward_head(model.forward_features(pictures)), rtol=0, atol=0)


@pytest.mark.parametrize("place", ["layers.2", "layers.2.mlp.w1", "layers.2.mixer", "norm_f"])
def test_a_hook_sees_every_token(place):
    model, pictures, seen = small_model(), images(), []
    model.get_submodule(place).register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[1]))
    model(pictures)
    assert len(seen) == 1
    assert seen[0] >= 17, "16 patches and the class token"


# --- training -------------------------------------------------------------------------------------------------------


def loss_and_gradients(model, function=None, dtype=torch.float32):
    logits = (model if function is None else function)(images(dtype=dtype))
    loss = F.cross_entropy(logits.float() if dtype == torch.bfloat16 else logits, torch.tensor([1, 5]))
    model.zero_grad()
    loss.backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("depth", [1, 3])
def test_every_parameter_gets_a_gradient(depth):
    _, gradients = loss_and_gradients(small_model(depth=depth).train())
    assert [name for name, gradient in gradients.items() if not gradient.any() or not gradient.isfinite().all()] == []


def test_gradient_checkpointing_changes_nothing():
    model, calls = small_model().train(), []
    model.layers[1].register_forward_pre_hook(lambda *_args: calls.append(1))
    logits, gradients = loss_and_gradients(model)
    assert len(calls) == 1
    model.set_grad_checkpointing()
    again, recomputed = loss_and_gradients(model)
    assert len(calls) == 3, "once in the forward pass, once more in the backward pass"
    assert torch.equal(again, logits)
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


def test_compiled_model_equals_eager():
    torch._dynamo.reset()
    model = small_model(dtype=torch.float64)
    logits, gradients = loss_and_gradients(model, dtype=torch.float64)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits_compiled, gradients_compiled = loss_and_gradients(model, compiled, dtype=torch.float64)
    torch.testing.assert_close(logits_compiled, logits, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_compiled[name], gradient, rtol=1e-7, atol=1e-10)


def test_bf16_model_is_near_fp32():
    """Weights and activations in bf16, outputs and gradients."""
    model = small_model()
    low = copy.deepcopy(model).bfloat16()
    logits, gradients = loss_and_gradients(model)
    low_logits, low_gradients = loss_and_gradients(low, dtype=torch.bfloat16)
    assert low_logits.dtype == torch.bfloat16
    assert (low_logits.float() - logits).norm() < 0.05 * logits.norm()
    flat, low_flat = (torch.cat([g.float().flatten() for g in d.values()]) for d in (gradients, low_gradients))
    assert F.cosine_similarity(flat, low_flat, dim=0) > 0.99


def test_drop_path_rises_linearly_from_zero():
    model = small_model(depth=5, drop_path_rate=0.4)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def is_decayed(name):
    return not (name.endswith((".bias", "norm.weight", "norm_mlp.weight", "norm_f.weight")) or
                name.endswith(("A_log", ".D", "dt_bias", "pos_embed", "cls_token")))  # fmt: skip


def test_no_weight_decay_on_norms_biases_positions_and_the_scan():
    model = small_model()
    groups = param_groups_weight_decay(model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay())
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert found == {name: 0.05 if is_decayed(name) else 0.0 for name in found}
    scan = {f"layers.{n}.mixer.{name}" for n in range(3) for name in ("A_log", "D", "dt_bias")}
    assert scan | {"pos_embed", "cls_token"} <= set(model.no_weight_decay())


def test_layer_decay_counts_stem_blocks_and_head():
    model = small_model()
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        block = int(name.split(".")[1]) + 1 if name.startswith("layers.") else 0
        power = {"head": 0, "norm_f": 1}.get(name.split(".")[0], 4 - block)  # timm counts the final norm to the last block
        assert scale[id(parameter)] == 0.5**power, name
        assert decay[id(parameter)] == (0.05 if is_decayed(name) else 0.0), name


# --- head and options -----------------------------------------------------------------------------------------------


def test_reset_classifier():
    model = small_model(dtype=torch.float64)
    image = images(dtype=torch.float64)
    with torch.no_grad():
        features = model.forward_features(image)
        model.reset_classifier(3)
        assert model.num_classes == 3
        assert model.get_classifier() is model.head
        assert model(image).shape == (2, 3)
        model.reset_classifier(0, "avg")
        torch.testing.assert_close(model(image), features[:, 1:].mean(1))
        model.reset_classifier(0, "")
        assert torch.equal(model(image), features)
    with pytest.raises(ValueError, match="global_pool='max': choose from token, avg"):
        model.reset_classifier(3, "max")


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"flip": "always"}, ValueError, "flip='always': choose from alternate, released"),
        ({"global_pool": "max"}, ValueError, "global_pool='max': choose from token, avg"),
        ({"embed_dim": 48}, ValueError, "inner width 96"),
        ({"flips": "alternate"}, TypeError, "flips"),
    ],
    ids=str,
)
def test_bad_options_are_refused(option, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("adventurer_tiny_patch16_224", **{**SMALL, **option})


# --- saved and loaded -----------------------------------------------------------------------------------------------


def load_folder(folder, **changes) -> Adventurer:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **changes).eval()


@pytest.mark.parametrize(
    "options", [{}, {"flip": "released", "depth": 7, "global_pool": "avg"}, {"img_size": (24, 40)}], ids=str
)
def test_saved_model_is_the_same_when_loaded(tmp_path, options):
    model = small_model(**options)
    save_model_folder(model, tmp_path / "model")
    loaded = load_folder(tmp_path / "model")
    assert torch.equal(loaded(images()), model(images()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    changed = small_model(seed=1, **options)
    save_model_folder(changed, tmp_path / "model")
    assert torch.equal(load_folder(tmp_path / "model")(images()), changed(images())), "a second time replaces the first"


def test_resized_model_is_saved_at_its_new_size(tmp_path):
    model = small_model()
    model.set_input_size((24, 40), patch_size=4)
    save_model_folder(model, tmp_path / "model")
    loaded = load_folder(tmp_path / "model")
    assert loaded.patch_embed.grid_size == (6, 10)
    assert torch.equal(loaded.pos_embed, model.pos_embed)
    assert torch.equal(loaded(images()), model(images()))


def test_saved_model_loads_with_another_head(tmp_path):
    model = small_model()
    save_model_folder(model, tmp_path / "model")
    loaded = load_folder(tmp_path / "model", num_classes=5)
    assert loaded(images()).shape == (2, 5)
    assert torch.equal(loaded.forward_features(images()), model.forward_features(images()))


@pytest.mark.parametrize("trained_at", [(32, 32), (16, 64)])
def test_saved_model_loads_at_another_size(tmp_path, trained_at):
    """16 x 64 has as many patches as a square: the grid must come from the saved size, not from their number."""
    model = small_model(img_size=trained_at)
    save_model_folder(model, tmp_path / "model")
    loaded = load_folder(tmp_path / "model", img_size=(48, 40))
    assert loaded.pos_embed.shape == (1, 31, 32)
    image = images(48, 40)
    torch.testing.assert_close(loaded(image), model(image))


def test_published_weight_file_under_a_model_key(tmp_path):
    model = timm.create_model("adventurer_tiny_patch16_224", depth=1, img_size=32)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    loaded = create_backbone(
        str(tmp_path / "weights.pth"),
        field="--model",
        architecture="adventurer_tiny_patch16_224",
        depth=1,
        img_size=(64, 48),
    )
    model.set_input_size((64, 48))
    model.reset_classifier(0)
    for name, want in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], want)
