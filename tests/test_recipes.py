"""Recipes against the paper's tables 8 and 9 retyped by hand, and how flags override them."""

import dataclasses
import math

import pytest
import torch
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.scheduler import create_scheduler_v2

from vit_linearizer.commands.distill import DistillConfig
from vit_linearizer.commands.finetune import FinetuneConfig
from vit_linearizer.commands.resolution import apply_flags, fit_to_images
from vit_linearizer.commands.segment import SegmentConfig
from vit_linearizer.contracts import UserError
from vit_linearizer.data.views import TrainingView
from vit_linearizer.recipes import (
    DISTILLATION,
    FINE_TUNING,
    SEGMENTATION,
    DistillationRecipe,
    find_recipe,
    finetuning_recipe,
)
from vit_linearizer.training.config import OptimisationConfig, RuntimeConfig
from vit_linearizer.training.optimiser import make_schedule, total_steps

STUDENT = "adventurer_base_patch16_224"

#: ViT-Linearizer (arXiv 2504.00037), table 8, "Configurations of the distillation stage": Small/Base and Large.
TABLE_8 = {
    "learning_rate": (1.5e-3, 1.5e-3),
    "minimum_learning_rate": (1e-5, 1e-5),
    "weight_decay": (0.05, 0.05),
    "schedule": ("cosine", "cosine"),
    "epochs": (300, 300),
    "betas": ((0.9, 0.999), (0.9, 0.999)),
    "batch_size": (2048, 2048),
    "warmup_epochs": (10, 20),
    "drop_path": (0.1, 0.2),
    "layer_decay": (None, None),
    "augmentation": ("three", "three"),
}
#: Sections 3.2, 3.3 and 4.1, and the ablations of table 6: what the paper's own runs use.
TEXT = {
    "stages": 4,
    "mask_ratio": 0.75,
    "masking": "token",
    "activation_matching_weight": 1.0,
    "activation_matching_tokens": "visible",
    "masked_prediction_weight": 1.0,
    "feature_regression_weight": 0.0,
    "feature_alignment_weight": 0.0,
}
#: Where the paper is silent.
CHOICES = {
    "iterations": None,
    "warmup_iterations": 0,
    "warmup_share": 0.1,
    "clip_norm": None,
    "repeats": 3,
    "smallest_crop": 0.08,
    "horizontal_flip": 0.5,
    "device_augmentation": False,
    "masked_prediction_target": "layer_norm",
    "feature_regression_target": "layer_norm",
    "scales_learning_rate": True,
}


def distillation(name: str, architecture: str) -> DistillationRecipe:
    return find_recipe(DISTILLATION, name, architecture)


def resolved(config: DistillConfig, architecture: str, images: int | None = None) -> DistillationRecipe:
    """The recipe with the command's flags, for a number of training images where they are few."""
    table = distillation(config.recipe, architecture)
    return apply_flags(table, config) if images is None else fit_to_images(table, config, images=images, parts=1)


@pytest.mark.parametrize(
    ("size", "column"), [("tiny", 0), ("small", 0), ("base", 0), ("large", 1)]
)  # table 8 has no tiny student: it takes the Small/Base column
@pytest.mark.parametrize("patch", [16, 14, 8])
def test_linearizer_is_table_8(size, column, patch):
    recipe = distillation("linearizer", f"adventurer_{size}_patch{patch}_224")
    assert recipe.flat() == {name: columns[column] for name, columns in TABLE_8.items()} | TEXT | CHOICES


def test_the_default_recipe_of_distill_is_the_papers():
    config = DistillConfig(teacher="t", student="adventurer_large_patch16_224", data="d", out="o")
    assert resolved(config, "adventurer_large_patch16_224") == distillation("linearizer", "adventurer_large_patch16_224")


def test_regression_differs_in_its_objectives_alone():
    baseline, paper = (distillation(name, STUDENT) for name in ("regression", "linearizer"))
    assert dataclasses.replace(baseline, objectives=paper.objectives) == paper
    weights = {name: value for name, value in baseline.flat().items() if name.endswith("_weight")}
    assert weights == {
        "activation_matching_weight": 0.0,
        "masked_prediction_weight": 0.0,
        "feature_regression_weight": 1.0,
        "feature_alignment_weight": 0.0,
    }
    assert baseline.objectives.mask_ratio == 0.0


