"""ViT-AdaLA: both losses by hand, the calls that are recorded, the first stage against a teacher run block by block, and the
command that goes from a teacher to its linear self.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import apply_rot_embed_cat
from torch.utils.data import DataLoader

import small_vits
from small_vits import images, shake, small
from vit_linearizer import UserError, distill
from vit_linearizer.cli import main
from vit_linearizer.contracts import Features
from vit_linearizer.models.attention_calls import recorded_attention
from vit_linearizer.models.linear_vit import linear_blocks, linearize
from vit_linearizer.models.loading import load
from vit_linearizer.models.teacher import Teacher
from vit_linearizer.objectives import attention_alignment, attention_errors, feature_alignment
from vit_linearizer.tasks import AttentionAlignment, Distillation, DistillationConfig

CPU = torch.device("cpu")
#: Of those in `small_vits`, all that differ in what is trained.
FAMILIES = [family for family in small_vits.FAMILIES if family not in ("norms behind", "eva", "perception encoder")]
every_family = pytest.mark.parametrize("family", FAMILIES)
ROTARY = {family for family in FAMILIES if "eva" in family or "dinov3" in family} | {
    "rotary positions of each block",
    "grouped queries",
}
#: All that the first stage trains.
PROJECTIONS = re.compile(
    r"student\.blocks\.(\d+)\.attn\.(qkv\.weight|qkv\.bias|[qkv]_proj\.(weight|bias)|[qv]_bias|[qk]_map)"
)
FEATURE_ALIGNMENT = DistillationConfig(
    stages=1,
    mask_ratio=0.0,
    activation_matching_weight=0.0,
    masked_prediction_weight=0.0,
    feature_alignment_weight=1.0,
)


def pair(family, **linear):
    """A frozen teacher without its classifier, and what it becomes: with weights of its own, so that nothing is shared."""
    model = small(family)
    student = shake(linearize(model, **linear), seed=1)
    model.reset_classifier(0)
    return Teacher(model, (32, 32)), student


def held_out():
    """Three pictures as the data side gives them, in bytes; and what a model is to see of them."""
    pictures = (255 * images(batch=3)).byte()
    return DataLoader([{"images": picture} for picture in pictures], batch_size=2), pictures.float() / 255


def normed(model, x):
    config = model.pretrained_cfg
    return (x - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)


def what_blocks_are_asked(model, x):
    """Block after block of a timm ViT run by hand: (tokens behind the first norm, rotary positions)."""
    placed = model._pos_embed(model.patch_embed(normed(model, x)))
    x, rope = placed if isinstance(placed, tuple) else (placed, None)
    x = model.norm_pre(x)
    for number, block in enumerate(model.blocks):
        own = rope[number] if getattr(model, "rope_mixed", False) else rope
        yield block.norm1(x), own
        x = block(x) if own is None else block(x, rope=own)


def answer(module, x, rope, weights):
    """An attention module's output from its parameters; ``weights`` of queries and keys says who reads whom, N x N."""
    if module.qkv is None:
        parts = [layer(x) for layer in (module.q_proj, module.k_proj, module.v_proj)]
    else:
        bias = module.qkv.bias
        if getattr(module, "q_bias", None) is not None:
            bias = torch.cat([module.q_bias, torch.zeros_like(module.q_bias), module.v_bias])
        parts = torch.nn.functional.linear(x, module.qkv.weight, bias).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for part in parts)
    q, k = module.q_norm(q), module.k_norm(k)
    if rope is not None:
        first = module.num_prefix_tokens
        turned = (apply_rot_embed_cat(t[:, :, first:], rope, half=getattr(module, "rotate_half", False)) for t in (q, k))
        q, k = (torch.cat([t[:, :, :first], patches], dim=2) for t, patches in zip((q, k), turned, strict=True))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    read = weights(module, q / module.head_dim**0.25, k / module.head_dim**0.25)
    return module.proj(module.norm((read @ v).transpose(1, 2).flatten(2)))


def softmax(_module, q, k):
    return (q @ k.mT).softmax(-1)


def linear_attention(module, q, k):
    if module.feature_map == "elu":
        q, k = (1 + torch.nn.functional.elu(t) for t in (q, k))
    else:
        q, k = (torch.cat([t @ w, -t @ w], -1).softmax(-1) for t, w in ((q, module.q_map), (k, module.k_map)))
    return (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True)


# --- the losses -----------------------------------------------------------------------------------------------------


