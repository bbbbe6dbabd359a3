"""Segmentation models: which blocks they read, where their logits lie, what trains in them, and that they survive saving."""

import json
import sys

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2, param_groups_layer_decay

from small_models import small
from vit_linearizer.contracts import UserError
from vit_linearizer.models.adapters import normalize
from vit_linearizer.models.loading import save_model_folder
from vit_linearizer.models.segmenter import Segmenter, tap_blocks
from vit_linearizer.models.segmenter_folder import is_segmenter, load_segmenter, save_segmenter
from vit_linearizer.models.upernet import Pyramid

CLASSES = 5
NAMES = ("sky", "road", "tree", "bicycle, or moped", "Straße")
PALETTE = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7)]


def vit(**changes):
    torch.manual_seed(0)
    shape = dict(img_size=64, embed_dim=48, depth=4, num_heads=3, num_classes=0, dynamic_img_size=True)
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **changes})


def adventurer(**changes):
    return small(num_classes=0, **changes)


BACKBONES = {"adventurer": adventurer, "vit": vit}
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
every_head = pytest.mark.parametrize("head", ["upernet", "linear"])


def segmenter(backbone="adventurer", head="upernet", **changes):
    made = BACKBONES[backbone](**changes)
    torch.manual_seed(1)
    return Segmenter(made, num_classes=CLASSES, head=head, head_width=24)


def pictures(height=64, width=64, *, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


def settled(model):
    """Evaluation mode after a few training batches, so that the running statistics of every BatchNorm mean something."""
    model.train()
    with torch.no_grad():
        for seed in range(3):
            model(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


# --- taps and pyramid


@pytest.mark.parametrize(
    ("depth", "taps"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (4, (0, 1, 2, 3)), (5, (1, 2, 3, 4)), (6, (1, 2, 3, 5))]
)
def test_taps(depth, taps):
    assert tap_blocks(depth) == taps


def test_too_few_blocks():
    with pytest.raises(UserError, match=r"^model of 3 blocks: .*deeper"):
        tap_blocks(3)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (4, 4)])
def test_pyramid_sizes(grid):
    height, width = grid
    levels = Pyramid(6).eval()([torch.randn(1, 6, height, width)] * 4)
    assert [tuple(level.shape) for level in levels] == [
        (1, 6, 4 * height, 4 * width),
        (1, 6, 2 * height, 2 * width),
        (1, 6, height, width),
        (1, 6, (height + 1) // 2, (width + 1) // 2),
    ]


@every_backbone
def test_taps_are_the_raw_outputs_of_their_blocks(backbone):
    model = segmenter(backbone, "linear", depth=6).eval()
    seen, kept = {}, []
    blocks = getattr(model.backbone, "layers", None) or model.backbone.blocks
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda _m, _i, out, number=number: seen.__setitem__(number, out))
    model.decoder.register_forward_pre_hook(lambda _m, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        model(pictures(32, 48, batch=1))
    for tap, level in zip((1, 2, 3, 5), kept[0], strict=True):
        patches = (
            seen[tap][:, :-1] if backbone == "adventurer" else seen[tap][:, 1:]
        )  # the class token stands last, or first
        torch.testing.assert_close(level, patches.transpose(1, 2).unflatten(2, (2, 3)), rtol=0, atol=0)


# --- forward


@every_backbone
@every_head
@pytest.mark.parametrize("size", [(64, 64), (37, 61), (16, 16), (5, 90)])
def test_logits_have_the_images_size(backbone, head, size):
    model = segmenter(backbone, head).train()
    out = model(pictures(*size))
    assert out.logits.shape == (2, CLASSES, *size)
    assert (out.auxiliary is None) == (head == "linear")
    if head == "upernet":
        assert out.auxiliary.shape == (2, CLASSES, *size)
    assert model.eval()(pictures(*size, batch=1)).auxiliary is None


@every_backbone
def test_odd_sizes_are_padded_after_normalisation_and_cut_back(backbone):
    model = settled(segmenter(backbone))
    images = pictures(37, 61)
    black_after = torch.tensor(model.backbone.pretrained_cfg["mean"]).view(1, 3, 1, 1)
    padded = black_after.expand(2, 3, 48, 64).clone()
    padded[..., :37, :61] = images
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, model(padded).logits[..., :37, :61])