@pytest.mark.parametrize("name", ["digits", "smoke"])
def test_small_recipes_have_the_papers_objectives_and_learning_rates_of_their_own(name):
    recipe = distillation(name, STUDENT)
    hidden = {"digits": 0.5, "smoke": 0.75}[name]
    expected = dataclasses.replace(distillation("linearizer", STUDENT).objectives, mask_ratio=hidden)
    assert recipe.objectives == expected
    assert not recipe.scales_learning_rate


@pytest.mark.parametrize("name", DISTILLATION)
def test_flat_names_every_value_once(name):
    recipe = distillation(name, STUDENT)
    parts = [recipe.optimisation, recipe.views, recipe.objectives]
    names = [field.name for part in parts for field in dataclasses.fields(part)] + ["drop_path", "scales_learning_rate"]
    assert len(names) == len(set(names))
    assert set(recipe.flat()) == set(names)


# --- overriding

#: Another valid value for every value of the paper's recipe.
OTHER = {
    "schedule": "poly",
    "warmup_iterations": 5,
    "warmup_share": 0.5,
    "epochs": 7,
    "batch_size": 512,
    "learning_rate": 3e-4,
    "minimum_learning_rate": 1e-7,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
    "warmup_epochs": 1.5,
    "layer_decay": 0.75,
    "clip_norm": 1.0,
    "augmentation": "crop",
    "smallest_crop": 0.5,
    "horizontal_flip": 0.0,
    "repeats": 1,
    "device_augmentation": True,
    "stages": 2,
    "mask_ratio": 0.5,
    "masking": "block",
    "activation_matching_weight": 0.5,
    "activation_matching_tokens": "all",
    "masked_prediction_weight": 0.2,
    "masked_prediction_target": "none",
    "feature_regression_weight": 1.0,
    "feature_regression_target": "none",
    "feature_alignment_weight": 0.5,
    "drop_path": 0.3,
    "scales_learning_rate": False,
}


def test_every_value_has_another_one_here():
    assert set(OTHER) | {"iterations"} == set(distillation("linearizer", STUDENT).flat())


@pytest.mark.parametrize("name", OTHER)
def test_each_value_is_overridden_by_its_name(name):
    recipe = distillation("linearizer", STUDENT)
    before = recipe.flat()
    assert before[name] != OTHER[name]
    expected = before | {name: OTHER[name]}
    if name == "batch_size":  # see the rule below
        expected |= {rate: before[rate] / 2 for rate in ("learning_rate", "minimum_learning_rate")}
    assert recipe.override(**{name: OTHER[name]}).flat() == expected
    assert recipe.flat() == before


def test_all_values_are_overridden_together():
    together = OTHER | {"device_augmentation": False}  # whose other value goes with another augmentation alone
    assert distillation("linearizer", STUDENT).override(**together).flat() == together | {"iterations": None}


def test_none_leaves_a_value_as_it_is():
    recipe = distillation("linearizer", STUDENT)
    assert recipe.override(**dict.fromkeys(recipe.flat())) == recipe
    assert recipe.override(epochs=3, batch_size=None, learning_rate=None).flat() == recipe.flat() | {"epochs": 3}


def test_zero_is_a_value():
    recipe = distillation("linearizer", STUDENT).override(drop_path=0.0, horizontal_flip=0.0, warmup_epochs=0)
    assert (recipe.drop_path, recipe.views.horizontal_flip, recipe.optimisation.warmup_epochs) == (0.0, 0.0, 0)


def test_an_unknown_value_is_a_programming_error():
    with pytest.raises(TypeError, match=r"no such value in a recipe: learning_rat, stage$"):
        distillation("linearizer", STUDENT).override(learning_rat=1.0, epochs=2, stage=3)


def test_values_that_depend_on_each_other_are_overridden_at_once():
    """Neither order of the two alone would be valid on the way."""
    recipe = distillation("regression", STUDENT)
    back = recipe.override(mask_ratio=0.5, masked_prediction_weight=1.0, feature_regression_weight=0.0)
    assert back.objectives.mask_ratio == 0.5
    again = back.override(mask_ratio=0.0, masked_prediction_weight=0.0, feature_regression_weight=1.0)
    assert again == recipe


@pytest.mark.parametrize("batch_size", [128, 2048, 4096])
@pytest.mark.parametrize("name", ["linearizer", "regression"])
def test_learning_rates_follow_the_square_root_of_the_batch(name, batch_size):
    recipe = distillation(name, STUDENT).override(batch_size=batch_size)
    assert recipe.optimisation.batch_size == batch_size
    assert recipe.optimisation.learning_rate == pytest.approx(1.5e-3 * math.sqrt(batch_size / 2048))
    assert recipe.optimisation.minimum_learning_rate == pytest.approx(1e-5 * math.sqrt(batch_size / 2048))


