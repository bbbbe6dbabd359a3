"""Any timm ViT with linear attention: the same model but for one equation, and as much a timm model as before."""

import copy
import json

import onnxruntime
import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import create_feature_extractor, group_parameters
from timm.models.eva import EvaAttention
from torch.utils.flop_counter import FlopCounterMode

import vit_linearizer  # noqa: F401  # registers the names
from small_vits import FAMILIES, SHAPE, images, shake, small
from vit_linearizer import ExportConfig, UserError, export, load
from vit_linearizer.models.adapters import extract_features
from vit_linearizer.models.linear_attention import LinearAttention
from vit_linearizer.models.linear_vit import linear_blocks, linearize
from vit_linearizer.models.loading import save_model_folder

every_family = pytest.mark.parametrize("family", FAMILIES)
every_map = pytest.mark.parametrize("feature_map", ["elu", "relu", "hedgehog"])
SIZES = ("tiny", "small", "base", "large")


def explicit_attention(module, x, rope):
    """N x N linear attention from a module's weights, head by head."""
    tokens, heads, size = x.shape[1], module.num_heads, module.head_dim
    if module.qkv is None:
        parts = [layer(x) for layer in (module.q_proj, module.k_proj, module.v_proj)]
    else:
        bias = module.qkv.bias
        if module.q_bias is not None:
            bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
        parts = torch.nn.functional.linear(x, module.qkv.weight, bias).chunk(3, dim=-1)
    outputs = []
    for head in range(heads):
        own = [t[..., size * n : size * (n + 1)] for t in parts for n in [head * t.shape[-1] // (heads * size)]]
        q, k, v = module.q_norm(own[0]), module.k_norm(own[1]), own[2]
        if rope is not None:
            prefix, turn = module.num_prefix_tokens, rope[head] if rope.dim() > 2 else rope
            turned = [apply_rot_embed_cat(t[:, prefix:], turn, half=module.rotate_half) for t in (q, k)]
            q, k = (torch.cat([t[:, :prefix], patches], dim=1) for t, patches in zip((q, k), turned, strict=True))
        phi_q, phi_k = ((t / size**0.25).clamp(min=0) + (t / size**0.25).clamp(max=0).exp() for t in (q, k))
        weights = phi_q @ phi_k.mT
        assert weights.shape == (x.shape[0], tokens, tokens)
        outputs.append(weights / weights.sum(-1, keepdim=True) @ v)
    y = module.norm(torch.cat(outputs, dim=-1))
    if module.gate is not None:
        y = y * torch.sigmoid(module.gate(x))
    return module.proj(y)


def calls(model, x):
    """What each block's attention was given and what it gave: (input, keywords, output)."""
    seen = []
    hooks = [
        block.attn.register_forward_hook(lambda _, given, words, out: seen.append((given[0], words, out)), with_kwargs=True)
        for block in model.blocks
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


# --- every kind of ViT ----------------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_with_all_softmax_kept_it_is_the_original(family):
    model = small(family)
    kept = linearize(model, keep_softmax_blocks=3)
    assert linear_blocks(kept) == []
    assert torch.equal(kept(images()), model(images()))


@every_family
@torch.no_grad()
def test_each_block_computes_linear_attention_of_its_own_weights(family):
    model = small(family)
    before = model(images())
    linear = linearize(model)
    assert type(linear) is type(model)
    assert torch.equal(model(images()), before), "the model given stays as it is"
    assert [number for number, _ in linear_blocks(linear)] == [0, 1, 2]
    for (x, words, got), (_, module) in zip(calls(linear, images()), linear_blocks(linear), strict=True):
        torch.testing.assert_close(got, explicit_attention(module, x, words.get("rope")), rtol=1e-4, atol=1e-5)
    assert (linear(images()) - before).abs().max() > 1e-5


@every_family
@torch.no_grad()
def test_a_linear_attention_runs_on_what_the_original_was_given(family):
    """Alone, on the original's input: the softmax output is not far and not the same."""
    model = small(family)
    linear = linearize(model)
    for (x, words, softmax), (_, module) in zip(calls(model, images()), linear_blocks(linear), strict=True):
        got = module(x, **words)
        assert got.shape == softmax.shape
        torch.testing.assert_close(got, explicit_attention(module, x, words.get("rope")), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, softmax, atol=1e-6)


@every_family
def test_the_names_of_the_parameters_are_the_originals(family):
    model = small(family)
    linear = linearize(model)
    assert [name for name, _ in linear.named_parameters()] == [name for name, _ in model.named_parameters()]
    again = linearize(small(family, num_classes=5))
    shake(again, seed=1).load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(images()), linear(images()))


@pytest.mark.parametrize("family", [family for family in FAMILIES if "block_fn" not in FAMILIES[family][1]])
@every_map
@torch.no_grad()
def test_the_folder_rebuilds_it_bit_for_bit(tmp_path, family, feature_map):
    model = small(family)
    linear = shake(linearize(model, feature_map=feature_map, keep_softmax_blocks=1), seed=1)
    save_model_folder(linear, tmp_path / "model")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert torch.equal(loaded(images()), linear(images()))
    assert [(n, m.feature_map) for n, m in linear_blocks(loaded)] == [(0, feature_map), (1, feature_map)]
    for name in ("mean", "std", "interpolation", "crop_pct"):
        assert loaded.pretrained_cfg[name] == type(loaded.pretrained_cfg[name])(model.pretrained_cfg[name])
    save_model_folder(loaded, tmp_path / "again")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "again")]
    assert configs[0] == configs[1]