def tensors(*shapes, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(**options) for shape in shapes]


UNLIKE = ((2, 5, 6), (1, 3, 4), (3, 2, 8))


def test_attention_alignment_is_the_mean_over_blocks_of_the_mean_square():
    student, teacher = tensors(*UNLIKE), tensors(*UNLIKE, seed=1, requires_grad=False)
    loss = attention_alignment(student, teacher)
    squares = [((a.detach().numpy() - b.numpy()) ** 2).sum() / a.numel() for a, b in zip(student, teacher, strict=True)]
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(sum(squares) / 3, rel=1e-12)
    for own, wanted, gradient in zip(student, teacher, torch.autograd.grad(loss, student), strict=True):
        torch.testing.assert_close(gradient, 2 * (own - wanted).detach() / (3 * own.numel()), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda *own: attention_alignment(own, teacher), student)


def test_attention_errors_are_the_errors_beside_what_they_are_measured_by():
    student, teacher = (tensors(*UNLIKE, seed=seed, requires_grad=False) for seed in (0, 1))
    errors, powers = attention_errors(student, teacher).tolist()
    assert errors == pytest.approx([((a - b) ** 2).sum().item() / a.numel() for a, b in zip(student, teacher, strict=True)])
    assert powers == pytest.approx([(b**2).sum().item() / b.numel() for b in teacher])
    assert attention_errors(teacher, teacher)[0].tolist() == [0, 0, 0]
    silence = attention_errors([0 * t for t in teacher], teacher)
    assert torch.equal(silence[0], silence[1])


def test_half_precision_is_compared_in_fp32():
    own, wanted = (tensors((2, 40, 8), seed=seed, requires_grad=False)[0].bfloat16() for seed in (0, 1))
    exact = (own.double() - wanted.double()).square().mean().item()
    features = [Features(tokens=t, grid=(5, 8)) for t in (own, wanted)]
    for loss in (attention_alignment([own], [wanted]), feature_alignment(*features)):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact, rel=1e-6)
    wanted_error = [exact, wanted.double().square().mean().item()]
    assert attention_errors([own], [wanted])[:, 0].tolist() == pytest.approx(wanted_error, rel=1e-6)


def test_as_many_blocks_on_both_sides():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        attention_alignment(tensors(*UNLIKE), tensors(*UNLIKE[:2]))


def test_feature_alignment_counts_the_class_token_as_one_of_all():
    (own, own_class), (wanted, wanted_class) = (tensors((2, 6, 4), (2, 4), seed=seed) for seed in (0, 1))
    student, teacher = (
        Features(tokens=t, grid=(2, 3), class_token=c) for t, c in ((own, own_class), (wanted, wanted_class))
    )
    patches, alone = (((a - b) ** 2).sum().item() for a, b in ((own, wanted), (own_class, wanted_class)))
    loss = feature_alignment(student, teacher)
    assert loss.item() == pytest.approx((patches + alone) / (2 * 7 * 4), rel=1e-12)
    of_tokens, of_class = torch.autograd.grad(loss, [own, own_class])
    torch.testing.assert_close(of_tokens, 2 * (own - wanted).detach() / 56, rtol=1e-12, atol=0)
    torch.testing.assert_close(of_class, 2 * (own_class - wanted_class).detach() / 56, rtol=1e-12, atol=0)
    without = [Features(tokens=f.tokens, grid=f.grid) for f in (student, teacher)]
    for sides in ((without[0], teacher), (student, without[1]), without):
        assert feature_alignment(*sides).item() == pytest.approx(patches / (2 * 6 * 4), rel=1e-12)


# --- what attention is asked ----------------------------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_a_recorded_call_is_what_the_attention_got(family):
    model = small(family)
    with recorded_attention(model, [0, 2]) as calls:
        want = model(normed(model, images()))
    asked = list(what_blocks_are_asked(model, images()))
    assert len(calls) == 2
    for call, number in zip(calls, (0, 2), strict=True):
        x, rope = asked[number]
        assert torch.equal(call.args[0], x)
        assert (rope is not None) == (family in ROTARY)
        assert rope is None or torch.equal(call.kwargs["rope"], rope)
        torch.testing.assert_close(call.output, answer(model.blocks[number].attn, x, rope, softmax), rtol=1e-4, atol=1e-5)
        assert torch.equal(call.ask(model.blocks[number].attn), call.output)
    assert torch.equal(model(normed(model, images())), want)
    assert len(calls) == 2, "the hooks are gone"


