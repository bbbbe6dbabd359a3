"""Any timm ViT as `Features`, masking of its patches, and the frozen teacher: its sizes, its sources, its messages."""

import json

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_file

from vit_linearizer.contracts import UserError
from vit_linearizer.models.adapters import check_plain, extract_features, nominal_size, patch_grid, stage_ends
from vit_linearizer.models.loading import create_backbone, save_model_folder
from vit_linearizer.models.teacher import Teacher, agreeing_size, load_teacher

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

#: name, patch, prefix tokens, whether the first of them is a class token, (mean, deviation) of its normalisation
TEACHERS = {
    "vit_tiny_patch16_224": (16, 1, True, HALF),
    "deit3_small_patch16_224": (16, 1, True, IMAGENET),
    "vit_small_patch14_dinov2": (14, 1, True, IMAGENET),
    "vit_small_patch14_reg4_dinov2": (14, 5, True, IMAGENET),
    "vit_base_patch16_siglip_224": (16, 0, False, HALF),
    "eva02_tiny_patch14_224": (14, 1, True, CLIP),
    "vit_base_patch16_rope_reg1_gap_256": (16, 1, False, HALF),
}
GRID = (2, 3)


def teacher_model(name, **options):
    """A narrow model of a kind, twelve blocks deep, for 2 x 3 patches, with random weights that all matter."""
    torch.manual_seed(0)
    patch = TEACHERS[name][0]
    size = {"img_size": (GRID[0] * patch, GRID[1] * patch)}
    model = timm.create_model(name, **{**size, "embed_dim": 48, "num_heads": 3, "num_classes": 0, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pictures(patch, grid=GRID, batch=2):
    """In [0, 1], as everything in this project takes them."""
    return torch.rand(batch, 3, grid[0] * patch, grid[1] * patch, generator=torch.Generator().manual_seed(1))


def normalized(images, name):
    mean, deviation = (torch.tensor(values)[:, None, None] for values in TEACHERS[name][3])
    return (images - mean) / deviation


# --- features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "stages", "ends"),
    [(12, 4, [2, 5, 8, 11]), (24, 4, [5, 11, 17, 23]), (12, 1, [11]), (5, 2, [1, 4]), (7, 4, [0, 2, 4, 6])],
)
def test_stage_ends(depth, stages, ends):
    assert stage_ends(depth, stages) == ends


@pytest.mark.parametrize("stages", [0, 13])
def test_stage_ends_refuses_more_stages_than_blocks(stages):
    with pytest.raises(UserError, match=rf"stages {stages}: must be between 1 and the backbone's 12 blocks"):
        stage_ends(12, stages)


@pytest.mark.parametrize("name", TEACHERS)
def test_features_of_each_kind(name):
    patch, prefix, has_class_token, _ = TEACHERS[name]
    model, images, outputs = teacher_model(name), pictures(patch), []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        features = extract_features(model, images, stages=4)
        raw = outputs[:12]
        final = model.forward_features(normalized(images, name))
        if isinstance(model.norm, nn.Identity):
            final = model.fc_norm(final)  # ViTs that pool the mean keep their final norm behind the pooling

    assert patch_grid(model, images.shape[-2:]) == features.grid == GRID
    assert features.tokens.shape == (2, 6, 48)
    torch.testing.assert_close(features.tokens, final[:, prefix:])
    torch.testing.assert_close(features.pooled, final[:, prefix:].mean(1))
    assert (features.class_token is not None) == has_class_token
    if has_class_token:
        torch.testing.assert_close(features.class_token, final[:, 0])

    assert len(features.stages) == 4
    for stage, end in zip(features.stages, [2, 5, 8, 11], strict=True):
        assert stage.grid == GRID
        assert torch.equal(stage.tokens, raw[end][:, prefix:])
        assert (stage.class_token is not None) == has_class_token
        if has_class_token:
            assert torch.equal(stage.class_token, raw[end][:, 0])


def test_features_of_the_student():
    torch.manual_seed(0)
    model = timm.create_model("adventurer_tiny_patch16_224", img_size=32, embed_dim=32, depth=4, num_classes=0).eval()
    images = torch.rand(2, 3, 32, 48)
    with torch.no_grad():
        features = extract_features(model, images, stages=2)
        mean, deviation = (torch.tensor(values)[:, None, None] for values in IMAGENET)
        final = model.forward_features((images - mean) / deviation)
    torch.testing.assert_close(features.tokens, final[:, 1:])
    torch.testing.assert_close(features.class_token, final[:, 0])
    assert [(stage.tokens.shape, stage.class_token.shape) for stage in features.stages] == [((2, 6, 32), (2, 32))] * 2


def test_pooling_the_mean_does_not_change_what_the_tokens_are():
    """timm moves the final norm of such a ViT behind the pooling; the tokens must come normalised all the same."""
    plain = teacher_model("vit_tiny_patch16_224")
    pooled = teacher_model("vit_tiny_patch16_224", global_pool="avg")
    weights = {key.replace("fc_norm.", "norm."): value for key, value in pooled.state_dict().items()}
    plain.load_state_dict(weights)
    with torch.no_grad():
        got, want = (extract_features(model, pictures(16)) for model in (pooled, plain))
    torch.testing.assert_close(got.tokens, want.tokens)
    torch.testing.assert_close(got.class_token, want.class_token)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224"])
def test_each_backbone_brings_its_own_normalisation(name):
    model, seen = teacher_model(name), []
    model.patch_embed.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    images = pictures(TEACHERS[name][0])
    with torch.no_grad():
        extract_features(model, images)
    torch.testing.assert_close(seen[0], normalized(images, name))


# --- masks ----------------------------------------------------------------------------------------------------------

MASKED = {
    "ViT": ("vit_tiny_patch16_224", {}),
    "ViT with dynamic sizes (NHWC)": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "EVA": ("eva02_tiny_patch14_224", {}),
    "no class token": ("vit_base_patch16_siglip_224", {}),
}


@pytest.mark.parametrize(("name", "options"), MASKED.values(), ids=MASKED)
def test_mask_replaces_exactly_the_masked_patches(name, options):
    model, patches, entered = teacher_model(name, **options), [], []
    handles = [model.patch_embed.proj.register_forward_hook(lambda _m, _i, out: patches.append(out.flatten(2).mT))]
    # The first block sees tokens after positions were added, so that the difference to an unmasked run is the patches' own.
    handles.append(model.blocks[0].register_forward_pre_hook(lambda _m, inputs: entered.append(inputs[0])))
    prefix = TEACHERS[name][1]
    images, token = pictures(TEACHERS[name][0]), torch.randn(1, 1, 48)
    mask = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    with torch.no_grad():
        plain = extract_features(model, images)
        masked = extract_features(model, images, mask=mask, mask_token=token)
        again = extract_features(model, images)

    assert entered[0].shape == (2, prefix + 6, 48), "nothing is dropped"
    assert torch.equal(entered[1][:, :prefix], entered[0][:, :prefix])
    change = (entered[1] - entered[0])[:, prefix:]
    assert torch.equal(change[~mask], torch.zeros_like(change[~mask]))
    torch.testing.assert_close(change[mask], (token - patches[0])[mask], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(masked.tokens, plain.tokens)
    assert torch.equal(again.tokens, plain.tokens)
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("name", "options"), MASKED.values(), ids=MASKED)
def test_gradients_reach_the_mask_token_from_masked_patches_only(name, options):
    model, images = teacher_model(name, **options), pictures(TEACHERS[name][0]).requires_grad_()
    token = torch.randn(1, 1, 48, requires_grad=True)
    mask = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    extract_features(model, images, mask=mask, mask_token=token).tokens.square().sum().backward()
    assert token.grad.any()
    patch = TEACHERS[name][0]
    pixels = images.grad.unfold(2, patch, patch).unfold(3, patch, patch).abs().sum(dim=(1, 4, 5)).flatten(1)
    assert torch.equal(pixels == 0, mask)


def test_mask_leaves_no_hook_behind_after_an_error():
    model, mask = teacher_model("vit_tiny_patch16_224"), torch.zeros(2, 6, dtype=torch.bool)
    with pytest.raises(RuntimeError):
        extract_features(model, pictures(16), mask=mask[:, :5], mask_token=torch.zeros(1, 1, 48))
    with pytest.raises(ValueError, match="needs a mask_token"):
        extract_features(model, pictures(16), mask=mask)
    assert not model.patch_embed._forward_hooks


# --- the teacher ----------------------------------------------------------------------------------------------------


def test_teacher_is_frozen_and_out_of_reach():
    model = teacher_model("vit_tiny_patch16_224", proj_drop_rate=0.5).train().requires_grad_()

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.Linear(2, 2)
            self.teacher = Teacher(model, (32, 48))

    student = Student()
    student.train()
    assert not isinstance(student.teacher, nn.Module)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {name for name, _ in student.named_parameters()} == set(student.state_dict()) == {"own.weight", "own.bias"}
    assert [name for name, _ in student.named_modules()] == ["", "own"]
    assert student.teacher.dim == 48
    images = pictures(16).requires_grad_()
    features = student.teacher.features(images, stages=2)
    assert not features.tokens.requires_grad
    assert not any(stage.tokens.requires_grad for stage in features.stages)
    assert torch.equal(features.tokens, student.teacher.features(images).tokens), "no dropout"


def test_teacher_sees_its_own_size():
    """A patch-14 teacher at 28 x 42 answers for the same grid as a patch-16 student at 32 x 48, from the same view."""
    model, seen = teacher_model("vit_small_patch14_dinov2"), []
    model.patch_embed.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    teacher = Teacher(model, (28, 42))
    low, high = (normalized(torch.full((1, 3, 1, 1), value), "vit_small_patch14_dinov2") for value in (0.0, 1.0))
    checkerboard = ((torch.arange(32)[:, None] // 4 + torch.arange(48) // 4) % 2).float().expand(2, 3, 32, 48)
    features = teacher.features(checkerboard)
    assert features.grid == teacher.grid == GRID
    assert seen[0].shape == (2, 3, 28, 42)
    assert (seen[0] >= low - 1e-5).all(), "bicubic overshoot is cut back to [0, 1]"
    assert (seen[0] <= high + 1e-5).all()
    smooth = torch.linspace(0.2, 0.8, 48).expand(2, 3, 32, 48)
    teacher.features(smooth)
    ramp = 0.2 + 0.6 * ((torch.arange(42) + 0.5) * 48 / 42 - 0.5) / 47  # pixel centres keep their place
    ramp = normalized(ramp, "vit_small_patch14_dinov2")[:, 0]
    torch.testing.assert_close(seen[1][0, :, 14, 5:-5], ramp[:, 5:-5], atol=0.005, rtol=0)
    teacher.features(pictures(14))
    assert torch.equal(seen[2], normalized(pictures(14), "vit_small_patch14_dinov2")), "its own size is not resampled"


@pytest.mark.parametrize(
    ("name", "student_grid", "size"),
    [
        ("vit_small_patch14_dinov2", (14, 14), (196, 196)),
        ("vit_base_patch16_clip_224.openai", (14, 14), (224, 224)),
        ("vit_large_patch14_clip_224.openai", (16, 16), (224, 224)),
        ("eva02_tiny_patch14_224", (14, 28), (196, 392)),
    ],
)
def test_agreeing_size(name, student_grid, size):
    assert agreeing_size(name, student_grid=student_grid) == size
    assert agreeing_size(name, student_grid=student_grid, image_size=size) == size


def test_disagreeing_size_names_the_one_to_use():
    with pytest.raises(UserError, match=r"--teacher-image-size 224x224: .*14x14.*14 x 14 patches.*use 196x196"):
        agreeing_size("vit_small_patch14_dinov2", student_grid=(14, 14), image_size=(224, 224))


@pytest.mark.parametrize(
    ("size", "near"),
    [((230, 224), "224x224"), ((224, 250), "224x256"), ((3, 224), "16x224"), ((0, 32), "16x32")],
)
def test_patch_grid_names_a_valid_size_nearby(size, near):
    model = timm.create_model("vit_tiny_patch16_224", device="meta")
    assert nominal_size(model) == (224, 224)
    with pytest.raises(UserError, match=rf"image size {size[0]}x{size[1]}: .*multiple of the patch 16x16; try {near}"):
        patch_grid(model, size)
    assert patch_grid(model, tuple(int(side) for side in near.split("x")))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"])
def test_only_plain_backbones_are_taken(name):
    message = rf"{name}: is not a plain backbone of patch tokens; use a ViT"
    with pytest.raises(UserError, match=message):
        agreeing_size(name, student_grid=(14, 14))
    with pytest.raises(UserError, match=message):
        check_plain(timm.create_model(name, device="meta"), name)


# --- where weights come from ----------------------------------------------------------------------------------------


def write_weights(model, file, nested=False):
    weights = model.state_dict()
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save({"model": weights} if nested else weights, file)


@pytest.mark.parametrize(("suffix", "nested"), [(".pth", False), (".pth", True), (".safetensors", False)])
def test_weight_file_of_an_architecture(tmp_path, suffix, nested):
    torch.manual_seed(0)
    model, file = timm.create_model("test_vit"), tmp_path / f"weights{suffix}"
    write_weights(model, file, nested)
    assert agreeing_size(str(file), student_grid=(10, 10), architecture="test_vit") == (160, 160)
    teacher = load_teacher(str(file), image_size=(160, 160), architecture="test_vit")
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    loaded = teacher.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize("field", ["folder", "local-dir:folder", "run"])
def test_model_folder_as_teacher(tmp_path, field):
    model, run = teacher_model("vit_tiny_patch16_224"), tmp_path / "run"
    run.mkdir()
    save_model_folder(model, run / "model")
    name = {"folder": f"{run}/model", "local-dir:folder": f"local-dir:{run}/model", "run": str(run)}[field]
    assert agreeing_size(name, student_grid=GRID) == (32, 48)
    teacher = load_teacher(name, image_size=(32, 48))
    with torch.no_grad():
        want = extract_features(model, pictures(16))
    assert torch.equal(teacher.features(pictures(16)).tokens, want.tokens)


def test_teacher_without_weights():
    teacher = load_teacher("test_vit", image_size=(64, 96), pretrained=False)
    assert teacher.features(torch.rand(1, 3, 64, 96)).grid == (4, 6)


def test_weight_file_needs_its_architecture(tmp_path):
    write_weights(timm.create_model("test_vit"), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"--teacher .*weights\.pth: .*architecture.*--teacher-arch"):
        load_teacher(str(tmp_path / "weights.pth"), image_size=(160, 160))


def test_weights_of_another_width_are_refused(tmp_path):
    write_weights(timm.create_model("test_vit"), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"--teacher .*weights do not fit"):
        load_teacher(str(tmp_path / "weights.pth"), image_size=(160, 160), architecture="vit_tiny_patch16_224")


@pytest.mark.parametrize("left", ["nothing", "not the last block"])
def test_a_teacher_is_never_random_in_part(tmp_path, left):
    """A weight file that names other parameters, or misses some, is an error although the head is left out."""
    weights = timm.create_model("test_vit").state_dict()
    if left == "nothing":
        weights = {f"encoder.{name}": value for name, value in weights.items()}
    else:
        last = max(name.split(".")[1] for name in weights if name.startswith("blocks."))
        weights = {name: value for name, value in weights.items() if not name.startswith(f"blocks.{last}.")}
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"--teacher .*weights"):
        load_teacher(str(tmp_path / "weights.pth"), image_size=(160, 160), architecture="test_vit")


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"--teacher .*absent\.pth: no such file"):
        create_backbone(str(tmp_path / "absent.pth"), field="--teacher", architecture="test_vit")
    for name in (str(tmp_path), f"local-dir:{tmp_path}", f"local-dir:{tmp_path}/absent"):
        with pytest.raises(UserError, match=r"--teacher .*config\.json.*weights"):
            create_backbone(name, field="--teacher")


@pytest.mark.parametrize(
    ("name", "architecture", "message"),
    [
        ("vit_bas_patch16_224", None, r"--teacher vit_bas_patch16_224: unknown model; did you mean .*vit_base_patch16_224"),
        ("weights.pth", "vit_bas_patch16_224", r"--teacher-arch vit_bas_patch16_224: .*did you mean .*vit_base_patch16_224"),
        ("vit_base_patch16_clip_224.opnai", None, r"unknown weights; vit_base_patch16_clip_224 has .*openai"),
    ],
)
def test_unknown_names_get_a_suggestion(tmp_path, monkeypatch, name, architecture, message):
    monkeypatch.chdir(tmp_path)
    write_weights(timm.create_model("test_vit"), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        create_backbone(name, field="--teacher", architecture=architecture)


def test_options_that_a_model_does_not_take():
    with pytest.raises(UserError, match=r"--student test_vit: could not be built: .*colour"):
        create_backbone("test_vit", field="--student", colour="red")


def test_a_teacher_without_published_weights_is_an_error():
    with pytest.raises(UserError, match=r"^--teacher adventurer\S+: has no published weights; .*--no-teacher-pretrained"):
        load_teacher("adventurer_tiny_patch16_224", image_size=(224, 224))


def test_a_classifier_of_another_size_than_its_configuration_is_an_error(tmp_path):
    model = timm.create_model("test_vit", num_classes=9)
    save_model_folder(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for part in (config, config["model_args"], config["pretrained_cfg"]):
        part["num_classes"] = 7
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"do not fit the architecture: another shape head\.weight \[9, 64\] for \[7, 64\]"):
        create_backbone(str(tmp_path / "model"), field="--teacher")