def test_scaling_in_two_steps_is_scaling_once():
    recipe = distillation("linearizer", STUDENT)
    twice = recipe.at_batch_size(500).at_batch_size(128).optimisation
    assert twice.learning_rate == pytest.approx(recipe.at_batch_size(128).optimisation.learning_rate)


def test_a_given_learning_rate_is_not_scaled():
    recipe = distillation("linearizer", STUDENT)
    both = recipe.override(batch_size=128, learning_rate=4e-4).optimisation
    assert (both.batch_size, both.learning_rate, both.minimum_learning_rate) == (128, 4e-4, 1e-5)
    lowest = recipe.override(batch_size=128, minimum_learning_rate=1e-6).optimisation
    assert lowest.minimum_learning_rate == 1e-6
    assert lowest.learning_rate == pytest.approx(1.5e-3 / 4)


@pytest.mark.parametrize("name", ["digits", "smoke"])
def test_small_recipes_do_not_scale_their_learning_rates(name):
    recipe = distillation(name, STUDENT)
    smaller = recipe.override(batch_size=2)
    expected = dataclasses.replace(recipe.optimisation, batch_size=2)
    assert smaller == dataclasses.replace(recipe, optimisation=expected)


# --- the command's flags

#: Flags that say which run it is; all others are a recipe's values or the machine's (`RuntimeConfig`).
OF_THE_RUN = {
    "teacher", "student", "data", "out", "recipe", "teacher_arch", "teacher_pretrained", "student_arch", "student_args",
    "image_size", "teacher_image_size", "labels", "report", "dry_run", "debug",
}  # fmt: skip
#: Flags of `AdaptationRecipe` alone, see test_adaptation.py.
OF_ADALA = {
    "feature_map", "keep_softmax_blocks", "attention_epochs", "feature_epochs", "attention_learning_rate",
    "feature_learning_rate",
}  # fmt: skip
#: Values of a recipe without a flag, and why.
WITHOUT_FLAG = {
    "iterations": "a distillation is counted in epochs",
    "warmup_iterations": "likewise",
    "schedule": "the paper's is a cosine",
    "warmup_share": "a property of the recipe; --warmup-epochs says how long",
    "betas": "AdamW's in both of the paper's tables; nothing was ever tuned about them",
    "layer_decay": "for fine-tuning; table 8 says none",
    "scales_learning_rate": "a property of the recipe; --learning-rate says it all",
}


def test_every_flag_reaches_the_recipe_and_every_value_has_a_flag():
    fields = {field.name for field in dataclasses.fields(DistillConfig)}
    runtime = {field.name for field in dataclasses.fields(RuntimeConfig)}
    assert fields >= OF_THE_RUN
    assert OF_THE_RUN.isdisjoint(runtime)
    values = set(distillation("linearizer", STUDENT).flat())
    assert values >= set(WITHOUT_FLAG)
    assert fields - runtime - OF_THE_RUN - OF_ADALA == values - set(WITHOUT_FLAG)
    assert runtime.isdisjoint(values)


@pytest.mark.parametrize("name", sorted(set(OTHER) - set(WITHOUT_FLAG)))
def test_each_flag_changes_its_value_and_is_unset_by_default(name):
    base = {"teacher": "t", "student": STUDENT, "data": "d", "out": "o"}
    assert getattr(DistillConfig(**base), name) in (None, False)
    assert resolved(DistillConfig(**base, **{name: OTHER[name]}), STUDENT).flat()[name] == OTHER[name]


@pytest.mark.parametrize("asked", [None, 512])
def test_too_few_images_scale_the_learning_rates_that_were_not_given(asked):
    base = {"teacher": "t", "student": STUDENT, "data": "d", "out": "o", "batch_size": asked}
    scaled = resolved(DistillConfig(**base), STUDENT, 32).optimisation
    assert scaled == distillation("linearizer", STUDENT).at_batch_size(32).optimisation
    lowest = resolved(DistillConfig(**base, minimum_learning_rate=1e-6), STUDENT, 32).optimisation
    assert (lowest.minimum_learning_rate, lowest.learning_rate) == (1e-6, scaled.learning_rate)
    given = resolved(DistillConfig(**base, learning_rate=4e-4), STUDENT, 32).optimisation
    assert (given.batch_size, given.learning_rate, given.minimum_learning_rate) == (32, 4e-4, 1e-5)


