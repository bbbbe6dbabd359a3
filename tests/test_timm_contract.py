"""What timm expects of every model it knows by name: structure on the meta device for all sizes, numbers on a small one."""

import copy
import fnmatch
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters

from small_models import images, small
from vit_linearizer.models.loading import save_model_folder

NAMES = timm.list_models("adventurer*")
META = torch.device("meta")
every_name = pytest.mark.parametrize("name", NAMES)


def tensors(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def trainable(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# --- every name, on the meta device ---------------------------------------------------------------------------------


def test_eight_names_are_registered():
    assert len(NAMES) == 8


@every_name
def test_attributes(name):
    model = timm.create_model(name, device="meta")
    assert model.num_classes == 1000
    assert model.num_features == model.head_hidden_size == model.embed_dim == model.pos_embed.shape[-1]
    assert model.num_prefix_tokens == 1
    assert model.in_chans == 3
    assert model.grad_checkpointing is False
    modules, patch = dict(model.named_modules()), int(name.split("patch")[1].split("_")[0])
    assert [info["module"] for info in model.feature_info] == [f"layers.{n}" for n in range(len(model.layers))]
    for info in model.feature_info:
        assert info["module"] in modules
        assert (info["num_chs"], info["reduction"]) == (model.embed_dim, patch)


@every_name
def test_pretrained_configuration_names_layers_that_exist(name):
    model = timm.create_model(name, device="meta")
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert cfg["input_size"] == (3, 224, 224) == (model.in_chans, *model.patch_embed.img_size)
    assert state[f"{cfg['classifier']}.weight"].shape == (cfg["num_classes"], model.num_features)
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == 3
    assert getattr(model, cfg["classifier"]) is model.get_classifier()


@every_name
def test_unknown_keyword_is_a_type_error(name):
    with pytest.raises(TypeError, match="no_such_option"):
        timm.create_model(name, device="meta", no_such_option=1)


@every_name
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_device_and_dtype_reach_every_tensor(name, dtype):
    model = timm.create_model(name, device="meta", dtype=dtype)
    assert {(tensor.device, tensor.dtype) for tensor in tensors(model).values()} == {(META, dtype)}


@every_name
def test_device_context_reaches_every_tensor(name):
    with META:
        model = timm.create_model(name)
    assert {tensor.device for tensor in tensors(model).values()} == {META}


@every_name
def test_shapes_of_features_and_heads(name):
    model = timm.create_model(name, device="meta").eval()
    x, width, patches = torch.empty(2, 3, 224, 224, device="meta"), model.num_features, model.patch_embed.num_patches
    features = model.forward_features(x)
    assert features.shape == (2, 1 + patches, width)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model(x).shape == (2, 1000)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(x).shape == (2, width)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 1 + patches, width)
    fresh = timm.create_model(name, num_classes=0, global_pool="", device="meta").eval()
    assert fresh(x).shape == (2, 1 + patches, width)


@every_name
@pytest.mark.parametrize("training", [True, False])
def test_a_fresh_classifier_is_like_the_model(name, training):
    model = timm.create_model(name, device="meta").train(training).to(torch.float64)
    for classes in (0, 2):
        model.reset_classifier(classes)
        assert {module.training for module in model.modules()} == {training}
    assert {(p.device, p.dtype) for p in model.get_classifier().parameters()} == {(META, torch.float64)}


@every_name
def test_frozen_parameters_stay_frozen(name):
    model = timm.create_model(name, device="meta").requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, "")
    model.set_input_size((448, 672))
    model.set_input_size(patch_size=4)
    assert trainable(model) == []


@every_name
def test_every_parameter_is_in_a_group_of_the_layer_decay(name):
    model = timm.create_model(name, device="meta")
    names = [n for n, _ in model.named_parameters()]
    for coarse in (False, True):
        group = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert sorted(group) == sorted(names)
        assert group["cls_token"] == group["pos_embed"] == group["patch_embed.proj.weight"] == 0
        numbers = [{group[n] for n in names if n.startswith(f"layers.{block}.")} for block in range(len(model.layers))]
        assert numbers == [{block + 1} for block in range(len(model.layers))]
        assert group["norm_f.weight"] >= len(model.layers)