def test_linear_head_is_batchnorm_and_a_matrix_on_the_tokens():
    model = settled(segmenter("vit", "linear"))
    images = pictures(32, 48, batch=1)
    with torch.no_grad():
        maps = model.backbone.forward_intermediates(
            normalize(model.backbone, images), indices=[0, 1, 2, 3], output_fmt="NLC", intermediates_only=True
        )
        tokens = torch.cat(maps, dim=-1)[0]
        norm, last = model.decoder.norm, model.decoder.classifier
        tokens = (tokens - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        scores = (tokens @ last.weight.flatten(1).T + last.bias).T.reshape(1, CLASSES, 2, 3)
        expected = F.interpolate(scores, size=(32, 48), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(images).logits, expected, rtol=1e-4, atol=1e-5)


@every_backbone
@every_head
def test_evaluation_does_not_mix_images(backbone, head):
    model = settled(segmenter(backbone, head))
    images = pictures(batch=3)
    with torch.no_grad():
        together = model(images).logits
        alone = torch.cat([model(image[None]).logits for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std() > 0


def test_half_precision_logits_are_upsampled_in_fp32():
    model = segmenter("vit").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(pictures(batch=1)).logits.dtype == torch.float32


# --- training


@every_backbone
@every_head
def test_every_trainable_parameter_gets_a_gradient(backbone, head):
    model = segmenter(backbone, head).train()
    out = model(pictures(48, 80))
    loss = out.logits.square().mean() + (0 if out.auxiliary is None else out.auxiliary.square().mean())
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("vit_tiny_patch16_224", {"norm.weight", "norm.bias"}),
        ("vit_tiny_patch16_224", {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}),
        ("deit3_small_patch16_224", {"norm.weight", "norm.bias"}),
        ("vit_base_patch16_clip_224", {"norm.weight", "norm.bias"}),
        ("vit_base_patch16_siglip_224", None),
        ("eva02_tiny_patch14_224", None),
        ("adventurer_tiny_patch16_224", {"norm_f.weight"}),
    ],
)
def test_what_stands_behind_the_last_block_is_frozen_and_nothing_else(name, frozen):
    changes = dict(global_pool="avg", num_classes=3) if frozen and "fc_norm.weight" in frozen else {}
    backbone = timm.create_model(name, **{"depth": 4, "num_classes": 0, "img_size": 28 if "14" in name else 32, **changes})
    made = Segmenter(backbone, num_classes=2, head="linear")
    found = {key for key, parameter in backbone.named_parameters() if not parameter.requires_grad}
    if frozen is not None:
        assert found == frozen
    # timm's own graph says what the blocks' outputs depend on.
    images = torch.rand(1, 3, *backbone.patch_embed.img_size)
    maps = backbone.forward_intermediates(images, indices=list(made.taps), intermediates_only=True)
    names = [key for key, _ in backbone.named_parameters()]
    parameters = [parameter.requires_grad_(True) for parameter in backbone.parameters()]
    maps = backbone.forward_intermediates(images, indices=list(made.taps), intermediates_only=True)
    gradients = torch.autograd.grad(sum(level.square().sum() for level in maps), parameters, allow_unused=True)
    assert {key for key, gradient in zip(names, gradients, strict=True) if gradient is None} == found


def test_upernet_does_not_train_on_one_image():
    with pytest.raises(UserError, match=r"^--batch-size 1: .*at least 2"):
        segmenter().train()(pictures(batch=1))
    segmenter(head="linear").train()(pictures(batch=1))
    with pytest.raises(UserError, match=r"^--batch-size 1: "):
        segmenter(head="linear").train()(pictures(16, 16, batch=1))


def test_fresh_convolutions_are_normal_and_the_backbone_keeps_its_weights():
    backbone = adventurer()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = Segmenter(backbone, num_classes=CLASSES, head_width=64)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name
    convolutions = [
        (name, part) for name, part in model.named_modules()
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d) and not name.startswith("backbone.")
    ]  # fmt: skip
    assert len(convolutions) == 3 + 1 + 4 + 1 + 3 + 3 + 1 + 2
    for name, part in convolutions:
        assert part.weight.std().item() == pytest.approx(0.02, rel=0.2), name
        assert part.bias is None or not part.bias.any(), name


@every_backbone
def test_layer_decay(backbone):
    model = segmenter(backbone)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    blocks = "layers" if backbone == "adventurer" else "blocks"
    seen = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in scale
            continue
        part = name.split(".")
        if part[0] != "backbone":
            wanted = 1.0
        elif part[1] == blocks:
            wanted = 0.5 ** (4 - int(part[2]))
        else:
            assert part[1] in ("patch_embed", "pos_embed", "cls_token")
            wanted = 0.5**5
        assert scale[id(parameter)] == wanted, name
        seen.add(wanted)
    assert seen == {1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125}


def test_layer_decay_with_a_head_and_pooling_left_on_the_backbone():
    model = Segmenter(vit(num_classes=3, global_pool="avg"), num_classes=CLASSES, head="linear")
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert max(group["lr_scale"] for group in groups) == 1.0
    last = next(p for name, p in model.named_parameters() if name == "backbone.blocks.3.mlp.fc2.weight")
    assert [group["lr_scale"] for group in groups if any(p is last for p in group["params"])] == [0.5]


def test_weight_decay_spares_what_the_backbone_names():
    model = segmenter()
    names = model.no_weight_decay()
    assert "backbone.pos_embed" in names
    assert names <= {name for name, _ in model.named_parameters()}
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model.backbone.pos_embed)] == 0
    assert decay[id(model.decoder.classifier.weight)] == 0.1


# --- what users can mend


def test_a_backbone_of_fixed_size():
    model = segmenter("vit", "linear", dynamic_img_size=False).eval()
    assert model(pictures(60, 64)).logits.shape == (2, CLASSES, 60, 64)  # padded to its own size
    with pytest.raises(UserError, match=r"^image size 64x80: .*64x64 alone; .*dynamic_img_size=True"):
        model(pictures(64, 80))