# --- what is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("linearize", r"^--recipe linearize: unknown recipe; there are linearizer, .*; did you mean linearizer\?"),
        ("digit", r"^--recipe digit: .*; did you mean digits\?"),
        ("xyz", r"^--recipe xyz: unknown recipe; there are [\w, ]+$"),
    ],
)
def test_an_unknown_recipe_is_refused_with_a_hint(name, message):
    with pytest.raises(UserError, match=message):
        distillation(name, STUDENT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, r"^--epochs 0: must be above 0"),
        ({"epochs": -1}, r"^--epochs -1: must be above 0"),
        ({"batch_size": 0}, r"^--batch-size 0: must be above 0"),
        ({"batch_size": -8}, r"^--batch-size -8: must be above 0"),
        ({"batch_size": 0, "learning_rate": 1.0}, r"^--batch-size 0: must be above 0"),
        ({"learning_rate": 0.0}, r"^--learning-rate 0\.0: must be above 0"),
        ({"learning_rate": math.inf}, r"^--learning-rate inf: must be above 0"),
        ({"learning_rate": math.nan}, r"^--learning-rate nan: must be above 0"),
        ({"minimum_learning_rate": -1e-6}, r"^--minimum-learning-rate -1e-06: must be 0 or more"),
        ({"weight_decay": -0.1}, r"^--weight-decay -0\.1: must be 0 or more"),
        ({"warmup_epochs": -1}, r"^--warmup-epochs -1: must be 0 or more"),
        ({"mask_ratio": 1.0}, r"^--mask-ratio 1\.0: "),
        ({"mask_ratio": 0.0}, r"^--mask-ratio 0\.0: .*--masked-prediction-weight 0"),
        ({"smallest_crop": 0.0}, r"^--smallest-crop 0\.0: "),
        ({"repeats": 0}, r"^--repeats 0: "),
    ],
    ids=str,
)
def test_a_value_that_cannot_work_is_refused_with_its_flag(values, message):
    with pytest.raises(UserError, match=message):
        distillation("linearizer", STUDENT).override(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, r"^--seed -1: must be at least 0"),
        ({"gradient_accumulation": 0}, r"^--gradient-accumulation 0: must be at least 1"),
        ({"evaluate_every": 0}, r"^--evaluate-every 0: must be at least 1"),
        ({"log_every": 0}, r"^--log-every 0: must be at least 1"),
        ({"num_workers": -1}, r"^--num-workers -1: must be 0 or more"),
    ],
    ids=str,
)
def test_a_runtime_that_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        RuntimeConfig(**values)


def test_configurations_cannot_be_changed_in_place():
    recipe = distillation("linearizer", STUDENT)
    for part, field in ((recipe, "drop_path"), (recipe.optimisation, "epochs"), (recipe.objectives, "stages")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, 1)
    with pytest.raises(TypeError, match="positional"):
        OptimisationConfig(1, 2, 3, 4)


# --- fine-tuning

#: ViT-Linearizer (arXiv 2504.00037), table 9, "Configurations of the fine-tuning stage": small, base and large.
TABLE_9 = {
    "betas": ((0.9, 0.999),) * 3,
    "learning_rate": (5e-4, 5e-4, 5e-4),
    "minimum_learning_rate": (1e-6, 1e-6, 1e-6),
    "weight_decay": (0.05, 0.05, 0.05),
    "epochs": (100, 100, 50),
    "schedule": ("cosine", "cosine", "cosine"),
    "batch_size": (1024, 1024, 1024),
    "warmup_epochs": (20, 20, 5),
    "drop_path": (0.4, 0.4, 0.6),
    "layer_decay": (0.65, 0.65, 0.8),
    "augmentation": ("rand", "rand", "rand"),  # rand-m9-mstd0.5-inc1, see below
    "repeats": (1, 1, 1),
}
#: Where the paper is silent, or names a thing without its value.
CHOICES_9 = {
    "label_smoothing": 0.1,
    "smallest_crop": 0.08,
    "horizontal_flip": 0.5,
    "device_augmentation": False,
    "clip_norm": None,
    "scales_learning_rate": True,
    "iterations": None,
    "warmup_iterations": 0,
}
#: The warm-up's share of the paper's run, which a shorter run keeps.
WARMUP_SHARES = (0.2, 0.2, 0.1)