@every_family
@torch.no_grad()
def test_another_image_size_and_intermediates(family):
    model = small(family)
    linear, kept = linearize(model), linearize(model, keep_softmax_blocks=3)
    for changed in (linear, kept, model):
        changed.set_input_size((48, 64))
    assert torch.equal(kept(images(48, 64)), model(images(48, 64)))
    final, maps = linear.forward_intermediates(images(48, 64), indices=[0, 2])
    assert [m.shape for m in maps] == [(2, 48, 6, 8)] * 2
    torch.testing.assert_close(final, linear.forward_features(images(48, 64)))
    seen = extract_features(linear, images(48, 64), stages=3)
    torch.testing.assert_close(seen.stages[0].tokens.mT.unflatten(2, (6, 8)).shape, maps[0].shape)


@every_map
@pytest.mark.parametrize("family", ["vit", "eva-02", "rotary positions of each block", "grouped queries"])
def test_gradients_reach_every_parameter(family, feature_map):
    linear = linearize(small(family), feature_map=feature_map).train()
    linear(images()).square().sum().backward()
    for name, parameter in linear.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    named = [name for name, _ in linear.named_parameters() if "_map" in name]
    assert len(named) == (6 if feature_map == "hedgehog" else 0)


@pytest.mark.parametrize("kind", [Attention, AttentionRope, EvaAttention])
@torch.no_grad()
def test_a_gated_attention_stays_gated(kind):
    torch.manual_seed(0)
    softmax = shake(kind(48, num_heads=3, qkv_bias=True, gated=True, scale_norm=True, norm_layer=torch.nn.LayerNorm))
    module, x = LinearAttention(softmax), torch.randn(2, 9, 48)
    assert module.gate is softmax.gate
    torch.testing.assert_close(module(x), explicit_attention(module, x, None))


# --- one equation, other ways to run it -----------------------------------------------------------------------------


@torch.no_grad()
def test_a_fresh_hedgehog_starts_from_the_identity():
    linear = linearize(small(), feature_map="hedgehog")
    for _, module in linear_blocks(linear):
        for weight in (module.q_map, module.k_map):
            assert torch.equal(weight, torch.eye(16).expand(3, 16, 16))
            weight.fill_(float("nan"))
    linear.init_weights() if hasattr(linear, "init_weights") else None
    linear_blocks(linear)[0][1].reset_parameters()
    assert torch.equal(linear_blocks(linear)[0][1].q_map, torch.eye(16).expand(3, 16, 16))


@pytest.mark.parametrize("family", ["vit", "eva-02"])
def test_masks_are_refused(family):
    linear = linearize(small(family))
    attention, x = linear_blocks(linear)[0][1], torch.randn(2, 17, 48)
    with pytest.raises(UserError, match="attn_mask given: linear attention reads all tokens"):
        attention(x, attn_mask=torch.zeros(17, 17))
    with pytest.raises(UserError, match="is_causal True"):
        attention(x, is_causal=True)


def test_rotary_positions_are_refused_where_there_were_none():
    attention = linear_blocks(linearize(small()))[0][1]
    with pytest.raises(UserError, match="rope given: this attention has no rotary positions"):
        attention(torch.randn(2, 17, 48), rope=torch.randn(16, 32))