def test_backbones_that_do_not_fit():
    with pytest.raises(UserError, match="is not a plain backbone"):
        Segmenter(timm.create_model("resnet10t", num_classes=0), num_classes=CLASSES)
    with pytest.raises(UserError, match="of 3 blocks"):
        Segmenter(vit(depth=3), num_classes=CLASSES)
    with pytest.raises(UserError, match=r"^--head upnet: .*did you mean upernet"):
        Segmenter(vit(), num_classes=CLASSES, head="upnet")


def test_without_transformers_only_the_linear_head_is_left(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"--head upernet: .*vit-linearizer\[segmentation\]"):
        segmenter()
    segmenter(head="linear")


@pytest.mark.parametrize("change", ["no module", "no class", "other arguments"])
def test_a_transformers_without_these_heads(monkeypatch, change):
    import transformers.models.upernet.modeling_upernet as upernet

    if change == "no module":
        monkeypatch.setitem(sys.modules, upernet.__name__, None)
    elif change == "no class":
        monkeypatch.delattr(upernet, "UperNetFCNHead")
    else:
        monkeypatch.setattr(upernet, "UperNetHead", lambda config: None)
    with pytest.raises(UserError, match=r"^--head upernet: transformers [\d.]+ has no such heads .*--head linear"):
        segmenter()


# --- folder


def save(model, folder, **extra):
    save_segmenter(model, folder, classes=NAMES, palette=PALETTE, extra=extra)


@every_backbone
@every_head
def test_round_trip_bit_for_bit(backbone, head, tmp_path):
    model = settled(segmenter(backbone, head))
    run = tmp_path / "run"
    run.mkdir()
    save(model, run / "model", crop=[512, 512], resize=None)
    assert is_segmenter(run)
    assert is_segmenter(run / "model")
    for place in (run, str(run / "model")):
        loaded, info = load_segmenter(place)
        assert not loaded.training
        assert (info.head, info.head_width, info.classes, info.palette) == (head, 24, NAMES, tuple(PALETTE))
        assert info.extra == {"crop": [512, 512], "resize": None}
        state = model.state_dict()
        assert state.keys() == loaded.state_dict().keys()
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, state[name]), name
        with torch.no_grad():
            assert torch.equal(loaded(pictures(37, 61)).logits, model(pictures(37, 61)).logits)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == frozen


def test_timm_reads_the_backbone_of_the_folder(tmp_path):
    model = segmenter()
    save(model, tmp_path / "model")
    backbone = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    state = model.backbone.state_dict()
    assert backbone.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


def test_saving_replaces_the_folder_whole(tmp_path):
    save(segmenter(), tmp_path / "model")
    save(segmenter(head="linear"), tmp_path / "model")
    assert load_segmenter(tmp_path)[1].head == "linear"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]
    modes = {(file.stat().st_mode & 0o777) for file in (tmp_path / "model").iterdir()}
    assert len(modes) == 1
    with pytest.raises(TypeError):
        save(segmenter(), tmp_path / "model", crop=object())
    assert load_segmenter(tmp_path)[1].head == "linear"


def test_names_and_colours_are_counted(tmp_path):
    with pytest.raises(ValueError, match="5 classes need as many names"):
        save_segmenter(segmenter(), tmp_path / "model", classes=NAMES[1:], palette=PALETTE)
    assert not (tmp_path / "model").exists()


def test_folders_without_a_segmenter(tmp_path):
    save_model_folder(adventurer(), tmp_path / "plain")
    for path in (tmp_path / "plain", tmp_path / "nowhere", tmp_path):
        assert not is_segmenter(path)
        with pytest.raises(UserError, match="holds no segmentation model"):
            load_segmenter(path)


def break_head(folder):
    (folder / "head.safetensors").write_bytes(b"nothing")


def lose_head(folder):
    (folder / "head.safetensors").unlink()


def lose_a_tensor(folder):
    state = load_file(folder / "head.safetensors")
    del state["decoder.classifier.bias"]
    save_file(state, folder / "head.safetensors")


def one_class_less(folder):
    values = json.loads((folder / "segmentation.json").read_text())
    values["classes"].pop()
    (folder / "segmentation.json").write_text(json.dumps(values))


def break_info(folder):
    (folder / "segmentation.json").write_text("{")


def lose_a_field(folder):
    values = json.loads((folder / "segmentation.json").read_text())
    del values["palette"]
    (folder / "segmentation.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_head, "head.safetensors: cannot be read"),
        (lose_head, "head.safetensors: cannot be read"),
        (lose_a_tensor, r"head.safetensors: does not fit segmentation.json: decoder.classifier.bias; copy"),
        (
            one_class_less,
            r"head.safetensors: does not fit segmentation.json: decoder.classifier.bias, decoder.classifier.weight",
        ),
        (break_info, "segmentation.json: cannot be read"),
        (lose_a_field, "segmentation.json: has no 'palette'"),
    ],
)
def test_damaged_folders(damage, message, tmp_path):
    save(segmenter(head="linear"), tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=rf"^--model .*{message}"):
        load_segmenter(tmp_path, name="--model")