SIZES = ("small", "base", "large")


@pytest.mark.parametrize("column", range(3), ids=SIZES)
def test_fine_tuning_is_table_9(column):
    recipe = find_recipe(FINE_TUNING, f"finetune_{SIZES[column]}", "")
    expected = {name: columns[column] for name, columns in TABLE_9.items()} | CHOICES_9
    assert recipe.flat() == expected | {"warmup_share": WARMUP_SHARES[column]}


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("adventurer_tiny_patch16_224", "finetune_base"),  # which the table lacks
        ("adventurer_small_patch16_224", "finetune_small"),
        ("adventurer_base_patch14_224", "finetune_base"),
        ("adventurer_large_patch8_448", "finetune_large"),
        ("vit_small_patch14_dinov2", "finetune_small"),
        ("vit_base_patch16_clip_224", "finetune_base"),
        ("deit3_large_patch16_384", "finetune_large"),
    ],
)
def test_the_column_is_that_of_the_models_size(architecture, name):
    assert finetuning_recipe(architecture) == name
    assert name in FINE_TUNING


def test_rand_augment_is_timms_m9_mstd05_inc1_and_nothing_is_erased():
    view = TrainingView((224, 224), find_recipe(FINE_TUNING, "finetune_base", "").views, None, seed=0)
    steps = view.transform.transforms
    assert [type(step).__name__ for step in steps] == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "MaybePILToTensor",
    ]  # fmt: skip  # no colour jitter beside it, and no normalisation: every model brings its own
    assert not any(isinstance(step, RandomErasing) for step in steps)
    (found,) = [step for step in steps if isinstance(step, RandAugment)]
    expected = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    assert (found.num_layers, len(found.ops)) == (expected.num_layers, len(expected.ops)) == (2, 15)
    for mine, theirs in zip(found.ops, expected.ops, strict=True):
        assert (mine.name, mine.prob, mine.magnitude, mine.magnitude_std) == (theirs.name, 0.5, 9, 0.5)
        assert mine.level_fn is theirs.level_fn  # of the increasing kind, or not
    assert steps[0].scale == (0.08, 1.0) and steps[1].p == 0.5


def rates(recipe, images: int, steps: list[int]) -> list[float]:
    """The learning rate before each of some steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.optimisation.learning_rate)
    schedule = make_schedule(optimizer, recipe.optimisation, images)
    found = []
    for step in steps:
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(("name", "epochs", "warmup"), [("finetune_small", 100, 20), ("finetune_large", 50, 5)])
def test_the_papers_run_on_imagenet_warms_up_as_long_as_it_says(name, epochs, warmup):
    """And follows timm's own schedule all along."""
    recipe = find_recipe(FINE_TUNING, name, "")
    images, per_epoch = 1_281_167, 1252
    assert total_steps(recipe.optimisation, images) == epochs * per_epoch
    steps = [*range(0, epochs * per_epoch, 313), warmup * per_epoch, epochs * per_epoch - 1]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    theirs, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=epochs - warmup, min_lr=1e-6, warmup_epochs=warmup, warmup_lr=1e-6,
        warmup_prefix=True, step_on_epochs=False, updates_per_epoch=per_epoch,
    )  # fmt: skip
    expected = []
    for step in steps:
        theirs.step_update(step)
        expected.append(optimizer.param_groups[0]["lr"])
    found = rates(recipe, images, steps)
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[0] == pytest.approx(1e-6) and found[-1] == pytest.approx(1e-6, abs=1e-9)
    assert steps[found.index(max(found))] == warmup * per_epoch
    assert max(found) == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("name", "epochs", "warmup"), [("base", 10, 2), ("base", 200, 20), ("large", 10, 1), ("large", 200, 5)]
)
def test_a_run_of_another_length_warms_up_no_larger_a_share(name, epochs, warmup):
    recipe = find_recipe(FINE_TUNING, f"finetune_{name}", "").override(epochs=epochs)
    found = rates(recipe, 4096, list(range(4 * epochs)))  # four steps an epoch
    assert found.index(max(found)) == 4 * warmup


def test_small_recipes_of_fine_tuning_have_learning_rates_of_their_own():
    smoke, digits = (find_recipe(FINE_TUNING, name, "") for name in ("smoke", "digits"))
    assert not (smoke.scales_learning_rate or digits.scales_learning_rate)
    assert (smoke.views, smoke.objectives) == (
        find_recipe(FINE_TUNING, "finetune_base", "").views,
        find_recipe(FINE_TUNING, "finetune_base", "").objectives,
    )
    assert digits.views.augmentation == "affine"  # mirrored or cropped, a digit may be another one