@every_name
def test_names_without_weight_decay_are_parameters(name):
    model = timm.create_model(name, device="meta")
    names = {n for n, _ in model.named_parameters()}
    assert {"pos_embed", "cls_token", "layers.0.mixer.A_log"} <= model.no_weight_decay()
    assert [pattern for pattern in model.no_weight_decay() if not fnmatch.filter(names, pattern)] == []


# --- head -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["token", "avg", ""])
def test_pooling_of_the_head(pool):
    model, x = small(global_pool=pool), images()
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = {"token": features[:, 0], "avg": features[:, 1:].mean(1), "": features}[pool]
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
        torch.testing.assert_close(model(x), model.get_classifier()(pooled))
        model.reset_classifier(5)
        assert model.global_pool == pool, "kept when nothing is said"
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
        assert model(x).shape[-1] == 5
        model.reset_classifier(5, "avg" if pool == "token" else "token")
        assert not torch.equal(model.forward_head(features, pre_logits=True), pooled)


def test_class_token_comes_first():
    """A class token of its own value is seen in the first place before any block runs."""
    model = small(depth=1)
    model.layers = torch.nn.ModuleList()
    with torch.no_grad():
        features = model.forward_features(images())
        torch.testing.assert_close(features[:1, :1], model.norm_f(model.cls_token + model.pos_embed[:, -1:]))
        patches = model.patch_embed(images()) + model.pos_embed[:, :-1]
        torch.testing.assert_close(features[:, 1:], model.norm_f(patches))


# --- image and patch sizes ------------------------------------------------------------------------------------------