def test_compiled():
    linear = linearize(small("eva-02", depth=1)).train()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), linear(images()))
    parameters = list(linear.parameters())
    want = torch.autograd.grad(linear(images()).square().sum(), parameters)
    for mine, theirs in zip(torch.autograd.grad(compiled(images()).square().sum(), parameters), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_traced_by_fx():
    linear = linearize(small(), feature_map="hedgehog")
    extractor = create_feature_extractor(linear, ["blocks.1.attn", "head"])
    (_, _, _), (_, _, want), _ = calls(linear, images())
    got = extractor(images())
    torch.testing.assert_close(got["blocks.1.attn"], want)
    torch.testing.assert_close(got["head"], linear(images()))


@pytest.mark.parametrize("family", ["vit", "dinov3"])
def test_half_precision_and_checkpointing(family):
    linear, x = linearize(small(family)), images()
    want = linear(x)
    want.sum().backward()
    gradient = linear.patch_embed.proj.weight.grad.clone()
    linear.zero_grad()
    linear.set_grad_checkpointing()
    linear(x).sum().backward()
    torch.testing.assert_close(linear.patch_embed.proj.weight.grad, gradient)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (linear(x) - want).norm() < 0.05 * want.norm()
    low = linear.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_dinov3"])
def test_cost_is_linear_in_the_tokens(name):
    """Operations from 224 to 896 pixels grow by the ratio of the tokens (with class token and registers), not its square."""

    def operations(model, size):
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size, device="meta"))
        return counter.get_total_flops()

    with torch.device("meta"):
        softmax = timm.create_model(name, dynamic_img_size=True).eval()
    linear, prefix = linearize(softmax), softmax.num_prefix_tokens
    ratio = (56**2 + prefix) / (14**2 + prefix)
    assert operations(linear, 896) / operations(linear, 224) == pytest.approx(ratio, rel=0.02)
    softmax.blocks[0].attn.fused_attn = True
    assert operations(softmax, 896) > 1.3 * operations(linear, 896)


def test_onnx_of_free_size_gives_the_same(tmp_path):
    linear = linearize(small(), keep_softmax_blocks=1)
    save_model_folder(linear, tmp_path / "model")
    out = tmp_path / "model.onnx"
    differences = export(ExportConfig(model=str(tmp_path / "model"), format="onnx", out=str(out), dynamic=True))
    assert max(differences.values()) < 1e-4
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    model = load(tmp_path / "model", dynamic_img_size=True)
    for height, width in ((32, 32), (64, 24), (272, 264)):
        x = images(height, width)
        with torch.no_grad():
            want = model((x - 0.5) / 0.5)
        torch.testing.assert_close(torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), want, rtol=1e-3, atol=1e-4)


# --- a timm model ---------------------------------------------------------------------------------------------------


def test_five_names_are_registered_without_weights():
    assert timm.list_models("linear_vit*") == ["linear_vit", *sorted(f"linear_vit_{s}_patch16_224" for s in SIZES)]
    assert timm.list_pretrained("linear_vit*") == []
    for size in SIZES:
        with pytest.raises(RuntimeError, match="No pretrained weights exist"):
            timm.create_model(f"linear_vit_{size}_patch16_224", pretrained=True, device="meta")


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_timms_own(size):
    model = timm.create_model(f"linear_vit_{size}_patch16_224", device="meta")
    base = timm.create_model(f"vit_{size}_patch16_224", device="meta")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}
    assert len(linear_blocks(model)) == len(model.blocks)
    assert all(p.device.type == "meta" for p in model.parameters())
    for name in ("mean", "std", "input_size", "num_classes", "classifier", "first_conv", "fixed_input_size"):
        assert model.pretrained_cfg[name] == base.pretrained_cfg[name]
    assert model.no_weight_decay() == base.no_weight_decay()
    assert model.group_matcher() == base.group_matcher()


