"""The published Adventurer weights: names and numbers against an implementation written from the description alone."""

import argparse
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F

from vit_linearizer import load
from vit_linearizer.contracts import UserError
from vit_linearizer.models.loading import open_model
from vit_linearizer.models.released import RELEASED

TINY = "adventurer_tiny_patch16_224"
PUBLISHED = f"{TINY}.pth"
FLIPS = {"alternate": lambda n: (n // 2) % 2 == 1, "released": lambda n: n // 2 == 1}
#: Makes `TINY` fit the small files below; the flip rules part at block 6.
SMALL = {"embed_dim": 64, "depth": 7}


# --- Adventurer in plain PyTorch ------------------------------------------------------------------------------------


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def mamba2(w, u, state=64, head=64):
    length, inner = u.shape[1], w["out_proj.weight"].shape[1]
    z, xbc, dt = (u @ w["in_proj.weight"].T).split([inner, inner + 2 * state, inner // head], -1)
    padded = F.pad(xbc, (0, 0, 3, 0))
    xbc = F.silu(sum(padded[:, k : k + length] * w["conv1d.weight"][:, 0, k] for k in range(4)) + w["conv1d.bias"])
    x, b, c = xbc.split([inner, state, state], -1)
    x = x.unflatten(-1, (-1, head))
    dt, a = F.softplus(dt + w["dt_bias"]), -w["A_log"].exp()
    h, ys = x.new_zeros(len(u), inner // head, head, state), []
    for t in range(length):
        h = (dt[:, t] * a).exp()[..., None, None] * h + torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], b[:, t])
        ys.append(torch.einsum("bhpn,bn->bhp", h, c[:, t]) + w["D"][:, None] * x[:, t])
    y = torch.stack(ys, 1).flatten(2)
    return rms(y * F.silu(z), w["norm.weight"]) @ w["out_proj.weight"].T


def mix(w, u, flip):
    patches, class_token = u[:, :-1], u[:, -1:]
    read = torch.cat([u.mean(1, keepdim=True), patches.flip(1) if flip else patches, class_token], 1)
    mixed = mamba2(w, read)
    patches, class_token = mixed[:, 1:-1], mixed[:, -1:]
    return torch.cat([patches.flip(1) if flip else patches, class_token], 1)


def adventurer(weights, images, flip):
    """Published weights and normalised images to logits, in fp64."""
    w = {name: value.double() for name, value in weights.items()}

    def part(prefix):
        return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}

    kernel = w["patch_embed.proj.weight"]
    patches = F.conv2d(images.double(), kernel, w["patch_embed.proj.bias"], stride=kernel.shape[-1]).flatten(2).mT
    x = torch.cat([patches, w["cls_token"].expand(len(images), -1, -1)], 1) + w["pos_embed"]
    for n in range(len({name.split(".")[1] for name in w if name.startswith("layers.")})):
        block = part(f"layers.{n}.")
        x = x + mix(part(f"layers.{n}.mixer."), rms(x, block["norm.weight"]), FLIPS[flip](n))
        u = rms(x, block["norm_mlp.weight"])
        w1, w2, w3 = ((block[f"mlp.w{k}.weight"].T, block[f"mlp.w{k}.bias"]) for k in (1, 2, 3))
        x = x + (F.silu(u @ w1[0] + w1[1]) * (u @ w2[0] + w2[1])) @ w3[0] + w3[1]
    return rms(x[:, -1], w["norm_f.weight"]) @ w["head.weight"].T + w["head.bias"]


def random_weights(*, width=256, depth=12, patch=16, positions=197, classes=1000, seed=0):
    """A state dict with the published names, the scale of trained weights, and no value that would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    inner, hidden = 2 * width, int(2.5 * width)

    def normal(*shape, std):
        return std * torch.randn(*shape, generator=generator)

    def linear(out, into, *, scale=1.0):
        return normal(out, into, std=scale / math.sqrt(into))

    def gain(dim):
        return 1 + normal(dim, std=0.2)

    weights = {
        "cls_token": normal(1, 1, width, std=0.3),
        "pos_embed": normal(1, positions, width, std=0.3),
        "patch_embed.proj.weight": normal(width, 3, patch, patch, std=1 / (patch * math.sqrt(3))),
        "patch_embed.proj.bias": normal(width, std=0.1),
    }
    for n in range(depth):
        dt = torch.empty(inner // 64).uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp()
        block = {
            "norm.weight": gain(width),
            "mixer.in_proj.weight": linear(2 * inner + 128 + inner // 64, width),
            "mixer.conv1d.weight": normal(inner + 128, 1, 4, std=0.5),
            "mixer.conv1d.bias": normal(inner + 128, std=0.1),
            "mixer.dt_bias": dt.expm1().log(),
            "mixer.A_log": torch.empty(inner // 64).uniform_(1, 16, generator=generator).log(),
            "mixer.D": gain(inner // 64),
            "mixer.norm.weight": gain(inner),
            "mixer.out_proj.weight": linear(width, inner, scale=0.5),
            "norm_mlp.weight": gain(width),
            "mlp.w1.weight": linear(hidden, width),
            "mlp.w1.bias": normal(hidden, std=0.1),
            "mlp.w2.weight": linear(hidden, width),
            "mlp.w2.bias": normal(hidden, std=0.1),
            "mlp.w3.weight": linear(width, hidden, scale=0.5),
            "mlp.w3.bias": normal(width, std=0.1),
        }
        weights |= {f"layers.{n}.{name}": value for name, value in block.items()}
    weights["norm_f.weight"] = gain(width)
    return weights | {"head.weight": linear(classes, width), "head.bias": normal(classes, std=0.1)}


def assert_equal(got, want):
    """Within 1e-5 of the largest value."""
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= 1e-5 * want.abs().max()


def images(height, width, *, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model, x):
    return model.eval()(x)


@pytest.fixture(scope="module")
def tiny():
    return random_weights()


@pytest.fixture(scope="module")
def tiny_logits(tiny):
    return {flip: adventurer(tiny, images(224, 224), flip) for flip in FLIPS}


@pytest.fixture(scope="module")
def small_weights():
    """Weights for `SMALL`, 64x64 images and 10 classes."""
    return random_weights(width=64, depth=7, positions=17, classes=10)


def saved(folder, weights, name=PUBLISHED):
    torch.save(weights, folder / name)
    return folder / name


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "under a model key"])
@pytest.mark.parametrize("flip", FLIPS)
def test_timm_gives_the_logits_of_the_description(tiny, tiny_logits, tmp_path, flip, wrapped):
    content = {"model": tiny, "args": argparse.Namespace(model="tiny", lr=1e-3), "epoch": 300} if wrapped else tiny
    model = timm.create_model(TINY, checkpoint_path=str(saved(tmp_path, content, "weights.pth")), flip=flip)
    assert_equal(run(model, images(224, 224)), tiny_logits[flip])


def test_the_flip_rules_differ(tiny_logits):
    difference = (tiny_logits["alternate"] - tiny_logits["released"]).abs().max()
    assert difference > 0.01 * tiny_logits["released"].abs().max()


def test_a_published_file_name_says_all_there_is_to_know(tiny, tiny_logits, tmp_path, caplog):
    model = load(saved(tmp_path, tiny))
    assert not model.training
    assert model.flip == "released"
    assert model.patch_embed.img_size == (224, 224)
    assert f"{PUBLISHED}: taken for the published weights of that name, with flip=released; if it is yours" in caplog.text
    assert_equal(run(model, images(224, 224)), tiny_logits["released"])


@pytest.mark.parametrize("name", RELEASED)
def test_size_and_flip_rule_come_from_the_table(name, tmp_path):
    released = RELEASED[name]
    patch = int(re.search(r"patch(\d+)", name)[1])
    side = int(name.removesuffix(".pth").split("_")[-1])
    weights = random_weights(width=32, depth=1, patch=patch, positions=(side // patch) ** 2 + 1, classes=3)
    model = load(saved(tmp_path, weights, name), embed_dim=32, depth=1)
    assert (model.patch_embed.img_size, model.patch_embed.patch_size) == ((side, side), (patch, patch))
    assert (model.flip, model.pretrained_cfg["architecture"]) == ("released", released.architecture)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_what_the_user_says_stands_before_the_table(small, tmp_path):
    model = load(saved(tmp_path, small), flip="alternate", img_size=64, **SMALL)
    assert_equal(run(model, images(64, 64)), adventurer(small, images(64, 64), "alternate"))


def test_a_file_of_another_size_is_not_taken_for_published(small, tmp_path):
    other = small | {"pos_embed": torch.zeros(1, 37, 64)}
    with pytest.raises(UserError, match="bears the name of published weights but is not of their size; rename it"):
        load(saved(tmp_path, other), **SMALL)


def test_what_is_said_about_flips(small, tmp_path, caplog):
    load(saved(tmp_path, small), flip="alternate", **SMALL)
    assert "flip" not in caplog.text
    load(saved(tmp_path, small, "mine.pth"), architecture=TINY, img_size=64, **SMALL)
    assert "mine.pth: a weight file does not say which blocks flip; flip=alternate is assumed" in caplog.text


def test_another_file_name_needs_an_architecture(small, tmp_path):
    file = saved(tmp_path, small, "mine.pth")
    with pytest.raises(UserError, match=r"^--model \S+mine\.pth: is a weight file; .*--model-arch") as error:
        open_model(str(file), field="--model")
    assert "\n" not in str(error.value)
    model = open_model(str(file), field="--model", architecture=TINY, img_size=64, **SMALL)
    assert model.flip == "alternate"
    assert_equal(run(model, images(64, 64)), adventurer(small, images(64, 64), "alternate"))


@pytest.mark.parametrize(("classes", "dropped"), [(10, ()), (0, ("head.weight", "head.bias"))])
def test_the_head_of_the_file_stays_as_it_is(small, tmp_path, classes, dropped):
    weights = {name: value for name, value in small.items() if name not in dropped}
    model = load(saved(tmp_path, weights), img_size=64, **SMALL)
    assert model.num_classes == classes
    assert model.state_dict().keys() == weights.keys()
    assert run(model, images(64, 64)).shape == (2, classes or 64)


# --- other sizes ----------------------------------------------------------------------------------------------------


def resampled_positions(positions, old, new):
    """Patch positions resized as a picture, the class slot (the last) as it was."""
    picture = positions[:, :-1].mT.unflatten(2, (old, old))
    patches = F.interpolate(picture, new, mode="bicubic", antialias=True).flatten(2).mT
    return torch.cat([patches, positions[:, -1:]], 1)


def resampled_kernel(kernel, new):
    """The kernel whose answer to a resized patch is nearest to the old kernel's answer to the patch."""
    old = kernel.shape[-1]
    basis = torch.eye(old * old).view(old * old, 1, old, old)
    resize = F.interpolate(basis, (new, new), mode="bicubic", antialias=True).flatten(1).T.double()
    return (kernel.double().flatten(2) @ torch.linalg.pinv(resize)).unflatten(2, (new, new)).float()


@pytest.mark.parametrize("size", [(96, 96), (32, 32), (48, 80), (16, 96)], ids=str)
def test_another_size_resamples_positions_with_the_class_slot_last(small, tmp_path, size):
    resampled = small | {"pos_embed": resampled_positions(small["pos_embed"], 4, (size[0] // 16, size[1] // 16))}
    want = adventurer(resampled, images(*size), "released")
    file = saved(tmp_path, small)
    assert_equal(run(load(file, img_size=size, **SMALL), images(*size)), want)
    assert_equal(run(load(file, img_size=64, **SMALL), images(*size)), want)


@pytest.mark.parametrize("patch", [8, 14])
def test_another_patch_size_resamples_the_kernel(small, tmp_path, patch):
    model = load(saved(tmp_path, small), img_size=4 * patch, patch_size=patch, **SMALL)
    kernel = resampled_kernel(small["patch_embed.proj.weight"], patch)
    torch.testing.assert_close(model.patch_embed.proj.weight.data, kernel, rtol=1e-3, atol=1e-4)
    assert torch.equal(model.pos_embed, small["pos_embed"])
    side = 6 * patch
    same = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    want = same | {"pos_embed": resampled_positions(small["pos_embed"], 4, (6, 6))}
    assert_equal(run(model, images(side, side)), adventurer(want, images(side, side), "released"))