def reaches_every_parameter(model, x):
    """A classification step leaves a finite gradient, not all zero, on each parameter."""
    F.cross_entropy(model.train()(x), torch.tensor([1, 5])).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return all(g is not None and g.isfinite().all() and g.any() for g in gradients.values())


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (80, 48), (16, 16)], ids=str)
def test_images_of_any_shape(size):
    """On the fly, or at a size set before: the same output, and every parameter learns."""
    model, x = small(), images(*size)
    resized = copy.deepcopy(model)
    resized.set_input_size(size)
    assert resized.patch_embed.img_size == size
    with torch.no_grad():
        assert model.forward_features(x).shape == (2, 1 + size[0] * size[1] // 256, 64)
        torch.testing.assert_close(resized(x), model(x))
    assert reaches_every_parameter(resized, x)
    assert reaches_every_parameter(model, x)


def test_images_that_no_patch_fits_are_refused():
    with pytest.raises(AssertionError, match="70"):
        small()(images(64, 70))


def test_sizes_set_one_after_another_start_from_the_grid_of_the_moment():
    """24 and 18 patches are no squares: a wrong old grid could not even be reshaped, or would mix rows and columns."""
    model = small(img_size=(64, 96))
    for size in [(96, 64), (48, 96), (64, 96)]:
        model.set_input_size(size)
        assert model.pos_embed.shape == (1, 1 + size[0] * size[1] // 256, 64)
        assert model(images(*size)).isfinite().all()


@pytest.mark.parametrize(("patch", "size"), [(14, 56), (8, 64), (16, 80)])
def test_another_patch_size_by_setting_and_by_loading(tmp_path, patch, size):
    """Both ways give the same weights, and pictures of smooth content keep about the features they had."""
    model = small()
    save_model_folder(model, tmp_path / "model")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, patch_size=patch, img_size=size).eval()
    with torch.no_grad():
        smooth = F.interpolate(images(4, 4), size=(64, 64), mode="bicubic")
        before = model.forward_features(smooth)[:, 1:].mean(1)
        model.set_input_size(size, patch_size=patch)
        torch.testing.assert_close(loaded.state_dict(), model.state_dict())
        assert loaded.patch_embed.proj.weight.shape == (64, 3, patch, patch)
        assert loaded.patch_embed.grid_size == (size // patch,) * 2
        smooth = F.interpolate(smooth, size=(4 * patch,) * 2, mode="bicubic", antialias=True)
        after = loaded.forward_features(smooth)[:, 1:].mean(1)
        assert F.cosine_similarity(after, before).min() > 0.98
    assert reaches_every_parameter(loaded, images(size, size))


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(tmp_path, channels):
    model, x = small(in_chans=channels), images(channels=channels)
    assert model.in_chans == channels
    assert reaches_every_parameter(model, x)
    save_model_folder(small(), tmp_path / "model")
    adapted = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, in_chans=channels).eval()
    assert adapted(x).isfinite().all()


def test_drop_rates_act_in_training_only():
    model, x = small(drop_rate=0.5, drop_path_rate=0.5), images()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), small()(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    assert not torch.equal(model(x), model(x)), "drop path acts on its own"


def test_another_dtype_after_a_forward_pass():
    model, x = small(), images()
    logits = model(x)
    low = model.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.float() - logits).norm() < 0.05 * logits.norm()
    assert model.to(torch.float64)(x.double()).dtype == torch.float64


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_made_after_to_empty_are_of_the_usual_kind():
    """Every storage is poisoned first, so that what nobody initialises stays NaN."""
    torch.manual_seed(0)
    shape = dict(embed_dim=64, depth=4, img_size=64, num_classes=7, dtype=torch.float64)
    model = timm.create_model("adventurer_tiny_patch16_224", device="meta", **shape).to_empty(device="cpu").eval()
    for tensor in tensors(model).values():
        tensor.data.fill_(float("nan"))
    model.init_weights()
    usual = tensors(timm.create_model("adventurer_tiny_patch16_224", **shape))
    for name, tensor in tensors(model).items():
        want = usual[name]
        assert tensor.isfinite().all(), name
        if name.endswith((".bias", ".D")) or "norm" in name:
            assert torch.equal(tensor, want), name
            assert (want == (0 if name.endswith(".bias") else 1)).all(), name
        elif name.endswith(".A_log"):
            assert ((tensor >= 0) & (tensor <= 2.773)).all(), "the logarithm of 1 to 16"
        elif name.endswith(".dt_bias"):
            assert ((F.softplus(tensor) > 0.99e-3) & (F.softplus(tensor) < 1.01e-1)).all()
        else:
            assert 0.7 < tensor.std() / want.std() < 1.4, name
            assert not torch.equal(tensor, want), name
    assert model(images().double()).isfinite().all()


def test_copies_and_pickles_are_the_same_model():
    model, x, file = small(flip="released"), images(), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = small(seed=1, flip="released")
    assert not torch.equal(loaded(x), model(x))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize(("flip", "blocks"), [("released", [2, 3]), ("alternate", [2, 3, 6])])
@pytest.mark.parametrize("changes", [{}, {"num_classes": 5}, {"img_size": (256, 128)}, {"features_only": True}], ids=str)
def test_the_flip_rule_survives_the_folder(tmp_path, flip, blocks, changes):
    """Seven blocks: the rules differ in the last one alone."""
    model = small(depth=7, flip=flip)
    save_model_folder(model, tmp_path / "model")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, **changes).eval()
    backbone, x = (loaded.model if "features_only" in changes else loaded), images(64, 96)
    assert [n for n, block in enumerate(backbone.layers) if block.flip] == blocks
    with torch.no_grad():
        if "features_only" in changes:
            want = model.forward_intermediates(x, 3, intermediates_only=True)
            torch.testing.assert_close(loaded(x), want)
        elif "num_classes" in changes:
            assert torch.equal(loaded.forward_features(x), model.forward_features(x))
            assert loaded(x).shape == (2, 5)
        else:
            x = images(256, 128) if changes else x
            torch.testing.assert_close(loaded(x), model(x))