def test_the_hooks_go_after_an_exception_too():
    model = small()
    with pytest.raises(RuntimeError, match="on the way"), recorded_attention(model, [0, 1, 2]):
        raise RuntimeError("on the way")
    assert not any(module._forward_hooks for module in model.modules())


# --- the first stage ------------------------------------------------------------------------------------------------


def loss_by_hand(teacher, student, blocks=(0, 1, 2)):
    losses = []
    for number, (x, rope) in enumerate(what_blocks_are_asked(teacher.model, images())):
        if number in blocks:
            wanted = answer(teacher.model.blocks[number].attn, x, rope, softmax)
            own = answer(student.blocks[number].attn, x, rope, linear_attention)
            losses.append((own - wanted).square().mean())
    return sum(losses) / len(losses)


@every_family
@pytest.mark.parametrize("feature_map", ["elu", "hedgehog"])
def test_the_first_stage_asks_each_block_what_the_teachers_was_asked(family, feature_map):
    teacher, student = pair(family, feature_map=feature_map)
    task = AttentionAlignment(student, teacher, stages=3)
    task.begin(CPU)
    output = task.train()({"images": images()})
    assert output.loss.requires_grad
    assert not output.terms["attention_alignment"].requires_grad
    assert output.terms["attention_alignment"].item() == output.loss.item()
    with torch.no_grad():
        assert output.loss.item() == pytest.approx(loss_by_hand(teacher, student).item(), rel=1e-4)


@every_family
@pytest.mark.parametrize("feature_map", ["elu", "hedgehog"])
def test_the_first_stage_trains_queries_keys_and_values_alone(family, feature_map):
    teacher, student = pair(family, feature_map=feature_map, keep_softmax_blocks=1)
    second = Distillation(student, teacher, FEATURE_ALIGNMENT)
    task = AttentionAlignment(student, teacher, stages=3)
    task.begin(CPU)
    parameters = dict(task.named_parameters())
    found = {name: PROJECTIONS.fullmatch(name) for name in parameters}
    wanted = {name for name, match in found.items() if match and int(match[1]) < 2}
    assert len(wanted) >= 2 + (4 if feature_map == "hedgehog" else 0)
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == wanted

    before = {name: value.clone() for name, value in task.state_dict().items()}
    teachers = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    optimizer = torch.optim.SGD([parameters[name] for name in wanted], lr=1e-3)
    task.train()
    losses = []
    for _ in range(3):
        loss = task({"images": images()}).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for name, parameter in parameters.items():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in wanted), name
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == wanted
    assert all(torch.equal(value, teachers[name]) for name, value in teacher.model.state_dict().items())

    second.begin(CPU)
    behind = re.compile(r"student\.(head|head_dist|attn_pool)\.")
    trained = {name for name, parameter in second.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in second.named_parameters() if not behind.match(name)}
    assert all(parameter.requires_grad is False for parameter in teacher.model.parameters())
    second.train().zero_grad()
    second({"images": images()}).loss.backward()
    for name, parameter in second.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in trained), name


def test_blocks_that_stay_softmax_take_no_part():
    teacher, student = pair("dinov3", keep_softmax_blocks=1)
    task = AttentionAlignment(student, teacher, stages=3)
    task.begin(CPU)
    loss = task({"images": images()}).loss
    assert loss.item() == pytest.approx(loss_by_hand(teacher, student, blocks=(0, 1)).item(), rel=1e-4)
    scores = task.evaluate(held_out()[0], None, CPU)
    assert {name for name in scores if "error" in name} == {"attention_error_block1", "attention_error_block2"}
    assert not any(module._forward_hooks for module in teacher.model.modules())
    with pytest.raises(UserError, match="--keep-softmax-blocks all: leaves no block to make linear; keep fewer"):
        AttentionAlignment(linearize(small(), keep_softmax_blocks=3), teacher, stages=3)


