"""Objectives against loop-wise transcriptions of the paper's equations, and by property; masks; the distillation step."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import vit_linearizer  # noqa: F401  # registers the students with timm
from vit_linearizer.contracts import Features, UserError
from vit_linearizer.models.adapters import extract_features
from vit_linearizer.models.teacher import Teacher
from vit_linearizer.objectives import (
    FeatureRegression,
    MaskedPrediction,
    activation_map,
    activation_matching,
    masked_count,
    sample_mask,
    teacher_target,
)
from vit_linearizer.tasks import Distillation, DistillationConfig

BATCH, STAGES, GRID = 2, 3, (2, 4)
PATCHES = GRID[0] * GRID[1]
STUDENT_DIM, TEACHER_DIM = 5, 7
MODES = ("visible", "all", "class")
#: Three visible patches for each image, at different places.
MASK = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0, 1]], dtype=torch.bool)


def random_features(dim: int, seed: int, *, class_token: bool = True, stages: int = STAGES) -> Features:
    """Independent random features in float64, at the top level and in every stage."""
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)

    def one(stages: tuple[Features, ...] = ()) -> Features:
        token = random(BATCH, dim) if class_token else None
        return Features(tokens=random(BATCH, PATCHES, dim), grid=GRID, class_token=token, stages=stages)

    return one(tuple(one() for _ in range(stages)))


def in_stages(features: Features, change) -> Features:
    """Features whose stages' tokens ``[B, N, D]`` went through a function."""
    return replace(features, stages=tuple(replace(stage, tokens=change(stage.tokens)) for stage in features.stages))


def at(mask: Tensor, tokens: Tensor) -> Tensor:
    """Tokens with other values where the mask is True."""
    return torch.where(mask[..., None], tokens.flip(0) * 3 - 1, tokens)


@pytest.fixture
def student() -> Features:
    return random_features(STUDENT_DIM, 0)


@pytest.fixture
def teacher() -> Features:
    return random_features(TEACHER_DIM, 1)


# --- activation matching: eqs. 4 and 5 in plain loops


def looped_row(query: list[float], keys: list[list[float]]) -> list[float]:
    """Eq. 4 for one token, and the unit L2 norm of its row."""

    def norm(vector: list[float]) -> float:
        return math.sqrt(sum(value * value for value in vector))

    row = []
    for key in keys:
        inner = 0.0
        for a, b in zip(query, key, strict=True):
            inner += a * b
        row.append(inner / (norm(query) * norm(key)))
    length = norm(row)
    return [value / length for value in row]


def looped_loss(student: Features, teacher: Features, mask: Tensor | None, mode: str) -> float:
    """Eq. 5: squared L2 distance of the rows, mean over stages, images and rows."""
    distances = []
    for pair in zip(student.stages, teacher.stages, strict=True):
        for image in range(BATCH):
            if mask is None or mode == "all":
                kept = list(range(PATCHES))
            else:
                kept = [place for place in range(PATCHES) if not mask[image, place]]
            rows = []
            for stage in pair:
                keys = [stage.tokens[image, place].tolist() for place in kept]
                queries = [stage.class_token[image].tolist()] if mode == "class" else keys
                rows.append([looped_row(query, keys) for query in queries])
            for student_row, teacher_row in zip(*rows, strict=True):
                distance = 0.0
                for a, b in zip(student_row, teacher_row, strict=True):
                    distance += (a - b) ** 2
                distances.append(distance)
    return sum(distances) / len(distances)