@pytest.mark.parametrize("base", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224.openai", "vit_small_patch16_dinov3"])
def test_the_generic_name_takes_its_base_but_for_the_weights(base):
    original = timm.create_model(base, **SHAPE)
    model = timm.create_model("linear_vit", base=base, **SHAPE)
    assert type(model) is type(original)
    assert (model.pretrained_cfg["mean"], model.pretrained_cfg["std"]) == tuple(
        original.pretrained_cfg[name] for name in ("mean", "std")
    )
    assert model.pretrained_cfg["architecture"] == "linear_vit"
    assert not {"url", "hf_hub_id", "source"} & model.pretrained_cfg.keys()
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("linear_vit", base=base, pretrained=True, device="meta", **SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted CLIP with a head of its own, one block kept, and learnt maps; and the model itself."""
    model = timm.create_model("vit_base_patch16_clip_224.openai", **SHAPE)
    linear = shake(linearize(shake(model), feature_map="hedgehog", keep_softmax_blocks=1), seed=1)
    where = tmp_path_factory.mktemp("linear") / "model"
    save_model_folder(linear, where)
    return where, linear


@torch.no_grad()
def test_features_only_of_fewer_blocks_keeps_the_kind_of_each(folder):
    """The last block is the kept one: of two blocks left, both are linear."""
    where, linear = folder
    wrapped = timm.create_model(f"local-dir:{where}", pretrained=True, features_only=True, out_indices=(0, 1)).eval()
    want = linear.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)
    for got, wanted in zip(wrapped(images()), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@torch.no_grad()
def test_a_folder_opened_with_changes(folder):
    where, linear = folder
    name = f"local-dir:{where}"
    assert json.loads((where / "config.json").read_text())["model_args"]["base"] == "vit_base_patch16_clip_224.openai"
    fresh = timm.create_model(name, pretrained=True, num_classes=3).eval()
    assert fresh(images()).shape == (2, 3)
    assert torch.equal(fresh.forward_features(images()), linear.forward_features(images()))
    resized = copy.deepcopy(linear)
    resized.set_input_size((48, 64))
    wide = timm.create_model(name, pretrained=True, img_size=(48, 64)).eval()
    assert torch.equal(wide(images(48, 64)), resized(images(48, 64)))
    free = timm.create_model(name, pretrained=True, dynamic_img_size=True).eval()
    torch.testing.assert_close(free(images(48, 64)), resized(images(48, 64)))
    save_model_folder(resized, where.with_name("resized"))
    assert torch.equal(load(where.with_name("resized"))(images(48, 64)), resized(images(48, 64)))


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "siglip", "eva-02"])
def test_a_changed_head_survives_the_folder(tmp_path, family):
    linear = linearize(small(family))
    linear.reset_classifier(0, "avg")
    save_model_folder(linear, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert (loaded.num_classes, loaded.global_pool) == (0, "avg")
    assert torch.equal(loaded(images()), linear(images()))


@torch.no_grad()
def test_another_pooling_than_the_folders(tmp_path):
    linear = linearize(small("siglip"))
    save_model_folder(linear, tmp_path / "model")
    pooling = dict(global_pool="avg", fc_norm=False)  # otherwise the final norm has no place
    loaded = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, **pooling).eval()
    assert loaded.attn_pool is None
    assert torch.equal(loaded.forward_features(images()), linear.forward_features(images()))


def test_every_parameter_is_in_the_group_of_its_block():
    linear = linearize(small(), feature_map="hedgehog")
    groups = group_parameters(linear, linear.group_matcher(), reverse=True)
    assert groups["blocks.1.attn.q_map"] == groups["blocks.1.attn.qkv.weight"]
    assert sorted(groups) == sorted(name for name, _ in linear.named_parameters())


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("beit_base_patch16_224", "timm.models.beit.Attention of block 0"),
        ("vit_relpos_small_patch16_224", "RelPosAttention of block 0"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock of block 0"),
        ("resnet18", "ResNet has no blocks of attention"),
    ],
)
def test_attention_of_another_kind_is_refused(name, said):
    with pytest.raises(UserError, match=f"model {name}: .*{said}"):
        linearize(timm.create_model(name, device="meta"))


def test_other_refusals():
    model = small()
    with pytest.raises(UserError, match="keep_softmax_blocks 4: must be between 0 and the model's 3 blocks"):
        linearize(model, keep_softmax_blocks=4)
    with pytest.raises(UserError, match="feature_map elus: choose from"):
        linearize(model, feature_map="elus")
    with pytest.raises(UserError, match="of block 0 is linear already"):
        linearize(linearize(model))
    with pytest.raises(UserError, match="base vit_base_patch16_22: is no timm ViT; did you mean vit_base_patch16_224"):
        timm.create_model("linear_vit", base="vit_base_patch16_22")
    with pytest.raises(UserError, match=r"base vit_base_patch16_224.nobodys: has no such tag"):
        timm.create_model("linear_vit", base="vit_base_patch16_224.nobodys")