@torch.no_grad()
def test_held_out_numbers_are_means_over_pictures():
    teacher, student = pair("eva-02")
    task = AttentionAlignment(student, teacher, stages=3)
    loader, pictures = held_out()
    scores = task.evaluate(loader, None, CPU)
    assert task.training
    task.eval()
    loss, errors, powers = 0.0, np.zeros(3), np.zeros(3)
    for picture in pictures.split(1):
        with recorded_attention(teacher.model, [0, 1, 2]) as calls:
            teacher.features(picture)
        pairs = [(call.ask(block.attn), call.output) for call, block in zip(calls, student.blocks, strict=True)]
        loss += sum((own - wanted).square().mean().item() for own, wanted in pairs) / 9
        errors += [(own - wanted).square().sum().item() for own, wanted in pairs]
        powers += [wanted.square().sum().item() for _, wanted in pairs]
    assert scores["loss"] == pytest.approx(loss, rel=1e-5)
    found = [scores[f"attention_error_block{number}"] for number in (1, 2, 3)]
    np.testing.assert_allclose(found, errors / powers, rtol=1e-5)
    assert {"agreement_stage1", "agreement_stage2", "agreement_stage3", "final_cosine", "cka"} <= scores.keys()


@torch.no_grad()
def test_a_student_that_answers_as_the_teacher_has_no_error():
    """The teacher's own softmax in the student's place: what is measured is zero, and the whole agrees; silence is 1."""
    teacher, student = pair("vit")
    student.load_state_dict(small().state_dict())
    attentions = [module for _, module in linear_blocks(student)]
    for module, block in zip(attentions, teacher.model.blocks, strict=True):
        module.forward = block.attn.forward
    task = AttentionAlignment(student, teacher, stages=3)
    scores = task.evaluate(held_out()[0], None, CPU)
    assert [scores[name] for name in scores if name == "loss" or "error" in name] == [0, 0, 0, 0]
    signs = {name: scores[name] for name in scores if "agreement" in name or name == "cka"}
    assert signs == pytest.approx(dict.fromkeys(signs, 1.0), abs=1e-5)
    for module in attentions:
        module.forward = lambda x, **_: 0 * x
    scores = task.evaluate(held_out()[0], None, CPU)
    assert [scores[name] for name in scores if "error" in name] == [1, 1, 1]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def adala(small_run):
    """Makes configurations of the recipe ``adala`` that take a second."""
    return lambda **values: small_run(**{"recipe": "adala", "student": None, "student_args": (), **values})


def test_a_dry_run_shows_both_stages_and_writes_nothing(adala, caplog):
    out = distill(adala(attention_epochs=2, feature_epochs=5, mask_ratio=0.5, keep_softmax_blocks=1, dry_run=True))
    assert not out.exists()
    facts = [
        r"student +0\.1 M parameters, image 32x32, 4 x 4 patches",
        r"teacher +0\.1 M parameters, image 32x32",
        r"images +12 found, 0 skipped, 11 to train on",
        r"stage +attention alignment\n",
        r"tokens +16 patches, 0 hidden from the student",
        r"steps +2 epochs, 6 steps of 4 images, learning rate 0\.001\n",
        r"memory +about",
        r"stage +feature alignment\n",
        r"tokens +16 patches, 8 hidden from the student",
        r"steps +5 epochs, 15 steps of 4 images, learning rate 0\.001\n",
        r"memory +about",
    ]
    assert re.search(".*?".join(facts), caplog.text, re.DOTALL), caplog.text