@pytest.mark.parametrize("mask", [MASK, None], ids=["masked", "unmasked"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stages", [1, 3])
def test_activation_matching_is_equation_5(mode, mask, stages):
    student = random_features(STUDENT_DIM, 0, stages=stages)
    teacher = random_features(TEACHER_DIM, 1, stages=stages)
    loss = activation_matching(student, teacher, mask, tokens=mode)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(looped_loss(student, teacher, mask, mode), rel=1e-12)
    assert loss.item() > 0.05


@pytest.mark.parametrize("mode", MODES)
def test_activation_matching_is_two_minus_twice_the_inner_product(student, teacher, mode):
    def rows(features: Features) -> Tensor:
        maps = []
        for stage in features.stages:
            hidden = torch.zeros_like(MASK) if mode == "all" else MASK
            patches = torch.stack([stage.tokens[image, ~hidden[image]] for image in range(BATCH)])
            maps.append(activation_map(patches, stage.class_token[:, None] if mode == "class" else None))
        return torch.stack(maps)

    torch.testing.assert_close(rows(student).norm(dim=-1), torch.ones_like(rows(student)[..., 0]))
    inner = (rows(student) * rows(teacher)).sum(-1).mean()
    torch.testing.assert_close(activation_matching(student, teacher, MASK, tokens=mode), 2 * (1 - inner))


@pytest.mark.parametrize("mode", MODES)
def test_activation_matching_is_zero_at_equality(student, mode):
    assert activation_matching(student, student, MASK, tokens=mode) == 0


@pytest.mark.parametrize("mode", MODES)
def test_activation_matching_sees_no_rotation_of_channels(student, teacher, mode):
    expected = activation_matching(student, teacher, MASK, tokens=mode)

    def rotated(features: Features) -> Features:
        """Each stage with an orthogonal matrix of its own, on patches and class token."""
        stages = []
        for number, stage in enumerate(features.stages):
            dim = stage.tokens.shape[-1]
            gaussian = torch.randn(dim, dim, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            matrix = torch.linalg.qr(gaussian).Q
            stages.append(replace(stage, tokens=stage.tokens @ matrix, class_token=stage.class_token @ matrix))
        return replace(features, stages=tuple(stages))

    torch.testing.assert_close(activation_matching(rotated(student), teacher, MASK, tokens=mode), expected)
    torch.testing.assert_close(activation_matching(student, rotated(teacher), MASK, tokens=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_activation_matching_sees_no_positive_scaling_of_a_token(student, teacher, mode):
    expected = activation_matching(student, teacher, MASK, tokens=mode)
    scales = torch.rand(BATCH, PATCHES, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 9 + 0.1
    for features in ("student", "teacher"):
        both = {"student": student, "teacher": teacher}
        scaled = in_stages(both[features], lambda tokens: tokens * scales)
        stages = tuple(replace(stage, class_token=stage.class_token * 7) for stage in scaled.stages)
        both[features] = replace(scaled, stages=stages)
        torch.testing.assert_close(activation_matching(**both, mask=MASK, tokens=mode), expected)
    negated = in_stages(student, lambda tokens: torch.cat([-tokens[:, :2], tokens[:, 2:]], dim=1))
    assert not torch.isclose(activation_matching(negated, teacher, MASK, tokens=mode), expected)


@pytest.mark.parametrize("mode", MODES)
def test_activation_matching_sees_no_shared_permutation_of_tokens(student, teacher, mode):
    expected = activation_matching(student, teacher, MASK, tokens=mode)
    order = torch.tensor([3, 7, 0, 5, 6, 1, 2, 4])
    both = (in_stages(features, lambda tokens: tokens[:, order]) for features in (student, teacher))
    torch.testing.assert_close(activation_matching(*both, MASK[:, order], tokens=mode), expected)
    only_one = in_stages(student, lambda tokens: tokens[:, order])
    assert not torch.isclose(activation_matching(only_one, teacher, MASK[:, order], tokens=mode), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_activation_matching_is_blind_to_masked_tokens_unless_all_are_asked_for(student, teacher, mode, changed):
    features = {"student": student, "teacher": teacher}
    before = activation_matching(**features, mask=MASK, tokens=mode)
    features[changed] = in_stages(features[changed], partial(at, MASK))
    after = activation_matching(**features, mask=MASK, tokens=mode)
    assert (after == before) if mode != "all" else not torch.isclose(after, before)


@pytest.mark.parametrize("mode", MODES)
def test_activation_matching_is_not_blind_to_visible_tokens(student, teacher, mode):
    before = activation_matching(student, teacher, MASK, tokens=mode)
    after = activation_matching(in_stages(student, partial(at, ~MASK)), teacher, MASK, tokens=mode)
    assert not torch.isclose(after, before)


@pytest.mark.parametrize("mode", MODES)
def test_activation_matching_gradient_is_where_it_looks(student, teacher, mode):
    student = in_stages(student, lambda tokens: tokens.requires_grad_())
    activation_matching(student, teacher, MASK, tokens=mode).backward()
    for stage in student.stages:
        reached = stage.tokens.grad.abs().sum(-1) > 0
        assert torch.equal(reached, torch.ones_like(MASK) if mode == "all" else ~MASK)


def test_activation_matching_reads_the_stages_only(student, teacher):
    expected = activation_matching(student, teacher, MASK)
    other = replace(student, tokens=student.tokens + 1, class_token=None)
    assert activation_matching(other, teacher, MASK) == expected


def test_activation_matching_refuses_another_number_of_stages(student):
    with pytest.raises(ValueError, match="zip"):
        activation_matching(student, random_features(TEACHER_DIM, 1, stages=STAGES - 1), MASK)


@pytest.mark.parametrize("lacking", ["student", "teacher"])
def test_class_mode_needs_a_class_token(lacking):
    both = {name: random_features(4, seed, class_token=name != lacking) for seed, name in enumerate(("student", "teacher"))}
    with pytest.raises(UserError, match=r"^--activation-matching-tokens class: .*visible or all"):
        activation_matching(**both, mask=MASK, tokens="class")


def test_activation_map_is_exact_under_autocast():
    tokens = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (tokens @ tokens.mT).dtype == torch.bfloat16
        inside = activation_map(tokens)
    assert torch.equal(inside, activation_map(tokens))
    assert activation_map(tokens.bfloat16()).dtype == torch.float32


# --- masked prediction: eq. 6 in plain loops


def looped_target(features: Features, image: int, place: int, target: str) -> list[float]:
    """The teacher's last block, with LayerNorm without weights when asked."""
    values = features.stages[-1].tokens[image, place].tolist()
    if target == "none":
        return values
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance + 1e-5) for value in values]


def looped_projection(projection: nn.Linear, token: list[float]) -> list[float]:
    weight, bias = projection.weight.tolist(), projection.bias.tolist()
    return [sum(w * x for w, x in zip(row, token, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def differences(objective: nn.Module, student: Features, teacher: Features, places: Tensor, target: str) -> list[float]:
    """Prediction minus target for every channel at the given places."""
    found = []
    for image in range(BATCH):
        for place in range(PATCHES):
            if places[image, place]:
                prediction = looped_projection(objective.projection, student.tokens[image, place].tolist())
                wanted = looped_target(teacher, image, place, target)
                found += [a - b for a, b in zip(prediction, wanted, strict=True)]
    return found


def make(kind: type[nn.Module], target: str = "layer_norm", student_dim: int = STUDENT_DIM) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(student_dim, TEACHER_DIM, target=target).double()


@pytest.mark.parametrize("target", ["layer_norm", "none"])
def test_masked_prediction_is_equation_6(student, teacher, target):
    objective = make(MaskedPrediction, target)
    found = differences(objective, student, teacher, MASK, target)
    small, large = [d for d in found if abs(d) < 1], [d for d in found if abs(d) >= 1]
    assert small and large  # both branches of Smooth-L1 with beta 1
    expected = (sum(0.5 * d * d for d in small) + sum(abs(d) - 0.5 for d in large)) / len(found)
    assert objective(student, teacher, MASK).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("target", ["layer_norm", "none"])
def test_feature_regression_is_the_mean_square_over_all_tokens(student, teacher, target):
    objective = make(FeatureRegression, target)
    found = differences(objective, student, teacher, torch.ones_like(MASK), target)
    expected = sum(d * d for d in found) / len(found)
    assert objective(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    assert objective(student, teacher, MASK) == objective(student, teacher)


def test_the_two_targets_differ_by_a_normalisation_of_each_token(teacher):
    plain = teacher_target(teacher, "none")
    assert torch.equal(plain, teacher.stages[-1].tokens)
    normal = teacher_target(teacher, "layer_norm")
    assert normal.mean(-1).abs().max() < 1e-12
    assert (normal.var(-1, correction=0) - 1).abs().max() < 1e-3
    shifted = in_stages(teacher, lambda tokens: 3 * tokens + 2)
    torch.testing.assert_close(teacher_target(shifted, "layer_norm"), normal, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [MaskedPrediction, FeatureRegression])
def test_only_the_students_final_tokens_and_the_teachers_last_block_are_read(student, teacher, kind):
    objective = make(kind)
    expected = objective(student, teacher, MASK)
    other_teacher = replace(teacher, tokens=teacher.tokens + 1, stages=(*reversed(teacher.stages[:-1]), teacher.stages[-1]))
    assert objective(in_stages(student, lambda tokens: tokens + 1), other_teacher, MASK) == expected
    assert objective(replace(student, tokens=student.tokens + 1), teacher, MASK) != expected
    assert objective(student, in_stages(teacher, lambda tokens: tokens.square()), MASK) != expected


@pytest.mark.parametrize("changed", ["student", "teacher"])
def test_masked_prediction_is_blind_to_visible_tokens(student, teacher, changed):
    objective = make(MaskedPrediction)

    def loss(places: Tensor) -> Tensor:
        features = {"student": student, "teacher": teacher}
        other = in_stages(features[changed], partial(at, places))
        features[changed] = replace(other, tokens=at(places, other.tokens))
        return objective(**features, mask=MASK)

    expected = objective(student, teacher, MASK)
    assert loss(~MASK) == expected
    assert not torch.isclose(loss(MASK), expected)


def test_masked_prediction_gradient_is_zero_at_visible_tokens(student, teacher):
    student.tokens.requires_grad_()
    make(MaskedPrediction)(student, teacher, MASK).backward()
    assert torch.equal(student.tokens.grad.abs().sum(-1) > 0, MASK)


@pytest.mark.parametrize("target", ["layer_norm", "none"])
@pytest.mark.parametrize("kind", [MaskedPrediction, FeatureRegression])
def test_regressions_are_zero_when_the_projection_reproduces_the_target(teacher, kind, target):
    objective = make(kind, target, student_dim=TEACHER_DIM)
    with torch.no_grad():
        objective.projection.weight.copy_(torch.eye(TEACHER_DIM))
        objective.projection.bias.zero_()
    exact = replace(random_features(TEACHER_DIM, 5), tokens=teacher_target(teacher, target))
    assert objective(exact, teacher, MASK) == 0
    assert objective(replace(exact, tokens=exact.tokens + 0.1), teacher, MASK) > 0


def test_masked_prediction_needs_a_mask(student, teacher):
    with pytest.raises(ValueError, match="needs a mask"):
        make(MaskedPrediction)(student, teacher, None)


# --- masks

GRIDS = [(1, 2), (2, 2), (1, 7), (4, 4), (5, 3), (14, 14), (8, 16)]
RATIOS = [0.0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.999]


@pytest.mark.parametrize("masking", ["token", "block"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_masks_have_an_exact_count(grid, masking):
    patches = grid[0] * grid[1]
    for ratio in RATIOS:
        wanted = 0 if ratio == 0 else min(patches - 1, max(1, round(ratio * patches)))
        assert masked_count(patches, ratio) == wanted
        for seed in range(3):
            mask = sample_mask(grid, ratio, masking, np.random.default_rng(seed))
            assert mask.shape == (patches,) and mask.dtype == bool
            assert mask.sum() == wanted
            assert mask.sum() < patches and (ratio == 0 or mask.any())


@pytest.mark.parametrize("masking", ["token", "block"])
def test_masks_depend_on_the_generator_alone(masking):
    def draw(seed: int) -> np.ndarray:
        return sample_mask((6, 7), 0.5, masking, np.random.default_rng(seed))

    np.random.seed(0)
    first = draw(3)
    np.random.seed(1)
    assert np.array_equal(draw(3), first)
    assert len({draw(seed).tobytes() for seed in range(20)}) == 20
    going_on = np.random.default_rng(3)
    masks = [sample_mask((6, 7), 0.5, masking, going_on) for _ in range(2)]
    assert not np.array_equal(*masks)


@pytest.mark.parametrize("ratio", [0.4, 0.75])
def test_block_masks_are_clustered_and_token_masks_are_not(ratio):
    grid = (14, 14)

    def equal_neighbours(masking: str) -> float:
        """Share of side-by-side patches that are both hidden or both seen, over 50 masks."""
        rng = np.random.default_rng(0)
        masks = np.stack([sample_mask(grid, ratio, masking, rng).reshape(grid) for _ in range(50)])
        down, across = masks[:, 1:] == masks[:, :-1], masks[:, :, 1:] == masks[:, :, :-1]
        return float((down.mean() + across.mean()) / 2)

    by_chance = ratio**2 + (1 - ratio) ** 2
    assert equal_neighbours("token") == pytest.approx(by_chance, abs=0.02)
    assert equal_neighbours("block") > by_chance + 0.15


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_token_masks_are_uniform_over_positions(ratio):
    grid, draws = (4, 5), 2000
    rng = np.random.default_rng(0)
    hits = sum(sample_mask(grid, ratio, "token", rng).astype(int) for _ in range(draws))
    deviation = math.sqrt(draws * ratio * (1 - ratio))
    assert np.abs(hits - ratio * draws).max() < 4 * deviation


def test_block_masks_reach_every_position():
    rng = np.random.default_rng(0)
    hits = sum(sample_mask((6, 6), 0.3, "block", rng).astype(int) for _ in range(500))
    assert hits.min() > 0.25 * hits.mean()


# --- the distillation step

SIZE, PATCH, STEP_GRID = (32, 16), 8, (4, 2)
SHAPE = {"num_classes": 0, "img_size": SIZE, "patch_size": PATCH, "depth": 4}


def make_student() -> nn.Module:
    return timm.create_model("adventurer_tiny_patch16_224", embed_dim=32, **SHAPE)


def make_task(config: DistillationConfig | None = None, **teacher_args) -> Distillation:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = make_student()
        teacher = timm.create_model("vit_tiny_patch16_224", embed_dim=48, num_heads=3, **SHAPE, **teacher_args)
        return Distillation(student, Teacher(teacher, SIZE), config or DistillationConfig())


def make_batch(config: DistillationConfig | None = None, images: int = 3) -> dict[str, Tensor]:
    config = config or DistillationConfig()
    batch = {"images": torch.rand(images, 3, *SIZE, generator=torch.Generator().manual_seed(1))}
    if config.mask_ratio > 0:
        masks = [sample_mask(STEP_GRID, config.mask_ratio, config.masking, np.random.default_rng(n)) for n in range(images)]
        batch["mask"] = torch.from_numpy(np.stack(masks))
    return batch


MIXES = {
    "paper": {},
    "all three": {"activation_matching_weight": 0.5, "masked_prediction_weight": 2.0, "feature_regression_weight": 0.3},
    "activation only": {"masked_prediction_weight": 0.0},
    "activation only, unmasked": {"masked_prediction_weight": 0.0, "mask_ratio": 0.0},
    "prediction only": {"activation_matching_weight": 0.0, "masked_prediction_target": "none"},
    "regression only": {
        "activation_matching_weight": 0.0, "masked_prediction_weight": 0.0, "feature_regression_weight": 3.0,
        "mask_ratio": 0.0,
    },
    "regression, masked": {
        "activation_matching_weight": 0.0, "masked_prediction_weight": 0.0, "feature_regression_weight": 1.0,
        "feature_regression_target": "none",
    },
    "class tokens, two stages": {"stages": 2, "activation_matching_tokens": "class", "masking": "block"},
    "all tokens": {"activation_matching_tokens": "all", "mask_ratio": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("mix", MIXES)
def test_distillation_loss_is_the_weighted_sum_of_its_terms(mix):
    config = DistillationConfig(**MIXES[mix])
    task, batch = make_task(config), make_batch(config)
    output = task(batch)

    mask = batch.get("mask")
    student = extract_features(task.student, batch["images"], stages=config.stages, mask=mask, mask_token=task.mask_token)
    teacher = extract_features(task.teacher.model, batch["images"], stages=config.stages)
    expected = {}
    if config.activation_matching_weight:
        term = activation_matching(student, teacher, mask, tokens=config.activation_matching_tokens)
        expected["activation_matching"] = (config.activation_matching_weight, term)
    if config.masked_prediction_weight:
        prediction = task.masked_prediction.projection(student.tokens[mask])
        term = F.smooth_l1_loss(prediction, teacher_target(teacher, config.masked_prediction_target)[mask])
        expected["masked_prediction"] = (config.masked_prediction_weight, term)
    if config.feature_regression_weight:
        prediction = task.feature_regression.projection(student.tokens)
        term = F.mse_loss(prediction, teacher_target(teacher, config.feature_regression_target))
        expected["feature_regression"] = (config.feature_regression_weight, term)

    assert set(output.terms) == set(expected)
    for name, (_, term) in expected.items():
        torch.testing.assert_close(output.terms[name], term.detach())
        assert not output.terms[name].requires_grad
    torch.testing.assert_close(output.loss, sum(weight * term for weight, term in expected.values()))


@pytest.mark.parametrize("mix", MIXES)
def test_every_trained_parameter_gets_a_gradient_where_the_task_says_so(mix):
    config = DistillationConfig(**MIXES[mix])
    task = make_task(config)
    task(make_batch(config)).loss.backward()
    without = {name for name, parameter in task.named_parameters() if parameter.grad is None}
    # Activation maps are taken before the final norm; nothing else is ever left out.
    assert without <= {"student.norm_f.weight"}
    assert task.uses_every_parameter == (not without)


def test_every_backbone_parameter_learns_from_the_default_objectives():
    task = make_task()
    task(make_batch()).loss.backward()
    idle = [name for name, parameter in task.named_parameters() if not parameter.grad.abs().max() > 0]
    assert idle == []


def test_no_gradient_reaches_the_teacher():
    task = make_task()
    task.teacher.model.requires_grad_(True)  # so that only the missing graph protects it
    task(make_batch()).loss.backward()
    assert all(parameter.grad is None for parameter in task.teacher.model.parameters())
    features = task.teacher.features(make_batch()["images"], stages=4)
    assert not any(part.tokens.requires_grad for part in (features, *features.stages))


def test_teacher_is_no_part_of_the_task():
    task = make_task()
    assert not any(parameter.requires_grad for parameter in task.teacher.model.parameters())
    own, foreign = {id(p) for p in task.parameters()}, {id(p) for p in task.teacher.model.parameters()}
    assert own.isdisjoint(foreign)
    assert all(name.split(".")[0] in ("student", "mask_token", "masked_prediction") for name in task.state_dict())
    task.train()
    assert not task.teacher.model.training


def test_the_backbone_has_neither_mask_token_nor_projections():
    task = make_task(DistillationConfig(**MIXES["all three"]))
    assert set(task.backbone.state_dict()) == set(make_student().state_dict())
    beside = {name for name, _ in task.named_parameters() if not name.startswith("student.")}
    linear = {"projection.weight", "projection.bias"}
    assert beside == {"mask_token"} | {f"{objective}.{name}" for objective in ("masked_prediction", "feature_regression")
                                       for name in linear}  # fmt: skip


def test_without_masks_there_is_no_mask_token():
    task = make_task(DistillationConfig(**MIXES["regression only"]))
    assert task.mask_token is None
    assert "mask_token" not in dict(task.named_parameters())
    assert task.masked_prediction is None


def test_the_student_does_not_see_masked_pixels_and_the_teacher_does():
    task, batch = make_task(), make_batch()
    hidden = batch["mask"].view(-1, 1, *STEP_GRID).float()
    hidden = F.interpolate(hidden, scale_factor=PATCH, mode="nearest").bool()
    changed = {"images": torch.where(hidden, 1 - batch["images"], batch["images"]), "mask": batch["mask"]}
    mask = batch["mask"]
    see = partial(extract_features, task.student, mask=mask, mask_token=task.mask_token)
    assert torch.equal(see(changed["images"]).tokens, see(batch["images"]).tokens)
    assert not torch.isclose(task(changed).loss, task(batch).loss)


def test_the_same_batch_gives_the_same_loss():
    task, batch = make_task(), make_batch()
    first, second = task(batch), task(batch)
    assert torch.equal(first.loss, second.loss)
    assert first.terms.keys() == second.terms.keys()
    assert all(torch.equal(first.terms[name], second.terms[name]) for name in first.terms)


def test_a_step_downhill_lowers_the_loss():
    task, batch = make_task(), make_batch()
    before = task(batch).loss
    before.backward()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter -= 1e-3 * parameter.grad
    assert task(batch).loss < before


def test_class_mode_refuses_a_teacher_without_class_token_before_training():
    without = {"class_token": False, "global_pool": "avg"}
    config = DistillationConfig(activation_matching_tokens="class")
    with pytest.raises(UserError, match=r"^--activation-matching-tokens class: .*no class token; use visible or all"):
        make_task(config, **without)
    assert make_task(**without)(make_batch()).loss.isfinite()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_ratio": 1.0}, r"^--mask-ratio 1\.0: must be in \[0, 1\)"),
        ({"mask_ratio": -0.1}, r"^--mask-ratio -0\.1: must be in \[0, 1\)"),
        ({"mask_ratio": math.nan}, r"^--mask-ratio nan: "),
        ({"mask_ratio": 0.0}, r"^--mask-ratio 0\.0: .*--masked-prediction-weight 0"),
        ({"activation_matching_weight": -1.0}, r"^--activation-matching-weight -1\.0: must be 0 or more"),
        ({"masked_prediction_weight": -0.5}, r"^--masked-prediction-weight -0\.5: must be 0 or more"),
        ({"feature_regression_weight": math.nan}, r"^--feature-regression-weight nan: must be 0 or more"),
        (
            {"activation_matching_weight": 0.0, "masked_prediction_weight": 0.0},
            r"--feature-regression-weight, --feature-alignment-weight must be above 0",
        ),
        ({"stages": 0}, r"^--stages 0: must be at least 1"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_work_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        DistillationConfig(**values)


def test_more_stages_than_blocks_are_refused_before_training():
    config = DistillationConfig(stages=5)
    with pytest.raises(UserError, match=r"stages 5: .*4 blocks"):
        make_task(config)