# --- segmentation

#: The public BEiT recipe for ADE20K with UperNet.
ADE20K = {
    "learning_rate": 8e-5,
    "minimum_learning_rate": 0.0,
    "weight_decay": 0.05,
    "betas": (0.9, 0.999),
    "layer_decay": 0.75,
    "drop_path": 0.1,
    "iterations": 160_000,
    "batch_size": 16,
    "schedule": "poly",
    "warmup_iterations": 1500,
    "head": "upernet",
    "head_width": 512,
    "auxiliary_weight": 0.4,
    "crop": (512, 512),
    "mode": "sliding",
    "stride": None,  # two thirds of the crop, 341: see test_segment.py
    "scales": (0.5, 2.0),
    "horizontal_flip": 0.5,
    "colour": True,
    "largest_class_share": 0.75,
    "epochs": None,
    "warmup_epochs": 0,
    "warmup_share": 0.1,
    "clip_norm": None,
    "scales_learning_rate": True,
}
OF_A_FOLDER = {
    "learning_rate": 1e-3,
    "layer_decay": None,
    "drop_path": 0.0,
    "iterations": 2000,
    "batch_size": 8,
    "warmup_iterations": 200,
    "head": "linear",
    "crop": None,
    "mode": "whole",
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("segment_ade20k", {}),
        ("segment_cityscapes", {"crop": (512, 1024), "mode": "whole"}),
        ("segment_folder", OF_A_FOLDER),
        ("smoke", OF_A_FOLDER | {"iterations": 4, "batch_size": 2, "warmup_iterations": 0}),
    ],
)
def test_segmentation_value_by_value(name, changes):
    assert find_recipe(SEGMENTATION, name, "").flat() == ADE20K | changes


def test_the_polynomial_schedule_is_a_straight_line_down_to_nothing():
    found = rates(find_recipe(SEGMENTATION, "segment_ade20k", ""), 20_210, steps := list(range(0, 160_000, 250)))
    expected = [8e-5 * (step / 1500 if step < 1500 else (160_000 - step) / (160_000 - 1500)) for step in steps]
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("iterations", "warmup"), [(100, 10), (2000, 200), (4000, 200)])
def test_a_short_segmentation_warms_up_a_tenth_of_it(iterations, warmup):
    recipe = find_recipe(SEGMENTATION, "segment_folder", "").override(iterations=iterations)
    found = rates(recipe, 40, list(range(iterations)))
    assert found.index(max(found)) == warmup
    assert found[-1] == pytest.approx(1e-3 / (iterations - warmup))


# --- their flags

#: Flags that say which run it is, of both commands; the rest are a recipe's values or the machine's.
OF_THE_OTHER_RUNS = {
    "model", "data", "out", "recipe", "model_arch", "model_args", "model_pretrained", "patch_size",
    "report", "dry_run", "debug",
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "recipes", "of_the_run", "without_flag"),
    [
        (
            FinetuneConfig,
            FINE_TUNING,
            {"label_fraction", "image_size", "global_pool"},
            # A run of fine-tuning is counted in epochs.
            {"betas", "scales_learning_rate", "schedule", "warmup_share", "iterations", "warmup_iterations"},
        ),
        (
            SegmentConfig,
            SEGMENTATION,
            {"dataset"},
            {"betas", "scales_learning_rate", "schedule", "warmup_share", "epochs", "warmup_epochs"},
        ),
    ],
)
def test_every_flag_of_the_other_commands_is_a_value_and_every_value_has_a_flag(config, recipes, of_the_run, without_flag):
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    runtime = {field.name for field in dataclasses.fields(RuntimeConfig)}
    flags = set(fields) - runtime - OF_THE_OTHER_RUNS - of_the_run
    for name in recipes:
        assert flags == set(find_recipe(recipes, name, "").flat()) - without_flag
    assert {fields[name] for name in flags} <= {None, False}


def test_flags_of_a_length_of_another_kind_are_no_flags():
    """Epochs and iterations cannot both be given: neither command has the other's."""
    recipe = find_recipe(SEGMENTATION, "smoke", "")
    with pytest.raises(ValueError, match="either epochs or iterations"):
        recipe.override(epochs=3)