def test_a_dry_run_counts_the_memory_of_what_is_trained(adala, caplog):
    """Weights of both models; gradients and moments of 36 x 384 x 384 projections, or of all 22 M."""
    distill(adala(teacher="vit_small_patch16_224", teacher_pretrained=False, dry_run=True))
    gib = [float(found) for found in re.findall(r"\((\d+\.\d) weights and optimiser", caplog.text)]
    assert gib == pytest.approx([4 * (2 * 22e6 + 3 * 12 * 3 * 384**2) / 2**30, 4 * (2 * 22e6 + 3 * 22e6) / 2**30], abs=0.06)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"student": "adventurer_tiny_patch16_224"},
            r"--student adventurer_tiny_patch16_224: with --recipe adala the student",
        ),
        ({"student_args": ("depth=4", "flip=released")}, r"--student-args depth=4 flip=released: .* leave it out"),
        ({"student_arch": "vit_tiny_patch16_224"}, r"--student-arch vit_tiny_patch16_224: .* leave it out"),
        ({"teacher": "adventurer_tiny_patch16_224"}, r"adventurer_tiny_patch16_224: Adventurer has no .*; use a ViT"),
        ({"teacher": "linear_vit_tiny_patch16_224"}, r"linear_vit.*: .*LinearAttention of block 0 is linear already"),
        ({"teacher": "resnet18"}, r"--teacher resnet18: is not a plain backbone .* use a ViT"),
        ({"feature_map": "elus"}, r"feature.map elus: choose from elu, relu, hedgehog; did you mean elu"),
        ({"keep_softmax_blocks": 5}, r"^--keep-softmax-blocks 5: leaves none of the teacher's 4 blocks to make linear"),
        ({"keep_softmax_blocks": -1}, r"^--keep-softmax-blocks -1: must be 0 or more"),
        ({"keep_softmax_blocks": 4}, r"^--keep-softmax-blocks 4: leaves none of the teacher's 4 blocks"),
        ({"attention_epochs": 0, "feature_epochs": 0}, r"--attention-epochs and --feature-epochs 0: leave nothing to do"),
        ({"epochs": 0}, r"--epochs 0: must be above 0"),
        ({"attention_epochs": -1}, r"^--attention-epochs -1: must be 0 or more"),
        ({"feature_learning_rate": 0.0}, r"learning-rate 0.0: must be above 0"),
        ({"attention_learning_rate": float("nan")}, r"learning-rate nan: must be above 0"),
        ({"feature_alignment_weight": 0.0}, r"objective weights 0 0 0 0: at least one of .* must be above 0"),
        ({"feature_alignment_weight": -1.0}, r"--feature-alignment-weight -1.0: must be 0 or more"),
        ({"masked_prediction_weight": 1.0}, r"--mask-ratio 0.0: masked prediction has nothing to predict"),
        ({"stages": 5}, r"--stages 5: must be between 1 and the backbone's 4 blocks"),
        ({"recipe": "adalla"}, r"--recipe adalla: unknown recipe; there are linearizer, .*adala.*did you mean adala"),
        ({"image_size": "30"}, r"image size 30x30: must be a multiple of the patch 8x8; try 32x32"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_written(adala, given, said):
    student = {"student": "adventurer_tiny_patch16_224"} if "recipe" in given else {}
    config = adala(**{"teacher_pretrained": False, **student, **given})
    with pytest.raises(UserError, match=said):
        distill(config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("feature_map", "elu"),
        ("keep_softmax_blocks", 0),
        ("attention_epochs", 1),
        ("feature_epochs", 0),
        ("attention_learning_rate", 1e-3),
        ("feature_learning_rate", 1e-3),
    ],
)
@pytest.mark.parametrize("recipe", ["linearizer", "smoke"])
def test_flags_of_adala_are_refused_elsewhere(small_run, recipe, flag, value):
    config = small_run(recipe=recipe, **{flag: value})
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} {value}: belongs to --recipe adala; leave it out"):
        distill(config)
    assert not Path(config.out).exists()


def test_features_of_another_width_cannot_be_aligned(small_run):
    config = small_run(feature_alignment_weight=2.0)
    with pytest.raises(
        UserError, match=r"--feature-alignment-weight 2.0: the student is 32 wide, the teacher 48; use --feature-r"
    ):
        distill(config)
    assert not Path(config.out).exists()


def test_a_student_must_be_named_without_adala(small_run):
    with pytest.raises(UserError, match=r"--student: say what to distil into, .*--recipe adala needs none"):
        distill(small_run(student=None, student_args=()))


def test_the_command_line_refuses_an_unknown_feature_map(capsys, small_teacher, photos, tmp_path):
    given = ["--teacher", str(small_teacher), "--data", str(photos), "--out", str(tmp_path / "run"), "--recipe", "adala"]
    with pytest.raises(SystemExit) as stopped:
        main(["distill", *given, "--feature-map", "elus"])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert all(word in told.out + told.err for word in ("--feature-map", "elus", "hedgehog"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["linearizer", "regression"])
def test_a_linear_vit_may_be_a_student_like_any_other(small_run, recipe):
    shape = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2)
    arguments = tuple(f"{name}={value}" for name, value in shape.items())
    run = distill(small_run(recipe=recipe, student="linear_vit_tiny_patch16_224", student_args=arguments))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {"distillation"}
    assert all(np.isfinite(line["loss"]) for line in lines)
    model = load(run)
    assert [number for number, _ in linear_blocks(model)] == [0, 1, 2, 3]
    assert model(images()).shape == (2, 24)


def test_a_model_of_adala_can_be_a_teacher_of_another_kind(adala, small_run, tmp_path):
    """What one route leaves, the other takes; the softmax route alone is closed to it."""
    run = distill(adala(out=str(tmp_path / "linear"), epochs=1))
    assert distill(small_run(teacher=str(run), epochs=1)).exists()
    with pytest.raises(UserError, match="is linear already"):
        distill(adala(teacher=str(run), out=str(tmp_path / "again")))
